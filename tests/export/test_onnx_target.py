"""The ONNX target on tiny networks: each family of operators in each precision, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import helper
from onnx_steps import NETS, Bench, bench, vectors

from edgewise.engines.onnx_process import shared_options
from edgewise.errors import SourceError, UnsupportedModel, UsageError
from edgewise.export.work.job import Job, Precision

CLOSE: Final = {  # relative L2 of outputs, some room above what was seen
    ("cnn", "fp32"): 1e-5,
    ("cnn", "fp16"): 2e-3,
    ("cnn", "int8"): 2e-2,
    ("cnn", "int8-dynamic"): 2e-2,
    ("cnn", "int4"): 0.15,
    ("encoder", "fp32"): 1e-5,
    ("encoder", "fp16"): 2e-3,
    ("encoder", "int8"): 4e-2,
    ("spiky", "int8"): 4e-2,
    ("spiky", "int8-dynamic"): 4e-2,
    ("repeated", "int8"): 4e-2,
    ("touchy", "int8-dynamic"): 0.15,
    ("convs", "fp32"): 1e-5,
    ("convs", "int8"): 0.1,
    ("overflowing", "fp16"): 2e-3,
}


@pytest.fixture(scope="module")
def onnx_bench(export_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench("onnx", export_python, tmp_path_factory.mktemp("onnx")) as found:
        yield found


def job_of(found: Bench, name: str) -> Job:
    return found.job(name, NETS[name]())


@pytest.mark.parametrize(("name", "precision"), CLOSE)
def test_each_network_in_each_precision(onnx_bench: Bench, name: str, precision: Precision) -> None:
    job = job_of(onnx_bench, name)
    made = onnx_bench.converted(job, precision)
    assert [(check.name, check.ok) for check in made.checks] == [("conversion", True)]
    proof, apart = onnx_bench.proved(job, made.artifact, precision)
    assert apart < CLOSE[name, precision]
    assert (proof.level, proof.ran, proof.skipped) == ("executed", True, ())
    assert {check.name for check in proof.checks if not check.ok} <= {"kernels"}, proof.checks
    assert all(ms > 0 for ms in proof.latency_ms)


@pytest.mark.parametrize(
    ("precision", "kinds"),
    [("fp32", {"float32"}), ("fp16", {"float16"}), ("int8", {"int8"}), ("int4", {"float32", "int4"})],
)
def test_the_weights_are_of_the_number_type_that_was_asked_for(
    onnx_bench: Bench, precision: Precision, kinds: set[str]
) -> None:
    job = job_of(onnx_bench, "cnn")
    proof, _ = onnx_bench.proved(job, onnx_bench.converted(job, precision).artifact, precision)
    assert set(proof.weights) == kinds
    if precision == "int8":
        assert proof.weights["int8"] == 3 * 16 * 9 + 16 * 9 + 16 * 16 + 16 * 10


def test_the_first_axis_is_free_and_other_numbers_of_rows_give_the_same(onnx_bench: Bench) -> None:
    job = job_of(onnx_bench, "cnn")
    made = onnx_bench.converted(job, "fp32")
    axes = onnx.load(made.artifact).graph.input[0].type.tensor_type.shape.dim
    assert (axes[0].dim_param, axes[1].dim_value) == ("batch", 3)
    proof, _ = onnx_bench.proved(job, made.artifact, "fp32")
    (check,) = (one for one in proof.checks if one.name == "batch")
    assert check.ok
    assert "batch 7 against batch 1" in check.detail


def test_a_file_says_nothing_of_the_disk_that_it_was_made_on(onnx_bench: Bench) -> None:
    whole = Path(onnx_bench.converted(job_of(onnx_bench, "cnn"), "fp32").artifact).read_bytes()
    assert b"nets" not in whole
    assert b"site-packages" not in whole
    assert str(Path(__file__).parent).encode() not in whole


def test_another_axis_is_free_if_it_is_asked_for(onnx_bench: Bench) -> None:
    job = job_of(onnx_bench, "encoder")
    free = {"input_ids": [1], "attention_mask": [1]}
    made = onnx_bench.converted(job, "fp32", dynamic=free)
    for one in onnx.load(made.artifact).graph.input:
        assert [dim.dim_param for dim in one.type.tensor_type.shape.dim] == ["batch", "axis_1"]
    assert onnx_bench.proved(job, made.artifact, "fp32")[1] < 1e-5


@pytest.mark.parametrize(
    ("free", "said"), [({"ids": [1]}, "'ids', which is no input"), ({"input_ids": [2]}, "axis 2 of 'input_ids'")]
)
def test_axes_that_are_not_there_cannot_be_free(onnx_bench: Bench, free: dict[str, list[int]], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        onnx_bench.converted(job_of(onnx_bench, "encoder"), "fp32", dynamic=free)
    assert caught.value.hint


def test_float32_handed_in_as_int8_or_half_is_named(onnx_bench: Bench) -> None:
    job = job_of(onnx_bench, "cnn")
    plain = onnx_bench.converted(job, "fp32").artifact
    for precision in ("int8", "fp16"):
        assert len(onnx_bench.proved(job, plain, precision)[0].skipped) == 4  # type: ignore[arg-type]


def test_what_overflows_half_precision_stays_float32_by_itself(onnx_bench: Bench) -> None:
    job = job_of(onnx_bench, "overflowing")
    made = onnx_bench.converted(job, "fp16")
    assert any("stay float32" in note for note in made.notes)
    proof, apart = onnx_bench.proved(job, made.artifact, "fp16")
    assert apart < 2e-3
    assert proof.weights.keys() == {"float16"}


def test_a_conversion_that_computes_something_else_is_seen_before_quantizing(onnx_bench: Bench) -> None:
    job = job_of(onnx_bench, "cnn")
    model = onnx.load(onnx_bench.converted(job, "fp32").artifact)
    filters = next(one for one in model.graph.initializer if len(one.dims) == 4)
    filters.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(filters) * 1.1, filters.name))
    wrong = onnx_bench.place / "wrong.onnx"
    onnx.save(model, wrong)
    (check,) = onnx_bench.converted(replace(job, hub=str(wrong)), "int8").checks
    assert (check.name, check.ok) == ("conversion", False)


def test_a_matrix_that_stays_floating_beside_others_is_named_by_its_layer(onnx_bench: Bench) -> None:
    job = job_of(onnx_bench, "cnn")
    made = onnx_bench.converted(job, "int8-dynamic")
    proof, _ = onnx_bench.proved(job, made.artifact, "int8-dynamic")
    assert [(one.op, one.count) for one in proof.coverage.fallback] == [("Conv", 3)]
    assert proof.coverage.fallback[0].hint
    assert proof.coverage.nodes - proof.coverage.accelerated == 3


def test_tables_of_embeddings_are_int8_too(onnx_bench: Bench) -> None:
    job = job_of(onnx_bench, "encoder")
    whole, small = (onnx_bench.converted(job, precision).artifact for precision in ("fp32", "int8"))
    stored = {one.name: one for one in onnx.load(small).graph.initializer}
    assert stored["table.weight_int8"].data_type == onnx.TensorProto.INT8
    steps, table = (onnx.numpy_helper.to_array(stored[f"table.weight_{end}"]) for end in ("steps", "int8"))
    exact = next(one for one in onnx.load(whole).graph.initializer if one.name == "table.weight")
    assert steps.shape == (100, 1)
    assert np.abs(table * steps - onnx.numpy_helper.to_array(exact)).max() <= steps.max() / 2 * 1.01


def test_a_matrix_that_layers_share_stays_one(onnx_bench: Bench) -> None:
    once, twice = (
        onnx_bench.proved(job, onnx_bench.converted(job, "int8").artifact, "int8")[0]
        for job in (job_of(onnx_bench, name) for name in ("spiky", "repeated"))
    )
    assert once.weights == twice.weights
    model = onnx.load(onnx_bench.converted(job_of(onnx_bench, "repeated"), "int8").artifact)
    assert sum(node.output[0].endswith("_smoothed") for node in model.graph.node) > 2  # each layer's inputs


def test_the_product_that_costs_most_stays_floating_and_is_named_as_a_choice(onnx_bench: Bench, tmp_path: Path) -> None:
    job = job_of(onnx_bench, "touchy")
    made = onnx_bench.converted(job, "int8")
    (note,) = made.notes
    assert note.startswith("1 of 3 products stay floating")
    proof, apart = onnx_bench.proved(job, made.artifact, "int8")
    assert apart < 0.15
    assert (proof.skipped, proof.weights) == ((), {"int8": 24 * 64 + 128 * 10, "float32": 4 * 24 * 64})
    ((op, count, why),) = [(one.op, one.count, one.why) for one in proof.coverage.fallback]
    assert (op, count) == ("Gemm", 1)
    assert "as rounding it costs most" in why
    model = onnx.load(made.artifact)
    for said in ("", "nonsense", '["another"]'):  # then it is one that a quantizer skipped
        del model.metadata_props[:]
        if said:
            model.metadata_props.append(onnx.StringStringEntryProto(key="edgewise.floating", value=said))
        onnx.save(model, tmp_path / "silent.onnx")
        assert len(onnx_bench.proved(job, tmp_path / "silent.onnx", "int8")[0].skipped) == 1


def test_layers_have_names_and_a_row_for_each_that_was_asked_for(onnx_bench: Bench) -> None:
    job = job_of(onnx_bench, "cnn")
    plain = onnx_bench.layers(job, onnx_bench.converted(job, "fp32").artifact, (1, 4))
    whole = onnx_bench.layers(job, onnx_bench.converted(job, "int8").artifact, (1, 4))
    assert len(set(plain) & set(whole)) >= 4  # by the same names
    for name in set(plain) & set(whole):
        assert plain[name].shape == whole[name].shape
        assert np.linalg.norm(plain[name] - whole[name]) < 0.1 * np.linalg.norm(plain[name])
    assert len(next(iter(plain.values()))) == 2
    last = list(plain.values())[-1]
    np.testing.assert_allclose(last, np.load(Path(job.reference) / "0.npy")[[1, 4]], rtol=1e-3, atol=1e-5)


def test_a_layer_that_has_the_name_of_an_output_gets_another() -> None:
    """torch calls tensors after operators: of a text encoder, `embedding` is one near its beginning."""
    targets = pytest.importorskip("edgewise.export.targets.onnx.target")
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x", "div")]
    nodes = [helper.make_node("Relu", ["x"], ["embedding"]), helper.make_node("Abs", ["embedding"], ["div"])]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    model = targets.renamed(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), ["ids"], ["embedding"]
    )
    onnx.checker.check_model(model, full_check=True)
    assert [list(node.input) + list(node.output) for node in model.graph.node] == [
        ["ids", "embedding_1"],
        ["embedding_1", "embedding"],
    ]


OLD: Final = """
<ir_version: 3, opset_import: ["" : 11]>
old (float[N, 24] x, float[24, 64] first, float[64, 10] last) => (float[N, 10] logits)
{ hidden = MatMul(x, first)  relu = Relu(hidden)  logits = MatMul(relu, last) }
"""
BARE: Final = """
<ir_version: 8, opset_import: ["" : 17]>
bare (float[N, 24] x) => (float[N, 24] y)
<int64[3] three = {-1, 4, 6}, int64[2] two = {-1, 24}>
{
  q = Reshape(x, three)  k = Transpose<perm = [0, 2, 1]>(q)  scores = MatMul(q, k)
  seen = Softmax<axis = -1>(scores)  mixed = MatMul(seen, q)  y = Reshape(mixed, two)
}
"""
COUNTING: Final = """
<ir_version: 8, opset_import: ["" : 17]>
counting (float[N, 24] x) => (float[N, 1] share)
<float zero = {0.0}>
{ more = Greater(x, zero)  real = Cast<to = 1>(more)  share = ReduceMean<axes = [1], keepdims = 1>(real) }
"""


def old_file() -> onnx.ModelProto:
    """As older exporters wrote them: what is stored is an input as well, and no scale for each channel is known."""
    model = onnx.parser.parse_model(OLD)
    draw = np.random.default_rng(5)
    for one in list(model.graph.input)[1:]:
        shape = [dim.dim_value for dim in one.type.tensor_type.shape.dim]
        value = draw.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, one.name))
    return model


def answered(path: str, rows: Any) -> Any:
    session = ort.InferenceSession(path, shared_options(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: rows})[0]


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-dynamic"])
def test_an_old_file_whose_weights_are_inputs_too(onnx_bench: Bench, tmp_path: Path, precision: Precision) -> None:
    onnx.save(old_file(), tmp_path / "old.onnx")
    source = job_of(onnx_bench, "mlp")
    made = onnx_bench.converted(replace(source, hub=str(tmp_path / "old.onnx"), reference="", outputs=()), precision)
    model = onnx.load(made.artifact)
    assert [one.name for one in model.graph.input] == ["x"]
    rows = np.load(f"{source.rows}/x.npy")
    found, exact = (answered(path, rows) for path in (made.artifact, str(tmp_path / "old.onnx")))
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_file_that_is_quantized_already_is_refused(onnx_bench: Bench, precision: Precision) -> None:
    source = job_of(onnx_bench, "mlp")
    done = onnx_bench.converted(source, "int8").artifact
    with pytest.raises(UsageError, match=r"quantized already: its products have 4 DequantizeLinear") as caught:
        onnx_bench.converted(replace(source, hub=done), precision)
    assert "--check" in (caught.value.hint or "")


def test_a_transformer_without_a_stored_matrix(onnx_bench: Bench, tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(BARE), tmp_path / "bare.onnx")
    source = job_of(onnx_bench, "mlp")
    job = replace(source, hub=str(tmp_path / "bare.onnx"), reference="", outputs=())
    rows = np.load(f"{source.rows}/x.npy")
    made = onnx_bench.converted(job, "int8")
    np.testing.assert_allclose(answered(made.artifact, rows), answered(str(tmp_path / "bare.onnx"), rows), atol=1e-5)


def test_half_precision_keeps_the_networks_own_casts(onnx_bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "counting.onnx").write_bytes(onnx.parser.parse_model(COUNTING).SerializeToString())
    source = job_of(onnx_bench, "mlp")
    job = replace(source, hub=str(tmp_path / "counting.onnx"), reference="", outputs=())
    rows = np.load(f"{source.rows}/x.npy")
    made = onnx_bench.converted(job, "fp16")
    np.testing.assert_allclose(answered(made.artifact, rows), (rows > 0).mean(1, keepdims=True), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "says"), [("eigen", "aten.linalg_eig"), ("deciding", "depends on the numbers in its input")]
)
def test_what_onnx_cannot_say_is_refused_with_its_place(onnx_bench: Bench, name: str, says: str) -> None:
    rows = {"x": np.random.default_rng(0).standard_normal((6, 4, 4) if name == "eigen" else (6, 4)).astype(np.float32)}
    with pytest.raises(UnsupportedModel, match=says) as caught:
        onnx_bench.converted(onnx_bench.job(name, rows), "fp32")
    assert "nets.py:" in caught.value.message
    assert caught.value.hint


def test_damaged_files_are_refused(onnx_bench: Bench, tmp_path: Path) -> None:
    job = job_of(onnx_bench, "cnn")
    whole = Path(onnx_bench.converted(job, "fp32").artifact)
    (cut := tmp_path / "cut.onnx").write_bytes(whole.read_bytes()[:3000])
    (apart := tmp_path / "apart.onnx").parent.mkdir(exist_ok=True)
    onnx.save(onnx.load(whole), apart, save_as_external_data=True, location="apart.data", size_threshold=16)
    (tmp_path / "apart.data").unlink()
    files: dict[Path, str] = {
        cut: "damaged",
        apart: "weights of apart.onnx",
        tmp_path / "none.onnx": "is no file",
    }
    for path, says in files.items():
        with pytest.raises(SourceError, match=says) as caught:
            onnx_bench.proved(job, path, "fp32")
        assert caught.value.hint


def test_an_artifact_of_another_source_is_refused(onnx_bench: Bench) -> None:
    other: dict[str, Any] = {"cnn": "the file takes", "encoder": "the file takes 2 inputs"}
    job = onnx_bench.job("mlp", vectors())
    for name, says in other.items():
        artifact = onnx_bench.converted(job_of(onnx_bench, name), "fp32").artifact
        with pytest.raises(UnsupportedModel, match=says):
            onnx_bench.proved(job, artifact, "fp32")
