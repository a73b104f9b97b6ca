"""The numpy forward against onnxruntime, every family, and what its callers may do inside a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewise.compress.quantize.forward import Layers, dense, embedded, head_input, logits
from edgewise.compress.quantize.rewrite import BundleSource
from edgewise.engines.base import Row
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.models.model_source import ModelSource
from edgewise.models.source import open_source, pull
from tiny import FAMILIES, VOCAB, save_hf, tiny

LENGTH = 60  # beyond the windows of the tiny models
CASES: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gemma2-caps": ("gemma2", {"attn_logit_softcapping": 2.0}),
    "phi3-partial-rope": ("phi3", {"hidden_size": 128, "partial_rotary_factor": 0.5}),
}


def ids(rows: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (rows, length))


def all_logits(model: ModelSource, ids: np.ndarray) -> np.ndarray:
    card, table, head = model.card, model.embed().dense(), model.head()
    layers, hidden = Layers(card, ids.shape[1]), embedded(model.card, model.embed().dense(), ids)
    for n in range(card.layers):
        layer = model.layer(n)
        hidden = layers.through(n, layer, hidden, lambda group, x, layer=layer: dense(layer, group))
    return logits(card, table if head is None else head.dense(), head_input(card, model.norm(), hidden))


@pytest.mark.parametrize("case", CASES)
async def test_a_family_is_as_onnxruntime_has_it(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    bundle = pull(str(save_hf(tiny(family, **changes), tmp_path / "hf")), home=tmp_path)
    model, tokens = OnnxLM(bundle, slots=2), ids()
    for n in range(2):
        await model.open(str(n), LENGTH)
    expected = np.stack(await model.forward([Row(str(n), 0, row, LENGTH) for n, row in enumerate(tokens)]))
    for source in (open_source(tmp_path / "hf"), BundleSource(bundle)):  # and a bundle reads as what it was made from
        assert np.abs(all_logits(source, tokens) - expected).max() < 1e-4
    await model.shutdown()


def test_whoever_gives_the_matrices_sees_their_inputs(tmp_path: Path) -> None:
    save_hf(tiny("llama"), tmp_path / "hf")
    model = open_source(tmp_path / "hf")
    card, layer = model.card, model.layer(0)
    hidden = embedded(card, model.embed().dense(), ids())
    seen: dict[str, np.ndarray] = {}

    def weigh(group: str, x: np.ndarray) -> np.ndarray:
        seen[group] = x
        weights = dense(layer, group)
        return np.zeros_like(weights) if group in ("o", "down") else weights

    behind = Layers(card, LENGTH).through(0, layer, hidden, weigh)
    assert list(seen) == ["qkv", "o", "gate_up", "down"]
    assert {group: x.shape for group, x in seen.items()} == {
        "qkv": (2, LENGTH, card.hidden),
        "o": (2, LENGTH, card.heads * card.head_dim),
        "gate_up": (2, LENGTH, card.hidden),
        "down": (2, LENGTH, card.ffn),
    }
    assert np.array_equal(behind, hidden)  # both halves of the layer added nothing
