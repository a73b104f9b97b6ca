"""The LiteRT target on tiny networks: each family of operators in each precision, foreign files, and what is refused.

One process of the exporters' environment does all steps, as importing torch and litert-torch takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
from steps import Worker

from edgewise.errors import EdgewiseError, SourceError, UnsupportedModel, UsageError
from edgewise.export.work.job import (
    PRECISIONS,
    Converted,
    Job,
    Layers,
    Precision,
    Proved,
    Source,
    begun_of,
    converted_of,
    proved_of,
    read_array,
)

HERE: Final = Path(__file__).parent
OWN: Final = """
import contextlib
from edgewise.export.targets.litert import from_torch as litert_convert
from ai_edge_quantizer import quantizer, recipe
def make_static(job):
    "A foreign file: every input and output in int8, as ai-edge-quantizer makes it by itself."
    import numpy as np
    made = quantizer.Quantizer(job.source.ref)
    made.load_quantization_recipe(recipe.static_wi8_ai8())
    rows = [{"image": row[None].transpose(0, 2, 3, 1)} for row in np.load(job.calibration + "/image.npy")]
    with contextlib.redirect_stdout(sys.stderr):
        made.quantize(made.calibrate({"serving_default": rows}, num_threads=1)).export_model(job.artifact)
    return {}
def make_weights(job):
    "A foreign file: weights in int8, every product in float32."
    made = quantizer.Quantizer(job.source.ref)
    made.load_quantization_recipe(recipe.weight_only_wi8_afp32())
    with contextlib.redirect_stdout(sys.stderr):
        made.quantize().export_model(job.artifact)
    return {}
def once(write):
    "The float32 file of a network is the same for every precision."
    known = {}
    def wrapped(loaded, outputs, path, last, *, free):
        key = (job.source.ref, tuple(last), free)
        if key not in known:
            write(loaded, outputs, path, last, free=free)
            known[key] = path.read_bytes()
        path.write_bytes(known[key])
    return wrapped
litert_convert.write = once(litert_convert.write)
"""
NETS: Final = """
import torch
from torch import nn
class Sorting(nn.Module):
    def forward(self, x):
        return torch.topk(torch.cumsum(x, 1), 3, 1)[0]
class Overflowing(nn.Module):
    def forward(self, x):
        return torch.log1p(torch.exp(x.abs() + 12))  # e^12 is more than half precision holds
class Masked(nn.Module):
    def forward(self, x):
        return torch.softmax(x.masked_fill(x < 0, -1e9), 1)
class Peaked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(1024, 32), nn.Linear(32, 32), nn.Linear(32, 10)
    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
class Folded(nn.Module):
    "Whose bias becomes [1, 10], as a constant is folded into it."
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.Linear(24, 10)
    def forward(self, x):
        return torch.tanh(self.a(x) / torch.arange(1.0, 11.0))
class Pair(nn.Module):
    "The names of its inputs and outputs are in no alphabetical order."
    def forward(self, second, first):
        return second * 2 + first, second - first
def sorting(): return Sorting()
def overflowing(): return Overflowing()
def masked(): return Masked()
def peaked(): return Peaked()
def folded(): return Folded()
def pair(): return Pair()
"""


class Bench:
    """Networks that are begun once, and the steps of the target."""

    def __init__(self, worker: Worker, place: Path) -> None:
        self.worker, self.place = worker, place
        (place / "odd_nets.py").write_text(NETS)
        self._jobs: dict[str, Job] = {}
        self._made: dict[tuple[str, str], Converted] = {}

    def job(self, name: str) -> Job:
        """Of `nets:cnn` or `odd_nets:pair`."""
        if name not in self._jobs:
            self._jobs[name] = self._begun(name)
        return self._jobs[name]

    def converted(self, name: str, precision: Precision = "fp32", **options: Any) -> Converted:
        key = (name, f"{precision} {options}")
        if key not in self._made:
            job = self.job(name)
            artifact = f"{job.work}/{len(self._made)}"
            made = replace(job, step="convert", precision=precision, artifact=artifact, options=options)
            self._made[key] = converted_of(self.worker("convert", made))
        return self._made[key]

    def proved(self, name: str, artifact: str, precision: Precision = "fp32") -> tuple[Proved, npt.NDArray[Any]]:
        """And the relative L2 of each output."""
        job = replace(self.job(name), step="prove", precision=precision, artifact=artifact)
        job = replace(job, work=f"{job.work}/proof-{Path(artifact).name}-{precision}")
        found = proved_of(self.worker("prove", job))
        errors = [self._error(job, n) for n in range(len(job.outputs))]
        return found, np.array(errors)

    def layers(self, name: str, artifact: str, only: tuple[int, ...]) -> list[tuple[str, npt.NDArray[Any]]]:
        job = replace(self.job(name), step="layers", artifact=artifact, only=only)
        job = replace(job, work=f"{job.work}/layers")
        names = Layers(tuple(self.worker("layers", job)["names"])).names
        return [(one, read_array(f"{job.work}/layers", str(n))) for n, one in enumerate(names)]

    def _error(self, job: Job, n: int) -> float:
        expected = read_array(job.reference, str(n)).astype(np.float64)
        found = read_array(f"{job.work}/outputs", str(n))
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    def _begun(self, name: str) -> Job:
        attribute = name.partition(":")[2]
        work, data = self.place / attribute, self.place / f"{attribute}.npz"
        work.mkdir()
        np.savez(data, **DATA[attribute](np.random.default_rng(4)))
        source = Source("torch", name, attribute, "classify", search=(str(HERE), str(self.place)))
        begin = Job("begin", source, str(work), data=str(data), threads=1)
        found = begun_of(self.worker("begin", begin, "sources.torch_source"))
        made = replace(begin, inputs=found.inputs, outputs=found.outputs, target="litert", data="")
        rows, calibration, reference = (str(work / one) for one in ("rows", "calibration", "reference"))
        return replace(made, rows=rows, calibration=calibration, reference=reference)


def _image(draw: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    return {"image": draw.random((24, 3, 32, 32), np.float32)}


def _ids(draw: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    lengths = draw.integers(4, 17, (24, 1))
    return {"input_ids": draw.integers(0, 100, (24, 16)), "attention_mask": (np.arange(16) < lengths).astype(np.int64)}


def _peaked(draw: np.random.Generator) -> npt.NDArray[Any]:
    """One number of thousands is a hundred times as large as the rest, as in a transformer's residual stream."""
    x = draw.standard_normal((24, 1024)).astype(np.float32) / 2
    x[0, 0] = 100
    return x


def _numbers(width: int) -> Any:
    return lambda draw: {"x": draw.standard_normal((24, width)).astype(np.float32)}


DATA: Final[Mapping[str, Any]] = {
    "cnn": _image,
    "convs": _image,
    "encoder": _ids,
    "spiky": _ids,
    "repeated": _ids,
    "mlp": _numbers(24),
    "eigen": lambda draw: {"x": draw.standard_normal((24, 3, 3)).astype(np.float32)},
    "deciding": _numbers(24),
    "sorting": _numbers(8),
    "overflowing": _numbers(8),
    "masked": _numbers(8),
    "peaked": lambda draw: {"x": _peaked(draw)},
    "folded": _numbers(24),
    "pair": lambda draw: {
        "second": draw.standard_normal((24, 5)).astype(np.float32),
        "first": draw.standard_normal((24, 5)).astype(np.float32),
    },
}


@pytest.fixture(scope="module")
def bench(export_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    worker = Worker(export_python, "targets.litert.target", OWN)
    yield Bench(worker, tmp_path_factory.mktemp("litert"))
    worker.close()


CLOSE: Final[Mapping[str, float]] = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.05, "int8-dynamic": 0.05, "int4": 0.2}
STORED: Final[Mapping[str, set[str]]] = {
    "fp32": {"float32"},
    "fp16": {"float16"},
    "int8": {"int8"},
    "int8-dynamic": {"int8"},
    "int4": {"int4"},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("net", ["cnn", "encoder"])
def test_a_network_in_each_precision_runs_and_is_close_to_its_source(
    net: str, precision: Precision, bench: Bench
) -> None:
    made = bench.converted(f"nets:{net}", precision)
    assert [check.name for check in made.checks if check.ok] == ["conversion"]
    assert made.artifact.endswith(".tflite")
    found, errors = bench.proved(f"nets:{net}", made.artifact, precision)
    assert (found.level, found.ran) == ("executed", True)
    assert errors.max() < CLOSE[precision]
    assert not found.skipped
    assert all(check.ok for check in found.checks), found.checks
    whole = {"int8"} if (net, precision) == ("cnn", "int4") else set()  # filters: there are no int4 kernels for them
    assert set(found.weights) == STORED[precision] | whole
    assert len(found.latency_ms) == 20


def test_channels_that_are_far_larger_than_others_are_made_alike_before_rounding(bench: Bench) -> None:
    plain, spiky = (bench.converted(f"nets:{name}", "int8").artifact for name in ("encoder", "spiky"))
    _, errors = bench.proved("nets:spiky", spiky, "int8")
    assert errors.max() < CLOSE["int8"]
    assert b"_smoothed" in Path(spiky).read_bytes()
    assert Path(spiky).stat().st_size < Path(plain).stat().st_size * 1.2  # the old matrices are not in the file


def test_a_matrix_that_layers_share_stays_one(bench: Bench) -> None:
    once, twice = (bench.converted(f"nets:{name}", "int8").artifact for name in ("spiky", "repeated"))
    found, errors = bench.proved("nets:repeated", twice, "int8")
    assert errors.max() < CLOSE["int8"]
    assert b"_smoothed" in Path(twice).read_bytes()
    assert found.weights == bench.proved("nets:spiky", once, "int8")[0].weights


def test_everything_that_xnnpack_has_runs_there_and_the_rest_is_named(bench: Bench) -> None:
    for precision in PRECISIONS:
        coverage = bench.proved("nets:cnn", bench.converted("nets:cnn", precision).artifact, precision)[0].coverage
        assert (coverage.accelerator, coverage.accelerated) == ("XNNPACK", coverage.nodes), (precision, coverage)
        assert not coverage.fallback
    found, _ = bench.proved("nets:convs", bench.converted("nets:convs").artifact)
    (left,) = found.coverage.fallback
    assert (left.op, left.count) == ("RESIZE_NEAREST_NEIGHBOR", 1)
    assert left.hint is not None
    assert found.coverage.accelerated == found.coverage.nodes - 1
    found, _ = bench.proved("nets:encoder", bench.converted("nets:encoder").artifact)
    reasons = {one.op: one.why for one in found.coverage.fallback}
    assert "int32" in reasons["CAST"]
    assert "table" in reasons["EMBEDDING_LOOKUP"]
    assert found.coverage.accelerated == found.coverage.nodes - sum(one.count for one in found.coverage.fallback)


def test_bytes_of_weights_are_those_that_are_stored(bench: Bench) -> None:
    numbers = 24 * 64 + 64 * 10
    sizes: dict[Precision, int] = {"fp32": 4 * numbers, "fp16": 2 * numbers, "int8": numbers, "int4": numbers // 2}
    for precision, size in sizes.items():
        found, _ = bench.proved("nets:mlp", bench.converted("nets:mlp", precision).artifact, precision)
        assert sum(found.weights.values()) == size, precision


def test_images_come_with_channels_last_and_names_and_order_are_the_sources(bench: Bench) -> None:
    made = bench.converted("nets:cnn")
    assert any("channels last" in note for note in made.notes)
    first, _ = bench.proved("nets:cnn", made.artifact)
    assert any("channels last" in note for note in first.notes)
    other = bench.converted("nets:cnn", layout="nchw")
    second, errors = bench.proved("nets:cnn", other.artifact)
    assert errors.max() < 1e-5
    assert not any("channels last" in note for note in (*other.notes, *second.notes))
    assert second.coverage.nodes == first.coverage.nodes + 1  # the transpose that was saved
    made = bench.converted("odd_nets:pair")
    _, errors = bench.proved("odd_nets:pair", made.artifact)
    assert errors.max() < 1e-6


def test_a_free_first_axis_takes_any_number_of_rows(bench: Bench) -> None:
    made = bench.converted("nets:cnn", dynamic_batch=True)
    found, errors = bench.proved("nets:cnn", made.artifact)
    (batch,) = (check for check in found.checks if check.name == "batch")
    assert batch.ok
    assert "7 rows at once" in batch.detail
    assert errors.max() < 1e-5
    fixed, _ = bench.proved("nets:cnn", bench.converted("nets:cnn").artifact)
    assert "batch" not in {check.name for check in fixed.checks}


def test_a_conversion_that_changes_the_numbers_is_seen(bench: Bench, tmp_path: Path) -> None:
    job = bench.job("nets:mlp")
    reference = tmp_path / "reference"
    reference.mkdir()
    np.save(reference / "0.npy", read_array(job.reference, "0") * 1.01)
    faulty = replace(job, step="convert", reference=str(reference), artifact=str(tmp_path / "mlp"))
    (check,) = converted_of(bench.worker("convert", faulty)).checks
    assert (check.name, check.ok) == ("conversion", False)


def test_skipped_quantization_is_named(bench: Bench, tmp_path: Path) -> None:
    plain = bench.converted("nets:cnn").artifact
    for precision in ("fp16", "int8", "int8-dynamic", "int4"):
        skipped = bench.proved("nets:cnn", plain, precision)[0].skipped
        assert len(skipped) == 4, precision
        assert all("float32" in one for one in skipped)
        assert [one.split()[0] for one in skipped[:3]] == ["b1", "b2", "pw"], skipped  # batch norms are folded
    # A file whose activations are not int8, or whose products are not, is no static int8.
    dynamic = bench.proved("nets:mlp", bench.converted("nets:mlp", "int8-dynamic").artifact, "int8")[0].skipped
    assert len(dynamic) == 2
    assert all("activations in float32" in one for one in dynamic)
    weights = tmp_path / "weights.tflite"
    job = bench.job("nets:cnn")
    source = replace(job.source, ref=plain)
    bench.worker("make_weights", replace(job, step="convert", source=source, artifact=str(weights)))
    found, _ = bench.proved("nets:cnn", str(weights), "int8")
    assert set(found.weights) == {"int8"}
    assert len(found.skipped) == 4
    assert all("computed in float32" in one for one in found.skipped)


def test_a_foreign_file_with_int8_inputs_and_outputs_runs(bench: Bench, tmp_path: Path) -> None:
    job = bench.job("nets:cnn")
    source = replace(job.source, ref=bench.converted("nets:cnn").artifact)
    path = tmp_path / "foreign.tflite"
    bench.worker("make_static", replace(job, step="convert", source=source, artifact=str(path)))
    found, errors = bench.proved("nets:cnn", str(path), "int8")
    assert errors.max() < 0.05
    assert not found.skipped
    assert any("int8" in note for note in found.notes)
    assert "HARD_SWISH" in {one.op for one in found.coverage.fallback}  # which ours keeps in float32 for that reason
    with pytest.raises(EdgewiseError, match="has the shape"):
        bench.proved("nets:mlp", str(path), "int8")


def test_an_activation_that_int8_cannot_hold_is_measured_as_it_runs(bench: Bench) -> None:
    made = bench.converted("odd_nets:peaked", "int8")
    (note,) = (note for note in made.notes if "as they run" in note)
    assert note.startswith("1 of 3 matrices"), note
    found, errors = bench.proved("odd_nets:peaked", made.artifact, "int8")
    assert set(found.weights) == {"int8"}
    assert not found.skipped
    assert errors.max() < 0.05
    assert not any("as they run" in note for note in bench.converted("nets:mlp", "int8").notes)


def test_a_bias_with_an_axis_too_many_is_quantized(bench: Bench) -> None:
    found, errors = bench.proved("odd_nets:folded", bench.converted("odd_nets:folded", "int8").artifact, "int8")
    assert errors.max() < 0.05
    assert not found.skipped


def test_static_int8_needs_calibration(bench: Bench) -> None:
    job = replace(bench.job("nets:mlp"), step="convert", precision="int8", calibration="", artifact="/tmp/never")
    with pytest.raises(UsageError, match="calibrate"):
        bench.worker("convert", job)


def test_numbers_beyond_half_precision_are_seen_though_the_host_computes_in_float32(bench: Bench) -> None:
    found, errors = bench.proved(
        "odd_nets:overflowing", bench.converted("odd_nets:overflowing", "fp16").artifact, "fp16"
    )
    (check,) = (check for check in found.checks if check.name == "range")
    assert not check.ok
    assert errors.max() < 1e-3
    masked, _ = bench.proved("odd_nets:masked", bench.converted("odd_nets:masked", "fp16").artifact, "fp16")
    assert all(check.ok for check in masked.checks)  # minus infinity before a softmax masks as well


def test_layers_are_all_tensors_in_the_order_of_computing(bench: Bench) -> None:
    plain = bench.layers("nets:cnn", bench.converted("nets:cnn").artifact, (3, 5))
    names = [name for name, _ in plain]
    assert len(set(names)) == len(names) >= 8
    assert names[-1] != names[0]
    assert all(len(value) == 2 and value.dtype == np.float32 for _, value in plain)
    expected = read_array(bench.job("nets:cnn").reference, "0")[[3, 5]]
    np.testing.assert_allclose(plain[-1][1], expected, rtol=1e-4, atol=1e-5)
    places = [next(n for n, name in enumerate(names) if name.startswith(part)) for part in ("b1", "b2", "pw")]
    assert places == sorted(places)
    quantized = bench.layers("nets:cnn", bench.converted("nets:cnn", "int8").artifact, (3, 5))
    np.testing.assert_allclose(quantized[-1][1], expected, atol=0.1)
    assert max(float(np.abs(value).max()) for _, value in quantized) < 100  # real numbers, not their int8 codes


@pytest.mark.parametrize("length", [0, 5, 1000, -200])
def test_a_damaged_file_is_no_tflite_file(length: int, bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "damaged.tflite"
    path.write_bytes(Path(bench.converted("nets:cnn").artifact).read_bytes()[:length])
    with pytest.raises(SourceError, match=r"damaged\.tflite"):
        bench.proved("nets:cnn", str(path))
    with pytest.raises(SourceError, match="there is no file"):
        bench.proved("nets:cnn", str(tmp_path / "nothing.tflite"))


def test_what_cannot_be_converted_says_which_operator_and_where(bench: Bench) -> None:
    with pytest.raises(UnsupportedModel, match=r"linalg_eig.*nets\.py:\d+ in forward") as eigen:
        bench.converted("nets:eigen")
    assert eigen.value.hint
    with pytest.raises(UnsupportedModel, match=r"depends on the values.*nets\.py:\d+ in forward") as deciding:
        bench.converted("nets:deciding")
    assert deciding.value.hint is not None
    assert "torch.where" in deciding.value.hint
    with pytest.raises(UnsupportedModel, match="STABLEHLO_SORT") as sorting:
        bench.converted("odd_nets:sorting")
    assert sorting.value.hint is not None
    assert "topk" in sorting.value.hint
    with pytest.raises(UnsupportedModel, match="no matrix product"):
        bench.converted("nets:convs", "int4")
