"""A figure with its uncertainty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgewise.errors import UsageError


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure of a sample, and the interval in which it lies at the level asked for."""

    value: float
    low: float
    high: float


def bootstrap(
    values: npt.ArrayLike,
    statistic: Callable[[npt.NDArray[np.float64]], float] = lambda sample: float(sample.mean()),
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over `values` [n] (or rows [n, ...], drawn together). The seed makes it repeatable."""
    sample = np.asarray(values, np.float64)
    if not len(sample) or not 0 < level < 1 or resamples < 1:
        raise UsageError(
            f"{len(sample)} values, level {level} and {resamples} resamples were given; "
            "allowed are 1 or more, between 0 and 1, and 1 or more"
        )
    random = np.random.default_rng(seed)
    drawn = [statistic(sample[random.integers(len(sample), size=len(sample))]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(statistic(sample), float(low), float(high))
