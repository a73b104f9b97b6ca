"""What a Core ML program computes, by our own reading of it: each operator as coremltools' reference of MIL describes
it, done by torch on this machine's CPU.

Where an operator's result is declared float16 it is rounded to float16, so what is too large becomes infinite. Inside
an operator (the sums of a convolution, a softmax) everything is float32. That is kinder than a Neural Engine, which
keeps some of these sums in fewer bits; whatever overflows here overflows there.

A program whose operators are not all known here is refused as a whole, and the unknown ones are named.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.export.targets.coreml_weights import Function, Kind, Op

Array = npt.NDArray[Any]
T = torch.Tensor
State = dict[str, T]
Watch = Callable[[Op, str, T], None]

FLOATS: Final = ("float16", "float32", "float64")
STRICT_INDICES: Final = ("CoreML7", "CoreML8", "CoreML9")  # opsets in which a negative index is out of bounds
INT32_MAX: Final = 2**31 - 1


class Call:
    """An operator and the values it is given."""

    def __init__(self, op: Op, values: Mapping[str, Any], opset: str) -> None:
        self.op, self.opset = op, opset
        self._values = values

    @property
    def x(self) -> T:
        return self.tensor("x")

    def tensor(self, name: str) -> T:
        found = self._values[self.op.inputs[name][0]]
        assert isinstance(found, T)
        return found

    def tensors(self, name: str) -> list[T]:
        return [self._values[one] for one in self.op.inputs[name]]

    def maybe(self, name: str) -> T | None:
        return self.tensor(name) if name in self.op.inputs else None

    def ints(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        if name not in self.op.inputs and default is not None:
            return list(default)
        return [int(one) for one in self.tensor(name).reshape(-1).tolist()]

    def int(self, name: str, default: int | None = None) -> int:
        return self.ints(name, None if default is None else [default])[0]

    def float(self, name: str, default: float | None = None) -> float:
        if name not in self.op.inputs and default is not None:
            return default
        return float(self.tensor(name).item())

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.tensor(name).item()) if name in self.op.inputs else default

    def text(self, name: str, default: str) -> str:
        return str(self._values[self.op.inputs[name][0]]) if name in self.op.inputs else default

    def indices(self, name: str, size: builtins.int | Sequence[builtins.int]) -> T:
        """SourceError for one that the reference calls out of bounds."""
        found = self.tensor(name).long()
        least = 0 if self.opset in STRICT_INDICES else -1
        limit = torch.as_tensor(size)
        if found.numel() and (bool((found < least * limit).any()) or bool((found >= limit).any())):
            raise SourceError(
                f"{self.op.type} {self.op.name} is given the index {_outside(found, least, limit)}, and takes 0 to "
                f"{limit.reshape(-1).tolist()[-1]} (not included)",
                hint="Core ML does not say what then happens: add the length to negative indices in the model",
            )
        return torch.where(found < 0, found + limit, found)


def _outside(found: T, least: int, limit: T) -> int:
    wrong = (found < least * limit) | (found >= limit)
    return int(found[wrong][0])


class Interpreter:
    """Runs one function of a package, and keeps its weights as float32."""

    def __init__(self, function: Function) -> None:
        """UnsupportedModel if there are operators that are not known here."""
        unknown = unknown_ops(function)
        if unknown:
            raise UnsupportedModel(
                f"Edgewise cannot compute {', '.join(sorted(unknown))} of a Core ML program",
                hint="its weights were checked; run the package on a Mac to compare outputs",
            )
        self.function = function
        self._consts = {name: _value(function.weight(name).value) for name in _used(function)}
        self._last = _last_uses(function)

    def new_state(self) -> State:
        """All zeros, as Core ML makes it."""
        return {name: torch.zeros(_shape(kind)) for name, kind in self.function.states.items()}

    def run(self, inputs: Mapping[str, Array], state: State | None = None, watch: Watch | None = None) -> list[Array]:
        """The outputs in their order. A given state is changed. `watch` sees each value an operator makes."""
        with torch.inference_mode():
            values: dict[str, Any] = dict(self._consts)
            for name, kind in self.function.inputs.items():
                values[name] = name if kind.state else _cast(_value(inputs[name]), kind.dtype)
            self._state = self.new_state() if state is None else state
            for at, op in enumerate(self.function.ops):
                self._step(op, values, watch)
                for name in self._last.get(at, ()):
                    values.pop(name, None)
            return [values[name].numpy() for name in self.function.outputs]

    def _step(self, op: Op, values: dict[str, Any], watch: Watch | None) -> None:
        if op.type == "read_state":
            values[op.outputs[0][0]] = self._state[values[op.inputs["input"][0]]]
            return
        if op.type == "write_state":
            self._state[values[op.inputs["input"][0]]] = values[op.inputs["data"][0]]
            return
        try:
            found = OPS[op.type](Call(op, values, self.function.opset))
        except (RuntimeError, IndexError, ValueError, KeyError, TypeError) as e:  # torch's own
            raise SourceError(
                f"{op.type} {op.name} cannot be computed: {' '.join(str(e).split())[:300]}",
                hint="the program contradicts itself, or Edgewise reads it wrongly",
            ) from e
        made = found if isinstance(found, list) else [found]
        for (name, kind), value in zip(op.outputs, made, strict=False):
            value = value if op.type in EXACT else _cast(value, kind.dtype)
            _fits(op, kind, value)
            values[name] = value
            if watch is not None:
                watch(op, name, value)


def unknown_ops(function: Function) -> set[str]:
    known = {*OPS, "read_state", "write_state"}
    return {op.type for op in function.ops if op.type not in known or op.blocks}


def _used(function: Function) -> set[str]:
    named = {name for op in function.ops for names in op.inputs.values() for name in names}
    return {name for name in (*named, *function.outputs) if function.is_const(name)}


def _last_uses(function: Function) -> dict[int, list[str]]:
    """By the operator after which nobody asks for them again: values to forget."""
    last = {}
    for at, op in enumerate(function.ops):
        for name, _ in op.outputs:
            last[name] = at
        for names in op.inputs.values():
            last.update(dict.fromkeys(names, at))
    keep = {*function.outputs, *function.consts, *function.made, *function.inputs}
    found: dict[int, list[str]] = {}
    for name, at in last.items():
        if name not in keep:
            found.setdefault(at, []).append(name)
    return found


def _value(value: Any) -> Any:
    """Numbers as tensors: float32, int32 or bool."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    wanted = {"f": np.float32, "b": np.bool_}.get(value.dtype.kind, np.int32)
    return torch.from_numpy(np.array(value, dtype=wanted))


def _cast(value: T, dtype: str) -> T:
    """As a value of this type, held in float32, int32 or bool."""
    if dtype == "float16":
        return value.half().float()
    if dtype in FLOATS:
        return value.float()
    if dtype == "bool":
        return value.bool() if value.dtype != torch.bool else value
    if value.is_floating_point():
        value = value.double().nan_to_num(0.0).clamp(-(2**31), INT32_MAX)  # then towards zero
    narrow = getattr(torch, dtype) if dtype in ("int8", "uint8", "int16") else torch.int32
    value = value.to(narrow).int()
    return value & 0xFFFF if dtype == "uint16" else value


def _shape(kind: Kind) -> tuple[int, ...]:
    return tuple(axis or 1 for axis in kind.shape)


def _fits(op: Op, kind: Kind, value: T) -> None:
    """SourceError if a value is not of the shape that the program declares."""
    shape = tuple(value.shape)
    fits = len(shape) == len(kind.shape) and all(b is None or a == b for a, b in zip(shape, kind.shape, strict=True))
    if not fits:
        raise SourceError(
            f"{op.type} {op.name} gives {list(shape)}, and the program declares {list(kind.shape)}",
            hint="the program contradicts itself, or Edgewise reads it wrongly",
        )


# One value in


def _one(made: Callable[[T], T]) -> Callable[[Call], T]:
    return lambda call: made(call.x)


def _gelu(call: Call) -> T:
    mode = call.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return call.x * torch.sigmoid(1.702 * call.x)
    return F.gelu(call.x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def _per_channel(call: Call, name: str) -> T:
    """A parameter with a value for each channel, the second axis."""
    given = call.tensor(name)
    return given.reshape(-1, *[1] * (call.x.ndim - 2)) if given.numel() > 1 else given


def _clamped_relu(call: Call) -> T:
    x = call.x
    return torch.where(x >= 0, x, call.float("alpha") * x).clamp(max=call.float("beta"))


# Two values in


def _two(made: Callable[[T, T], T]) -> Callable[[Call], T]:
    return lambda call: made(call.x, call.tensor("y"))


def _divided(x: T, y: T) -> T:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _select(call: Call) -> T:
    return torch.where(call.tensor("cond").bool(), call.tensor("a"), call.tensor("b"))


# Convolution and pooling


def _padding(call: Call, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Before and after each spatial axis, in their order."""
    kind = call.text("pad_type", "valid").lower()
    if kind == "valid":
        return [0] * 2 * len(kernel)
    if kind == "custom":
        return call.ints("pad", [0] * 2 * len(kernel))
    found = []
    for size, k, s, d in zip(call.x.shape[2:], kernel, strides, dilations, strict=True):
        total = max(0, s * math.ceil(size / s) - size + (k - 1) * d + 1 - s)
        less, more = total // 2, total - total // 2
        found += [less, more] if kind == "same" else [more, less]
    return found


def _around(pads: Sequence[int]) -> list[int]:
    """As torch wants them: the last axis first."""
    pairs = [pads[at : at + 2] for at in range(0, len(pads), 2)]
    return [one for pair in reversed(pairs) for one in pair]


def _conv(call: Call) -> T:
    x, weight = call.x, call.tensor("weight")
    axes = weight.ndim - 2
    strides, dilations = call.ints("strides", [1] * axes), call.ints("dilations", [1] * axes)
    pads = _padding(call, weight.shape[2:], strides, dilations)
    if pads[::2] != pads[1::2]:
        x, pads = F.pad(x, _around(pads)), [0] * 2 * axes
    made: Any = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    found: T = made(x, weight, call.maybe("bias"), strides, pads[::2], dilations, call.int("groups", 1))
    return found


def _conv_transpose(call: Call) -> T:
    x, weight = call.x, call.tensor("weight")
    axes = weight.ndim - 2
    strides, dilations = call.ints("strides", [1] * axes), call.ints("dilations", [1] * axes)
    made: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    full: T = made(x, weight, None, strides, 0, 0, call.int("groups", 1), dilations)
    kind = call.text("pad_type", "valid").lower()
    before = [0] * axes
    sizes = [int(one) for one in full.shape[2:]]
    if kind == "custom":
        pads = call.ints("pad", [0] * 2 * axes)
        before = pads[::2]
        sizes = [size - a - b for size, a, b in zip(sizes, pads[::2], pads[1::2], strict=True)]
    elif kind != "valid":
        wanted = [size * s for size, s in zip(x.shape[2:], strides, strict=True)]
        spare = [max(0, size - want) for size, want in zip(sizes, wanted, strict=True)]
        before = [one // 2 if kind == "same" else one - one // 2 for one in spare]
        sizes = wanted
    if "output_shape" in call.op.inputs:
        sizes = call.ints("output_shape")[2:]
    for axis, (start, size) in enumerate(zip(before, sizes, strict=True)):
        short = start + size - full.shape[axis + 2]
        if short > 0:  # an output that no input reaches is zero
            full = F.pad(full, [0, 0] * (axes - axis - 1) + [0, short])
        full = full.narrow(axis + 2, start, size)
    bias = call.maybe("bias")
    return full if bias is None else full + bias.reshape(-1, *[1] * axes)


def _pool(call: Call, *, most: bool, power: int = 1) -> T:
    """Of a maximum, or an average of powers."""
    kernel = call.ints("kernel_sizes")
    axes = len(kernel)
    strides = call.ints("strides", [1] * axes)
    pads = _padding(call, kernel, strides, [1] * axes)
    ceil = call.flag("ceil_mode")
    x = call.x
    even = pads[::2] == pads[1::2] and all(2 * pad <= k for pad, k in zip(pads[::2], kernel, strict=True))
    if most:
        if not even:
            x, pads = F.pad(x, _around(pads), value=-math.inf), [0] * 2 * axes
        maximum: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
        found: T = maximum(x, kernel, strides, pads[::2], 1, ceil)
        return found
    average: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    inside = call.flag("exclude_padding_from_average")
    if even:
        found = average(x**power if power > 1 else x, kernel, strides, pads[::2], ceil, not inside)
        return found
    ones = torch.ones_like(x[:1, :1])
    around = _around(pads)
    found = average(F.pad(x, around) ** power, kernel, strides, 0, ceil)
    return found / average(F.pad(ones, around), kernel, strides, 0, ceil) if inside else found


def _l2_pool(call: Call) -> T:
    return (_pool(call, most=False, power=2) * math.prod(call.ints("kernel_sizes"))).sqrt()


# Matrices


def _linear(call: Call) -> T:
    return F.linear(call.x, call.tensor("weight"), call.maybe("bias"))


def _matmul(call: Call) -> T:
    x, y = call.x, call.tensor("y")
    if call.flag("transpose_x"):
        x = x.transpose(-1, -2)
    return x @ (y.transpose(-1, -2) if call.flag("transpose_y") else y)


def _einsum(call: Call) -> T:
    found: T = torch.einsum(call.text("equation", ""), *call.tensors("values"))
    return found


def _attention(call: Call) -> T:
    query, key, value = call.tensor("query"), call.tensor("key"), call.tensor("value")
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    mask = call.maybe("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1) @ value


# Normalization


def _batch_norm(call: Call) -> T:
    mean, variance = call.tensor("mean"), call.tensor("variance")
    return F.batch_norm(
        call.x, mean, variance, call.maybe("gamma"), call.maybe("beta"), eps=call.float("epsilon", 1e-5)
    )


def _instance_norm(call: Call) -> T:
    return F.instance_norm(call.x, weight=call.maybe("gamma"), bias=call.maybe("beta"), eps=call.float("epsilon", 1e-5))


def _layer_norm(call: Call) -> T:
    x = call.x
    axes = sorted(axis % x.ndim for axis in call.ints("axes", range(x.ndim)))
    centred = x - x.mean(axes, keepdim=True)
    found = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + call.float("epsilon", 1e-5))
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    gamma, beta = call.maybe("gamma"), call.maybe("beta")
    if gamma is not None:
        found = found * gamma.reshape(shape)
    return found if beta is None else found + beta.reshape(shape)


def _l2_norm(call: Call) -> T:
    x = call.x
    return x / (x.square().sum((-3, -2, -1), keepdim=True) + call.float("epsilon", 1e-6)).sqrt()


def _local_response_norm(call: Call) -> T:
    alpha, beta = call.float("alpha", 1e-4), call.float("beta", 0.75)
    return F.local_response_norm(call.x, call.int("size"), alpha, beta, call.float("k", 1.0))


# Reductions


def _over(made: Callable[[T, list[int], bool], T]) -> Callable[[Call], T]:
    def reduce(call: Call) -> T:
        return made(call.x, call.ints("axes", range(call.x.ndim)), call.flag("keep_dims"))

    return reduce


def _product(x: T, axes: list[int], keep: bool) -> T:
    for axis in sorted((one % x.ndim for one in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _argument(which: Callable[..., T]) -> Callable[[Call], T]:
    return lambda call: which(call.x, dim=call.int("axis", -1), keepdim=call.flag("keep_dims"))


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
        return F.pad(x, _around(pads), value=call.float("constant_val", 0.0))
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


# Quantized activations


def _quantize(call: Call) -> T:
    x = call.tensor("input")
    scale, zero = _along(call, x, "scale"), _along(call, x, "zero_point")
    least, most = (0, 255) if call.text("output_dtype", "int8") == "uint8" else (-128, 127)
    return (torch.round(x / scale) + zero).clamp(least, most)


def _dequantize(call: Call) -> T:
    x = call.tensor("input").float()
    return (x - _along(call, x, "zero_point")) * _along(call, x, "scale")


def _along(call: Call, x: T, name: str) -> T:
    """A number for all of x, or one for each place of the axis."""
    given = call.maybe(name)
    if given is None:
        return torch.zeros(())
    shape = [-1 if at == call.int("axis", 0) % x.ndim else 1 for at in range(x.ndim)]
    return given.float().reshape(shape) if given.ndim else given.float()


def _cast_op(call: Call) -> T:
    return call.x  # to what the output is declared to be


OPS: Final[Mapping[str, Callable[[Call], T | list[T]]]] = {
    "abs": _one(torch.abs),
    "acos": _one(torch.acos),
    "asin": _one(torch.asin),
    "atan": _one(torch.atan),
    "atanh": _one(torch.atanh),
    "ceil": _one(torch.ceil),
    "cos": _one(torch.cos),
    "cosh": _one(torch.cosh),
    "erf": _one(torch.erf),
    "exp": _one(torch.exp),
    "exp2": _one(torch.exp2),
    "floor": _one(torch.floor),
    "identity": _one(lambda x: x),
    "logical_not": _one(torch.logical_not),
    "non_zero": _one(torch.nonzero),
    "relu": _one(torch.relu),
    "relu6": _one(F.relu6),
    "round": _one(torch.round),
    "shape": _one(lambda x: torch.tensor(x.shape, dtype=torch.int32)),
    "sigmoid": _one(torch.sigmoid),
    "sign": _one(torch.sign),
    "silu": _one(F.silu),
    "sin": _one(torch.sin),
    "sinh": _one(torch.sinh),
    "softplus": _one(F.softplus),
    "softsign": _one(F.softsign),
    "sqrt": _one(torch.sqrt),
    "square": _one(torch.square),
    "tan": _one(torch.tan),
    "tanh": _one(torch.tanh),
    "clamped_relu": _clamped_relu,
    "clip": lambda call: call.x.clamp(call.float("alpha"), call.float("beta")),
    "elu": lambda call: F.elu(call.x, call.float("alpha")),
    "gelu": _gelu,
    "inverse": lambda call: 1 / (call.x + call.float("epsilon", 1e-4)),
    "leaky_relu": lambda call: F.leaky_relu(call.x, call.float("alpha")),
    "linear_activation": lambda call: call.x * call.float("alpha") + call.float("beta"),
    "log": lambda call: torch.log(call.x + call.float("epsilon", 1e-45)),
    "prelu": lambda call: torch.where(call.x > 0, call.x, _per_channel(call, "alpha") * call.x),
    "rsqrt": lambda call: torch.rsqrt(call.x + call.float("epsilon", 1e-12)),
    "scaled_tanh": lambda call: call.float("alpha") * torch.tanh(call.float("beta") * call.x),
    "sigmoid_hard": lambda call: (call.float("alpha") * call.x + call.float("beta")).clamp(0, 1),
    "softmax": lambda call: torch.softmax(call.x, call.int("axis", -1)),
    "softplus_parametric": lambda call: _per_channel(call, "alpha") * F.softplus(_per_channel(call, "beta") * call.x),
    "threshold": lambda call: call.x.clamp(min=call.float("alpha")),
    "thresholded_relu": lambda call: torch.where(call.x >= call.float("alpha"), call.x, torch.zeros_like(call.x)),
    "add": _two(torch.add),
    "equal": _two(torch.eq),
    "floor_div": _two(lambda x, y: torch.div(x, y, rounding_mode="floor")),
    "greater": _two(torch.gt),
    "greater_equal": _two(torch.ge),
    "less": _two(torch.lt),
    "less_equal": _two(torch.le),
    "logical_and": _two(torch.logical_and),
    "logical_or": _two(torch.logical_or),
    "logical_xor": _two(torch.logical_xor),
    "maximum": _two(torch.maximum),
    "minimum": _two(torch.minimum),
    "mod": _two(torch.remainder),
    "mul": _two(torch.mul),
    "not_equal": _two(torch.ne),
    "pow": _two(torch.pow),
    "real_div": _two(_divided),
    "sub": _two(torch.sub),
    "select": _select,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "avg_pool": lambda call: _pool(call, most=False),
    "max_pool": lambda call: _pool(call, most=True),
    "l2_pool": _l2_pool,
    "linear": _linear,
    "matmul": _matmul,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "l2_norm": _l2_norm,
    "local_response_norm": _local_response_norm,
    "reduce_argmax": _argument(torch.argmax),
    "reduce_argmin": _argument(torch.argmin),
    "reduce_l1_norm": _over(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "reduce_l2_norm": _over(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "reduce_log_sum": _over(lambda x, axes, keep: x.sum(axes, keep).log()),
    "reduce_log_sum_exp": _over(lambda x, axes, keep: torch.logsumexp(x, axes, keep)),
    "reduce_max": _over(lambda x, axes, keep: x.amax(axes, keep)),
    "reduce_mean": _over(lambda x, axes, keep: x.mean(axes, keep)),
    "reduce_min": _over(lambda x, axes, keep: x.amin(axes, keep)),
    "reduce_prod": _over(_product),
    "reduce_sum": _over(lambda x, axes, keep: x.sum(axes, keep)),
    "reduce_sum_square": _over(lambda x, axes, keep: x.square().sum(axes, keep)),
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
    "cast": _cast_op,
    "cumsum": _cumsum,
    "dequantize": _dequantize,
    "fill": _fill,
    "fill_like": lambda call: torch.full(call.tensor("ref_tensor").shape, call.float("value", 0.0)),
    "one_hot": _one_hot,
    "quantize": _quantize,
    "range_1d": _range,
    "topk": _topk,
    "resize": _resize,
    "resize_bilinear": _resize_bilinear,
    "resize_nearest_neighbor": lambda call: _nearest(call.x, _targets(call)),
    "upsample_bilinear": _upsample_bilinear,
    "upsample_nearest_neighbor": lambda call: _nearest(call.x, _scaled(call)),
}
# Whose result holds numbers of the input alone, which need no rounding
EXACT: Final = frozenset(
    [
        "identity",
        "relu",
        "relu6",
        "max_pool",
        "gather",
        "gather_along_axis",
        "gather_nd",
        "concat",
        "depth_to_space",
        "expand_dims",
        "pixel_shuffle",
        "pixel_unshuffle",
        "reshape",
        "reverse",
        "slice_by_index",
        "slice_by_size",
        "slice_update",
        "sliding_windows",
        "space_to_depth",
        "split",
        "squeeze",
        "stack",
        "transpose",
        "tile",
        "reduce_max",
        "reduce_min",
        "maximum",
        "minimum",
        "select",
        "band_part",
    ]
)
