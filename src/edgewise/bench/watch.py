"""A TokenModel and a Tokenizer that pass every call on and note when it was: nothing in the engine knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from edgewise.bench.runs import Time, now
from edgewise.engines.base import Row, Tokenizer, TokenModel
from edgewise.types import Best, FloatArray, Message


class Part(NamedTuple):
    """What one row of a forward asked for."""

    session: str
    position: int
    tokens: int
    want: int  # logits


@dataclass(frozen=True, slots=True)
class Step:
    """One forward of the model, and its rows. Whatever their number, they may have been computed at once."""

    time: Time
    rows: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)


@dataclass
class Log:
    """What the watchers note. Lists only grow while a run lasts, each from one thread."""

    began: int = 0
    prompts: dict[int, Time] = field(default_factory=dict)  # by the request's number
    steps: list[Step] = field(default_factory=list)
    texts: list[Time] = field(default_factory=list)  # calls of token_bytes

    def begin(self) -> None:
        """What came before does not count."""
        self.prompts.clear()
        self.steps.clear()
        self.texts.clear()
        self.began = now()


number: ContextVar[int] = ContextVar("number", default=0)  # of the request that a tokenizer call belongs to


class WatchedModel:
    """A TokenModel that notes when each forward ran."""

    def __init__(self, model: TokenModel, log: Log) -> None:
        self._model, self._log = model, log
        self.name, self.vocab, self.context, self.slots = model.name, model.vocab, model.context, model.slots

    async def open(self, session: str, limit: int) -> None:
        await self._model.open(session, limit)

    async def forward(self, rows: Sequence[Row]) -> Sequence[FloatArray | Best]:
        start = now()
        logits = await self._model.forward(rows)
        parts = tuple(Part(row.session, row.position, len(row.ids), row.want) for row in rows)
        self._log.steps.append(Step(Time(start, now()), parts))
        return logits

    async def rewind(self, session: str, position: int) -> None:
        await self._model.rewind(session, position)

    async def close(self, session: str) -> None:
        await self._model.close(session)

    async def shutdown(self) -> None:
        await self._model.shutdown()


class WatchedTokenizer:
    """A Tokenizer that notes when prompts and tokens pass through it."""

    def __init__(self, tokenizer: Tokenizer, log: Log) -> None:
        self._tokenizer, self._log = tokenizer, log
        self.stop_ids = tokenizer.stop_ids

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        start = now()
        ids = self._tokenizer.chat(messages)
        self._log.prompts[number.get()] = Time(start, now())
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        start = now()
        raw = self._tokenizer.token_bytes(token_id)
        self._log.texts.append(Time(start, now()))
        return raw
