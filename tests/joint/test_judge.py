"""What judges make of evidence; the fitted ones are in test_calibrate.py."""

import base64
import json
import math
import re

import msgspec
import numpy as np
import pytest

from edgewise.joint.judge import (
    Array,
    Calibration,
    GainJudge,
    Judge,
    Labels,
    Lean,
    Numbers,
    SignalsJudge,
    Words,
)
from edgewise.joint.signals.evidence import Evidence
from edgewise.joint.signals.text import bucket_of


def given(**signals: float | None) -> Evidence:
    return Evidence(given=signals)


@pytest.mark.parametrize(
    ("link", "score", "value"),
    [
        ("exp", 1e308, 1.0),
        ("exp", -1e308, 0.0),
        ("logistic", 0.0, 0.5),
        ("logistic", 2.0, 1 / (1 + math.exp(-2))),
        ("logistic", -1e308, 0.0),
        ("logistic", -math.inf, 0.0),
        ("identity", 0.3, 0.3),
        ("identity", 7.0, 1.0),
        ("identity", -7.0, 0.0),
    ],
)
def test_links(link, score, value):
    judge = SignalsJudge(weights={"max_softmax": 1.0}, bias=0.0, link=link)
    assert judge.judge(given(max_softmax=score)).confidence == pytest.approx(value)


def test_weights_add_up_and_missing_evidence_is_no_confidence():
    judge = SignalsJudge(weights={"mean_logprob": 2.0, "min_logprob": 0.5}, bias=1.0, link="logistic")
    both = judge.judge(given(mean_logprob=-1.0, min_logprob=-2.0))
    assert both.confidence == pytest.approx(1 / (1 + math.exp(2)))
    assert judge.judge(given(mean_logprob=-1.0, min_logprob=None)) is None
    assert judge.judge(given(mean_logprob=-1.0)) is None
    infinities = SignalsJudge(weights={"mean_logprob": 1.0, "min_logprob": -1.0}, bias=0.0, link="exp")
    assert infinities.judge(given(mean_logprob=-math.inf, min_logprob=-math.inf)) is None


def test_a_failed_gate_is_confidence_zero_and_no_evidence_fails_none():
    judge = SignalsJudge({"mean_logprob": 1.0}, 0.0, "exp", ("parse_ok",))
    assert judge.judge(given(mean_logprob=-0.01, parse_ok=0.0)).confidence == 0.0
    assert judge.fails_gate(given(parse_ok=0.0))
    assert judge.judge(given(mean_logprob=-0.01, parse_ok=None)).confidence == pytest.approx(math.exp(-0.01))


def gain(**parts: object) -> GainJudge:
    plain = {
        "order": "gain",
        "lean": Lean(0.0, 0.0, 0.0),
        "bias": (0.0, -1.0, -2.0),
        "numbers": None,
        "labels": (),
        "words": (),
        "calibration": (Calibration(),) * 3,
    }
    return GainJudge(**(plain | parts))


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def test_worth_is_what_keeping_gains_over_asking():
    fixed, broken = sigmoid(-1), sigmoid(-2)
    assert gain().judge(Evidence()) == pytest.approx((0.5, (1 - fixed + broken) / 2))
    assert gain(order="fixed").judge(Evidence()).worth == pytest.approx(1 - fixed)
    leaning = gain(lean=Lean(1.0, 0.4, 0.2)).judge(Evidence())
    assert leaning.worth == pytest.approx((1 - 0.4 * 0.5 + 0.2 * 0.5) / 2)


def numbers(**parts: object) -> Numbers:
    plain = {
        "names": ("a", "b"),
        "required": (True, False),
        "mean": (1.0, 10.0),
        "scale": (2.0, 5.0),
        "width": 2.0,
        "landmarks": Array.of(np.zeros((1, 2))),
        "linear": Array.of(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])),
        "smooth": Array.of(np.array([[0.0, 0.0, 3.0]])),
    }
    return Numbers(**(plain | parts))


def test_numbers_are_deviations_with_a_straight_and_a_smooth_part():
    judge = gain(numbers=numbers())
    right, fixed, broken = judge.chances(given(a=3.0, b=0.0))
    near = math.exp(-2.0 / 4 * (1 + 4))
    assert right == pytest.approx(sigmoid(1.0))
    assert fixed == pytest.approx(sigmoid(-1.0 - 2.0))
    assert broken == pytest.approx(sigmoid(-2.0 + 3 * near))


def test_numbers_beyond_four_deviations_count_as_four_and_infinity_too():
    judge = gain(numbers=numbers())
    assert judge.chances(given(a=1e9, b=10.0)) == judge.chances(given(a=9.0, b=10.0))
    assert judge.chances(given(a=-math.inf, b=10.0)) == judge.chances(given(a=-7.0, b=10.0))


def test_what_was_always_there_must_be_there():
    judge = gain(numbers=numbers())
    assert judge.judge(given(b=10.0)) is None
    assert judge.judge(given(a=math.nan, b=10.0)) is None
    assert judge.chances(given(a=1.0)) == judge.chances(given(a=1.0, b=10.0))


def test_labels_count_where_they_are_known():
    weights = Array.of(np.array([[1.0, 0.0, 0.0], [0.0, 5.0, 0.0]]))
    judge = gain(labels=(Labels("group", ("law", "maths"), weights),))
    assert judge.chances(Evidence(group="law"))[0] == pytest.approx(sigmoid(1.0))
    assert judge.chances(Evidence(group="maths"))[1] == pytest.approx(sigmoid(4.0))
    assert judge.chances(Evidence(group="art")) == judge.chances(Evidence()) == gain().chances(Evidence())
    classes = gain(labels=(Labels("class", ("0", "1"), weights),))
    assert classes.chances(Evidence(logits=np.array([0.0, 2.0])))[1] == pytest.approx(sigmoid(4.0))


def test_words_are_summed_over_the_length_of_their_rarities():
    buckets = np.array(sorted([bucket_of(b"cat"), bucket_of(b"dog")]))
    rarity = np.array([3.0 if one == bucket_of(b"cat") else 4.0 for one in buckets])
    weights = np.array([[1.0, 0, 0] if one == bucket_of(b"cat") else [0, 1.0, 0] for one in buckets])
    judge = gain(words=(Words.of_table("prompt", buckets, rarity, weights),))
    right, fixed, _ = judge.chances(Evidence(prompt="The CAT, the dog and the cat"))
    assert right == pytest.approx(sigmoid(3.0 / 5.0))
    assert fixed == pytest.approx(sigmoid(-1.0 + 4.0 / 5.0))
    assert judge.chances(Evidence(prompt="nothing known")) == judge.chances(Evidence()) == gain().chances(Evidence())


def test_calibration():
    assert Calibration(2.0, -1.0).of(0.5) == pytest.approx(0.5)
    steps = Calibration(1.0, 0.0, (-1.0, 1.0), (0.2, 0.8))
    assert [steps.of(logit) for logit in (-9.0, 0.0, 9.0)] == pytest.approx([0.2, 0.5, 0.8])
    assert 0 < Calibration().of(-1e9) < 1e-12


def as_json(judge: Judge) -> dict:
    return json.loads(msgspec.json.encode(judge))


FULL = as_json(
    gain(
        numbers=numbers(),
        labels=(Labels("group", ("law",), Array.of(np.zeros((1, 3)))),),
        words=(Words.of_table("prompt", np.array([3]), np.ones(1), np.ones((1, 3))),),
    )
)


def test_a_fitted_judge_comes_back_from_json():
    judge = msgspec.json.decode(json.dumps(FULL), type=Judge)
    assert as_json(judge) == FULL
    evidence = Evidence(prompt="x", group="law", given={"a": 1.0, "b": 2.0})
    assert judge.judge(evidence) == msgspec.json.decode(json.dumps(FULL), type=Judge).judge(evidence)


def changed(path: str, value: object) -> bytes:
    data = json.loads(json.dumps(FULL))
    *parents, last = path.split(".")
    place = data
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[int(last) if last.isdigit() else last] = value
    return json.dumps(data).encode()


NAN = base64.b64encode(np.full((2, 3), np.nan, "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("order", "chaos", "order"),
        ("lean.share", 1.5, "share"),
        ("bias", [0, 0], "bias"),
        ("numbers.names", ["a"], "required"),
        ("numbers.names", ["a", "a"], "each once"),
        ("numbers.names", [], "allowed are 1"),
        ("numbers.scale", [1, 0], "scale"),
        ("numbers.linear", {"shape": [2, 3], "data": "AAAA" * 5 + "AA=="}, "16 bytes"),
        ("numbers.linear", {"shape": [1, 3], "data": base64.b64encode(bytes(12)).decode()}, "[2, 3]"),
        ("numbers.linear", {"shape": [2, 3], "data": NAN}, "not finite"),
        ("numbers.linear", {"shape": [-2, -3], "data": base64.b64encode(bytes(24)).decode()}, "array"),
        ("numbers.linear", {"shape": [2, 3], "data": "?"}, "base64"),
        ("numbers.landmarks", {"shape": [1, 1], "data": "AAAAAA=="}, "landmarks"),
        ("numbers.smooth", {"shape": [0, 3], "data": ""}, "smooth"),
        ("labels.0.known", ["law", "art"], "[2, 3]"),
        ("labels.0.of", "mood", "mood"),
        ("words.0.buckets", "AwAD", "two bytes"),
        ("words.0.buckets", "//8=", "below 4096"),
        ("words.0.buckets", "AwADAA==", "rise"),
        ("words.0.rarity", {"shape": [1, 3], "data": base64.b64encode(bytes(12)).decode()}, "rarity"),
        ("calibration.0.slope", -1, "slope"),
        ("calibration.0.logits", [1.0], "one length"),
        ("calibration.1", {"slope": 1, "offset": 0, "logits": [1, 0], "shares": [0.1, 0.2]}, "rising"),
        ("calibration.1", {"slope": 1, "offset": 0, "logits": [0, 1], "shares": [0.1, 1.2]}, "shares"),
    ],
)
def test_a_damaged_judge_is_refused_with_its_key(path, value, says):
    with pytest.raises(msgspec.ValidationError, match=re.escape(says)):
        msgspec.json.decode(changed(path, value), type=Judge)
