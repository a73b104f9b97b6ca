"""Which of a teacher's layers a shallow student begins with: those that it can least do without.

A few layers spread evenly over a deep teacher foretell text worse than chance does. Here one layer after the other
goes, each time the one without which what is left foretells some text best: pruning of depth by perplexity (Kim et al.
2024, "Shortened LLaMA", who rank the layers once), ranked anew after each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from edgewise.compress.judge.reader import SLOTS, Reader, few
from edgewise.engines.base import StageRow
from edgewise.engines.local import LocalStage
from edgewise.errors import UsageError
from edgewise.models.bundle import Bundle
from edgewise.types import FloatArray, IdArray

Tell = Callable[[str, int, int], None]


def needed_layers(bundle: Bundle, windows: Sequence[IdArray], count: int, tell: Tell) -> list[int] | None:
    """The numbers of `count` layers of the bundle, ascending; None where its runtime cannot run a layer alone (float
    weights on onnxruntime). `windows`: at most SLOTS texts, each int64 [2 ..] ids of the bundle. UsageError for another
    count than 1 to all."""
    there = bundle.card.layers
    if not 1 <= count <= there:
        raise UsageError(f"{count} layers are wanted of {there}", hint=f"1 to {there} are allowed")
    if count == there:
        return list(range(there))
    if not 0 < len(windows) <= SLOTS:
        raise UsageError(f"{len(windows)} texts are given to choose layers by", hint=f"1 to {SLOTS} are needed")
    return asyncio.run(_needed(bundle, windows, count, tell))


async def _needed(bundle: Bundle, windows: Sequence[IdArray], count: int, tell: Tell) -> list[int] | None:
    reader = Reader(bundle, max(map(len, windows)))
    try:
        if not all(map(reader.model.cuts_at, range(bundle.card.layers))):
            return None
        depth = _Depth(reader, windows)
        left, there = list(range(bundle.card.layers)), bundle.card.layers
        while len(left) > count:
            tell("choosing layers", there - len(left), there - count)
            left.pop(int(np.argmin(await depth.losses_without_each(left))))
        tell("choosing layers", there - count, there - count)
        return left
    finally:
        await reader.shutdown()


class _Depth:
    """The windows on their way through any choice of layers."""

    def __init__(self, reader: Reader, windows: Sequence[IdArray]) -> None:
        self._reader, self._windows = reader, windows
        self._stage: LocalStage[Any] = reader.model.stage()

    async def losses_without_each(self, layers: Sequence[int]) -> list[float]:
        """Nats a token that the others of these layers need, for each that is left out."""
        before = [self._reader.model.embed(np.ascontiguousarray(ids[:-1])) for ids in self._windows]
        losses = []
        for at, layer in enumerate(layers):
            losses.append(self._loss(await self._through(layers[at + 1 :], before)))
            before = await self._through([layer], before)
        return losses

    async def _through(self, layers: Sequence[int], hidden: list[FloatArray]) -> list[FloatArray]:
        for run in _runs(layers):
            rows = [StageRow(str(n), 0, states, len(states)) for n, states in enumerate(hidden)]
            for row in rows:
                await self._stage.open(row.session, len(row.hidden), run)
            hidden = await self._stage.forward(rows)
            for row in rows:
                await self._stage.close(row.session)
        return hidden

    def _loss(self, hidden: Sequence[FloatArray]) -> float:
        total, tokens = 0.0, 0
        for states, ids in zip(hidden, self._windows, strict=True):
            for part in few(len(states)):
                logprobs = self._reader.log_probs(states[part])
                total -= float(np.take_along_axis(logprobs, ids[1:][part, None], axis=1).sum(dtype=np.float64))
            tokens += len(states)
        return total / tokens


def _runs(layers: Sequence[int]) -> Iterator[range]:
    """Neighbours together."""
    begin = 0
    for at in range(1, len(layers) + 1):
        if at == len(layers) or layers[at] != layers[at - 1] + 1:
            yield range(layers[begin], layers[at - 1] + 1)
            begin = at
