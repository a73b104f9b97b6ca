"""Outlines of files: a bundle, a GGUF, a Hugging Face directory. Weights are never read, only the tables that say how
large they are."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from edgewise.errors import SourceError
from edgewise.models.bundle import MANIFEST, Bundle
from edgewise.models.card import alternating
from edgewise.models.gguf import GGUF
from edgewise.models.outline import LAYERS_LIMIT, SIZE_LIMIT, Outline, Stored, of_card

CONFIG: Final = "config.json"
CONFIG_LIMIT: Final = 16 << 20  # bytes
HEADER_LIMIT: Final = 100 << 20  # bytes; safetensors' own limit
STATELESS: Final = 1  # the window of a layer that keeps nothing but its own position
AGAIN: Final = "take another copy of this model"

Part = Literal["body", "head", "embedding", "looked_up", "none"]


class Tensor(NamedTuple):
    part: Part
    parameters: int
    bytes: int


def of_path(path: Path) -> Outline:
    """SourceError if nothing there is a model."""
    if (path / MANIFEST).is_file():
        return of_bundle(Bundle.open(path, check=False))
    if path.suffix.lower() == ".gguf":
        return of_gguf(path)
    if path.suffix.lower() == ".json" or (path / CONFIG).is_file():
        return of_config(path)
    raise SourceError(
        f"{path} holds neither {MANIFEST} nor {CONFIG}", hint="give a bundle, a .gguf or a Hugging Face directory"
    )


def of_bundle(bundle: Bundle) -> Outline:
    """Bytes are those of its files. One file holds the head and the table that tokens are looked up in; where they are
    two, half of it counts for each."""
    sizes = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
    blocks = tuple(block.file.removesuffix("onnx") for block in bundle.manifest.graphs.blocks)
    body = sum(size for name, size in sizes.items() if name.startswith(blocks))
    tables = sum(size for name, size in sizes.items() if name.endswith(".data") and not name.startswith(blocks))
    embedding = 0 if bundle.card.tied else tables // 2
    return of_card(bundle.card, Stored(body, tables - embedding, embedding), bundle.name)


def of_gguf(path: Path) -> Outline:
    """SourceError if the file is damaged or is no language model."""
    file = GGUF.open(path)
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise SourceError(f"{path.name} has no table of tokens", hint="give the GGUF of a language model")
    architecture = str(file.fields.get("general.architecture"))
    tied = "output.weight" not in file.tensors
    fields = Fields(path.name, file.fields, f"{architecture}.")
    layers, hidden = fields.layers("block_count"), fields.count("embedding_length")
    heads = fields.most("attention.head_count")
    plain = fields.most("feed_forward_length", 0)
    shape = Outline(
        name=str(file.fields.get("general.name") or path.stem),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=max(1, fields.most("attention.head_count_kv", heads)),
        head_dim=fields.count("attention.key_length", hidden // max(heads, 1)),
        ffn=fields.count("expert_feed_forward_length", plain),
        vocab=table.shape[0],
        context=fields.count("context_length"),
        tied=tied,
        experts=fields.count("expert_count", 0),
        experts_used=fields.count("expert_used_count", 0),
        shared_ffn=fields.count("expert_shared_feed_forward_length", 0),
        dense_layers=fields.count("leading_dense_block_count", 0),
        dense_ffn=plain,
        windows=_gguf_windows(fields, architecture, layers),
        kv_shared_layers=fields.count("attention.shared_kv_layers", 0),
    )
    tensors = [Tensor(_gguf_part(t.name, tied), math.prod(t.shape), t.nbytes) for t in file.tensors.values()]
    known = all(tensor.bytes for tensor in tensors)  # a type newer than our table has no size
    return _measured(shape, tensors, countable=True, sized=known)


def of_config(path: Path) -> Outline:
    """From a config.json or its directory; exact where the .safetensors files lie beside it. SourceError if it makes no
    model."""
    file = path / CONFIG if path.is_dir() else path
    config = _json_object(_read(file, CONFIG_LIMIT), str(file))
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise SourceError(f"{file.name} has text_config = {str(text)[:80]!r}, an object is needed", hint=AGAIN)
    tied = _tied(config, text)
    shape = _of_fields(file.resolve().parent.name, Fields(file.name, text), tied)
    found = [entry for shard in sorted(file.parent.glob("*.safetensors")) for entry in _header(shard).items()]
    tensors = [Tensor(_hf_part(name, tied), math.prod(e.shape), e.bytes) for name, e in found]
    plain = all(entry.type in {"F32", "F16", "BF16"} for _, entry in found)  # packed weights have other shapes
    return _measured(shape, tensors, countable=plain, sized=True) if tensors else shape


def _measured(shape: Outline, tensors: Iterable[Tensor], *, countable: bool, sized: bool) -> Outline:
    """The shape with what the file's own tensors say: their bytes, and how many parameters the shape is short of."""
    parameters, size = Counter[Part](), Counter[Part]()
    for tensor in tensors:
        parameters[tensor.part] += tensor.parameters
        size[tensor.part] += tensor.bytes
    if sized:
        stored = Stored(size["body"], size["head"], size["embedding"], size["looked_up"])
        shape = replace(shape, stored=stored)
    if not countable:
        return shape
    extra = shape.extra + parameters["body"] - shape.body
    return replace(shape, extra=extra, looked_up=parameters["looked_up"])


def _gguf_part(name: str, tied: bool) -> Part:
    if name == "token_embd.weight":
        return "head" if tied else "embedding"
    if name.startswith("output.weight"):
        return "head"
    if name.startswith("per_layer_token_embd"):
        return "looked_up"
    return "none" if name.startswith(("v.", "mm.", "a.")) else "body"


def _hf_part(name: str, tied: bool) -> Part:
    if re.search(r"(^|\.)(vision|visual|audio|multi_modal|embed_vision|embed_audio|mtp)", name):
        return "none"
    if "embed_tokens_per_layer" in name:
        return "looked_up"
    if re.search(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.", name):
        return "head" if tied else "embedding"
    if re.search(r"(^|\.)(lm_head|embed_out)\.", name):
        return "none" if tied else "head"  # some checkpoints store the shared table twice
    return "body"


class Fields:
    """The values of a file under its own names; SourceError for one that is missing or no count."""

    def __init__(self, file: str, values: Mapping[str, Any], prefix: str = "") -> None:
        self._file, self._values, self._prefix = file, values, prefix

    def get(self, *keys: str) -> Any:
        """The first that is there and not null."""
        found = (self._values.get(self._prefix + key) for key in keys)
        return next((value for value in found if value is not None), None)

    def count(self, key: str, default: int | None = None) -> int:
        return self.first((key,), default)

    def first(self, keys: Sequence[str], default: int | None = None) -> int:
        """The count under the first of those keys that is there."""
        value = self.get(*keys)
        return default if value is None and default is not None else self._checked(keys[0], value)

    def most(self, key: str, default: int | None = None) -> int:
        """A count that may differ between layers: the largest."""
        value = self.get(key)
        if isinstance(value, (list, np.ndarray)) and len(value):
            return max(self._checked(key, one) for one in list(value))
        return self.count(key, default)

    def layers(self, *keys: str) -> int:
        """How many layers there are, so few that a list of them may be made."""
        layers = self.first(keys)
        if layers > LAYERS_LIMIT:
            raise SourceError(f"{self._file} has {layers} layers, at most {LAYERS_LIMIT} are allowed", hint=AGAIN)
        return layers

    def _checked(self, key: str, value: Any) -> int:
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not 0 <= value <= SIZE_LIMIT:
            raise SourceError(
                f"{self._file} has {self._prefix}{key} = {str(value)[:80]!r}, a whole number of 0 or more is needed",
                hint=AGAIN,
            )
        return int(value)


def _of_fields(name: str, fields: Fields, tied: bool) -> Outline:
    """Keys of config.json; those of older families stand behind the usual ones."""
    layers = fields.layers("num_hidden_layers", "n_layer", "num_layers")
    hidden = fields.first(("hidden_size", "n_embd", "d_model"))
    heads = fields.first(("num_attention_heads", "n_head"))
    experts = fields.first(("num_experts", "num_local_experts", "n_routed_experts"), 0)
    plain = fields.most("intermediate_size", fields.first(("n_inner", "ffn_hidden_size"), 4 * hidden))
    ffn = fields.count("moe_intermediate_size", plain) if experts else plain
    per_layer = fields.count("hidden_size_per_layer_input", 0)
    return Outline(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=fields.first(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), heads),
        head_dim=fields.first(("head_dim", "kv_channels"), hidden // max(heads, 1)),
        ffn=ffn,
        vocab=fields.first(("vocab_size", "padded_vocab_size")),
        context=fields.first(("max_position_embeddings", "n_positions", "seq_length"), 4096),
        tied=tied,
        experts=experts,
        experts_used=fields.first(("num_experts_per_tok", "top_k_experts", "moe_topk"), min(experts, 1)),
        shared_ffn=fields.count("shared_expert_intermediate_size", fields.count("n_shared_experts", 0) * ffn),
        dense_layers=fields.count("first_k_dense_replace", 0),
        dense_ffn=plain,
        windows=_windows(fields, layers),
        kv_shared_layers=fields.count("num_kv_shared_layers", 0),
        looked_up=fields.count("vocab_size_per_layer_input", 0) * per_layer * layers,
        extra=_extra(fields, layers, hidden, plain, per_layer),
    )


UNGATED: Final = {"gelu", "gelu_new", "gelu_fast", "relu", "relu2"}  # of families whose feed-forward has two matrices


def _extra(fields: Fields, layers: int, hidden: int, ffn: int, per_layer: int) -> int:
    """What a family has beside attention and a gated feed-forward, from the keys that say so."""
    extra = 3 * layers * hidden * per_layer  # of each layer a gate, a projection and a part of the common projection
    if fields.get("use_double_wide_mlp"):
        extra += 3 * hidden * ffn * fields.count("num_kv_shared_layers", 0)
    if str(fields.get("hidden_act", "activation_function")) in UNGATED:
        extra -= hidden * ffn * layers
    return extra


TIED_BY_DEFAULT: Final = re.compile(r"gemma|gpt2|bloom|smollm3|lfm2")  # families whose configs leave the key out


def _tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding table; a config of two levels may say so at either."""
    said = [level["tie_word_embeddings"] for level in (text, config) if level.get("tie_word_embeddings") is not None]
    return bool(said[0]) if said else TIED_BY_DEFAULT.match(str(text.get("model_type"))) is not None


WITH_A_STATE: Final = {"linear_attention", "conv", "mamba", "recurrent"}


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Per layer, from `layer_types`, or from the step that older configs give."""
    kinds, window = fields.get("layer_types"), fields.count("sliding_window", 0)
    if isinstance(kinds, list) and len(kinds) == layers:
        sizes = dict.fromkeys(WITH_A_STATE, _state_positions(fields)) | {"sliding_attention": window}
        return tuple(sizes.get(str(kind), 0) for kind in kinds)
    if not window or fields.get("use_sliding_window") is False:
        return ()
    slides = alternating(layers, fields.count("sliding_window_pattern", 0))
    return tuple(window if slide else 0 for slide in slides)


def _state_positions(fields: Fields) -> int:
    """How many positions' keys and values (2 bytes each) are as large as a layer's fixed state (4 bytes a number)."""
    heads, keys = fields.count("linear_num_value_heads", 0), fields.count("linear_key_head_dim", 0)
    numbers = heads * keys * fields.count("linear_value_head_dim", 0)
    position = 2 * fields.count("num_key_value_heads", 1) * fields.count("head_dim", 1)
    return max(STATELESS, 2 * numbers // max(position, 1))


def _gguf_windows(fields: Fields, architecture: str, layers: int) -> tuple[int, ...]:
    window, kv_heads = fields.count("attention.sliding_window", 0), fields.get("attention.head_count_kv")
    keeps = list(kv_heads) if isinstance(kv_heads, np.ndarray) and len(kv_heads) == layers else [1] * layers
    slides = _gguf_slides(fields, architecture, layers) if window else (False,) * layers
    windows = tuple(
        STATELESS if not kept else window if slide else 0 for kept, slide in zip(keeps, slides, strict=True)
    )
    return windows if any(windows) else ()


def _gguf_slides(fields: Fields, architecture: str, layers: int) -> tuple[bool, ...]:
    pattern = fields.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray) and len(pattern) == layers:
        return tuple(bool(slide) for slide in pattern)
    if isinstance(pattern, int):
        return alternating(layers, pattern)
    from edgewise.models.from_gguf import ARCHITECTURES  # only old files of families with windows need it; it is slow

    known = ARCHITECTURES.get(architecture)
    step = None if known is None else known.full_step
    return alternating(layers, step) if step is not None else (False,) * layers


class Entry(NamedTuple):
    """A tensor as a safetensors header lists it."""

    type: str
    shape: tuple[int, ...]
    bytes: int


def _header(file: Path) -> dict[str, Entry]:
    """The table of a .safetensors file. SourceError if it is damaged."""
    start = _read(file, 8, partly=True)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(HEADER_LIMIT, file.stat().st_size - 8):
        raise SourceError(f"{file.name} says that its header has {length} bytes", hint="download it again")
    table = _json_object(_read(file, 8 + length, partly=True)[8:], file.name)
    table.pop("__metadata__", None)
    return {name: _entry(file.name, name, value) for name, value in table.items()}


def _entry(file: str, name: str, value: Any) -> Entry:
    try:
        start, end = value["data_offsets"]
        entry = Entry(str(value["dtype"]), tuple(int(n) for n in value["shape"]), int(end) - int(start))
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise SourceError(f"{file} lists the tensor {name!r} as {str(value)[:80]}", hint="download it again") from e
    if min((*entry.shape, entry.bytes), default=0) < 0:
        raise SourceError(f"{file} lists the tensor {name!r} with a size below 0", hint="download it again")
    return entry


def _read(file: Path, limit: int, *, partly: bool = False) -> bytes:
    """Up to `limit` bytes; of a file with more the beginning, if `partly`."""
    try:
        if not partly and file.stat().st_size > limit:
            raise SourceError(f"{file.name} has {file.stat().st_size} bytes, at most {limit} are read")
        with file.open("rb") as f:
            return f.read(limit)
    except OSError as e:
        raise SourceError(f"{file} cannot be read: {e.strerror}") from e


def _json_object(data: bytes, file: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{file} is not readable JSON: {e}", hint=AGAIN) from e
    if not isinstance(found, dict):
        raise SourceError(f"{file} holds a {type(found).__name__}, a JSON object is needed", hint=AGAIN)
    return found
