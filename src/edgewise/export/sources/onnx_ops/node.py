"""What an operator knows of its node, and the table of those that can be computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from edgewise.errors import UnsupportedModel

Array = npt.NDArray[Any]
Tensor = torch.Tensor
Computed = Callable[..., Any]  # (node, *inputs) -> one output, or a tuple of them

WAY_OUT: Final = "export it from its own framework to this target, or take --to onnx, tensorrt or qnn, which read ONNX"

DTYPES: Final = {  # by ONNX's number of a type
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    12: torch.uint32,
    13: torch.uint64,
    16: torch.bfloat16,
    21: torch.uint8,  # numbers of four and of two bits have no type of their own in torch; they fit these
    22: torch.int8,
    25: torch.uint8,
    26: torch.int8,
}


@dataclass(frozen=True, slots=True)
class Node:
    """`version` is of the operator set, `outputs` how many outputs it names, `stored` which inputs the file holds."""

    name: str
    op: str
    attributes: Mapping[str, Any]
    version: int
    outputs: int = 1
    stored: frozenset[int] = frozenset()

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def refused(self, why: str, hint: str = WAY_OUT) -> UnsupportedModel:
        return UnsupportedModel(f"node {self.name!r} ({self.op}): {why}", hint=hint)

    def dtype(self, number: int) -> torch.dtype:
        if number not in DTYPES:
            raise self.refused(f"torch has no numbers of ONNX's type {number}")
        return DTYPES[number]


@dataclass(frozen=True, slots=True)
class Operator:
    """`host` are inputs that come as numpy arrays, known before anything is computed; `either` those that come as such
    if they are known, and as tensors if not; all others are tensors."""

    compute: Computed
    host: frozenset[int]
    either: frozenset[int]


OPERATORS: Final[dict[str, Operator]] = {}


def operator(*names: str, host: tuple[int, ...] = (), either: tuple[int, ...] = ()) -> Callable[[Computed], Computed]:
    def entered(compute: Computed) -> Computed:
        for name in names:
            OPERATORS[name] = Operator(compute, frozenset(host), frozenset(either))
        return compute

    return entered


def whole(array: Array) -> list[Any]:
    """As Python's numbers, or torch's where the array holds an axis whose length is left open."""
    return list(array.reshape(-1).tolist())


def axes_of(node: Node, given: Array | None, name: str = "axes") -> list[int] | None:
    """Axes were an attribute in older operator sets and are an input in newer ones."""
    if given is not None:
        return [int(axis) for axis in whole(given)]
    found = node.get(name)
    return None if found is None else list(found)


def constant(array: Array, like: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of our own making as a tensor; one that holds an open length is put together of scalars."""
    if array.dtype == object:
        values = [torch.scalar_tensor(value, dtype=dtype or torch.int64) for value in whole(array)]
        return torch.stack(values).reshape(array.shape) if values else torch.zeros(array.shape, dtype=torch.int64)
    made = torch.tensor(np.array(array))
    return made if like is None and dtype is None else made.to(dtype or like.dtype)  # type: ignore[union-attr]
