"""Answers of OpenAI's chat and text completions: our types to JSON bytes, whole or as the events of a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from edgewise.types import Chunk, Decision, Timings, Token, Usage
from edgewise.wire import sse
from edgewise.wire.answers import (
    LEAST_LOGPROB,
    Alternative,
    AnswerMessage,
    Choice,
    ChunkBody,
    ChunkChoice,
    Completion,
    Delta,
    EdgewiseBody,
    ErrorBody,
    LogprobsBody,
    TextChoice,
    TextCompletion,
    TextLogprobsBody,
    TokenBody,
    UsageBody,
    encode_error,
    spelt,
)

_json = msgspec.json.Encoder()
_MARK = "\0"  # stands for the text in an event of which the rest is wanted


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
    tops = [{spelt(one.raw): max(one.logprob, LEAST_LOGPROB) for one in token.top} for token in tokens]
    lengths = [len(_shown(token.raw)) for token in tokens]
    return TextLogprobsBody(
        tokens=[spelt(token.raw) for token in tokens],
        token_logprobs=list(logprobs),
        top_logprobs=[top or None for top in tops] if any(tops) else None,
        text_offset=[start + sum(lengths[:at]) for at in range(len(lengths))],
    )
