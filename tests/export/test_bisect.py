"""The layer that went wrong is named, wherever it is, whatever the converter did to names, axes and neighbours."""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgewise.export.proof.bisect import Found, where

Floats = npt.NDArray[np.float64]
Layers = list[tuple[str, Floats]]

ROWS = 4


def chain(length: int, seed: int = 0) -> Layers:
    """Unlike tensors of one size, in a row."""
    chance = np.random.default_rng(seed)
    return [(f"layer{n}", chance.normal(size=(ROWS, 6, 5, 8))) for n in range(length)]


def off(value: Floats, error: float, seed: int) -> Floats:
    """At that relative distance."""
    noise = np.random.default_rng(seed).normal(size=value.shape)
    return value + error * noise * np.linalg.norm(value) / np.linalg.norm(noise)


def copy_of(layers: Layers, errors: list[float], last: bool = False) -> Layers:
    """As an artifact has it: other names, channels last, flattened now and then."""
    turned = [
        (off(value, error, 1000 + n), n) for n, ((_, value), error) in enumerate(zip(layers, errors, strict=True))
    ]
    forms = (lambda v: v, lambda v: v.transpose(0, 2, 3, 1), lambda v: v.reshape(ROWS, -1))
    return [(f"tensor_{7 * n}", forms[n % 3](value)) for value, n in turned]


@given(st.integers(2, 40), st.data(), st.integers(0, 3))
def test_a_jump_is_found_wherever_it_is(length: int, data: st.DataObject, seed: int) -> None:
    at = data.draw(st.integers(0, length - 1))
    good = data.draw(st.sampled_from([0.0, 1e-7, 1e-3, 0.02]))
    layers = chain(length, seed)
    errors = [good * 1.02**n if n < at else 0.3 for n in range(length)]
    found = where(layers, copy_of(layers, errors), noise=max(1e-5, good))
    assert found is not None
    assert not found.even
    assert found.layer == f"layer{at}"
    assert found.error == pytest.approx(0.3, rel=0.05)
    assert (found.before is None) == (at == 0)
    if at:
        assert found.before[0] == f"layer{at - 1}"
    assert (found.after is None) == (at == length - 1)


def test_a_jump_takes_few_looks() -> None:
    layers = chain(128)
    for at in (1, 40, 64, 100, 127):
        found = where(layers, copy_of(layers, [1e-7 if n < at else 0.1 for n in range(128)]))
        assert found is not None
        assert found.layer == f"layer{at}"
        assert found.looked_at <= 7 + 2 * 6 + 3  # the halves, and the neighbours on either side


@given(st.integers(8, 60), st.floats(3, 40), st.integers(0, 3))
def test_even_growth_is_called_that(length: int, growth: float, seed: int) -> None:
    layers = chain(length, seed)
    errors = [0.01 * growth ** (n / (length - 1)) for n in range(length)]
    found = where(layers, copy_of(layers, errors), noise=0.01)
    if found is not None and growth ** (1 / (length - 1)) < 1.9:
        assert found.even, found
        assert "no single layer" in found.words()


@pytest.mark.parametrize("at", [5, 20, 35])
def test_a_jump_stands_out_of_slow_growth(at: int) -> None:
    """The growth of rounding is more in all than the jump is."""
    layers = chain(40)
    errors = [0.005 * 10 ** (n / 39) * (4 if n >= at else 1) for n in range(40)]
    found = where(layers, copy_of(layers, errors), noise=0.005)
    assert found is not None
    assert (found.layer, found.even) == (f"layer{at}", False)


@given(st.integers(6, 16), st.data())
@example(length=12, data=None)
def test_layers_that_were_fused_are_passed_over(length: int, data: st.DataObject | None) -> None:
    """Of every block of three layers an artifact has the last one alone."""
    layers = chain(3 * length)
    at = 3 * (data.draw(st.integers(1, length - 1)) if data else 7) + 2
    errors = [1e-6 if n < at else 0.2 for n in range(3 * length)]
    there = [one for n, one in enumerate(copy_of(layers, errors)) if n % 3 == 2]
    found = where(layers, there)
    assert found is not None
    assert found.layer == f"layer{at}"
    assert found.between == (f"layer{at - 2}", f"layer{at - 1}")
    assert found.before is not None
    assert found.before[0] == f"layer{at - 3}"


def test_nothing_wrong_nothing_said() -> None:
    layers = chain(5)
    assert where(layers, copy_of(layers, [1e-6] * 5)) is None
    assert where(layers, copy_of(layers, [0.01] * 5), noise=0.02) is None
    assert where(layers, []) is None
    assert where([], layers) is None
    assert where(layers, [("other", np.zeros((ROWS, 3)))]) is None


def test_numbers_that_are_not_finite_are_the_fault() -> None:
    layers = chain(20)
    artifact = copy_of(layers, [1e-3] * 20)
    artifact[13:] = [(name, np.full_like(value, np.nan)) for name, value in artifact[13:]]
    artifact[12][1].flat[3] = np.inf
    found = where(layers, artifact, noise=1e-3)
    assert found is not None
    assert found.layer == "layer12"
    assert math.isinf(found.error)
    assert "not finite" in found.words()
    facts = json.loads(json.dumps(found.facts(), allow_nan=False))
    assert facts["error"] is None
    assert facts["before"] == {"layer": "layer11", "error": pytest.approx(1e-3, rel=0.01)}


def test_a_mask_of_infinities_is_equal_to_itself() -> None:
    layers = chain(6)
    mask = np.where(np.arange(240).reshape(1, 6, 5, 8) % 3, 0.0, -np.inf).repeat(ROWS, 0)
    layers.insert(2, ("mask", mask))
    artifact = copy_of([one for one in layers if one[0] != "mask"], [0, 0, 0, 0.5, 0.5, 0.5])
    found = where(layers, [*artifact[:2], ("m", mask), *artifact[2:]])
    assert found is not None
    assert found.layer == "layer3"
    assert math.isfinite(found.error)


def test_only_the_order_of_axes_is_forgiven() -> None:
    image = np.random.default_rng(0).normal(size=(ROWS, 3, 8, 8))
    assert where([("image", image)], [("x", image.transpose(0, 2, 3, 1))]) is None
    assert where([("image", image)], [("x", image[:, ::-1])]) is not None


# Real networks


class Net:
    """Blocks of convolution, scale and shift, ReLU, a shortcut around every second one; then the mean, and logits."""

    def __init__(self, blocks: int, channels: int = 8) -> None:
        chance = np.random.default_rng(1)
        self.filters = [
            chance.normal(size=(channels, channels, 3, 3)) / math.sqrt(9 * channels / 2) for _ in range(blocks)
        ]
        self.scales = [chance.uniform(0.6, 1.4, channels) for _ in range(blocks)]
        self.shifts = [chance.normal(size=channels) * 0.1 for _ in range(blocks)]
        self.head = chance.normal(size=(channels, 10))

    def layers(self, image: Floats) -> Layers:
        """As the source computes: every step by itself."""
        found = [("image", image)]
        x = image
        for n, (filters, scale, shift) in enumerate(zip(self.filters, self.scales, self.shifts, strict=True)):
            found.append((f"{n}.conv", conv(x, filters)))
            found.append((f"{n}.norm", found[-1][1] * scale[:, None, None] + shift[:, None, None]))
            found.append((f"{n}.relu", np.maximum(found[-1][1], 0)))
            if n % 2:
                found.append((f"{n}.add", (found[-1][1] + x) / 1.5))
            x = found[-1][1]
        found.append(("mean", x.mean((2, 3))))
        found.append(("logits", found[-1][1] @ self.head))
        return found

    def fused(self, image: Floats, bits: int = 0, dtype: type[np.floating] = np.float64) -> Layers:
        """As a converter leaves it: channels last, a block in one step, its filters scaled, all rounded."""
        x = image.transpose(0, 2, 3, 1)
        found = [("in", x)]

        def rounded(value: Floats) -> Floats:
            value = value.astype(dtype).astype(np.float64)
            step = np.abs(value).max() / 2 ** (bits - 1) if bits else 0.0
            return np.round(value / step) * step if bits else value

        for n, (filters, scale, shift) in enumerate(zip(self.filters, self.scales, self.shifts, strict=True)):
            folded = rounded(filters * scale[:, None, None, None])
            y = rounded(np.maximum(conv(x.transpose(0, 3, 1, 2), folded) + shift[:, None, None], 0))
            found.append((f"op{len(found)}", y.transpose(0, 2, 3, 1)))
            if n % 2:
                found.append((f"op{len(found)}", rounded((found[-1][1] + x) / 1.5)))
            x = found[-1][1]
        found.append((f"op{len(found)}", rounded(x.mean((1, 2)))))
        found.append(("out", found[-1][1] @ self.head))
        return found


def conv(x: Floats, filters: Floats) -> Floats:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.einsum("rchwij,ocij->rohw", windows, filters)


IMAGE = np.random.default_rng(5).normal(size=(ROWS, 8, 12, 12)) + 0.3
BLOCKS = 12
PRECISIONS = {"fp32": (0, np.float32, 1e-5), "fp16": (0, np.float16, 2e-3), "int8": (8, np.float64, 0.03)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_network_that_is_right_has_no_faulty_layer(precision: str) -> None:
    bits, dtype, noise = PRECISIONS[precision]
    net = Net(BLOCKS)
    found = where(net.layers(IMAGE), net.fused(IMAGE, bits, dtype), noise)
    assert found is None or found.even, found


def in_block(found: Found | None, block: int) -> bool:
    return found is not None and not found.even and found.layer.partition(".")[0] == str(block)


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_with_wrong_weights_is_named(precision: str, block: int) -> None:
    bits, dtype, noise = PRECISIONS[precision]
    right, wrong = Net(BLOCKS), Net(BLOCKS)
    wrong.filters[block] = wrong.filters[block][:, ::-1]  # its input channels, the wrong way round
    found = where(right.layers(IMAGE), wrong.fused(IMAGE, bits, dtype), noise)
    assert in_block(found, block), found


@pytest.mark.parametrize("block", [0, 4, 11])
def test_a_layer_whose_shift_was_lost_is_named(block: int) -> None:
    right, wrong = Net(BLOCKS), Net(BLOCKS)
    wrong.shifts[block] = wrong.shifts[block] * 0
    assert in_block(where(right.layers(IMAGE), wrong.fused(IMAGE, 0, np.float32)), block)


@pytest.mark.parametrize(
    "fault",
    [
        lambda image: image[:, ::-1],
        lambda image: (image - 0.5) / 0.5,
        lambda image: image.transpose(0, 1, 3, 2)[..., ::-1],
    ],
    ids=["channels swapped", "another mean and deviation", "turned"],
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_fault_of_the_inputs_is_there_from_the_start(fault: object, precision: str) -> None:
    bits, dtype, noise = PRECISIONS[precision]
    net = Net(BLOCKS)
    found = where(net.layers(IMAGE), net.fused(fault(IMAGE), bits, dtype), noise)
    assert found is not None
    assert found.layer == "image"
    assert "from the start" in found.words()


@pytest.mark.parametrize("block", [1, 6, 10])
def test_half_precision_that_overflows_is_found_where_it_does(block: int) -> None:
    net = Net(BLOCKS)
    net.scales[block] = net.scales[block] * 1e5
    net.shifts[block] = net.shifts[block] * 1e5
    if block + 1 < BLOCKS:
        net.scales[block + 1] = net.scales[block + 1] * 1e-5
    with np.errstate(over="ignore", invalid="ignore"):
        artifact = net.fused(IMAGE, 0, np.float16)
    found = where(net.layers(IMAGE), artifact, 2e-3)
    assert in_block(found, block), found
    assert math.isinf(found.error)


def test_arrays_are_read_from_files_as_they_are_looked_at(tmp_path: object) -> None:
    right, wrong = Net(4), Net(4)
    wrong.filters[2] = wrong.filters[2] * 0.5
    opened = []
    for name, layers in (("a", right.layers(IMAGE)), ("b", wrong.fused(IMAGE, 0, np.float32))):
        for n, (_, value) in enumerate(layers):
            np.save(tmp_path / f"{name}{n}.npy", value.astype(np.float32))
        opened.append([(one, np.load(tmp_path / f"{name}{n}.npy", mmap_mode="r")) for n, (one, _) in enumerate(layers)])
    assert in_block(where(*opened), 2)
