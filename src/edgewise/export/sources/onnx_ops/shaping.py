"""Operators that move numbers and compute none: shapes, parts, places."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from edgewise.export.sources.onnx_ops.node import Array, Node, Tensor, axes_of, constant, operator, whole


@operator("Shape")
def _shape(node: Node, x: Tensor) -> Array:
    return lengths(list(x.shape)[node.get("start", 0) : node.get("end")])


@operator("Size")
def _size(node: Node, x: Tensor) -> Array:
    return lengths([math.prod(x.shape)]).reshape(())


def lengths(values: list[Any]) -> Array:
    """Axes' lengths as a host array; of objects where one of them is left open."""
    if all(type(value) is int for value in values):
        return np.array(values, np.int64)
    found = np.empty(len(values), object)
    found[:] = values
    return found


# Shapes


@operator("Reshape", host=(1,))
def _reshape(node: Node, x: Tensor, shape: Array) -> Tensor:
    wanted = whole(shape)
    if not node.get("allowzero", 0):
        wanted = [x.shape[at] if type(axis) is int and axis == 0 else axis for at, axis in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Flatten")
def _flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    if 0 < axis < x.ndim:
        return x.flatten(axis) if axis == 1 else x.flatten(axis).flatten(0, axis - 1)
    return x.reshape(1, -1) if axis == 0 else x.reshape(-1, 1)


@operator("Transpose")
def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(node.get("perm", tuple(reversed(range(x.ndim)))))


@operator("Squeeze", host=(1,))
def _squeeze(node: Node, x: Tensor, given: Array | None = None) -> Tensor:
    axes = axes_of(node, given)
    if axes is None:
        axes = [at for at, length in enumerate(x.shape) if length == 1]
    return x.squeeze(axes)


@operator("Unsqueeze", host=(1,))
def _unsqueeze(node: Node, x: Tensor, given: Array | None = None) -> Tensor:
    axes = axes_of(node, given) or []
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Expand", host=(1,))
def _expand(node: Node, x: Tensor, shape: Array) -> Tensor:
    """An axis of 1 in `shape` keeps the length that x has there."""
    wanted = whole(shape)
    missing = x.ndim - len(wanted)
    wanted = [1] * missing + wanted
    offset = len(wanted) - x.ndim
    return x.expand(
        [-1 if at >= offset and type(axis) is int and axis == 1 else axis for at, axis in enumerate(wanted)]
    )


@operator("Tile", host=(1,))
def _tile(node: Node, x: Tensor, repeats: Array) -> Tensor:
    return x.repeat(whole(repeats))


# Parts


@operator("Concat")
def _concat(node: Node, *values: Tensor) -> Tensor:
    return torch.cat(values, node.get("axis"))


@operator("Split", host=(1,))
def _split(node: Node, x: Tensor, given: Array | None = None) -> Any:
    axis = node.get("axis", 0)
    sizes = node.get("split") if given is None else whole(given)
    if sizes is None:
        each = -(-x.shape[axis] // node.get("num_outputs", node.outputs))
        return tuple(torch.split(x, each, axis))
    return tuple(torch.split(x, list(sizes), axis))


@operator("Slice", host=(1, 2, 3, 4))
def _slice(
    node: Node,
    x: Tensor,
    starts: Array | None = None,
    ends: Array | None = None,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Tensor:
    firsts = list(node.get("starts", ())) if starts is None else whole(starts)
    lasts = list(node.get("ends", ())) if ends is None else whole(ends)
    along = axes_of(node, axes) or list(range(len(firsts)))
    strides = [1] * len(firsts) if steps is None else whole(steps)
    for axis, first, last, step in zip(along, firsts, lasts, strides, strict=True):
        x = _cut(x, axis % x.ndim, first, last, step)
    return x


def _cut(x: Tensor, axis: int, first: Any, last: Any, step: int) -> Tensor:
    length = x.shape[axis]
    if step > 0:
        if type(first) is int and first == 0 and type(last) is int and last >= 2**31 - 1 and step == 1:
            return x  # the whole axis, whose length may be open
        return x[(slice(None),) * axis + (slice(first, last if last < 2**62 else None, step),)]
    first, last = _from_behind(first, length, length - 1), _from_behind(last, length, length)
    turned = x.flip(axis)
    return turned[(slice(None),) * axis + (slice(length - 1 - first, length - 1 - last, -step),)]


def _from_behind(at: Any, length: Any, most: Any) -> Any:
    """A place of a slice that runs backwards, -1 for the one before the first."""
    place = at + length if at < 0 else at
    return max(-1, min(place, most))


# Places


@operator("Gather", either=(1,))
def _gather(node: Node, x: Tensor, places: Tensor | Array) -> Tensor:
    axis = node.get("axis", 0) % x.ndim
    if not isinstance(places, torch.Tensor):
        if places.ndim == 0:
            return x.select(axis, whole(places)[0])
        places = constant(_counted(places, x.shape[axis]))
    elif axis == 0 and x.ndim == 2 and 0 in node.stored and x.is_floating_point():
        return F.embedding(places.to(torch.int64), x)  # a table of words; their numbers count from the front
    else:
        places = _wrapped(places, x.shape[axis])
    taken = x.index_select(axis, places.reshape(-1))
    return taken if places.ndim == 1 else taken.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


def _counted(places: Array, length: Any) -> Array:
    return places if places.dtype == object or not (places < 0).any() else np.where(places < 0, places + length, places)


def _wrapped(places: Tensor, length: Any) -> Tensor:
    """Places may count from behind."""
    places = places.to(torch.int64)
    return torch.where(places < 0, places + length, places)


@operator("GatherElements", either=(1,))
def _gather_elements(node: Node, x: Tensor, places: Tensor | Array) -> Tensor:
    axis = node.get("axis", 0)
    return torch.gather(x, axis, _places(places, x.shape[axis]))


def _places(places: Tensor | Array, length: Any) -> Tensor:
    return _wrapped(places, length) if isinstance(places, torch.Tensor) else constant(_counted(places, length))


@operator("GatherND")
def _gather_nd(node: Node, x: Tensor, places: Tensor) -> Tensor:
    batch = node.get("batch_dims", 0)
    given: list[Tensor] = []
    for axis in range(batch):
        shape = [1] * (places.ndim - 1)
        shape[axis] = -1
        given.append(torch.arange(x.shape[axis]).reshape(shape))
    given += [_wrapped(places[..., at], x.shape[batch + at]) for at in range(places.shape[-1])]
    return x[tuple(given)]


@operator("ScatterND")
def _scatter_nd(node: Node, x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    reduction = node.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise node.refused(f"its reduction is {reduction!r}; none and add are known")
    given = tuple(_wrapped(places[..., at], x.shape[at]) for at in range(places.shape[-1]))
    return x.index_put(given, values, accumulate=reduction == "add")


@operator("ScatterElements", "Scatter", either=(1,))
def _scatter_elements(node: Node, x: Tensor, places: Tensor | Array, values: Tensor) -> Tensor:
    axis, reduction = node.get("axis", 0), node.get("reduction", "none")
    at = _places(places, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, at, values)
    known = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, at, values, known[reduction])


@operator("OneHot", host=(1,))
def _one_hot(node: Node, places: Tensor, depth: Array, values: Tensor) -> Tensor:
    count = whole(depth)[0]
    axis = node.get("axis", -1)
    rank = places.ndim + 1
    hot = _wrapped(places, count).unsqueeze(axis) == torch.arange(count).reshape(
        [-1 if at == axis % rank else 1 for at in range(rank)]
    )
    return torch.where(hot, values[1], values[0])


@operator("Trilu", host=(1,))
def _triangle(node: Node, x: Tensor, k: Array | None = None) -> Tensor:
    found = torch.triu if node.get("upper", 1) else torch.tril
    return found(x, 0 if k is None else whole(k)[0])


@operator("ReverseSequence")
def _reverse_sequence(node: Node, x: Tensor, lengths: Tensor) -> Tensor:
    rows, time = node.get("batch_axis", 1), node.get("time_axis", 0)
    moved = x.movedim((rows, time), (0, 1))
    places = torch.arange(moved.shape[1])[None]
    turned = torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)
    index = turned.reshape(*turned.shape, *([1] * (moved.ndim - 2))).expand_as(moved)
    return torch.gather(moved, 1, index).movedim((0, 1), (rows, time))


# Made of nothing


@operator("ConstantOfShape", host=(0,))
def _constant_of_shape(node: Node, shape: Array) -> Tensor:
    value = node.get("value")
    made = torch.zeros(1) if value is None else torch.from_numpy(np.atleast_1d(value).copy())
    return torch.full(whole(shape), made.reshape(-1)[0].item(), dtype=made.dtype)


@operator("Range", host=(0, 1, 2))
def _range(node: Node, first: Array, last: Array, step: Array) -> Tensor:
    start, stop, by = (whole(one)[0] for one in (first, last, step))
    dtype = torch.int64 if first.dtype == object else constant(first).dtype
    return torch.arange(start, stop, by, dtype=dtype)


@operator("EyeLike")
def _eye_like(node: Node, x: Tensor) -> Tensor:
    number = node.get("dtype")
    dtype = x.dtype if number is None else node.dtype(number)
    rows, columns = x.shape
    ahead = torch.arange(columns)[None] - torch.arange(rows)[:, None]
    return torch.eq(ahead, node.get("k", 0)).to(dtype)
