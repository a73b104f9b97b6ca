"""Each family on a tiny random model: against transformers (a prompt in two chunks that outruns the attention windows,
then 16 cached decode steps, float32), and against itself, bit for bit, however its rows come."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig

from edgewise.engines.base import Row
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.errors import BundleError, ModelError, SourceError, UnsupportedModel
from edgewise.models.bundle import Bundle
from edgewise.models.card import Card
from edgewise.models.from_hf import FAMILIES as KNOWN_FAMILIES
from edgewise.models.ggml_types import KNOWN
from edgewise.models.source import pull
from oracle import LlamaCpp
from tiny import FAMILIES, VOCAB, WINDOW, save_gguf, save_hf, tiny

STEPS = 16
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
WIDE = {  # rows of whole blocks of the K types; logits as large as those of the narrow models
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "initializer_range": 0.075,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "qwen2-rope-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "mistral": ("mistral", {}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "gemma2": ("gemma2", {}),
    "gemma2-scale": ("gemma2", {"query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {}),
    "gemma3-rope-linear": ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}}),
    "phi3": ("phi3", {}),
    "phi3-partial-rope": ("phi3", {"hidden_size": 128, "partial_rotary_factor": 0.5}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
}


async def worst_difference(bundle: Bundle, model: Any, prompt: int = 100) -> float:
    """Largest |delta logit| over a prompt in two chunks and STEPS cached steps; the prompt outruns the ropes' original
    length and the windows."""
    ids = np.random.default_rng(3).integers(0, VOCAB, prompt + STEPS)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    lm = OnnxLM(bundle, slots=1)
    await lm.open("s", len(ids))
    got = await fed(lm, ids, [prompt * 2 // 3, prompt - prompt * 2 // 3] + [1] * STEPS)
    await lm.shutdown()
    assert expected.std() > 0.5  # a flat model would prove nothing
    return float(np.abs(got - expected).max())


async def fed(lm: OnnxLM, ids: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """All logits of the ids, fed in rows of those sizes."""
    ends = np.cumsum(sizes)
    assert ends[-1] == len(ids)
    rows = [Row("s", start, ids[start:end], end - start) for start, end in pairwise([0, *ends.tolist()])]
    return np.concatenate([(await lm.forward([row]))[0].copy() for row in rows])


@pytest.mark.parametrize("case", CASES)
async def test_family_equals_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = tiny(family, **changes)
    bundle = pull(str(save_hf(model, tmp_path / "hf")), home=tmp_path)
    assert await worst_difference(bundle, model) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
async def test_gguf_family_equals_transformers(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    path = save_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_1)
    bundle = pull(str(path), home=tmp_path, activations="fp32")
    assert await worst_difference(bundle, model) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_reads_the_tiny_files_as_transformers_does(family: str, tmp_path: Path) -> None:
    """Names, orders and scales in them are therefore those of real files."""
    unlike = {
        "mistral": {"sliding_window": None},
        "phi3": {"sliding_window": None},
    }  # llama.cpp leaves these windows out
    model = tiny(family, **unlike.get(family, {}))
    judge = LlamaCpp(save_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32))
    ids = np.random.default_rng(3).integers(0, VOCAB, 100)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.from_numpy(ids)[None]).logits[0, -1], -1)
    found = judge.following(ids, VOCAB, letter=0)
    assert len(found) == VOCAB
    bound = 5e-3 if family.startswith("gemma") else 1e-4  # llama.cpp reads GELU off a table of float16
    assert max(abs(found[token] - float(expected[token])) for token in found) < bound


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text of wide heads"])
@pytest.mark.parametrize("activations", ["int8", "fp32"])
async def test_rows_have_the_same_bits_however_they_come(family: str, activations: str, tmp_path: Path) -> None:
    family, _, wide = family.partition(" of ")
    path = save_gguf(
        tiny(family, **({"head_dim": 256} if wide else {})), tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_1
    )
    ids = np.random.default_rng(5).integers(0, VOCAB, 256)
    lm = OnnxLM(pull(str(path), home=tmp_path, activations=activations), mode="stable", slots=1)
    await lm.open("s", len(ids))
    at_once = await fed(lm, ids, [256])
    for sizes in ([1] * 256, [1, 2, 3, 5, 8, 13, 21, 34, 33, 136], [WINDOW] * 10 + [16], [65, 62, 129], [255, 1]):
        assert np.array_equal(await fed(lm, ids, sizes), at_once), sizes


async def test_a_window_off_by_one_would_show(tmp_path: Path) -> None:
    path = save_gguf(tiny("mistral"), tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    bundle = pull(str(path), home=tmp_path)
    for window in (WINDOW - 1, WINDOW + 1):
        assert await worst_difference(bundle, tiny("mistral", sliding_window=window)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
async def test_narrow_checkpoints_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("llama")
    bundle = pull(str(save_hf(model, tmp_path / "hf", dtype)), home=tmp_path)
    assert await worst_difference(bundle, model) <= 1e-4
    kinds = bundle.manifest.quantization["source"]
    assert list(kinds) == [str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("tied", [True, False])
async def test_gguf_types_are_exact(family: str, kind: str, tied: bool, tmp_path: Path) -> None:
    elements = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    model = tiny(family, tie_word_embeddings=tied, **(WIDE if elements > 32 else {}))
    path = save_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])
    bundle = pull(str(path), home=tmp_path, activations="fp32")
    assert await worst_difference(bundle, model) <= 1e-4
    assert bundle.manifest.quantization["weights"] == "exact"


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3, YARN], ids=lambda rope: rope["rope_type"])
async def test_gguf_rope_scaling(rope: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama", rope_parameters=rope)
    path = save_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    assert await worst_difference(pull(str(path), home=tmp_path), model) <= 1e-4


@pytest.mark.parametrize(
    ("family", "layers_per_block"),
    [("llama", 1), ("llama", 2), ("gemma3_text", 1), ("gemma3_text", 3), ("smollm3", 3)],
)
async def test_any_block_size_gives_the_same_bits(family: str, layers_per_block: int, tmp_path: Path) -> None:
    model = tiny(family)
    layers = model.config.num_hidden_layers
    path = save_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_1)
    ids = np.random.default_rng(3).integers(0, VOCAB, 200)
    logits = []
    for size in (layers, layers_per_block):
        bundle = pull(str(path), home=tmp_path, name=f"blocks-of-{size}", layers_per_block=size)
        assert len(bundle.manifest.graphs.blocks) == -(-layers // size)
        lm = OnnxLM(bundle, mode="stable", slots=1)
        await lm.open("s", len(ids))
        logits.append(await fed(lm, ids, [200]))
    assert np.array_equal(*logits)


async def test_requantized_is_near_but_not_equal(tmp_path: Path) -> None:
    model = tiny("llama")
    source = str(save_hf(model, tmp_path / "hf"))
    errors = {}
    for bits in ("int8", "int4"):
        bundle = pull(source, home=tmp_path, requantize=bits, activations="fp32")
        assert bundle.name == f"hf-{bits}"
        assert bundle.manifest.quantization["weights"] == bits
        errors[bits] = await worst_difference(bundle, model)
    assert 1e-4 < errors["int8"] < errors["int4"] / 4


def test_other_architectures_name_the_way_out(tmp_path: Path) -> None:
    path = save_gguf(tiny("llama"), tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    data = path.read_bytes().replace(b"llama", b"mamba")
    path.write_bytes(data)
    with pytest.raises(UnsupportedModel, match=r"mamba.*llama.*qwen2.*llamacpp"):
        pull(str(path), home=tmp_path)


def test_other_weight_types_name_the_way_out(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=256, intermediate_size=256)
    path = save_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.TQ2_0)
    data = path.read_bytes()
    for rows in (128, 256, VOCAB):  # IQ2_XXS has blocks of the same size
        before, after = (
            struct.pack("<IQQI", 2, 256, rows, int(gguf.GGMLQuantizationType[k])) for k in ("TQ2_0", "IQ2_XXS")
        )
        data = data.replace(before, after)
    path.write_bytes(data)
    with pytest.raises(UnsupportedModel, match=r"IQ2_XXS cannot.*Q4_1.*llamacpp"):
        pull(str(path), home=tmp_path)


async def test_a_mix_of_types_in_one_layer(tmp_path: Path) -> None:
    """As the mixes of K types have it: q, k and v, or gate and up, that no fused product can hold."""
    model = tiny("llama", **WIDE)
    kinds = [gguf.GGMLQuantizationType[k] for k in ("Q4_K", "Q2_K", "Q6_K", "Q5_0", "Q3_K")]
    turns = itertools.cycle(kinds)
    path = save_gguf(model, tmp_path / "m.gguf", lambda name: next(turns))
    bundle = pull(str(path), home=tmp_path, activations="fp32")
    assert await worst_difference(bundle, model) <= 1e-4
    assert len(bundle.manifest.quantization["source"]) == len(kinds)


def test_a_tensor_that_the_card_does_not_explain_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    directory = save_hf(tiny("llama"), tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)}, directory / "model.safetensors"
    )
    with pytest.raises(UnsupportedModel, match="q_norm"):
        pull(str(directory), home=tmp_path)
    assert not (tmp_path / "bundles").exists()  # it is refused before anything is written


def test_a_tensor_too_many_in_a_gguf_is_refused(tmp_path: Path) -> None:
    path = save_gguf(tiny("llama", num_hidden_layers=3), tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    key = b"llama.block_count" + struct.pack("<II", 4, 3)
    assert path.read_bytes().count(key) == 1
    path.write_bytes(path.read_bytes().replace(key, key[:-4] + struct.pack("<I", 2)))
    with pytest.raises(UnsupportedModel, match=r"9 tensors that we do not know: blk\.2\.attn_k"):
        pull(str(path), home=tmp_path)
    assert not (tmp_path / "bundles").exists()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    directory = save_hf(tiny("llama"), tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        pull(str(directory), home=tmp_path)
    assert not (tmp_path / "bundles").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": "x"},
        {"rms_norm_eps": "x"},
        {"rms_norm_eps": float("nan")},
        {"num_key_value_heads": [1]},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"vocab_size": -1},
        {"rope_parameters": "yarn"},
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "longrope"}},
        {"hidden_act": "relu"},
    ],
    ids=str,
)
def test_a_bad_config_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = save_hf(tiny("llama"), tmp_path / "hf")
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ModelError):
        pull(str(directory), home=tmp_path)
    assert not list((tmp_path / "bundles").glob("*"))


def test_the_yarn_factor_of_a_gguf_multiplies(tmp_path: Path) -> None:
    model = tiny("llama", rope_parameters=YARN)
    plain = pull(str(save_gguf(model, tmp_path / "a.gguf", gguf.GGMLQuantizationType.F32)), home=tmp_path)
    doubled = save_gguf(model, tmp_path / "b.gguf", gguf.GGMLQuantizationType.F32, yarn_attn_factor=2.0)
    assert pull(str(doubled), home=tmp_path).card.rope.attention_factor == pytest.approx(
        2 * plain.card.rope.attention_factor
    )


@pytest.mark.parametrize(
    ("family", "older"),
    [
        ("gemma3_text", {"sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        ("gemma2", {"rope_theta": 1e4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "rope_theta": 1e4}),
        ("smollm3", {"no_rope_layer_interval": 4, "rope_theta": 2e6}),
    ],
)
def test_older_configs_say_the_same(family: str, older: dict[str, Any], tmp_path: Path) -> None:
    """Steps and single numbers, where configs of today hold a list or an object for each kind of layer."""
    changes = {key: value for key, value in older.items() if "window" in key and "pattern" not in key}
    directory = save_hf(tiny(family, **changes), tmp_path / "hf")
    before = pull(str(directory), home=tmp_path).card
    file = directory / "config.json"
    config = json.loads(file.read_text())
    removed = [config.pop(key, None) for key in ("layer_types", "rope_parameters", "no_rope_layers")]
    assert any(removed)
    file.write_text(json.dumps(config | older))
    assert pull(str(directory), home=tmp_path).card == before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_as_transformers_takes_it(family: str) -> None:
    defaults = AutoConfig.for_model(family)
    known = {key: value for key, value in KNOWN_FAMILIES[family].defaults.items() if hasattr(defaults, key)}
    assert {key: getattr(defaults, key) for key in known} == known


def test_cards_of_before_are_read_and_still_written(tmp_path: Path) -> None:
    card = pull(str(save_gguf(tiny("llama"), tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)), home=tmp_path).card
    first = {"family", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab", "context", "norm_eps"}
    assert set(card.to_json()) == first | {"rope", "tied"}
    assert Card.from_json(card.to_json() | {"qkv_bias": False, "attention_out_bias": False, "ffn_bias": False}) == card


def test_a_card_comes_back_from_json(tmp_path: Path) -> None:
    card = pull(str(save_hf(tiny("gemma3_text"), tmp_path / "hf")), home=tmp_path).card
    assert card.windows == (WINDOW,) * 5 + (0, WINDOW)
    assert [card.rope_of(n) for n in range(7)] == ["local_"] * 5 + ["", "local_"]
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card


@pytest.mark.parametrize(
    "changes",
    [
        {"windows": [24]},
        {"windows": [24, -1, 0]},
        {"windows": [24, 0.5, 0]},
        {"windows": 24},
        {"unrotated": [3]},
        {"unrotated": "x"},
        {"activation": "relu"},
        {"qk_norm": "heads"},
        {"attention_scale": float("nan")},
        {"attention_scale": "x"},
        {"attention_cap": -1.0},
        {"logit_cap": float("inf")},
        {"embedding_scale": 0.0},
        {"local_rope": {}},
        {"local_rope": 1},
        {"rope": {"inverse_frequencies": [1.0] * 7, "attention_factor": 1.0}},
        {"rope": {"inverse_frequencies": [1.0] * 16, "attention_factor": 1.0}},
        {"more": 1},
    ],
    ids=str,
)
def test_bad_cards_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    card = pull(str(save_gguf(tiny("llama"), tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)), home=tmp_path).card
    with pytest.raises(BundleError):
        Card.from_json(card.to_json() | changes)
