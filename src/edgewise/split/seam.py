"""A model in two halves, whatever it is made of: what a front half gives, and what both can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgewise.wire.feature import Container

Tensors = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Crossing:
    """What a front half gives: tensors to send, under a label that says what they are, and outputs that it has already.
    `raw_bytes` are those of what crosses as it lies in memory."""

    tensors: Tensors
    label: str
    raw_bytes: int
    early: Tensors = field(default_factory=dict)


class Split(Protocol):
    """A model in two halves, in this process. `opened` makes of what was received what `back` takes."""

    def front(self, x: Any) -> Crossing: ...

    def opened(self, received: Container) -> Any: ...

    def back(self, x: Any) -> Any: ...

    def joined(self, early: Tensors, late: Any) -> Any: ...

    def close(self) -> None: ...
