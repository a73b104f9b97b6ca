"""A smaller network out of a larger one's weights, in numpy: fewer layers, fewer tokens, narrower.

Layers and tokens are picked. Width goes by the weights alone, so that the same source gives the same student whatever
data it will see: a number of the hidden state is worth the norm of all that is written to it times the norm of all that
reads it (with the scale of the RMS norm between), a number of the feed-forward the product of the norms of its gate, up
and down weights. This is magnitude pruning of coupled structures (Li et al. 2017, "Pruning Filters for Efficient
ConvNets"; Fang et al. 2023, "DepGraph"): all weights that belong to one number go or stay together. Heads stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import UnsupportedModel, UsageError
from edgewise.models.hf_weights import EMBEDDING, LM_HEAD, NORM, HfWeights
from edgewise.types import FloatArray, IdArray

Doubles = npt.NDArray[np.float64]
LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)")
PER_LAYER: Final = ("layer_types", "no_rope_layers")  # keys of config.json with an entry for each layer
BY_STEP: Final = ("sliding_window_pattern", "no_rope_layer_interval")  # keys that mean another thing in fewer layers
READS_HIDDEN: Final = {  # and the norm in between
    **dict.fromkeys((f"self_attn.{x}_proj.weight" for x in "qkv"), "input_layernorm.weight"),
    **dict.fromkeys((f"mlp.{x}_proj.weight" for x in ("gate", "up")), "post_attention_layernorm.weight"),
}
WRITES_HIDDEN: Final = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
NORMS: Final = ("input_layernorm.weight", "post_attention_layernorm.weight")
HIDDEN_BIASES: Final = ("self_attn.o_proj.bias", "mlp.down_proj.bias")
HEADS: Final = (*(f"self_attn.{x}_proj.bias" for x in "qkv"), *(f"self_attn.{x}_norm.weight" for x in "qk"))
FFN_ROWS: Final = tuple(f"mlp.{x}_proj.{kind}" for x in ("gate", "up") for kind in ("weight", "bias"))
FFN_COLUMNS: Final = "mlp.down_proj.weight"


def smaller(
    weights: HfWeights,
    *,
    layers: int | Sequence[int] | None = None,
    kept: IdArray | None = None,
    hidden: int | None = None,
    ffn: int | None = None,
) -> HfWeights:
    """`layers`: how many, spread evenly with the first and the last among them, or which, ascending. `kept` int64: the
    tokens, ascending ids of `weights`. `hidden`, `ffn`: the widths. None leaves all there is. The tensors are made
    when they are asked for; the tokenizer stays the old one. UsageError for what is not there."""
    found = weights
    if layers is not None:
        found = _layers(found, chosen(layers, int(found.config["num_hidden_layers"])))
    if kept is not None:
        found = _tokens(found, kept)
    if hidden is not None or ffn is not None:
        _check_names(found)
    if hidden is not None and _fewer(found, "hidden_size", hidden):
        found = _narrower(found, hidden)
    if ffn is not None and _fewer(found, "intermediate_size", ffn):
        found = _narrower_ffn(found, ffn)
    return found


def chosen(layers: int | Sequence[int], there: int) -> list[int]:
    """The layers meant, of `there`. UsageError if they are not there or not ascending."""
    if isinstance(layers, int):
        picked = np.linspace(0, there - 1, layers).round().astype(int).tolist() if 0 < layers <= there else []
    else:
        picked = list(layers)
    ascending = all(a < b for a, b in pairwise(picked))
    if not picked or not ascending or not 0 <= picked[0] <= picked[-1] < there:
        raise UsageError(
            f"layers = {layers!r} is wanted of {there} layers",
            hint=f"1 to {there}, or a list of ascending ones of 0 to {there - 1}",
        )
    return picked


class _Changed(Mapping[str, FloatArray]):
    """The tensors `names` (new name to old), each passed through `change`."""

    def __init__(self, tensors: Mapping[str, FloatArray], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def change(self, name: str, values: FloatArray) -> FloatArray:
        return values

    def __getitem__(self, name: str) -> FloatArray:
        return self.change(name, self._tensors[self._names[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Rows(_Changed):
    """Some rows of the tables of tokens."""

    def __init__(self, tensors: Mapping[str, FloatArray], kept: IdArray) -> None:
        super().__init__(tensors, {name: name for name in tensors})
        self._kept = kept

    def change(self, name: str, values: FloatArray) -> FloatArray:
        return values[self._kept] if name in (EMBEDDING, LM_HEAD) else values


class _Columns(_Changed):
    """Some numbers of the hidden state. An RMS norm divides by the mean of all squares: were those left out 0, the
    mean over the others would be larger by as much as they are fewer, which its scales make good."""

    def __init__(self, tensors: Mapping[str, FloatArray], kept: IdArray, hidden: int) -> None:
        super().__init__(tensors, {name: name for name in tensors})
        self._kept = kept
        self._scale = np.float32((hidden / len(kept)) ** 0.5)

    def change(self, name: str, values: FloatArray) -> FloatArray:
        _, part = _placed(name)
        if name in (EMBEDDING, LM_HEAD) or part in READS_HIDDEN:
            return np.ascontiguousarray(values[:, self._kept])
        if name == NORM or part in NORMS:
            return np.asarray(values[self._kept] * self._scale)
        return values[self._kept] if part in (*WRITES_HIDDEN, *HIDDEN_BIASES) else values


class _Neurons(_Changed):
    """Some numbers of each layer's feed-forward."""

    def __init__(self, tensors: Mapping[str, FloatArray], kept: Mapping[int, IdArray]) -> None:
        super().__init__(tensors, {name: name for name in tensors})
        self._kept = kept

    def change(self, name: str, values: FloatArray) -> FloatArray:
        layer, part = _placed(name)
        if part in FFN_ROWS:
            return values[self._kept[layer]]
        return np.ascontiguousarray(values[:, self._kept[layer]]) if part == FFN_COLUMNS else values


def _placed(name: str) -> tuple[int, str]:
    """The layer and the name in it; -1 and the name itself outside of layers."""
    found = LAYER.fullmatch(name)
    return (int(found[1]), found[2]) if found else (-1, name)


def _layers(weights: HfWeights, picked: list[int]) -> HfWeights:
    config, count = dict(weights.config), int(weights.config["num_hidden_layers"])
    by_step = [key for key in BY_STEP if config.get(key) and not any(config.get(name) for name in PER_LAYER)]
    if by_step and picked != list(range(count)):
        raise UnsupportedModel(
            f"config.json says by {by_step[0]!r} which layers differ, which means others where some are left out",
            hint="save the model with a current transformers, which lists the kind of each layer",
        )
    config |= {key: [config[key][n] for n in picked] for key in PER_LAYER if config.get(key)}
    config["num_hidden_layers"] = len(picked)
    places = {old: new for new, old in enumerate(picked)}
    names = {}
    for old in weights.tensors:
        layer, part = _placed(old)
        if layer < 0 or layer in places:
            names[old if layer < 0 else f"model.layers.{places[layer]}.{part}"] = old
    return replace(weights, config=config, tensors=_Changed(weights.tensors, names))


def _tokens(weights: HfWeights, kept: IdArray) -> HfWeights:
    config, there = dict(weights.config), int(weights.config["vocab_size"])
    if not len(kept) or kept[0] < 0 or kept[-1] >= there or (np.diff(kept) <= 0).any():
        raise UsageError(
            f"{len(kept)} tokens are to be kept that are no ascending ids of {weights.name}",
            hint=f"0 to {there - 1} are; prune the vocabulary of the same model",
        )
    new = {old: id for id, old in enumerate(kept.tolist())}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        config[key] = [new[id] for id in value if id in new] if isinstance(value, list) else new.get(value)
    return replace(weights, config=config | {"vocab_size": len(kept)}, tensors=_Rows(weights.tensors, kept))


def _fewer(weights: HfWeights, key: str, wanted: int) -> bool:
    there = int(weights.config[key])
    if not 0 < wanted <= there:
        raise UsageError(f"{key} = {wanted} is wanted of a model with {there}", hint=f"1 to {there} can be had")
    return wanted < there


def _check_names(weights: HfWeights) -> None:
    """Which side of a matrix the hidden state is on is known by its name."""
    known = {*READS_HIDDEN, *WRITES_HIDDEN, *NORMS, *HIDDEN_BIASES, *HEADS, *FFN_ROWS, EMBEDDING, LM_HEAD, NORM}
    unknown = sorted({part for _, part in map(_placed, weights.tensors)} - known)
    if unknown or weights.config.get("model_type") not in ("llama", "mistral", "qwen2", "qwen3"):
        what = f"the tensor {unknown[0]!r}" if unknown else f"a model of the type {weights.config.get('model_type')!r}"
        raise UnsupportedModel(
            f"{what} cannot be made narrower", hint="llama, mistral, qwen2 and qwen3 can; leave hidden and ffn out"
        )


def _narrower(weights: HfWeights, size: int) -> HfWeights:
    heads, hidden = int(weights.config["num_attention_heads"]), int(weights.config["hidden_size"])
    if size % heads:
        raise UsageError(
            f"hidden_size = {size} is wanted of a model with {heads} heads", hint=f"take a multiple of {heads}"
        )
    best = _best(hidden_worth(weights), size)
    head_dim = weights.config.get("head_dim") or hidden // heads  # where it is left out it would shrink as well
    config = {**weights.config, "hidden_size": size, "head_dim": head_dim}
    return replace(weights, config=config, tensors=_Columns(weights.tensors, best, hidden))


def _narrower_ffn(weights: HfWeights, size: int) -> HfWeights:
    layers = range(int(weights.config["num_hidden_layers"]))
    best = {layer: _best(ffn_worth(weights, layer), size) for layer in layers}
    config = {**weights.config, "intermediate_size": size}
    return replace(weights, config=config, tensors=_Neurons(weights.tensors, best))


def hidden_worth(weights: HfWeights) -> Doubles:
    """Of each number of the hidden state, float64 [hidden]."""
    tensors = weights.tensors
    written = _squares(tensors[EMBEDDING], 0)
    head = tensors[LM_HEAD] if LM_HEAD in tensors else tensors[EMBEDDING]
    read = _squares(head, 0) * tensors[NORM].astype(np.float64) ** 2
    for name in tensors:
        layer, part = _placed(name)
        if part in WRITES_HIDDEN:
            written += _squares(tensors[name], 1)
        elif part in READS_HIDDEN:
            scale = tensors[f"model.layers.{layer}.{READS_HIDDEN[part]}"].astype(np.float64)
            read += _squares(tensors[name], 0) * scale**2
    return np.sqrt(written * read)


def ffn_worth(weights: HfWeights, layer: int) -> Doubles:
    """Of each number of a layer's feed-forward, float64 [ffn]."""
    at = f"model.layers.{layer}"
    scale = weights.tensors[f"{at}.post_attention_layernorm.weight"]
    gate, up = (weights.tensors[f"{at}.mlp.{x}_proj.weight"] * scale for x in ("gate", "up"))
    return np.sqrt(_squares(gate, 1) * _squares(up, 1) * _squares(weights.tensors[f"{at}.{FFN_COLUMNS}"], 0))


def _squares(matrix: FloatArray, axis: int) -> Doubles:
    """The squared norms along an axis."""
    return np.asarray((matrix.astype(np.float64) ** 2).sum(axis=axis))


def _best(worth: Doubles, size: int) -> IdArray:
    """The places of the `size` largest, ascending."""
    return np.sort(np.argsort(-worth, kind="stable")[:size]).astype(np.int64)
