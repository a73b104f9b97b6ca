"""One operator of a MIL program with its inputs at hand: what the functions of mil_numbers.py and mil_places.py get."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from edgewise.errors import SourceError
from edgewise.export.targets.coreml.weights import Op

T = torch.Tensor

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


def torch_padding(pads: Sequence[int]) -> list[int]:
    """As torch wants them: the last axis first."""
    pairs = [pads[at : at + 2] for at in range(0, len(pads), 2)]
    return [one for pair in reversed(pairs) for one in pair]
