"""Students cut from a teacher: the same with all there is, the right parts with less, and bundles in the end."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from edgewise.compress.student.network import made, saved
from edgewise.compress.student.surgery import chosen, ffn_worth, hidden_worth, smaller
from edgewise.compress.student.vocabulary import counted, pruned
from edgewise.engines.base import Row
from edgewise.engines.load import local_model
from edgewise.errors import SourceError, StorageError, UnsupportedModel, UsageError
from edgewise.models import hf_weights
from edgewise.models.hf_weights import HfWeights
from edgewise.models.source import pull
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import FloatArray
from tiny import FAMILIES, VOCAB, save_hf, tiny

IDS = list(range(1, 60))


def teacher(directory: Path, family: str = "llama", **changes: Any) -> tuple[HfWeights, PreTrainedModel]:
    model = tiny(family, **changes)
    weights = hf_weights.of(save_hf(model, directory / "teacher"))
    plain = AutoModelForCausalLM.from_pretrained(directory / "teacher").eval()  # with the attention that students have
    return weights, plain


def logits(model: PreTrainedModel, ids: list[int] = IDS) -> FloatArray:
    with torch.no_grad():
        found: FloatArray = model.eval()(torch.tensor([ids])).logits[0].numpy()
    return found


@pytest.mark.parametrize("family", [*FAMILIES, "untied"])
def test_a_student_with_everything_is_its_teacher(family: str, tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": False} if family == "untied" else {}
    weights, model = teacher(tmp_path, "llama" if family == "untied" else family, **changes)
    layers = model.config.num_hidden_layers
    student = made(weights, layers=layers, kept=np.arange(VOCAB))
    assert np.array_equal(logits(student), logits(model))
    assert np.array_equal(logits(made(weights)), logits(model))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("wanted", [1, 2, 3, (0, 3), (1,), (0, 2, 4)])
def test_layers_left_out_are_as_if_they_did_nothing(wanted: int | tuple[int, ...], tmp_path: Path) -> None:
    weights, model = teacher(tmp_path, num_hidden_layers=5)
    kept = chosen(wanted, 5)
    with torch.no_grad():
        for n in set(range(5)) - set(kept):  # a residual layer that writes zeros
            layer = model.model.layers[n]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert np.abs(logits(made(weights, layers=wanted)) - logits(model)).max() < 1e-5


def test_layers_are_spread_with_both_ends() -> None:
    assert [chosen(n, 30) for n in (1, 2, 4, 30)] == [[0], [0, 29], [0, 10, 19, 29], list(range(30))]
    for wanted, there in itertools.product((3, 8, 9), (9, 10, 30)):
        picked = chosen(wanted, there)
        assert (picked[0], picked[-1], len(set(picked))) == (0, there - 1, wanted)


def test_kept_tokens_have_their_logits(tmp_path: Path) -> None:
    for name, tied in (("a", True), ("b", False)):
        weights, model = teacher(tmp_path / name, tie_word_embeddings=tied)
        kept = np.sort(np.random.default_rng(2).choice(VOCAB, 100, replace=False))
        found = logits(made(weights, kept=kept), list(range(50)))
        assert np.abs(found - logits(model, kept[:50].tolist())[:, kept]).max() < 1e-5


def test_what_is_worth_nothing_is_left_out_first(tmp_path: Path) -> None:
    """A teacher with idle numbers: without them, it is the same."""
    weights, _ = teacher(tmp_path)
    tensors = {name: values.copy() for name, values in weights.tensors.items()}
    idle, silent = np.arange(3, 64, 4), np.arange(2, 96, 3)  # of the hidden state, of the feed-forward
    for name, values in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values[idle] = 0
        if name == "model.embed_tokens.weight":
            values[:, idle] = 0
        if name.endswith("up_proj.weight"):
            values[silent] = 0
    eps = dict(weights.config) | {"rms_norm_eps": 0.0}
    teaching = HfWeights(eps, tensors, weights.tokenizer, weights.name)
    assert (hidden_worth(teaching)[idle] == 0).all()
    assert (ffn_worth(teaching, 1)[silent] == 0).all()
    narrow = made(teaching, ffn=96 - len(silent))
    assert narrow.config.intermediate_size == 64
    assert np.abs(logits(narrow) - logits(made(teaching))).max() < 1e-4
    size = 64 - len(idle)
    narrow = made(teaching, hidden=size)
    assert (narrow.config.hidden_size, narrow.config.head_dim, narrow.config.num_attention_heads) == (size, 16, 4)
    assert np.abs(logits(narrow) - logits(made(teaching))).max() < 1e-4


def test_a_number_is_worth_what_is_written_and_read(tmp_path: Path) -> None:
    weights, model = teacher(tmp_path)
    n, inner = 7, model.model
    written = [inner.embed_tokens.weight[:, n]]
    read = [inner.embed_tokens.weight[:, n] * inner.norm.weight[n]]
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        written += [attention.o_proj.weight[n], mlp.down_proj.weight[n]]
        read += [
            x.weight[:, n] * layer.input_layernorm.weight[n]
            for x in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        read += [x.weight[:, n] * layer.post_attention_layernorm.weight[n] for x in (mlp.gate_proj, mlp.up_proj)]
    expected = torch.cat(written).norm() * torch.cat(read).norm()
    assert hidden_worth(weights)[n] == pytest.approx(expected.item(), rel=1e-5)
    mlp, scale = inner.layers[2].mlp, inner.layers[2].post_attention_layernorm.weight
    expected = (mlp.gate_proj.weight[n] * scale).norm() * (mlp.up_proj.weight[n] * scale).norm()
    expected = expected * mlp.down_proj.weight[:, n].norm()
    assert ffn_worth(weights, 2)[n] == pytest.approx(expected.item(), rel=1e-5)


def test_from_scratch_is_the_seeds_and_leaves_other_random_numbers_alone(tmp_path: Path) -> None:
    weights, model = teacher(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    students = [made(weights, start="scratch", layers=2, hidden=32, ffn=64, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    first, again, other = (logits(student) for student in students)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(students[0].config)
    assert np.array_equal(first, logits(theirs)), "as transformers begins"
    assert (students[0].config.num_hidden_layers, students[0].config.hidden_size) == (2, 32)
    assert students[0].config.num_attention_heads == model.config.num_attention_heads


def test_it_may_start_where_another_stands(tmp_path: Path) -> None:
    weights, _ = teacher(tmp_path)
    vocabulary = pruned(weights.tokenizer, np.zeros(VOCAB, np.int64), 300)
    student = made(weights, kept=vocabulary.kept, layers=2)
    with torch.no_grad():
        student.model.norm.weight.mul_(1.5)
    place = saved(student, vocabulary.files, tmp_path / "student")
    again = made(weights, start=str(place), kept=vocabulary.kept)
    assert np.array_equal(logits(again), logits(student))
    assert made(weights, start=str(place), layers=1).config.num_hidden_layers == 1
    with pytest.raises(UsageError, match="has 300 tokens, the student's vocabulary 310"):
        made(weights, start=str(place), kept=np.arange(310))
    with pytest.raises(SourceError, match="cannot start from"):
        made(weights, start=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("requantize", ["int8", "int4"])
async def test_the_whole_way_to_a_bundle_that_answers(requantize: Any, tmp_path: Path) -> None:
    weights, _ = teacher(tmp_path)
    texts = ["a bad egg", "the cafe", "feed a bee"]
    vocabulary = pruned(weights.tokenizer, counted(weights.tokenizer, texts), 290)
    student = made(weights, layers=2, kept=vocabulary.kept, ffn=64)
    place = saved(student, vocabulary.files, tmp_path / "student", licence="apache-2.0")
    bundle = pull(str(place), home=tmp_path, requantize=requantize)
    tokenizer = Tokenizer.open(bundle.path)
    assert (bundle.card.layers, bundle.card.vocab, bundle.card.ffn, tokenizer.vocab_size) == (2, 290, 64, 290)
    assert bundle.manifest.licence["id"] == "apache-2.0"
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    ids = np.array(tokenizer.encode(" ".join(texts)), np.int64)
    lm = local_model(bundle, slots=1)
    await lm.open("s", len(ids))
    (found,) = await lm.forward([Row("s", 0, ids, len(ids))])
    expected = logits(student, ids.tolist())
    floor = {"int8": 0.999, "int4": 0.95}[requantize]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > floor
    await lm.shutdown()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_and_read_again_it_is_the_same(dtype: Any, tmp_path: Path) -> None:
    weights, _ = teacher(tmp_path)
    student = made(weights)
    place = saved(student, weights.tokenizer, tmp_path / "student", dtype=dtype)
    found = hf_weights.of(place)
    kind = getattr(torch, dtype)
    for name, values in student.named_parameters():
        assert np.array_equal(found.tensors[name], values.detach().to(kind).float().numpy())
    assert AutoConfig.from_pretrained(place).dtype == kind
    assert found.tokenizer == weights.tokenizer
    first = sorted(file.name for file in place.iterdir())
    saved(student, weights.tokenizer, place)
    assert sorted(file.name for file in place.iterdir()) == first
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_full_disk_leaves_the_student_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, student = teacher(tmp_path)
    place = saved(student, weights.tokenizer, tmp_path / "student")
    before = (place / "model.safetensors").read_bytes()

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(student, "save_pretrained", full)
    with pytest.raises(StorageError, match=r"student could not be written: .*No space left.*make room"):
        saved(student, weights.tokenizer, place)
    assert (place / "model.safetensors").read_bytes() == before
    assert not any(file.name.startswith(".") for file in tmp_path.iterdir())


def test_ids_in_its_config_are_its_own(tmp_path: Path) -> None:
    weights, _ = teacher(tmp_path, pad_token_id=3, eos_token_id=VOCAB - 1, bos_token_id=VOCAB - 3)
    vocabulary = pruned(weights.tokenizer, np.zeros(VOCAB, np.int64), 259)
    student = made(weights, kept=vocabulary.kept)
    assert (student.config.bos_token_id, student.config.eos_token_id, student.config.pad_token_id) == (256, 258, 3)
    place = saved(student, vocabulary.files, tmp_path / "student")
    config = AutoConfig.from_pretrained(place)
    assert (config.bos_token_id, sorted(config.eos_token_id), config.vocab_size) == (256, [256, 258], 259)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"layers": 0}, "layers = 0 is wanted of 3 layers"),
        ({"layers": 4}, "layers = 4"),
        ({"layers": (0, 3)}, "ascending ones of 0 to 2"),
        ({"layers": (1, 1)}, "ascending"),
        ({"layers": ()}, "ascending"),
        ({"kept": np.array([3, 2])}, "no ascending ids"),
        ({"kept": np.array([0, VOCAB])}, f"0 to {VOCAB - 1} are"),
        ({"hidden": 65}, "hidden_size = 65 is wanted of a model with 64"),
        ({"hidden": 30}, "hidden_size = 30 is wanted of a model with 4 heads"),
        ({"ffn": 0}, "intermediate_size = 0"),
    ],
)
def test_what_the_teacher_has_not_is_refused(wanted: dict[str, Any], why: str, tmp_path: Path) -> None:
    weights, _ = teacher(tmp_path)
    with pytest.raises(UsageError, match=why):
        made(weights, **wanted)


def test_families_whose_layers_are_told_apart_by_steps(tmp_path: Path) -> None:
    weights, _ = teacher(tmp_path, "gemma3_text")
    assert made(weights, layers=2).config.layer_types == ["sliding_attention", "sliding_attention"]
    assert made(weights, layers=(0, 5)).config.layer_types == ["sliding_attention", "full_attention"]
    config = {key: value for key, value in weights.config.items() if key != "layer_types"}
    old = HfWeights(config | {"sliding_window_pattern": 6}, weights.tensors, weights.tokenizer, "old")
    with pytest.raises(UnsupportedModel, match="'sliding_window_pattern'"):
        smaller(old, layers=2)
    with pytest.raises(UnsupportedModel, match="cannot be made narrower"):
        smaller(weights, ffn=32)
