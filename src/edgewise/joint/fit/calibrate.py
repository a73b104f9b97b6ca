"""A replay in, a policy out."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from edgewise.errors import UsageError
from edgewise.evaluate.deferral import Curve, auroc, deferral_curve, ece, ece_floor
from edgewise.joint.fit import bounds
from edgewise.joint.fit.learn import Strengths, learn
from edgewise.joint.fit.target import Choice, MaxDrop, Target, TargetAccuracy, best_start
from edgewise.joint.judge import Judge
from edgewise.joint.pair import Pair
from edgewise.joint.plot import Band, band
from edgewise.joint.policy import Early, Fitted, Forecast, Guarantee, Policy, Whole
from edgewise.joint.replay import Replay
from edgewise.joint.signals.evidence import Evidence

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

LEAST_ROWS: Final = 20
MOST_TAUGHT: Final = 0.4  # of the rows teach the judge where a threshold is to be proven; the others prove it
LEAST_TAUGHT: Final = 10


@dataclass(frozen=True)
class Side:
    """A judge with rows that it did not learn from, and the threshold that the target sets on them."""

    judge: Judge
    worth: Floats
    edge: Bools
    cloud: Bools
    confidence: Floats
    choice: Choice
    strengths: Mapping[str, Strengths]


@dataclass(frozen=True)
class Calibrated:
    """`policy` is None where the target was refused. Forecast, curve and figures are of the rows of `whole`."""

    policy: Policy | None
    rows: int
    whole: Side
    escalation: Forecast
    curve: Curve
    band: Band
    figures: Mapping[str, float | None]

    @property
    def points(self) -> list[tuple[float, float, float, float]]:
        """The curve at every tenth: share escalated, accuracy, and its interval."""
        band = self.band
        columns = (band.escalated, band.accuracy, band.low, band.high)
        step = (len(band.escalated) - 1) // 10
        return [
            (float(at), float(value), float(low), float(high)) for at, value, low, high in zip(*columns, strict=True)
        ][::step]


def calibrate(
    replay: Replay, target: Target, *, labels: int | None = None, seed: int = 0, pair: Pair | None = None
) -> Calibrated:
    """Fit on `labels` rows drawn by `seed`, or on all. UsageError for too few rows."""
    count = len(replay) if labels is None else labels
    if not LEAST_ROWS <= count <= len(replay):
        raise UsageError(
            f"{count} rows are to be fitted on, {replay.name} has {len(replay)} that are judged; "
            f"allowed are {LEAST_ROWS} to all of them"
        )
    drawn = np.random.default_rng(seed).permutation(len(replay))[:count]
    rows = replay.take(drawn.tolist())
    basis = Policy.default()
    with threadpool_limits(1):  # so many small matrices: threads cost several times what they save
        evidence = [row.evidence() for row in rows]
        whole = _side(rows, evidence, target, seed)
        early = _early(rows, evidence, whole, target, seed, basis)
    threshold = 1.0 if whole.choice.threshold is None else whole.choice.threshold
    escalated = int((whole.worth <= threshold).sum())
    escalation = Forecast(escalated / len(whole.worth), *bounds.interval(escalated, len(whole.worth)))
    policy = None
    if whole.choice.threshold is not None:
        fitted = Fitted(
            data_sha256=replay.sha256,
            rows=count,
            escalation=escalation,
            guarantee=_guarantee(target, whole),
            seen=base64.b64encode(b"".join(row.fingerprint for row in rows)).decode(),
        )
        policy = msgspec.structs.replace(
            basis, pair=pair, whole=Whole(whole.choice.threshold, whole.judge), early=early, fitted=fitted
        )
    curve = deferral_curve(-whole.worth, whole.edge, whole.cloud)
    shaded = band(-whole.worth, whole.edge.astype(np.float64), whole.cloud.astype(np.float64))
    figures = {
        "apgr": curve.apgr,
        "accuracy": float(np.where(whole.worth > threshold, whole.edge, whole.cloud).mean()),
        "edge_accuracy": float(whole.edge.mean()),
        "cloud_accuracy": float(whole.cloud.mean()),
        "auroc": auroc(whole.confidence, whole.edge),
        "ece": ece(whole.confidence, whole.edge),
        "ece_floor": ece_floor(whole.confidence),
    }
    return Calibrated(policy, count, whole, escalation, curve, shaded, figures)


def _side(rows: Replay, evidence: Sequence[Evidence], target: Target, seed: int) -> Side:
    if isinstance(target, MaxDrop | TargetAccuracy):
        return _proven(rows, evidence, target, seed)
    learned = learn(evidence, rows.edge_right, rows.cloud_right, target.order, seed)
    worth, confidence = learned.worth, learned.chances[:, 0]
    edge, cloud = rows.edge_right, rows.cloud_right
    choice = target.choose(worth, edge, cloud, 1.0)
    return Side(learned.judge, worth, edge, cloud, confidence, choice, learned.strengths)


def _proven(rows: Replay, evidence: Sequence[Evidence], target: MaxDrop | TargetAccuracy, seed: int) -> Side:
    """Some rows teach the judge, the others prove the threshold: each row one or the other, or nothing is proven."""
    taught = _taught(len(rows))
    edge, cloud = rows.edge_right, rows.cloud_right
    learned = learn(evidence[:taught], edge[:taught], cloud[:taught], target.order, seed)
    start = 1.0
    if isinstance(target, TargetAccuracy):
        start = best_start(learned.worth, edge[:taught], cloud[:taught])
    judgements = [learned.judge.judge(one) for one in evidence[taught:]]
    worth = np.array([0.0 if one is None else one.worth for one in judgements])
    confidence = np.array([0.0 if one is None else one.confidence for one in judgements])
    edge, cloud = edge[taught:], cloud[taught:]
    choice = target.choose(worth, edge, cloud, start)
    return Side(learned.judge, worth, edge, cloud, confidence, choice, learned.strengths)


def _taught(count: int) -> int:
    """The fewer rows, the more of them a proof needs: 20 of 100 teach, 83 of 300, 397 of 1,000. Found by trying shares
    on sets of these sizes."""
    return max(LEAST_TAUGHT, min(round(math.pow(count, 1.3) / 20), round(MOST_TAUGHT * count)))


def _early(
    rows: Replay, evidence: Sequence[Evidence], whole: Side, target: Target, seed: int, basis: Policy
) -> Early | None:
    """The decision on the first tokens of a stream: by what is known then. Classifiers do not stream."""
    assert basis.early is not None
    if whole.choice.threshold is None or any(row.edge.logits is not None for row in rows):
        return None
    threshold: float | None = whole.choice.threshold
    judge = None
    if any(row.edge.text is not None or row.edge.token_logprobs or row.edge.signals for row in rows):
        count = basis.early.tokens
        begun = _side(rows, [one.answered(logprobs=one.logprobs[:count]) for one in evidence], target, seed)
        threshold, judge = begun.choice.threshold, begun.judge
    if threshold is None:
        return None
    return Early(threshold, basis.early.tokens, basis.early.max_wait_ms, judge)


def _guarantee(target: Target, side: Side) -> Guarantee | None:
    if not isinstance(target, MaxDrop | TargetAccuracy):
        return None
    assert side.choice.bound is not None
    return Guarantee(target.risk, target.limit, target.delta, len(side.worth), min(side.choice.bound, 1.0))
