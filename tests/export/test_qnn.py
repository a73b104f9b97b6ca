"""The Hexagon target on tiny networks: compiled for each chip, and emulated with nothing allowed on the processor."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx
import pytest
from ends import ended
from onnx import helper
from onnx_steps import NETS, Bench, bench

from edgewise.errors import SourceError, UnsupportedModel, UsageError
from edgewise.export.work.job import Job, Precision

CLOSE: Final = {
    ("cnn", "int8"): 2e-2,
    ("cnn", "fp16"): 2e-3,
    ("encoder", "int8"): 1e-2,
    ("encoder", "fp16"): 5e-3,
    ("convs", "int8"): 0.1,
}
STAMPS: Final = {"sm8650": b"SM8650", "sm8750": b"SM8750", "x-elite": b"SC8380XP"}

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the emulator is for Linux on x86-64"
)


@pytest.fixture(scope="module")
def qnn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench("qnn", Path(sys.executable), tmp_path_factory.mktemp("qnn")) as found:
        yield found


def job_of(found: Bench, name: str) -> Job:
    return found.job(name, NETS[name]())


@pytest.mark.parametrize(("name", "precision"), CLOSE)
def test_each_network_on_the_emulator_alone(qnn: Bench, name: str, precision: Precision) -> None:
    job = job_of(qnn, name)
    made = qnn.converted(job, precision)
    assert [(check.name, check.ok) for check in made.checks] == [("conversion", True)]
    proof, apart = qnn.proved(job, made.artifact, precision)
    assert apart < CLOSE[name, precision]
    assert (proof.level, proof.ran, proof.skipped) == ("emulated", True, ())
    assert all(check.ok for check in proof.checks), proof.checks
    assert {f"binary {soc}" for soc in STAMPS} <= {check.name for check in proof.checks}
    assert proof.coverage.fallback == ()
    assert proof.coverage.accelerated == proof.coverage.nodes > 8
    assert proof.latency_ms == ()  # an emulator has none


def test_each_binary_is_for_its_chip(qnn: Bench) -> None:
    made = qnn.converted(job_of(qnn, "cnn"), "int8")
    binaries = {path.name.split(".")[1]: path.read_bytes() for path in map(Path, made.files) if path.suffix == ".bin"}
    assert binaries.keys() == STAMPS.keys()
    for soc, stamp in STAMPS.items():
        assert b"soc_type=" + stamp in binaries[soc]


def test_a_binary_of_another_chip_is_refused_though_the_emulator_loads_it(qnn: Bench, tmp_path: Path) -> None:
    job = job_of(qnn, "cnn")
    for one in qnn.converted(job, "int8").files:
        shutil.copy(one, tmp_path)
    shutil.copy(tmp_path / "made.sm8750.bin", tmp_path / "made.sm8650.bin")
    proof, _ = qnn.proved(job, tmp_path / "made.onnx", "int8")
    assert {check.name for check in proof.checks if not check.ok} == {"binary sm8650"}


@pytest.mark.parametrize("harm", ["cut", "noise", "gone"])
def test_a_damaged_binary_is_refused(qnn: Bench, tmp_path: Path, harm: str) -> None:
    job = job_of(qnn, "cnn")
    for one in qnn.converted(job, "int8").files:
        shutil.copy(one, tmp_path)
    binary = tmp_path / "made.sm8750.bin"
    if harm == "gone":
        binary.unlink()
    else:
        data = binary.read_bytes()
        binary.write_bytes(data[: len(data) // 2] if harm == "cut" else b"\x7f" * len(data))
    with pytest.raises(SourceError, match=r"made\.sm8750\.bin") as caught:
        qnn.proved(job, tmp_path / "made.onnx", "int8")
    assert caught.value.hint


def test_activations_take_16_bits_in_transformers_and_8_elsewhere(qnn: Bench) -> None:
    bits = {}
    for name in ("cnn", "encoder"):
        model = onnx.load(qnn.converted(job_of(qnn, name), "int8").artifact)
        kinds = {one.data_type for one in model.graph.initializer if one.name.endswith("_zero_point")}
        bits[name] = 16 if onnx.TensorProto.UINT16 in kinds else 8
    assert bits == {"cnn": 8, "encoder": 16}


def test_8_bits_if_asked_for_cost_a_transformer_its_numbers(qnn: Bench) -> None:
    job = job_of(qnn, "encoder")
    artifact = qnn.converted(job, "int8", activations=8, socs=["sm8650"]).artifact
    proof, apart = qnn.proved(job, artifact, "int8")
    assert proof.ran
    assert apart > 3 * qnn.proved(job, qnn.converted(job, "int8").artifact, "int8")[1]


def test_an_operator_that_would_fall_back_is_named_with_a_reason(qnn: Bench, tmp_path: Path) -> None:
    job = job_of(qnn, "cnn")
    model = onnx.load(job.hub)
    place, node = next((n, one) for n, one in enumerate(model.graph.node) if one.op_type == "Clip")
    after, node.output[0] = node.output[0], "before"
    model.graph.node.insert(place + 1, helper.make_node("Shrink", ["before"], [after], "my_shrink", lambd=0.0))
    onnx.save(model, tmp_path / "shrink.onnx")
    made = qnn.converted(replace(job, hub=str(tmp_path / "shrink.onnx")), "int8")
    assert sum("no binary for" in note for note in made.notes) == 3
    proof, _ = qnn.proved(job, made.artifact, "int8")
    assert (proof.level, proof.ran) == ("unverified", False)
    named = {one.op: one for one in proof.coverage.fallback}
    assert named.keys() == {"Shrink"}
    assert "not supported" in named["Shrink"].why
    assert "my_shrink" in named["Shrink"].why
    assert named["Shrink"].hint
    assert proof.coverage.accelerated < proof.coverage.nodes


def test_an_axis_that_stays_free_is_refused(qnn: Bench, tmp_path: Path) -> None:
    job = job_of(qnn, "cnn")
    model = onnx.load(job.hub)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    onnx.save(model, tmp_path / "free.onnx")
    (image,) = job.inputs
    free = replace(image, shape=(1, 3, None, 32))
    with pytest.raises(UnsupportedModel, match="no fixed length along axis 2") as caught:
        qnn.converted(replace(job, hub=str(tmp_path / "free.onnx"), inputs=(free,)), "int8")
    assert "--shape image=" in (caught.value.hint or "")


POOL: Final = """
import os, time
from edgewise.export.targets.qnn.target import _processes
with _processes(1) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


def test_an_emulator_ends_with_a_worker_that_is_killed() -> None:
    worker = subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        emulator = int(worker.stdout.readline())
    finally:
        worker.kill()
        worker.communicate()
    assert ended(emulator)


def test_a_chip_that_is_not_known_is_refused(qnn: Bench) -> None:
    with pytest.raises(UsageError, match="sm1"):
        qnn.converted(job_of(qnn, "cnn"), "int8", socs=["sm1"])
