"""Answers of OpenAI's chat and text completions: our types to JSON bytes and back, for both ends of the wire.

The types serve for writing (every field that clients count on is there, null included) and for reading, where any field
may be missing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edgewise.errors import RemoteBroken
from edgewise.types import Candidate, Chunk, Decision, Timings, Token, Usage
from edgewise.wire import sse

_json = msgspec.json.Encoder()
_MARK = "\0"  # stands for the text in an event of which the rest is wanted
LEAST_LOGPROB = -9999.0  # what OpenAI sends for "next to impossible"; JSON has no infinity

_Byte = Annotated[int, Meta(ge=0, le=255)]


class Alternative(Struct):
    token: str
    logprob: float | None = None
    bytes: list[_Byte] | None = None
    id: int | UnsetType = UNSET  # not OpenAI's; llama-server sends it

    def candidate(self) -> Candidate:
        return Candidate(_id(self), _raw(self), LEAST_LOGPROB if self.logprob is None else self.logprob)


class TokenBody(Alternative):
    top_logprobs: list[Alternative] | None = None

    def value(self) -> Token:
        top = tuple(alternative.candidate() for alternative in self.top_logprobs or ())
        return Token(_id(self), _raw(self), self.logprob, top)


class LogprobsBody(Struct):
    content: list[TokenBody] | None = None
    refusal: None = None


class TextLogprobsBody(Struct):
    """Those of a text completion: lists with an entry for each token. A token that is not a whole character is written
    as `bytes:` and its bytes in the form \\xf0."""

    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] | None = None


class CachedTokens(Struct):
    cached_tokens: int | None = None


class ReasoningTokens(Struct):
    reasoning_tokens: int | None = None


class UsageBody(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: CachedTokens | None = None
    completion_tokens_details: ReasoningTokens | None = None

    @classmethod
    def of(cls, usage: Usage) -> UsageBody:
        total = usage.prompt_tokens + usage.completion_tokens
        cached = CachedTokens(usage.cached_tokens)
        return cls(usage.prompt_tokens, usage.completion_tokens, total, cached, ReasoningTokens(0))

    def value(self) -> Usage:
        details = self.prompt_tokens_details
        return Usage(self.prompt_tokens, self.completion_tokens, (details and details.cached_tokens) or 0)


class EdgewiseBody(Struct):
    """Our own field of an answer; `timings` are there once the answer is complete. `cut` is there if the deadline cut
    it off: then finish_reason is "length", and usage is not known."""

    route: str
    confidence: float | None = None
    reason: str = ""
    timings: Timings | None = None
    cut: Literal["deadline"] | UnsetType = UNSET


class ErrorBody(Struct):
    message: str | None = None
    type: str | None = None
    param: Any = None
    code: str | int | None = None
    n_prompt_tokens: int | UnsetType = UNSET  # of a full context, as llama-server has it
    n_ctx: int | UnsetType = UNSET


class ErrorAnswer(Struct):
    error: ErrorBody | str


class AnswerMessage(Struct):
    role: str = "assistant"
    content: str | None = None
    refusal: str | None = None


class Choice(Struct):
    index: int = 0
    message: AnswerMessage = msgspec.field(default_factory=AnswerMessage)
    logprobs: LogprobsBody | None = None
    finish_reason: str | None = None
    x_edgewise: EdgewiseBody | UnsetType = UNSET  # where there are several choices: each has its own way


class Completion(Struct):
    """A whole answer to a conversation."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    object: str = "chat.completion"
    usage: UsageBody | None = None
    system_fingerprint: str | None = None
    x_edgewise: EdgewiseBody | UnsetType = UNSET


class TextChoice(Struct):
    """Of a text completion, whole or a piece of it."""

    index: int = 0
    text: str = ""
    logprobs: TextLogprobsBody | None = None
    finish_reason: str | None = None
    x_edgewise: EdgewiseBody | UnsetType = UNSET

    def tokens(self) -> tuple[Token, ...]:
        """Those that the server told; where it told none, the text of this piece as one token of unknown id."""
        told = self.logprobs
        if told is None or told.tokens is None:
            return _untold(self.text)
        logprobs = told.token_logprobs or [None] * len(told.tokens)
        tops = told.top_logprobs or [None] * len(told.tokens)
        return tuple(
            Token(UNKNOWN_ID, _unspelt(token), logprob, _ranked(top))
            for token, logprob, top in zip(told.tokens, logprobs, tops, strict=False)
        )


class TextCompletion(Struct):
    """A text completion, whole, or a piece of it with an `error` if one comes when the status 200 has been sent."""

    id: str | None = None
    object: str = "text_completion"
    created: int | float | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    choices: list[TextChoice] | None = None
    usage: UsageBody | UnsetType | None = UNSET
    x_edgewise: EdgewiseBody | UnsetType = UNSET
    error: ErrorBody | str | UnsetType | None = UNSET


class Delta(Struct):
    role: str | UnsetType | None = UNSET
    content: str | UnsetType | None = UNSET


class ChunkChoice(Struct):
    index: int = 0
    delta: Delta | None = msgspec.field(default_factory=Delta)
    logprobs: LogprobsBody | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return (self.delta and self.delta.content) or ""

    def tokens(self) -> tuple[Token, ...]:
        """Those that the server told; where it told none, the text of this piece as one token of unknown id."""
        if self.logprobs is not None and self.logprobs.content is not None:
            return tuple(token.value() for token in self.logprobs.content)
        return _untold(self.text)


class ChunkBody(Struct):
    """A piece of a streamed answer to a conversation, or an error that comes when the status 200 has long been sent."""

    id: str | None = None
    object: str = "chat.completion.chunk"
    created: int | float | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    choices: list[ChunkChoice] | None = None
    usage: UsageBody | UnsetType | None = UNSET
    x_edgewise: EdgewiseBody | UnsetType = UNSET
    error: ErrorBody | str | UnsetType | None = UNSET


class ModelBody(Struct):
    id: str
    object: str = "model"
    created: int | None = 0
    owned_by: str | None = "edgewise"


class ModelList(Struct):
    object: str = "list"
    data: list[ModelBody] | None = None


UNKNOWN_ID = -1
Piece = TypeVar("Piece", ChunkBody, TextCompletion)


def _untold(text: str) -> tuple[Token, ...]:
    return (Token(UNKNOWN_ID, text.encode(), None),) if text else ()


def _ranked(top: dict[str, float] | None) -> tuple[Candidate, ...]:
    best = sorted((top or {}).items(), key=lambda pair: -pair[1])
    return tuple(Candidate(UNKNOWN_ID, _unspelt(token), logprob) for token, logprob in best)


def _id(body: Alternative) -> int:
    return UNKNOWN_ID if isinstance(body.id, UnsetType) else body.id


def _raw(body: Alternative) -> bytes:
    return body.token.encode() if body.bytes is None else bytes(body.bytes)


_chunk_decoder = msgspec.json.Decoder(ChunkBody)
_text_decoder = msgspec.json.Decoder(TextCompletion)
_error_decoder = msgspec.json.Decoder(ErrorAnswer)
_models_decoder = msgspec.json.Decoder(ModelList)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode_chunk(data: bytes) -> ChunkBody:
    """RemoteBroken if it is no piece of an answer to a conversation."""
    return _piece(_chunk_decoder, data)


def decode_text_chunk(data: bytes) -> TextCompletion:
    """RemoteBroken if it is no piece of a text completion."""
    return _piece(_text_decoder, data)


def _piece(decoder: msgspec.json.Decoder[Piece], data: bytes) -> Piece:
    try:
        return decoder.decode(data)
    except _MALFORMED as e:
        raise RemoteBroken(f"a piece of the stream makes no sense: {e}") from None


def decode_models(data: bytes) -> list[str]:
    """Names of the models. RemoteBroken if it is no list of them."""
    try:
        return [model.id for model in _models_decoder.decode(data).data or ()]
    except _MALFORMED as e:
        raise RemoteBroken(f"the list of models makes no sense: {e}") from None


def decode_error(data: bytes) -> ErrorBody:
    """What an error answer says; text that is not in OpenAI's form becomes the message."""
    try:
        error = _error_decoder.decode(data).error
    except _MALFORMED:
        error = data[:500].decode("utf-8", "replace").strip()
    return error if isinstance(error, ErrorBody) else ErrorBody(message=error)


def encode_error(error: ErrorBody) -> bytes:
    return msgspec.json.encode(ErrorAnswer(error))


def encode_model(name: str) -> bytes:
    return msgspec.json.encode(ModelBody(name))


def encode_models(names: Iterable[str]) -> bytes:
    return msgspec.json.encode(ModelList(data=[ModelBody(name) for name in names]))


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stamp:
    """What each piece of one answer repeats; `created` in Unix seconds, `model` the one that answered."""

    id: str
    created: int
    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, complete or cut off by the deadline; `echo` goes before its text. The last chunk of a complete one
    carries the finish reason, the usage and the timings."""

    chunks: Sequence[Chunk]
    decision: Decision
    cut: bool = False
    echo: str = ""

    @property
    def text(self) -> str:
        return self.echo + "".join(chunk.text for chunk in self.chunks)

    @property
    def tokens(self) -> list[Token]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def finish_reason(self) -> str | None:
        return "length" if self.cut else self.chunks[-1].finish_reason

    @property
    def edgewise(self) -> EdgewiseBody:
        timings = None if self.cut else self.chunks[-1].timings
        return _edgewise(self.decision, timings, cut="deadline" if self.cut else UNSET)


def encode_chat_completion(stamp: Stamp, answers: Sequence[Answer], usage: Usage | None, *, logprobs: bool) -> bytes:
    """The whole answer to a conversation."""
    choices = [
        Choice(
            index=index,
            message=AnswerMessage(content=answer.text),
            logprobs=_logprobs(answer.tokens) if logprobs else None,
            finish_reason=answer.finish_reason,
            x_edgewise=answer.edgewise if len(answers) > 1 else UNSET,
        )
        for index, answer in enumerate(answers)
    ]
    return _whole(Completion, stamp, choices, answers[0], usage)


def encode_text_completion(stamp: Stamp, answers: Sequence[Answer], usage: Usage | None, *, logprobs: bool) -> bytes:
    """The whole text completion."""
    choices = [
        TextChoice(
            index=index,
            text=answer.text,
            logprobs=_text_logprobs(answer.tokens, len(answer.echo)) if logprobs else None,
            finish_reason=answer.finish_reason,
            x_edgewise=answer.edgewise if len(answers) > 1 else UNSET,
        )
        for index, answer in enumerate(answers)
    ]
    return _whole(TextCompletion, stamp, choices, answers[0], usage)


def _whole(
    kind: type[Completion] | type[TextCompletion], stamp: Stamp, choices: list[Any], first: Answer, usage: Usage | None
) -> bytes:
    return msgspec.json.encode(
        kind(
            id=stamp.id,
            created=stamp.created,
            model=stamp.model,
            choices=choices,
            usage=UsageBody.of(usage) if usage else None,
            system_fingerprint=stamp.fingerprint,
            x_edgewise=first.edgewise,
        )
    )


class StreamEncoder(ABC):
    """Events of one streamed answer: for each choice `opening`, any number of `content`, `closing`; then `end`, or
    `failure` in its place. `echoes` are what goes before the text of each choice."""

    _body: type[ChunkBody] | type[TextCompletion]

    def __init__(self, stamp: Stamp, echoes: Sequence[str], *, logprobs: bool, include_usage: bool) -> None:
        self._stamp = stamp
        self._echoes = echoes
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._forms: dict[int, tuple[bytes, bytes]] = {}  # by index: what stands before and after a piece's text

    def opening(self, index: int, decision: Decision) -> bytes:
        """What a choice begins with, and the route that was taken."""
        return self._event([self._opened(index)], _edgewise(decision))

    def content(self, index: int, chunk: Chunk) -> bytes:
        """The chunk's text and tokens; nothing if it has neither to show."""
        if self._logprobs:
            shows = chunk.text or chunk.tokens
            return self._event([self._piece(index, chunk.text, chunk.tokens)]) if shows else b""
        if not chunk.text:
            return b""
        before, after = self._forms.get(index) or self._form(index)
        return before + _json.encode(chunk.text) + after

    def closing(self, index: int, last: Chunk, decision: Decision) -> bytes:
        """The finish reason in a piece of its own."""
        return self._event([self._closed(index, last.finish_reason)], _edgewise(decision, last.timings))

    def end(self, usage: Usage | None, last: Chunk, decision: Decision) -> bytes:
        """The usage if it was asked for, and the end mark; `last` and `decision` are of the choice that ended last."""
        events = b""
        if self._include_usage and usage is not None:
            events = self._event([], _edgewise(decision, last.timings), UsageBody.of(usage))
        return events + sse.event(b"[DONE]")

    def failure(self, error: ErrorBody) -> bytes:
        """The last event of a broken answer: clients raise it, and no end mark may follow."""
        return sse.event(encode_error(error))

    def _form(self, index: int) -> tuple[bytes, bytes]:
        """Pieces of text alone differ in nothing but the text: the rest is written once."""
        before, _, after = self._event([self._piece(index, _MARK, None)]).rpartition(_json.encode(_MARK))
        self._forms[index] = before, after
        return before, after

    def _event(
        self, choices: list[Any], x_edgewise: EdgewiseBody | UnsetType = UNSET, usage: UsageBody | None = None
    ) -> bytes:
        body = self._body(
            id=self._stamp.id,
            created=self._stamp.created,
            model=self._stamp.model,
            system_fingerprint=self._stamp.fingerprint,
            choices=choices,
            usage=usage if self._include_usage else UNSET,
            x_edgewise=x_edgewise,
        )
        return sse.event(_json.encode(body))

    @abstractmethod
    def _opened(self, index: int) -> ChunkChoice | TextChoice: ...

    @abstractmethod
    def _piece(self, index: int, text: str, tokens: Sequence[Token] | None) -> ChunkChoice | TextChoice:
        """Text, and the log-probs of `tokens` if they are wanted."""

    @abstractmethod
    def _closed(self, index: int, reason: str | None) -> ChunkChoice | TextChoice: ...


class ChatEncoder(StreamEncoder):
    """Of an answer to a conversation."""

    _body = ChunkBody

    def _opened(self, index: int) -> ChunkChoice:
        return ChunkChoice(index, Delta("assistant", self._echoes[index]))

    def _piece(self, index: int, text: str, tokens: Sequence[Token] | None) -> ChunkChoice:
        return ChunkChoice(index, Delta(content=text), None if tokens is None else _logprobs(tokens))

    def _closed(self, index: int, reason: str | None) -> ChunkChoice:
        return ChunkChoice(index, finish_reason=reason)


class TextEncoder(StreamEncoder):
    """Of a text completion."""

    _body = TextCompletion

    def __init__(self, stamp: Stamp, echoes: Sequence[str], *, logprobs: bool, include_usage: bool) -> None:
        super().__init__(stamp, echoes, logprobs=logprobs, include_usage=include_usage)
        self._offsets = [len(echo) for echo in echoes]  # characters before the next token

    def _opened(self, index: int) -> TextChoice:
        return TextChoice(index, self._echoes[index])

    def _piece(self, index: int, text: str, tokens: Sequence[Token] | None) -> TextChoice:
        if tokens is None:
            return TextChoice(index, text)
        logprobs = _text_logprobs(tokens, self._offsets[index])
        self._offsets[index] += sum(len(_shown(token.raw)) for token in tokens)
        return TextChoice(index, text, logprobs)

    def _closed(self, index: int, reason: str | None) -> TextChoice:
        return TextChoice(index, finish_reason=reason)


def _edgewise(
    decision: Decision, timings: Timings | None = None, cut: Literal["deadline"] | UnsetType = UNSET
) -> EdgewiseBody:
    return EdgewiseBody(decision.route, decision.confidence, decision.reason, timings, cut)


def _logprobs(tokens: Iterable[Token]) -> LogprobsBody | None:
    """None, as if they had not been asked for, where the engine could not tell all of them."""
    content = []
    for token in tokens:
        if token.logprob is None:
            return None
        top = [Alternative(*_told(candidate.raw, candidate.logprob)) for candidate in token.top]
        content.append(TokenBody(*_told(token.raw, token.logprob), top_logprobs=top))
    return LogprobsBody(content)


def _told(raw: bytes, logprob: float) -> tuple[str, float, list[int]]:
    """`token` replaces what is not a whole character; `bytes` are exact."""
    return _shown(raw), max(logprob, LEAST_LOGPROB), list(raw)


def _shown(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _text_logprobs(tokens: Sequence[Token], start: int) -> TextLogprobsBody | None:
    """The same for a text completion; the first token stands `start` characters after the answer's beginning."""
    logprobs = [max(token.logprob, LEAST_LOGPROB) for token in tokens if token.logprob is not None]
    if len(logprobs) < len(tokens):
        return None
    tops = [{_spelt(one.raw): max(one.logprob, LEAST_LOGPROB) for one in token.top} for token in tokens]
    lengths = [len(_shown(token.raw)) for token in tokens]
    return TextLogprobsBody(
        tokens=[_spelt(token.raw) for token in tokens],
        token_logprobs=list(logprobs),
        top_logprobs=[top or None for top in tops] if any(tops) else None,
        text_offset=[start + sum(lengths[:at]) for at in range(len(lengths))],
    )


_SPELT = "bytes:"


def _spelt(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _SPELT + "".join(f"\\x{byte:02x}" for byte in raw)


def _unspelt(token: str) -> bytes:
    if re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token):
        return bytes.fromhex(token.removeprefix(_SPELT).replace("\\x", ""))
    return token.encode()
