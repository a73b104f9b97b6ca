"""From a replay to a policy: what is learned, what is promised, and what is left alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from scipy import stats

import replays
from edgewise.errors import UsageError
from edgewise.evaluate.deferral import deferral_curve, ece, ece_floor
from edgewise.joint.fit import bounds
from edgewise.joint.fit.calibrate import calibrate
from edgewise.joint.fit.target import Budget, Cost, MaxDrop, TargetAccuracy
from edgewise.joint.judging import judge_replay
from edgewise.joint.policy import Policy
from edgewise.joint.replay import Replay


def replay(rows, tmp_path, name="r.jsonl"):
    return Replay.open(replays.saved(rows, tmp_path / name))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return replay(replays.classified(3000), tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return replay(replays.written(1200), tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def fitted(photos):
    return calibrate(photos, Budget(0.3), labels=600, seed=1)


def test_gain_is_learned_and_not_only_the_edges_error(photos, fitted):
    """The edge's confidence alone sends away what the cloud cannot do better."""
    judged = judge_replay(photos, fitted.policy)
    assert (judged.n, judged.left_out, judged.in_sample) == (2400, 600, False)
    assert judged.curve.apgr > judged.baselines["max_softmax"].apgr + 0.15
    assert judged.baselines["random"].apgr == pytest.approx(0.5)
    assert judged.baselines["oracle"].apgr > judged.curve.apgr


def test_confidence_is_the_probability_of_being_right(photos):
    judged = judge_replay(photos, calibrate(photos, Cost(), labels=2000).policy)
    assert judged.ece < judged.ece_floor + 0.025
    raw = judge_replay(photos, Policy.softmax(0.8))
    assert raw.ece > judged.ece + 0.02  # what the greatest softmax alone makes of it


def test_a_budget_is_kept(photos, fitted):
    judged = judge_replay(photos, fitted.policy)
    forecast = fitted.policy.fitted.escalation
    assert forecast.low < 0.3 < forecast.high
    assert judged.escalated == pytest.approx(0.3, abs=0.05)


def test_the_policy_comes_back_from_its_file(photos, fitted):
    again = Policy.parse(fitted.policy.to_json())
    assert again == fitted.policy
    for row in photos.rows[:50]:
        assert again.whole.judge.judge(row.evidence()) == fitted.policy.whole.judge.judge(row.evidence())


def test_not_one_score_changes_when_all_labels_are_shuffled_after_fitting(tmp_path):
    rows = replays.classified(60, seed=5) + replays.written(60, seed=5)
    policy = calibrate(replay(rows, tmp_path), Cost(), seed=2).policy
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = json.loads(json.dumps(rows))
    for row, other in zip(shuffled, order, strict=True):
        row["gold"] = int(other)
        for tier in ("edge", "cloud"):
            row[tier]["correct"] = rows[other][tier]["correct"]
    before, after = replay(rows, tmp_path, "a.jsonl"), replay(shuffled, tmp_path, "b.jsonl")
    assert before.edge_right.tolist() != after.edge_right.tolist()
    for one, other in zip(before, after, strict=True):
        assert policy.whole.judge.judge(one.evidence()) == policy.whole.judge.judge(other.evidence())


def test_the_same_seed_fits_the_same_policy(photos):
    one, two = (calibrate(photos, Budget(0.2), labels=100, seed=7).policy for _ in range(2))
    assert one == two
    assert one != calibrate(photos, Budget(0.2), labels=100, seed=8).policy


def test_texts_get_an_early_judge_that_knows_the_first_tokens(texts):
    policy = calibrate(texts, Budget(0.4), labels=600, seed=1).policy
    rest = [row for row in texts if row.fingerprint not in policy.fitted.saw()]
    begun = [row.evidence().answered(logprobs=row.edge.token_logprobs[:16]) for row in rest]
    worth = np.array([policy.early.judge.judge(one).worth for one in begun])
    curve = deferral_curve(-worth, [row.edge.correct for row in rest], [row.cloud.correct for row in rest])
    assert curve.apgr > 0.62
    assert np.mean(worth <= policy.early.threshold) == pytest.approx(0.4, abs=0.08)
    assert calibrate(texts, Budget(0.4), labels=600, seed=1).policy.whole.judge.labels[0].known == ("art", "law")


def test_without_an_answer_one_judge_does_for_both(tmp_path):
    rows = [row | {"edge": {"correct": row["edge"]["correct"]}} for row in replays.written(200)]
    policy = calibrate(replay(rows, tmp_path), Budget(0.4)).policy
    assert policy.early.judge is None
    assert policy.early.threshold == policy.whole.threshold


def test_classifiers_do_not_stream(fitted):
    assert fitted.policy.early is None


def test_costs_set_the_threshold(photos):
    dear = calibrate(photos, Cost(0.0, 0.3), labels=300).policy
    free = calibrate(photos, Cost(), labels=300).policy
    assert (free.whole.threshold, dear.whole.threshold) == pytest.approx((0.5, 0.35))
    assert judge_replay(photos, dear).escalated < judge_replay(photos, free).escalated


def test_rows_that_were_all_seen_are_judged_in_sample(tmp_path):
    small = replay(replays.classified(60), tmp_path)
    judged = judge_replay(small, calibrate(small, Cost()).policy)
    assert (judged.in_sample, judged.n, judged.left_out) == (True, 60, 0)


@pytest.mark.parametrize("labels", [0, 19, 3001])
def test_too_few_or_too_many_rows(photos, labels):
    with pytest.raises(UsageError, match="allowed are 20 to all of them"):
        calibrate(photos, Cost(), labels=labels)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MaxDrop(0.0),
        lambda: MaxDrop(0.1, 1.0),
        lambda: TargetAccuracy(1.0),
        lambda: TargetAccuracy(float("nan")),
        lambda: Budget(1.1),
        lambda: Budget(float("nan")),
        lambda: Cost(-1.0, 0.0),
        lambda: Cost(0.0, float("nan")),
    ],
)
def test_targets_out_of_range(make):
    with pytest.raises(UsageError, match="allowed are"):
        make()


def test_rows_that_say_nothing_are_still_a_policy(tmp_path):
    """No prompt, no answer: the base rates are all that can be learned."""
    rows = [{"id": str(n), "edge": {"correct": n % 3 > 0}, "cloud": {"correct": n % 5 > 0}} for n in range(90)]
    found = calibrate(replay(rows, tmp_path), Cost())
    judgement = found.policy.whole.judge.judge(replay(rows, tmp_path)[0].evidence())
    assert judgement.confidence == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize("edge", [True, False])
def test_one_kind_of_outcome_is_enough(tmp_path, edge):
    rows = [row | {"edge": row["edge"] | {"correct": edge}} for row in replays.classified(80)]
    judgement = calibrate(replay(rows, tmp_path), Cost()).policy.whole.judge.judge(replay(rows, tmp_path)[0].evidence())
    assert abs(judgement.confidence - edge) < 0.05


def test_signals_that_are_missing_here_and_there(tmp_path):
    rows = replays.classified(300)
    for number, row in enumerate(rows):
        row["edge"]["signals"] = {"agreement": 0.5 + 0.5 * row["edge"]["correct"] if number % 2 else None}
    found = replay(rows, tmp_path)
    judge = calibrate(found, Cost()).policy.whole.judge
    required = dict(zip(judge.numbers.names, judge.numbers.required, strict=True))
    assert (required["agreement"], required["max_softmax"]) == (False, True)
    told, untold = judge.judge(found[1].evidence()), judge.judge(found[0].evidence())
    assert told is not None
    assert untold is not None


# Guarantees


def test_bounds_are_exact():
    for count, losses, delta in ((100, 0, 0.1), (50, 3, 0.05), (300, 40, 0.2)):
        limit = bounds.upper(losses, count, delta)
        assert stats.binom.cdf(losses, count, limit) == pytest.approx(delta)
    assert bounds.upper(5, 5, 0.1) == 1.0
    low, high = bounds.interval(30, 100)
    assert stats.binom.sf(29, 100, low) == pytest.approx(0.025)
    assert stats.binom.cdf(30, 100, high) == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("count", "limit", "delta"), [(100, 0.05, 0.1), (44, 0.05, 0.1), (1000, 0.02, 0.05), (10, 0.5, 0.5)]
)
def test_the_most_losses_that_prove_a_limit(count, limit, delta):
    most = bounds.most_losses(count, limit, delta)
    assert most == max((k for k in range(-1, count) if k < 0 or bounds.upper(k, count, delta) <= limit), default=-1)


@pytest.mark.parametrize("count", [20, 100, 301, 1000])
@pytest.mark.parametrize("limit", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("delta", [0.05, 0.1])
def test_the_most_losses_are_those_that_mapie_accepts(count, limit, delta):
    """Its p-value for losses of 0 and 1, which is exact too where the losses are few."""
    shares = np.arange(count // 2) / count * (1 - 1e-12)  # it rounds the count of losses up
    accepted = compute_hoeffding_bentkus_p_value(shares, count, limit, binary=True)[:, 0] <= delta
    assert bounds.most_losses(count, limit, delta) == accepted.sum() - 1


def test_losses_along_the_thresholds():
    worth = np.array([0.9, 0.5, 0.5, 0.1])
    kept = np.array([False, True, False, True])
    escalated = np.array([True, False, False, False])
    thresholds, losses = bounds.losses_along(worth, kept, escalated)
    assert thresholds.tolist() == pytest.approx([1.0, 0.7, 0.3, 0.0])
    for threshold, count in zip(thresholds, losses, strict=True):
        stays = worth > threshold
        assert count == (kept & stays).sum() + (escalated & ~stays).sum()


def test_a_drop_is_promised_in_no_more_cases_than_said(tmp_path):
    """200 samples of a population of which the risk is known: the promise may fail in one of ten."""
    random = np.random.default_rng(0)
    broken, kept, best = [], [], []
    for _ in range(200):
        worth = random.random(150)
        choice = MaxDrop(0.1, 0.1).choose(worth, random.random(150) < worth, np.ones(150, bool), 1.0)
        threshold = choice.threshold
        assert threshold is not None
        risk = (1 - threshold) ** 2 / 2  # the integral of 1 - worth above the threshold
        broken.append(risk > 0.1)
        kept.append(1 - threshold)
        best.append(np.sqrt(0.2))
        assert choice.bound <= 0.1
    assert np.mean(broken) <= 0.1 + 2 * np.sqrt(0.09 / 200)
    assert np.mean(kept) / np.mean(best) > 0.75


def test_what_cannot_be_promised_is_refused(photos):
    """The cloud is wrong in about a third of all cases, so nothing can serve nine right answers in ten."""
    found = calibrate(photos, TargetAccuracy(0.1), labels=600)
    assert found.policy is None
    assert found.whole.choice.bound > 0.1
    assert found.whole.choice.min_escalation is None
    few = calibrate(photos, MaxDrop(0.01), labels=100)
    assert few.policy is None
    assert few.whole.choice.bound == pytest.approx(bounds.upper(0, 80, 0.1))


def test_an_accuracy_that_the_cloud_alone_does_not_reach(photos):
    """Where the edge is the better one, it stays: together they may promise more than either."""
    cloud_wrong = 1 - photos.cloud_right.mean()
    found = calibrate(photos, TargetAccuracy(cloud_wrong + 0.03), labels=2000, seed=3)
    judged = judge_replay(photos, found.policy)
    assert judged.escalated < 0.9
    assert 1 - judged.accuracy.high <= cloud_wrong + 0.03
    guarantee = found.policy.fitted.guarantee
    assert (guarantee.risk, guarantee.n) == ("wrong", 1200)
    assert guarantee.bound <= guarantee.target


def test_no_row_both_teaches_and_proves(photos):
    found = calibrate(photos, MaxDrop(0.1), labels=500, seed=4)
    guarantee = found.policy.fitted.guarantee
    assert (guarantee.risk, guarantee.n, found.policy.fitted.rows) == ("drop", 339, 500)
    assert judge_replay(photos, found.policy).escalated < 0.8


def test_a_promise_fails_as_seldom_as_it_says(photos):
    """At delta 0.1, of 20 draws more than five would fail once in a hundred times if it were true."""
    fits = [calibrate(photos, MaxDrop(0.1), labels=300, seed=seed).policy for seed in range(20)]
    assert sum(judge_replay(photos, policy).drop > 0.1 for policy in fits) <= 5


def test_the_evaluator_needs_no_scikit_learn(fitted, tmp_path):
    path = tmp_path / "p.json"
    path.write_bytes(fitted.policy.to_json())
    code = (
        "import sys; from pathlib import Path; from edgewise.joint.policy import Policy; import numpy as np;"
        "from edgewise.joint.signals.evidence import Evidence;"
        f"p = Policy.open(Path({str(path)!r})); "
        "assert p.whole.judge.judge(Evidence('x', logits=np.array([1.0, 2, 3, 4]))) is not None;"
        "assert not {'sklearn', 'scipy', 'mapie'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_calibration_of_a_fit_is_true_where_the_model_is(tmp_path):
    """Outcomes drawn from a logistic model of one signal."""
    random = np.random.default_rng(3)
    rows = []
    for number in range(2500):
        signal = random.normal()
        right = random.random() < 1 / (1 + np.exp(-2 * signal))
        edge = {"correct": bool(right), "signals": {"mood": round(float(signal), 4)}}
        rows.append({"id": str(number), "edge": edge, "cloud": {"correct": True}})
    found = replay(rows, tmp_path)
    policy = calibrate(found, Cost(), labels=1500).policy
    rest = [row for row in found if row.fingerprint not in policy.fitted.saw()]
    confidence = [policy.whole.judge.judge(row.evidence()).confidence for row in rest]
    truth = [1 / (1 + np.exp(-2 * row.edge.signals["mood"])) for row in rest]
    assert np.abs(np.array(confidence) - truth).mean() < 0.02
    assert ece(confidence, [row.edge.correct for row in rest]) < ece_floor(confidence) + 0.02
