"""A GGUF file as a model source. Codes and scales are repacked bit by bit; no value changes beyond float32 rounding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.models import rope
from edgewise.models.blocks import Layer
from edgewise.models.card import Activation, Card, QKNorm, Rope, alternating
from edgewise.models.ggml_types import KNOWN, unpack
from edgewise.models.gguf import GGUF
from edgewise.models.model_source import ModelSource
from edgewise.models.tokenizer_writer import write_from_gguf
from edgewise.models.weights import Dense, Matrix, split
from edgewise.types import FloatArray, IdArray

LLAMACPP = (
    "run this file as it is with the llamacpp engine: edgewise ask --edge FILE.gguf (pip install 'edgewise[llamacpp]')"
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a GGUF architecture name means where the file's fields do not say it.

    `full_step`: each so many-th layer sees all positions, the others a window, if the file has one; 0 = all layers have
    the window, None = such a file is not known. `width_scaled`: the count of layers of the one published size whose
    scores are scaled by hidden / heads in place of the head's size.
    """

    interleaved_rope: bool = False  # q and k rows are stored for rotation of neighbours; ours rotates halves
    activation: Activation = "silu"
    full_step: int | None = None
    local_theta: float | None = None  # of the rope of layers with a window
    unrotated_step: int = 0  # each so many-th layer does not turn
    embedding_root_scale: bool = False  # embeddings are scaled by sqrt(hidden)
    width_scaled: int = 0


ARCHITECTURES = {
    "llama": Architecture(interleaved_rope=True, full_step=0),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma2": Architecture(activation="gelu_tanh", full_step=2, embedding_root_scale=True, width_scaled=46),
    "gemma3": Architecture(
        activation="gelu_tanh", full_step=6, local_theta=10000.0, embedding_root_scale=True, width_scaled=62
    ),
    "phi3": Architecture(full_step=0),
    "granite": Architecture(interleaved_rope=True),
    "olmo2": Architecture(),
    "smollm3": Architecture(interleaved_rope=True, unrotated_step=4),
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


class GGUFSource(ModelSource):
    """Card, weights and tokenizer of a GGUF file. SourceError for damage, UnsupportedModel for what we cannot carry."""

    kind = "gguf"
    otherwise = LLAMACPP

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = GGUF.open(path)
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
        q, k, v = self._matrices(at, {"attn_q": q_rows, "attn_k": kv_rows, "attn_v": kv_rows}, "attn_qkv")
        gate, up = self._matrices(at, {"ffn_gate": card.ffn, "ffn_up": card.ffn}, "ffn_up")
        bias = None
        if card.qkv_bias:
            q_bias, k_bias, v_bias = (
                self._vector(f"{at}.attn_{x}.bias", n) for x, n in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
            )
            bias = (q_bias[turn_q], k_bias[turn_k], v_bias)
        return Layer(
            attention_norm=self._norm(f"{at}.attn_norm", card.pre_norm),
            q=q.rows(turn_q),
            k=k.rows(turn_k),
            v=v,
            o=self._matrix(f"{at}.attn_output.weight", card.hidden, q_rows),
            ffn_norm=self._norm(f"{at}.ffn_norm", card.pre_norm),
            gate=gate,
            up=up,
            down=self._matrix(f"{at}.ffn_down.weight", card.hidden, card.ffn),
            qkv_bias=bias,
            qk_norm=self._qk_norms(at),
            attention_out_norm=self._norm(f"{at}.post_attention_norm", card.post_norm),
            ffn_out_norm=self._norm(f"{at}.post_ffw_norm", card.post_norm),
        )

    def _matrices(self, at: str, outputs: Mapping[str, int], fused: str) -> list[Matrix]:
        """The matrices of those names over the hidden state, which some architectures store as one."""
        hidden = self.card.hidden
        if (
            f"{at}.{next(iter(outputs))}.weight" not in self._file.tensors
            and f"{at}.{fused}.weight" in self._file.tensors
        ):
            return split(self._matrix(f"{at}.{fused}.weight", sum(outputs.values()), hidden), outputs.values())
        return [self._matrix(f"{at}.{name}.weight", size, hidden) for name, size in outputs.items()]

    def _norm(self, name: str, there: bool) -> FloatArray | None:
        return self._vector(f"{name}.weight", self.card.hidden) if there else None

    def _qk_norms(self, at: str) -> tuple[FloatArray, FloatArray] | None:
        if (sizes := self.card.qk_norm_sizes) is None:
            return None
        return self._vector(f"{at}.attn_q_norm.weight", sizes[0]), self._vector(f"{at}.attn_k_norm.weight", sizes[1])

    def _tensors(self) -> set[str]:
        return set(self._file.tensors) - IGNORED_TENSORS

    def _card(self) -> Card:
        arch, heads = self._architecture, self._count("attention.head_count")
        hidden, layers = self._count("embedding_length"), self._count("block_count")
        head_dim = self._count("attention.key_length", hidden // max(heads, 1))
        if self._count("expert_count", 0) > 0:
            raise UnsupportedModel("mixture-of-experts models are not supported", hint=LLAMACPP)
        if self._count("attention.value_length", head_dim) != head_dim:
            raise UnsupportedModel("keys and values of different size are not supported", hint=LLAMACPP)
        tensors = self._file.tensors
        return Card(
            family=self._prefix,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=self._count("attention.head_count_kv", heads),
            head_dim=head_dim,
            ffn=self._count("feed_forward_length"),
            vocab=self._tensor_info("token_embd.weight").shape[0],
            context=self._count("context_length"),
            norm_eps=float(self._field(f"{self._prefix}.attention.layer_norm_rms_epsilon", float)),
            rope=self._rope(head_dim),
            tied="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            activation=arch.activation,
            pre_norm="blk.0.attn_norm.weight" in tensors,
            post_norm="blk.0.post_attention_norm.weight" in tensors,
            qk_norm=self._qk_norm(head_dim),
            windows=self._windows(layers),
            local_rope=self._local_rope(head_dim),
            unrotated=tuple(n for n, turned in enumerate(alternating(layers, arch.unrotated_step)) if not turned),
            attention_scale=self._attention_scale(layers, hidden / max(heads, 1)),
            attention_cap=self._number("attn_logit_softcapping", 0.0),
            logit_cap=self._number("final_logit_softcapping", 0.0),
            embedding_scale=math.sqrt(hidden) if arch.embedding_root_scale else self._number("embedding_scale", 1.0),
            residual_scale=self._number("residual_scale", 1.0),
            logit_scale=1 / self._number("logit_scale", 1.0),
        )

    def _qk_norm(self, head_dim: int) -> QKNorm:
        norm = self._file.tensors.get("blk.0.attn_q_norm.weight")
        if norm is None:
            return "none"
        return "head" if norm.shape == (head_dim,) else "whole"

    def _attention_scale(self, layers: int, width: float) -> float | None:
        if layers == self._architecture.width_scaled:
            return 1 / math.sqrt(width)
        return self._optional(f"{self._prefix}.attention.scale", float)

    def _windows(self, layers: int) -> tuple[int, ...]:
        window = self._count("attention.sliding_window", 0)
        if not window:
            return ()
        key = f"{self._prefix}.attention.sliding_window_pattern"
        pattern = self._file.fields.get(key, self._architecture.full_step)
        if isinstance(pattern, np.ndarray):
            return tuple(window if slides else 0 for slides in pattern.tolist())
        if pattern is None:
            raise UnsupportedModel(
                f"{self.path.name} has an attention window of {window}, but not which layers have it", hint=LLAMACPP
            )
        return tuple(window if slides else 0 for slides in alternating(layers, int(str(pattern))))

    def _local_rope(self, head_dim: int) -> Rope | None:
        theta = self._number("rope.freq_base_swa", self._architecture.local_theta or 0.0)
        return rope.from_config(theta, self._count("rope.dimension_count", head_dim), 0, None) if theta else None

    def _rope(self, head_dim: int) -> Rope:
        p = self._prefix
        dims = self._count("rope.dimension_count", head_dim)
        if dims != head_dim and self._architecture.interleaved_rope:
            raise UnsupportedModel(f"turning {dims} of {head_dim} dimensions is not supported in {p!r}", hint=LLAMACPP)
        if "rope_factors_long.weight" in self._file.tensors:
            raise UnsupportedModel("RoPE scaling of kind 'longrope' is not supported", hint=LLAMACPP)
        theta = self._number("rope.freq_base", 10000.0)
        if "rope_freqs.weight" in self._file.tensors:
            return rope.from_factors(theta, dims, self._vector("rope_freqs.weight", dims // 2))
        return rope.from_config(theta, dims, self._count("context_length"), self._rope_scaling())

    def _rope_scaling(self) -> dict[str, Any]:
        """The fields of the scaling under their names in config.json."""
        p = self._prefix
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
        return scaling

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

    def _number(self, key: str, default: float) -> float:
        value = self._optional(f"{self._prefix}.{key}", float)
        return default if value is None else value

    def _refuse_unknown_types(self) -> None:
        unknown = {t.type for t in self._file.tensors.values()} - set(KNOWN)
        if unknown:
            known = ", ".join(KNOWN)
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
        if self._rehearsing and len(shape) == 2:
            return Dense(np.empty((shape[0], 0), dtype=np.float32))
        return unpack(info, self._file.raw(name))

    def _matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        return self._read(name, (outputs, inputs))

    def _vector(self, name: str, size: int) -> FloatArray:
        return self._read(name, (size,)).dense().reshape(size)
