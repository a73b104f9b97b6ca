"""Learning the effects of speed.py from measured speeds, and predicting with an interval.

The best estimate given the beliefs and the rows (maximum a posteriori), by Gauss-Newton steps. Errors have the heavy
tails of Student's t, so that a row that disagrees with all others counts for little; so have the effects of devices,
which stand for what is odd about one of them while the rest is learned, and are 0 for a device that nobody measured.
The curvature at the end gives each prediction its own standard deviation. How wide an interval that must become to hold
as often as it says is learned from devices that were held out (`Spread`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edgewise.plan.speed import Effects, Situation, Terms, decode_terms, prefill_terms

STEPS: Final = 60
SETTLED: Final = 2e-3  # a step below it ends the search: a five-hundredth of a factor is far below any error here
LONGEST_STEP: Final = 0.5

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.bool_]  # which of them
Target = Literal["decode", "prefill"]


class Prior(NamedTuple):
    """What is believed of an effect before any row: the middle (of the quantity itself) and the sd of its logarithm."""

    middle: float
    sd: float


class Beliefs(msgspec.Struct, frozen=True):
    """All hyper-parameters of one target; docs/planner.md shows what each of them halved and doubled would change.
    `priors` are by the names of effects, or by their first two parts."""

    priors: Mapping[str, Prior]
    noise: float  # sd of a row's log error besides its device's
    noise_tail: float  # degrees of freedom: the fewer, the more a row may err without moving the rest
    device_tail: float
    level: float  # share of held-out rows that an interval holds; above 0.8, as the rows of one device err together

    def knows(self, name: str) -> bool:
        return name in self.priors or _group(name) in self.priors

    def prior(self, name: str) -> Prior:
        return self.priors.get(name) or self.priors[_group(name)]


def _group(name: str) -> str:
    return "/".join(name.split("/")[:2])


# Bandwidth: what measured kernels reach: 80-90 % on discrete and Apple GPUs, about 65 % on CPUs, phone GPUs and NPUs.
# Rate: decode has to unpack its weights, so a third of a CPU's and two thirds of a GPU's peak. Launch (ms of a layer):
# CUDA graphs and Metal take tens of microseconds, mobile drivers and NPU runtimes hundreds. What runtimes and kinds of
# devices change is believed small (15-20 %), but their overheads, which are software alone, up to half.
DECODE: Final = Beliefs(
    priors={
        "bandwidth/unit/cpu": Prior(0.65, 0.1),
        "bandwidth/unit/cuda": Prior(0.85, 0.1),
        "bandwidth/unit/metal": Prior(0.85, 0.1),
        "bandwidth/unit/gpu": Prior(0.65, 0.1),
        "bandwidth/unit/npu": Prior(0.7, 0.1),
        "bandwidth/runtime": Prior(1, 0.2),
        "bandwidth/kind": Prior(1, 0.15),
        "rate/unit/cpu": Prior(0.31, 0.5),
        "rate/unit/gpu": Prior(0.67, 0.5),
        "rate/runtime": Prior(1, 0.6),
        "launch/unit/cpu": Prior(0.05, 0.5),
        "launch/unit/cuda": Prior(0.075, 0.5),
        "launch/unit/metal": Prior(0.12, 0.5),
        "launch/unit/gpu": Prior(0.15, 0.5),
        "launch/unit/npu": Prior(0.3, 0.5),
        "launch/runtime": Prior(1, 0.4),
        "whole/wide": Prior(1, 0.3),
        "whole/device": Prior(1, 0.05),
    },
    noise=0.1,
    noise_tail=4,
    device_tail=2,
    level=0.86,
)
# Prompts are multiplied as matrices, which kernels do with very different skill: all beliefs are wider. A CPU without
# its 8-bit dot products has a quarter of the rate.
PREFILL: Final = Beliefs(
    priors={
        "rate/unit/cpu": Prior(0.25, 0.3),
        "rate/unit/cuda": Prior(0.35, 0.3),
        "rate/unit/metal": Prior(0.6, 0.3),
        "rate/unit/gpu": Prior(0.3, 0.3),
        "rate/unit/npu": Prior(0.2, 0.3),
        "rate/runtime": Prior(1, 0.4),
        "rate/pair": Prior(1, 0.3),
        "rate/kind": Prior(1, 0.2),
        "rate/floating": Prior(0.25, 0.4),
        "rate/api": Prior(0.67, 0.4),
        "rate/size": Prior(1, 0.15),
        "rate/size/cuda": Prior(math.exp(-0.3), 0.15),  # ten times the rate makes prompts five times as fast
        "whole/device": Prior(1, 0.25),
    },
    noise=0.15,
    noise_tail=4,
    device_tail=2,
    level=0.86,
)
BELIEFS: Final[dict[Target, Beliefs]] = {"decode": DECODE, "prefill": PREFILL}
OWN_NOISE: Final = 0.07
OWN_NOISE_TAIL: Final = 30.0
OWN_DEVICE: Final = 0.4


def of_own_rows(beliefs: Beliefs, target: Target, rows: Iterable[Observation]) -> Beliefs:
    """What is believed of rows that a user measured on the very device: they err less than what strangers publish, and
    what is odd about that device, settings and cooling included, shows in them. Of others as much is believed as
    before."""
    effects = {name for row in rows for name, _ in TERMS[target](row.situation).whole}
    own = {name: Prior(1, OWN_DEVICE) for name in effects if name.startswith(DEVICE_EFFECT)}
    return msgspec.structs.replace(
        beliefs, priors={**beliefs.priors, **own}, noise=OWN_NOISE, noise_tail=OWN_NOISE_TAIL
    )


TERMS: Final[dict[Target, Callable[[Situation], Terms]]] = {"decode": decode_terms, "prefill": prefill_terms}
DEVICE_EFFECT: Final = "whole/device/"


class Observation(msgspec.Struct, frozen=True):
    """A speed that somebody measured. `device` is its name there: what is left out together. A row that is not
    `trusted` teaches nothing, but is predicted as all are."""

    situation: Situation
    device: str
    tok_s: float
    trusted: bool = True


class Posterior(NamedTuple):
    """What is known of the effects: their logarithms' most probable values and the inverse of their covariance."""

    names: tuple[str, ...]
    mean: Array
    precision: Array


class _Design(NamedTuple):
    """Rows as arrays: times at the peak in ms [rows], and how often each effect counts in each part [rows, effects]."""

    memory: Array
    compute: Array
    launches: Array
    bandwidth: Array
    rate: Array
    launch: Array
    whole: Array

    @staticmethod
    def of(terms: Sequence[Terms], index: Mapping[str, int]) -> _Design:
        def counts(effects: Iterable[Effects]) -> Array:
            found = np.zeros((len(terms), len(index)))
            for row, named in enumerate(effects):
                for name, count in named:
                    found[row, index[name]] += count
            return found

        return _Design(
            memory=np.array([t.memory_ms for t in terms]),
            compute=np.array([t.compute_ms for t in terms]),
            launches=np.array([t.launches for t in terms]),
            bandwidth=counts(t.bandwidth for t in terms),
            rate=counts(t.rate for t in terms),
            launch=counts(t.launch for t in terms),
            whole=counts(t.whole for t in terms),
        )

    def rows(self, which: Rows) -> _Design:
        return _Design(*(part[which] for part in self))

    def times(self, effects: Array) -> tuple[Array, Array, Array]:
        """ms of reading, multiplying and launching, each with its share, before `whole`."""
        return (
            self.memory * np.exp(-self.bandwidth @ effects),
            self.compute * np.exp(-self.rate @ effects),
            self.launches * np.exp(self.launch @ effects),
        )

    def log_time(self, effects: Array) -> tuple[Array, Array]:
        """The logarithm of a token's ms, and its derivative by each effect [rows, effects]."""
        memory, compute, launches = self.times(effects)
        busy = np.hypot(memory, compute)
        total = busy + launches
        by_memory, by_compute, by_launch = memory**2 / (busy * total), compute**2 / (busy * total), launches / total
        slope = self.whole + by_launch[:, None] * self.launch
        slope -= by_memory[:, None] * self.bandwidth + by_compute[:, None] * self.rate
        return np.log(total) + self.whole @ effects, slope


class Problem:
    """Observations of one target and what is believed before them: the beliefs alone, or an earlier posterior, which
    must not have seen these rows. Solved for all of them or for a part."""

    def __init__(
        self, target: Target, beliefs: Beliefs, observations: Sequence[Observation], before: Posterior | None = None
    ) -> None:
        self.observations = tuple(observations)
        self.beliefs = beliefs
        terms = [TERMS[target](o.situation) for o in observations]
        self._names = _names(terms, () if before is None else before.names)
        self._design = _Design.of(terms, {name: n for n, name in enumerate(self._names)})
        self._prior = _extended(before, self._names, beliefs)
        known = set() if before is None else set(before.names)
        self._heavy = np.array([name.startswith(DEVICE_EFFECT) and name not in known for name in self._names])
        self._log_ms = np.log([1e3 / o.tok_s for o in observations])
        self.trusted = np.array([o.trusted for o in observations], dtype=bool)
        self.devices = np.array([o.device for o in observations])

    def solve(self, which: Rows, start: Posterior | None = None) -> Posterior:
        """The posterior given those rows; `start` is a solution nearby, which only saves steps."""
        use = which & self.trusted
        design, log_ms = self._design.rows(use), self._log_ms[use]
        prior, b = self._prior, self.beliefs
        mean = (prior if start is None else start).mean.copy()
        spread = np.diag(prior.precision)  # of a device's effect: it has no company in the prior
        for _ in range(STEPS):
            found, slope = design.log_time(mean)
            errors = log_ms - found
            weight = (b.noise_tail + 1) / (b.noise_tail + (errors / b.noise) ** 2) / b.noise**2
            away = mean - prior.mean
            loose = np.where(self._heavy, (b.device_tail + 1) / (b.device_tail + away**2 * spread), 1.0)
            held = prior.precision * np.sqrt(np.outer(loose, loose))
            weighted = slope * weight[:, None]
            precision = weighted.T @ slope + held
            step = np.linalg.solve(precision, weighted.T @ errors - held @ away)
            longest = float(np.abs(step).max(initial=0))
            mean += step * min(1, LONGEST_STEP / max(longest, 1e-9))
            if longest < SETTLED:
                break
        return Posterior(self._names, mean, precision)

    def predict(self, which: Rows, given: Posterior) -> tuple[Array, Array]:
        """tok/s of those rows, and the sd of their logarithm."""
        return _predicted(self._design.rows(which), given, self.beliefs)

    def chosen(self, which: Rows) -> list[Observation]:
        return [observation for observation, wanted in zip(self.observations, which, strict=True) if wanted]

    @property
    def everything(self) -> Rows:
        return np.ones(len(self.observations), dtype=bool)


def predict(target: Target, beliefs: Beliefs, situations: Sequence[Situation], given: Posterior) -> tuple[Array, Array]:
    """tok/s of situations, also of runtimes and devices that nobody measured, and the sd of their logarithm."""
    design, known = _asked(target, beliefs, situations, given)
    return _predicted(design, known, beliefs)


class Times(NamedTuple):
    """Where the time of a token goes, in ms: (√(reading² + computing²) + launching) · whole."""

    reading: float
    computing: float
    launching: float
    whole: float


def times(target: Target, beliefs: Beliefs, situation: Situation, given: Posterior) -> Times:
    design, known = _asked(target, beliefs, [situation], given)
    reading, computing, launching = (float(part[0]) for part in design.times(known.mean))
    return Times(reading, computing, launching, float(np.exp(design.whole @ known.mean)[0]))


def _asked(
    target: Target, beliefs: Beliefs, situations: Sequence[Situation], given: Posterior
) -> tuple[_Design, Posterior]:
    """Situations as arrays, and what is known of all their effects."""
    terms = [TERMS[target](situation) for situation in situations]
    names = _names(terms, given.names)
    return _Design.of(terms, {name: n for n, name in enumerate(names)}), _extended(given, names, beliefs)


def _predicted(design: _Design, given: Posterior, beliefs: Beliefs) -> tuple[Array, Array]:
    log_ms, slope = design.log_time(given.mean)
    variance = np.einsum("ij,ji->i", slope, np.linalg.solve(given.precision, slope.T)) + beliefs.noise**2
    return 1e3 * np.exp(-log_ms), np.sqrt(variance)


def _names(terms: Iterable[Terms], first: Sequence[str]) -> tuple[str, ...]:
    """Of all effects, in the order in which they are met."""
    met = (name for t in terms for effects in (t.bandwidth, t.rate, t.launch, t.whole) for name, _ in effects)
    return tuple(dict.fromkeys((*first, *met)))


def _extended(before: Posterior | None, names: Sequence[str], beliefs: Beliefs) -> Posterior:
    """What is known beforehand of these effects, which begin with those of `before`."""
    known = 0 if before is None else len(before.names)
    fresh = [beliefs.prior(name) for name in names[known:]]
    mean, precision = np.zeros(len(names)), np.zeros((len(names), len(names)))
    if before is not None:
        mean[:known], precision[:known, :known] = before.mean, before.precision
    mean[known:] = [math.log(prior.middle) for prior in fresh]
    precision[range(known, len(names)), range(known, len(names))] = [prior.sd**-2 for prior in fresh]
    return Posterior(tuple(names), mean, precision)


class Score(NamedTuple):
    """How far a held-out row fell from its prediction, in sds of that prediction."""

    device: str
    runtime: str
    z: float


FOLDS: Final = 8
LEAST_Z: Final = 1e-6  # what fell nowhere still has a scale
COMPANY: Final = 4.0  # devices: a runtime seen on so many is half judged by them and half by all


class Spread(msgspec.Struct, frozen=True):
    """How many sds an interval reaches: what held-out devices needed, more for runtimes that vary more."""

    sds: float
    of_runtime: dict[str, float] = msgspec.field(default_factory=dict)

    def of(self, runtime: str) -> float:
        return self.of_runtime.get(runtime, self.sds)

    @staticmethod
    def learned(scores: Sequence[Score], level: float) -> Spread:
        if not scores:  # nobody was held out: as of a normal distribution
            return Spread(NormalDist().inv_cdf((1 + level) / 2))
        z = np.array([max(score.z, LEAST_Z) for score in scores])
        capped = np.minimum(z, 3 * np.sort(z)[len(z) // 2])  # one row that is wholly off must not widen its runtime
        usual = float(capped.mean())
        scale = {runtime: _scale(scores, capped, runtime, usual) for runtime in {score.runtime for score in scores}}
        scaled = np.sort(z / [scale[score.runtime] for score in scores])
        reach = float(scaled[min(len(z) - 1, math.ceil(level * (len(z) + 1)) - 1)])
        return Spread(reach * usual, {runtime: reach * scale[runtime] for runtime in sorted(scale)})


def _scale(scores: Sequence[Score], z: Array, runtime: str, usual: float) -> float:
    """The mean of a runtime's devices, each counting once, drawn to that of all."""
    of_device = defaultdict(list)
    for score, value in zip(scores, z, strict=True):
        if score.runtime == runtime:
            of_device[score.device].append(value)
    return (sum(float(np.mean(each)) for each in of_device.values()) + COMPANY * usual) / (len(of_device) + COMPANY)


def held_out(problem: Problem, which: Rows, start: Posterior | None = None) -> list[Score]:
    """Scores of the trusted rows among those, each from a fit that saw nothing of its device."""
    scores = []
    judged = which & problem.trusted
    for fold in _folds(problem.devices[judged]):
        test = judged & np.isin(problem.devices, fold)
        found, sd = problem.predict(test, problem.solve(which & ~np.isin(problem.devices, fold), start))
        scores += [
            Score(o.device, o.situation.runtime, abs(math.log(o.tok_s / value)) / width)
            for o, value, width in zip(problem.chosen(test), found, sd, strict=True)
        ]
    return scores


def _folds(devices: npt.NDArray[np.str_]) -> list[list[str]]:
    """Devices in groups with about as many rows each: the largest first, each to the emptiest group."""
    names, counts = np.unique(devices, return_counts=True)
    groups: list[list[str]] = [[] for _ in range(FOLDS)]
    sizes = [0] * FOLDS
    for n in np.argsort(-counts, kind="stable"):
        emptiest = sizes.index(min(sizes))
        groups[emptiest].append(str(names[n]))
        sizes[emptiest] += int(counts[n])
    return [group for group in groups if group]


class Estimate(NamedTuple):
    """tok/s; four of five times between low and high."""

    value: float
    low: float
    high: float


def estimates(values: Array, sds: Array, situations: Sequence[Situation], spread: Spread) -> list[Estimate]:
    widths = [math.exp(spread.of(s.runtime) * sd) for s, sd in zip(situations, sds, strict=True)]
    return [Estimate(v, v / w, v * w) for v, w in zip(map(float, values), widths, strict=True)]
