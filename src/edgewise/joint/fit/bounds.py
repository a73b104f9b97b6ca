"""What a sample of yes/no losses proves about their share, exactly, and thresholds with a guarantee.

`upper` is Clopper and Pearson's bound. `first_failure` is fixed-sequence testing (Angelopoulos et al. 2021, Learn then
Test): hypotheses "the risk at this threshold is above the limit" are tested one after the other at level delta, in an
order that the sample had no part in, and the last one rejected before the first that is not is safe with probability
1 - delta.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]


def upper(losses: int, count: int, delta: float) -> float:
    """The share of losses is at most this, with probability 1 - delta over samples of `count`."""
    return 1.0 if losses >= count else float(stats.beta.ppf(1 - delta, losses + 1, count - losses))


def interval(losses: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided, of Clopper and Pearson."""
    tail = (1 - level) / 2
    low = 0.0 if losses == 0 else float(stats.beta.ppf(tail, losses, count - losses + 1))
    return low, upper(losses, count, tail)


def most_losses(count: int, limit: float, delta: float) -> int:
    """The most losses among `count` that still prove a share of at most `limit`; -1 if none do."""
    losses = int(stats.binom.ppf(delta, count, limit))
    while losses >= 0 and stats.binom.cdf(losses, count, limit) > delta:
        losses -= 1
    return losses


def losses_along(worth: Floats, kept: Bools, escalated: Bools) -> tuple[Floats, Ints]:
    """Thresholds at which a decision changes, the highest first (1.0: nothing is kept), and the losses at each: `kept`
    [n] says whether a row is a loss if the edge's answer is served, `escalated` [n] the same of the cloud's."""
    order = np.argsort(-worth, kind="stable")
    changes = np.concatenate([[0], np.cumsum(kept[order].astype(int) - escalated[order].astype(int))])
    ends = np.concatenate([[0], np.flatnonzero(np.diff(worth[order])) + 1, [len(worth)]])
    ordered = worth[order]
    between = (ordered[ends[1:-1] - 1] + ordered[ends[1:-1]]) / 2  # half-way, so that rounding moves nobody
    thresholds = np.concatenate([[1.0], between, [0.0]])  # rows strictly above are kept: those before `ends`
    return thresholds, (int(escalated.sum()) + changes)[ends]


def first_failure(losses: Ints, allowed: int) -> int:
    """How many thresholds in a row, from the first, have at most the losses allowed."""
    failed = np.flatnonzero(losses > allowed)
    return int(failed[0]) if len(failed) else len(losses)
