"""What coded boundaries cost a model: perplexity through each cut and codec, beside that of the whole model.

Texts are cut into windows, which the whole model and every cut of it foretell token by token: the layers before the cut
run as they do in the whole model, the boundary of every position goes through the codec, and the layers behind it make
their keys and values of what comes out. The windows are the same for all, so that their differences can be paired.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.bench.journal import Journal
from edgewise.engines.base import Stage, StageRow
from edgewise.engines.load import local_model
from edgewise.engines.local import LocalModel
from edgewise.engines.slots import CHUNK
from edgewise.errors import CodecOverflow, UsageError
from edgewise.evaluate.interval import bootstrap
from edgewise.models.bundle import Bundle
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import FloatArray, IdArray
from edgewise.wire.codec import codec

WINDOW: Final = 512  # tokens
Show = Callable[[str, int, int], None]


def measure(
    bundle: Bundle,
    cuts: Sequence[int],
    codecs: Sequence[str],
    ids: Sequence[int] | IdArray,
    *,
    window: int = WINDOW,
    done: Journal | None = None,
    show: Show = lambda what, done, total: None,
) -> list[dict[str, Any]]:
    """A row (docs/formats/codecs.md) for each cut and codec, over as many windows as the ids fill. `done` keeps what
    each window gave, so that the same call goes on where it was ended. UsageError if there is not one window, or the
    model cannot be cut there."""
    windows = _windows(bundle, np.asarray(ids, np.int64), min(window, bundle.card.context))
    cuts, done = sorted(set(cuts)), done or Journal(None, {})
    if wrong := [cut for cut in cuts if not 0 < cut < bundle.card.layers]:
        raise UsageError(
            f"{bundle.name} cannot be cut at {wrong[0]}", hint=f"1 to {bundle.card.layers - 1} are allowed"
        )
    through = None
    found = []
    for n, its in enumerate(windows):
        show("windows", n, len(windows))
        result = done.get(f"window {n}")
        if result is None:
            through = through or _Cuts(bundle, cuts, codecs, len(its))
            result = done.add(f"window {n}", asyncio.run(through.nlls(its)))
        found.append(result)
    if through is not None:
        asyncio.run(through.shutdown())
    return [_row(bundle, cut, name, found, len(windows[0]) - 1) for cut in cuts for name in codecs]


def _windows(bundle: Bundle, ids: IdArray, size: int) -> list[IdArray]:
    """Whole ones, each with the token that the model begins its texts with, if it has one."""
    first = Tokenizer.open(bundle.path).encode("")[:1]
    body = ids[len(first) :] if ids[: len(first)].tolist() == first else ids
    step = size - len(first)
    found = [np.array([*first, *body[at : at + step]]) for at in range(0, len(body) - step + 1, step)]
    if not found:
        raise UsageError(f"the text has {len(body)} tokens, one window has {step}", hint="take a longer text")
    return found


class _Cuts:
    """A model, and the coded boundaries of its cuts. The layers between two cuts have a session of their own."""

    def __init__(self, bundle: Bundle, cuts: Sequence[int], codecs: Sequence[str], window: int) -> None:
        self._ends = [0, *cuts, bundle.card.layers]
        self._model: LocalModel[Any] = local_model(bundle, slots=len(self._ends), context=window)
        self._front, self._tail = self._model.stage(), self._model.stage()
        self._logits = np.empty((CHUNK, self._model.vocab), np.float32)  # its pages come once
        self._codecs = {(cut, name): codec(name, self._model.gains(cut)) for cut in cuts for name in codecs}

    async def nlls(self, ids: IdArray) -> dict[str, float | None]:
        """Of the ids behind the first, added up, in nats: of the whole model, "whole", and of each "CUT CODEC"; None
        where the codec cannot hold the boundary."""
        states = {0: self._model.embed(ids)}
        for start, stop in pairwise(self._ends):
            states[stop] = await self._through(self._front, range(start, stop), states[start])
        found: dict[str, float | None] = {"whole": self._nll(states[self._ends[-1]], ids)}
        for (cut, name), its in self._codecs.items():
            try:
                rows = its.decode(its.encode(states[cut]), self._model.card.hidden)
            except CodecOverflow:
                found[f"{cut} {name}"] = None
                continue
            found[f"{cut} {name}"] = self._nll(await self._through(self._tail, range(cut, self._ends[-1]), rows), ids)
        return found

    async def shutdown(self) -> None:
        await self._model.shutdown()

    @staticmethod
    async def _through(stage: Stage, layers: range, hidden: FloatArray) -> FloatArray:
        session = f"{layers.start}-{layers.stop}"
        await stage.open(session, len(hidden), layers)
        (out,) = await stage.forward([StageRow(session, 0, hidden, len(hidden))])
        await stage.close(session)
        return out

    def _nll(self, hidden: FloatArray, ids: IdArray) -> float:
        total = 0.0
        for at in range(0, len(ids) - 1, CHUNK):
            part = np.ascontiguousarray(hidden[at : min(at + CHUNK, len(ids) - 1)])
            logits = self._logits[: len(part)]
            self._model.project(part, logits)
            total += _nll(logits, ids[at + 1 : at + 1 + len(part)])
        return total


def _nll(logits: FloatArray, ids: IdArray) -> float:
    """As evaluate/perplexity.py's, three times as fast: float32 exponentials, added up in float64. Overwrites."""
    logits -= logits.max(axis=1, keepdims=True)
    targets = logits[np.arange(len(ids)), ids].astype(np.float64)
    totals: npt.NDArray[np.float64] = np.exp(logits, out=logits).sum(axis=1, dtype=np.float64)
    return float((np.log(totals) - targets).sum())


def _row(bundle: Bundle, cut: int, name: str, found: Sequence[dict[str, float | None]], tokens: int) -> dict[str, Any]:
    """`tokens` are foretold in each window."""
    given = [(result[f"{cut} {name}"], result["whole"]) for result in found]
    more = [here - whole for here, whole in given if here is not None and whole is not None]
    measured = len(more) == len(found)
    rise = bootstrap(more, lambda drawn: math.expm1(min(float(drawn.mean()) / tokens, 20.0))) if measured else None
    return {
        "model": bundle.name,
        "weights": bundle.weights,
        "layers": bundle.card.layers,
        "width": bundle.card.hidden,
        "cut": cut,
        "codec": name,
        "bytes": codec(name).row_bytes(bundle.card.hidden),
        "ppl_rise": None if rise is None else rise.value,
        "interval": None if rise is None else [rise.low, rise.high],
        "tokens": tokens * len(found),
        "refused": None if measured else "overflow",
    }
