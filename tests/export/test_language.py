"""Language models to ONNX, LiteRT and Core ML: what each artifact says, token by token, against the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgewise.export.language.run as running
from edgewise.errors import LicenceError, SourceError, UnsupportedModel, UsageError
from edgewise.evaluate.divergence import kl
from edgewise.export.language import coreml_lm, coreml_net, parity
from edgewise.export.language.passages import Passage
from edgewise.export.language.run import LanguageOrder, export_language, report
from edgewise.export.language.source import opened
from edgewise.export.proof.gate import Gate
from edgewise.export.sources.data import read_texts
from edgewise.export.sources.model import Language
from edgewise.export.wanted import Wanted
from edgewise.export.work.job import Precision
from edgewise.models import hf_weights
from edgewise.models.from_hf import HuggingFaceSource
from edgewise.models.source import pull
from tiny import save_hf, tiny

HERE = Path(__file__).parent
STEPS = 12
TEXTS = ("abe cad", "a bed of cabbages, and a dog beside it that dug in the mud all day")
Answers = Mapping[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(tiny("llama", num_hidden_layers=2), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def answers(model: Path, export_python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, Path]:
    """What language_steps.py did, and its directory."""
    directory = tmp_path_factory.mktemp("steps")
    tokenizer = hf_weights.of(model).tokenizer.opened()
    ids = [tokenizer.continued(text) for text in TEXTS]
    order = {"model": str(model), "card": HuggingFaceSource(model).card.to_json(), "texts": ids}
    (directory / "order.json").write_text(json.dumps(order | {"prompts": [(TEXTS[0], ids[0])]}))
    package = str(Path(running.__file__).parents[3])
    env = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(export_python), "-W", "ignore", str(HERE / "language_steps.py"), str(directory)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((directory / "answers.json").read_text()), directory


def compared(directory: Path, key: str, n: int = 0) -> tuple[float, float]:
    """Mean KL and top-1 agreement of one passage."""
    found = np.load(directory / f"prove-{key}" / "logits" / f"{n}.npy")
    expected = np.load(directory / "begin" / "reference" / f"{n}.npy")
    assert found.shape == expected.shape == (STEPS, 320)
    return float(kl(expected, found).mean()), float((found.argmax(1) == expected.argmax(1)).mean())


def checks(answer: Mapping[str, Any]) -> dict[str, bool]:
    return {one["name"]: one["ok"] for one in answer["checks"]}


def test_the_reference_continues_short_texts_and_reads_long_ones(answers: tuple[Answers, Path]) -> None:
    short, long = answers[0]["heard"]["passages"]
    assert (short["greedy"], long["greedy"]) == (True, False)
    logits = np.load(answers[1] / "begin" / "reference" / "0.npy")
    assert short["ids"][short["start"] :] == logits.argmax(1).tolist(), "its own words are what it found most probable"
    assert len(long["ids"]) - long["start"] == STEPS


def test_litert_decodes_what_torch_does_but_for_int8(answers: tuple[Answers, Path]) -> None:
    found, directory = answers
    proved = found["litert:int8-dynamic"]["proved"]
    assert proved["level"] == "executed"
    assert proved["skipped"] == []
    assert proved["weights"]["int8"] > 30_000
    assert 0 < proved["coverage"]["accelerated"] <= proved["coverage"]["nodes"]
    for n in range(2):
        distance, _ = compared(directory, "litert-int8-dynamic", n)
        assert 0 < distance < 0.05


def test_the_engine_of_litert_lm_reads_the_same_token_ids_and_answers(answers: tuple[Answers, Path]) -> None:
    (engine,) = (one for one in answers[0]["litert:int8-dynamic"]["proved"]["checks"] if one["name"] == "engine")
    assert engine["ok"], engine["detail"]
    assert "the source's token ids" in engine["detail"]


def test_core_ml_computes_what_torch_does_within_half_precision(answers: tuple[Answers, Path]) -> None:
    found, directory = answers
    made, proved = found["coreml:fp16"]["converted"], found["coreml:fp16"]["proved"]
    assert proved["level"] == "spec-checked"
    assert checks(made) == {"conversion": True}
    assert checks(proved) == {"spec": True, "weights": True}
    for n in range(2):  # the second prompt is read in two parts
        distance, agreement = compared(directory, "coreml-fp16", n)
        assert distance < 1e-4
        assert agreement == 1


def test_core_ml_in_int8_is_smaller_and_near(answers: tuple[Answers, Path]) -> None:
    found, directory = answers
    assert found["coreml:int8"]["proved"]["skipped"] == []
    assert checks(found["coreml:int8"]["proved"])["weights"]
    distance, _ = compared(directory, "coreml-int8")
    assert 1e-6 < distance < 0.05


def test_what_is_damaged_or_not_what_it_says_is_found(answers: tuple[Answers, Path]) -> None:
    found = answers[0]
    assert found["short"]["error"] == "SourceError"
    assert "cut short" in found["short"]["message"]
    assert found["cut"]["error"] == "SourceError"
    assert checks(found["zeroed"])["weights"] is False
    assert len(found["unquantized"]["skipped"]) == 11, "the table, and five matrices a layer: two are small"
    assert found["other"]["error"] == "UnsupportedModel", "a model that the network does not compute is not converted"
    assert found["static"]["error"] == "UsageError"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"])
def test_the_network_for_core_ml_computes_each_family(family: str, tmp_path: Path) -> None:
    reference = tiny(family)
    card = HuggingFaceSource(save_hf(reference, tmp_path / "hf")).card.to_json()
    ids = torch.arange(3, 43) * 7 % 320
    with torch.no_grad():
        expected = reference(ids[None]).logits[0].numpy()
    found = decoded(reference, json.loads(json.dumps(card)), Passage(tuple(ids.tolist()), 30, greedy=False))
    assert np.abs(found - expected[29:39]).max() < 2e-3 * np.abs(expected).max()


def decoded(reference: Any, card: Mapping[str, Any], passage: Passage) -> Any:
    networks = {name: coreml_net.Decoder(card, length, 48).eval() for name, length in (("main", 1), ("prefill", 8))}
    for one in networks.values():
        one.load_state_dict(reference.state_dict(), strict=False)
    return coreml_lm.decoded(passage, 8, coreml_lm.torch_calls(networks), passage.steps)


@pytest.mark.parametrize(("family", "why"), [("gemma2", "norms behind its layers"), ("olmo2", "norms behind")])
def test_families_with_other_ways_are_refused_by_what_they_do(family: str, why: str, tmp_path: Path) -> None:
    card = HuggingFaceSource(save_hf(tiny(family), tmp_path / "hf")).card.to_json()
    with pytest.raises(UnsupportedModel, match=why):
        coreml_net.check(card)


def test_the_norm_survives_numbers_whose_squares_half_precision_cannot_hold() -> None:
    x = torch.tensor([[30000.0, -12000.0, 5.0, 0.25]], dtype=torch.float16)
    norm = coreml_net.Norm(4, 1e-5).half()
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.isinf(x * x).any()
    assert (norm(x).double() - expected).abs().max() < 2e-3


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "source_python", lambda kind, home: Path(sys.executable))


def wanted(*names: Precision) -> tuple[Wanted, ...]:
    return tuple(Wanted(f"onnx:{name}", "onnx", name) for name in names)


@pytest.mark.usefixtures("here")
def test_a_bundle_decodes_as_torch_does_or_is_refused_for_its_budget(model: Path, tmp_path: Path) -> None:
    (model / "LICENSE").write_text("free")
    texts = tuple(f"{text} {n}" for n in range(9) for text in TEXTS)
    order = LanguageOrder(
        Language(model, "tiny"), wanted("fp32", "int4", "fp16"), tmp_path / "out", texts, STEPS, Gate(0.01), threads=1
    )
    done = export_language(order, tmp_path)
    facts = report(order, done, 1.0)["targets"]
    exact, small, never = (facts[f"onnx:{name}"] for name in ("fp32", "int4", "fp16"))
    assert exact["status"] == "ok"
    assert exact["level"] == "executed"
    assert exact["parity"]["kl_mean"] < 1e-9
    assert exact["continued"] == {"positions": 18 * STEPS, "first": None, "divergences": (None,) * 9}
    assert exact["drop"]["point"] == 0
    assert set(exact["weights"]) == {"float32"}
    assert small["status"] == "refused"
    assert [one["name"] for one in small["checks"] if not one["ok"]] == ["drop"]
    assert "refused" in small["path"]
    assert small["continued"]["first"] is not None
    assert small["parity"]["kl_mean"] > 1e-4
    assert set(small["weights"]) == {"int4", "int8"}, "the vocabulary keeps 8 bits"
    assert small["bytes"] < exact["bytes"]
    assert never["error"]["kind"] == "UsageError"
    assert Path(exact["path"], "edgewise.json").is_file()
    assert Path(exact["path"]).with_name("LICENSE").read_text() == "free"
    assert not list((tmp_path / "out").glob(".export-*")), "nothing is left of the work"


def test_a_gate_on_too_few_positions_is_wrong_use(model: Path, tmp_path: Path, here: None) -> None:
    order = LanguageOrder(Language(model, "tiny"), wanted("fp32"), tmp_path, TEXTS, STEPS, Gate(max_drop=0.1))
    with pytest.raises(UsageError, match="200"):
        export_language(order, tmp_path)


def test_a_bundle_and_a_directory_are_the_same_source(model: Path, tmp_path: Path) -> None:
    bundle = pull(str(model), home=tmp_path)
    source = opened(bundle.path, home=tmp_path, work=tmp_path / "work")
    mine, theirs = hf_weights.of(source.directory).tensors, hf_weights.of(model).tensors
    assert mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert source.card == HuggingFaceSource(model).card
    assert source.bundle is not None


def test_weights_too_large_for_a_file_go_into_several(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", 60_000)
    weights = hf_weights.of(model)
    found = hf_weights.of(hf_weights.write(weights, tmp_path / "copy"))
    assert len(list((tmp_path / "copy").glob("model-*.safetensors"))) > 1
    assert found.tensors.keys() == weights.tensors.keys()
    assert all(np.array_equal(found.tensors[name], values) for name, values in weights.tensors.items())


def test_terms_have_to_be_accepted(model: Path, tmp_path: Path) -> None:
    source = save_hf(tiny("llama", num_hidden_layers=1), tmp_path / "hf")
    (source / "README.md").write_text("---\nlicense: gemma\n---\n")
    with pytest.raises(LicenceError):
        opened(source, home=tmp_path, work=tmp_path / "work")
    assert opened(source, home=tmp_path, work=tmp_path / "work", accept_licence=True).licence["accepted"]


def test_texts_are_read_line_by_line_or_from_objects(tmp_path: Path) -> None:
    plain, objects = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one\n\ntwo\n")
    objects.write_text('{"text": "one"}\n{"prompt": "two"}\n')
    assert read_texts(plain) == read_texts(objects) == (["one", "two"], None)
    objects.write_text('{"words": 1}\n')
    with pytest.raises(SourceError, match=r"b\.jsonl"):
        read_texts(objects)


def test_the_first_step_that_differs_is_counted_in_each_greedy_answer() -> None:
    passages = [Passage((1, 2, 3, 4), 1, greedy=True), Passage((1, 2, 3), 1, greedy=False)]
    passages.append(Passage((1, 2), 1, greedy=True))
    expected = np.eye(6, 8, dtype=np.float32)
    found = expected.copy()
    found[2, 7] = 9.0
    found[3, 7] = 9.0  # in a text: no greedy answer
    said = parity.continued(passages, found, expected)
    assert (said.positions, said.first, said.divergences) == (6, 2, (2, None))
