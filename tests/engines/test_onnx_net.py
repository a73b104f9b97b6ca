"""Any ONNX file as a Predictor, on small graphs whose answers numpy knows."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgewise import JointInference
from edgewise.engines.local import fixed_threads
from edgewise.engines.onnx_net import OnnxNet, Port
from edgewise.errors import EngineClosed, EngineError, RequestError, SourceError, UnsupportedModel, UsageError
from edgewise.joint.policy import Policy
from edgewise.joint.predictors import PredictorCascade

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RANDOM = np.random.default_rng(0)
KERNEL = RANDOM.normal(size=(4, 3, 3, 3)).astype(np.float32)
HEAD = RANDOM.normal(size=(4, 5)).astype(np.float32)
HIDDEN = RANDOM.normal(size=(6, 8)).astype(np.float32)
OUT = RANDOM.normal(size=(8, 3)).astype(np.float32)
TABLE = RANDOM.normal(size=(20, 7)).astype(np.float32)

node = helper.make_node
info = helper.make_tensor_value_info


def model(
    nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], opset: int = 21, **weights: np.ndarray
) -> Any:
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "net", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def saved(path: Path, made: Any, **how: Any) -> Path:
    onnx.save(made, path, **how)
    return path


def conv(batch: int | str | None) -> Any:
    """Images [batch, 3, 8, 8] to `logits` [batch, 5]."""
    nodes = [
        node("Conv", ["image", "kernel"], ["seen"], pads=[1, 1, 1, 1]),
        node("Relu", ["seen"], ["kept"]),
        node("GlobalAveragePool", ["kept"], ["mean"]),
        node("Flatten", ["mean"], ["flat"]),
        node("MatMul", ["flat", "head"], ["logits"]),
    ]
    return model(
        nodes,
        [info("image", FLOAT, [batch, 3, 8, 8])],
        [info("logits", FLOAT, [batch, 5])],
        kernel=KERNEL,
        head=HEAD,
    )


def conv_by_numpy(images: np.ndarray) -> np.ndarray:
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.maximum(np.einsum("nchwij,ocij->nohw", windows, KERNEL), 0).mean(axis=(2, 3)) @ HEAD


def mlp(batch: int | str | None, score: str = "score") -> Any:
    """`x` [batch, 6] to `hidden` [batch, 8], `score` [batch, 3] and `best` int64 [batch]."""
    nodes = [
        node("MatMul", ["x", "a"], ["line"]),
        node("Tanh", ["line"], ["hidden"]),
        node("MatMul", ["hidden", "b"], [score]),
        node("ArgMax", [score], ["best"], axis=1, keepdims=0),
    ]
    outputs = [info("hidden", FLOAT, [batch, 8]), info(score, FLOAT, [batch, 3]), info("best", INT64, [batch])]
    return model(nodes, [info("x", FLOAT, [batch, 6])], outputs, a=HIDDEN, b=OUT)


def mlp_by_numpy(x: np.ndarray) -> np.ndarray:
    return np.tanh(x @ HIDDEN) @ OUT


def ids_net(kind: int = INT64) -> Any:
    """`ids` and a `mask`, both [batch, tokens], to `logits` [batch, 7]: the sum of the rows of a table."""
    nodes = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("Cast", ["mask"], ["weight"], to=FLOAT),
        node("Unsqueeze", ["weight", "last"], ["column"]),
        node("Mul", ["rows", "column"], ["weighed"]),
        node("ReduceSum", ["weighed", "axis"], ["logits"], keepdims=0),
    ]
    return model(
        nodes,
        [info("ids", kind, ["batch", "tokens"]), info("mask", TensorProto.BOOL, ["batch", "tokens"])],
        [info("logits", FLOAT, ["batch", 7])],
        table=TABLE,
        last=np.array([-1]),
        axis=np.array([1]),
    )


def plain(axes: Sequence[int | str | None] | None, kind: int = FLOAT, out: Sequence[Any] | None = None) -> Any:
    """`x` and the same as `logits`."""
    return model([node("Identity", ["x"], ["logits"])], [info("x", kind, axes)], [info("logits", kind, out or axes)])


def endless() -> Any:
    """`x` [batch, 2] to `logits` [batch, 2] after so many additions that nobody waits for them."""
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Add", ["sum", "sum"], ["next"])],
        "body",
        [info("step", INT64, []), info("go", TensorProto.BOOL, []), info("sum", FLOAT, None)],
        [info("on", TensorProto.BOOL, []), info("next", FLOAT, None)],
    )
    return model(
        [node("Loop", ["times", "", "x"], ["logits"], body=body)],
        [info("x", FLOAT, ["batch", 2])],
        [info("logits", FLOAT, ["batch", 2])],
        times=np.array(1 << 60),
    )


def images(rows: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def convs(tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, OnnxNet]:
    """One network with a dynamic batch and two with a fixed one."""
    home = tmp_path_factory.mktemp("convs")
    return {
        fixed: OnnxNet(saved(home / f"conv-{fixed}.onnx", conv(fixed or "batch")), slots=2) for fixed in (None, 1, 4)
    }


# What it gives


@pytest.mark.parametrize("fixed", [None, 1, 4])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 11])
async def test_a_batch_of_any_size_on_any_file(convs: dict[int | None, OnnxNet], fixed: int | None, rows: int) -> None:
    found = await convs[fixed].predict({"image": images(rows)})
    assert list(found) == ["logits"]
    assert found["logits"].dtype == np.float32
    assert found["logits"].shape == (rows, 5)
    np.testing.assert_allclose(found["logits"], conv_by_numpy(images(rows)), atol=1e-5)


@given(st.sampled_from([None, 1, 4]), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_batch_is_its_rows_one_by_one(
    convs: dict[int | None, OnnxNet], fixed: int | None, rows: int, seed: int, scale: float
) -> None:
    given_images = images(rows, seed) * np.float32(scale)

    async def both() -> tuple[np.ndarray, np.ndarray]:
        whole = await convs[fixed].predict({"image": given_images})
        parts = [await convs[fixed].predict({"image": given_images[n : n + 1]}) for n in range(rows)]
        return whole["logits"], np.concatenate([part["logits"] for part in parts])

    whole, parts = asyncio.run(both())
    np.testing.assert_allclose(whole, parts, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("fixed", ["batch", None, 1, 4])
async def test_all_outputs_come_and_the_named_one_as_logits_too(tmp_path: Path, fixed: int | str | None) -> None:
    net = OnnxNet(saved(tmp_path / "mlp.onnx", mlp(fixed)), logits="score")
    x = RANDOM.normal(size=(6, 6)).astype(np.float32)
    found = await net.predict({"x": x})
    assert sorted(found) == ["best", "hidden", "logits", "score"]
    assert found["logits"] is found["score"]
    np.testing.assert_allclose(found["logits"], mlp_by_numpy(x), atol=1e-5)
    np.testing.assert_allclose(found["hidden"], np.tanh(x @ HIDDEN), atol=1e-6)
    assert found["best"].tolist() == mlp_by_numpy(x).argmax(axis=1).tolist()


async def test_an_output_called_logits_needs_no_name(tmp_path: Path) -> None:
    net = OnnxNet(saved(tmp_path / "mlp.onnx", mlp("batch", score="logits")))
    found = await net.predict({"x": np.ones((2, 6), np.float32)})
    assert sorted(found) == ["best", "hidden", "logits"]


async def test_the_only_grid_of_floats_needs_no_name_either(tmp_path: Path) -> None:
    made = model(
        [node("Softmax", ["x"], ["probabilities"]), node("ArgMax", ["x"], ["top"], axis=1, keepdims=0)],
        [info("x", FLOAT, ["n", 3])],
        [info("top", INT64, ["n"]), info("probabilities", FLOAT, ["n", 3])],
    )
    found = await OnnxNet(saved(tmp_path / "net.onnx", made)).predict({"x": np.zeros((2, 3), np.float32)})
    assert sorted(found) == ["logits", "probabilities", "top"]
    assert found["logits"] is found["probabilities"]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
async def test_logits_are_float32_whatever_the_file_computes_in(tmp_path: Path, kind: int) -> None:
    net = OnnxNet(saved(tmp_path / "net.onnx", plain(["n", 2], kind)))
    found = await net.predict({"x": np.array([[0.5, -2.0]])})
    assert found["logits"].dtype == np.float32
    assert found["logits"].tolist() == [[0.5, -2.0]]


async def test_token_ids_in_every_form_that_means_the_same(tmp_path: Path) -> None:
    net = OnnxNet(saved(tmp_path / "ids.onnx", ids_net(TensorProto.INT32)))
    wanted = TABLE[3] + TABLE[19]
    for ids in ([[3, 19, 0]], np.array([[3, 19, 0]], np.uint8), np.array([[3, 19, 0]], ">i8")):
        for mask in (np.array([[True, True, False]]), [[1, 1, 0]]):
            found = await net.predict({"ids": ids, "mask": mask})  # type: ignore[dict-item]
            np.testing.assert_allclose(found["logits"], wanted[None], atol=1e-6)


async def test_numbers_become_what_the_file_takes(tmp_path: Path) -> None:
    nets = {kind: OnnxNet(saved(tmp_path / f"{kind}.onnx", plain(["n", 3], kind))) for kind in (FLOAT, 10)}
    given_numbers = [
        np.array([[0.5, np.inf, np.nan]]),
        np.array([[1.0, 2.0, 3.0]], np.float16),
        np.array([[0, 255, 7]], np.uint8),
        [[1, 2, 3]],
        [[True, False, True]],
        np.arange(6.0).reshape(3, 2).T,
    ]
    for net in nets.values():
        for numbers in given_numbers:
            found = await net.predict({"x": numbers})  # type: ignore[dict-item]
            assert np.array_equal(found["logits"], np.asarray(numbers, np.float32), equal_nan=True)


async def test_strings(tmp_path: Path) -> None:
    made = model(
        [node("Identity", ["words"], ["same"]), node("Identity", ["x"], ["logits"])],
        [info("words", TensorProto.STRING, [2]), info("x", FLOAT, [2, 1])],
        [info("same", TensorProto.STRING, [2]), info("logits", FLOAT, [2, 1])],
    )
    net = OnnxNet(saved(tmp_path / "net.onnx", made))
    found = await net.predict({"words": np.array(["a", "bcd", "e"]), "x": np.ones((3, 1), np.float32)})
    assert found["same"].tolist() == ["a", "bcd", "e"]
    with pytest.raises(RequestError, match="allowed is words string"):
        await net.predict({"words": np.array([1, 2]), "x": np.ones((2, 1), np.float32)})


def test_what_the_file_takes_and_gives_is_a_value_to_read(convs: dict[int | None, OnnxNet], tmp_path: Path) -> None:
    net = OnnxNet(saved(tmp_path / "net.onnx", ids_net()), name="ids")
    assert net.inputs == (
        Port("ids", np.dtype(np.int64), ("batch", "tokens")),
        Port("mask", np.dtype(np.bool_), ("batch", "tokens")),
    )
    assert net.inputs[0].shape == (None, None)
    assert [str(port) for port in net.outputs] == ["logits float32 [batch, 7]"]
    assert (net.name, net.batch) == ("ids", None)
    assert convs[4].name == "conv-4"
    assert convs[4].inputs[0].shape == (4, 3, 8, 8)
    assert [convs[fixed].batch for fixed in (None, 1, 4)] == [None, 1, 4]


async def test_a_file_without_shapes_checks_none(tmp_path: Path) -> None:
    net = OnnxNet(saved(tmp_path / "net.onnx", plain(None)))
    assert net.inputs[0].shape is None
    assert str(net.inputs[0]) == "x float32 any shape"
    for shape in ((2,), (1, 2, 3)):
        assert (await net.predict({"x": np.ones(shape, np.float32)}))["logits"].shape == shape


async def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.onnx", conv("batch"), save_as_external_data=True, location="w", size_threshold=0)
    found = await OnnxNet(path).predict({"image": images(2)})
    np.testing.assert_allclose(found["logits"], conv_by_numpy(images(2)), atol=1e-5)
    (tmp_path / "w").unlink()
    with pytest.raises(SourceError, match="external data beside it"):
        OnnxNet(path)


def test_all_models_of_a_process_have_the_same_threads(tmp_path: Path) -> None:
    path, threads = saved(tmp_path / "net.onnx", conv(4)), fixed_threads()
    assert OnnxNet(path, threads=threads).batch == 4
    with pytest.raises(EngineError, match=f"has {threads} threads already and cannot be given {threads + 1}"):
        OnnxNet(path, threads=threads + 1)


# Pieces


async def test_rows_that_depend_on_each_other_are_not_filled_up(tmp_path: Path) -> None:
    """The file subtracts the mean over the rows."""
    made = model(
        [node("ReduceMean", ["x", "axis"], ["mean"]), node("Sub", ["x", "mean"], ["logits"])],
        [info("x", FLOAT, [4, 2])],
        [info("logits", FLOAT, [4, 2])],
        axis=np.array([0]),
    )
    net = OnnxNet(saved(tmp_path / "net.onnx", made))
    for warm_up in (np.zeros((1, 2)), np.full((3, 2), 1e-5)):
        with pytest.raises(RequestError, match="depends on the others"):
            await net.predict({"x": warm_up})
    x = RANDOM.normal(size=(5, 2)).astype(np.float32)
    found = await net.predict({"x": x[:4]})
    np.testing.assert_allclose(found["logits"], x[:4] - x[:4].mean(axis=0), atol=1e-6)
    for rows in (1, 3, 5):
        with pytest.raises(RequestError, match=r"takes 4 rows at once.*'logits' of a row depends on the others"):
            await net.predict({"x": x[:rows]})


async def test_a_fixed_axis_that_is_no_batch_is_kept(tmp_path: Path) -> None:
    """An output without the rows, or inputs that disagree about their number, cannot be put together of pieces."""
    flat = model(
        [node("ReduceMean", ["x", "axis"], ["logits"], keepdims=0)],
        [info("x", FLOAT, [4, 3, 2])],
        [info("logits", FLOAT, [3, 2])],
        axis=np.array([0]),
    )
    two = model(
        [node("MatMul", ["x", "w"], ["logits"])],
        [info("x", FLOAT, [1, 3]), info("w", FLOAT, [3, 2])],
        [info("logits", FLOAT, [1, 2])],
    )
    nets = [OnnxNet(saved(tmp_path / f"{n}.onnx", made)) for n, made in enumerate((flat, two))]
    assert [net.batch for net in nets] == [None, None]
    with pytest.raises(RequestError, match=r"has the shape \[5, 3, 2\].*give 4 along axis 0"):
        await nets[0].predict({"x": np.ones((5, 3, 2), np.float32)})
    found = await nets[1].predict({"x": np.ones((1, 3)), "w": np.ones((3, 2))})
    assert found["logits"].tolist() == [[3.0, 3.0]]


async def test_an_output_with_rows_of_its_own_number_is_not_cut(tmp_path: Path) -> None:
    made = model(
        [node("NonZero", ["x"], ["places"]), node("Transpose", ["places"], ["found"]), node("Abs", ["x"], ["logits"])],
        [info("x", FLOAT, [1, 3])],
        [info("logits", FLOAT, [1, 3]), info("found", INT64, ["n", 2])],
    )
    net = OnnxNet(saved(tmp_path / "net.onnx", made))
    x = np.array([[1, 0, 2], [0, 0, 3]], np.float32)
    assert (await net.predict({"x": x[:1]}))["found"].tolist() == [[0, 0], [0, 2]]
    with pytest.raises(EngineError, match=r"took 1 rows and its output 'found' has the shape \[2, 2\]"):
        await net.predict({"x": x})


async def test_several_inputs_in_pieces_have_the_same_rows(tmp_path: Path) -> None:
    made = model(
        [node("Add", ["x", "y"], ["logits"])],
        [info("x", FLOAT, [2, 3]), info("y", FLOAT, [2, 1])],
        [info("logits", FLOAT, [2, 3])],
    )
    net = OnnxNet(saved(tmp_path / "net.onnx", made))
    x, y = np.arange(15.0).reshape(5, 3), np.arange(5.0)[:, None]
    assert (await net.predict({"x": x, "y": y}))["logits"].tolist() == (x + y).tolist()
    with pytest.raises(RequestError, match="where 'x' has 5 along what is axis 0 here"):
        await net.predict({"x": x, "y": y[:4]})


# What it refuses


BAD = {
    "missing": ({"ids": np.ones((1, 2), int)}, "the input 'mask' is missing: .* takes ids int64 .batch, tokens."),
    "unknown": ({"ids": [[1]], "mask": [[1]], "x": [[1]]}, "there is no input 'x': .* takes ids int64"),
    "no mapping": (np.ones((1, 2)), "the inputs are a ndarray .give arrays by name: .* takes ids"),
    "fractions": ({"ids": [[1.5]], "mask": [[1]]}, r"'ids' is float64 with values 1.5..1.5; allowed is ids int64"),
    "whole floats": ({"ids": [[1.0]], "mask": [[1]]}, "'ids' is float64"),
    "no truth value": ({"ids": [[1]], "mask": [[2]]}, r"'mask' is int64 with values 2..2; allowed is mask bool"),
    "words": ({"ids": [["a"]], "mask": [[1]]}, "'ids' is <U1; allowed is ids int64"),
    "nothing": ({"ids": None, "mask": [[1]]}, "'ids' is object; allowed is ids int64"),
    "ragged": ({"ids": [[1, 2], [3]], "mask": [[1]]}, "'ids' is a list that is no array"),
    "axes": ({"ids": [1, 2], "mask": [[1]]}, r"'ids' has the shape \[2\].*give an array of 2 axes"),
    "no rows": ({"ids": np.ones((0, 2), int), "mask": [[1]]}, r"'ids' has no rows: its shape is \[0, 2\]"),
    "one name, two lengths": (
        {"ids": [[1, 2]], "mask": [[1]]},
        r"'mask' has the shape \[1, 1\], where 'ids' has 2 along what is axis 1 here; allowed is mask bool",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_inputs_are_refused_before_they_run(tmp_path: Path, case: str) -> None:
    net = OnnxNet(saved(tmp_path / "net.onnx", ids_net()))
    net._session = None  # whatever would run, fails
    inputs, message = BAD[case]
    with pytest.raises(RequestError, match=message) as caught:
        await net.predict(inputs)  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (FLOAT, np.array([[1e39]])),
        (TensorProto.FLOAT16, np.array([[7e4]], np.float32)),
        (FLOAT, np.array([[2**24 + 1]])),
        (FLOAT, np.array([[1j]])),
        (TensorProto.INT8, np.array([[-129]])),
        (TensorProto.UINT8, np.array([[-1]])),
        (TensorProto.UINT64, np.array([[-1]])),
        (INT64, np.array([[2**63]], np.uint64)),
    ],
)
async def test_a_loss_is_refused(tmp_path: Path, kind: int, numbers: np.ndarray) -> None:
    net = OnnxNet(saved(tmp_path / "net.onnx", mixed(kind)))
    with pytest.raises(RequestError, match="without a loss"):
        await net.predict({"x": numbers})


def mixed(kind: int) -> Any:
    """`x` of that dtype to `logits` of floats."""
    return model(
        [node("Cast", ["x"], ["logits"], to=FLOAT)], [info("x", kind, ["n", 1])], [info("logits", FLOAT, ["n", 1])]
    )


@pytest.mark.parametrize("fixed", [None, 1, 4])
async def test_images_of_another_size_and_no_images(convs: dict[int | None, OnnxNet], fixed: int | None) -> None:
    with pytest.raises(RequestError, match=r"has the shape \[2, 3, 8, 9\].*give 8 along axis 3"):
        await convs[fixed].predict({"image": np.ones((2, 3, 8, 9), np.float32)})
    with pytest.raises(RequestError, match=r"no rows: its shape is \[0, 3, 8, 8\].*give at least one row"):
        await convs[fixed].predict({"image": images(0)})


async def test_what_only_onnxruntime_can_find_is_an_engine_s_error(tmp_path: Path) -> None:
    net = OnnxNet(saved(tmp_path / "net.onnx", ids_net()))
    with pytest.raises(EngineError, match="out of data bounds"):
        await net.predict({"ids": np.array([[99]]), "mask": np.array([[True]])})
    assert (await net.predict({"ids": np.array([[9]]), "mask": np.array([[True]])}))["logits"].shape == (1, 7)


def test_outputs_that_leave_open_which_the_logits_are(tmp_path: Path) -> None:
    path = saved(tmp_path / "mlp.onnx", mlp("batch"))
    listed = r"hidden float32 \[batch, 8\]; score float32 \[batch, 3\]; best int64 \[batch\]"
    with pytest.raises(UsageError, match=rf"2 that may be it; its outputs are {listed} \(name one"):
        OnnxNet(path)
    with pytest.raises(UsageError, match=rf"logits is 'scores', and mlp has no such output; its outputs are {listed}"):
        OnnxNet(path, logits="scores")
    with pytest.raises(UsageError, match="the output 'best' of mlp is int64; logits are floating-point"):
        OnnxNet(path, logits="best")
    with pytest.raises(UsageError, match="has another output called 'logits'"):
        OnnxNet(saved(tmp_path / "named.onnx", mlp("batch", score="logits")), logits="hidden")
    for axes, kind in ((["n"], FLOAT), (["n", 2], INT64)):
        made = model([node("Identity", ["x"], ["y"])], [info("x", kind, axes)], [info("y", kind, axes)])
        with pytest.raises(UsageError, match="0 that may be it"):
            OnnxNet(saved(tmp_path / "none.onnx", made))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world, this is no network" * 9, None, "cut", "broken"],
    ids=["empty", "text", "none", *"cb"],
)
def test_files_that_are_no_networks(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "net.onnx"
    if content == "cut":
        path.write_bytes(conv("batch").SerializeToString()[:-40])
    elif content == "broken":
        onnx.save(model([node("Relu", ["y"], ["logits"])], [], [info("logits", FLOAT, [1, 1])]), path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(SourceError, match=r"net\.onnx") as caught:
        OnnxNet(path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("operator", "kind", "opset", "message"),
    [
        ("Relux", FLOAT, 21, "No Op registered for Relux"),
        ("Relu", FLOAT, 99, "Opset 99 is under development"),
        ("my::Relu", FLOAT, 21, "is not a registered function/op"),
        ("Relu", TensorProto.BFLOAT16, 21, "Could not find an implementation for Relu"),
        ("Identity", TensorProto.BFLOAT16, 21, "takes 'x' as tensor.bfloat16.; allowed are tensor.float., "),
    ],
)
def test_networks_that_onnxruntime_cannot_run(
    tmp_path: Path, operator: str, kind: int, opset: int, message: str
) -> None:
    ports = [info(name, kind, ["n", 2]) for name in ("x", "logits")]
    path = tmp_path / "net.onnx"
    domain, _, operator = operator.rpartition("::")
    made = model([node(operator, ["x"], ["logits"], domain=domain)], ports[:1], ports[1:], opset)
    made.opset_import.append(helper.make_opsetid("my", 1))
    path.write_bytes(made.SerializeToString())
    with pytest.raises(UnsupportedModel, match=message) as caught:
        OnnxNet(path)
    assert caught.value.hint


def test_a_format_of_the_future(tmp_path: Path) -> None:
    made = plain(["n", 2])
    made.ir_version = 99
    path = tmp_path / "net.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(UnsupportedModel, match="Unsupported model IR version: 99"):
        OnnxNet(path)


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"threads": True}, {"slots": 0}, {"slots": 1.5}])
def test_counts_that_are_none(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = saved(tmp_path / "net.onnx", plain(["n", 2]))
    with pytest.raises(UsageError, match="allowed are whole numbers from 1 on"):
        OnnxNet(path, **wrong)


# Many calls, and the end


@pytest.mark.parametrize("slots", [1, 4])
async def test_many_calls_at_once(tmp_path: Path, slots: int) -> None:
    net = OnnxNet(saved(tmp_path / "net.onnx", conv(4)), slots=slots)
    found = await asyncio.gather(*(net.predict({"image": images(1 + n % 9, n)}) for n in range(40)))
    for n, outputs in enumerate(found):
        np.testing.assert_allclose(outputs["logits"], conv_by_numpy(images(1 + n % 9, n)), atol=1e-5)


class Gate:
    """A session that answers when it is told to; `inside` counts those that wait."""

    def __init__(self, session: Any) -> None:
        self.session, self.opened, self.inside = session, threading.Event(), threading.Semaphore(0)

    def run(self, *arguments: Any) -> Any:
        self.inside.release()
        assert self.opened.wait(60)
        return self.session.run(*arguments)


async def test_the_loop_is_free_while_it_runs(tmp_path: Path) -> None:
    net = OnnxNet(saved(tmp_path / "net.onnx", conv(4)), slots=2)
    gate = Gate(net._session)
    net._session = gate
    calls = [asyncio.create_task(net.predict({"image": images(4)})) for _ in range(3)]
    for _ in range(2):
        assert await asyncio.to_thread(gate.inside.acquire, timeout=60)
    assert not gate.inside.acquire(blocking=False)  # the third waits for a slot
    gate.opened.set()  # by the loop that a blocking call would hold
    for found in await asyncio.gather(*calls):
        assert found["logits"].shape == (4, 5)


async def test_cancelling_stops_the_work(tmp_path: Path) -> None:
    net = OnnxNet(saved(tmp_path / "net.onnx", endless()))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await net.predict({"x": np.zeros((1, 2), np.float32)})
    await asyncio.get_running_loop().run_in_executor(net._pool, str)  # its only thread is free again without a close
    await net.close()


async def test_close_stops_what_runs_and_what_waits(tmp_path: Path) -> None:
    net = OnnxNet(saved(tmp_path / "net.onnx", endless()))
    calls = [asyncio.create_task(net.predict({"x": np.zeros((1, 2), np.float32)})) for _ in range(3)]
    await asyncio.sleep(0.1)
    await asyncio.gather(net.close(), net.close())
    for call in calls:
        with pytest.raises(EngineClosed, match="net was closed"):
            await call
    await net.close()
    with pytest.raises(EngineClosed):
        await net.predict({"x": np.zeros((1, 2), np.float32)})


# Two of them


def tiers(tmp_path: Path) -> tuple[OnnxNet, OnnxNet]:
    """An edge whose logits are its input, and a cloud that is always sure."""
    sure = model(
        [node("Mul", ["x", "scale"], ["logits"])],
        [info("x", FLOAT, [1, 3])],
        [info("logits", FLOAT, [1, 3])],
        scale=np.array(-100.0, np.float32),
    )
    return OnnxNet(saved(tmp_path / "edge.onnx", plain(["batch", 3]))), OnnxNet(saved(tmp_path / "cloud.onnx", sure))


SURE, UNSURE = np.array([[9.0, 0.0, 0.0]]), np.array([[0.4, 0.3, 0.2]])


async def test_a_cascade_of_two_networks(tmp_path: Path) -> None:
    edge, cloud = tiers(tmp_path)
    cascade = PredictorCascade(edge, cloud, Policy.softmax(0.8))
    kept, (decision,) = await cascade.decide({"x": SURE})
    assert (decision.route, kept["logits"].tolist()) == ("edge", SURE.tolist())
    asked, (decision,) = await cascade.decide({"x": UNSURE})
    assert decision.route == "cloud"
    np.testing.assert_allclose(asked["logits"], UNSURE * -100, rtol=1e-6)
    whole, decisions = await cascade.decide({"x": np.concatenate([SURE, UNSURE])})
    assert [decision.route for decision in decisions] == ["edge", "cloud"]
    np.testing.assert_allclose(whole["logits"], np.concatenate([SURE, UNSURE * -100]), rtol=1e-6)
    assert cascade.stats.routes == {"edge": 1, "cloud": 2}
    with pytest.raises(RequestError, match="there is no input 'image'"):
        await cascade.predict({"image": SURE})
    await cloud.close()
    stays, (decision,) = await cascade.decide({"x": UNSURE})
    assert decision.route == "edge_fallback"
    np.testing.assert_allclose(stays["logits"], UNSURE, rtol=1e-6)
    await cascade.close()
    with pytest.raises(EngineClosed):
        await edge.predict({"x": SURE})


def test_joint_inference_of_two_networks(tmp_path: Path) -> None:
    edge, cloud = tiers(tmp_path)
    joint = JointInference(edge, cloud)
    assert joint.infer({"x": SURE})[1] == "edge"
    output, route = joint.infer({"x": UNSURE})
    assert route == "cloud"
    np.testing.assert_allclose(output["logits"], UNSURE * -100, rtol=1e-6)
    asyncio.run(cloud.close())
    assert joint.infer({"x": UNSURE})[1] == "edge_fallback"
    asyncio.run(edge.close())
