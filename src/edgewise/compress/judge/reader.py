"""A model that reads whole windows of tokens: first hidden states, which are small, then a few distributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from edgewise.engines.base import StageRow
from edgewise.engines.load import local_model
from edgewise.engines.local import LocalModel
from edgewise.engines.score import log_probs
from edgewise.models.bundle import Bundle
from edgewise.types import FloatArray, IdArray

ROWS: Final = 32  # positions whose distributions are in memory
SLOTS: Final = 8  # windows, or answers, at once
ROOM: Final = 2048  # positions of a session where the model has so many


class Reader:
    """The bundle on our own engine, whose `model` may answer requests too once the windows are read. Sessions have room
    for `length` positions, and for ROOM or the model's context where that is less."""

    def __init__(self, bundle: Bundle, length: int) -> None:
        self.context = min(max(length, ROOM), bundle.card.context)
        self.model: LocalModel[Any] = local_model(bundle, slots=SLOTS, context=self.context)
        self._stage = self.model.stage()
        self._logits = np.empty((ROWS, self.model.vocab), np.float32)

    async def hidden(self, windows: Sequence[IdArray]) -> list[FloatArray]:
        """Hidden states behind the last layer, of all but the last token of each of at most SLOTS windows, float32
        [tokens - 1, hidden] each."""
        rows = [
            StageRow(str(n), 0, self.model.embed(np.ascontiguousarray(ids[:-1])), len(ids) - 1)
            for n, ids in enumerate(windows)
        ]
        for row in rows:
            await self._stage.open(row.session, len(row.hidden), self._stage.layers)
        found = await self._stage.forward(rows)
        for row in rows:
            await self._stage.close(row.session)
        return found

    def log_probs(self, hidden: FloatArray) -> FloatArray:
        """Natural log-probabilities of the next token, float32 [n, vocab], for at most ROWS hidden states; valid until
        the next call. EngineError if the model gives NaN."""
        logits = self._logits[: len(hidden)]
        self.model.project(np.ascontiguousarray(hidden), logits)
        return log_probs(logits, self.model.name)

    async def shutdown(self) -> None:
        await self.model.shutdown()


def few(count: int) -> Iterator[slice]:
    """The numbers below `count`, ROWS at a time."""
    return (slice(at, min(at + ROWS, count)) for at in range(0, count, ROWS))
