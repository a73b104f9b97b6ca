"""What a policy is to achieve, and the threshold that does.

Escalating is decided by one number, the worth of an edge answer: those strictly above the threshold are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edgewise.errors import UsageError
from edgewise.joint.fit import bounds
from edgewise.joint.judge import Order
from edgewise.joint.policy import Risk

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """A threshold, or none (`threshold` None: refused); what is proven of it, and the least share of requests that
    must go to the cloud for the target to hold on these rows, None if no share suffices."""

    threshold: float | None
    bound: float | None = None
    min_escalation: float | None = None


@dataclass(frozen=True)
class Proven:
    """A risk of at most `limit`, with probability 1 - `delta`. What counts as a loss, its kinds say."""

    limit: float
    delta: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.limit < 1 and 0 < self.delta < 1):
            raise UsageError(
                f"the limit is {self.limit} and delta {self.delta}; allowed are numbers between 0 and 1, both excluded"
            )

    def _choose(self, worth: Floats, kept: Bools, escalated: Bools, start: float) -> Choice:
        """Walk down from the threshold `start`, which other rows suggested, while the losses prove the limit."""
        thresholds, losses = bounds.losses_along(worth, kept, escalated)
        allowed = bounds.most_losses(len(worth), self.limit, self.delta)
        first = min(int(np.searchsorted(-thresholds, -start)), len(thresholds) - 1)
        passed = bounds.first_failure(losses[first:], allowed)
        suffice = np.flatnonzero(losses <= self.limit * len(worth))
        least = float(np.mean(worth <= thresholds[suffice[-1]])) if len(suffice) else None
        last = first + max(passed, 1) - 1
        proven = bounds.upper(int(losses[last]), len(worth), self.delta)
        keeps = passed > 0 and bool((worth > thresholds[last]).any())
        return Choice(float(thresholds[last]) if keeps else None, proven, least)


@dataclass(frozen=True)
class MaxDrop(Proven):
    """Bounds the share of requests where the edge's answer was served, was wrong, and the cloud's was right."""

    order: ClassVar[Order] = "fixed"
    risk: ClassVar[Risk] = "drop"

    def choose(self, worth: Floats, edge: Bools, cloud: Bools, start: float) -> Choice:
        return self._choose(worth, ~edge & cloud, np.zeros(len(worth), bool), 1.0)


@dataclass(frozen=True)
class TargetAccuracy(Proven):
    """Bounds the share of wrong answers served, whichever tier gave them."""

    order: ClassVar[Order] = "gain"
    risk: ClassVar[Risk] = "wrong"

    def choose(self, worth: Floats, edge: Bools, cloud: Bools, start: float) -> Choice:
        return self._choose(worth, ~edge, ~cloud, start)


@dataclass(frozen=True)
class Budget:
    """So many requests, as a share, go to the cloud: those with the most to gain."""

    share: float
    order: ClassVar[Order] = "gain"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"the budget is {self.share}; allowed are shares from 0 to 1")

    def choose(self, worth: Floats, edge: Bools, cloud: Bools, start: float) -> Choice:
        ascending = np.sort(worth)
        count = int(self.share * len(worth) + 1e-9)
        if count >= len(worth):
            return Choice(1.0)
        if count == 0:
            return Choice(max(float(ascending[0]) - 1e-6, 0.0))
        return Choice(float(ascending[count - 1] + ascending[count]) / 2)


@dataclass(frozen=True)
class Cost:
    """What one answer of each tier costs, in units of what one more right answer is worth. The edge has answered
    before anything is decided, so its cost counts for the forecast alone; the cloud is asked where it is expected to
    gain more than it costs."""

    edge: float = 0.0
    cloud: float = 0.0
    order: ClassVar[Order] = "gain"

    def __post_init__(self) -> None:
        if not (self.edge >= 0 and self.cloud >= 0):
            raise UsageError(f"the costs are {self.edge} and {self.cloud}; allowed are numbers from 0 on")

    def choose(self, worth: Floats, edge: Bools, cloud: Bools, start: float) -> Choice:
        return Choice(max((1.0 - self.cloud) / 2, 0.0))


Target = MaxDrop | TargetAccuracy | Budget | Cost


def best_start(worth: Floats, edge: Bools, cloud: Bools) -> float:
    """The threshold with the fewest wrong answers served, of rows that are not those to be tested on."""
    thresholds, losses = bounds.losses_along(worth, ~edge, ~cloud)
    return float(thresholds[int(np.argmin(losses))])
