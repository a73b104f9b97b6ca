"""Operators on shapes: on arrays that are known before anything is computed.

An axis whose length is left open is one of torch's symbols in an array of objects, so numpy computes with it as with
any number. An operator that is not here, or that answers None, is computed by torch on tensors instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch

from edgewise.export.sources.onnx_ops.node import Array, Node, axes_of, whole

Computed = Callable[..., Any]  # (node, *arrays) -> an array, a tuple of them, or None

LARGEST: Final = 1 << 16  # numbers of an array that is made here


def _object(array: Array) -> bool:
    return array.dtype == object


def settled(found: Array) -> Array:
    """An array of objects only as long as there is a symbol in it."""
    if _object(found) and all(type(value) is int for value in whole(found)):
        return found.astype(np.int64)
    return found


def _div(node: Node, a: Array, b: Array) -> Array:
    if a.dtype.kind == "f" or b.dtype.kind == "f":
        return np.asarray(a / b, a.dtype)
    if _object(a) or _object(b):
        return np.asarray(np.floor_divide(a, b))  # lengths are not negative
    return np.asarray(np.trunc(a / b), a.dtype)


def _cast(node: Node, x: Array) -> Array | None:
    dtype = _numpy(node)
    if dtype is None or (_object(x) and dtype.kind == "f"):
        return None
    return x if _object(x) else x.astype(dtype)


def _numpy(node: Node) -> np.dtype[Any] | None:
    dtype = node.dtype(node.get("to"))
    return None if dtype == torch.bfloat16 else np.dtype(str(dtype).removeprefix("torch."))


def _gather(node: Node, x: Array, places: Array) -> Array | None:
    return None if _object(places) else np.asarray(np.take(x, places.astype(np.int64), node.get("axis", 0)))


def _concat(node: Node, *values: Array) -> Array:
    return np.concatenate(values, node.get("axis"))


def _slice(node: Node, x: Array, *given: Array | None) -> Array | None:
    starts, ends, axes, steps = [*given, None, None, None, None][:4]
    firsts = list(node.get("starts", ())) if starts is None else whole(starts)
    lasts = list(node.get("ends", ())) if ends is None else whole(ends)
    along = axes_of(node, axes) or list(range(len(firsts)))
    strides = [1] * len(firsts) if steps is None else whole(steps)
    for axis, first, last, step in zip(along, firsts, lasts, strides, strict=True):
        if not all(type(one) is int for one in (first, last, step)):
            return None
        length = x.shape[axis]
        stop = None if step < 0 and last < -length else last
        x = x[(slice(None),) * (axis % x.ndim) + (slice(first, stop, step),)]
    return x


def _squeeze(node: Node, x: Array, given: Array | None = None) -> Array:
    axes = axes_of(node, given)
    return np.squeeze(x, None if axes is None else tuple(axes))


def _unsqueeze(node: Node, x: Array, given: Array | None = None) -> Array:
    return np.expand_dims(x, tuple(axes_of(node, given) or ()))


def _reshape(node: Node, x: Array, shape: Array) -> Array | None:
    if _object(shape):
        return None
    return x.reshape([x.shape[at] if axis == 0 else axis for at, axis in enumerate(whole(shape))])


def _flatten(node: Node, x: Array) -> Array:
    axis = node.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _where(node: Node, condition: Array, a: Array, b: Array) -> Array | None:
    return None if _object(condition) else np.where(condition, a, b)


def _reduced(reduced: Callable[..., Any]) -> Computed:
    def computed(node: Node, x: Array, given: Array | None = None) -> Array:
        axes = axes_of(node, given)
        keep = bool(node.get("keepdims", 1))
        return np.asarray(reduced(x, axis=tuple(axes) if axes else None, keepdims=keep), x.dtype)

    return computed


def _range(node: Node, first: Array, last: Array, step: Array) -> Array | None:
    if any(_object(one) for one in (first, last, step)):
        return None
    return np.arange(first.item(), last.item(), step.item(), dtype=first.dtype)


def _constant_of_shape(node: Node, shape: Array) -> Array | None:
    if _object(shape) or math.prod(whole(shape)) > LARGEST:
        return None
    value = np.atleast_1d(node.get("value", np.zeros(1, np.float32)))
    return np.full(whole(shape), value.reshape(-1)[0], value.dtype)


def _expand(node: Node, x: Array, shape: Array) -> Array | None:
    if _object(shape) or math.prod(whole(shape)) > LARGEST:
        return None
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(whole(shape))))


def _tile(node: Node, x: Array, repeats: Array) -> Array | None:
    return None if _object(repeats) else np.tile(x, whole(repeats))


def _split(node: Node, x: Array, given: Array | None = None) -> tuple[Array, ...]:
    axis = node.get("axis", 0)
    sizes = node.get("split") if given is None else whole(given)
    if sizes is None:
        each = -(-x.shape[axis] // node.get("num_outputs", node.outputs))
        sizes = [each] * (node.outputs - 1)
    return tuple(np.split(x, np.cumsum(sizes)[: node.outputs - 1], axis))


def _shape(node: Node, x: Array) -> Array:
    return np.array(x.shape[node.get("start", 0) : node.get("end")], np.int64)


def _nonzero(node: Node, x: Array) -> Array | None:
    return None if _object(x) else np.stack(np.nonzero(x)).astype(np.int64)


def _plain(found: Callable[..., Any]) -> Computed:
    """Element by element."""
    return lambda node, *values: np.asarray(found(*values))


def _alike(found: Callable[..., Any]) -> Computed:
    """Element by element, of known numbers only; the type of the first."""

    def computed(node: Node, *values: Array) -> Array | None:
        if any(_object(one) for one in values):
            return None
        return np.asarray(found(*values)).astype(values[0].dtype)

    return computed


def _compared(found: Callable[..., Any]) -> Computed:
    return lambda node, a, b: np.asarray(found(a, b)).astype(bool)


def _many(found: Callable[..., Any]) -> Computed:
    def computed(node: Node, *values: Array) -> Array:
        result = values[0]
        for one in values[1:]:
            result = found(result, one)
        return np.asarray(result)

    return computed


HOST: Final[dict[str, Computed]] = {
    "Abs": _alike(np.abs),
    "Add": _plain(np.add),
    "And": _compared(np.logical_and),
    "Cast": _cast,
    "CastLike": lambda node, x, like: None if _object(x) or _object(like) else x.astype(like.dtype),
    "Ceil": _alike(np.ceil),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Div": _div,
    "Equal": _compared(np.equal),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _alike(np.floor),
    "Gather": _gather,
    "Greater": _compared(np.greater),
    "GreaterOrEqual": _compared(np.greater_equal),
    "Identity": lambda node, x: x,
    "Less": _compared(np.less),
    "LessOrEqual": _compared(np.less_equal),
    "Max": _many(np.maximum),
    "Min": _many(np.minimum),
    "Mod": lambda node, a, b: _alike(np.fmod if node.get("fmod", 0) else np.mod)(node, a, b),
    "Mul": _plain(np.multiply),
    "Neg": _plain(np.negative),
    "NonZero": _nonzero,
    "Not": lambda node, x: np.logical_not(x),
    "Or": _compared(np.logical_or),
    "Pow": _alike(np.power),
    "Range": _range,
    "ReduceMax": _reduced(np.max),
    "ReduceMin": _reduced(np.min),
    "ReduceProd": _reduced(np.prod),
    "ReduceSum": _reduced(np.sum),
    "Reshape": _reshape,
    "Round": _alike(np.round),
    "Shape": _shape,
    "Size": lambda node, x: np.array(x.size, np.int64),
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _alike(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(np.subtract),
    "Tile": _tile,
    "Transpose": lambda node, x: np.transpose(x, node.get("perm")),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
