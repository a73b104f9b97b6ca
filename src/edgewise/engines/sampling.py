"""From logits to the next token, with numpy alone. Made for vocabularies of 50k and more at every step: greedy costs an
argmax and one logsumexp, and top_p sorts the whole vocabulary only where the distribution is all but flat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgewise.errors import EngineError
from edgewise.types import FloatArray, Sampling

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
        if self._top_p < 1:
            nucleus = top_p_set(mass, self._top_p)
            return int(nucleus[_pick(mass[nucleus], point)])
        return _pick(mass, point)

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
    goal = top_p * single.sum(dtype=np.float64)
    heavy, reached = _heaviest(single, _NUCLEUS_GUESS)
    if reached[-1] < goal:
        heavy, reached = _heaviest(single, len(single))
    count = min(int(reached.searchsorted(goal)) + 1, len(heavy))
    lightest = heavy[count - 1]
    ids = np.flatnonzero(single >= lightest)
    surplus = len(ids) - count
    return np.delete(ids, np.flatnonzero(single[ids] == lightest)[-surplus:]) if surplus else ids


def _heaviest(mass: FloatArray, count: int) -> tuple[FloatArray, npt.NDArray[np.float64]]:
    """The `count` largest masses, largest first, and their running sum."""
    heavy = np.sort(np.partition(mass, -count)[-count:] if count < len(mass) else mass)[::-1]
    return heavy, heavy.astype(np.float64).cumsum()


def _pick(mass: npt.NDArray[np.float64], point: float) -> int:
    """The index at which the running sum passes `point` (0 <= point < 1) of the whole; never one without mass."""
    running = mass.cumsum()
    last = running.searchsorted(running[-1])  # the product below can round up to the whole
    return int(min(running.searchsorted(point * running[-1], side="right"), last))
