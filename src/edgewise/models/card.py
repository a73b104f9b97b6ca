"""What a model is, as numbers: shapes, norms, rotary frequencies. The differences between families are fields here;
no other file asks for a family's name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

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


Activation = Literal["silu", "gelu_tanh"]
QKNorm = Literal["none", "head", "whole"]
ROTATED_MULTIPLE = 16  # the attention kernel turns dimensions in groups of that many


@dataclass(frozen=True, slots=True)
class Card:
    """A decoder-only transformer: gated feed-forward, grouped-query attention, RMS norms around them.

    Layers differ in two ways: how far they look back (`windows`) and how they turn (`local_rope`, `unrotated`).
    """

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
    activation: Activation = "silu"
    pre_norm: bool = True  # norms of what attention and feed-forward read
    post_norm: bool = False  # norms of what they add to the hidden state
    qk_norm: QKNorm = "none"  # queries and keys normalized before they turn: each head's own, or all heads as one
    windows: tuple[int, ...] = ()  # per layer, the positions it sees, its own included; 0 = all. Empty = all layers all
    local_rope: Rope | None = None  # of the layers with a window, where theirs is another one
    unrotated: tuple[int, ...] = ()  # the layers without rotary embedding
    attention_scale: float | None = None  # on queries · keys; None = 1 / sqrt(head_dim)
    attention_cap: float = 0.0  # scores become cap * tanh(scores / cap); 0 = no cap
    logit_cap: float = 0.0  # likewise for the logits
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # on what attention and feed-forward add to the hidden state
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_numbers()
        self._check_layers()
        if self.activation not in get_args(Activation) or self.qk_norm not in get_args(QKNorm):
            raise BundleError(f"the model card has activation {self.activation!r} and qk_norm {self.qk_norm!r}")
        if self.heads % self.kv_heads:
            raise BundleError(f"{self.heads} heads cannot share {self.kv_heads} kv heads evenly")
        for rope in self.ropes.values():
            turned = 2 * len(rope.inverse_frequencies)
            if turned > self.head_dim or turned % ROTATED_MULTIPLE:
                raise BundleError(
                    f"the rotary embedding turns {turned} of {self.head_dim} dimensions; multiples of "
                    f"{ROTATED_MULTIPLE} up to {self.head_dim} can be turned",
                    hint="run the GGUF with the llamacpp engine",
                )

    def _check_sizes(self) -> None:
        sizes = {
            n: getattr(self, n)
            for n in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context")
        }
        bad = {name: size for name, size in sizes.items() if type(size) is not int or not 0 < size < 1 << 31}
        if bad:
            raise BundleError(f"the model card has impossible sizes: {bad}", hint="sizes are whole numbers above 0")

    def _check_numbers(self) -> None:
        turning = [x for rope in self.ropes.values() for x in (rope.attention_factor, *rope.inverse_frequencies)]
        numbers = (self.norm_eps, self.attention_cap, self.logit_cap, *turning)
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise BundleError("the norm's epsilon, a cap or the rotary frequencies are not finite numbers of 0 or more")
        scales = (self.attention_scale or 1.0, self.embedding_scale, self.residual_scale, self.logit_scale)
        if not all(math.isfinite(scale) and scale > 0 for scale in scales):
            raise BundleError(f"the model card has the scales {scales}; finite numbers above 0 are needed")

    def _check_layers(self) -> None:
        if self.windows and len(self.windows) != self.layers:
            raise BundleError(f"the model card has windows for {len(self.windows)} of {self.layers} layers")
        if not all(type(window) is int and 0 <= window < 1 << 31 for window in self.windows):
            raise BundleError(f"the model card has the windows {self.windows}; whole numbers of 0 or more are needed")
        if not all(type(layer) is int and 0 <= layer < self.layers for layer in self.unrotated):
            raise BundleError(f"the model card names layers {self.unrotated} of 0..{self.layers - 1} as unrotated")

    @property
    def ropes(self) -> dict[str, Rope]:
        """Each rope under the prefix that the graphs' `cos` and `sin` inputs have for it."""
        return {"": self.rope} if self.local_rope is None else {"": self.rope, "local_": self.local_rope}

    def window(self, layer: int) -> int:
        """Positions that the layer sees, its own included; 0 = all."""
        return self.windows[layer] if self.windows else 0

    def rope_of(self, layer: int) -> str | None:
        """The key in `ropes` of the layer's rope; None if it does not turn."""
        if layer in self.unrotated:
            return None
        return "local_" if self.local_rope is not None and self.window(layer) else ""

    @property
    def qk_norm_sizes(self) -> tuple[int, int] | None:
        """How many scales the norms of queries and of keys have."""
        if self.qk_norm == "none":
            return None
        heads = (1, 1) if self.qk_norm == "head" else (self.heads, self.kv_heads)
        return heads[0] * self.head_dim, heads[1] * self.head_dim

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that keys and values of one position are; their size is the runtime's affair."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        """Fields that have their default are left out: readers of before a field take all models that do without it."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Card:
        try:
            local = data.get("local_rope")
            values = {
                **data,
                "rope": _rope(data["rope"]),
                "local_rope": None if local is None else _rope(local),
                "windows": tuple(data.get("windows", ())),
                "unrotated": tuple(data.get("unrotated", ())),
            }
            return Card(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise BundleError(f"the model card is not readable: {e}", hint="pull the model again") from e


def alternating(layers: int, step: int) -> tuple[bool, ...]:
    """True per layer, False for each `step`-th (0 = for none)."""
    return tuple(step == 0 or (n + 1) % step != 0 for n in range(layers))


def _rope(data: Mapping[str, Any]) -> Rope:
    return Rope(tuple(map(float, data["inverse_frequencies"])), float(data["attention_factor"]))
