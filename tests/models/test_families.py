"""Each family against transformers on a tiny random model: prefill, then 16 cached decode steps, float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from edgewise.engines.base import Row
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.errors import ModelError, SourceError, UnsupportedModel
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from tiny import VOCAB, save_gguf, save_hf, tiny

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
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}

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
}


async def worst_difference(bundle: Bundle, model: Any, prompt: int = 100) -> float:
    """Largest |delta logit| over a prefill and STEPS cached steps; the prompt outruns the ropes' original length."""
    ids = np.random.default_rng(3).integers(0, VOCAB, prompt + STEPS)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    lm = OnnxLM(bundle, slots=1)
    await lm.open("s", len(ids))
    got = [(await lm.forward([Row("s", 0, ids[:prompt], prompt)]))[0].copy()]
    for n in range(prompt, prompt + STEPS):
        got.append((await lm.forward([Row("s", n, ids[n : n + 1])]))[0].copy())
    await lm.shutdown()
    assert expected.std() > 0.5  # a flat model would prove nothing
    return float(np.abs(np.concatenate(got) - expected).max())


@pytest.mark.parametrize("case", CASES)
async def test_family_equals_transformers(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = tiny(family, **changes)
    bundle = pull(str(save_hf(model, tmp_path / "hf")), home=tmp_path)
    assert await worst_difference(bundle, model) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
async def test_narrow_checkpoints_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny("llama")
    bundle = pull(str(save_hf(model, tmp_path / "hf", dtype)), home=tmp_path)
    assert await worst_difference(bundle, model) <= 1e-4
    kinds = bundle.manifest.quantization["source"]
    assert list(kinds) == [str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
async def test_gguf_types_are_exact(family: str, kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    path = save_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType[kind])
    bundle = pull(str(path), home=tmp_path, activations="fp32")
    assert await worst_difference(bundle, model) <= 1e-4
    assert bundle.manifest.quantization["weights"] == "exact"


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3, YARN], ids=lambda rope: rope["rope_type"])
async def test_gguf_rope_scaling(rope: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama", rope_parameters=rope)
    path = save_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.F32)
    assert await worst_difference(pull(str(path), home=tmp_path), model) <= 1e-4


@pytest.mark.parametrize("layers_per_block", [1, 2, 3])
async def test_any_block_size_gives_the_same_bits(layers_per_block: int, tmp_path: Path) -> None:
    path = save_gguf(tiny("llama"), tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_1)
    ids = np.random.default_rng(3).integers(0, VOCAB, 200)
    logits = []
    for size in (3, layers_per_block):
        bundle = pull(str(path), home=tmp_path, name=f"blocks-of-{size}", layers_per_block=size)
        assert len(bundle.manifest.graphs.blocks) == -(-3 // size)
        lm = OnnxLM(bundle, mode="stable", slots=1)
        await lm.open("s", len(ids))
        logits.append((await lm.forward([Row("s", 0, ids, len(ids))]))[0].copy())
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
    with pytest.raises(UnsupportedModel, match=r"mamba.*llama, qwen2.*llamacpp"):
        pull(str(path), home=tmp_path)


def test_other_weight_types_name_the_way_out(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=256, intermediate_size=256)
    path = save_gguf(model, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q5_0)
    with pytest.raises(UnsupportedModel, match=r"Q5_0.*Q4_1.*llamacpp"):
        pull(str(path), home=tmp_path)


def test_a_tensor_that_the_card_does_not_explain_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    directory = save_hf(tiny("llama"), tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)}, directory / "model.safetensors"
    )
    with pytest.raises(UnsupportedModel, match="q_norm"):
        pull(str(directory), home=tmp_path)
    assert not list((tmp_path / "bundles").glob("*"))  # and nothing half-made is left


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    directory = save_hf(tiny("llama"), tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        pull(str(directory), home=tmp_path)


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
