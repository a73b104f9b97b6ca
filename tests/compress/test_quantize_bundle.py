"""A tiny model quantized by every recipe: what the bundle holds, that it runs, what is said of it and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgewise.compress.judge.tasks import Task, accuracy
from edgewise.compress.quantize import calibration, mixed
from edgewise.compress.quantize.bundle import Quantization, quantize
from edgewise.compress.quantize.calibration import JUDGED, of_text
from edgewise.compress.quantize.recipe import BUILT_IN, Recipe, of, read
from edgewise.engines import native_lm
from edgewise.engines.base import Row
from edgewise.engines.native_lm import NativeLM
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.errors import BundleError, ConfigError, LicenceError, OverBudget, UsageError
from edgewise.models import download
from edgewise.models.bundle import MANIFEST, Bundle
from edgewise.models.source import pull
from edgewise.models.store import find, list_bundles
from edgewise.models.tensors import EMBED, HEAD, matrices
from edgewise.models.tokenizer import Tokenizer
from edgewise.models.weights import Quantized
from tiny import VOCAB, save_gguf, save_hf, tiny

SMALL = "[calibration]\nwindows = 8\nlength = 48\n[mixed]\nwindows = 3\nlength = 32\n"
TEXT = " ".join(f"abc {n} defg hibe cade" for n in range(700))


def small(name: str, **changes: Any) -> Recipe:
    """A built-in recipe with little calibration."""
    import msgspec

    few = read(b"format = 1\n" + SMALL.encode(), "small")
    old = BUILT_IN[name]
    mixed = None if old.mixed is None else few.mixed
    return msgspec.structs.replace(old, calibration=few.calibration, mixed=mixed, **changes)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(tiny("llama"), tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def made(hf: Path, home: Path) -> dict[str, Quantization]:
    """By each built-in recipe that needs no budget."""
    return {
        name: quantize(str(hf), name, small(name), home=home, recipe_name=name, text=TEXT)
        for name in ("int8", "int4", "int4-gptq")
    }


def test_a_recipe_gives_what_it_says(made: dict[str, Quantization], home: Path) -> None:
    for name, (inner, table) in {"int8": (8, 8), "int4": (4, 8), "int4-gptq": (4, 8)}.items():
        bundle = find(name, home)  # checks every hash
        bits = {key: m.bits for key, m in matrices(bundle).items() if isinstance(m, Quantized)}
        assert bits.pop(HEAD) == table
        assert set(bits.values()) == {inner}
        assert len(bits) == 3 * 4
    assert made["int8"].bundle.bytes > made["int4"].bundle.bytes
    assert abs(made["int4"].bundle.bytes - made["int4-gptq"].bundle.bytes) < 1000  # of the recipe in the manifest


def test_figures_stand_in_the_manifest_and_are_in_order(made: dict[str, Quantization], home: Path) -> None:
    found = {name: find(name, home).manifest for name in made}
    for name, manifest in found.items():
        judgement = made[name].judgement
        assert manifest.parity["kl_mean"] == judgement.kl_mean
        assert set(manifest.parity) >= {"kl_mean", "kl_p99", "top1_agreement", "perplexity", "perplexity_source"}
        assert manifest.parity["intervals"]["kl_mean"] == judgement.facts()["intervals"]["kl_mean"]
        assert manifest.parity["tasks"] is None
        assert manifest.quantization["weights"] == name
        assert manifest.quantization["matrices"]["layer0.down"] == made[name].precisions["layer0.down"]
        assert manifest.quantization["recipe"]["method"] == BUILT_IN[name].method
    kl = {name: manifest.parity["kl_mean"] for name, manifest in found.items()}
    assert 0 < kl["int8"] < kl["int4-gptq"] < 0.8 * kl["int4"]
    assert found["int8"].parity["top1_agreement"] > found["int4"].parity["top1_agreement"]


async def test_the_bundle_runs_on_both_engines(made: dict[str, Quantization]) -> None:
    bundle, ids = made["int4-gptq"].bundle, np.random.default_rng(2).integers(0, VOCAB, 40)
    found = []
    for engine in (OnnxLM, NativeLM) if native_lm.probe() else (OnnxLM,):
        model = engine(bundle, slots=1)
        await model.open("s", 64)
        found.append((await model.forward([Row("s", 0, ids, 40)]))[0].copy())
        await model.shutdown()
    assert np.isfinite(found).all()
    assert np.abs(found[0] - found[-1]).mean() < 0.05  # activations are rounded to int8 in both, not alike


def test_a_table_of_four_bits_runs(hf: Path, home: Path) -> None:
    recipe = Recipe(1, "gptq", matrices={"*": "int4-minima"}, calibration=small("int4").calibration)
    found = quantize(str(hf), "all-four", recipe, home=home, recipe_name="mine", text=TEXT)
    kinds = {name: m.kind for name, m in matrices(found.bundle).items() if isinstance(m, Quantized)}
    assert set(kinds.values()) == {(4, 32, True)}
    assert found.judgement.kl_mean < 1
    untied = save_hf(tiny("llama", tie_word_embeddings=False), home / "untied")
    recipe = Recipe(1, "gptq", matrices={"*": "int8", "embed": "int4"}, calibration=recipe.calibration)
    found = quantize(str(untied), "untied-four", recipe, home=home, recipe_name="mine", text=TEXT)
    tables = {name: m.bits for name, m in matrices(found.bundle).items() if isinstance(m, Quantized)}
    assert (tables[EMBED], tables[HEAD]) == (4, 8)


def test_a_budget_is_kept_and_used(home: Path, tmp_path: Path) -> None:
    wide = tiny("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2, initializer_range=0.07)
    source = str(save_hf(wide, tmp_path / "wide"))
    least, most = (
        quantize(source, f"wide-{name}", small(name), home=home, recipe_name=name, text=TEXT)
        for name in ("int4-gptq", "int8")
    )
    budget = (least.bundle.bytes + most.bundle.bytes) // 2
    found = quantize(source, "mixed", small("mixed"), home=home, recipe_name="mixed", text=TEXT, budget_bytes=budget)
    assert 0.9 * budget < found.bundle.bytes <= budget
    assert len(set(found.precisions.values())) > 1
    assert most.judgement.kl_mean < found.judgement.kl_mean < least.judgement.kl_mean
    for refused, budget_bytes, said in ((OverBudget, 100_000, "100000 bytes"), (UsageError, None, "--budget")):
        with pytest.raises(refused, match=said):
            quantize(
                source, "none", small("mixed"), home=home, recipe_name="mixed", text=TEXT, budget_bytes=budget_bytes
            )
    assert "none" not in [bundle.name for bundle in list_bundles(home)]


def test_the_source_may_be_a_bundle_or_a_gguf(home: Path, tmp_path: Path) -> None:
    file = save_gguf(tiny("llama"), tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    pulled = pull(str(file), home=home, name="pulled")
    one = quantize(str(file), "of-gguf", small("int4"), home=home, recipe_name="int4", text=TEXT)
    two = quantize("pulled", "of-bundle", small("int4"), home=home, recipe_name="int4", text=TEXT)
    assert one.bundle.weights == two.bundle.weights  # the same weights, so the same bundle
    assert two.bundle.manifest.source["weights"] == pulled.weights
    assert one.judgement.kl_mean == two.judgement.kl_mean


def test_a_bundle_that_comes_with_edgewise_is_a_source_too(
    hf: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = pull(str(hf), home=tmp_path, name="student")
    monkeypatch.setitem(download.SHIPPED, "edgewise-student", shipped.path)
    found = quantize("edgewise-student", "of-alias", small("int4"), home=home, recipe_name="int4", text=TEXT)
    origin = found.bundle.manifest.source
    assert (origin["kind"], origin["origin"], origin["weights"]) == ("bundle", "edgewise-student", shipped.weights)
    assert found.bytes_source == shipped.bytes
    assert (
        found.bundle.weights
        == quantize(
            str(shipped.path), "of-path", small("int4"), home=home, recipe_name="int4", text=TEXT
        ).bundle.weights
    )


def test_the_source_is_not_replaced_and_others_are(hf: Path, home: Path, tmp_path: Path) -> None:
    bundle = pull(str(hf), home=home, name="itself")
    for source in ("itself", str(bundle.path)):
        with pytest.raises(UsageError, match="itself is the bundle that is quantized"):
            quantize(source, "itself", small("int4"), home=home, recipe_name="int4", text=TEXT)
    assert find("itself", home).manifest.parity == {}
    pull(str(hf), home=home, name="another")
    quantize("itself", "another", small("int4"), home=home, recipe_name="int4", text=TEXT)
    assert find("another", home).manifest.quantization["weights"] == "int4"


def test_both_models_are_asked_the_tasks(hf: Path, home: Path) -> None:
    tasks = [Task("Is it so?", gold, ("yes", "no")) for gold in (0, 1)] + [Task("What?", "nothing that it says")]
    four, exact = (
        quantize(str(hf), f"asked-{name}", recipe, home=home, recipe_name=name, text=TEXT, tasks=tasks)
        for name, recipe in (
            ("four", small("int4")),
            ("exact", small("int4", activations="fp32", method="nearest", matrices={"*": "exact"})),
        )
    )
    assert four.accuracy == accuracy(four.bundle, exact.bundle, tasks, max_tokens=48)
    facts = find("asked-four", home).manifest.parity["tasks"]
    assert (facts["n"], facts["accuracy"], facts["accuracy_source"]) == (3, pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert facts["intervals"]["gain"] == [four.accuracy.gain.low, four.accuracy.gain.high]


def test_the_size_of_the_source(made: dict[str, Quantization], hf: Path, home: Path, tmp_path: Path) -> None:
    files = [file for file in hf.iterdir() if file.suffix in (".safetensors", ".json", ".jinja")]
    assert made["int8"].bytes_source == sum(file.stat().st_size for file in files) > 300_000
    file = save_gguf(tiny("llama"), tmp_path / "size.gguf", gguf.GGMLQuantizationType.Q8_0)
    found = quantize(str(file), "of-file", small("int4"), home=home, recipe_name="int4", text=TEXT)
    assert found.bytes_source == file.stat().st_size
    assert found.accuracy is None


def test_exact_is_the_source(home: Path, hf: Path) -> None:
    recipe = Recipe(1, activations="fp32", matrices={"*": "exact"}, calibration=small("int4").calibration)
    found = quantize(str(hf), "exact", recipe, home=home, recipe_name="mine", text=TEXT)
    assert found.judgement.kl_mean == 0
    assert found.judgement.top1_agreement == 1


def test_without_a_text_the_model_writes_one(hf: Path, home: Path) -> None:
    twice = [quantize(str(hf), f"own-{n}", small("int4-gptq"), home=home, recipe_name="int4-gptq") for n in range(2)]
    assert twice[0].judgement == twice[1].judgement
    assert twice[0].bundle.weights == twice[1].bundle.weights
    assert 0 < twice[0].judgement.kl_mean < 1


def test_a_directory_is_made_whole_or_not_at_all(hf: Path, home: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    found = quantize(str(hf), str(target), small("int8"), home=home, recipe_name="int8", text=TEXT)
    assert Bundle.open(target).weights == found.bundle.weights
    assert json.loads((target / MANIFEST).read_text())["name"] == "out"
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    with pytest.raises(UsageError, match="is there already"):
        quantize(str(hf), str(target), small("int8"), home=home, recipe_name="int8", text=TEXT)
    with pytest.raises(UsageError, match="a window has"):
        quantize(str(hf), str(tmp_path / "short"), small("int8"), home=home, recipe_name="int8", text="a")
    assert not (tmp_path / "short").exists()
    assert not [*home.glob("quantize-*")]


def test_calibration_and_judging_share_no_window(hf: Path, made: dict[str, Quantization]) -> None:
    tokenizer = Tokenizer.open(made["int8"].bundle.path)
    rows, held = of_text(tokenizer, TEXT, 10, 48)
    assert rows.shape == (10, 48)
    assert held.shape == (JUDGED, 48)
    everything = tokenizer.encode(TEXT)
    starts = {tuple(everything[at : at + 48]): at for at in range(0, len(everything) - 47, 48)}
    places = [starts[tuple(row)] // 48 for row in (*rows.tolist(), *held.tolist())]
    assert {place % 2 for place in places[:10]} == {0}
    assert {place % 2 for place in places[10:]} == {1}
    for those in (places[:10], places[10:]):  # from one end of the text to the other
        assert those == sorted(set(those))
        assert (those[0] < 2, those[-1] > len(starts) - 3) == (True, True)


@pytest.mark.parametrize("windows", [2, 40])
def test_the_recipe_does_not_say_what_is_judged_on(hf: Path, made: dict[str, Quantization], windows: int) -> None:
    tokenizer = Tokenizer.open(made["int8"].bundle.path)
    assert np.array_equal(of_text(tokenizer, TEXT, windows, 48)[1], of_text(tokenizer, TEXT, 8, 48)[1])
    assert made["int8"].judgement.windows == JUDGED


def test_costs_are_measured_from_one_end_of_the_text_to_the_other(
    hf: Path, home: Path, made: dict[str, Quantization], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = mixed.options
    monkeypatch.setattr(mixed, "options", lambda model, ids, *rest: seen.append(ids) or real(model, ids, *rest))
    quantize(str(hf), "spread", small("mixed"), home=home, recipe_name="mixed", text=TEXT, budget_bytes=1 << 30)
    rows, _ = of_text(Tokenizer.open(made["int8"].bundle.path), TEXT, 8, 48)
    assert np.array_equal(seen[0], rows[[0, 4, 7], :32])
    assert np.array_equal(calibration.spread(rows, 9), rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("format = 2", "format 2"),
        ("matrices = 3\nformat = 1", "is no recipe"),
        ('format = 1\n[matrices]\n"*" = "int3"', "int3"),
        ("format = 1\nspeed = 1", "speed"),
        ("format = 1\n[gptq]\ndamping = 0", "damping"),
        ("format = 1\n[mixed]\nchoices = []", "choices"),
        ("format = 1\n[mixed]\nwindows = 65", r"mixed\.windows 65 and calibration\.windows 64"),
        ("format = 1\n[mixed]\n[calibration]\nlength = 64", r"mixed\.length 128 and calibration\.length 64"),
        ("format = ", "is no recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        of(str(tmp_path / "r.toml"))


def test_recipes_that_do_not_fit_the_model_are_refused() -> None:
    names = ["embed", "layer0.qkv", "layer0.o"]
    with pytest.raises(UsageError, match="layer9"):
        Recipe(1, matrices={"*": "int4", "layer9.o": "int8"}).precisions(names)
    with pytest.raises(UsageError, match=r"says nothing of layer0\.o"):
        Recipe(1, matrices={"embed": "int8", "*.qkv": "int4"}).precisions(names)
    with pytest.raises(UsageError, match="one table"):
        Recipe(1, matrices={"*": "int4", "head": "int8"}).precisions(names)
    assert BUILT_IN["int4"].precisions(names)["embed"] == "int8"
    later = Recipe(1, matrices={"*": "int4", "layer0.*": "int8", "layer0.o": "exact"})
    assert [*later.precisions(names).values()] == ["int4", "int8", "exact"]
    with pytest.raises(UsageError, match="there is no recipe"):
        of("int5")


def test_terms_must_be_accepted_here_too(home: Path, tmp_path: Path) -> None:
    source = save_hf(tiny("llama"), tmp_path / "hf")
    (source / "README.md").write_text("---\nlicense: gemma\n---\n")
    with pytest.raises(LicenceError, match="gemma"):
        quantize(str(source), "gemma", small("int8"), home=home, recipe_name="int8", text=TEXT)


def test_a_damaged_bundle_is_no_source(hf: Path, home: Path) -> None:
    bundle = pull(str(hf), home=home, name="damaged")
    file = next((bundle.path / "blocks").glob("block-*.data"))
    file.write_bytes(b"\1" * file.stat().st_size)
    with pytest.raises(BundleError):
        quantize("damaged", "x", small("int8"), home=home, recipe_name="int8", text=TEXT)
