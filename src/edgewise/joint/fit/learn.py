"""Three logistic models over one design, each with the strengths of its blocks chosen by cross-validation on the rows
themselves, as they differ from pair to pair.

The search walks from a common start one block at a time and moves only for a gain that is more than luck. Then the
configurations that it met are averaged by their cross-validated likelihood, which costs nothing later: an average of
linear models is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from edgewise.joint.fit.design import Block, Design
from edgewise.joint.judge import HEADS, LOGIT_CLIP, Calibration, GainJudge, Lean, Order
from edgewise.joint.signals.evidence import Evidence

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Strengths = Mapping[Block, float]
Blocks = Mapping[Block, sparse.csr_matrix]
Maker = Callable[[Floats, Floats], Calibration]

FOLDS: Final = 5
GRID: Final = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
START: Final[Strengths] = {
    "linear": 0.3,
    "smooth": 0.3,
    "group": 0.3,
    "class": 3.0,
    "prompt words": 0.3,
    "answer words": 0.3,
    "group words": 0.1,
}
PASSES: Final = 2
LUCK: Final = 1.0  # nats of cross-validated likelihood that a change must gain
AVERAGED: Final = 8  # configurations at most, and the least share of the best one's weight
SHARE: Final = 0.05
SEARCHED_ROWS: Final = 1500  # strengths are chosen on so many rows at most
AVERAGED_ROWS: Final = 2500  # with more rows the best configuration stands alone
STEPS_ROWS: Final = 1000  # with fewer rows the steps of an isotonic line are mostly noise
LEANING: Final = 20  # with so many rows fixed, half of the judge's opinion is leaned


@dataclass(frozen=True)
class Learned:
    """A judge, and what it says of the rows [n, heads] when it has not learned from them (each by a judge of the other
    folds)."""

    judge: GainJudge
    chances: Floats
    strengths: Mapping[str, Strengths]

    @property
    def worth(self) -> Floats:
        """What the judge makes of those chances [n]."""
        return self.judge.worth(*self.chances.T)


def learn(evidence: Sequence[Evidence], edge: Bools, cloud: Bools, order: Order, seed: int) -> Learned:
    """Fit on rows [n] with these outcomes of the tiers.

    Rows that the cloud fixes are few, and a model of few is rough: the fewer, the more the judge leans on the model of
    right answers, as if the cloud fixed and broke the same shares of all of them."""
    design = Design.of(evidence, seed)
    folds = np.random.default_rng(seed).permutation(len(evidence)) % FOLDS
    outcomes = (edge, ~edge & cloud, edge & ~cloud)
    heads = [_Head.of(design.blocks, outcome.astype(np.float64), folds) for outcome in outcomes]
    numbers, labels, words = design.parts(_joined([head.line.weights for head in heads], design))
    chances = np.stack([head.chances for head in heads], axis=1)
    judge = GainJudge(
        order,
        _lean(edge, cloud),
        (heads[0].line.bias, heads[1].line.bias, heads[2].line.bias),
        numbers,
        labels,
        words,
        (heads[0].calibration, heads[1].calibration, heads[2].calibration),
    )
    strengths = {name: head.strengths for name, head in zip(HEADS, heads, strict=True)}
    return Learned(judge, chances, strengths)


@dataclass(frozen=True)
class _Head:
    line: _Line
    calibration: Calibration
    logits: Floats  # [n], each from the other folds
    strengths: Strengths

    @staticmethod
    def of(blocks: Blocks, outcome: Floats, folds: npt.NDArray[np.intp]) -> _Head:
        count = len(outcome)
        searched = count if count <= AVERAGED_ROWS else SEARCHED_ROWS
        mixture = _search(
            {name: block[:searched] for name, block in blocks.items()}, outcome[:searched], folds[:searched]
        )
        if count > AVERAGED_ROWS:
            mixture = [(mixture[0][0], 1.0)]
        logits = np.empty(count)
        for fold in range(FOLDS):
            logits[folds == fold] = _mixed(blocks, outcome, mixture, folds != fold).logits(blocks, folds == fold)
        line = _mixed(blocks, outcome, mixture, np.ones(count, bool))
        return _Head(line, _calibrated(logits, outcome, folds), logits, mixture[0][0])

    @property
    def chances(self) -> Floats:
        """Of the rows' logits, calibrated."""
        return np.array([self.calibration.of(logit) for logit in self.logits])


@dataclass(frozen=True)
class _Line:
    """A linear model over the blocks: weights [columns] of each block used."""

    weights: Mapping[Block, Floats]
    bias: float

    def logits(self, blocks: Blocks, rows: Bools) -> Floats:
        total = np.full(int(rows.sum()), self.bias)
        for name, weights in self.weights.items():
            total += blocks[name][rows] @ weights
        return total


Mixture = Sequence[tuple[Strengths, float]]


def _search(blocks: Blocks, outcome: Floats, folds: npt.NDArray[np.intp]) -> Mixture:
    """Strengths with their weights in the average, the best first."""
    met: dict[tuple[float, ...], float] = {}
    names = list(blocks)
    near: list[_Line | None] = [None] * FOLDS

    def likelihood(strengths: Strengths) -> float:
        key = tuple(strengths[name] for name in names)
        if key not in met:
            met[key] = _likelihood(blocks, outcome, strengths, folds, near)
        return met[key]

    best: Strengths = {name: START[name] for name in names}
    score = likelihood(best)
    for _ in range(PASSES):
        before = best
        for name in names:
            for step in (-1, 1):
                while True:
                    place = GRID.index(best[name]) + step
                    if not 0 <= place < len(GRID):
                        break
                    moved = {**best, name: GRID[place]}
                    if likelihood(moved) <= score + LUCK:
                        break
                    best, score = moved, likelihood(moved)
        if best is before:
            break
    ranked = sorted(met.items(), key=lambda item: -item[1])[:AVERAGED]
    top = ranked[0][1]
    kept = [(dict(zip(names, key, strict=True)), float(np.exp(value - top))) for key, value in ranked]
    kept = [(strengths, weight) for strengths, weight in kept if weight >= SHARE]
    total = sum(weight for _, weight in kept)
    return [(strengths, weight / total) for strengths, weight in kept]


def _likelihood(
    blocks: Blocks, outcome: Floats, strengths: Strengths, folds: npt.NDArray[np.intp], near: list[_Line | None]
) -> float:
    """Cross-validated, in nats, over all rows. `near` holds each fold's last line, from where the next is not far."""
    total = 0.0
    for fold in range(FOLDS):
        train, test = folds != fold, folds == fold
        line = near[fold] = _fitted(blocks, outcome, strengths, train, near[fold])
        logits = line.logits(blocks, test)
        total += float((outcome[test] * logits - np.logaddexp(0.0, logits)).sum())
    return total


def _mixed(blocks: Blocks, outcome: Floats, mixture: Mixture, train: Bools) -> _Line:
    bias, weights = 0.0, dict[Block, Floats]()
    for strengths, share in mixture:
        line = _fitted(blocks, outcome, strengths, train)
        bias += share * line.bias
        for name, found in line.weights.items():
            weights[name] = weights.get(name, 0.0) + share * found
    return _Line(weights, bias)


def _fitted(blocks: Blocks, outcome: Floats, strengths: Strengths, train: Bools, near: _Line | None = None) -> _Line:
    used = [name for name, strength in strengths.items() if strength > 0]
    seen = outcome[train]
    if not used or seen.min() == seen.max():
        share = (seen.sum() + 0.5) / (len(seen) + 1)
        return _Line({}, float(np.log(share / (1 - share))))
    scales = {name: float(np.sqrt(strengths[name])) for name in used}
    matrix = sparse.hstack([blocks[name][train] * scales[name] for name in used], format="csr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is left to gain is below the noise of the folds
        model = LogisticRegression(C=1.0, tol=1e-3, max_iter=200, warm_start=near is not None)
        if near is not None:
            starts = [near.weights.get(name, np.zeros(blocks[name].shape[1])) / scales[name] for name in used]
            model.coef_, model.intercept_ = np.concatenate(starts)[None], np.array([near.bias])
        model.fit(matrix, seen)
    weights, start = {}, 0
    for name in used:
        end = start + blocks[name].shape[1]
        weights[name] = model.coef_[0, start:end] * scales[name]
        start = end
    return _Line(weights, float(model.intercept_[0]))


def _joined(heads: Sequence[Mapping[Block, Floats]], design: Design) -> Mapping[Block, Floats]:
    """Weights [columns, heads] of each block that any head uses."""
    joined = {}
    for name, block in design.blocks.items():
        if any(name in head for head in heads):
            empty = np.zeros(block.shape[1])
            joined[name] = np.stack([head.get(name, empty) for head in heads], axis=1)
    return joined


def _lean(edge: Bools, cloud: Bools) -> Lean:
    fixed = int((~edge & cloud).sum())
    return Lean(LEANING / (LEANING + fixed), _share(cloud, ~edge), _share(~cloud, edge))


def _share(outcome: Bools, among: Bools) -> float:
    """Of `among`, how many; half a row is added to either side."""
    return float(((outcome & among).sum() + 0.5) / (among.sum() + 1))


# Calibration


def _calibrated(logits: Floats, outcome: Floats, folds: npt.NDArray[np.intp]) -> Calibration:
    """Nothing, a temperature, Platt's line or an isotonic one: whichever has the best cross-validated likelihood, the
    simpler one if it is luck."""
    makers: tuple[Maker, ...] = (_as_it_is, _temperature, _platt, *((_isotonic,) if len(logits) >= STEPS_ROWS else ()))
    scores = [sum(_score(maker, logits, outcome, folds == fold) for fold in range(FOLDS)) for maker in makers]
    chosen = 0
    for index in range(1, len(makers)):
        if scores[index] > scores[chosen] + LUCK:
            chosen = index
    return makers[chosen](logits, outcome)


def _score(maker: Maker, logits: Floats, outcome: Floats, test: Bools) -> float:
    if not test.any() or test.all():
        return 0.0
    calibration = maker(logits[~test], outcome[~test])
    shares = np.clip([calibration.of(logit) for logit in logits[test]], 1e-6, 1 - 1e-6)
    return float((outcome[test] * np.log(shares) + (1 - outcome[test]) * np.log(1 - shares)).sum())


def _as_it_is(logits: Floats, outcome: Floats) -> Calibration:
    return Calibration()


def _temperature(logits: Floats, outcome: Floats) -> Calibration:
    return _slope(logits, outcome, intercept=False)


def _platt(logits: Floats, outcome: Floats) -> Calibration:
    return _slope(logits, outcome, intercept=True)


def _slope(logits: Floats, outcome: Floats, *, intercept: bool) -> Calibration:
    if outcome.min() == outcome.max() or np.ptp(logits) == 0:
        return Calibration()
    model = LogisticRegression(C=np.inf, fit_intercept=intercept, max_iter=200).fit(logits[:, None], outcome)
    slope = float(model.coef_[0, 0])
    if slope <= 0:
        return Calibration()  # the other way round is no calibration
    return Calibration(slope, float(np.ravel(model.intercept_)[0]) if intercept else 0.0)


def _isotonic(logits: Floats, outcome: Floats) -> Calibration:
    """Between the corners of the rising steps, so that two logits seldom tie."""
    model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(logits, outcome)
    steps = np.flatnonzero(np.diff(model.y_thresholds_)) if len(model.y_thresholds_) > 1 else np.empty(0, int)
    starts = np.concatenate([[0], steps + 1])
    ends = np.concatenate([steps, [len(model.y_thresholds_) - 1]])
    middles = (model.X_thresholds_[starts] + model.X_thresholds_[ends]) / 2
    points = np.clip(middles, -LOGIT_CLIP, LOGIT_CLIP)
    return Calibration(1.0, 0.0, tuple(points.tolist()), tuple(model.y_thresholds_[starts].tolist()))
