"""Signals of a classifier: one set of numbers for a row, or for a batch that goes one way as a whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

LOGITS_SIGNALS: Final = (
    "max_softmax",
    "log_odds",
    "log_margin",
    "margin",
    "entropy",
    "energy",
    "second_softmax",
    "third_softmax",
)
_LEAST: Final = (min, min, min, min, max, min, max, max)  # of several rows the one that is least confident in it
LOG_CUT: Final = 20.0  # logs of shares are cut off here
CLASSES_LISTED: Final = 32  # up to so many classes, each one's log-probability is a signal too


def of_logits(logits: npt.ArrayLike) -> Mapping[str, float | None]:
    """Signals of logits [..., classes], each taken from the row that is least confident in it; of fewer than three
    classes there is no third. Nothing at all for fewer than two classes, no rows, NaN or +inf; -inf is a class that
    cannot be. `log_odds` is that of the greatest probability against all others, `log_margin` that against the second,
    both cut off at LOG_CUT. `energy` is the log of the sum of the exponents (Liu et al. 2020, without its sign),
    in the logits' own unit."""
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] < 2 or values.size == 0:
        return dict.fromkeys(LOGITS_SIGNALS)
    rows = [_of_row(row) for row in values.reshape(-1, values.shape[-1])]
    if None in rows:
        return dict.fromkeys(LOGITS_SIGNALS)
    least = [pick(column) for pick, column in zip(_LEAST, zip(*rows, strict=True), strict=True)]
    return dict(zip(LOGITS_SIGNALS, least if values.shape[-1] > 2 else [*least[:-1], None], strict=True))


def _of_row(row: npt.NDArray[np.float64]) -> tuple[float, ...] | None:
    """The signals of logits [classes]; None with NaN or +inf somewhere, or -inf everywhere."""
    best = float(row.max())
    if not math.isfinite(best):
        return None
    shifted = row - best
    powers = np.exp(shifted)
    total = float(powers.sum())
    third, second, _ = (0.0, *np.partition(powers, -2)[-2:]) if len(row) < 3 else np.partition(powers, -3)[-3:].tolist()
    shifted[powers == 0.0] = 0.0  # such a class adds nothing, whatever its distance
    return (
        1.0 / total,
        -math.log(total - 1.0) if total > 1.0 + math.exp(-LOG_CUT) else LOG_CUT,
        -math.log(second) if second > math.exp(-LOG_CUT) else LOG_CUT,
        (1.0 - second) / total,
        math.log(total) - float(powers @ shifted) / total,
        best + math.log(total),
        second / total,
        third / total,
    )


def class_logprobs(logits: npt.ArrayLike) -> Mapping[str, float | None]:
    """`class_0`, `class_1`, …: the log-probability of each class of one row, cut off at -LOG_CUT. Empty for a batch,
    and for more than CLASSES_LISTED classes."""
    row = np.asarray(logits, dtype=np.float64)
    row = row[0] if row.ndim == 2 and len(row) == 1 else row
    if row.ndim != 1 or not 2 <= len(row) <= CLASSES_LISTED or not np.isfinite(row.max()):
        return {}
    shifted = row - row.max()
    logprobs = np.maximum(shifted - np.log(np.exp(shifted).sum()), -LOG_CUT)
    return {f"class_{index}": float(value) for index, value in enumerate(logprobs)}


def top_class(logits: npt.ArrayLike) -> str | None:
    """The index of the most probable class as text; None for a batch."""
    row = np.asarray(logits, dtype=np.float64)
    row = row[0] if row.ndim == 2 and len(row) == 1 else row
    return str(int(row.argmax())) if row.ndim == 1 and len(row) > 1 and np.isfinite(row.max()) else None


def agreement(runs: Sequence[npt.ArrayLike]) -> float | None:
    """The share of several runs of the edge, logits [classes] each, that vote for the class most of them vote for.
    None for fewer than two."""
    votes = [top_class(run) for run in runs]
    if len(votes) < 2 or None in votes:
        return None
    return max(votes.count(vote) for vote in set(votes)) / len(votes)
