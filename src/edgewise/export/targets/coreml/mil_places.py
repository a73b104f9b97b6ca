"""MIL operators that put numbers elsewhere: gathers, shapes, slices, orders, sizes of images. See mil.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch.nn import functional as F

from edgewise.errors import UnsupportedModel
from edgewise.export.targets.coreml.mil_call import Call, T, torch_padding

# Gathering and scattering


def _gather(call: Call) -> T:
    x, rows = call.x, call.int("batch_dims", 0)
    axis = call.int("axis", 0) % x.ndim
    found = call.indices("indices", x.shape[axis])
    if not rows:
        return _taken(x, found, axis)
    shape = x.shape[:rows]
    flat = zip(x.reshape(-1, *x.shape[rows:]), found.reshape(-1, *found.shape[rows:]), strict=True)
    parts = torch.stack([_taken(one, index, axis - rows) for one, index in flat])
    return parts.reshape(*shape, *parts.shape[1:])


def _taken(x: T, indices: T, axis: int) -> T:
    found = x.index_select(axis, indices.reshape(-1))
    return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _gather_along_axis(call: Call) -> T:
    axis = call.int("axis", 0) % call.x.ndim
    return torch.take_along_dim(call.x, call.indices("indices", call.x.shape[axis]), axis)


def _gather_nd(call: Call) -> T:
    x, rows = call.x, call.int("batch_dims", 0)
    depth = call.tensor("indices").shape[-1]
    found = call.indices("indices", list(x.shape[rows : rows + depth]))
    if not rows:
        return x[tuple(found.unbind(-1))]
    flat = zip(x.reshape(-1, *x.shape[rows:]), found.reshape(-1, *found.shape[rows:]), strict=True)
    parts = torch.stack([one[tuple(index.unbind(-1))] for one, index in flat])
    return parts.reshape(*x.shape[:rows], *parts.shape[1:])


REDUCES: Final = {"max": "amax", "min": "amin", "mul": "prod"}


def _scatter_along_axis(call: Call) -> T:
    data, axis = call.tensor("data"), call.int("axis", 0)
    axis %= data.ndim
    return _scattered(call, data, axis, call.indices("indices", data.shape[axis]), call.tensor("updates"))


def _scatter(call: Call) -> T:
    data, updates = call.tensor("data"), call.tensor("updates")
    axis = call.int("axis", 0) % data.ndim
    found = call.indices("indices", data.shape[axis])
    index = found.reshape([-1 if at == axis else 1 for at in range(data.ndim)]).expand(updates.shape)
    return _scattered(call, data, axis, index, updates)


def _scattered(call: Call, data: T, axis: int, index: T, updates: T) -> T:
    mode = call.text("mode", "add")
    if mode == "update":
        return data.scatter(axis, index, updates)
    if mode in ("add", "sub"):
        return data.scatter_add(axis, index, updates if mode == "add" else -updates)
    return data.scatter_reduce(axis, index, updates, _reduce(call, mode))


def _reduce(call: Call, mode: str) -> str:
    if mode not in REDUCES:
        raise UnsupportedModel(f"Edgewise cannot compute {call.op.type} with mode {mode!r}")
    return REDUCES[mode]


def _scatter_nd(call: Call) -> T:
    data, updates = call.tensor("data"), call.tensor("updates")
    depth = call.tensor("indices").shape[-1]
    places = call.indices("indices", list(data.shape[:depth])).unbind(-1)
    mode = call.text("mode", "add")
    if mode in ("update", "add", "sub"):
        return data.index_put(places, -updates if mode == "sub" else updates, accumulate=mode != "update")
    rest = data.shape[depth:]
    flat = sum((one * math.prod(data.shape[at + 1 : depth]) for at, one in enumerate(places)), torch.tensor(0))
    rows, given = data.reshape(-1, math.prod(rest)), updates.reshape(-1, math.prod(rest))
    index = flat.reshape(-1, 1).expand(given.shape)
    return rows.scatter_reduce(0, index, given, _reduce(call, mode)).reshape(data.shape)


# Shapes


def _reshape(call: Call) -> T:
    """A zero takes the axis of the input that stands at the same place, counted from the right."""
    x, wanted = call.x, call.ints("shape")
    for at, axis in enumerate(wanted):
        if axis == 0 and x.numel():
            place = x.ndim - len(wanted) + at
            wanted[at] = x.shape[place] if place >= 0 else 1
    return x.reshape(wanted)


def _expand_dims(call: Call) -> T:
    x = call.x
    for axis in _sorted_axes(call.ints("axes"), x.ndim + len(call.ints("axes"))):
        x = x.unsqueeze(axis)
    return x


def _squeeze(call: Call) -> T:
    x = call.x
    axes = call.ints("axes", [axis for axis, size in enumerate(x.shape) if size == 1])
    for axis in reversed(_sorted_axes(axes, x.ndim)):
        x = x.squeeze(axis)
    return x


def _sorted_axes(axes: Sequence[int], rank: int) -> list[int]:
    return sorted(axis % rank for axis in axes)


def _concat(call: Call) -> T:
    values, axis = [one.reshape(1) if one.ndim == 0 else one for one in call.tensors("values")], call.int("axis")
    if call.flag("interleave"):
        axis %= values[0].ndim
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, axis)


def _split(call: Call) -> list[T]:
    x, axis = call.x, call.int("axis")
    sizes = call.ints("split_sizes", []) or [x.shape[axis] // call.int("num_splits")] * call.int("num_splits")
    return list(torch.split(x, sizes, axis))


def _slices(call: Call, shape: Sequence[int]) -> tuple[list[slice], list[int]]:
    """And the axes that vanish."""
    rank = len(shape)
    begin, end = call.ints("begin"), call.ints("end")
    stride = call.ints("stride", [1] * rank)
    masks = [call.ints(f"{name}_mask", [0] * rank) for name in ("begin", "end", "squeeze")]
    found, gone = [], []
    for axis in range(rank):
        first, last, single = (bool(mask[axis]) for mask in masks)
        if single:
            at = begin[axis] if not first else 0
            at += shape[axis] if at < 0 else 0
            found.append(slice(at, at + 1, 1))
            gone.append(axis)
        else:
            found.append(slice(None if first else begin[axis], None if last else end[axis], stride[axis]))
    return found, gone


def _slice_by_index(call: Call) -> T:
    x = call.x
    slices, gone = _slices(call, x.shape)
    for axis, one in enumerate(slices):
        start, stop, step = one.indices(x.shape[axis])
        if step > 0:
            x = x[(slice(None),) * axis + (slice(start, max(start, stop), step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(range(start, stop, step)), dtype=torch.long))
    for axis in reversed(gone):
        x = x.squeeze(axis)
    return x


def _slice_update(call: Call) -> T:
    found = call.x.clone()
    slices, _ = _slices(call, found.shape)
    target = found[tuple(slices)]
    target.copy_(call.tensor("update").reshape(target.shape))
    return found


def _crop(call: Call) -> T:
    (top, bottom), (left, right) = call.ints("crop_height"), call.ints("crop_width")
    rows, columns = call.x.shape[-2:]
    return call.x[..., top : rows - bottom, left : columns - right]


def _slice_by_size(call: Call) -> T:
    x = call.x
    for axis, (begin, size) in enumerate(zip(call.ints("begin"), call.ints("size"), strict=True)):
        begin += x.shape[axis] if begin < 0 else 0
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


def _pad(call: Call) -> T:
    x, pads = call.x, call.ints("pad")
    mode = call.text("mode", "constant")
    if mode == "constant":
        return F.pad(x, torch_padding(pads), value=call.float("constant_val", 0.0))
    return _mirrored(x, pads, repeat=mode == "replicate")


def _mirrored(x: T, pads: Sequence[int], *, repeat: bool) -> T:
    """Axis by axis, as torch pads only some ranks this way."""
    for at in range(0, len(pads), 2):
        axis = x.ndim - len(pads) // 2 + at // 2
        places = torch.arange(-pads[at], x.shape[axis] + pads[at + 1])
        last = x.shape[axis] - 1
        places = places.clamp(0, last) if repeat else last - (last - places.abs()).abs()
        x = x.index_select(axis, places)
    return x


def _tile(call: Call) -> T:
    return call.x.repeat(call.ints("reps"))


def _reverse(call: Call) -> T:
    return call.x.flip(call.ints("axes", range(call.x.ndim)))


def _depth_to_space(call: Call) -> T:
    """The channel's outer axes are the place in the block."""
    n, c, h, w = call.x.shape
    b = call.int("block_size")
    return call.x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(call: Call) -> T:
    n, c, h, w = call.x.shape
    b = call.int("block_size")
    return call.x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


def _sliding_windows(call: Call) -> T:
    axis = call.int("axis") % call.x.ndim
    return call.x.unfold(axis, call.int("size"), call.int("stride", 1)).movedim(-1, axis + 1)


def _flatten2d(call: Call) -> T:
    axis = call.int("axis", 1)
    return call.x.reshape(math.prod(call.x.shape[:axis]), -1)


# Making and sorting


def _fill(call: Call) -> T:
    return torch.full(call.ints("shape"), call.float("value", 0.0))


def _range(call: Call) -> T:
    start, end, step = (call.tensor(name) for name in ("start", "end", "step"))
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def _one_hot(call: Call) -> T:
    size, axis = call.int("one_hot_vector_size"), call.int("axis", -1)
    found = torch.nn.functional.one_hot(call.indices("indices", size), size).bool()
    on, off = call.float("on_value", 1.0), call.float("off_value", 0.0)
    made = torch.where(found, on, off)
    return made.movedim(-1, axis % made.ndim)


def _cumsum(call: Call) -> T:
    axis = call.int("axis", 0)
    x = call.x.flip(axis) if call.flag("reverse") else call.x
    found = x.cumsum(axis, dtype=x.dtype)
    if call.flag("exclusive"):
        found = found - x
    return found.flip(axis) if call.flag("reverse") else found


def _topk(call: Call) -> list[T]:
    axis, count = call.int("axis", -1), call.int("k", 1)
    count = call.x.shape[axis] if count == -1 else count
    order = torch.argsort(call.x, stable=True, dim=axis, descending=not call.flag("ascending"))
    order = order.narrow(axis, 0, count)
    return [torch.take_along_dim(call.x, order, axis), order]


def _argsort(call: Call) -> T:
    return torch.argsort(call.x, stable=True, dim=call.int("axis", -1), descending=not call.flag("ascending"))


def _band_part(call: Call) -> T:
    rows, columns = call.x.shape[-2:]
    below, above = call.int("lower", -1), call.int("upper", -1)
    distance = torch.arange(columns)[None] - torch.arange(rows)[:, None]
    keep = (distance <= above if above >= 0 else True) & (torch.tensor(below < 0) | (-distance <= below))
    return torch.where(keep, call.x, torch.zeros((), dtype=call.x.dtype))


# Resizing


def _grid(mode: str, size: int, wanted: int) -> T:
    """Where on an axis each result is read, as the reference of resize_bilinear says."""
    at = torch.arange(wanted, dtype=torch.float64)
    if mode == "UNALIGN_CORNERS":
        found = (at + 0.5) * size / wanted - 0.5
    elif mode == "OFFSET_CORNERS":
        found = (0.5 + at) * max(1, size - 1) / wanted
    elif mode == "DEFAULT":
        found = at * (size / wanted if wanted > 1 else 1.0)
    elif mode == "ALIGN_CORNERS" and wanted == 1:
        found = torch.full_like(at, (size - 1) / 2)
    else:
        found = at * ((size - 1) / (wanted - 1) if wanted > 1 else 0.0)
    return found.clamp(0, size - 1)


def _bilinear(x: T, mode: str, wanted: Sequence[int]) -> T:
    for axis, size in zip((-2, -1), wanted, strict=True):
        places = _grid(mode, x.shape[axis], size)
        low = places.floor().long()
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        share = (places - low).float().reshape([-1, 1] if axis == -2 else [-1])
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
    return x


def _nearest(x: T, wanted: Sequence[int]) -> T:
    for axis, size in zip((-2, -1), wanted, strict=True):
        places = torch.arange(size, dtype=torch.float64) * x.shape[axis] / size
        x = x.index_select(axis, places.floor().long())
    return x


def _scaled(call: Call) -> list[int]:
    names = ("scale_factor_height", "scale_factor_width")
    sizes = call.x.shape[-2:]
    return [math.floor(size * call.float(name, 1.0) + 1e-6) for size, name in zip(sizes, names, strict=True)]


def _targets(call: Call) -> list[int]:
    return [call.int("target_size_height", 1), call.int("target_size_width", 1)]


def _upsample_bilinear(call: Call) -> T:
    mode = "STRICT_ALIGN_CORNERS" if call.flag("align_corners", True) else "UNALIGN_CORNERS"
    return _bilinear(call.x, mode, _scaled(call))


def _resize_bilinear(call: Call) -> T:
    return _bilinear(call.x, call.text("sampling_mode", "DEFAULT"), _targets(call))


def _resize(call: Call) -> T:
    count = call.int("resized_dims")
    shape = call.ints("shape")[-count:]
    sizes = [want or have for want, have in zip(shape, call.x.shape[-count:], strict=True)]
    sizes = [*call.x.shape[-2 : -count or None], *sizes] if count < 2 else sizes
    mode = call.text("sampling_mode", "DEFAULT")
    if count > 2 or (call.text("interpolation_mode", "LINEAR") != "LINEAR" and mode != "DEFAULT"):
        raise UnsupportedModel(f"Edgewise cannot compute resize of {count} axes with {mode}")
    nearest = call.text("interpolation_mode", "LINEAR") != "LINEAR"
    return _nearest(call.x, sizes) if nearest else _bilinear(call.x, mode, sizes)


PLACES: Final[Mapping[str, Callable[[Call], T | list[T]]]] = {
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "scatter": _scatter,
    "scatter_along_axis": _scatter_along_axis,
    "scatter_nd": _scatter_nd,
    "band_part": _band_part,
    "concat": _concat,
    "crop": _crop,
    "depth_to_space": _depth_to_space,
    "expand_dims": _expand_dims,
    "flatten2d": _flatten2d,
    "pad": _pad,
    "pixel_shuffle": lambda call: F.pixel_shuffle(call.x, call.int("upscale_factor")),
    "pixel_unshuffle": lambda call: F.pixel_unshuffle(call.x, call.int("downscale_factor")),
    "reshape": _reshape,
    "reverse": _reverse,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "sliding_windows": _sliding_windows,
    "space_to_depth": _space_to_depth,
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda call: torch.stack(call.tensors("values"), call.int("axis")),
    "tile": _tile,
    "transpose": lambda call: call.x.permute(call.ints("perm")),
    "argsort": _argsort,
    "cumsum": _cumsum,
    "fill": _fill,
    "fill_like": lambda call: torch.full(call.tensor("ref_tensor").shape, call.float("value", 0.0)),
    "one_hot": _one_hot,
    "range_1d": _range,
    "topk": _topk,
    "resize": _resize,
    "resize_bilinear": _resize_bilinear,
    "resize_nearest_neighbor": lambda call: _nearest(call.x, _targets(call)),
    "upsample_bilinear": _upsample_bilinear,
    "upsample_nearest_neighbor": lambda call: _nearest(call.x, _scaled(call)),
}
