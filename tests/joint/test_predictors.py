"""Two Predictors as one: each row of a batch goes its own way."""

import asyncio
import json
import math

import numpy as np
import pytest
from clock import run
from hypothesis import given
from hypothesis import strategies as st

from edgewise.engines.fake import FakePredictor
from edgewise.errors import RemoteBroken, RemoteRefused, RequestError, Unreachable
from edgewise.joint.policy import Policy
from edgewise.joint.predictors import PredictorCascade
from edgewise.joint.replay_log import ReplayLog

SURE_ROW, UNSURE_ROW = [9.0, 0.0, 0.0], [0.4, 0.3, 0.2]


def predictor(*rows, **fault):
    return FakePredictor({"logits": np.array(rows, np.float32)}, **fault)


def reader(name="reader", **fault):
    """Gives each row's own numbers as its logits, and who it was."""
    return FakePredictor(
        lambda inputs: {"logits": inputs["x"].copy(), "by": np.full(len(inputs["x"]), name, "U9"), name: np.zeros(1)},
        name=name,
        **fault,
    )


def decide(near, far, inputs=None, *, log=None, runs=1, policy=None, **wishes):
    async def go():
        cascade = PredictorCascade(near, far, policy, log=log, edge_runs=runs)
        found = await cascade.decide({"x": np.zeros((1, 3))} if inputs is None else inputs, **wishes)
        await asyncio.sleep(20)
        await cascade.close()
        return found

    return run(go())


def ways(decisions):
    return [(decision.route, decision.reason) for decision in decisions]


@pytest.mark.parametrize(("row", "way"), [(SURE_ROW, ("edge", "confident")), (UNSURE_ROW, ("cloud", "unsure"))])
def test_what_one_tier_answers_alone_comes_back_as_it_gave_it(row, way):
    near, far = predictor(row, row), predictor(SURE_ROW, SURE_ROW)
    outputs, decisions = decide(near, far)
    assert ways(decisions) == [way, way]
    assert outputs is (near if way[0] == "edge" else far).answer


def test_only_unsure_rows_are_sent():
    near, far = reader("near"), reader("far")
    rows = np.array([SURE_ROW, UNSURE_ROW, SURE_ROW, UNSURE_ROW])
    outputs, decisions = decide(near, far, {"x": rows, "mask": np.arange(4)})
    assert [decision.route for decision in decisions] == ["edge", "cloud", "edge", "cloud"]
    assert [decision.confidence > 0.8 for decision in decisions] == [True, False, True, False]
    assert far.inputs[0]["x"].tolist() == [UNSURE_ROW, UNSURE_ROW]
    assert far.inputs[0]["mask"].tolist() == [1, 3]
    assert outputs["by"].tolist() == ["near", "far", "near", "far"]
    assert outputs["logits"].tolist() == rows.tolist()
    assert set(outputs) == {"logits", "by"}


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_batch_is_its_rows(sure):
    """Together or one by one: the same answers by the same routes."""
    rows = np.array([SURE_ROW if one else UNSURE_ROW for one in sure])
    outputs, decisions = decide(reader("near"), reader("far"), {"x": rows})
    alone = [decide(reader("near"), reader("far"), {"x": rows[[place]]}) for place in range(len(rows))]
    assert list(decisions) == [one for _, (one,) in alone]
    assert outputs["by"].tolist() == [one["by"][0] for one, _ in alone]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"error": Unreachable("x")}, "cloud_unreachable"),
        ({"error": RemoteRefused("x", status=403)}, "cloud_refused"),
        ({"error": RemoteBroken("x")}, "cloud_broken"),
        ({"error": KeyError("x")}, "cloud_broken"),
        ({"hangs": True}, "cloud_timeout"),
    ],
)
@pytest.mark.parametrize("wish", ["auto", "cloud"])
def test_predictors_fall_back_too(fault, reason, wish):
    near = predictor(UNSURE_ROW, SURE_ROW)
    outputs, decisions = decide(near, predictor(SURE_ROW, **fault), wish=wish, deadline_ms=1000)
    sure = ("edge", "confident") if wish == "auto" else ("edge_fallback", reason)
    assert ways(decisions)[0] == ("edge_fallback", reason)
    assert ways(decisions)[1] == sure
    assert outputs is near.answer


@pytest.mark.parametrize("answer", [[SURE_ROW], [[1.0, 2.0]] * 2, [SURE_ROW] * 3, 5.0])
def test_a_cloud_whose_rows_are_not_those_asked_for_is_broken(answer):
    near = reader("near")
    far = FakePredictor({"logits": np.array(answer)})
    outputs, decisions = decide(near, far, {"x": np.array([UNSURE_ROW, SURE_ROW, UNSURE_ROW])})
    assert ways(decisions) == [
        ("edge_fallback", "cloud_broken"),
        ("edge", "confident"),
        ("edge_fallback", "cloud_broken"),
    ]
    assert outputs["by"].tolist() == ["near"] * 3


def test_where_the_edge_fails_the_cloud_answers_all():
    far = reader("far")
    rows = np.array([SURE_ROW, UNSURE_ROW])
    outputs, decisions = decide(reader("near", error=KeyError("x")), far, {"x": rows})
    assert ways(decisions) == [("cloud", "edge_failed")] * 2
    assert outputs["by"].tolist() == ["far", "far"]


@pytest.mark.parametrize("wish", ["edge", "cloud"])
def test_a_wish_holds_for_all_rows(wish):
    rows = np.array([SURE_ROW, UNSURE_ROW])
    outputs, decisions = decide(reader("edge"), reader("cloud"), {"x": rows}, wish=wish)
    assert ways(decisions) == [(wish, "asked")] * 2
    assert outputs["by"].tolist() == [wish, wish]


def test_outputs_without_logits_are_no_evidence():
    far = predictor(SURE_ROW)
    outputs, decisions = decide(FakePredictor({"boxes": np.zeros(4)}), far)
    assert ways(decisions) == [("cloud", "no_evidence")]
    assert outputs is far.answer


@pytest.mark.parametrize("deadline_ms", [0, -1.0, math.nan])
def test_a_deadline_that_cannot_be_is_refused(deadline_ms):
    with pytest.raises(RequestError, match="deadline_ms"):
        decide(predictor(SURE_ROW), None, deadline_ms=deadline_ms)


async def test_a_predictor_cascade_is_a_predictor():
    near, far = predictor(SURE_ROW), predictor(SURE_ROW)
    cascade = PredictorCascade(near, far)
    assert await cascade.predict({}) is near.answer
    await cascade.close()
    assert near.closed
    assert far.closed


def test_three_tiers_by_nesting():
    """Each takes what the one before is not sure of, by its own threshold, and a batch meets all three."""
    phone, box, cloud = reader("phone"), reader("box"), reader("cloud")
    rows = np.array([[9.0, 0.0, 0.0], [1.2, 0.0, 0.0], [0.4, 0.3, 0.2]])  # 1.00, 0.62 and 0.37
    outer = PredictorCascade(
        phone, PredictorCascade(box, cloud, Policy.softmax(0.5), name="upper"), Policy.softmax(0.8)
    )
    outputs, decisions = run(outer.decide({"x": rows}))
    assert outputs["by"].tolist() == ["phone", "box", "cloud"]
    assert [decision.route for decision in decisions] == ["edge", "cloud", "cloud"]
    assert (len(box.inputs[0]["x"]), len(cloud.inputs[0]["x"])) == (2, 1)


def test_runs_that_disagree_are_a_signal():
    """The edge answers differently each time; a policy on how many runs agree sends away what it wavers on."""
    calls = iter(range(1_000))

    def wavering(inputs):
        turn = next(calls)
        steady, moving = [3.0, 0.0, 0.0], np.roll([3.0, 0.0, 0.0], turn)
        return {"logits": np.array([steady, moving])}

    agreed = Policy.parse(
        json.dumps(
            json.loads(Policy.softmax(0.6).to_json())
            | {
                "whole": {
                    "threshold": 0.6,
                    "judge": {"kind": "signals", "weights": {"agreement": 1.0}, "bias": 0, "link": "identity"},
                }
            }
        ).encode()
    )
    _, decisions = decide(FakePredictor(wavering), reader(), {"x": np.zeros((2, 3))}, runs=6, policy=agreed)
    assert [decision.route for decision in decisions] == ["edge", "cloud"]
    assert [decision.confidence for decision in decisions] == [1.0, pytest.approx(1 / 3)]
    _, decisions = decide(FakePredictor(wavering), reader(), {"x": np.zeros((2, 3))}, policy=agreed)
    assert ways(decisions) == [("cloud", "no_evidence")] * 2


@pytest.mark.parametrize("drawn", [False, True])
def test_a_log_of_batches_compares_each_row_as_often_as_it_says(tmp_path, drawn):
    """Rows that stayed are compared only where the batch was drawn, and rows that went in any case."""
    path = tmp_path / "r.jsonl"
    log = ReplayLog(path, share=0.3, lot=lambda: 0.0 if drawn else 0.9)
    far = FakePredictor(lambda inputs: {"logits": np.roll(inputs["x"], 1, axis=1)})
    rows = np.array([SURE_ROW, UNSURE_ROW, SURE_ROW])
    outputs, _ = decide(reader("near"), far, {"x": rows}, log=log)
    assert outputs["logits"].tolist() == [SURE_ROW, [0.2, 0.4, 0.3], SURE_ROW]
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["route"] for row in written] == ["edge", "cloud", "edge"]
    assert [row["drawn"] for row in written] == [0.3, 1.0, 0.3]
    assert ["quality" in row["edge"] for row in written] == [drawn, True, drawn]
    assert [row["edge"].get("quality", 0.0) for row in written] == [0.0] * 3
    assert [len(inputs["x"]) for inputs in far.inputs] == [3 if drawn else 1]


def test_a_drawn_batch_that_stayed_is_compared_afterwards(tmp_path):
    path = tmp_path / "r.jsonl"
    far = reader("far")
    rows = np.array([SURE_ROW, SURE_ROW])
    outputs, _ = decide(reader("near"), far, {"x": rows}, log=ReplayLog(path, share=0.3, lot=lambda: 0.0))
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["drawn"], row["edge"]["quality"], row["cloud"]["quality"]) for row in written] == [(0.3, 1.0, 1.0)] * 2
    assert outputs["by"].tolist() == ["near", "near"]
    assert len(far.inputs) == 1
