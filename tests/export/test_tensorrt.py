"""The TensorRT target on tiny networks, without a GPU: engines are built, what the builder says of them is read, and
their graphs are run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_steps import NETS, Bench, bench

from edgewise.errors import SourceError, UnsupportedModel, UsageError
from edgewise.export.work.job import Job, Precision

CLOSE: Final = {
    ("cnn", "fp32"): 1e-5,
    ("cnn", "fp16"): 2e-3,
    ("cnn", "int8"): 2e-2,
    ("encoder", "fp16"): 2e-3,
    ("encoder", "int8"): 3e-2,
    ("spiky", "int8"): 3e-2,
    ("touchy", "int8"): 0.15,
    ("convs", "int8"): 3e-2,
    ("overflowing", "fp16"): 2e-3,
}


@pytest.fixture(scope="module")
def trt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench("tensorrt", Path(sys.executable), tmp_path_factory.mktemp("tensorrt")) as found:
        yield found


def job_of(found: Bench, name: str) -> Job:
    return found.job(name, NETS[name]())


@pytest.mark.parametrize(("name", "precision"), CLOSE)
def test_each_network_in_each_precision(trt: Bench, name: str, precision: Precision) -> None:
    job = job_of(trt, name)
    made = trt.converted(job, precision)
    assert [(check.name, check.ok) for check in made.checks] == [("conversion", True)]
    assert {Path(one).name for one in made.files} == {
        f"made.{end}" for end in ("engine", "onnx", "engine.json", "layers.json", "trtexec.sh")
    }
    proof, apart = trt.proved(job, made.artifact, precision)
    assert apart < CLOSE[name, precision]
    assert (proof.level, proof.ran, proof.skipped) == ("built", True, ())
    assert all(check.ok for check in proof.checks), proof.checks
    assert "not the engine" in proof.by
    assert proof.coverage.accelerated == proof.coverage.nodes


def test_int8_is_what_the_builder_says_of_each_layer(trt: Bench) -> None:
    job = job_of(trt, "cnn")
    made = trt.converted(job, "int8")
    proof, _ = trt.proved(job, made.artifact, "int8")
    (check,) = (one for one in proof.checks if one.name == "engine precision")
    assert check.detail.startswith("4 of 4")
    taken = json.loads(Path(made.artifact).with_suffix(".layers.json").read_bytes())
    assert sum(one["kind"] == "correlation" and one["takes"] == ["Int8"] for one in taken) == 3


def test_an_engine_without_int8_is_named_layer_by_layer(trt: Bench) -> None:
    job = job_of(trt, "cnn")
    proof, _ = trt.proved(job, trt.converted(job, "fp32").artifact, "int8")
    assert len(proof.skipped) == 4
    assert {check.name for check in proof.checks if not check.ok} == {"engine precision"}


def test_a_transposed_convolution_is_left_floating_and_said_to_be(trt: Bench) -> None:
    job = job_of(trt, "convs")
    proof, _ = trt.proved(job, trt.converted(job, "int8").artifact, "int8")
    assert any("1 transposed" in note for note in proof.notes)


def test_a_product_that_was_left_floating_by_choice_is_no_failure_and_said_to_be(trt: Bench) -> None:
    job = job_of(trt, "touchy")
    proof, _ = trt.proved(job, trt.converted(job, "int8").artifact, "int8")
    (check,) = (one for one in proof.checks if one.name == "engine precision")
    assert (check.ok, check.detail[:6]) == (True, "2 of 2")
    assert any("as rounding it costs most" in note for note in proof.notes)


def test_one_sided_inputs_of_products_use_the_whole_range(trt: Bench) -> None:
    """As after a GELU: half of the steps of a symmetric range would be for what never comes."""
    job = job_of(trt, "encoder")
    model = onnx.load(Path(trt.converted(job, "int8").artifact).with_suffix(".onnx"))
    moved = {node.output[0] for node in model.graph.node if node.op_type == "Sub" and "_centred" in node.output[0]}
    assert moved
    rounded = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert moved <= rounded


@pytest.mark.parametrize("harm", ["cut", "other", "flipped", "no card", "no layers", "no graph", "other graph"])
def test_damaged_and_mixed_up_files_are_refused(trt: Bench, tmp_path: Path, harm: str) -> None:
    job = job_of(trt, "cnn")
    made = trt.converted(job, "int8")
    for one in made.files:
        shutil.copy(one, tmp_path)
    engine, graph = tmp_path / "made.engine", tmp_path / "made.onnx"
    data = engine.read_bytes()
    if harm == "cut":
        engine.write_bytes(data[: len(data) // 2])
    elif harm == "other":
        engine.write_bytes(b"not an engine at all" * 10)
    elif harm == "flipped":
        engine.write_bytes(data[:-5] + bytes([data[-5] ^ 255]) + data[-4:])
    elif harm == "other graph":
        shutil.copy(trt.converted(job, "fp32").files[1], graph)
    else:
        gone = {"no card": "made.engine.json", "no layers": "made.layers.json", "no graph": "made.onnx"}
        (tmp_path / gone[harm]).unlink()
    with pytest.raises(SourceError) as caught:
        trt.proved(job, engine, "int8")
    assert caught.value.hint


def test_an_operator_that_tensorrt_lacks_is_named(trt: Bench, tmp_path: Path) -> None:
    job = job_of(trt, "mlp")
    model = onnx.load(job.hub)
    last = model.graph.output[0].name
    makes = next(node for node in model.graph.node if last in node.output)
    makes.output[0] = "before"
    model.graph.node.append(helper.make_node("Det", ["square"], ["dets"], "my_det"))
    model.graph.node.append(helper.make_node("Unsqueeze", ["dets", "axes"], [last]))
    model.graph.node.insert(len(model.graph.node) - 2, helper.make_node("MatMul", ["column", "row"], ["square"]))
    for name, axis in (("column", 2), ("row", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([axis]), f"{name}_axis"))
        made = helper.make_node("Unsqueeze", ["before", f"{name}_axis"], [name])
        model.graph.node.insert(len(model.graph.node) - 3, made)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, tmp_path / "det.onnx")
    with pytest.raises(UnsupportedModel, match=r"Det: .*my_det") as caught:
        trt.converted(replace(job, hub=str(tmp_path / "det.onnx"), reference=""), "fp32")
    assert caught.value.hint


def test_a_gpu_that_is_not_known_is_refused(trt: Bench) -> None:
    with pytest.raises(UsageError, match="SM87"):
        trt.converted(job_of(trt, "mlp"), "fp32", compute=["SM87"])


def test_the_script_calls_trtexec_with_the_graph_and_its_shapes(trt: Bench, tmp_path: Path) -> None:
    made = trt.converted(job_of(trt, "encoder"), "int8")
    script = next(Path(one) for one in made.files if one.endswith(".sh"))
    (tmp_path / "trtexec").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "trtexec").chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    said = subprocess.run([script, "--verbose"], env=path, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[:-1] == [
        f"--onnx={script.parent}/made.onnx",
        "--stronglyTyped",
        f"--saveEngine={script.parent}/made.trt10.engine",
        "--minShapes=input_ids:1x16,attention_mask:1x16",
        "--optShapes=input_ids:1x16,attention_mask:1x16",
        "--maxShapes=input_ids:8x16,attention_mask:8x16",
        "--verbose",
    ]
