"""Figures of outputs that differ in known ways, and what the gate makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.errors import UsageError
from edgewise.export.proof import gate
from edgewise.export.proof.gate import Gate
from edgewise.export.proof.parity import Drop, Numbers, compared, numbers_of
from edgewise.export.work.job import Check, Coverage, Proved

RANDOM = np.random.default_rng(8)
LOGITS = RANDOM.standard_normal((300, 10)).astype(np.float32)
LABELS = LOGITS.argmax(1)


def test_equal_outputs_are_equal_in_every_figure() -> None:
    found = compared([LOGITS], [LOGITS], "classify", LABELS)
    assert found.outputs == (Numbers(0.0, 0.0, 1.0, None),)
    assert found.choices is not None
    assert (found.choices.top1_agreement, found.choices.kl_mean, found.choices.kl_p99) == (1.0, 0.0, 0.0)
    assert found.drop == Drop(0.0, 0.0, 0.0, "top-1 accuracy", 300, 1.0, 1.0)


def test_noise_of_a_known_size_has_its_signal_to_noise_ratio() -> None:
    noise = RANDOM.standard_normal(LOGITS.shape) * 0.01
    found = numbers_of(LOGITS + noise, LOGITS)
    relative = np.linalg.norm(noise) / np.linalg.norm(LOGITS)
    assert found.rel_l2 == pytest.approx(relative, rel=1e-4)
    assert found.snr_db == pytest.approx(-20 * np.log10(relative), abs=0.01)
    assert found.max_abs == pytest.approx(np.abs(noise).max(), rel=1e-3)


def test_the_drop_is_what_the_labels_lose_and_its_interval_holds_it() -> None:
    worse = LOGITS.copy()
    worse[:30] = np.roll(worse[:30], 1, axis=1)  # every first choice moves
    found = compared([worse], [LOGITS], "classify", LABELS).drop
    assert found is not None
    assert found.point == pytest.approx(0.1)
    assert found.low < 0.1 < found.high
    assert found.metric == "top-1 accuracy"


def test_without_labels_the_drop_is_disagreement() -> None:
    worse = LOGITS.copy()
    worse[:30] = np.roll(worse[:30], 1, axis=1)
    found = compared([worse], [LOGITS], "classify", None).drop
    assert found is not None
    assert (found.metric, found.point) == ("top-1 disagreement", pytest.approx(0.1))


def test_a_right_answer_that_becomes_wrong_is_not_made_up_by_one_that_becomes_right() -> None:
    """The accuracy is the same, and so is the drop: but the interval is wider than nothing."""
    labels = LABELS.copy()
    labels[:50] = (labels[:50] + 1) % 10  # the source is wrong about these
    worse = np.full_like(LOGITS, -1)
    said = LABELS.copy()
    said[:20] = labels[:20]
    said[60:80] = (said[60:80] + 1) % 10
    worse[np.arange(300), said] = 1
    found = compared([worse], [LOGITS], "classify", labels).drop
    assert found is not None
    assert found.point == 0.0
    assert found.low < -0.01
    assert found.high > 0.01


def test_probabilities_are_compared_as_such() -> None:
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    q = np.exp(LOGITS * 0.9) / np.exp(LOGITS * 0.9).sum(1, keepdims=True)
    found = compared([q], [p], "classify", None).choices
    expected = (p * (np.log(p) - np.log(q))).sum(1).mean()
    assert found is not None
    assert found.kl_mean == pytest.approx(expected, rel=1e-4)


def test_embeddings_are_judged_by_their_neighbours() -> None:
    labels = np.repeat(np.arange(75), 4)
    centres = RANDOM.standard_normal((75, 16))
    rows = centres[labels] + RANDOM.standard_normal((300, 16)) * 0.1
    same = compared([rows * 3], [rows], "embed", labels)  # a length says nothing
    assert same.choices is not None
    assert same.choices.top1_agreement == 1.0
    assert same.choices.kl_mean is None
    lost = compared([RANDOM.standard_normal(rows.shape)], [rows], "embed", labels).drop
    assert lost is not None
    assert lost.metric == "nearest-neighbour accuracy"
    assert lost.point > 0.9


def test_a_gate_decides_on_enough_real_inputs_or_not_at_all() -> None:
    gate.check_rows(Gate(), 3, random=True)
    gate.check_rows(Gate(0.01), 200, random=False)
    with pytest.raises(UsageError, match=r"200 inputs or more, and there are 199"):
        gate.check_rows(Gate(0.01), 199, random=False)
    with pytest.raises(UsageError, match="real inputs"):
        gate.check_rows(Gate(0.01), 5000, random=True)


def test_the_point_is_gated_and_strictly_the_pessimistic_end() -> None:
    drop = Drop(0.004, -0.002, 0.012, "top-1 accuracy", 500)
    assert gate.drop_check(drop, Gate()) is None
    verdicts = [gate.drop_check(drop, Gate(0.01, strict=strict)) for strict in (False, True)]
    assert [one.ok for one in verdicts if one] == [True, False]
    assert all(one and "[-0.20%, 1.20%]" in one.detail for one in verdicts)


def test_infinity_is_seen_unless_the_source_has_it_too() -> None:
    bad = LOGITS.copy()
    bad[7, 3] = np.inf
    assert not gate.finite_check([bad], [LOGITS]).ok
    assert "1 of 300 rows" in gate.finite_check([bad], [LOGITS]).detail
    assert gate.finite_check([bad], [bad]).ok


def test_skipped_quantization_is_named() -> None:
    proved = Proved("executed", True, "x", Coverage(1, 1, "x"), {"float32": 400}, skipped=("a", "b"))
    found = gate.precision_check(proved, "int8")
    assert not found.ok
    assert "2 are not int8: a, b" in found.detail


def test_whole_numbers_are_not_float32() -> None:
    small, some = (
        Proved("executed", True, "x", Coverage(1, 1, "x"), weights)
        for weights in ({"int8": 400, "float32": 40}, {"int8": 40, "float32": 400})
    )
    assert "fp32 was asked for" in gate.precision_check(small, "fp32").detail
    assert [gate.precision_check(one, "fp32").ok for one in (small, some)] == [False, True]
    assert gate.precision_check(small, "int8").ok
    assert gate.precision_check(small, "fp32", kept=True).ok


def test_what_two_looked_at_is_told_once() -> None:
    seen = [Check("finite", True, "a"), Check("loads", True, "b"), Check("finite", True, "c")]
    assert gate.told_once(seen) == (seen[1], seen[2])
    bad = Check("finite", False, "begins at mul")
    assert gate.told_once([bad, *seen]) == (bad, seen[1])
