"""A Hugging Face directory (config.json + safetensors) as a model source."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from edgewise.errors import SourceError, UnsupportedModel
from edgewise.models import rope
from edgewise.models.blocks import Layer
from edgewise.models.card import Card, Rope
from edgewise.models.tokenizer import write_from_hf
from edgewise.models.weights import Dense, Matrix
from edgewise.types import FloatArray

LLAMACPP = "convert it to GGUF and run that with the llamacpp engine (pip install 'edgewise[llamacpp]')"
TYPES = {"F32", "F16", "BF16"}
IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that old checkpoints saved


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` means where config.json does not say it."""

    qkv_bias: bool = False


FAMILIES = {"llama": Family(), "qwen2": Family(qkv_bias=True)}


class HuggingFaceSource:
    """Card, weights and tokenizer of a checkpoint directory. SourceError for damage, UnsupportedModel for what we
    cannot carry."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = _read_json(path / "config.json")
        self._family_name = str(self._config.get("model_type"))
        if self._family_name not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            raise UnsupportedModel(
                f"the model type {self._family_name!r} is not among those we can import ({known})", hint=LLAMACPP
            )
        self._refuse_unsupported()
        self._files = self._index()
        self._used: set[str] = set()
        try:
            self.card = self._card()
        except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
            raise SourceError(f"config.json of {path.name} holds a value that makes no model: {e}") from e
        self.types: Counter[str] = Counter()

    @property
    def licence_id(self) -> str | None:
        """`license:` of the front matter of README.md."""
        readme = self.path / "README.md"
        if not readme.is_file():
            return None
        head = readme.read_text(encoding="utf-8", errors="replace")[:65536]
        found = re.match(r"---\n(?:.*\n)*?license:[ \t]*([^\s#]+)", head)
        return found.group(1) if found else None

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
        return self._vector("model.norm.weight", self.card.hidden)

    def layer(self, n: int) -> Layer:
        card, at = self.card, f"model.layers.{n}"
        attention, ffn = f"{at}.self_attn", f"{at}.mlp"
        q_rows, kv_rows = card.heads * card.head_dim, card.kv_heads * card.head_dim
        qkv_bias = gate_up_bias = o_bias = down_bias = None
        if card.qkv_bias:
            q, k, v = (
                self._vector(f"{attention}.{x}_proj.bias", s)
                for x, s in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
            )
            qkv_bias = (q, k, v)
        if card.attention_out_bias:
            o_bias = self._vector(f"{attention}.o_proj.bias", card.hidden)
        if card.ffn_bias:
            gate_up_bias = (
                self._vector(f"{ffn}.gate_proj.bias", card.ffn),
                self._vector(f"{ffn}.up_proj.bias", card.ffn),
            )
            down_bias = self._vector(f"{ffn}.down_proj.bias", card.hidden)
        return Layer(
            attention_norm=self._vector(f"{at}.input_layernorm.weight", card.hidden),
            q=self._matrix(f"{attention}.q_proj.weight", q_rows, card.hidden),
            k=self._matrix(f"{attention}.k_proj.weight", kv_rows, card.hidden),
            v=self._matrix(f"{attention}.v_proj.weight", kv_rows, card.hidden),
            o=self._matrix(f"{attention}.o_proj.weight", card.hidden, q_rows),
            ffn_norm=self._vector(f"{at}.post_attention_layernorm.weight", card.hidden),
            gate=self._matrix(f"{ffn}.gate_proj.weight", card.ffn, card.hidden),
            up=self._matrix(f"{ffn}.up_proj.weight", card.ffn, card.hidden),
            down=self._matrix(f"{ffn}.down_proj.weight", card.hidden, card.ffn),
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
        )

    def finish(self) -> None:
        """Every tensor must have been used: one that was not means a model that is more than its card."""
        left = sorted(name for name in set(self._files) - self._used if not IGNORED_TENSORS.search(name))
        if left:
            raise UnsupportedModel(
                f"the checkpoint holds {len(left)} tensors that we do not know: {', '.join(left[:4])} …", hint=LLAMACPP
            )

    def _refuse_unsupported(self) -> None:
        c = self._config
        if c.get("quantization_config"):
            raise UnsupportedModel(
                "the checkpoint is quantized already", hint="take the float16 or bfloat16 one, or a GGUF"
            )
        if c.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"the activation {c['hidden_act']!r} is not supported (known: silu)", hint=LLAMACPP)
        if c.get("use_sliding_window"):
            raise UnsupportedModel("sliding-window attention is not supported", hint=LLAMACPP)

    def _card(self) -> Card:
        heads, hidden = self._count("num_attention_heads"), self._count("hidden_size")
        family = FAMILIES[self._family_name]
        attention_bias = bool(self._config.get("attention_bias", False))
        tied = bool(self._config.get("tie_word_embeddings", False))
        if not tied and "lm_head.weight" not in self._files:
            raise SourceError("the checkpoint has no lm_head.weight, and its config does not tie it to the embedding")
        head_dim = int(self._config.get("head_dim") or hidden // max(heads, 1))
        return Card(
            family=self._family_name,
            hidden=hidden,
            layers=self._count("num_hidden_layers"),
            heads=heads,
            kv_heads=int(self._config.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            ffn=self._count("intermediate_size"),
            vocab=self._count("vocab_size"),
            context=self._count("max_position_embeddings"),
            norm_eps=float(self._config.get("rms_norm_eps", 1e-6)),
            rope=self._rope(head_dim),
            tied=tied,
            qkv_bias=family.qkv_bias or attention_bias,
            attention_out_bias=attention_bias and not family.qkv_bias,
            ffn_bias=bool(self._config.get("mlp_bias", False)),
        )

    def _rope(self, head_dim: int) -> Rope:
        """`rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
        scaling: Mapping[str, Any] = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        theta = float(scaling.get("rope_theta") or self._config.get("rope_theta") or 10000.0)
        dims = int(
            head_dim * float(scaling.get("partial_rotary_factor") or self._config.get("partial_rotary_factor") or 1)
        )
        return rope.from_config(theta, dims, self._count("max_position_embeddings"), scaling)

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
        matrix = Dense(self._read(name, (outputs, inputs)))
        self.types[matrix.kind] += 1
        return matrix

    def _vector(self, name: str, size: int) -> FloatArray:
        return np.asarray(self._read(name, (size,)), dtype=np.float32)

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
            return f.get_tensor(name)


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
