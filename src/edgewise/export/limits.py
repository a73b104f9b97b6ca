"""What a step of an export may take, and is given, where nobody says otherwise; light, so that flags read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

THREADS: Final = 2
MAX_TOKENS: Final = 128  # to which texts are padded


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one step, its process and what that starts."""

    seconds: float = 1800
    memory_gb: float = 12  # 10⁹ bytes each

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 1e9


BOUNDS: Final = Bounds()
