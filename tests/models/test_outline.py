"""Outlines of files: what their own tensors say, and that nothing in them but a model is taken for one. Names and
sizes alone are in test_shapes.py."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edgewise.errors import EdgewiseError, SourceError, UsageError
from edgewise.models.known import GUESSED_SIZES, family, known, of_size, of_words
from edgewise.models.outline import Outline
from edgewise.models.outline_files import of_config, of_gguf, of_path
from edgewise.models.source import pull
from tiny import save_gguf, tiny

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 3, 64, 4, 2, 16, 96, 320
CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
FIELDS: Mapping[str, Any] = {
    "block_count": LAYERS,
    "embedding_length": HIDDEN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "feed_forward_length": FFN,
    "context_length": 256,
}
noisy = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def tensors(tied: bool = True) -> dict[str, np.ndarray]:
    """By the names of a GGUF: the layers as one table each, which count as any others do."""
    layer = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * FFN
    found = {f"blk.{n}.all.weight": np.zeros((layer // HIDDEN, HIDDEN), np.float16) for n in range(LAYERS)}
    found["token_embd.weight"] = np.zeros((VOCAB, HIDDEN), np.float16)
    return found if tied else {**found, "output.weight": np.zeros((VOCAB, HIDDEN), np.float16)}


def config(directory: Path, changes: Mapping[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps({**CONFIG, **(changes or {})}))
    return directory


def gguf_file(path: Path, changes: Mapping[str, Any] | None = None, **given: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {**FIELDS, **(changes or {})}.items():
        if isinstance(value, list):
            writer.add_array(f"llama.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"llama.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"llama.{key}", value)
        elif value is not None:
            writer.add_string(f"llama.{key}", value)
    for name, data in (given or tensors()).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("outline", {one.name: one for one in known().values()}.values(), ids=lambda one: one.name)
def test_a_known_model_is_one_of_its_family_and_found_by_its_name(outline: Outline) -> None:
    assert of_words(f"someone/{outline.name}-Instruct-GGUF") is outline
    assert outline in family(outline)
    assert not outline.guessed
    assert outline.kv_values(outline.context) <= outline.kv_values_read(outline.context)
    assert 0 < outline.active <= outline.total


@given(billions=st.floats(0.02, 700))
def test_a_size_alone_makes_a_shape_of_that_size(billions: float) -> None:
    outline = of_words(f"{billions:.4f}B llama-like")
    assert outline.guessed
    assert outline.total == pytest.approx(round(billions, 4) * 1e9, rel=0.12 if billions < 0.1 else 0.04)
    assert outline.heads % outline.kv_heads == 0 or outline.kv_heads < outline.heads
    assert [one.total for one in family(outline)] == sorted(of_size("", n * 1e9).total for n in GUESSED_SIZES)


@given(st.text(max_size=40))
def test_any_words_are_a_model_or_a_usage_error(words: str) -> None:
    try:
        outline = of_words(words)
    except UsageError:
        return
    assert outline.total > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_bundle_weighs_what_its_files_weigh(tmp_path: Path, tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    bundle = pull(str(save_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_0)), home=tmp_path)
    outline = of_path(bundle.path)
    assert (outline.name, outline.layers, outline.vocab, outline.tied) == (bundle.name, LAYERS, VOCAB, tied)
    stored = outline.stored
    assert stored is not None
    sizes = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
    assert stored.head + stored.embedding == sizes["blocks/vocabulary.data"]
    assert stored.embedding == (0 if tied else stored.head)
    assert sizes["blocks/block-00.data"] <= stored.body < sum(sizes.values()) - stored.head - stored.embedding


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_is_measured_by_its_tensors(tmp_path: Path, tied: bool) -> None:
    more = {"v.blk.0.weight": np.zeros((8, 32), np.float16), "blk.0.extra.weight": np.zeros((4, HIDDEN), np.float32)}
    outline = of_gguf(gguf_file(tmp_path / "m.gguf", **tensors(tied), **more))
    plain = of_config(config(tmp_path, {"tie_word_embeddings": tied}))
    assert outline.extra == 4 * HIDDEN  # the eyes of a model that sees are no part of it
    assert outline.total == plain.total + 4 * HIDDEN
    stored = outline.stored
    assert stored is not None
    assert stored.body == 2 * plain.body + 4 * 4 * HIDDEN
    assert (stored.head, stored.embedding) == (2 * VOCAB * HIDDEN, 0 if tied else 2 * VOCAB * HIDDEN)
    assert outline.name == "m"


def test_layers_may_differ_in_a_gguf(tmp_path: Path) -> None:
    changes = {"attention.head_count_kv": [2, 0, 2], "attention.sliding_window": 8}
    changes |= {"attention.sliding_window_pattern": [True, False, False], "feed_forward_length": [96, 64, 96]}
    outline = of_gguf(gguf_file(tmp_path / "m.gguf", changes))
    assert outline.kv_heads == 2
    assert outline.ffn == 96
    assert outline.windows == (8, 1, 0)  # the second keeps no keys, only a state
    assert outline.kv_values(100) == 2 * 2 * HEAD_DIM * (8 + 1 + 100)


def test_a_directory_with_its_weights_is_exact(tmp_path: Path) -> None:
    names = {f"blk.{n}.all.weight": f"model.layers.{n}.all.weight" for n in range(LAYERS)}
    names["token_embd.weight"] = "model.embed_tokens.weight"
    weights = {names[name]: data for name, data in tensors().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()  # stored twice, though it is one
    weights["model.vision_tower.weight"] = np.zeros((5, 5), np.float16)
    parts = list(weights.items())
    for number, part in enumerate((parts[:2], parts[2:])):
        save_file(dict(part), tmp_path / f"model-{number}.safetensors", {"format": "pt"})
    outline = of_path(config(tmp_path))
    assert outline.extra == 0
    assert outline.stored is not None
    assert outline.stored.total == 2 * outline.total


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tie_word_embeddings": None, "model_type": "gemma3"}, {"tied": True}),
        ({"tie_word_embeddings": None}, {"tied": False}),
        ({"sliding_window": 8, "sliding_window_pattern": 3}, {"windows": (8, 8, 0)}),
        ({"sliding_window": 8, "use_sliding_window": False}, {"windows": ()}),
        ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "conv"]}, {"windows": (0, 8, 1)}),
        ({"num_local_experts": 4, "num_experts_per_tok": 2}, {"experts": 4, "experts_used": 2, "ffn": FFN}),
        ({"num_experts": 4, "moe_intermediate_size": 32, "n_shared_experts": 2}, {"ffn": 32, "shared_ffn": 64}),
        ({"hidden_act": "relu2"}, {"extra": -HIDDEN * FFN * LAYERS}),
        ({"head_dim": 128}, {"head_dim": 128}),
        ({"num_key_value_heads": None}, {"kv_heads": HEADS}),
    ],
)
def test_what_a_config_says_of_its_layers(tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    outline = of_config(config(tmp_path, changes))
    assert {name: getattr(outline, name) for name in expected} == expected
    nested = {"hidden_size": "of the eyes", "text_config": {**CONFIG, **changes}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert of_config(tmp_path / "config.json") == outline


@noisy
@given(
    key=st.sampled_from(
        [
            *CONFIG,
            *("head_dim", "layer_types", "sliding_window", "sliding_window_pattern", "hidden_act", "text_config"),
            *("num_experts", "num_experts_per_tok", "first_k_dense_replace", "num_kv_shared_layers"),
            *("n_shared_experts", "hidden_size_per_layer_input", "vocab_size_per_layer_input"),
            *("use_double_wide_mlp", "linear_num_value_heads"),
        ]
    ),
    value=junk,
)
def test_a_config_with_any_value_is_an_outline_or_refused(tmp_path: Path, key: str, value: Any) -> None:
    try:
        outline = of_config(config(tmp_path, {"sliding_window": 4, "num_experts": 2, key: value}))
    except EdgewiseError:
        return
    assert 0 < outline.active <= outline.total
    assert outline.kv_values_read(100) >= 0


@noisy
@given(
    key=st.sampled_from((*FIELDS, "attention.sliding_window", "attention.sliding_window_pattern", "expert_count"))
    | st.sampled_from(("attention.key_length", "attention.shared_kv_layers", "expert_used_count")),
    value=st.integers(0, (1 << 32) - 1)
    | st.lists(st.integers(0, 1 << 30), min_size=1, max_size=4)
    | st.booleans()
    | st.text(st.characters(codec="ascii"), max_size=3),
)
def test_a_gguf_with_any_field_is_an_outline_or_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    try:
        outline = of_gguf(gguf_file(path, {"attention.sliding_window": 4, key: value}))
    except EdgewiseError:
        return
    assert outline.total > 0


@noisy
@given(at=st.integers(0, 1200), noise=st.binary(min_size=1, max_size=8))
def test_a_gguf_with_other_bytes_is_an_outline_or_refused(tmp_path: Path, at: int, noise: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    data = bytearray(gguf_file(path).read_bytes())
    data[at : at + len(noise)] = noise
    path.write_bytes(data)
    try:
        outline = of_gguf(path)
    except EdgewiseError:
        return
    assert outline.total > 0


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}x",
        b"[]",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"dtype": "F16", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F16", "shape": [-2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F16", "shape": [2], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 1e999]}}',
        b'{"a": {"dtype": "F16", "shape": ["two"], "data_offsets": [0, 4]}}',
        b"\xff" * 40,
        b"[" * 5000,
    ],
)
def test_a_damaged_table_of_weights_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(SourceError):
        of_config(config(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + header)
    with pytest.raises(SourceError, match="says that its header has"):
        of_config(config(tmp_path))


def test_what_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"neither .* nor config\.json"):
        of_path(tmp_path)
    for name in ("no.json", "no.gguf"):
        with pytest.raises(SourceError):
            of_path(tmp_path / name)
    with pytest.raises(SourceError, match="no table of tokens"):
        of_path(gguf_file(tmp_path / "m.gguf", **{"blk.0.weight": np.zeros((4, 4), np.float16)}))
