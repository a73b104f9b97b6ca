"""What a model is, as numbers: shapes, norms, rotary frequencies. The differences between families are fields here;
no other file asks for a family's name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgewise.errors import BundleError
from edgewise.types import FloatArray


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, halves layout (element i turns with element i + dims/2).

    Every static scaling (linear, llama3, yarn) ends in other frequencies and a factor on cos and sin, so the
    frequencies themselves are kept: `inverse_frequencies` float32 [dims / 2], radians per position.
    """

    inverse_frequencies: tuple[float, ...]
    attention_factor: float = 1.0

    def tables(self, positions: int) -> tuple[FloatArray, FloatArray]:
        """cos and sin, float32 [positions, dims / 2]."""
        angles = np.outer(
            np.arange(positions, dtype=np.float32), np.asarray(self.inverse_frequencies, dtype=np.float32)
        )
        factor = np.float32(self.attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor


@dataclass(frozen=True, slots=True)
class Card:
    """A decoder-only transformer: pre-norm, gated feed-forward, grouped-query attention."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int  # positions the model was trained for
    norm_eps: float
    rope: Rope
    tied: bool  # the head is the embedding table
    qkv_bias: bool = False
    attention_out_bias: bool = False
    ffn_bias: bool = False

    def __post_init__(self) -> None:
        sizes = {
            n: getattr(self, n)
            for n in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context")
        }
        bad = {name: size for name, size in sizes.items() if type(size) is not int or not 0 < size < 1 << 31}
        if bad:
            raise BundleError(f"the model card has impossible sizes: {bad}", hint="sizes are whole numbers above 0")
        numbers = (self.norm_eps, self.rope.attention_factor, *self.rope.inverse_frequencies)
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise BundleError("the norm's epsilon or the rotary frequencies are not finite numbers of 0 or more")
        if self.heads % self.kv_heads:
            raise BundleError(f"{self.heads} heads cannot share {self.kv_heads} kv heads evenly")
        if len(self.rope.inverse_frequencies) * 2 != self.head_dim:
            raise BundleError(
                f"the rotary embedding turns {2 * len(self.rope.inverse_frequencies)} of {self.head_dim} dimensions",
                hint="partial rotary embedding is not supported yet; run the GGUF with the llamacpp engine",
            )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of float32 keys and values that one position takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 4

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Card:
        try:
            rope = data["rope"]
            fields = {
                **data,
                "rope": Rope(tuple(map(float, rope["inverse_frequencies"])), float(rope["attention_factor"])),
            }
            return Card(**fields)
        except (KeyError, TypeError, ValueError) as e:
            raise BundleError(f"the model card is not readable: {e}", hint="pull the model again") from e
