"""Weights under transformers' names, of every kind of source, against the model that the source was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from edgewise.compress.student.network import made, saved
from edgewise.engines.base import Row
from edgewise.engines.load import local_model
from edgewise.errors import BundleError, SourceError, UnsupportedModel
from edgewise.models import hf_weights
from edgewise.models.bundle import Bundle
from edgewise.models.hf_weights import HfWeights
from edgewise.models.source import pull
from edgewise.types import FloatArray
from tiny import SPECIAL, VOCAB, save_gguf, save_hf, tiny

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32, "rope_theta": 123456.0}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


def weights_of(model: PreTrainedModel) -> dict[str, FloatArray]:
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def same(found: Mapping[str, FloatArray], expected: Mapping[str, FloatArray]) -> bool:
    """To the bit, and with the same names."""
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


def logits(model: PreTrainedModel, ids: list[int]) -> FloatArray:
    with torch.no_grad():
        found: FloatArray = model(torch.tensor([ids])).logits[0].numpy()
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_bundle_and_its_directory_have_the_models_own_weights(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = tiny(family, **changes)
    directory = save_hf(model, tmp_path / "hf")
    bundle = pull(str(directory), home=tmp_path)
    for source in (directory, bundle, bundle.path):
        assert same(hf_weights.of(source).tensors, weights_of(model))
    ids = list(range(40))
    assert np.array_equal(logits(made(hf_weights.of(bundle)), ids), logits(made(hf_weights.of(directory)), ids))
    assert np.abs(logits(made(hf_weights.of(bundle)), ids) - logits(model, ids)).max() < 2e-4  # sdpa and eager


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q4_1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_has_the_numbers_that_its_blocks_stand_for(
    family: str, kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    model = tiny(family)
    path = save_gguf(model, tmp_path / "model.gguf", kind)
    assert same(hf_weights.of(path).tensors, weights_of(model)), "q and k stand in the order of halves"
    assert same(hf_weights.of(pull(str(path), home=tmp_path)).tensors, weights_of(model))


async def test_transformers_with_a_bundles_weights_gives_the_logits_of_our_engine(tmp_path: Path) -> None:
    path = save_gguf(tiny("llama"), tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q4_1)
    bundle = pull(str(path), home=tmp_path, activations="fp32")
    ids = np.random.default_rng(1).integers(0, VOCAB, 60)
    lm = local_model(bundle, slots=1)
    await lm.open("s", len(ids))
    (ours,) = await lm.forward([Row("s", 0, ids, len(ids))])
    theirs = logits(made(hf_weights.of(bundle)), ids.tolist())
    assert theirs.std() > 0.5
    assert np.abs(theirs - ours).max() < 1e-3
    await lm.shutdown()


def test_from_a_bundle_to_a_directory_and_back_nothing_changes(tmp_path: Path) -> None:
    path = save_gguf(tiny("llama"), tmp_path / "model.gguf", gguf.GGMLQuantizationType.F32)
    first = pull(str(path), home=tmp_path / "a")
    weights = hf_weights.of(first)
    second = pull(str(saved(made(weights), weights.tokenizer, tmp_path / "model")), home=tmp_path / "b")
    assert second.card == first.card
    assert same(hf_weights.of(second).tensors, weights.tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert second.file(name).read_bytes() == first.file(name).read_bytes()


def test_transformers_reads_the_tokenizer_that_is_written(tmp_path: Path) -> None:
    path = save_gguf(tiny("llama"), tmp_path / "model.gguf", gguf.GGMLQuantizationType.F32)
    weights = hf_weights.of(path)
    directory = saved(made(weights), weights.tokenizer, tmp_path / "model")
    theirs, ours = AutoTokenizer.from_pretrained(directory), weights.tokenizer.opened()
    text = "a bad egg<|im_end|> für 你"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.eos_token, theirs.bos_token) == ("<|im_end|>", "<|endoftext|>")
    generation = json.loads((directory / "generation_config.json").read_bytes())
    assert sorted(generation["eos_token_id"]) == sorted(ours.stop_ids)
    assert weights.tokenizer.end == VOCAB - len(SPECIAL), "<|endoftext|> ends a text, <|im_end|> a turn"


def test_other_families_come_of_their_directory_alone(tmp_path: Path) -> None:
    model = tiny("gemma2")
    directory = save_hf(model, tmp_path / "hf")
    assert same(hf_weights.of(directory).tensors, weights_of(model))
    with pytest.raises(UnsupportedModel, match=r"'gemma2' is no llama, qwen2 or qwen3 of transformers \(take the"):
        hf_weights.of(pull(str(directory), home=tmp_path))


def test_a_scaled_rope_is_not_taken_for_a_plain_one(tmp_path: Path) -> None:
    linear = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
    directory = save_hf(tiny("llama", rope_parameters=linear), tmp_path / "hf")
    with pytest.raises(UnsupportedModel, match="scaled or partial"):
        hf_weights.of(pull(str(directory), home=tmp_path))
    assert hf_weights.of(directory).config["rope_parameters"] == linear


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    model = tiny("llama")
    directory = save_hf(model, tmp_path / "hf", torch.bfloat16)
    found = hf_weights.of(directory)
    assert same(found.tensors, weights_of(model))
    assert {values.dtype for values in found.tensors.values()} == {np.dtype(np.float32)}


def test_the_licence_comes_along(tmp_path: Path) -> None:
    directory = save_hf(tiny("llama"), tmp_path / "hf")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (directory / "LICENSE").write_text("the terms")
    bundle = pull(str(directory), home=tmp_path)
    found: list[HfWeights] = [hf_weights.of(directory), hf_weights.of(bundle)]
    assert [weights.licence for weights in found] == ["apache-2.0"] * 2
    for n, weights in enumerate(found):
        target = saved(
            made(weights), weights.tokenizer, tmp_path / f"s{n}", licence=weights.licence, notices=weights.notices
        )
        assert (target / "LICENSE").read_text() == "the terms"
        assert pull(str(target), home=tmp_path / f"h{n}").manifest.licence["id"] == "apache-2.0"


def test_what_is_no_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "odd.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(SourceError, match="odd"):
        hf_weights.of(tmp_path / "odd.gguf")
    with pytest.raises(SourceError, match=r"no config\.json"):
        hf_weights.of(tmp_path)
    (tmp_path / "edgewise.json").write_text("{}")
    with pytest.raises(BundleError):
        hf_weights.of(tmp_path)


def test_a_bundle_of_another_size_of_weights_is_verified(tmp_path: Path) -> None:
    bundle: Bundle = pull(str(save_hf(tiny("llama"), tmp_path / "hf")), home=tmp_path)
    data = next(bundle.path.glob("blocks/block-00.data"))
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        dict(hf_weights.of(bundle.path).tensors)
