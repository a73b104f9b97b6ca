"""How far an artifact's outputs are from its source's on the same rows, and what that costs.

The numbers of one tensor: the largest difference, the relative L2 distance |a - b| / |b|, the cosine of a row (mean
over rows), and the signal-to-noise ratio 10 log10(|b|² / |a - b|²) in dB. Of a classifier's logits also the KL
divergence and how often both have the same first choice; of embeddings how often a row has the same nearest neighbour
among the others.

The drop is what a user would see: with labels, the accuracy that is lost (an embedding's is that of its nearest
neighbour, the row itself left out); without them, the share of rows whose first choice is another one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.evaluate.divergence import kl
from edgewise.evaluate.interval import Interval, bootstrap
from edgewise.export.work.job import Task

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

LEAST: Final = 1e-12  # a probability below it counts as it
CERTAIN: Final = 1e-3  # rows that sum to one so nearly are probabilities already


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of one output tensor; see above. `snr_db` is None where both are equal."""

    max_abs: float
    rel_l2: float
    cosine: float
    snr_db: float | None


@dataclass(frozen=True, slots=True)
class Choices:
    """Of the first output's first choices; KL in nats, None for embeddings."""

    top1_agreement: float
    kl_mean: float | None
    kl_p99: float | None


@dataclass(frozen=True, slots=True)
class Drop:
    """In shares of one, with the 95 % interval over the rows; `metric` says of what, over `n` rows."""

    point: float
    low: float
    high: float
    metric: str
    n: int
    accuracy: float | None = None
    accuracy_source: float | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """`outputs` in the source's order."""

    outputs: tuple[Numbers, ...]
    choices: Choices | None
    drop: Drop | None


def compared(found: Sequence[Array], expected: Sequence[Array], task: Task, labels: Array | None) -> Parity:
    """Outputs [rows, …] of both, in one order, all finite; `labels` [rows] count classes from 0."""
    numbers = tuple(numbers_of(a, b) for a, b in zip(found, expected, strict=True))
    if task == "numbers":
        return Parity(numbers, None, None)
    ours, theirs = np.asarray(found[0], np.float64), np.asarray(expected[0], np.float64)
    if task == "embed":
        return Parity(numbers, *_of_embeddings(ours, theirs, labels))
    return Parity(numbers, *_of_logits(_logits(ours, theirs), _logits(theirs, theirs), labels))


def numbers_of(found: Array, expected: Array) -> Numbers:
    """Of two arrays of one shape [rows, …], in float64 a few rows at a time."""
    largest, noise, signal = 0.0, 0.0, 0.0
    cosines: list[float] = []
    for at in range(0, len(expected), 64):
        a, b = (
            np.asarray(one[at : at + 64], np.float64).reshape(len(one[at : at + 64]), -1) for one in (found, expected)
        )
        largest = max(largest, float(np.abs(a - b).max(initial=0.0)))
        noise += float(((a - b) ** 2).sum())
        signal += float((b**2).sum())
        cosines += [*_cosines(a, b)]
    relative = math.sqrt(noise / signal) if signal else math.sqrt(noise)
    snr = 10 * math.log10(signal / noise) if noise and signal else None
    return Numbers(largest, relative, float(np.mean(cosines)), snr)


def _of_logits(ours: Floats, theirs: Floats, labels: Array | None) -> tuple[Choices, Drop]:
    distances = kl(theirs.astype(np.float32), ours.astype(np.float32))
    said, wanted = ours.argmax(1), theirs.argmax(1)
    p99 = float(np.quantile(distances, 0.99, method="higher"))
    choices = Choices(float((said == wanted).mean()), float(distances.mean()), p99)
    if labels is None:
        return choices, _disagreement(said != wanted, "top-1 disagreement")
    return choices, _lost(said == labels, wanted == labels, "top-1 accuracy")


def _of_embeddings(ours: Floats, theirs: Floats, labels: Array | None) -> tuple[Choices | None, Drop | None]:
    if len(ours) < 2:
        return None, None
    said, wanted = _nearest(ours), _nearest(theirs)
    choices = Choices(float((said == wanted).mean()), None, None)
    if labels is None:
        return choices, _disagreement(said != wanted, "nearest-neighbour disagreement")
    return choices, _lost(labels[said] == labels, labels[wanted] == labels, "nearest-neighbour accuracy")


def _disagreement(differ: Array, metric: str) -> Drop:
    found = bootstrap(differ)
    return Drop(found.value, found.low, found.high, metric, len(differ))


def _lost(ours: Array, theirs: Array, metric: str) -> Drop:
    """Of rows that both were asked, so the difference is drawn together."""
    found: Interval = bootstrap(theirs.astype(np.float64) - ours)
    return Drop(found.value, found.low, found.high, metric, len(ours), float(ours.mean()), float(theirs.mean()))


def _nearest(rows: Floats) -> npt.NDArray[np.intp]:
    """By cosine, each row's nearest other."""
    sizes = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, sizes, out=np.zeros_like(rows), where=sizes > 0)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -np.inf)
    found: npt.NDArray[np.intp] = alike.argmax(1)
    return found


def _logits(rows: Floats, source: Floats) -> Floats:
    """Probabilities become logarithms; whether they are is read off the source, so that both are read alike."""
    if (source >= 0).all() and np.abs(source.sum(1) - 1).max() < CERTAIN:
        return np.log(np.clip(rows, LEAST, None))
    return rows


def _cosines(a: Floats, b: Floats) -> Floats:
    sizes = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    equal = (a == b).all(axis=1).astype(np.float64)  # of two rows of zeros
    return np.asarray(np.divide((a * b).sum(axis=1), sizes, out=equal, where=sizes > 0))
