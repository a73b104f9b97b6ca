"""Answers of OpenAI's chat and text completions as JSON, and how they are read; wire/encoders.py writes them.

The types serve for writing (every field that clients count on is there, null included) and for reading, where any field
may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edgewise.errors import RemoteBroken
from edgewise.types import Candidate, Timings, Token, Usage

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
            Token(UNKNOWN_ID, unspelt(token), logprob, _ranked(top))
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
    return tuple(Candidate(UNKNOWN_ID, unspelt(token), logprob) for token, logprob in best)


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


_SPELT = "bytes:"


def spelt(raw: bytes) -> str:
    """A token's bytes as a text completion spells them, whole characters or not."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _SPELT + "".join(f"\\x{byte:02x}" for byte in raw)


def unspelt(token: str) -> bytes:
    if re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token):
        return bytes.fromhex(token.removeprefix(_SPELT).replace("\\x", ""))
    return token.encode()
