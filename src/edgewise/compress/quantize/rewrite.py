"""A model's matrices become others: rounded to nearest each alone, or by GPTQ as a token meets them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np

from edgewise.compress.quantize.forward import GROUPS, Layers, dense, embedded, head_input
from edgewise.compress.quantize.gptq import Doubles, Hessian, nearest, quantized
from edgewise.compress.quantize.mixed import Show, table_hessian
from edgewise.compress.quantize.recipe import BITS, Precision, Recipe
from edgewise.models.blocks import Layer
from edgewise.models.bundle import Bundle
from edgewise.models.model_source import ModelSource
from edgewise.models.tensors import EMBED, FINAL_NORM, HEAD, embedding, matrices, vectors
from edgewise.models.tokenizer import CONFIG, TEMPLATE, TOKENIZER
from edgewise.models.weights import BLOCK, Dense, Matrix, split
from edgewise.types import FloatArray, IdArray

Precisions = Mapping[str, Precision]


class BundleSource(ModelSource):
    """A bundle as something that bundles are made from. BundleError if it is damaged."""

    kind = "bundle"
    otherwise = "pull the model again"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle.path)
        self.card = bundle.card
        self._bundle = bundle
        self._matrices, self._vectors = matrices(bundle), vectors(bundle)
        self.types = Counter(bundle.manifest.quantization.get("source", {}))

    @property
    def licence_id(self) -> str | None:
        known: str | None = self._bundle.manifest.licence.get("id")
        return known

    def embed(self) -> Matrix:
        return self._matrices[HEAD] if self.card.tied else self._matrices.get(EMBED) or embedding(self._bundle)

    def head(self) -> Matrix | None:
        return None if self.card.tied else self._matrices[HEAD]

    def norm(self) -> FloatArray:
        return self._vectors[FINAL_NORM]

    def layer(self, n: int) -> Layer:
        card = self.card
        heads, kept = card.heads * card.head_dim, card.kv_heads * card.head_dim
        q, k, v = self._parts(n, "qkv", (heads, kept, kept))
        gate, up = self._parts(n, "gate_up", (card.ffn, card.ffn))
        qkv_bias = self._cut(n, "qkv_bias", (heads, kept, kept))
        gate_up_bias = self._cut(n, "gate_up_bias", (card.ffn, card.ffn))
        q_norm, k_norm = self._vector(n, "q_norm"), self._vector(n, "k_norm")
        return Layer(
            attention_norm=self._vector(n, "attention_norm"),
            q=q,
            k=k,
            v=v,
            o=self._matrices[f"layer{n}.o"],
            ffn_norm=self._vector(n, "ffn_norm"),
            gate=gate,
            up=up,
            down=self._matrices[f"layer{n}.down"],
            qkv_bias=None if qkv_bias is None else (qkv_bias[0], qkv_bias[1], qkv_bias[2]),
            o_bias=self._vector(n, "o_bias"),
            gate_up_bias=None if gate_up_bias is None else (gate_up_bias[0], gate_up_bias[1]),
            down_bias=self._vector(n, "down_bias"),
            qk_norm=None if q_norm is None or k_norm is None else (q_norm, k_norm),
            attention_out_norm=self._vector(n, "attention_post_norm"),
            ffn_out_norm=self._vector(n, "ffn_post_norm"),
        )

    def write_tokenizer(self, directory: Path) -> None:
        for name in (TOKENIZER, CONFIG, TEMPLATE):
            if (self._bundle.path / name).is_file():
                self._bundle.verify([name])
                copyfile(self._bundle.path / name, directory / name)

    def _tensors(self) -> Iterable[str]:
        return ()

    def _vector(self, n: int, name: str) -> FloatArray | None:
        return self._vectors.get(f"layer{n}.{name}")

    def _cut(self, n: int, name: str, sizes: Sequence[int]) -> list[FloatArray] | None:
        values = self._vector(n, name)
        return None if values is None else np.split(values, np.cumsum(sizes)[:-1])

    def _parts(self, n: int, group: str, sizes: Sequence[int]) -> list[Matrix]:
        """The matrices of a group, which the bundle has as one or each alone."""
        fused = self._matrices.get(f"layer{n}.{group}")
        if fused is not None:
            return split(fused, sizes)
        return [self._matrices[f"layer{n}.{name}"] for name in GROUPS[group]]


class Rewritten(ModelSource):
    """The same model with other matrices; all else is the source's. `layer` is asked once for each, in order."""

    def __init__(self, source: ModelSource, embed: Matrix, head: Matrix | None, layer: Callable[[int], Layer]) -> None:
        super().__init__(source.path)
        self.kind, self.otherwise, self.card, self.types = source.kind, source.otherwise, source.card, source.types
        self._source, self._embed, self._head, self._layer = source, embed, head, layer

    @property
    def licence_id(self) -> str | None:
        return self._source.licence_id

    def embed(self) -> Matrix:
        return self._embed

    def head(self) -> Matrix | None:
        return self._head

    def norm(self) -> FloatArray:
        return self._source.norm()

    def layer(self, n: int) -> Layer:
        return self._layer(n)

    def write_tokenizer(self, directory: Path) -> None:
        self._source.write_tokenizer(directory)

    def _tensors(self) -> Iterable[str]:
        return ()


def rewritten(model: ModelSource, recipe: Recipe, precisions: Precisions, ids: IdArray | None, show: Show) -> Rewritten:
    """The model with each matrix at its precision, by the recipe's method; GPTQ calibrates on `ids` int64
    [windows, length]. All hidden states of one layer are in memory, and with GPTQ all finished matrices."""
    if recipe.method == "nearest" or ids is None:
        return _nearest(model, precisions)
    return _Calibrated(model, recipe, precisions, ids).rewritten(show)


def _nearest(model: ModelSource, precisions: Precisions) -> Rewritten:
    head = model.head()

    def layer(n: int) -> Layer:
        old = model.layer(n)
        parts = {
            part: _rounded(getattr(old, part), precisions[f"layer{n}.{group}"])
            for group, names in GROUPS.items()
            for part in names
        }
        return _with(old, parts)

    return Rewritten(
        model,
        _rounded(model.embed(), precisions[EMBED]),
        None if head is None else _rounded(head, precisions[HEAD]),
        layer,
    )


def _rounded(matrix: Matrix, precision: Precision) -> Matrix:
    if precision == "exact" or matrix.shape[1] % BLOCK:
        return matrix
    return nearest(matrix.dense(), BITS[precision], minima=precision == "int4-minima")


class _Calibrated:
    """Each matrix is rounded for the inputs that the matrices before it, rounded already, give it."""

    def __init__(self, model: ModelSource, recipe: Recipe, precisions: Precisions, ids: IdArray) -> None:
        self._model, self._precisions, self._settings = model, precisions, recipe.gptq.settings
        self._ids = ids
        self._layers = Layers(model.card, ids.shape[1])

    def rewritten(self, show: Show) -> Rewritten:
        model, card = self._model, self._model.card
        embed = self._table()
        hidden = embedded(card, embed.dense(), self._ids)
        layers = []
        for n in range(card.layers):
            show("calibrating layers", n, card.layers)
            layer, hidden = self._layer(n, hidden)
            layers.append(layer)
        head = model.head()
        if head is not None:
            hessian = Hessian.of(head_input(card, model.norm(), hidden)).matrix
            head = self._matrix(HEAD, head, hessian)
        show("calibrating layers", card.layers, card.layers)
        return Rewritten(model, embed, head, layers.__getitem__)

    def _table(self) -> Matrix:
        """The embedding, which nothing multiplies unless it is the head too: then the model has to be run for what the
        head is given, as it is. With 8 bits that is not worth its while."""
        card, table, precision = self._model.card, self._model.embed(), self._precisions[EMBED]
        if not card.tied or precision in ("exact", "int8"):
            return _rounded(table, precision)
        hidden = embedded(card, table.dense(), self._ids)
        for n in range(card.layers):
            layer = self._model.layer(n)
            hidden = self._layers.through(n, layer, hidden, partial(_as_it_is, layer))
        hessian = Hessian.of(head_input(card, self._model.norm(), hidden)).matrix
        return self._matrix(EMBED, table, table_hessian(hessian))

    def _layer(self, n: int, hidden: FloatArray) -> tuple[Layer, FloatArray]:
        layer = self._model.layer(n)
        parts: dict[str, Matrix] = {}

        def weigh(group: str, x: FloatArray) -> FloatArray:
            weights, names = dense(layer, group), GROUPS[group]
            rounded = self._matrix(f"layer{n}.{group}", Dense(weights), Hessian.of(x).matrix)
            if isinstance(rounded, Dense):
                return weights
            sizes = [getattr(layer, name).shape[0] for name in names]
            parts.update(zip(names, split(rounded, sizes), strict=True))
            return rounded.dense()

        hidden = self._layers.through(n, layer, hidden, weigh)
        return _with(layer, parts), hidden

    def _matrix(self, name: str, matrix: Matrix, hessian: Doubles) -> Matrix:
        precision = self._precisions[name]
        if precision == "exact" or matrix.shape[1] % BLOCK:
            return matrix
        return quantized(
            matrix.dense(), hessian, BITS[precision], minima=precision == "int4-minima", settings=self._settings
        )


def _as_it_is(layer: Layer, group: str, x: FloatArray) -> FloatArray:
    return dense(layer, group)


def _with(layer: Layer, parts: Mapping[str, Any]) -> Layer:
    """The layer with those matrices."""
    return replace(layer, **parts)
