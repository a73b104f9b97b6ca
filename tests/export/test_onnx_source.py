"""ONNX files as sources: what is read, what they give, what is between, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgewise.engines.onnx_process import shared_options
from edgewise.errors import SourceError, UnsupportedModel, UsageError
from edgewise.export.sources import onnx_file, onnx_source
from edgewise.export.work.job import Begun, Job, Source, Tensor, read_array

MLP = """
    <ir_version: 9, opset_import: ["" : 18]>
    net (float[{rows}, {width}] x, int64[{rows}] which) => (float[{rows}, 3] y, float[{rows}, 4] inside)
    <float[4, 3] w = {{1, 2, 3, -1, -2, -3, 0.5, 0.25, 0.125, 3, 2, 1}}, float[5, 4] table =
     {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}}>
    {{
        [word] word = Gather (table, which)
        [sum] inside = Add (x, word)
        [dense] product = MatMul (inside, w)
        [last] y = Tanh (product)
    }}
"""
DRAW = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has onnxruntime to itself; here its sessions share the pool of all the other tests'."""
    monkeypatch.setattr(onnx_source, "_options", lambda threads: shared_options())


def written(tmp_path: Path, text: str, **words: object) -> Source:
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text.format(**words) if words else text), path)
    return Source("onnx", str(path), "net", "classify")


def begun(source: Source, tmp_path: Path, data: str = "", **more: object) -> tuple[Job, Begun]:
    job = Job("begin", source, str(tmp_path / "begin"), data=data, threads=1)
    found = onnx_source.begin(job)
    return replace(job, inputs=found.inputs, outputs=found.outputs, rows=f"{job.work}/rows", **more), found


def mlp(x: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w = np.array([[1, 2, 3], [-1, -2, -3], [0.5, 0.25, 0.125], [3, 2, 1]], np.float32)
    inside = x + np.arange(1, 21, dtype=np.float32).reshape(5, 4)[which]
    return np.tanh(inside @ w), inside


def data_of(tmp_path: Path, rows: int, **more: np.ndarray) -> str:
    given = {"x": DRAW.standard_normal((rows, 4)).astype(np.float32) / 9, "which": DRAW.integers(0, 5, rows)}
    np.savez(tmp_path / "rows.npz", **(given | more))
    return str(tmp_path / "rows.npz")


@pytest.mark.parametrize("rows", ["n", 1, 4])
def test_it_gives_inputs_outputs_and_the_reference_for_any_number_of_rows(rows: object, tmp_path: Path) -> None:
    source = written(tmp_path, MLP, rows=rows, width=4)
    job, found = begun(source, tmp_path, data_of(tmp_path, 21))
    assert found.inputs == (Tensor("x", (1, 4), "float32"), Tensor("which", (1,), "int64"))
    assert found.outputs == (Tensor("y", (1, 3), "float32"), Tensor("inside", (1, 4), "float32"))
    assert (found.rows, found.parameters, found.task, found.random) == (21, 32, "classify", False)
    assert any("4 rows at once" in note for note in found.notes) == (rows == 4)
    expected = mlp(read_array(job.rows, "x"), read_array(job.rows, "which"))
    for n, value in enumerate(expected):
        np.testing.assert_allclose(read_array(tmp_path / "begin" / "reference", str(n)), value, rtol=1e-4, atol=1e-5)


def test_labels_come_along(tmp_path: Path) -> None:
    source = written(tmp_path, MLP, rows="n", width=4)
    _, found = begun(source, tmp_path, data_of(tmp_path, 20, labels=np.arange(20) % 3))
    assert found.labelled
    assert np.load(tmp_path / "begin" / "labels.npy").tolist() == (np.arange(20) % 3).tolist()


def test_without_data_rows_are_random_and_fit(tmp_path: Path) -> None:
    _, found = begun(written(tmp_path, MLP, rows="n", width=4), tmp_path)
    assert found.random
    assert np.isfinite(read_array(tmp_path / "begin" / "reference", "0")).all()


FREE = """
    <ir_version: 9, opset_import: ["" : 18]>
    net (float[n, side, side2] x) => (float[n, side, side2] y) { y = Relu (x) }
"""


def test_free_axes_are_what_the_user_says_or_their_arrays_have(tmp_path: Path) -> None:
    source = written(tmp_path, FREE)
    said = replace(source, shapes={"x": (1, 5, 6)})
    assert begun(said, tmp_path)[1].inputs == (Tensor("x", (1, 5, 6), "float32"),)
    np.savez(tmp_path / "rows.npz", x=DRAW.standard_normal((20, 3, 2)).astype(np.float32))
    assert begun(source, tmp_path, str(tmp_path / "rows.npz"))[1].inputs == (Tensor("x", (1, 3, 2), "float32"),)
    with pytest.raises(UsageError) as caught:
        begun(source, tmp_path)
    assert "--shape x=1," in str(caught.value.hint)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [({"z": (1, 4)}, "no input z"), ({"x": (1, 5)}, r"\[1, 5\]"), ({"x": (1, 4, 1)}, r"\[1, 4, 1\]")],
)
def test_shapes_that_the_file_cannot_take_are_refused(
    shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    source = replace(written(tmp_path, MLP, rows="n", width=4), shapes=shapes)
    with pytest.raises(UsageError, match=message):
        begun(source, tmp_path)


def test_tensors_between_are_named_by_their_nodes_in_the_order_of_computing(tmp_path: Path) -> None:
    for rows in ("n", 3):
        source = written(tmp_path, MLP, rows=rows, width=4)
        job, _ = begun(source, tmp_path, data_of(tmp_path, 20))
        found = onnx_source.layers(replace(job, step="layers", work=str(tmp_path / "between"), only=(4, 9)))
        assert found.names == ("word", "sum", "dense", "last")
        y, inside = mlp(read_array(job.rows, "x")[[4, 9]], read_array(job.rows, "which")[[4, 9]])
        places = tmp_path / "between" / "layers"
        np.testing.assert_allclose(read_array(places, "1"), inside, rtol=1e-5)
        np.testing.assert_allclose(read_array(places, "3"), y, rtol=1e-4, atol=1e-5)


def test_it_can_be_loaded_as_a_torch_module(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from edgewise.export.sources.torch_source import load

    source = written(tmp_path, MLP, rows="n", width=4)
    job, _ = begun(source, tmp_path, data_of(tmp_path, 20))
    loaded = load(source)
    assert loaded.inputs == job.inputs
    assert loaded.outputs == ("y", "inside")
    found = loaded.module(*(torch.from_numpy(np.array(read_array(job.rows, one.name))) for one in job.inputs))
    for n, value in enumerate(found):
        np.testing.assert_allclose(
            value.numpy(), read_array(tmp_path / "begin" / "reference", str(n)), rtol=1e-4, atol=1e-5
        )


HALF = """
<ir_version: 9, opset_import: ["" : 18]>
net (float16[n, 4] x) => (float16[n, 3] y) {
    w = Constant <value = float16[4, 3] {1, 2, 3, -1, -2, -3, 0, 1, 2, 3, 2, 1}> ()
    wide = Cast <to = 1> (x)  again = Cast <to = 10> (wide)  h = MatMul (again, w)  y = Tanh (h)
}
"""


@pytest.mark.parametrize("stored", [True, False])
def test_half_precision_is_widened(stored: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = written(tmp_path, HALF)
    model = onnx.load(source.ref)
    weight = model.graph.node[0].attribute[0].t
    matrix = np.array([[1, 2, 3], [-1, -2, -3], [0, 1, 2], [3, 2, 1]], np.float16) / 3
    weight.CopyFrom(onnx.numpy_helper.from_array(matrix, "w"))
    if stored:
        model.graph.initializer.append(weight)
        del model.graph.node[0]
    onnx.save(model, source.ref)
    x = (DRAW.standard_normal((20, 4)) / 9).astype(np.float16)
    np.savez(tmp_path / "half.npz", x=x)
    job, found = begun(source, tmp_path, str(tmp_path / "half.npz"))
    assert any("widened" in note for note in found.notes)
    assert found.inputs == (Tensor("x", (1, 4), "float32"),)
    hub = onnx.load(found.hub)
    assert {one.data_type for one in hub.graph.initializer} <= {onnx.TensorProto.FLOAT}
    exact = np.tanh(read_array(job.rows, "x").astype(np.float32) @ matrix.astype(np.float32))
    np.testing.assert_allclose(read_array(tmp_path / "begin" / "reference", "0"), exact, rtol=1e-5, atol=1e-6)
    again = onnx_source.loaded(source).module(torch.from_numpy(np.array(read_array(job.rows, "x"))))
    np.testing.assert_allclose(again, exact, rtol=1e-5, atol=1e-6)


def test_number_types_in_attributes_are_widened_too(tmp_path: Path) -> None:
    text = """
        <ir_version: 9, opset_import: ["" : 18]>
        net (float16[n, 4] x) => (float16[n, 4] y) {
            four = Constant <value_int = 4> ()  window = HannWindow <output_datatype = 10> (four)
            no = Constant <value_int = 0> ()  ok = Cast <to = 9> (no)
            y = If (ok) <
                then_branch = yes () => (float16[n, 4] a) { a = Relu (x) },
                else_branch = no () => (float16[n, 4] b) { b = Mul (x, window) }
            >
        }
    """
    job, _ = begun(written(tmp_path, text), tmp_path)
    expected = read_array(job.rows, "x") * np.array([0, 0.5, 1, 0.5], np.float32)
    np.testing.assert_allclose(read_array(tmp_path / "begin" / "reference", "0"), expected, atol=1e-6)


def test_what_one_file_cannot_hold_is_saved_in_two_and_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.parser.parse_model(MLP.format(rows="n", width=4))
    for one in model.graph.initializer:
        value = np.resize(onnx.numpy_helper.to_array(one), (64, 64))
        one.CopyFrom(onnx.numpy_helper.from_array(value, one.name))
    before = model.SerializeToString()
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    files = onnx_file.save(model, tmp_path / "deep" / "net.onnx")
    assert model.SerializeToString() == before
    assert [Path(one).name for one in files] == ["net.onnx", "net.onnx.data"]
    assert Path(files[1]).stat().st_size >= onnx_file.stored_bytes(model) > Path(files[0]).stat().st_size
    again = onnx.load(files[0])
    for one, other in zip(again.graph.initializer, model.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other))


# What is refused


def test_a_missing_a_cut_off_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "external"  # which is no word about its weights
    place.mkdir()
    source = written(place, MLP, rows="n", width=4)
    path = Path(source.ref)
    whole = path.read_bytes()
    for bytes_ in (whole[: len(whole) // 2], b"no model", b""):
        path.write_bytes(bytes_)
        with pytest.raises(SourceError, match=r"net\.onnx is damaged"):
            begun(source, tmp_path)
    path.unlink()
    with pytest.raises(SourceError, match="there is no file"):
        begun(source, tmp_path)


def test_weights_that_are_not_beside_it_are_named(tmp_path: Path) -> None:
    source = written(tmp_path, MLP, rows="n", width=4)
    path = Path(source.ref)
    model = onnx.load(path)
    for one in model.graph.initializer:  # only raw bytes can lie outside
        one.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(one), one.name))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert begun(source, tmp_path)[1].parameters == 32
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(SourceError, match=r"weights of net\.onnx"):
        begun(source, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("net (float[n, 2] x) => (float[2] y) <int64[1] a = {0}> { y = ReduceSum <keepdims = 0> (x, a) }", "gives 'y'"),
        ("net (string[n] x) => (int64[1] y) { y = Shape (x) }", "as string"),
        ("net (float x) => (float y) { y = Relu (x) }", "single number"),
        ("net (float[2, 3] x, float[4, 3] z) => (float[2, 3] y) { y = Relu (x) }", "2, 4"),
    ],
)
def test_inputs_and_outputs_without_rows_are_refused(text: str, message: str, tmp_path: Path) -> None:
    source = written(tmp_path, f'<ir_version: 9, opset_import: ["" : 18]> {text}')
    with pytest.raises(UnsupportedModel, match=message):
        begun(source, tmp_path)


def test_an_operator_that_onnxruntime_has_not_is_named(tmp_path: Path) -> None:
    opsets = '<ir_version: 9, opset_import: ["" : 18, "acme" : 1]>'
    source = written(tmp_path, f"{opsets} net (float[n, 2] x) => (float[n, 2] y) {{ y = acme.Foo (x) }}")
    with pytest.raises(UnsupportedModel, match="acme:Foo"):
        begun(source, tmp_path)


def test_inputs_that_the_network_fails_on_are_the_users_to_correct(tmp_path: Path) -> None:
    source = written(tmp_path, MLP, rows="n", width=4)
    with pytest.raises(UsageError, match="the source fails on inputs"):
        begun(source, tmp_path, data_of(tmp_path, 20, which=np.full(20, 99)))
