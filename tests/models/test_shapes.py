"""Outlines: sizes of models by file, by name and by a number of parameters alone."""

from __future__ import annotations

import tomllib
from pathlib import Path

import gguf
import pytest

from edgewise.errors import EdgewiseError, SourceError, UsageError
from edgewise.models.described import described
from edgewise.models.known import KNOWN, family, of_size, of_words
from edgewise.models.outline import Outline
from edgewise.models.source import pull
from edgewise.plan.precision import precision, streamed, weigh
from tiny import save_gguf, save_hf, tiny

LINES = tomllib.loads(KNOWN.read_text(encoding="utf-8"))["models"]


@pytest.mark.parametrize("name", LINES)
def test_the_sizes_of_a_known_model_make_its_published_count(name: str) -> None:
    outline = of_words(name)
    assert outline.name == name
    assert outline.total == pytest.approx(LINES[name]["params"] * 1e9, rel=0.03)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "Llama-3.2-1B"),
        ("llama 3.2 1b (Q4_K_M)", "Llama-3.2-1B"),
        ("Qwen/Qwen2.5-7B-Instruct-GGUF", "Qwen2.5-7B"),
        ("HuggingFaceTB/SmolLM2-135M", "SmolLM2-135M"),
    ],
)
def test_a_name_is_found_however_it_is_written(words: str, name: str) -> None:
    assert of_words(words).name == name


@pytest.mark.parametrize(("words", "count"), [("7B llama-like", 7e9), ("360m", 3.6e8), ("a 0.5B thing", 5e8)])
def test_a_size_alone_makes_a_shape_of_that_size(words: str, count: float) -> None:
    outline = of_words(words)
    assert outline.guessed
    assert outline.total == pytest.approx(count, rel=0.03)


@pytest.mark.parametrize("words", ["", "no model", "0B", "1e30B", "99999999B"])
def test_what_names_nothing_is_refused(words: str) -> None:
    with pytest.raises(UsageError):
        of_words(words)


def test_a_family_is_sorted_and_holds_its_member() -> None:
    qwen = [one.name for one in family(of_words("Qwen2.5-7B"))]
    assert qwen[0] == "Qwen2.5-0.5B"
    assert {"Qwen2.5-7B", "Qwen2.5-32B"} <= set(qwen)
    assert all(name.startswith("Qwen2") for name in qwen)
    guessed = family(of_size("x", 1e9))
    assert [one.total for one in guessed] == sorted(one.total for one in guessed)


def test_a_mixture_reads_the_experts_it_uses() -> None:
    mixture = of_words("Qwen3-30B-A3B")
    assert mixture.active == pytest.approx(3.3e9, rel=0.1)
    assert streamed(mixture, weigh(mixture, precision("int4"))) < 0.15 * weigh(mixture, precision("int4")).total


def test_windows_and_shared_layers_keep_less() -> None:
    gemma = of_words("Gemma-2-2B")
    assert gemma.kv_values(8192) < 2 * gemma.kv_values(4096)
    shared = Outline("x", 4, 64, 4, 2, 16, 128, 100, 512, tied=True, kv_shared_layers=2)
    plain = Outline("x", 4, 64, 4, 2, 16, 128, 100, 512, tied=True)
    assert 2 * shared.kv_values(10) == plain.kv_values(10)
    assert shared.kv_values_read(10) == plain.kv_values_read(10)
    assert shared.body < plain.body


def test_a_gguf_a_bundle_a_directory_and_a_config_describe_one_model(tmp_path: Path) -> None:
    model = tiny("llama")
    file = save_gguf(model, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0)
    directory = save_hf(model, tmp_path / "hf")
    bundle = pull(str(file), home=tmp_path)
    alone = tmp_path / "config.json"
    alone.write_bytes((directory / "config.json").read_bytes())
    found = [described(str(path)) for path in (file, directory, alone, bundle.path)]
    found.append(described("tiny", tmp_path))
    shapes = {(o.layers, o.hidden, o.heads, o.kv_heads, o.ffn, o.vocab, o.tied) for o in found}
    assert len(shapes) == 1
    assert max(o.total for o in found) < 1.01 * min(o.total for o in found)  # norms are counted where there is a file
    stored = found[0].stored
    assert stored is not None
    assert stored.body == pytest.approx(found[0].body * 4.5 / 8, rel=0.05)  # norms are wider
    assert found[2].stored is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"num_hidden_layers": -1}', '{"hidden_size": 1e99}', "{" * 10_000, "nul\0l"]
)
def test_a_config_that_makes_no_model_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for source in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(EdgewiseError):
            described(str(source))


def test_a_damaged_gguf_is_refused(tmp_path: Path) -> None:
    file = save_gguf(tiny("llama"), tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0)
    data = file.read_bytes()
    for damaged in (data[:100], b"GGUF" + b"\xff" * 60, b""):
        file.write_bytes(damaged)
        with pytest.raises(SourceError):
            described(str(file))


@pytest.mark.parametrize(
    "change", [{"layers": 0}, {"layers": 1 << 20}, {"hidden": 1 << 50}, {"experts_used": 3}, {"windows": (1,)}]
)
def test_sizes_that_make_no_model_are_refused(change: dict[str, object]) -> None:
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128, "vocab": 100}
    with pytest.raises(SourceError):
        Outline("x", **{**sizes, "context": 512, "tied": True, **change})  # type: ignore[arg-type]
