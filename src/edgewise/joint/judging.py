"""How a policy does on a replay: beside baselines, and on rows that it was not fitted on where there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgewise.evaluate.deferral import Curve, auroc, deferral_curve, ece, ece_floor
from edgewise.evaluate.interval import Interval, bootstrap
from edgewise.joint.judge import Judge
from edgewise.joint.policy import Policy
from edgewise.joint.replay import Replay

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

BASELINES = ("random", "max_softmax", "mean_logprob", "length", "oracle")


@dataclass(frozen=True)
class Judged:
    """Figures of `n` rows. `left_out` is how many more the fit saw; where it saw all, all are judged, `in_sample`."""

    n: int
    left_out: int
    in_sample: bool
    curve: Curve
    apgr: Interval | None
    escalated: float
    no_evidence: float
    accuracy: Interval
    edge_accuracy: float
    cloud_accuracy: float
    drop: float  # share where the edge was kept and wrong and the cloud right
    auroc: float | None
    ece: float | None
    ece_floor: float | None
    baselines: Mapping[str, Curve]


def judge_replay(replay: Replay, policy: Policy) -> Judged:
    """The policy's whole-answer decisions over the replay."""
    seen = policy.fitted.saw() if policy.fitted else set()
    fresh = [index for index, row in enumerate(replay) if row.fingerprint not in seen]
    in_sample = not fresh
    rows = replay if in_sample else replay.take(fresh)
    edge, cloud = rows.edge_right.astype(np.float64), rows.cloud_right.astype(np.float64)
    worth, confidence = _judged(rows, policy.whole.judge)
    kept = worth > policy.whole.threshold
    known = ~np.isnan(confidence)
    curve = deferral_curve(-worth, edge, cloud)
    return Judged(
        n=len(rows),
        left_out=len(replay) - len(rows),
        in_sample=in_sample,
        curve=curve,
        apgr=_interval(-worth, edge, cloud),
        escalated=float(1 - kept.mean()),
        no_evidence=float(1 - known.mean()),
        accuracy=bootstrap(np.where(kept, edge, cloud), resamples=1000),
        edge_accuracy=float(edge.mean()),
        cloud_accuracy=float(cloud.mean()),
        drop=float((kept & (edge == 0) & (cloud == 1)).mean()),
        auroc=auroc(confidence[known], edge[known] == 1) if known.any() else None,
        ece=ece(confidence[known], edge[known]) if known.any() else None,
        ece_floor=ece_floor(confidence[known]) if known.any() else None,
        baselines={name: deferral_curve(score, edge, cloud) for name, score in _baselines(rows).items()},
    )


def _judged(rows: Replay, judge: Judge) -> tuple[Floats, Floats]:
    """Worth [n], below all thresholds where there is no evidence, and confidence [n], NaN there."""
    judgements = [judge.judge(row.evidence()) for row in rows]
    worth = np.array([-1.0 if one is None else one.worth for one in judgements])
    return worth, np.array([np.nan if one is None else one.confidence for one in judgements])


def _interval(score: Floats, edge: Floats, cloud: Floats) -> Interval | None:
    """Of the APGR, over resampled rows; None where the tiers do not differ, in all of them or in some sample."""
    if edge.mean() == cloud.mean():
        return None

    def statistic(sample: npt.NDArray[np.float64]) -> float:
        found = deferral_curve(sample[:, 0], sample[:, 1], sample[:, 2]).apgr
        return np.nan if found is None else found

    found = bootstrap(np.stack([score, edge, cloud], axis=1), statistic, resamples=200)
    return None if np.isnan(found.low) else found


def _baselines(rows: Replay) -> dict[str, Floats]:
    """Scores that send the highest to the cloud first, of those that every row allows. `random` is the line between
    the tiers, `length` that of the prompt, the longest first."""
    evidence = [row.evidence() for row in rows]
    scores = {"random": np.zeros(len(rows)), "oracle": rows.cloud_right.astype(float) - rows.edge_right.astype(float)}
    for baseline, signal, sign in (
        ("max_softmax", "max_softmax", -1.0),
        ("mean_logprob", "mean_logprob", -1.0),
        ("length", "prompt_chars", 1.0),
    ):
        values = [one.get(signal) for one in evidence]
        if None not in values:
            scores[baseline] = sign * np.array(values, np.float64)
    return {name: scores[name] for name in BASELINES if name in scores}
