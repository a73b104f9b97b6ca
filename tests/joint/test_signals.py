import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgewise.joint.signals import LOGITS_SIGNALS, TEXT_SIGNALS, of_logits, of_text
from edgewise.types import Token


def tokens(*logprobs: float | None) -> list[Token]:
    return [Token(i, b"x", p) for i, p in enumerate(logprobs)]


def test_logprobs_are_summed_up_as_numpy_would():
    values = [-0.1, -2.0, -0.7, -0.3, -5.0, -0.01]
    read = of_text(tokens(*values), "fine", "stop")
    assert read["mean_logprob"] == pytest.approx(np.mean(values))
    assert read["min_logprob"] == -5.0
    assert read["q10_logprob"] == pytest.approx(np.quantile(values, 0.1))
    assert (read["tokens"], read["truncated"], read["parse_ok"]) == (6, 0, 1)
    assert set(read) == set(TEXT_SIGNALS)


@pytest.mark.parametrize("logprobs", [(), (None,), (-0.1, None), (-0.1, math.nan), (0.5,)])
def test_a_logprob_that_is_missing_or_impossible_is_no_evidence(logprobs):
    read = of_text(tokens(*logprobs), "fine", "stop")
    assert (read["mean_logprob"], read["min_logprob"], read["q10_logprob"]) == (None, None, None)


def test_an_impossible_token_makes_the_least_confidence_not_nan():
    read = of_text(tokens(-0.1, -math.inf), "fine", "stop")
    assert (read["mean_logprob"], read["min_logprob"], read["q10_logprob"]) == (-math.inf,) * 3


def test_the_beginning_of_an_answer_has_no_end_to_judge():
    read = of_text(tokens(-0.1), "", None)
    assert read["truncated"] is None
    assert read["parse_ok"] is None


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
    assert of_text(tokens(-0.1), text, "length")["parse_ok"] == ok


def test_logits_of_the_least_confident_row():
    shares = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.5, 0.3, 0.2]])
    read = of_logits(np.log(shares) + 3)
    assert read["max_softmax"] == pytest.approx(0.4)
    assert read["margin"] == pytest.approx(0.05)
    assert read["entropy"] == pytest.approx(-(shares[1] * np.log(shares[1])).sum())


@pytest.mark.parametrize(
    "logits", [3.0, [], [[]], [[1.0]], [[1.0, math.nan]], [[1.0, math.inf]], [[-math.inf, -math.inf]], np.zeros((0, 4))]
)
def test_logits_that_say_nothing(logits):
    assert of_logits(logits) == dict.fromkeys(LOGITS_SIGNALS)


def test_a_class_that_cannot_be():
    assert of_logits([[0.0, -math.inf, 0.0]]) == pytest.approx(
        {"max_softmax": 0.5, "margin": 0.0, "entropy": math.log(2)}
    )


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, min_side=2, max_side=5)))
def test_logits_signals_stay_in_their_ranges(logits):
    read = of_logits(logits)
    if np.isfinite(logits).all():
        assert 0 < read["max_softmax"] <= 1
        assert 0 <= read["margin"] <= read["max_softmax"]
        assert 0 <= read["entropy"] <= math.log(logits.shape[-1]) + 1e-9


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=40))
def test_text_signals_are_ordered(logprobs):
    read = of_text(tokens(*logprobs), "fine", "stop")
    assert read["min_logprob"] <= read["q10_logprob"] <= max(logprobs)
    assert read["min_logprob"] - 1e-9 <= read["mean_logprob"] <= 0
