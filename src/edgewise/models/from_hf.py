"""A Hugging Face directory (config.json + safetensors) as a model source."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.models import rope
from edgewise.models.blocks import Layer
from edgewise.models.card import Activation, Card, QKNorm, Rope, alternating
from edgewise.models.licence import declared
from edgewise.models.model_source import ModelSource
from edgewise.models.tokenizer_writer import write_from_hf
from edgewise.models.weights import Dense, Matrix, split
from edgewise.types import FloatArray

TYPES = {"F32", "F16", "BF16"}
LAYER_TYPES = {"full_attention", "sliding_attention"}
LLAMACPP = "convert it to GGUF and run that with the llamacpp engine (pip install 'edgewise[llamacpp]')"
IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that old checkpoints saved


Norms = tuple[str | None, str | None, str | None, str | None]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
PRE_NORMS: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
POST_NORMS: Norms = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
ALL_NORMS: Norms = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` means where config.json does not say it.

    `defaults` stand for keys that config.json leaves out (an explicit null stays a null). `norms` are the names of the
    norms before and after attention, before and after the feed-forward; `norm_offset` is added to their scales.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    norms: Norms = PRE_NORMS
    norm_offset: float = 0.0
    qk_norm: QKNorm = "none"
    fused: bool = False  # q, k and v are one matrix, gate and up another
    embedding_root_scale: bool = False  # embeddings are scaled by sqrt(hidden)


_WINDOWS_ON_REQUEST = {"use_sliding_window": False, "max_window_layers": 28}
_GEMMA = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
FAMILIES = {
    "llama": Family(),
    "mistral": Family({"sliding_window": 4096}),
    "qwen2": Family(_WINDOWS_ON_REQUEST, qkv_bias=True),
    "qwen3": Family({"head_dim": 128, **_WINDOWS_ON_REQUEST}, qk_norm="head"),
    "gemma2": Family(
        {**_GEMMA, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        norms=ALL_NORMS,
        norm_offset=1.0,
        embedding_root_scale=True,
    ),
    "gemma3_text": Family(
        {**_GEMMA, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        norms=ALL_NORMS,
        norm_offset=1.0,
        qk_norm="head",
        embedding_root_scale=True,
    ),
    "phi3": Family(fused=True),
    "granite": Family(),
    "olmo2": Family({"rms_norm_eps": 1e-5}, norms=POST_NORMS, qk_norm="whole"),
    "smollm3": Family({"use_sliding_window": False, "tie_word_embeddings": True, "no_rope_layer_interval": 4}),
}


class HuggingFaceSource(ModelSource):
    """Card, weights and tokenizer of a checkpoint directory. SourceError for damage, UnsupportedModel for what we
    cannot carry."""

    kind = "huggingface"
    otherwise = LLAMACPP

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._config = _read_json(path / "config.json")
        self._family_name = str(self._config.get("model_type"))
        if self._family_name not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            raise UnsupportedModel(
                f"the model type {self._family_name!r} is not among those we can import ({known})", hint=LLAMACPP
            )
        self._family = FAMILIES[self._family_name]
        self._config = {**self._family.defaults, **self._config}
        self._refuse_unsupported()
        self._files = self._index()
        try:
            self.card = self._card()
        except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
            raise SourceError(f"config.json of {path.name} holds a value that makes no model: {e}") from e
        self.types: Counter[str] = Counter()

    @property
    def licence_id(self) -> str | None:
        return declared(self.path)

    def write_tokenizer(self, directory: Path) -> None:
        write_from_hf(self.path, directory)

    def embed(self) -> Matrix:
        return self._matrix("model.embed_tokens.weight", self.card.vocab, self.card.hidden)

    def head(self) -> Matrix | None:
        if self.card.tied:
            self._used.add("lm_head.weight")  # some checkpoints store the shared table twice
            return None
        return self._matrix("lm_head.weight", self.card.vocab, self.card.hidden)

    def norm(self) -> FloatArray:
        return self._scales("model.norm.weight", self.card.hidden)

    def layer(self, n: int) -> Layer:
        card, at = self.card, f"model.layers.{n}"
        attention, ffn = f"{at}.self_attn", f"{at}.mlp"
        q_rows, kv_rows = card.heads * card.head_dim, card.kv_heads * card.head_dim
        q, k, v = self._matrices(attention, {"q": q_rows, "k": kv_rows, "v": kv_rows}, "qkv")
        gate, up = self._matrices(ffn, {"gate": card.ffn, "up": card.ffn}, "gate_up")
        norms = [
            None if name is None else self._scales(f"{at}.{name}.weight", card.hidden) for name in self._family.norms
        ]
        qkv_bias = gate_up_bias = o_bias = down_bias = None
        if card.qkv_bias:
            q_bias, k_bias, v_bias = (
                self._vector(f"{attention}.{x}_proj.bias", s)
                for x, s in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
            )
            qkv_bias = (q_bias, k_bias, v_bias)
        if card.attention_out_bias:
            o_bias = self._vector(f"{attention}.o_proj.bias", card.hidden)
        if card.ffn_bias:
            gate_up_bias = (
                self._vector(f"{ffn}.gate_proj.bias", card.ffn),
                self._vector(f"{ffn}.up_proj.bias", card.ffn),
            )
            down_bias = self._vector(f"{ffn}.down_proj.bias", card.hidden)
        return Layer(
            attention_norm=norms[0],
            q=q,
            k=k,
            v=v,
            o=self._matrix(f"{attention}.o_proj.weight", card.hidden, q_rows),
            ffn_norm=norms[2],
            gate=gate,
            up=up,
            down=self._matrix(f"{ffn}.down_proj.weight", card.hidden, card.ffn),
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            qk_norm=self._qk_norm(attention),
            attention_out_norm=norms[1],
            ffn_out_norm=norms[3],
        )

    def _matrices(self, at: str, outputs: Mapping[str, int], fused: str) -> list[Matrix]:
        """The matrices of those names over the hidden state, which some families store as one."""
        hidden = self.card.hidden
        if self._family.fused:
            return split(self._matrix(f"{at}.{fused}_proj.weight", sum(outputs.values()), hidden), outputs.values())
        return [self._matrix(f"{at}.{name}_proj.weight", size, hidden) for name, size in outputs.items()]

    def _qk_norm(self, attention: str) -> tuple[FloatArray, FloatArray] | None:
        if (sizes := self.card.qk_norm_sizes) is None:
            return None
        q_size, k_size = sizes
        return self._scales(f"{attention}.q_norm.weight", q_size), self._scales(f"{attention}.k_norm.weight", k_size)

    def _tensors(self) -> set[str]:
        return {name for name in self._files if not IGNORED_TENSORS.search(name)}

    def _refuse_unsupported(self) -> None:
        c = self._config
        if c.get("quantization_config"):
            raise UnsupportedModel(
                "the checkpoint is quantized already", hint="take the float16 or bfloat16 one, or a GGUF"
            )
        if self._activation() not in ACTIVATIONS:
            raise UnsupportedModel(
                f"the activation {self._activation()!r} is not supported (known: {', '.join(ACTIVATIONS)})",
                hint=LLAMACPP,
            )
        if c.get("use_bidirectional_attention"):
            raise UnsupportedModel("attention to later positions is not supported", hint=LLAMACPP)

    def _activation(self) -> str:
        return str(self._config.get("hidden_activation") or self._config.get("hidden_act", "silu"))

    def _card(self) -> Card:
        c, family = self._config, self._family
        heads, hidden, layers = (self._count(k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        attention_bias = bool(c.get("attention_bias", False))
        tied = bool(c.get("tie_word_embeddings", False))
        if not tied and "lm_head.weight" not in self._files:
            raise SourceError("the checkpoint has no lm_head.weight, and its config does not tie it to the embedding")
        head_dim = int(c.get("head_dim") or hidden // max(heads, 1))
        rope, local_rope = self._ropes(head_dim)
        return Card(
            family=self._family_name,
            hidden=hidden,
            layers=layers,
            heads=heads,
            kv_heads=int(c.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            ffn=self._count("intermediate_size"),
            vocab=self._count("vocab_size"),
            context=self._count("max_position_embeddings"),
            norm_eps=float(c.get("rms_norm_eps", 1e-6)),
            rope=rope,
            tied=tied,
            qkv_bias=family.qkv_bias or attention_bias,
            attention_out_bias=attention_bias and not family.qkv_bias,
            ffn_bias=bool(c.get("mlp_bias", False)),
            activation=ACTIVATIONS[self._activation()],
            pre_norm=family.norms[0] is not None,
            post_norm=family.norms[1] is not None,
            qk_norm=family.qk_norm,
            windows=self._windows(layers),
            local_rope=local_rope,
            unrotated=self._unrotated(layers),
            attention_scale=self._attention_scale(),
            attention_cap=float(c.get("attn_logit_softcapping") or 0),
            logit_cap=float(c.get("final_logit_softcapping") or 0),
            embedding_scale=float(
                math.sqrt(hidden) if family.embedding_root_scale else c.get("embedding_multiplier", 1)
            ),
            residual_scale=float(c.get("residual_multiplier", 1)),
            logit_scale=1 / float(c.get("logits_scaling", 1)),
        )

    def _attention_scale(self) -> float | None:
        if (size := self._config.get("query_pre_attn_scalar")) is not None:
            return 1 / math.sqrt(size)
        scale = self._config.get("attention_multiplier")
        return None if scale is None else float(scale)

    def _windows(self, layers: int) -> tuple[int, ...]:
        """Per layer: `layer_types` (transformers since 4.53), before it the steps or the first layer of windows."""
        c = self._config
        window = c.get("sliding_window")
        if not window or not c.get("use_sliding_window", True):
            return ()
        kinds = c.get("layer_types")
        if kinds is None:
            first = int(c.get("max_window_layers", 0))
            slides = alternating(layers, int(c.get("sliding_window_pattern", 0)))
            return tuple(int(window) if slide and n >= first else 0 for n, slide in enumerate(slides))
        if unknown := set(kinds) - LAYER_TYPES:
            raise UnsupportedModel(f"layers of type {', '.join(sorted(unknown))} are not supported", hint=LLAMACPP)
        return tuple(int(window) if kind == "sliding_attention" else 0 for kind in kinds)

    def _unrotated(self, layers: int) -> tuple[int, ...]:
        turns = self._config.get("no_rope_layers")
        if turns is None:
            turns = alternating(layers, int(self._config.get("no_rope_layer_interval", 0)))
        return tuple(n for n, turned in enumerate(turns) if not turned)

    def _ropes(self, head_dim: int) -> tuple[Rope, Rope | None]:
        """The rope and, if there is one, that of the layers with a window. `rope_parameters` (transformers 5), which
        may hold one object for each of the two; before, `rope_theta`, `rope_scaling` and `rope_local_base_freq`."""
        c = self._config
        given: Mapping[str, Any] = c.get("rope_parameters") or c.get("rope_scaling") or {}
        if LAYER_TYPES & given.keys():
            return self._rope(head_dim, given["full_attention"]), self._rope(head_dim, given["sliding_attention"])
        theta = c.get("rope_local_base_freq")
        local = None if theta is None else self._rope(head_dim, {"rope_theta": theta})
        return self._rope(head_dim, given), local

    def _rope(self, head_dim: int, scaling: Mapping[str, Any]) -> Rope:
        theta = float(scaling.get("rope_theta") or self._config.get("rope_theta") or 10000.0)
        partial = scaling.get("partial_rotary_factor") or self._config.get("partial_rotary_factor") or 1
        return rope.from_config(theta, int(head_dim * float(partial)), self._count("max_position_embeddings"), scaling)

    def _count(self, key: str) -> int:
        value = self._config.get(key)
        if type(value) is not int:
            raise SourceError(f"config.json has {key} = {value!r}, a whole number is needed")
        return value

    def _index(self) -> dict[str, Path]:
        """Tensor name to file, for one file or shards."""
        shards = sorted(self.path.glob("*.safetensors"))
        if not shards:
            raise SourceError(
                f"{self.path} holds no .safetensors file", hint="pickled checkpoints (.bin, .pt) are not read"
            )
        index: dict[str, Path] = {}
        for shard in shards:
            with _open(shard) as f:
                index.update(dict.fromkeys(f.keys(), shard))
        listing = self.path / "model.safetensors.index.json"
        missing = sorted(set(_read_json(listing).get("weight_map", {})) - set(index)) if listing.is_file() else []
        if missing:
            raise SourceError(
                f"{len(missing)} tensors of the index are in no shard, {missing[0]!r} first",
                hint="download the missing shards",
            )
        return index

    def _matrix(self, name: str, outputs: int, inputs: int) -> Matrix:
        values = self._read(name, (outputs, inputs))
        if not self._rehearsing:
            self.types[str(values.dtype)] += 1
        return Dense(values)

    def _vector(self, name: str, size: int) -> FloatArray:
        return np.asarray(self._read(name, (size,)), dtype=np.float32)

    def _scales(self, name: str, size: int) -> FloatArray:
        """The scales of a norm."""
        return self._vector(name, size) + np.float32(self._family.norm_offset)

    def _read(self, name: str, shape: tuple[int, ...]) -> Any:
        if name not in self._files:
            raise SourceError(f"the checkpoint lacks the tensor {name!r}", hint="download all of its files")
        with _open(self._files[name]) as f:
            part = f.get_slice(name)
            if part.get_dtype() not in TYPES:
                raise UnsupportedModel(
                    f"{name} is {part.get_dtype()}; {', '.join(sorted(TYPES))} can be imported", hint=LLAMACPP
                )
            if tuple(part.get_shape()) != shape:
                raise SourceError(f"the tensor {name!r} has shape {tuple(part.get_shape())}, config.json says {shape}")
            self._used.add(name)
            return part[:, :0] if self._rehearsing and len(shape) == 2 else f.get_tensor(name)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as e:
        raise SourceError(f"{path.name} is not a readable safetensors file: {e}", hint="download it again") from e


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise SourceError(f"{path.parent} has no {path.name}", hint="a Hugging Face model directory has one") from e
    except (OSError, ValueError, RecursionError) as e:
        raise SourceError(f"{path} is not readable JSON: {e}") from e
    if not isinstance(data, dict):
        raise SourceError(f"{path} holds a {type(data).__name__}, a JSON object is needed")
    return data
