"""A GGUF file as a model source. Codes and scales are repacked bit by bit; no value changes beyond float32 rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.models import rope
from edgewise.models.blocks import Layer
from edgewise.models.card import Card, Rope
from edgewise.models.gguf import GGUF
from edgewise.models.tokenizer import write_from_gguf
from edgewise.models.weights import BLOCK, Dense, Matrix, Quantized, pack4
from edgewise.types import FloatArray, IdArray

LLAMACPP = (
    "run this file as it is with the llamacpp engine: edgewise ask --edge FILE.gguf (pip install 'edgewise[llamacpp]')"
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a GGUF architecture name means for the importer."""

    interleaved_rope: bool  # q and k rows are stored for rotation of neighbours; ours rotates halves


ARCHITECTURES = {
    "llama": Architecture(interleaved_rope=True),
    "qwen2": Architecture(interleaved_rope=False),
}
ROPE_SCALING = {  # field of `{architecture}.rope.scaling` to key of config.json; "" has no part in the frequencies
    "type": "",
    "finetuned": "",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
IGNORED_TENSORS = {"rope_freqs.weight"}  # read into the card


class GGUFSource:
    """Card, weights and tokenizer of a GGUF file. SourceError for damage, UnsupportedModel for what we cannot carry."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUF.open(path)
        self._used = set(IGNORED_TENSORS)
        name = self._field("general.architecture", str)
        if name not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise UnsupportedModel(
                f"the architecture {name!r} is not among those we can import ({known})", hint=LLAMACPP
            )
        self._prefix = name
        self._architecture = ARCHITECTURES[name]
        self.types = Counter(t.type for t in self._file.tensors.values() if len(t.shape) == 2)
        self._refuse_unknown_types()
        try:
            self.card = self._card()
        except (TypeError, ValueError, ArithmeticError) as e:
            raise SourceError(f"the fields of {path.name} make no model: {e}", hint="take another conversion") from e

    @property
    def licence_id(self) -> str | None:
        return self._optional("general.license", str)

    def write_tokenizer(self, directory: Path) -> None:
        write_from_gguf(self._file, directory)

    def embed(self) -> Matrix:
        return self._matrix("token_embd.weight", self.card.vocab, self.card.hidden)

    def head(self) -> Matrix | None:
        return None if self.card.tied else self._matrix("output.weight", self.card.vocab, self.card.hidden)

    def norm(self) -> FloatArray:
        return self._vector("output_norm.weight", self.card.hidden)

    def layer(self, n: int) -> Layer:
        card, at = self.card, f"blk.{n}"
        q_rows, kv_rows = card.heads * card.head_dim, card.kv_heads * card.head_dim
        turn_q, turn_k = self._halves(card.heads), self._halves(card.kv_heads)
        bias = None
        if card.qkv_bias:
            q, k, v = (
                self._vector(f"{at}.attn_{x}.bias", n) for x, n in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
            )
            bias = (q[turn_q], k[turn_k], v)
        return Layer(
            attention_norm=self._vector(f"{at}.attn_norm.weight", card.hidden),
            q=self._matrix(f"{at}.attn_q.weight", q_rows, card.hidden).rows(turn_q),
            k=self._matrix(f"{at}.attn_k.weight", kv_rows, card.hidden).rows(turn_k),
            v=self._matrix(f"{at}.attn_v.weight", kv_rows, card.hidden),
            o=self._matrix(f"{at}.attn_output.weight", card.hidden, q_rows),
            ffn_norm=self._vector(f"{at}.ffn_norm.weight", card.hidden),
            gate=self._matrix(f"{at}.ffn_gate.weight", card.ffn, card.hidden),
            up=self._matrix(f"{at}.ffn_up.weight", card.ffn, card.hidden),
            down=self._matrix(f"{at}.ffn_down.weight", card.hidden, card.ffn),
            qkv_bias=bias,
        )

    def finish(self) -> None:
        """Every tensor must have been used: one that was not means a model that is more than its card."""
        left = sorted(set(self._file.tensors) - self._used)
        if left:
            raise UnsupportedModel(
                f"the file holds {len(left)} tensors that we do not know: {', '.join(left[:4])} …", hint=LLAMACPP
            )

    def _card(self) -> Card:
        heads = self._count("attention.head_count")
        hidden = self._count("embedding_length")
        head_dim = self._count("attention.key_length", hidden // max(heads, 1))
        if self._count("expert_count", 0) > 0:
            raise UnsupportedModel("mixture-of-experts models are not supported", hint=LLAMACPP)
        if self._count("attention.value_length", head_dim) != head_dim:
            raise UnsupportedModel("keys and values of different size are not supported", hint=LLAMACPP)
        return Card(
            family=self._prefix,
            hidden=hidden,
            layers=self._count("block_count"),
            heads=heads,
            kv_heads=self._count("attention.head_count_kv", heads),
            head_dim=head_dim,
            ffn=self._count("feed_forward_length"),
            vocab=self._tensor_info("token_embd.weight").shape[0],
            context=self._count("context_length"),
            norm_eps=float(self._field(f"{self._prefix}.attention.layer_norm_rms_epsilon", float)),
            rope=self._rope(head_dim),
            tied="output.weight" not in self._file.tensors,
            qkv_bias="blk.0.attn_q.bias" in self._file.tensors,
        )

    def _rope(self, head_dim: int) -> Rope:
        p = self._prefix
        dims = self._count("rope.dimension_count", head_dim)
        theta = float(self._optional(f"{p}.rope.freq_base", float) or 10000.0)
        if "rope_freqs.weight" in self._file.tensors:
            return rope.from_factors(theta, dims, self._vector("rope_freqs.weight", dims // 2))
        scaling: dict[str, Any] = {"rope_type": self._optional(f"{p}.rope.scaling.type", str) or "default"}
        if scaling["rope_type"] == "none":
            scaling["rope_type"] = "default"
        for key, value in self._file.fields.items():
            name = key.removeprefix(f"{p}.rope.scaling.")
            if name != key and name not in ROPE_SCALING:
                raise UnsupportedModel(f"the RoPE scaling field {key!r} is not supported", hint=LLAMACPP)
            if name != key and ROPE_SCALING[name]:
                scaling[ROPE_SCALING[name]] = value
        if "attention_factor" in scaling:  # here it multiplies YaRN's own factor; in config.json it replaces it
            scaling["attention_factor"] *= rope.yarn_scale(float(scaling.get("factor", 1)))
        return rope.from_config(theta, dims, self._count("context_length"), scaling)

    def _halves(self, heads: int) -> IdArray:
        """The order that turns rows stored for rotation of neighbours (2i, 2i+1) into rows for rotation of halves."""
        rows = np.arange(heads * self.card.head_dim, dtype=np.int64)
        if not self._architecture.interleaved_rope:
            return rows
        return rows.reshape(heads, self.card.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    def _field(self, key: str, kind: Callable[[Any], T]) -> T:
        value = self._optional(key, kind)
        if value is None:
            raise SourceError(f"{self.path.name} lacks the field {key!r}", hint="take another conversion of this model")
        return value

    def _optional(self, key: str, kind: Callable[[Any], T]) -> T | None:
        value = self._file.fields.get(key)
        if value is None:
            return None
        try:
            return kind(value)
        except (TypeError, ValueError) as e:
            raise SourceError(f"the field {key!r} of {self.path.name} is {str(value)[:80]!r}, not a {kind}") from e

    def _count(self, key: str, default: int | None = None) -> int:
        full = f"{self._prefix}.{key}"
        value = self._file.fields.get(full)
        if isinstance(value, (list, np.ndarray)):
            raise UnsupportedModel(f"{full} differs between layers, which is not supported", hint=LLAMACPP)
        return self._field(full, int) if default is None else int(self._optional(full, int) or default)

    def _refuse_unknown_types(self) -> None:
        unknown = {t.type for t in self._file.tensors.values()} - set(_UNPACK)
        if unknown:
            known = ", ".join(_UNPACK)
            raise UnsupportedModel(
                f"weights of type {', '.join(sorted(unknown))} cannot be imported yet (known: {known})", hint=LLAMACPP
            )

    def _tensor_info(self, name: str) -> Any:
        if name not in self._file.tensors:
            raise SourceError(
                f"{self.path.name} lacks the tensor {name!r}", hint="take another conversion of this model"
            )
        return self._file.tensors[name]

    def _read(self, name: str, shape: tuple[int, ...]) -> Matrix:
        info = self._tensor_info(name)
        if tuple(info.shape) != shape:
            raise SourceError(f"the tensor {name!r} has shape {tuple(info.shape)}, the model's fields say {shape}")
        self._used.add(name)
        return _UNPACK[info.type](self._file.raw(name), (-1, shape[-1]))

    def _matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        return self._read(name, (outputs, inputs))

    def _vector(self, name: str, size: int) -> FloatArray:
        return self._read(name, (size,)).dense().reshape(size)


Bytes = npt.NDArray[np.uint8]


def _dense(dtype: npt.DTypeLike) -> Callable[[Bytes, tuple[int, int]], Matrix]:
    return lambda raw, shape: Dense(raw.view(dtype).reshape(shape))


def _half(raw: Bytes) -> FloatArray:
    """float16 stored in the last axis' two bytes, as float32."""
    return np.asarray(np.ascontiguousarray(raw).view(np.float16)[..., 0], dtype=np.float32)


def _codes4(raw: Bytes) -> Bytes:
    """ggml keeps element i in the low half and i + 16 in the high half of byte i; MatMulNBits wants neighbours."""
    return pack4(np.concatenate([raw & 15, raw >> 4], axis=-1))


def _blocks(raw: Bytes, shape: tuple[int, int], size: int) -> Bytes:
    return raw.reshape(-1, shape[1] // BLOCK, size)


def _q4_0(raw: Bytes, shape: tuple[int, int]) -> Matrix:
    blocks = _blocks(raw, shape, 18)
    return Quantized(4, _codes4(blocks[..., 2:]), _half(blocks[..., :2]))


def _q4_1(raw: Bytes, shape: tuple[int, int]) -> Matrix:
    blocks = _blocks(raw, shape, 20)
    scales = _half(blocks[..., :2])
    return Quantized(4, _codes4(blocks[..., 4:]), scales, _half(blocks[..., 2:4]) + 8 * scales)


def _q8_0(raw: Bytes, shape: tuple[int, int]) -> Matrix:
    blocks = _blocks(raw, shape, 34)
    codes = np.bitwise_xor(blocks[..., 2:], 128, dtype=np.uint8)  # int8 + 128, as bits
    return Quantized(8, codes, _half(blocks[..., :2]))


_UNPACK: dict[str, Callable[[Bytes, tuple[int, int]], Matrix]] = {
    "F32": _dense(np.float32),
    "F16": _dense(np.float16),
    "BF16": _dense(ml_dtypes.bfloat16),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
