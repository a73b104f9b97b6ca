"""How far predictions fall from measured speeds, and how often their interval holds.

Plain: the shipped parameters predict the rows. Leaving one device out: all is fitted again without the rows of each
device in turn. Where the shipped parameters have seen that device, they are not used, only the beliefs of fit.py and
the other rows; where they have not, they are what is known before the other rows that are new to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from edgewise.plan import fit
from edgewise.plan.fit import Estimate, Observation, Problem, Rows, Spread, Target, held_out
from edgewise.plan.rows import Machines, Row, observations, speed_of
from edgewise.plan.speeds import Fitted, Speeds

TARGETS: Final[tuple[Target, ...]] = ("decode", "prefill")
Figures = dict[str, float | int | None]
GROUPS: Final = ("all", "published", "estimated")  # by what the row's weight bytes rest on


class Judged(NamedTuple):
    """A row, what was predicted for it, and what was measured."""

    row: Row
    predicted: Estimate
    measured: float

    @property
    def error(self) -> float:
        return abs(self.predicted.value / self.measured - 1)

    @property
    def held(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


def evaluate(
    rows: Sequence[Row], machines: Machines, speeds: Speeds, *, leave_one_device_out: bool
) -> dict[Target, list[Judged]]:
    """Every row of each target, judged."""
    judge = _each_left_out if leave_one_device_out else _plain
    judged = {}
    for target in TARGETS:
        having = [row for row in rows if speed_of(row, target) is not None]
        seen = observations(having, machines, target)
        found = judge(speeds.of(target), seen, speeds.devices) if seen else []
        judged[target] = [Judged(row, e, o.tok_s) for row, e, o in zip(having, found, seen, strict=True)]
    return judged


def report(judged: Mapping[Target, Sequence[Judged]]) -> dict[Target, dict[str, Figures]]:
    """`{target: {group: {n, median_ape, mean_ape, p90_ape, coverage80}}}`."""
    return {
        target: {group: figures(one for one in found if group in ("all", one.row.basis)) for group in GROUPS}
        for target, found in judged.items()
    }


def figures(judged: Iterable[Judged]) -> Figures:
    """Shares; None where there is no row."""
    rows = list(judged)
    if not rows:
        return {"n": 0, "median_ape": None, "mean_ape": None, "p90_ape": None, "coverage80": None}
    errors = [one.error for one in rows]
    return {
        "n": len(rows),
        "median_ape": float(np.median(errors)),
        "mean_ape": float(np.mean(errors)),
        "p90_ape": float(np.quantile(errors, 0.9)),
        "coverage80": float(np.mean([one.held for one in rows])),
    }


def _plain(fitted: Fitted, seen: Sequence[Observation], devices: frozenset[str]) -> list[Estimate]:
    return fitted.predict([observation.situation for observation in seen])


def _each_left_out(fitted: Fitted, seen: Sequence[Observation], devices: frozenset[str]) -> list[Estimate]:
    """`devices` are those that `fitted` has seen."""
    afresh = Problem(fitted.target, fitted.beliefs, seen)
    onward = Problem(fitted.target, fitted.beliefs, seen, fitted.posterior)
    new = ~np.isin(afresh.devices, sorted(devices))
    found: dict[int, Estimate] = {}
    for device in dict.fromkeys(afresh.devices):
        out = afresh.devices == device
        if device in devices:
            estimates = _left_out(afresh, out, ~out, ())
        else:
            estimates = _left_out(onward, out, new & ~out, fitted.scores)
        found |= zip(np.flatnonzero(out), estimates, strict=True)
    return [found[row] for row in range(len(seen))]


def _left_out(problem: Problem, out: Rows, others: Rows, scores: Sequence[fit.Score]) -> list[Estimate]:
    """What the other rows predict of those that are out; the interval too rests on the others alone."""
    posterior = problem.solve(others)
    learned = (*scores, *held_out(problem, others, posterior))
    values, sds = problem.predict(out, posterior)
    situations = [o.situation for o in problem.chosen(out)]
    return fit.estimates(values, sds, situations, Spread.learned(learned, problem.beliefs.level))
