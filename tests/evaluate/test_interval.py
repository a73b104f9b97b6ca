import numpy as np
import pytest

from edgewise.errors import UsageError
from edgewise.evaluate.interval import bootstrap


def test_the_interval_of_a_mean_is_the_one_theory_gives() -> None:
    sample = np.random.default_rng(0).normal(5, 2, 400)
    found = bootstrap(sample)
    half = 1.96 * sample.std() / np.sqrt(len(sample))
    assert found.value == pytest.approx(sample.mean())
    assert found.low == pytest.approx(sample.mean() - half, abs=0.03)
    assert found.high == pytest.approx(sample.mean() + half, abs=0.03)


def test_a_lower_level_is_a_narrower_interval_and_the_seed_repeats_it() -> None:
    sample = np.arange(50.0)
    wide, narrow = bootstrap(sample, level=0.95), bootstrap(sample, level=0.5)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert bootstrap(sample, seed=3) == bootstrap(sample, seed=3) != bootstrap(sample, seed=4)


def test_rows_are_drawn_together() -> None:
    pairs = np.stack([np.arange(30.0), np.arange(30.0) * 2], axis=1)
    ratio = bootstrap(pairs, lambda rows: float(rows[:, 1].sum() / rows[:, 0].sum()), resamples=50)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((2, 2, 2))


def test_equal_values_have_no_spread() -> None:
    found = bootstrap([3, 3, 3], lambda sample: float(np.median(sample)), resamples=20)
    assert (found.low, found.value, found.high) == (3, 3, 3)


@pytest.mark.parametrize("wrong", [{"values": []}, {"level": 0.0}, {"level": 1.0}, {"resamples": 0}])
def test_senseless_wishes_are_refused(wrong: dict) -> None:
    with pytest.raises(UsageError):
        bootstrap(**({"values": [1.0, 2.0]} | wrong))
