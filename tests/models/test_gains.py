"""Gains of a boundary: by the norms behind it, the nearest most, the same bits everywhere."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest

from edgewise.models.gains import LEAST, Gains


def model(layers: int = 3, hidden: int = 64) -> tuple[SimpleNamespace, dict[str, np.ndarray]]:
    n = np.arange(hidden)
    norms = {
        f"layer{layer}.{name}": ((n * (7 + layer) + 3 * len(name)) % 31 + 1).astype(np.float32) / np.float32(8)
        for layer in range(layers)
        for name in ("attention_norm", "ffn_norm")
    }
    return SimpleNamespace(layers=layers, hidden=hidden), norms | {"norm": np.ones(hidden, np.float32)}


def test_they_are_shares_of_the_largest() -> None:
    gains = Gains(*model())
    for cut in range(4):
        at = gains.at(cut)
        assert at.dtype == np.float32
        assert at.shape == (64,)
        assert at.max() == 1
        assert at.min() >= LEAST


def test_behind_the_last_layer_only_the_last_norm_counts() -> None:
    card, norms = model()
    norms["norm"] = np.linspace(1, 16, 64, dtype=np.float32)
    assert Gains(card, norms).at(3) == pytest.approx((norms["norm"] / 16) ** 0.875, rel=1e-6)


def test_signs_and_the_size_of_a_norm_make_no_difference() -> None:
    card, norms = model()
    plain = Gains(card, norms).at(1)
    norms["layer1.attention_norm"] = norms["layer1.attention_norm"] * np.float32(-4)
    assert (Gains(card, norms).at(1) == plain).all()


def test_layers_before_the_cut_make_no_difference_and_the_next_makes_most() -> None:
    card, norms = model()
    plain = Gains(card, norms)
    other = Gains(card, norms | {"layer1.ffn_norm": np.linspace(8, 0, 64, dtype=np.float32)})
    changed = [float(np.abs(other.at(cut) - plain.at(cut)).max()) for cut in range(4)]
    assert changed[2:] == [0, 0]
    assert changed[1] > changed[0] > 0


def test_a_model_without_norms_before_its_layers_has_gains_of_its_last() -> None:
    card, norms = model()
    last = {"norm": norms["norm"]}
    assert (Gains(card, last).at(0) == 1).all()


def test_a_channel_that_no_norm_reads_keeps_a_gain() -> None:
    card, norms = model()
    for norm in norms.values():
        norm[5] = 0
    assert Gains(card, norms).at(0)[5] == np.float32(LEAST)


def test_golden_bits() -> None:
    gains = Gains(*model())
    bits = b"".join(gains.at(cut).tobytes() for cut in range(4))
    assert hashlib.sha256(bits).hexdigest()[:16] == "2009c13d469d23ef"
