"""From logits to the next token, with numpy alone. Made for vocabularies of 50k and more at every step: greedy costs an
argmax and one logsumexp, and nothing sorts the whole vocabulary, but for top_p where the distribution is all but flat.

The order of the steps, each working on what the one before it left:

    logit_bias          added to the logits
    repetition_penalty  of the tokens seen, prompt and answer: positive logits are divided by it, negative multiplied
    frequency, presence of the tokens generated: taken off the logits, times their count and once
    temperature         divides the logits; 0 takes the highest and ends here
    top_k, top_p, min_p each narrows the set; top_p counts the probabilities of those that top_k left, made to sum to 1

Bias before penalties is the order of llama.cpp, vLLM and transformers alike. They differ in what comes after. llama.cpp
has the temperature last, so that a hot distribution is still cut as if it were cool; vLLM and transformers have it
first, and so do we: top_p is a share of the probabilities that are drawn from. transformers puts min_p after top_p,
vLLM before top_k; min_p compares with the best token, which no step removes, so that only the sum of top_p can tell the
two apart. Ours is the order of transformers. Among equals the lower ids stay.

`logprob` is of the model itself, before all of this (as vLLM reports it): a confidence read off it does not depend on
the sampling, and speaks of the model's doubts and not of the caller's wishes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgewise.errors import EngineError
from edgewise.types import Best, FloatArray, IdArray, Sampling

_BLOCK = 256
_NUCLEUS_GUESS = 1024  # ids that are sorted at first; only if they do not reach top_p is it the whole vocabulary


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token. `logprob` is natural, under softmax(logits) itself. `top` holds the most probable (id, logprob)
    of the model, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one request, whose `prompt` int64 [n] counts for the repetition penalty. The choice depends
    on the seed, on the logits and on what was chosen before, on nothing else; each takes one random number."""

    best: int  # the so many most probable tokens are all that it needs to choose; 0: it needs all logits

    def __init__(self, sampling: Sampling, top: int = 0, prompt: IdArray | None = None) -> None:
        self._greedy = sampling.temperature == 0
        # Below 1e-4 only ties are left to chance and above 1e6 all tokens are alike; float32 overflows further out.
        self._temperature = np.float32(min(max(sampling.temperature, 1e-4), 1e6))
        self._top_k, self._top_p, self._min_p = sampling.top_k, sampling.top_p, sampling.min_p
        self.top = top
        self.best = max(1, top) if self._greedy and not _wishes_any(sampling) else 0
        self._random = np.random.default_rng(sampling.seed)
        self._wishes = _Wishes(sampling, prompt) if _wishes_any(sampling) else None
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
        if self._wishes is not None:
            chosen = self._as_wished(self._wishes, logits, mass)
        else:
            chosen = best if self._greedy else self._draw(shifted, mass, ready=self._temperature == 1)
        return Choice(chosen, float(shifted[chosen]) - log_total, self._best(shifted, log_total))

    def take(self, best: Best) -> Choice:
        """The choice where only the `best` tokens of the last position are known."""
        pairs = zip(best.ids[-1], best.logprobs[-1], strict=True)
        top = tuple((int(i), float(p)) for i, p in pairs if p > -math.inf)
        return Choice(*top[0], top[: self.top])

    def _scratch(self, vocab: int) -> tuple[FloatArray, npt.NDArray[np.float64]]:
        """Buffers that last as long as the request: new pages at every token would cost more than the arithmetic."""
        if self._buffers is None or len(self._buffers[0]) != vocab:
            self._buffers = np.empty(vocab, np.float32), np.empty(vocab, np.float64)
        return self._buffers

    def _as_wished(self, wishes: _Wishes, logits: FloatArray, mass: npt.NDArray[np.float64]) -> int:
        wished = wishes.applied(logits)
        chosen = int(wished.argmax())
        if not self._greedy:
            wished -= wished[chosen]
            chosen = self._draw(wished, mass, ready=False)
        wishes.count(chosen)
        return chosen

    def _draw(self, shifted: FloatArray, mass: npt.NDArray[np.float64], *, ready: bool) -> int:
        """`shifted` are the logits, the highest 0. `mass` is exp(shifted) if it is `ready`, else room to work in."""
        point = self._random.random()
        ids: npt.NDArray[np.intp] | None = None  # all
        if 0 < self._top_k < len(shifted):
            ids = top_k_set(shifted, self._top_k)
            mass = np.exp(np.divide(shifted[ids], self._temperature, dtype=np.float64))
        elif not ready:
            np.divide(shifted, self._temperature, out=mass)
            np.exp(mass, out=mass)
        if self._top_p < 1:
            ids, mass = _narrowed(ids, mass, top_p_set(mass, self._top_p))
        if self._min_p > 0:
            ids, mass = _narrowed(ids, mass, np.flatnonzero(mass >= self._min_p * mass.max()))
        at = _passed(mass, point * float(mass.sum()), "right")
        return at if ids is None else int(ids[at])

    def _best(self, shifted: FloatArray, log_total: float) -> tuple[tuple[int, float], ...]:
        if not self.top:
            return ()
        ids = np.argpartition(shifted, -self.top)[-self.top :] if self.top < len(shifted) else np.arange(len(shifted))
        ids = ids[shifted[ids].argsort()[::-1]]
        return tuple((int(i), float(shifted[i]) - log_total) for i in ids if shifted[i] > -math.inf)


class BestOf:
    """The most probable tokens of any rows of logits; it keeps its buffers."""

    def __init__(self) -> None:
        self._sampler = Sampler(Sampling())

    def __call__(self, logits: FloatArray, count: int) -> Best:
        """The `count` most probable tokens of each row of logits [n, vocab]. The first is what a greedy
        `Sampler.choose` takes, with its log-prob rounded to float32. EngineError as there."""
        self._sampler.top = count if count > 1 else 0
        found = Best(np.zeros((len(logits), count), np.int64), np.full((len(logits), count), -math.inf, np.float32))
        for row, ids, logprobs in zip(logits, found.ids, found.logprobs, strict=True):
            choice = self._sampler.choose(row)
            others = [pair for pair in choice.top if pair[0] != choice.id][: count - 1]
            for n, (i, logprob) in enumerate([(choice.id, choice.logprob), *others]):
                ids[n], logprobs[n] = i, logprob
        return found


class _Wishes:
    """Logit bias and penalties. Made only where some were asked for."""

    def __init__(self, sampling: Sampling, prompt: IdArray | None) -> None:
        self._sampling = sampling
        self._prompt = np.empty(0, np.int64) if prompt is None else prompt
        self._biased = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)
        self._counts: Counter[int] = Counter()  # of the tokens generated
        self._seen = np.empty(0, np.bool_)
        self._penalties = np.empty(0, np.float32)
        self._wished = np.empty(0, np.float32)

    def applied(self, logits: FloatArray) -> FloatArray:
        """The logits as wished, float32 [vocab], valid until the next call."""
        if len(self._wished) != len(logits):
            self._reserve(len(logits))
        wished, repetition = self._wished, np.float32(self._sampling.repetition_penalty)
        np.copyto(wished, logits)
        wished[self._biased] += self._bias
        if repetition != 1:
            seen = np.flatnonzero(self._seen)
            near = wished[seen]
            wished[seen] = np.where(near > 0, near / repetition, near * repetition)
        if self._counts:
            wished -= self._penalties
        return wished

    def count(self, token: int) -> None:
        """The token was generated."""
        self._counts[token] += 1
        self._seen[token] = True
        frequency, presence = self._sampling.frequency_penalty, self._sampling.presence_penalty
        self._penalties[token] = frequency * self._counts[token] + presence

    def _reserve(self, vocab: int) -> None:
        self._wished, self._penalties = np.empty(vocab, np.float32), np.zeros(vocab, np.float32)
        self._seen = np.zeros(vocab, np.bool_)
        self._seen[self._prompt] = True


def _wishes_any(sampling: Sampling) -> bool:
    penalties = sampling.presence_penalty or sampling.frequency_penalty
    return bool(sampling.logit_bias or penalties or sampling.repetition_penalty != 1)


def top_k_set(logits: FloatArray, top_k: int) -> npt.NDArray[np.intp]:
    """The `top_k` ids with the highest logits, ascending; 1 <= top_k <= len(logits). Among equals the lower stays."""
    return _heaviest(logits, np.partition(logits, -top_k)[-top_k], top_k)


def top_p_set(mass: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """The fewest ids whose mass reaches `top_p` of the whole, ascending. Among equals the lower id stays."""
    single = mass.astype(np.float32)  # sorts several times faster, and decides no more than the last few ids
    goal = top_p * float(single.sum(dtype=np.float64))
    heavy = np.partition(single, -_NUCLEUS_GUESS)[-_NUCLEUS_GUESS:] if len(single) > _NUCLEUS_GUESS else single
    if heavy.sum(dtype=np.float64) < goal:
        heavy = single
    heavy = np.sort(heavy)[::-1]
    count = _passed(heavy, goal, "left") + 1
    return _heaviest(single, heavy[count - 1], count)


def _heaviest(weights: FloatArray, lightest: np.float32, count: int) -> npt.NDArray[np.intp]:
    """The ids of the `count` heaviest, the lightest of which weighs `lightest`."""
    ids = np.flatnonzero(weights >= lightest)
    surplus = len(ids) - count
    return np.delete(ids, np.flatnonzero(weights[ids] == lightest)[-surplus:]) if surplus else ids


def _narrowed(
    ids: npt.NDArray[np.intp] | None, mass: npt.NDArray[np.float64], kept: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    return kept if ids is None else ids[kept], mass[kept]


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
