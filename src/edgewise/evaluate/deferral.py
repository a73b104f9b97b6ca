"""How well a score says which requests the cloud should answer, and how true its probabilities are.

A request counts 1 for a tier that answers it right and 0 otherwise (or its quality, 0..1). Requests go to the cloud in
the order of their score, the highest first; requests with one score go together, in shares. With acc(x) the accuracy
when the share x goes to the cloud, PGR(x) = (acc(x) - acc(0)) / (acc(1) - acc(0)), APGR is its mean over x in 0..1 and
CPT(t) the least x with PGR(x) >= t (Ong et al. 2024, RouteLLM).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgewise.errors import UsageError

Floats = npt.NDArray[np.float64]

BINS = 15
FLOOR_DRAWS = 500


@dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy `accuracy` [k] when the share `escalated` [k] of the requests goes to the cloud; from 0 to 1, straight
    between its points."""

    escalated: Floats
    accuracy: Floats

    @property
    def apgr(self) -> float | None:
        """None where both tiers are equally good: there is nothing to recover."""
        edge, cloud = float(self.accuracy[0]), float(self.accuracy[-1])
        if edge == cloud:
            return None
        widths = np.diff(self.escalated)
        area = float((widths * (self.accuracy[1:] + self.accuracy[:-1]) / 2).sum())
        return (area - edge) / (cloud - edge)

    def cpt(self, share: float) -> float | None:
        """The least share escalated that recovers `share` of the gap; None if the cloud is no better than the edge."""
        edge, cloud = self.accuracy[0], self.accuracy[-1]
        if cloud <= edge:
            return None
        wanted = edge + share * (cloud - edge) - 1e-12
        first = int(np.argmax(self.accuracy >= wanted))
        if first == 0:
            return float(self.escalated[0])
        x, y = self.escalated[first - 1 : first + 1], self.accuracy[first - 1 : first + 1]
        return float(x[0] + (x[1] - x[0]) * min(max((wanted - y[0]) / (y[1] - y[0]), 0.0), 1.0))

    def at(self, escalated: float) -> float:
        return float(np.interp(escalated, self.escalated, self.accuracy))


def deferral_curve(score: npt.ArrayLike, edge: npt.ArrayLike, cloud: npt.ArrayLike) -> Curve:
    """The curve of requests with these scores [n], answered so well [n] by the tiers. UsageError for other shapes, no
    requests, or a score that is NaN."""
    values, right, better = (np.asarray(one, np.float64) for one in (score, edge, cloud))
    _check(values, right, better)
    order = np.argsort(-values, kind="stable")
    gains = np.concatenate([[0.0], np.cumsum((better - right)[order])])
    ends = np.concatenate([[0], np.flatnonzero(np.diff(values[order])) + 1, [len(values)]])
    return Curve(ends / len(values), right.mean() + gains[ends] / len(values))


def auroc(score: npt.ArrayLike, positive: npt.ArrayLike) -> float | None:
    """The probability that a positive [n] has the higher score [n] than a negative, ties counting half; None if there
    are no two kinds."""
    values, labels = np.asarray(score, np.float64), np.asarray(positive, bool)
    _check(values, labels)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def ece(probability: npt.ArrayLike, outcome: npt.ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error: the mean distance of predicted probability [n] and observed share [n] over bins of
    equal width, weighted by their counts (Guo et al. 2017)."""
    predicted, seen = np.asarray(probability, np.float64), np.asarray(outcome, np.float64)
    _check(predicted, seen)
    return float(_ece(predicted, seen[None], bins)[0])


def ece_floor(probability: npt.ArrayLike, bins: int = BINS, draws: int = FLOOR_DRAWS, seed: int = 0) -> float:
    """What the ECE would be on average if every probability [n] were true: a small sample never shows 0."""
    predicted = np.asarray(probability, np.float64)
    _check(predicted)
    random = np.random.default_rng(seed)
    outcomes = random.random((draws, len(predicted))) < predicted
    return float(_ece(predicted, outcomes.astype(np.float64), bins).mean())


def _ece(predicted: Floats, outcomes: Floats, bins: int) -> Floats:
    """Of each row of outcomes [draws, n]."""
    places = np.minimum((predicted * bins).astype(int), bins - 1)
    members = np.zeros((len(predicted), bins))
    members[np.arange(len(predicted)), places] = 1.0
    gaps: Floats = np.abs((outcomes - predicted) @ members).sum(axis=1) / len(predicted)
    return gaps


def _check(first: npt.NDArray[np.generic], *others: npt.NDArray[np.generic]) -> None:
    if first.ndim != 1 or not len(first) or any(other.shape != first.shape for other in others):
        shapes = [one.shape for one in (first, *others)]
        raise UsageError(f"arrays of the shapes {shapes} were given; allowed is one shape, [n], n >= 1")
    if np.isnan(first.astype(np.float64)).any():
        raise UsageError("a score is NaN; give a number for each request")
