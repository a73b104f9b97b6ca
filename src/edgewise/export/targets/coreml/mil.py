"""What a Core ML program computes, by our own reading of it: each operator as coremltools' reference of MIL describes
it, done by torch on this machine's CPU.

Where an operator's result is declared float16 it is rounded to float16, so what is too large becomes infinite. Inside
an operator (the sums of a convolution, a softmax) everything is float32. That is kinder than a Neural Engine, which
keeps some of these sums in fewer bits; whatever overflows here overflows there.

A program whose operators are not all known here is refused as a whole, and the unknown ones are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.export.targets.coreml.mil_call import INT32_MAX, Call, T
from edgewise.export.targets.coreml.mil_numbers import NUMBERS
from edgewise.export.targets.coreml.mil_places import PLACES
from edgewise.export.targets.coreml.weights import Function, Kind, Op

Array = npt.NDArray[Any]
State = dict[str, T]
Watch = Callable[[Op, str, T], None]

FLOATS: Final = ("float16", "float32", "float64")
OPS: Final = {**NUMBERS, **PLACES}
EXACT: Final = frozenset(  # whose result holds numbers of the input alone, which need no rounding
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
