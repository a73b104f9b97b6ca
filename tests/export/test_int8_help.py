"""What helps int8 where it costs too much: the arithmetic, without any library of a target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edgewise.export.targets.mixed import fewest
from edgewise.export.targets.ranges import seen_of
from edgewise.export.targets.smooth import Channels, together


def _squares(costs: dict[str, float]) -> object:
    def off(kept: Sequence[str]) -> float:
        return float(np.sqrt(sum(cost**2 for name, cost in costs.items() if name not in kept)))

    return off


@pytest.mark.parametrize(
    ("most", "kept"), [(0.6, ["a"]), (0.45, ["a", "d"]), (0.25, ["a", "d", "c"]), (0.01, ["a", "d", "c"])]
)
def test_the_fewest_of_the_dearest_are_kept_and_half_at_most(most: float, kept: list[str]) -> None:
    costs = {"a": 0.9, "b": 0.1, "c": 0.3, "d": 0.4, "e": 0.1, "f": 0.1}
    assert fewest(list(costs), _squares(costs), most) == kept


def test_one_product_alone_is_never_kept() -> None:
    assert fewest(["a"], _squares({"a": 1.0}), 0.1) == []


def _rounded(value: np.ndarray, axis: int | None) -> np.ndarray:
    step = np.abs(value).max(axis=axis, keepdims=True) / 127
    return np.rint(value / step) * step


def test_factors_keep_the_product_and_make_it_round_well() -> None:
    draw = np.random.default_rng(3)
    x = draw.standard_normal((64, 48)).astype(np.float32)
    x[:, [5, 30]] *= 60
    matrix = draw.standard_normal((48, 16)).astype(np.float32)
    matrix[[5, 30]] /= 60
    seen = Channels(64)
    for row in x:
        seen.add(row[None])
    by = seen.factors([matrix])
    assert by is not None
    exact = x @ matrix
    np.testing.assert_allclose((x * by) @ (matrix / by[:, None]), exact, rtol=1e-4, atol=1e-4)
    before, after = (
        np.linalg.norm(_rounded(one, None) @ _rounded(other, 0) - exact) / np.linalg.norm(exact)
        for one, other in ((x, matrix), (x * by, matrix / by[:, None]))
    )
    assert before > 0.1
    assert after < before / 5


def test_products_go_together_that_share_an_input_or_a_matrix() -> None:
    shared = {"q": ("x", "Q"), "k": ("x", "K"), "up": ("h", "U"), "again": ("y", "Q"), "other": ("z", "O")}
    found = together(list(shared), shared.__getitem__)
    assert sorted(map(sorted, found)) == [["again", "k", "q"], ["other"], ["up"]]


def test_channels_that_are_alike_are_left_alone() -> None:
    draw = np.random.default_rng(3)
    seen = Channels(8)
    for _ in range(8):
        seen.add(draw.standard_normal((20, 48)).astype(np.float32))
    assert seen.factors([draw.standard_normal((48, 16)).astype(np.float32)]) is None


def test_a_channel_that_was_silent_is_not_made_loud() -> None:
    """On other rows it may speak, and would then need a range of its own."""
    draw = np.random.default_rng(3)
    seen = Channels(16)
    for _ in range(16):
        value = draw.standard_normal((20, 64)).astype(np.float32)
        value[:, 2], value[:, 7], value[:, 3] = 0, value[:, 7] * 1e-4, value[:, 3] * 100
        seen.add(value)
    matrix = draw.standard_normal((64, 16)).astype(np.float32)
    matrix[3] /= 100
    matrix[5] = 0
    by = seen.factors([matrix])
    assert by is not None
    assert np.isfinite(by).all()
    others = np.delete(by, [2, 3, 5, 7])
    assert by[2] < 2 * others.max()
    assert by[7] < 10 * others.max()


def test_rows_are_sampled_at_places_of_their_own() -> None:
    value = np.arange(100_000, dtype=np.float32)
    first, second = (set(seen_of(value, 64, row).sample.tolist()) for row in (0, 1))
    assert len(first & second) < 8
