import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.errors import UsageError
from edgewise.evaluate.deferral import auroc, deferral_curve, ece, ece_floor

EDGE = np.array([0, 0, 1, 1.0])
CLOUD = np.array([1, 0, 1, 1.0])


def test_a_curve_by_hand():
    curve = deferral_curve([4, 3, 2, 1], EDGE, CLOUD)
    assert curve.escalated.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert curve.accuracy.tolist() == [0.5, 0.75, 0.75, 0.75, 0.75]
    assert curve.apgr == pytest.approx(0.875)
    assert curve.cpt(0.5) == pytest.approx(0.125)
    assert curve.cpt(1.0) == pytest.approx(0.25)
    assert curve.at(0.125) == pytest.approx(0.625)


def test_the_worst_order_and_no_order():
    assert deferral_curve([1, 2, 3, 4], EDGE, CLOUD).apgr == pytest.approx(0.125)
    tied = deferral_curve([1, 1, 1, 1], EDGE, CLOUD)
    assert tied.apgr == pytest.approx(0.5)
    assert tied.cpt(0.8) == pytest.approx(0.8)


def test_tiers_that_do_not_differ_have_no_gap():
    curve = deferral_curve([1, 2], [1, 0], [0, 1])
    assert curve.apgr is None
    assert curve.cpt(0.5) is None
    assert deferral_curve([1, 2], [1, 1], [0, 1]).cpt(0.5) is None  # the cloud is worse


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_the_area_is_what_adding_up_gives(rows):
    score, edge, cloud = (np.array(column, float) for column in zip(*rows, strict=True))
    curve = deferral_curve(score, edge, cloud)
    assert curve.accuracy[0] == pytest.approx(edge.mean())
    assert curve.accuracy[-1] == pytest.approx(cloud.mean())
    for value in set(score):
        sent = score >= value
        assert curve.at(sent.mean()) == pytest.approx(np.where(sent, cloud, edge).mean())


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auroc_counts_pairs(rows):
    score, label = (np.array(column) for column in zip(*rows, strict=True))
    pairs = [(a > b) + (a == b) / 2 for a in score[label] for b in score[~label]]
    found = auroc(score, label)
    assert found == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_ece_by_hand():
    assert ece([0.9, 0.9, 0.1, 0.1], [1, 0, 0, 0]) == pytest.approx((0.8 + 0.2) / 4)
    assert ece([1.0, 0.0], [1, 0]) == 0
    assert ece([0.5] * 4, [1, 0, 1, 0]) == 0


def test_the_floor_is_the_error_of_true_probabilities():
    random = np.random.default_rng(0)
    probability = random.random(500)
    drawn = [ece(probability, random.random(500) < probability) for _ in range(300)]
    assert ece_floor(probability) == pytest.approx(np.mean(drawn), abs=0.003)
    assert ece_floor(np.repeat(probability, 20)) < ece_floor(probability) / 3


@pytest.mark.parametrize("arrays", [([], [], []), ([1, 2], [1], [1, 0]), ([[1]], [[1]], [[1]]), ([np.nan], [1], [0])])
def test_other_shapes_are_refused(arrays):
    with pytest.raises(UsageError, match=r"allowed is one shape|NaN"):
        deferral_curve(*arrays)
