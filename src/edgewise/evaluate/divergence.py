"""How far one model's next-token distributions are from another's. Natural logarithms, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgewise.errors import UsageError
from edgewise.types import FloatArray

Doubles = npt.NDArray[np.float64]

ROWS = 32  # computed at a time: float64 copies of a few rows, never of a whole run


@dataclass(frozen=True, slots=True)
class Comparison:
    """Over all positions: KL(p||q) in nats, and the share where both have the same most probable token."""

    positions: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float


class Divergence:
    """Compares logits p (the reference) with logits q, chunk after chunk; keeps one number per position."""

    def __init__(self) -> None:
        self._kl: list[Doubles] = []
        self._agreed = 0

    def add(self, p: FloatArray, q: FloatArray) -> None:
        """Logits of the same positions, [n, vocab] each."""
        self._kl.append(kl(p, q))
        self._agreed += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())

    def result(self) -> Comparison:
        values = np.concatenate(self._kl) if self._kl else np.empty(0)
        if not len(values):
            raise UsageError("nothing was compared; add the logits of at least one position")
        return Comparison(
            positions=len(values),
            kl_mean=float(values.mean()),
            kl_p99=float(np.quantile(values, 0.99, method="higher")),
            top1_agreement=self._agreed / len(values),
        )


def kl(p: FloatArray, q: FloatArray) -> Doubles:
    """KL(softmax p || softmax q) of each position, float64 [n] >= 0, from logits [n, vocab]. Infinite where q rules out
    (-inf) what p allows. UsageError for other shapes, NaN, +inf or a row of -inf."""
    if p.shape != q.shape:
        raise UsageError(f"logits of shapes {p.shape} and {q.shape} cannot be compared; both must be [n, vocab]")
    return np.concatenate([np.empty(0), *map(_kl, _few_rows(p), _few_rows(q))])


def log_softmax(logits: FloatArray) -> Doubles:
    """float64 [n, vocab] for logits [n, vocab]; errors as in `kl`."""
    if logits.ndim != 2 or not logits.shape[1]:
        raise UsageError(f"logits have the shape {logits.shape}; [n, vocab] is allowed")
    peaks = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(peaks).all():
        raise UsageError("a position has NaN, +inf or only -inf among its logits")
    shifted = logits.astype(np.float64) - peaks
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def agreement_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two answers have in common from their start."""
    for at, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return at
    return min(len(first), len(second))


def _few_rows(logits: FloatArray) -> Iterator[FloatArray]:
    return (logits[at : at + ROWS] for at in range(0, len(logits), ROWS))


def _kl(p: FloatArray, q: FloatArray) -> Doubles:
    log_p, log_q = log_softmax(p), log_softmax(q)
    possible = log_p > -np.inf  # what p rules out adds nothing, whatever q thinks of it
    terms = np.zeros_like(log_p)
    np.subtract(log_p, log_q, out=terms, where=possible)
    terms *= np.exp(log_p)
    return np.asarray(np.maximum(terms.sum(axis=-1), 0.0))  # rounding can leave a tiny negative sum
