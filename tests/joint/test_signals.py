import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgewise.joint.signals.answer import ENDED_SIGNALS, LOGPROB_SIGNALS, TOP_SIGNALS, of_alternatives, of_logprobs
from edgewise.joint.signals.evidence import NAMES, Evidence
from edgewise.joint.signals.logits import LOGITS_SIGNALS, agreement, class_logprobs, of_logits, top_class
from edgewise.joint.signals.sums import of_sums
from edgewise.joint.signals.text import BUCKETS, LOOK, Reading, bucket_of
from edgewise.types import Candidate, Token


def test_logprobs_are_summed_up_as_numpy_would():
    values = [-0.1, -2.0, -0.7, -0.3, -5.0, -0.01]
    read = of_logprobs(values)
    assert read["sum_logprob"] == pytest.approx(np.sum(values))
    assert read["mean_logprob"] == pytest.approx(np.mean(values))
    assert read["min_logprob"] == read["low_decile_logprob"] == -5.0
    for name, share in (("q10_logprob", 0.1), ("q25_logprob", 0.25), ("median_logprob", 0.5)):
        assert read[name] == pytest.approx(np.quantile(values, share))
    assert set(read) == set(LOGPROB_SIGNALS)
    assert of_logprobs([-1.0] * 15 + [-4.0, -6.0] * 2)["low_decile_logprob"] == -6.0


@pytest.mark.parametrize("logprobs", [(), (None,), (-0.1, None), (-0.1, math.nan), (0.5,)])
def test_a_logprob_that_is_missing_or_impossible_is_no_evidence(logprobs):
    assert of_logprobs(logprobs) == dict.fromkeys(LOGPROB_SIGNALS)


def test_an_impossible_token_makes_the_least_confidence_not_nan():
    read = of_logprobs([-0.1, -math.inf])
    assert (read["mean_logprob"], read["min_logprob"], read["q10_logprob"]) == (-math.inf,) * 3


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=40))
def test_logprob_signals_are_ordered(logprobs):
    read = of_logprobs(logprobs)
    assert read["min_logprob"] <= read["q10_logprob"] <= read["q25_logprob"] <= read["median_logprob"] <= max(logprobs)
    assert read["min_logprob"] - 1e-9 <= read["low_decile_logprob"] <= read["mean_logprob"] + 1e-9


def token(*shares: float) -> Token:
    return Token(0, b"x", math.log(shares[0]), tuple(Candidate(i, b"x", math.log(p)) for i, p in enumerate(shares)))


def test_alternatives():
    read = of_alternatives([token(0.5, 0.25), token(0.2, 0.8)])
    assert read["mean_margin"] == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert read["min_margin"] == pytest.approx(math.log(2))
    entropies = [0.5 * math.log(2) + 2 * 0.25 * math.log(4), -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))]
    assert read["mean_entropy"] == pytest.approx(np.mean(entropies))
    assert read["max_entropy"] == pytest.approx(max(entropies))
    assert of_alternatives([token(0.5, 0.25), Token(0, b"x", -0.1)]) == dict.fromkeys(TOP_SIGNALS)
    assert of_alternatives([]) == dict.fromkeys(TOP_SIGNALS)


def sums_of(prompt: str, answer: str):
    return of_sums(Reading(prompt), Reading(answer))


def ended(text: str, finish_reason: str | None = "stop", prompt: str = "") -> Evidence:
    return Evidence(prompt, text=text, finish_reason=finish_reason)


def test_the_beginning_of_an_answer_has_no_end_to_judge():
    beginning = Evidence("Why?", text="Because", logprobs=[-0.1])
    for name in (*ENDED_SIGNALS, "answer_chars", "sums", "last_known"):
        assert beginning.get(name) is None, name
    assert beginning.get("mean_logprob") == -0.1
    assert beginning.get("tokens") == 1.0
    assert beginning.get("prompt_chars") == pytest.approx(math.log1p(4))


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("The capital is Paris.", 1),
        ("42", 1),
        ("  \n", 0),
        ("", 0),
        ("a cut char\ufffd", 0),
        ("It is good. " + "and so on and so on " * 6, 0),
        ("ha" * 40 + " ", 0),
        ("no " * 5, 1),  # too short for a loop
        ("A table:\n" + "\n".join(f"{n}. line {n * n}" for n in range(30)), 1),
        ("x" * 99 + "y", 1),
        ("thinking " + "x" * 100, 0),
    ],
)
def test_parse_ok(text, ok):
    assert ended(text, "length").get("parse_ok") == ok


def test_refusals_doubts_repetition_and_limits():
    assert ended("I’m sorry, but I can't help with that.").get("refusal") == 1
    assert ended("As an AI language model, I have no opinion.").get("refusal") == 1
    assert ended("Paris. " * 40 + "I cannot say more.").get("refusal") == 0  # an excuse comes first
    assert ended("It is 4. However, wait: it might be 5.").get("answer_doubts") == pytest.approx(math.log1p(3))
    assert ended("a b c d a b c d a b c d").get("repetition") == pytest.approx(1 - 4 / 9)
    assert ended("all words are new here").get("repetition") == 0
    assert (ended("x", "length").get("truncated"), ended("x").get("truncated")) == (1, 0)


@pytest.mark.parametrize(
    ("text", "sums", "wrong"),
    [
        ("so 16 - 3 = 13 eggs, then 13 - 4 = 9", 2, 0),
        ("16 - 3 = 12", 1, 1),
        ("9 * $2 = $<<9*2=18>>18", 1, 0),
        ("3 + 4 * 2 = 11 and 20 / 4 - 1 = 4", 2, 0),
        ("1,000 + 500 = 1,500", 1, 0),
        ("10 x 3 = 30, 10 × 3 = 31, 6 \\times 7 = 42", 3, 1),
        ("20% * 50 = 10", 1, 0),
        ("10 / 3 = 3.33", 1, 0),
        ("5 / 0 = 7", 1, 0),  # nothing can be said of it
        ("x + 3 = 7 and f(2) + 1 = 9 and (2 + 3) * 4 = 20", 0, 0),
        ("3 + 4 = 3 + 4 = 7", 1, 0),
        ("2^3 + 1 = 9", 0, 0),
        ("no numbers", 0, 0),
    ],
)
def test_sums(text, sums, wrong):
    read = sums_of("", text)
    assert read["sums"] == pytest.approx(math.log1p(sums))
    assert read["sums_wrong"] == pytest.approx(math.log1p(wrong))


def test_numbers_of_question_and_answer():
    read = sums_of("I have 3 boxes of 12 and 5 more.", "3 * 12 = 36, and half is 18.5")
    assert (read["last_fraction"], read["last_known"]) == (1, 0)
    assert read["unused_numbers"] == pytest.approx(1 / 3)
    assert sums_of("", "none")["last_fraction"] is None
    assert sums_of("none", "5")["unused_numbers"] is None
    assert sums_of("take 5", "so 5")["last_known"] == 1


def test_looks():
    look = Reading("Ann has 3 cats, 2.5 dogs. How many are not left? $4 = 50%\n_").look
    assert tuple(look) == LOOK
    counts = {name: round(math.expm1(look[name])) for name in ("lines", "fractions", "money", "percents", "commas")}
    assert counts == {"lines": 1, "fractions": 1, "money": 1, "percents": 1, "commas": 1}
    more = {name: round(math.expm1(look[name])) for name in ("questions", "blanks", "formulas", "logic", "rates")}
    assert more == {"questions": 1, "blanks": 1, "formulas": 1, "logic": 2, "rates": 1}
    assert look["chars"] == pytest.approx(math.log1p(59))
    assert Reading("ABC abc 123").look["digits"] == pytest.approx(3 / 11)
    assert Reading("ABC abc 123").look["capitals"] == pytest.approx(3 / 11)


@given(st.text(max_size=300))
def test_any_text_has_a_finite_look_and_buckets(text):
    reading = Reading(text)
    assert all(math.isfinite(value) for value in reading.look.values())
    assert all(0 <= bucket < BUCKETS for bucket in reading.buckets)
    evidence = Evidence(text, text=text, finish_reason="stop")
    for name in NAMES:
        value = evidence.get(name)
        assert value is None or math.isfinite(value)


def test_buckets_are_the_same_everywhere():
    assert bucket_of(b"cat") == 936
    assert Reading("Cat cat CAT").buckets == [936]


@pytest.mark.parametrize(
    "text", ["1 + " * 400_000, "9" * 1_000_000, "a b c d " * 200_000, "(" * 500_000, "$1 x " * 300_000]
)
@pytest.mark.timeout(60)
def test_no_text_is_slow_to_read(text):
    """A regular expression that goes back and forth would take minutes for these."""
    evidence = Evidence(text, text=text, finish_reason="stop")
    assert {name for name in NAMES if evidence.get(name) is None} >= {"mean_logprob"}


def test_logits_of_the_least_confident_row():
    shares = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.5, 0.3, 0.2]])
    read = of_logits(np.log(shares) + 3)
    assert read["max_softmax"] == pytest.approx(0.4)
    assert read["margin"] == pytest.approx(0.05)
    assert read["entropy"] == pytest.approx(-(shares[1] * np.log(shares[1])).sum())
    assert read["energy"] == pytest.approx(3.0)
    assert (read["second_softmax"], read["third_softmax"]) == pytest.approx((0.35, 0.25))


@pytest.mark.parametrize(
    "logits", [3.0, [], [[]], [[1.0]], [[1.0, math.nan]], [[1.0, math.inf]], [[-math.inf, -math.inf]], np.zeros((0, 4))]
)
def test_logits_that_say_nothing(logits):
    assert of_logits(logits) == dict.fromkeys(LOGITS_SIGNALS)
    assert not class_logprobs(logits)


def test_a_class_that_cannot_be():
    read = of_logits([[0.0, -math.inf, 0.0]])
    assert (read["max_softmax"], read["margin"], read["entropy"]) == pytest.approx((0.5, 0.0, math.log(2)))
    assert class_logprobs([0.0, -math.inf]) == pytest.approx({"class_0": 0.0, "class_1": -20.0})
    assert of_logits([1.0, 2.0])["third_softmax"] is None


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, min_side=2, max_side=5)))
def test_logits_signals_stay_in_their_ranges(logits):
    read = of_logits(logits)
    if np.isfinite(logits).all():
        assert 0 < read["max_softmax"] <= 1
        assert 0 <= read["margin"] <= read["max_softmax"]
        assert 0 <= read["entropy"] <= math.log(logits.shape[-1]) + 1e-9


def test_classes():
    assert class_logprobs(np.log([[0.25, 0.75]])) == pytest.approx(
        {"class_0": math.log(0.25), "class_1": math.log(0.75)}
    )
    assert not class_logprobs(np.zeros((2, 4)))  # a batch
    assert not class_logprobs(np.zeros(33))
    assert top_class([1.0, 3.0, 2.0]) == "1"
    assert top_class(np.zeros((2, 4))) is None
    assert Evidence(logits=np.array([1.0, 3.0])).label("class") == "1"
    assert agreement([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]) == pytest.approx(2 / 3)
    assert agreement([[1.0, 0.0]]) is None


def test_signals_that_are_given_stand_for_ours():
    evidence = Evidence("x", logprobs=[-1.0], given={"mean_logprob": -0.5, "agreement": 0.8, "min_logprob": None})
    assert evidence.get("mean_logprob") == -0.5
    assert evidence.get("agreement") == 0.8
    assert evidence.get("min_logprob") is None
    assert evidence.get("nobody knows this") is None
