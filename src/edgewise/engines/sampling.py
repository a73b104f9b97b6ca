"""From logits to the next token, with numpy alone. Made for vocabularies of 50k and more at every step: greedy costs an
argmax and one logsumexp, and top_p sorts the whole vocabulary only where the distribution is all but flat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgewise.errors import EngineError
from edgewise.types import FloatArray, Sampling

_BLOCK = 256
_NUCLEUS_GUESS = 1024  # ids that are sorted at first; only if they do not reach top_p is it the whole vocabulary


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token. `logprob` is natural, under softmax(logits) itself: neither temperature nor top_p touch it.
    `top` holds the most probable (id, logprob), best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one request. The draws depend on the seed and on the logits, on nothing else."""

    def __init__(self, sampling: Sampling, top: int = 0) -> None:
        self._greedy = sampling.temperature == 0
        # Below 1e-4 only ties are left to chance and above 1e6 all tokens are alike; float32 overflows further out.
        self._temperature = np.float32(min(max(sampling.temperature, 1e-4), 1e6))
        self._top_p = sampling.top_p
        self._top = top
        self._random = np.random.default_rng(sampling.seed)
        self._buffers: tuple[FloatArray, npt.NDArray[np.float64]] | None = None

    def choose(self, logits: FloatArray) -> Choice:
        """`logits` float32 [vocab], -inf allowed for tokens that must not come. EngineError if one is NaN or +inf, or
        if all are -inf."""
        best = int(logits.argmax())  # numpy's argmax stops at a NaN, so this one look finds all three
        peak = logits[best]
        if not np.isfinite(peak):
            raise EngineError(f"the model gave {peak} as its highest logit", hint="its weights or its kernels overflow")
        shifted, mass = self._scratch(len(logits))
        np.subtract(logits, peak, out=shifted)
        np.exp(shifted, out=mass, dtype=np.float64)
        log_total = math.log(mass.sum())  # >= 0, because the best token adds exp(0): no log-prob can exceed 0
        chosen = best if self._greedy else self._draw(shifted, mass)
        return Choice(chosen, float(shifted[chosen]) - log_total, self._best(shifted, log_total))

    def _scratch(self, vocab: int) -> tuple[FloatArray, npt.NDArray[np.float64]]:
        """Buffers that last as long as the request: new pages at every token would cost more than the arithmetic."""
        if self._buffers is None or len(self._buffers[0]) != vocab:
            self._buffers = np.empty(vocab, np.float32), np.empty(vocab, np.float64)
        return self._buffers

    def _draw(self, shifted: FloatArray, mass: npt.NDArray[np.float64]) -> int:
        if self._temperature != 1:
            np.divide(shifted, self._temperature, out=mass)
            np.exp(mass, out=mass)
        point = self._random.random()
        if self._top_p == 1:
            return _passed(mass, point * float(mass.sum()), "right")
        nucleus = top_p_set(mass, self._top_p)
        kept = mass[nucleus]
        return int(nucleus[_passed(kept, point * float(kept.sum()), "right")])

    def _best(self, shifted: FloatArray, log_total: float) -> tuple[tuple[int, float], ...]:
        if not self._top:
            return ()
        ids = (
            np.argpartition(shifted, -self._top)[-self._top :] if self._top < len(shifted) else np.arange(len(shifted))
        )
        ids = ids[shifted[ids].argsort()[::-1]]
        return tuple((int(i), float(shifted[i]) - log_total) for i in ids if shifted[i] > -math.inf)


def top_p_set(mass: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """The fewest ids whose mass reaches `top_p` of the whole, ascending. Among equals the lower id is taken."""
    single = mass.astype(np.float32)  # sorts several times faster, and decides no more than the last few ids
    goal = top_p * float(single.sum(dtype=np.float64))
    heavy = np.partition(single, -_NUCLEUS_GUESS)[-_NUCLEUS_GUESS:] if len(single) > _NUCLEUS_GUESS else single
    if heavy.sum(dtype=np.float64) < goal:
        heavy = single
    heavy = np.sort(heavy)[::-1]
    count = _passed(heavy, goal, "left") + 1
    lightest = heavy[count - 1]
    ids = np.flatnonzero(single >= lightest)
    surplus = len(ids) - count
    return np.delete(ids, np.flatnonzero(single[ids] == lightest)[-surplus:]) if surplus else ids


def _passed(mass: npt.NDArray[np.floating], goal: float, side: Literal["left", "right"]) -> int:
    """The index at which the running sum reaches (left) or exceeds (right) `goal`; never one without mass. A sum of
    blocks first: running sums over a whole vocabulary would be the slowest part of a draw."""
    blocks = np.add.reduceat(mass, np.arange(0, len(mass), _BLOCK), dtype=np.float64).cumsum()
    block = _found(blocks, goal, side)
    before = float(blocks[block - 1]) if block else 0.0
    inside = mass[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    return block * _BLOCK + _found(inside, goal - before, side)


def _found(running: npt.NDArray[np.float64], goal: float, side: Literal["left", "right"]) -> int:
    last = running.searchsorted(running[-1])  # rounding can put the goal beyond the end
    return int(min(running.searchsorted(goal, side), last))
