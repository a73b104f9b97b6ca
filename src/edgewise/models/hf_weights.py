"""A model's weights under the names of transformers, of a GGUF file, a bundle or a Hugging Face directory.

Quantized matrices come out as the exact numbers that they stand for, so a student can begin where its teacher is and a
teacher can be run by torch. Tensors are made when they are asked for: one at a time is in memory.
`write` makes a Hugging Face directory of them, for what reads nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from edgewise.errors import UnsupportedModel
from edgewise.models import rope
from edgewise.models.blocks import Layer
from edgewise.models.bundle import MANIFEST, Bundle
from edgewise.models.card import Card, Rope
from edgewise.models.from_gguf import GGUFSource
from edgewise.models.from_hf import IGNORED_TENSORS, HuggingFaceSource
from edgewise.models.licence import carry
from edgewise.models.tensors import EMBED, FINAL_NORM, HEAD, embedding, matrices, vectors
from edgewise.models.tokenizer_files import TokenizerFiles
from edgewise.models.weights import Matrix, split
from edgewise.types import FloatArray

EMBEDDING, NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SHARD_BYTES: Final = 1 << 31  # of tensors that stand in one file
FROM_HF = "take the model's Hugging Face directory, which says itself what it is"


@dataclass(frozen=True, slots=True)
class HfWeights:
    """`config` is config.json; `tensors` float32 by transformers' names, with no `lm_head.weight` where the head is the
    embedding; `licence` what the source says of it, `notices` the directory of its licence files."""

    config: Mapping[str, Any]
    tensors: Mapping[str, FloatArray]
    tokenizer: TokenizerFiles
    name: str
    licence: str | None = None
    notices: Path | None = None


def of(source: Path | Bundle) -> HfWeights:
    """The weights of a bundle (or its directory), a .gguf file or a Hugging Face directory. SourceError or BundleError
    for damage, UnsupportedModel for a GGUF or bundle that transformers' llama, qwen2 and qwen3 cannot hold."""
    if isinstance(source, Bundle):
        return _of_bundle(source)
    if (source / MANIFEST).is_file():
        return _of_bundle(Bundle.open(source, check=False))
    return _of_directory(source) if source.is_dir() else _of_gguf(source)


def write(weights: HfWeights, directory: Path) -> Path:
    """The weights as they are, float32, in a new Hugging Face directory, which transformers and `of` read."""
    directory.mkdir(parents=True)
    config = {**weights.config, "dtype": "float32"}
    config.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights.tokenizer.write_huggingface(directory)
    carry(weights.licence, weights.notices, directory)
    _write_shards(weights.tensors, directory)
    return directory


def _write_shards(tensors: Mapping[str, FloatArray], directory: Path) -> None:
    """One file, or several with the index that says which tensor is where."""
    places: dict[str, str] = {}
    shard: dict[str, FloatArray] = {}
    size = total = 0
    last = len(tensors) - 1
    for n, (name, values) in enumerate(tensors.items()):
        shard[name] = np.ascontiguousarray(values)
        size += values.nbytes
        if size >= SHARD_BYTES or n == last:
            whole = n == last and not places
            file = "model.safetensors" if whole else f"model-{len(set(places.values())) + 1:05}.safetensors"
            save_file(shard, directory / file, {"format": "pt"})
            places |= dict.fromkeys(shard, file)
            total, size, shard = total + size, 0, {}
    if len(set(places.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _of_directory(path: Path) -> HfWeights:
    source = HuggingFaceSource(path)
    source.check()
    config = json.loads((path / "config.json").read_bytes())
    tensors = _Safetensors(path, tied=source.card.tied)
    tokenizer = TokenizerFiles.of_source(source)
    return HfWeights(config, tensors, tokenizer, path.resolve().name, source.licence_id, path)


def _of_gguf(path: Path) -> HfWeights:
    source = GGUFSource(path)
    source.check()
    tokenizer = TokenizerFiles.of_source(source)
    return HfWeights(_config(source.card, tokenizer), _Tensors(source), tokenizer, path.stem, source.licence_id)


def _of_bundle(bundle: Bundle) -> HfWeights:
    bundle.verify(name for name in bundle.manifest.files if "/" not in name)
    tokenizer = TokenizerFiles.read(bundle.path)
    licence = bundle.manifest.licence.get("id")
    config = _config(bundle.card, tokenizer)
    return HfWeights(config, _Tensors(_BundleWeights(bundle)), tokenizer, bundle.name, licence, bundle.path)


class _Safetensors(Mapping[str, FloatArray]):
    """The tensors of a directory's shards. HuggingFaceSource has checked them."""

    def __init__(self, directory: Path, *, tied: bool) -> None:
        self._files: dict[str, Path] = {}
        for shard in sorted(directory.glob("*.safetensors")):
            with safe_open(shard, framework="np") as file:
                self._files |= {name: shard for name in file.keys() if not IGNORED_TENSORS.search(name)}  # noqa: SIM118 - no mapping
        if tied:  # some checkpoints store the shared table twice
            self._files.pop(LM_HEAD, None)

    def __getitem__(self, name: str) -> FloatArray:
        with safe_open(self._files[name], framework="np") as file:
            return np.asarray(file.get_tensor(name), dtype=np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class _Weights(Protocol):
    """What a `ModelSource` and a bundle have in common."""

    @property
    def card(self) -> Card: ...
    def embed(self) -> Matrix: ...
    def head(self) -> Matrix | None: ...
    def norm(self) -> FloatArray: ...
    def layer(self, n: int) -> Layer: ...


class _BundleWeights:
    """What a bundle's graphs hold, as the layers that they were written from."""

    def __init__(self, bundle: Bundle) -> None:
        self.card = bundle.card
        self._matrices, self._vectors = matrices(bundle), vectors(bundle)
        self._embedding = embedding(bundle)

    def embed(self) -> Matrix:
        return self._matrices.get(EMBED, self._embedding)

    def head(self) -> Matrix | None:
        return None if self.card.tied else self._matrices[HEAD]

    def norm(self) -> FloatArray:
        return self._vectors[FINAL_NORM]

    def layer(self, n: int) -> Layer:
        card, at = self.card, f"layer{n}"
        heads = [count * card.head_dim for count in (card.heads, card.kv_heads, card.kv_heads)]
        q, k, v = self._parts(at, "qkv", ("q", "k", "v"), heads)
        gate, up = self._parts(at, "gate_up", ("gate", "up"), [card.ffn, card.ffn])
        q_norm, k_norm = (self._vectors.get(f"{at}.{name}") for name in ("q_norm", "k_norm"))
        qkv_bias, gate_up_bias = (
            self._biases(f"{at}.qkv_bias", heads),
            self._biases(f"{at}.gate_up_bias", [card.ffn] * 2),
        )
        return Layer(
            attention_norm=self._vectors.get(f"{at}.attention_norm"),
            q=q,
            k=k,
            v=v,
            o=self._matrices[f"{at}.o"],
            ffn_norm=self._vectors.get(f"{at}.ffn_norm"),
            gate=gate,
            up=up,
            down=self._matrices[f"{at}.down"],
            qkv_bias=None if qkv_bias is None else (qkv_bias[0], qkv_bias[1], qkv_bias[2]),
            o_bias=self._vectors.get(f"{at}.o_bias"),
            gate_up_bias=None if gate_up_bias is None else (gate_up_bias[0], gate_up_bias[1]),
            down_bias=self._vectors.get(f"{at}.down_bias"),
            qk_norm=None if q_norm is None or k_norm is None else (q_norm, k_norm),
        )

    def _parts(self, at: str, fused: str, names: Sequence[str], outputs: Sequence[int]) -> list[Matrix]:
        """The matrices of those names, which stand in one where they are of one kind."""
        whole = self._matrices.get(f"{at}.{fused}")
        return [self._matrices[f"{at}.{name}"] for name in names] if whole is None else split(whole, outputs)

    def _biases(self, name: str, sizes: Sequence[int]) -> list[FloatArray] | None:
        """Those that stand one behind the other in a vector."""
        whole = self._vectors.get(name)
        return None if whole is None else np.split(whole, np.cumsum(sizes)[:-1])


class _Tensors(Mapping[str, FloatArray]):
    """The tensors of a llama, qwen2 or qwen3 of which a source has the layers."""

    def __init__(self, weights: _Weights) -> None:
        card = weights.card
        layer = lru_cache(maxsize=1)(weights.layer)  # its tensors are asked for one behind the other
        self._makers: dict[str, Callable[[], FloatArray]] = {EMBEDDING: lambda: weights.embed().dense()}
        for n in range(card.layers):
            parts = _parts_of(card)
            self._makers |= {f"model.layers.{n}.{name}": _maker(layer, n, read) for name, read in parts.items()}
        self._makers[NORM] = weights.norm
        if not card.tied:
            self._makers[LM_HEAD] = lambda: _head(weights)

    def __getitem__(self, name: str) -> FloatArray:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _head(weights: _Weights) -> FloatArray:
    head = weights.head()
    assert head is not None  # the card says that there is one
    return head.dense()


def _maker(layer: Callable[[int], Layer], n: int, read: Callable[[Layer], Any]) -> Callable[[], FloatArray]:
    def make() -> FloatArray:
        found = read(layer(n))
        return np.asarray(found if isinstance(found, np.ndarray) else found.dense(), dtype=np.float32)

    return make


def _parts_of(card: Card) -> dict[str, Callable[[Layer], Any]]:
    """The tensors of a layer by name, in transformers' order, and how to read each."""
    parts: dict[str, Callable[[Layer], Any]] = {
        "self_attn.q_proj.weight": lambda layer: layer.q,
        "self_attn.k_proj.weight": lambda layer: layer.k,
        "self_attn.v_proj.weight": lambda layer: layer.v,
        "self_attn.o_proj.weight": lambda layer: layer.o,
        "mlp.gate_proj.weight": lambda layer: layer.gate,
        "mlp.up_proj.weight": lambda layer: layer.up,
        "mlp.down_proj.weight": lambda layer: layer.down,
        "input_layernorm.weight": lambda layer: layer.attention_norm,
        "post_attention_layernorm.weight": lambda layer: layer.ffn_norm,
    }
    if card.qkv_bias:
        parts |= {f"self_attn.{x}_proj.bias": _one_of("qkv_bias", n) for n, x in enumerate("qkv")}
    if card.attention_out_bias:
        parts["self_attn.o_proj.bias"] = lambda layer: layer.o_bias
    if card.ffn_bias:
        names = ("gate", "up")
        parts |= {f"mlp.{x}_proj.bias": _one_of("gate_up_bias", n) for n, x in enumerate(names)}
        parts["mlp.down_proj.bias"] = lambda layer: layer.down_bias
    if card.qk_norm != "none":
        parts |= {f"self_attn.{x}_norm.weight": _one_of("qk_norm", n) for n, x in enumerate("qk")}
    return parts


def _one_of(name: str, n: int) -> Callable[[Layer], Any]:
    return lambda layer: getattr(layer, name)[n]


def _config(card: Card, tokenizer: TokenizerFiles) -> dict[str, Any]:
    """config.json of a model that is known by its card. UnsupportedModel if no family that we write is like it."""
    kind = _kind(card)
    theta = _theta(card.rope, card.head_dim)
    stop = list(tokenizer.config.stop)
    return {
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind] + "ForCausalLM"],
        "model_type": kind,
        "hidden_size": card.hidden,
        "intermediate_size": card.ffn,
        "num_hidden_layers": card.layers,
        "num_attention_heads": card.heads,
        "num_key_value_heads": card.kv_heads,
        "head_dim": card.head_dim,
        "vocab_size": card.vocab,
        "max_position_embeddings": card.context,
        "rms_norm_eps": card.norm_eps,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "tie_word_embeddings": card.tied,
        "bos_token_id": tokenizer.config.bos,
        "eos_token_id": stop[0] if len(stop) == 1 else stop or None,
        **({"attention_bias": card.qkv_bias, "mlp_bias": card.ffn_bias} if kind == "llama" else {}),
    }


def _kind(card: Card) -> str:
    """The `model_type` whose only ways are those of the card."""
    plain = Card(
        **{name: getattr(card, name) for name in ("family", "hidden", "layers", "heads", "kv_heads", "head_dim")},
        **{name: getattr(card, name) for name in ("ffn", "vocab", "context", "norm_eps", "rope", "tied")},
    )
    families = {
        "llama": replace(plain, qkv_bias=card.qkv_bias, attention_out_bias=card.qkv_bias, ffn_bias=card.ffn_bias),
        "qwen2": replace(plain, qkv_bias=True),
        "qwen3": replace(plain, qk_norm="head"),
    }
    for kind, like in families.items():
        if card == like:
            return kind
    raise UnsupportedModel(
        f"a model of the family {card.family!r} is no llama, qwen2 or qwen3 of transformers", hint=FROM_HF
    )


def _theta(its: Rope, head_dim: int) -> float:
    """The base of plain rotary frequencies, from the slowest of them. UnsupportedModel if they are scaled."""
    frequencies = np.array(its.inverse_frequencies, np.float32)
    dims = 2 * len(frequencies)
    raw = float(np.float64(frequencies[-1]) ** (-dims / (dims - 2)))
    for theta in (float(f"{raw:.{digits}g}") for digits in (3, 6, 9)):
        if np.allclose(rope.plain(theta, dims), frequencies, rtol=1e-6, atol=0):
            if dims == head_dim and its.attention_factor == 1:
                return theta
            break
    raise UnsupportedModel("a model whose rotary embedding is scaled or partial has no config.json here", hint=FROM_HF)
