"""Convolution, pooling, padding and resizing: operators over images, and signals of one or three axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch.nn import functional as F

from edgewise.export.sources.onnx_ops.node import Array, Node, Tensor, constant, operator, whole

CONVOLUTIONS: Final = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED: Final = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
AVERAGES: Final = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
MAXIMA: Final = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
TORCH: Final = {"reflect": "reflect", "edge": "replicate"}  # modes of padding


@dataclass(frozen=True, slots=True)
class Window:
    """How a kernel moves over axes. `end` is the padding that the file asks for, `overhang` what must follow it for the
    last, partial step of `ceil_mode`."""

    sizes: tuple[int, ...]  # of the input
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    overhang: tuple[int, ...]

    @property
    def axes(self) -> int:
        return len(self.kernel)

    @property
    def plain(self) -> bool:
        """Whether torch's own arguments can say it."""
        return self.begin == self.end and not any(self.overhang)

    @property
    def padding(self) -> list[int]:
        """As F.pad wants it: the last axis first."""
        ends = [end + more for end, more in zip(self.end, self.overhang, strict=True)]
        return [n for pair in reversed(list(zip(self.begin, ends, strict=True))) for n in pair]

    def outputs(self, axis: int) -> int:
        length = self.sizes[axis] + self.begin[axis] + self.end[axis] + self.overhang[axis]
        return (length - self._reach(axis)) // self.strides[axis] + 1

    def _reach(self, axis: int) -> int:
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1


def _window(node: Node, x: Tensor, kernel: Sequence[int]) -> Window:
    count = len(kernel)
    if count > 3:
        raise node.refused(f"it has {count} axes beside rows and channels; torch knows up to 3")
    sizes = tuple(int(size) for size in x.shape[2:])
    strides = tuple(node.get("strides", (1,) * count))
    dilations = tuple(node.get("dilations", (1,) * count))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    begin, end = _padding(node, sizes, reach, strides)
    overhang = [0] * count
    if node.get("ceil_mode", 0):
        overhang = [_overhang(*one) for one in zip(sizes, reach, strides, begin, end, strict=True)]
    return Window(sizes, tuple(kernel), strides, dilations, begin, end, tuple(overhang))


def _padding(
    node: Node, sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    count, mode = len(reach), node.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return (0,) * count, (0,) * count
    if mode == "NOTSET":
        pads = tuple(node.get("pads", (0,) * 2 * count))
        return pads[:count], pads[count:]
    totals = [
        max((-(-size // stride) - 1) * stride + width - size, 0)
        for size, width, stride in zip(sizes, reach, strides, strict=True)
    ]
    return _halves(totals, mode)


def _halves(totals: Sequence[int], mode: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """SAME_UPPER puts an odd number's rest behind."""
    less, more = tuple(n // 2 for n in totals), tuple(n - n // 2 for n in totals)
    return (less, more) if mode == "SAME_UPPER" else (more, less)


def _overhang(size: int, reach: int, stride: int, begin: int, end: int) -> int:
    """The last step may be partial, but must begin within the input or the padding before it."""
    steps = -(-(size + begin + end - reach) // stride)
    if steps * stride >= size + begin:
        steps -= 1
    return max(steps * stride + reach - (size + begin + end), 0)


# Convolution


@operator("Conv")
def _conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    window = _window(node, x, tuple(weight.shape[2:]))
    padding = window.begin
    if not window.plain:
        x, padding = F.pad(x, window.padding), (0,) * window.axes
    found = CONVOLUTIONS[window.axes - 1]
    return found(x, weight, bias, window.strides, padding, window.dilations, node.get("group", 1))


@operator("ConvTranspose")
def _conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = tuple(weight.shape[2:])
    count = len(kernel)
    if count > 3:
        raise node.refused(f"it has {count} axes beside rows and channels; torch knows up to 3")
    strides, dilations, more = (
        tuple(node.get(name, (default,) * count))
        for name, default in (("strides", 1), ("dilations", 1), ("output_padding", 0))
    )
    full = [
        (size - 1) * stride + (k - 1) * dilation + 1 + extra
        for size, stride, k, dilation, extra in zip(x.shape[2:], strides, kernel, dilations, more, strict=True)
    ]
    if "output_shape" in node.attributes:  # what is longer than computed is filled with the bias alone
        wanted = list(node.get("output_shape"))[-count:]
        more = tuple(m + max(want - length, 0) for m, want, length in zip(more, wanted, full, strict=True))
        full = [max(want, length) for want, length in zip(wanted, full, strict=True)]
    begin, end = _cropping(node, x, full, strides)
    found = TRANSPOSED[count - 1]
    if begin == end:
        return found(x, weight, bias, strides, begin, more, node.get("group", 1), dilations)
    out = found(x, weight, bias, strides, (0,) * count, more, node.get("group", 1), dilations)
    for axis in range(count):
        out = out.narrow(axis + 2, begin[axis], full[axis] - begin[axis] - end[axis])
    return out


def _cropping(
    node: Node, x: Tensor, full: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How much of a transposed convolution's whole output is taken off."""
    count, mode, wanted = len(full), node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if wanted is None and mode.startswith("SAME"):
        wanted = [int(size) * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if wanted is not None:
        return _halves([max(length - want, 0) for length, want in zip(full, wanted[-count:], strict=True)], mode)
    pads = tuple(node.get("pads", (0,) * 2 * count)) if mode == "NOTSET" else (0,) * 2 * count
    return pads[:count], pads[count:]


# Pooling


@operator("MaxPool")
def _max_pool(node: Node, x: Tensor) -> Tensor:
    if node.outputs > 1:
        raise node.refused("its second output, the places of the maxima, cannot be carried over")
    window = _window(node, x, tuple(node.get("kernel_shape")))
    found = MAXIMA[window.axes - 1]
    small = all(2 * pad <= k for pad, k in zip(window.begin, window.kernel, strict=True))
    if window.plain and small:
        return found(x, window.kernel, window.strides, window.begin, window.dilations)
    least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    return found(F.pad(x, window.padding, value=least), window.kernel, window.strides, 0, window.dilations)


@operator("AveragePool")
def _average_pool(node: Node, x: Tensor) -> Tensor:
    window = _window(node, x, tuple(node.get("kernel_shape")))
    include = bool(node.get("count_include_pad", 0))
    small = all(2 * pad <= k for pad, k in zip(window.begin, window.kernel, strict=True))
    if window.plain and small and set(window.dilations) == {1}:
        found = AVERAGES[window.axes - 1]
        return found(x, window.kernel, window.strides, window.begin, False, include)
    return _summed(x, window) / constant(_counts(window, include), x)


def _summed(x: Tensor, window: Window) -> Tensor:
    """Over each step of the window: a convolution with ones."""
    channels = x.shape[1]
    ones = torch.ones((channels, 1, *window.kernel), dtype=x.dtype)
    padded = F.pad(x, window.padding)
    return CONVOLUTIONS[window.axes - 1](padded, ones, None, window.strides, 0, window.dilations, channels)


def _counts(window: Window, include: bool) -> Array:
    """How many numbers each step averages over; what hangs over the end never counts."""
    found: Array = np.ones((), np.float32)
    for axis in range(window.axes):
        first = np.arange(window.outputs(axis)) * window.strides[axis]
        taps = first[:, None] + np.arange(window.kernel[axis]) * window.dilations[axis] - window.begin[axis]
        low = -window.begin[axis] if include else 0
        high = window.sizes[axis] + (window.end[axis] if include else 0)
        found = found[..., None] * ((taps >= low) & (taps < high)).sum(1)
    return found.astype(np.float32)


@operator("GlobalAveragePool")
def _global_average(node: Node, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def _global_max(node: Node, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.ndim)), keepdim=True)


# Padding


@operator("Pad", host=(1, 3), either=(2,))
def _pad(
    node: Node, x: Tensor, pads: Array | None = None, value: Tensor | Array | None = None, axes: Array | None = None
) -> Tensor:
    wanted = list(node.get("pads", ())) if pads is None else whole(pads)
    along = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in whole(axes)]
    begin, end = [0] * x.ndim, [0] * x.ndim
    for at, axis in enumerate(along):
        begin[axis], end[axis] = wanted[at], wanted[len(along) + at]
    mode = node.get("mode", "constant")
    if mode == "constant":
        return _filled(node, x, begin, end, value)
    if x.ndim == 4 and mode in TORCH and not any(begin[:2] + end[:2]) and min(begin + end) >= 0:
        return F.pad(x, _reversed(begin[2:], end[2:]), TORCH[mode])
    for axis in range(x.ndim):
        if begin[axis] or end[axis]:
            x = _continued(x, axis, begin[axis], end[axis], mode)
    return x


def _reversed(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    return [n for pair in reversed(list(zip(begin, end, strict=True))) for n in pair]


def _filled(node: Node, x: Tensor, begin: Sequence[int], end: Sequence[int], value: Tensor | Array | None) -> Tensor:
    if isinstance(value, torch.Tensor):
        raise node.refused("the value that it fills with depends on the data")
    filling = node.get("value", 0.0) if value is None or not value.size else value.reshape(-1)[0].item()
    if x.dtype == torch.bool:
        return F.pad(x.to(torch.uint8), _reversed(begin, end), value=float(filling)).to(torch.bool)
    first = next((at for at in range(x.ndim) if begin[at] or end[at]), None)
    return x if first is None else F.pad(x, _reversed(begin[first:], end[first:]), value=filling)


def _continued(x: Tensor, axis: int, begin: int, end: int, mode: str) -> Tensor:
    """`reflect`, `edge` and `wrap`: a choice of the axis's own places. Negative numbers take off."""
    places = np.arange(int(x.shape[axis]))
    places = places[max(-begin, 0) : len(places) - max(-end, 0)]
    padded = np.pad(places, (max(begin, 0), max(end, 0)), mode)  # type: ignore[call-overload]
    return x.index_select(axis, constant(padded))


# Resizing


@operator("Resize", host=(1, 2, 3))
def _resize(
    node: Node, x: Tensor, region: Array | None = None, scales: Array | None = None, sizes: Array | None = None
) -> Tensor:
    if node.version < 11:  # the input, then scales
        scales = region
    if node.get("antialias", 0) or node.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise node.refused("antialiasing and crops while resizing cannot be carried over")
    along = [axis % x.ndim for axis in node.get("axes", range(x.ndim))]
    if sizes is not None and sizes.size:
        lengths, factors = _policy(node, x, along, whole(sizes))
    else:
        factors = [float(one) for one in whole(scales)] if scales is not None else []
        lengths = [
            x.shape[axis] if factor == 1 else math.floor(x.shape[axis] * factor)
            for axis, factor in zip(along, factors, strict=True)
        ]
    changed = {
        axis: (int(length), factor)
        for axis, length, factor in zip(along, lengths, factors, strict=True)
        if length != x.shape[axis] or factor != 1
    }
    return _resized(node, x, changed)


@operator("Upsample", host=(1,))
def _upsample(node: Node, x: Tensor, scales: Array | None = None) -> Tensor:
    """Resize's form before operator set 10: places are those of `asymmetric`."""
    factors = list(node.get("scales", ())) if scales is None else whole(scales)
    changed = {axis: (math.floor(x.shape[axis] * factor), factor) for axis, factor in enumerate(factors) if factor != 1}
    return _resized(node, x, changed)


def _policy(node: Node, x: Tensor, along: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[float]]:
    """Lengths and factors of axes whose lengths are given."""
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        same = [size == x.shape[axis] for axis, size in zip(along, sizes, strict=True)]
        factors = [1.0 if one else size / x.shape[axis] for one, axis, size in zip(same, along, sizes, strict=True)]
        return list(sizes), factors
    ratios = [size / x.shape[axis] for axis, size in zip(along, sizes, strict=True)]
    factor = min(ratios) if policy == "not_larger" else max(ratios)
    return [math.floor(factor * x.shape[axis] + 0.5) for axis in along], [factor] * len(along)


def _resized(node: Node, x: Tensor, changed: dict[int, tuple[int, float]]) -> Tensor:
    if not changed:
        return x
    mode = {"bilinear": "linear"}.get(node.get("mode", "nearest"), node.get("mode", "nearest"))
    own = _own_way(node, x, mode, changed)
    if own is not None:
        return own
    for axis, (length, factor) in changed.items():
        places, weights = _taps(node, mode, int(x.shape[axis]), length, factor)
        parts = [_weighed(x, axis, at, by) for at, by in zip(places, weights, strict=True)]
        x = parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])
    return x


def _own_way(node: Node, x: Tensor, mode: str, changed: dict[int, tuple[int, float]]) -> Tensor | None:
    """By torch's own function, where it does the same: what targets know as one operator."""
    if x.ndim != 4 or not set(changed) <= {2, 3} or not x.is_floating_point():
        return None
    if any(x.shape[axis] * factor != length for axis, (length, factor) in changed.items()):
        return None
    size = [changed[axis][0] if axis in changed else int(x.shape[axis]) for axis in (2, 3)]
    place = _place_mode(node)
    if mode == "nearest":
        doubled = all(factor == int(factor) for _, factor in changed.values())
        down = node.get("nearest_mode", "round_prefer_floor") if node.op != "Upsample" else "floor"
        half = place in ("half_pixel", "pytorch_half_pixel") and down.startswith("round")
        if doubled and ((place == "asymmetric" and down == "floor") or half):
            return F.interpolate(x, size, mode="nearest")
        return None
    if mode == "linear" and place in ("half_pixel", "align_corners"):
        return F.interpolate(x, size, mode="bilinear", align_corners=place == "align_corners")
    return None


def _place_mode(node: Node) -> str:
    if node.version < 11 or node.op == "Upsample":
        return "asymmetric"
    return str(node.get("coordinate_transformation_mode", "half_pixel"))


def _weighed(x: Tensor, axis: int, places: Array, weights: Array | None) -> Tensor:
    taken = x.index_select(axis, constant(places))
    if weights is None:
        return taken
    shape = [1] * x.ndim
    shape[axis] = -1
    return taken * constant(weights, x).reshape(shape)


def _taps(node: Node, mode: str, length: int, wanted: int, factor: float) -> tuple[list[Array], list[Array | None]]:
    """For each place of the output which places of the input make it, and by how much."""
    found = _places(node, length, wanted, factor)
    if mode == "nearest":
        return [np.clip(_nearest(node, found), 0, length - 1).astype(np.int64)], [None]
    if mode == "linear":
        clipped = np.clip(found, 0, length - 1)
        low = np.floor(clipped).astype(np.int64)
        share = clipped - low
        return [low, np.minimum(low + 1, length - 1)], [1 - share, share]
    if mode == "cubic":
        return _cubic(node, found, length)
    raise node.refused(f"its mode is {mode!r}; nearest, linear and cubic are known")


def _places(node: Node, length: int, wanted: int, factor: float) -> Array:
    at, by = np.arange(wanted, dtype=np.float32), np.float32(factor)  # as in onnxruntime: it decides about halves
    mode = _place_mode(node)
    modes: dict[str, Callable[[], Array]] = {
        "half_pixel": lambda: (at + 0.5) / by - 0.5,
        "pytorch_half_pixel": lambda: (at + 0.5) / by - 0.5 if wanted > 1 else at * 0,
        "asymmetric": lambda: at / by,
        "align_corners": lambda: at * (length - 1) / (wanted - 1) if wanted > 1 else at * 0,
        "half_pixel_symmetric": lambda: length / 2 * (1 - wanted / (by * length)) + (at + 0.5) / by - 0.5,
        "tf_half_pixel_for_nn": lambda: (at + 0.5) / by,
    }
    if mode not in modes:
        raise node.refused(f"places as {mode!r} are not known", hint=f"known are {', '.join(modes)}")
    return modes[mode]()


def _nearest(node: Node, places: Array) -> Array:
    mode = "floor" if node.op == "Upsample" else str(node.get("nearest_mode", "round_prefer_floor"))
    rounded: dict[str, Callable[[Array], Array]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda x: np.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    }
    return rounded[mode](places)


def _near(a: float, t: Array) -> Array:
    """Of the two places around."""
    return np.asarray(((a + 2) * t - (a + 3)) * t * t + 1)


def _far(a: float, t: Array) -> Array:
    """Of the two beyond."""
    return np.asarray(((a * t - 5 * a) * t + 8 * a) * t - 4 * a)


def _cubic(node: Node, places: Array, length: int) -> tuple[list[Array], list[Array | None]]:
    a = node.get("cubic_coeff_a", -0.75)
    base = np.floor(places)
    share = places - base
    weights = [_far(a, share + 1), _near(a, share), _near(a, 1 - share), _far(a, 2 - share)]
    taps = [(base + offset).astype(np.int64) for offset in (-1, 0, 1, 2)]
    if node.get("exclude_outside", 0):
        weights = [weight * ((tap >= 0) & (tap < length)) for weight, tap in zip(weights, taps, strict=True)]
        total = sum(weights)
        weights = [weight / total for weight in weights]
    return [np.clip(tap, 0, length - 1) for tap in taps], list(weights)


@operator("DepthToSpace")
def _depth_to_space(node: Node, x: Tensor) -> Tensor:
    rows, channels, height, width = x.shape
    n = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, n)
    parted = x.reshape(rows, n, n, channels // (n * n), height, width).permute(0, 3, 4, 1, 5, 2)
    return parted.reshape(rows, channels // (n * n), height * n, width * n)


@operator("SpaceToDepth")
def _space_to_depth(node: Node, x: Tensor) -> Tensor:
    rows, channels, height, width = x.shape
    n = node.get("blocksize")
    order = (0, 1, 3, 5, 2, 4) if node.get("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    parted = x.reshape(rows, channels, height // n, n, width // n, n).permute(order)
    return parted.reshape(rows, channels * n * n, height // n, width // n)
