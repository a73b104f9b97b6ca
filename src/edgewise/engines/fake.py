"""Fakes of every seam, for tests of what stands above: scripted answers and faults, and a token model that
keeps the contract of base.py to the letter."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

import numpy as np
import numpy.typing as npt

from edgewise.engines.answer import Stopwatch, TextStream, check_request
from edgewise.engines.base import ALL_SAMPLING, Capabilities, Row
from edgewise.errors import ContextFull, EngineClosed, GapError, Overloaded
from edgewise.types import Candidate, Chunk, FinishReason, FloatArray, Message, Request, Token, Usage

Tensors = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Script:
    """One scripted answer, and what goes wrong with it."""

    tokens: tuple[Token, ...]
    finish_reason: FinishReason = "stop"
    start_delay_s: float = 0.0
    delay_s: float = 0.0  # before each token
    error: Exception | None = None  # raised in place of token number `breaks_at`
    hangs: bool = False  # token number `breaks_at` never comes; not even the deadline ends it
    breaks_at: int = 0

    @classmethod
    def of(cls, text: str, logprob: float | Sequence[float] = -0.1) -> Script:
        """One token a word. `logprob` holds for each token, or is a sequence that is repeated as needed."""
        words = re.findall(r"\S+\s*|\s+", text)
        logprobs = cycle([logprob] if isinstance(logprob, (int, float)) else logprob)
        return cls(tuple(Token(i, word.encode(), p) for i, (word, p) in enumerate(zip(words, logprobs, strict=False))))


class FakeGenerator:
    """Answers as scripted; `answer` is a text, a Script, or a function of the request that gives one.

    `requests` are those that were started, in order; `given` counts the tokens handed out, `finished` the requests
    that ended well, `cancelled` those that the reader left, `active` those that run now.
    """

    can = Capabilities(logprobs=True, top_logprobs=20, seed=True, sampling=ALL_SAMPLING, prompt_ids=True, context=4096)

    def __init__(
        self,
        answer: str | Script | Callable[[Request], str | Script] = "A fake answer of a few words.",
        *,
        name: str = "fake",
        can: Capabilities | None = None,
    ) -> None:
        self.name = name
        self.can = can or type(self).can
        self.answer = answer
        self.requests: list[Request] = []
        self.given = self.finished = self.cancelled = self.active = 0
        self.closed = False

    def generate(self, request: Request) -> AsyncIterator[Chunk]:
        return self._answer(request, Stopwatch(request.deadline_ms))

    async def close(self) -> None:
        self.closed = True

    async def _answer(self, request: Request, watch: Stopwatch) -> AsyncIterator[Chunk]:
        prompt_tokens = self._admit(request)
        script = self._script(request)
        self.requests.append(request)
        self.active += 1
        text = TextStream(request.stop)
        try:
            await _pause(script.start_delay_s, watch)
            given, reason = 0, script.finish_reason
            for token in self._tokens(script, request):
                await self._reach(script, given, watch)
                given += 1
                self.given += 1
                watch.token()
                yield Chunk(text.push(token.raw), (self._shown(token, request),), model=self.name)
                if text.stopped:
                    break
            else:
                await self._reach(script, given, watch)
                reason = "length" if given == request.max_tokens else reason
            self.finished += 1
            yield Chunk(
                text.finish(),
                finish_reason="stop" if text.stopped else reason,
                usage=Usage(prompt_tokens, given),
                timings=watch.timings(),
                model=self.name,
            )
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled += 1
            raise
        finally:
            self.active -= 1

    def _admit(self, request: Request) -> int:
        """The prompt's length in tokens, once it is clear that the request can be served."""
        if self.closed:
            raise EngineClosed(f"{self.name} was closed")
        check_request(request, self.can)
        ids = _prompt(request)
        if self.can.context is not None and len(ids) + 1 > self.can.context:
            raise ContextFull(len(ids) + 1, self.can.context, param=request.prompt_field)
        return len(ids)

    def _script(self, request: Request) -> Script:
        answer = self.answer(request) if callable(self.answer) else self.answer
        return Script.of(answer) if isinstance(answer, str) else answer

    def _tokens(self, script: Script, request: Request) -> Iterator[Token]:
        return islice(cycle(script.tokens) if request.ignore_eos else script.tokens, request.max_tokens)

    async def _reach(self, script: Script, number: int, watch: Stopwatch) -> None:
        """Wait for token `number`, and meet the fault that is scripted for it."""
        await _pause(script.delay_s, watch)
        if self.closed:
            raise EngineClosed(f"{self.name} was closed")
        if number == script.breaks_at and script.hangs:
            await asyncio.Event().wait()
        if number == script.breaks_at and script.error is not None:
            raise script.error

    def _shown(self, token: Token, request: Request) -> Token:
        """The token with as many alternatives as were asked for, made up where the script has none."""
        if not request.top_logprobs or token.logprob is None:
            return replace(token, top=())
        known = token.top or (Candidate(token.id, token.raw, token.logprob),)
        rest = max(1.0 - sum(math.exp(c.logprob) for c in known), 1e-9)
        made_up = [Candidate(-1 - i, b"?", math.log(rest) - (i + 1) * math.log(2)) for i in range(request.top_logprobs)]
        best = sorted((*known, *made_up), key=lambda c: -c.logprob)[: request.top_logprobs]
        return replace(token, top=tuple(best))


def _prompt(request: Request) -> Sequence[int]:
    if request.prompt_ids is not None:
        return request.prompt_ids
    tokenizer = FakeTokenizer()
    return tokenizer.chat(request.messages) if request.prompt is None else tokenizer.encode(request.prompt)


async def _pause(seconds: float, watch: Stopwatch) -> None:
    await asyncio.sleep(max(0.0, min(seconds, watch.remaining_s())))
    watch.check()


class FakeTokenizer:
    """Ids 0..255 are bytes, then come pieces of several bytes (some cut inside a character); the last id stops."""

    pieces = (b"the ", "é".encode(), "日本".encode(), b"\xe2\x82", b"\xac", b"\xf0", b"\x9f\x91\x8d", b"\n\n")
    stop_id = 256 + len(pieces)
    vocab = stop_id + 1
    stop_ids = frozenset({stop_id})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def chat(self, messages: Sequence[Message]) -> list[int]:
        turns = [f"{message.role}: {message.content}\n" for message in messages]
        return self.encode("".join(turns) + "assistant: ")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return self.pieces[token_id - 256] if token_id < self.stop_id else b""


@dataclass(slots=True)
class _Session:
    limit: int
    states: list[int] = field(default_factory=lambda: [0])  # a hash of each prefix, the empty one first

    @property
    def length(self) -> int:
        return len(self.states) - 1


class FakeTokenModel:
    """Logits from a hash of the whole prefix: any order, chunking or rewinding of rows must give the same text.

    Logits of a forward become NaN with the next one, as the contract allows. `bias` float32 [vocab] is added to all
    logits; `before_forward` sees the rows first and may raise; `delay_s` passes inside each forward, as over a network.
    `calls` counts the calls by name, `computed` the positions, `most_rows` is the widest forward.
    """

    def __init__(
        self,
        *,
        name: str = "fake-tokens",
        vocab: int = FakeTokenizer.vocab,
        context: int = 512,
        slots: int = 4,
        seed: int = 0,
        bias: FloatArray | None = None,
        delay_s: float | None = None,
        before_forward: Callable[[Sequence[Row]], None] | None = None,
    ) -> None:
        self.name, self.vocab, self.context, self.slots = name, vocab, context, slots
        self.bias, self.delay_s, self.before_forward = bias, delay_s, before_forward
        self.calls: Counter[str] = Counter()
        self.computed = self.most_rows = 0
        self._sessions: dict[str, _Session] = {}
        self._noise = np.random.default_rng(seed).normal(0, 3, 4093 + vocab).astype(np.float32)
        self._given: list[FloatArray] = []
        self._busy = self._down = False

    @property
    def lengths(self) -> dict[str, int]:
        """Positions held by each open session."""
        return {name: session.length for name, session in self._sessions.items()}

    async def open(self, session: str, limit: int) -> None:
        with self._call("open"):
            if session in self._sessions:
                raise ValueError(f"session {session!r} is open already")
            if limit > self.context:
                raise ContextFull(limit, self.context)
            if len(self._sessions) == self.slots:
                raise Overloaded(f"all {self.slots} slots are taken")
            self._sessions[session] = _Session(limit)

    async def forward(self, rows: Sequence[Row]) -> list[FloatArray]:
        with self._call("forward"):
            if self.delay_s is not None:
                await asyncio.sleep(self.delay_s)
            if self.before_forward is not None:
                self.before_forward(rows)
            self._check(rows)
            for old in self._given:
                old.fill(np.nan)
            self._given = [self._apply(row) for row in rows]
            self.most_rows = max(self.most_rows, len(rows))
            return list(self._given)

    async def rewind(self, session: str, position: int) -> None:
        with self._call("rewind"):
            held = self._sessions[session]
            if position > held.length:
                raise GapError(session, position, held.length)
            del held.states[position + 1 :]

    async def close(self, session: str) -> None:
        with self._call("close"):
            self._sessions.pop(session, None)

    async def shutdown(self) -> None:
        self.calls["shutdown"] += 1
        self._sessions.clear()
        self._down = True

    @contextmanager
    def _call(self, name: str) -> Iterator[None]:
        if self._down:
            raise EngineClosed(f"{self.name} was shut down")
        assert not self._busy, f"{name} was called while another call runs"
        self.calls[name] += 1
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _check(self, rows: Sequence[Row]) -> None:
        assert rows, "a forward without rows"
        assert len({row.session for row in rows}) == len(rows), "two rows of one session"
        for row in rows:
            held = self._sessions[row.session]
            assert row.ids.dtype == np.int64, "ids are not int64"
            assert row.ids.ndim == 1, "ids are not a row"
            assert len(row.ids) >= 1, "a row without ids"
            assert ((row.ids >= 0) & (row.ids < self.vocab)).all(), "an id outside the vocabulary"
            assert 0 <= row.want <= len(row.ids), "want is not 0..n"
            if row.position > held.length:
                raise GapError(row.session, row.position, held.length)
            if row.position + len(row.ids) > held.limit:
                raise ContextFull(row.position + len(row.ids), held.limit)

    def _apply(self, row: Row) -> FloatArray:
        held = self._sessions[row.session]
        del held.states[row.position + 1 :]
        for token_id in row.ids.tolist():
            held.states.append(_next_state(held.states[-1], token_id))
        self.computed += len(row.ids)
        logits = np.empty((row.want, self.vocab), np.float32)
        for at, state in enumerate(held.states[len(held.states) - row.want :]):
            start = state % 4093
            logits[at] = self._noise[start : start + self.vocab]
        if self.bias is not None:
            logits += self.bias
        return logits


def _next_state(state: int, token_id: int) -> int:
    digest = hashlib.blake2b(token_id.to_bytes(8, "little"), key=state.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class FakePredictor:
    """Answers with fixed tensors or a function of the inputs; `inputs` are those seen, in order."""

    def __init__(
        self,
        answer: Tensors | Callable[[Tensors], Tensors],
        *,
        name: str = "fake-predictor",
        delay_s: float = 0.0,
        error: Exception | None = None,
        hangs: bool = False,
    ) -> None:
        self.name, self.answer, self.delay_s, self.error, self.hangs = name, answer, delay_s, error, hangs
        self.inputs: list[Tensors] = []
        self.closed = False

    async def predict(self, inputs: Tensors) -> Tensors:
        if self.closed:
            raise EngineClosed(f"{self.name} was closed")
        self.inputs.append(inputs)
        await asyncio.sleep(self.delay_s)
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return self.answer(inputs) if callable(self.answer) else self.answer

    async def close(self) -> None:
        self.closed = True
