import msgspec
import numpy as np
import pytest

import replays
from edgewise.evaluate.deferral import auroc, deferral_curve
from edgewise.joint.judge import SignalsJudge
from edgewise.joint.judging import judge_replay
from edgewise.joint.policy import Policy
from edgewise.joint.replay import Replay


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return Replay.open(replays.saved(replays.classified(1500), tmp_path_factory.mktemp("p") / "r.jsonl"))


def test_figures_of_a_plain_threshold(photos):
    judged = judge_replay(photos, Policy.softmax(0.7))
    confidence = np.array([row.evidence().get("max_softmax") for row in photos])
    kept = confidence > 0.7
    assert judged.escalated == pytest.approx(1 - kept.mean())
    assert judged.accuracy.value == pytest.approx(np.where(kept, photos.edge_right, photos.cloud_right).mean())
    assert judged.accuracy.low < judged.accuracy.value < judged.accuracy.high
    assert judged.drop == pytest.approx((kept & ~photos.edge_right & photos.cloud_right).mean())
    assert judged.auroc == auroc(confidence, photos.edge_right)
    curve = deferral_curve(-confidence, photos.edge_right, photos.cloud_right)
    assert judged.curve.apgr == curve.apgr == judged.baselines["max_softmax"].apgr
    assert judged.apgr.low < curve.apgr < judged.apgr.high
    assert set(judged.baselines) == {"random", "max_softmax", "length", "oracle"}


def test_no_evidence_goes_to_the_cloud(photos):
    """A policy for texts has nothing to say of classifiers."""
    judged = judge_replay(photos, Policy.default())
    assert (judged.escalated, judged.no_evidence) == (1.0, 1.0)
    assert judged.accuracy.value == judged.cloud_accuracy
    assert (judged.auroc, judged.ece, judged.ece_floor) == (None, None, None)


def test_a_failed_gate_goes_to_the_cloud(tmp_path):
    rows = replays.written(40)
    rows[0]["edge"]["text"] = " "
    judge = SignalsJudge({"mean_logprob": 1.0}, 0.0, "exp", ("parse_ok",))
    policy = Policy.default()
    policy = msgspec.structs.replace(policy, whole=msgspec.structs.replace(policy.whole, threshold=0.0, judge=judge))
    judged = judge_replay(Replay.open(replays.saved(rows, tmp_path / "r.jsonl")), policy)
    assert judged.escalated == pytest.approx(1 / 40)


def test_tiers_that_are_equally_good(tmp_path):
    rows = [row | {"cloud": {"correct": row["edge"]["correct"]}} for row in replays.classified(40)]
    judged = judge_replay(Replay.open(replays.saved(rows, tmp_path / "r.jsonl")), Policy.softmax(0.5))
    assert (judged.apgr, judged.curve.apgr, judged.curve.cpt(0.5)) == (None, None, None)
