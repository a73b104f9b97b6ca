"""`edgewise evaluate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from calling import Cli

from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from split.nets import images, residual
from tiny import save_gguf, tiny

FIELDS = "bytes kl_mean kl_p99 top1_agreement perplexity perplexity_source agreement_length intervals bits_per_byte"
TEXT = "Rain fell on the harbour, and nobody minded. The boats lay still; a dog slept on a rope. " * 8


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the bundles `tiny` and `small`."""
    home = tmp_path_factory.mktemp("two")
    pull(str(model), home=home)
    small = save_gguf(tiny("llama", num_hidden_layers=1), home / "small.gguf", gguf.GGMLQuantizationType.Q4_0)
    pull(str(small), home=home)
    return home


@pytest.fixture
def with_two(cli: Cli, two: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("EDGEWISE_HOME", str(two))
    return cli


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_bundle_beside_its_teacher(with_two: Cli, two: Path, text: Path, tmp_path: Path) -> None:
    prompts, tasks = tmp_path / "p.jsonl", tmp_path / "t.jsonl"
    prompts.write_text('{"prompt": "Hello?"}\n{"prompt": "abc", "source": "x"}\n')
    tasks.write_text(
        '{"prompt": "Is it so?", "choices": ["yes", "no"], "gold": "yes"}\n'
        '{"prompt": "Is it so?", "choices": ["yes", "no"], "gold": 1}\n'
        '{"prompt": "What is it?", "gold": "nothing that it says"}\n'
    )
    told = with_two(
        "evaluate", "small", "--against", "tiny", "--text", text, "--window", "40", "--tokens", "200",
        "--prompts", prompts, "--tasks", tasks, "--max-tokens", "8", "--json",
    )  # fmt: skip
    assert told.code == 0
    facts = told.json
    assert set(FIELDS.split()) <= set(facts)
    assert facts["bytes"] == Bundle.open(two / "bundles" / "small").bytes
    assert facts["bytes"] < facts["bytes_source"]
    assert (facts["windows"], facts["window"], facts["tokens"], facts["prompts"]) == (5, 40, 195, 2)
    assert facts["kl_mean"] > 0.05
    assert 0 < facts["top1_agreement"] < 1
    assert facts["intervals"]["kl_mean"][0] <= facts["kl_mean"] <= facts["intervals"]["kl_mean"][1]
    assert facts["text"] == "text.txt"
    assert facts["tasks"]["n"] == 3
    assert facts["tasks"]["accuracy"] == facts["tasks"]["accuracy_source"] == pytest.approx(1 / 3)


def test_without_anything_else_said(with_two: Cli) -> None:
    told = with_two("evaluate", "tiny", "--against", "tiny", "--tokens", "600", "--max-tokens", "4", "--json")
    facts = told.json
    assert (facts["kl_mean"], facts["top1_agreement"], facts["prompts"]) == (0.0, 1.0, 16)
    assert facts["windows"] >= 16
    assert facts["tasks"] is None


def test_for_a_reader(with_two: Cli, text: Path) -> None:
    told = with_two("evaluate", "small", "--against", "tiny", "--text", text, "--tokens", "100", "--max-tokens", "4")
    assert told.code == 0
    for words in ("small (", "against tiny (", "KL to the teacher", "perplexity", "95 % interval"):
        assert words in told.out
    assert re.search(r"bits per byte of text +\d\.\d{3} +\d\.\d{3} to \d\.\d{3}", told.out)


@pytest.fixture
def nets(tmp_path: Path) -> tuple[Path, Path, Path]:
    inputs = tmp_path / "in.npz"
    one, other = residual(tmp_path / "one.onnx"), residual(tmp_path / "other.onnx", scale=0.7)
    np.savez(inputs, image=images(50), labels=np.arange(50) % 5)
    return one, other, inputs


def test_networks(cli: Cli, nets: tuple[Path, Path, Path]) -> None:
    one, other, inputs = nets
    facts = cli("evaluate", one, "--against", other, "--inputs", inputs, "--json").json
    assert facts["rows"] == 50
    assert facts["bytes"] == one.stat().st_size
    assert facts["kl_mean"] > 0
    assert 0 < facts["top1_agreement"] <= 1
    assert 0 <= facts["accuracy"] < 1
    assert facts["perplexity"] is None
    same = cli("evaluate", one, "--against", one, "--inputs", inputs, "--json").json
    assert (same["kl_mean"], same["top1_agreement"]) == (0.0, 1.0)
    told = cli("evaluate", one, "--against", one, "--inputs", inputs).out
    for words in ("over 50 rows", "same most probable token", "accuracy"):
        assert words in told
    assert "perplexity" not in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("net.onnx", "--against", "net.onnx", "--tokens", "9"), "--tokens is not for one"),
        (("net.onnx", "--against", "net.onnx", "--max-tokens", "9"), "--max-tokens is not for one"),
        (("tiny", "--against", "net.onnx"), "net.onnx is not for one"),
        (("net.onnx", "--against", "tiny"), "tiny is not for one"),
        (("net.onnx", "--against", "net.onnx"), "--inputs FILE.npz"),
        (("net.onnx", "--against", "net.onnx", "--text", "x"), "--text is not for one"),
        (("tiny", "--against", "tiny", "--inputs", "x"), "--inputs is not for one"),
        (("tiny", "--against", "tiny", "--text", "nowhere"), "cannot be read as UTF-8"),
        (("tiny", "--against", "tiny", "--prompts", "bad.jsonl"), "no JSON object with a `prompt`"),
        (("tiny", "--against", "tiny", "--tasks", "nowhere"), "cannot be read"),
        (("tiny", "--against", "tiny", "--tasks", "bad.jsonl"), "line 1"),
        (("tiny", "--against", "tiny", "--window", "500", "--text", "long.txt"), "2 to 256"),
    ],
)
def test_wrong_use(
    with_two: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    (tmp_path / "long.txt").write_text(TEXT * 3)
    told = with_two("evaluate", *arguments)
    assert told.code == 2
    assert says in told.err
    assert told.err.count("\n") == 1


def test_inputs_that_are_no_arrays(cli: Cli, nets: tuple[Path, Path, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", images(5))
    for name, says in (("in.npy", "one array, which has no name"), ("none.npz", "no file of arrays")):
        told = cli("evaluate", nets[0], "--against", nets[1], "--inputs", tmp_path / name)
        assert (told.code, says in told.err) == (3, True), told.err


def test_a_model_that_is_not_here(cli: Cli) -> None:
    assert cli("evaluate", "nobody", "--against", "nothing").code == 3


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"prompt": "", "gold": "x"}, "`prompt` is empty"),
        ({"prompt": "?", "gold": 1}, "there are no `choices`"),
        ({"prompt": "?", "gold": "a", "choices": ["a"]}, "two texts or more"),
        ({"prompt": "?", "gold": "c", "choices": ["a", "b"]}, "none of its 2 choices"),
        ({"prompt": "?", "gold": 2, "choices": ["a", "b"]}, "none of its 2 choices"),
        ({"prompt": "?"}, "gold"),
    ],
)
def test_tasks_that_are_none(with_two: Cli, tmp_path: Path, task: dict[str, object], says: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "?", "gold": "fine"}\n' + json.dumps(task))
    told = with_two("evaluate", "tiny", "--against", "tiny", "--tasks", tmp_path / "t.jsonl")
    assert told.code == 2
    assert "line 2" in told.err
    assert says in told.err
