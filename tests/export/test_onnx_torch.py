"""ONNX files as torch modules: every operator against onnxruntime, and whole networks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")

from nets import CLASSES, SIZE  # noqa: E402

import edgewise.export.sources.onnx_torch as onnx_torch  # noqa: E402
from edgewise.engines.onnx_process import shared_options  # noqa: E402
from edgewise.errors import UnsupportedModel  # noqa: E402

Array = npt.NDArray[Any]
DRAW = np.random.default_rng(7)
OPSET = 20


@dataclass(frozen=True)
class Held:
    """An input that the file holds."""

    value: Array


@dataclass(frozen=True)
class Case:
    op: str
    inputs: tuple[Any, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = OPSET
    outputs: int = 1

    def __str__(self) -> str:
        told = ",".join(
            f"{name}={value}" for name, value in self.attributes.items() if not isinstance(value, np.ndarray)
        )
        return f"{self.op}-{self.opset}-{told}"


def case(op: str, *inputs: Any, opset: int = OPSET, outputs: int = 1, **attributes: Any) -> Case:
    return Case(op, inputs, attributes, opset, outputs)


def noise(*shape: int) -> Array:
    return DRAW.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return (np.abs(noise(*shape)) + 0.1).astype(np.float32)


def small(*shape: int) -> Array:
    """Within -1..1."""
    return DRAW.uniform(-0.95, 0.95, shape).astype(np.float32)


def truths(*shape: int) -> Array:
    return DRAW.integers(0, 2, shape).astype(bool)


def ints(*values: Any) -> Held:
    return Held(np.array(values, np.int64))


def floats(*values: Any) -> Held:
    return Held(np.array(values, np.float32))


def number(value: Any, dtype: Any = np.float32) -> Held:
    return Held(np.array(value, dtype))


def model_of(one: Case) -> onnx.ModelProto:
    names = ["" if value is None else f"i{at}" for at, value in enumerate(one.inputs)]
    outputs = [f"o{at}" for at in range(one.outputs)]
    node = helper.make_node(one.op, names, outputs, name="the_node", **one.attributes)
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in zip(names, one.inputs, strict=True)
        if isinstance(value, np.ndarray)
    ]
    held = [
        numpy_helper.from_array(value.value, name)
        for name, value in zip(names, one.inputs, strict=True)
        if isinstance(value, Held)
    ]
    graph = helper.make_graph([node], "g", given, [onnx.ValueInfoProto(name=name) for name in outputs], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", one.opset)], ir_version=10)


def session_of(model: onnx.ModelProto) -> Any:
    options = shared_options()  # of all the other tests' sessions, too
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def answers(module: Any, given: dict[str, Array]) -> list[Array]:
    with torch.no_grad():
        found = module(*(torch.from_numpy(value) for value in given.values()))
    return [one.numpy() for one in (found if isinstance(found, tuple) else (found,))]


def check_same(model: onnx.ModelProto, given: dict[str, Array]) -> None:
    expected = session_of(model).run(None, given)
    found = answers(onnx_torch.module_of(model), given)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


IMAGE = (2, 4, 9, 11)
UNARY = {
    noise: "Abs Atan Ceil Cos Cosh Erf Exp Floor HardSwish Identity Mish Neg Relu Round Sigmoid Sign Sin Sinh Softplus "
    "Softsign Tan Tanh Reciprocal LeakyRelu Elu Celu Selu ThresholdedRelu HardSigmoid Shrink GlobalAveragePool "
    "GlobalMaxPool LpNormalization MeanVarianceNormalization",
    positive: "Log Sqrt",
    small: "Acos Asin Atanh Asinh",
    truths: "Not",
}


def elementwise() -> Iterator[Case]:
    for make, names in UNARY.items():
        for name in names.split():
            yield case(name, make(*IMAGE))
    yield case("Acosh", positive(3, 4) + 1)
    yield case("Gelu", noise(3, 4))
    yield case("Gelu", noise(3, 4), approximate="tanh")
    yield case("HardSigmoid", noise(3, 4), alpha=1 / 6, beta=0.5)
    yield case("LeakyRelu", noise(3, 4), alpha=0.3)
    yield case("PRelu", noise(2, 3, 4, 4), Held(noise(3, 1, 1)))
    yield case("IsNaN", np.array([1, np.nan], np.float32))
    yield case("IsInf", np.array([1, np.inf, -np.inf], np.float32))
    yield case("IsInf", np.array([1, np.inf, -np.inf], np.float32), detect_negative=0)
    for low, high in ((0.0, 6.0), (-0.3, 0.4), (None, 0.2), (-0.1, None)):
        yield case("Clip", noise(4, 5) * 4, *(None if one is None else number(one) for one in (low, high)))
    yield case("Clip", noise(4, 5), opset=7, min=-0.5, max=0.5)
    yield case("Clip", noise(4, 5), np.array(-0.2, np.float32), np.array(0.3, np.float32))
    for name in ("Add", "Sub", "Mul", "Div", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Equal", "Pow"):
        yield case(name, positive(2, 3, 4), positive(3, 1))
        yield case(name, positive(2, 3, 4), floats(1, 2, 3, 4))
    yield case("Div", np.array([7, -7, 8], np.int64), np.array([2, 2, -3], np.int64))
    yield case("Mod", np.array([7, -7, 8], np.int64), np.array([3, 3, -3], np.int64))
    yield case("Mod", noise(5), noise(5), fmod=1)
    for power in (2.0, 0.5, -1.0, 3.0):
        yield case("Pow", positive(3, 4), number(power))
    for name in ("And", "Or", "Xor"):
        yield case(name, truths(3, 4), truths(4))
    for name in ("Max", "Min", "Sum", "Mean"):
        yield case(name, noise(3, 4), noise(4), noise(3, 1))
    yield case("Where", truths(3, 1), noise(3, 4), noise(4))
    for kind in (TensorProto.INT32, TensorProto.BOOL, TensorProto.DOUBLE, TensorProto.FLOAT16):
        yield case("Cast", noise(3, 4) * 3, to=kind)
    yield case("CastLike", noise(3, 4) * 3, ints(1))
    yield case("Dropout", noise(3, 4))


def over_axes() -> Iterator[Case]:
    for name in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"):
        name = f"Reduce{name}"
        yield case(name, noise(2, 3, 4), ints(1))
        yield case(name, noise(2, 3, 4), ints(0, -1), keepdims=0)
        yield case(name, noise(2, 3, 4))
        yield case(name, noise(2, 3, 4), noop_with_empty_axes=1)
    for name in ("ReduceLogSum", "ReduceLogSumExp"):
        yield case(name, positive(2, 3, 4), ints(1))
    yield case("ReduceMean", noise(2, 3, 4), opset=13, axes=[1, 2], keepdims=0)
    for name in ("ArgMax", "ArgMin"):
        yield case(name, noise(3, 5), axis=1)
        yield case(name, np.array([[1, 2, 2, 1]], np.float32), axis=1, keepdims=0, select_last_index=1)
    yield case("TopK", noise(3, 8), ints(3), outputs=2)
    yield case("TopK", noise(8, 3), ints(2), outputs=2, axis=0, largest=0)
    for exclusive in (0, 1):
        for reverse in (0, 1):
            yield case("CumSum", noise(3, 5), number(1, np.int64), exclusive=exclusive, reverse=reverse)
    for name in ("Softmax", "LogSoftmax"):
        yield case(name, noise(2, 3, 4), axis=1)
        yield case(name, noise(2, 3, 4))
        yield case(name, noise(2, 3, 4), opset=11, axis=1)
    for upper in (0, 1):
        yield case("Trilu", noise(2, 4, 5), number(1, np.int64), upper=upper)


def products() -> Iterator[Case]:
    yield case("MatMul", noise(2, 3, 4), noise(4, 5))
    yield case("MatMul", noise(2, 3, 4), Held(noise(4, 5)))
    yield case("MatMul", noise(4), noise(2, 4, 3))
    yield case("Gemm", noise(3, 4), Held(noise(4, 5)), Held(noise(5)))
    yield case("Gemm", noise(3, 4), Held(noise(5, 4)), Held(noise(5)), transB=1)
    yield case("Gemm", noise(4, 3), noise(5, 4), noise(3, 1), transA=1, transB=1, alpha=0.5, beta=2.0)
    yield case("Gemm", noise(3, 4), noise(4, 5))
    yield case("Einsum", noise(2, 3, 4), noise(2, 4, 5), equation="bij, bjk -> bik")
    yield case("Einsum", noise(2, 3, 4), noise(4, 3), equation="...ij,ji->...")
    for one in ({}, {"is_causal": 1}, {"scale": 0.3}, {"softcap": 2.0}):
        yield case("Attention", noise(2, 4, 3, 8), noise(2, 4, 5, 8), noise(2, 4, 5, 6), opset=23, **one)
    yield case("Attention", noise(2, 4, 3, 8), noise(2, 2, 5, 8), noise(2, 2, 5, 8), opset=23)
    mask = np.tril(np.ones((3, 5), bool))
    yield case("Attention", noise(2, 4, 3, 8), noise(2, 4, 5, 8), noise(2, 4, 5, 8), Held(mask), opset=23)
    heads = {"q_num_heads": 4, "kv_num_heads": 2}
    yield case("Attention", noise(2, 3, 32), noise(2, 5, 16), noise(2, 5, 16), noise(3, 5), opset=23, **heads)


def normalisation() -> Iterator[Case]:
    channels = [Held(noise(4)), Held(noise(4))]
    yield case("BatchNormalization", noise(*IMAGE), *channels, Held(noise(4)), Held(positive(4)), epsilon=1e-3)
    yield case("BatchNormalization", noise(6, 4), *channels, Held(noise(4)), Held(positive(4)))
    yield case("InstanceNormalization", noise(*IMAGE), *channels)
    yield case("GroupNormalization", noise(*IMAGE), *channels, num_groups=2, opset=21)
    yield case("GroupNormalization", noise(*IMAGE), Held(noise(2)), Held(noise(2)), num_groups=2, opset=18)
    yield case("LayerNormalization", noise(2, 3, 8), Held(noise(8)), Held(noise(8)), outputs=3)
    yield case("LayerNormalization", noise(2, 3, 8), Held(noise(3, 8)), axis=1, epsilon=1e-3)
    yield case("LayerNormalization", noise(2, 3, 8), Held(noise(8)), axis=1)
    yield case("RMSNormalization", noise(2, 3, 8), Held(noise(8)), opset=23)
    yield case("LRN", noise(2, 7, 5, 5), size=3, alpha=0.1)


def quantization() -> Iterator[Case]:
    for zero in (number(3, np.uint8), number(-4, np.int8)):
        yield case("QuantizeLinear", noise(3, 4) * 9, number(0.1), zero)
    yield case("QuantizeLinear", noise(2, 3, 4), floats(0.1, 0.2, 0.3), Held(np.array([1, 2, 3], np.uint8)), axis=1)
    stored = DRAW.integers(-128, 128, (4, 6)).astype(np.int8)
    yield case("DequantizeLinear", stored, number(0.02), number(3, np.int8))
    yield case("DequantizeLinear", Held(stored), floats(0.1, 0.2, 0.3, 0.4), Held(np.zeros(4, np.int8)), axis=0)
    yield case("DequantizeLinear", Held(stored), Held(positive(4, 2)), axis=1, block_size=3, opset=21)
    yield case("DynamicQuantizeLinear", noise(4, 6), outputs=3)
    plain = DRAW.integers(0, 256, (3, 4)).astype(np.uint8)
    yield case("MatMulInteger", plain, Held(stored), number(7, np.uint8), number(2, np.int8))


def shaping() -> Iterator[Case]:
    yield case("Reshape", noise(2, 3, 4), ints(0, -1))
    yield case("Reshape", noise(2, 3, 4), ints(4, 0, 2))
    for axis in (0, 1, 2, 3, -1):
        yield case("Flatten", noise(2, 3, 4), axis=axis)
    yield case("Transpose", noise(2, 3, 4))
    yield case("Transpose", noise(2, 3, 4), perm=[2, 0, 1])
    yield case("Squeeze", noise(2, 1, 3, 1), ints(1, -1))
    yield case("Squeeze", noise(2, 1, 3, 1))
    yield case("Squeeze", noise(2, 1, 3), opset=11, axes=[1])
    yield case("Unsqueeze", noise(2, 3), ints(0, -1))
    yield case("Unsqueeze", noise(2, 3), opset=11, axes=[1])
    yield case("Expand", noise(3, 1), ints(2, 1, 4))
    yield case("Expand", noise(2, 3, 4), ints(1, 4))
    yield case("Tile", noise(2, 3), ints(2, 3))
    yield case("Concat", noise(2, 3), noise(2, 4), axis=-1)
    yield case("Split", noise(2, 7), ints(3, 4), outputs=2, axis=1)
    yield case("Split", noise(2, 7), outputs=3, axis=1, num_outputs=3)
    yield case("Split", noise(2, 6), outputs=3, axis=1, opset=11)
    yield case("Slice", noise(5, 6), ints(1, -4), ints(4, 2**63 - 1))
    yield case("Slice", noise(5, 6), ints(-1), ints(-(2**63)), ints(1), ints(-2))
    yield case("Slice", noise(5, 6), ints(4), ints(0), ints(0), ints(-1))
    yield case("Slice", noise(5, 6), ints(1), ints(100), ints(-1), ints(2))
    yield case("Slice", noise(5, 6), opset=9, starts=[1], ends=[-1], axes=[1])
    for mode in ("constant", "reflect", "edge", "wrap"):
        yield case("Pad", noise(*IMAGE), ints(0, 0, 1, 2, 0, 0, 3, 1), mode=mode)
        yield case("Pad", noise(3, 5), ints(1, 2, 0, 2), mode=mode)
    yield case("Pad", noise(3, 5), ints(1, 2), number(4.5), ints(1))
    yield case("Pad", noise(3, 5), ints(-1, 1, 1, -2))
    yield case("Pad", noise(3, 5), opset=10, pads=[1, 0, 0, 2], value=0.5)
    yield case("Gather", noise(5, 3), ints(0, -1, 2))
    yield case("Gather", noise(5, 3), number(-2, np.int64), axis=1)
    yield case("Gather", noise(5, 3), np.array([[0, -1], [2, 4]]), axis=0)
    yield case("Gather", Held(noise(9, 3)), np.array([[0, 8], [2, 4]]))
    yield case("GatherElements", noise(3, 4), np.array([[0, -1], [2, 1]]), axis=1)
    yield case("GatherND", noise(3, 4, 2), np.array([[0, 1], [-1, 2]]))
    yield case("GatherND", noise(3, 4, 2), np.array([[1], [0], [3]]), batch_dims=1)
    yield case("ScatterND", noise(4, 3), np.array([[0], [-1]]), noise(2, 3))
    yield case("ScatterND", noise(4, 3), np.array([[1, 1], [1, 1]]), noise(2), reduction="add")
    for reduction in ("none", "add", "mul", "max", "min"):
        yield case("ScatterElements", noise(3, 4), np.array([[0, -1]]), noise(1, 2), axis=1, reduction=reduction)
    yield case("OneHot", np.array([[0, -1], [2, 1]]), number(4, np.int64), floats(-1, 5), axis=1)
    yield case("EyeLike", noise(3, 5), k=1)
    yield case("Shape", noise(2, 3, 4), start=1)
    yield case("Size", noise(2, 3, 4))
    for mode in ("DCR", "CRD"):
        yield case("DepthToSpace", noise(2, 8, 3, 4), blocksize=2, mode=mode)
    yield case("SpaceToDepth", noise(2, 3, 4, 6), blocksize=2)
    yield case("ReverseSequence", noise(4, 3, 2), np.array([1, 4, 2]))


def resizing() -> Iterator[Case]:
    scales = (floats(1, 1, 2, 2), floats(1, 1, 0.5, 0.5), floats(1, 1, 1.3, 0.7))
    places = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners", "half_pixel_symmetric")
    for place in places:
        for factors in scales:
            for mode in ("nearest", "linear", "cubic"):
                how = {"mode": mode, "coordinate_transformation_mode": place}
                yield case("Resize", noise(1, 2, 8, 6), None, factors, **how)
        yield case("Resize", noise(1, 2, 8, 6), None, None, ints(1, 2, 5, 13), coordinate_transformation_mode=place)
    for mode in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
        how = {"nearest_mode": mode, "coordinate_transformation_mode": "asymmetric"}
        yield case("Resize", noise(1, 2, 8, 6), None, floats(1, 1, 1.5, 2.5), **how)
    yield case("Resize", noise(1, 2, 8, 6), None, floats(2, 0.5), axes=[2, 3], mode="linear")
    yield case("Resize", noise(1, 2, 8, 6), None, scales[2], mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5)
    for policy in ("not_larger", "not_smaller"):
        how = {"keep_aspect_ratio_policy": policy, "axes": [2, 3]}
        yield case("Resize", noise(1, 2, 8, 6), None, None, ints(12, 12), **how)
    yield case("Upsample", noise(1, 2, 4, 3), floats(1, 1, 2, 3), opset=9)


def moving(seed: int) -> Case:
    """A convolution or pool of a random size."""
    draw = np.random.default_rng(seed)
    axes = int(draw.integers(1, 4))
    kernel = draw.integers(1, 4, axes).tolist()
    how: dict[str, Any] = {
        "strides": draw.integers(1, 4, axes).tolist(),
        "dilations": draw.integers(1, 3, axes).tolist(),
    }
    op = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")[seed % 4]
    if draw.random() < 0.3 and op != "AveragePool":
        how["auto_pad"] = draw.choice(["SAME_UPPER", "SAME_LOWER", "VALID"]).item()
        how["dilations"] = [1] * axes  # onnxruntime refuses both for pools, and larger steps than its kernel
        how["strides"] = [min(pair) for pair in zip(how["strides"], kernel, strict=True)]
    else:
        how["pads"] = [int(draw.integers(0, k)) for k in kernel * 2]
    x = noise(2, 4, *draw.integers(7, 11, axes))
    if op.endswith("Pool"):
        how["kernel_shape"] = kernel
        how["ceil_mode"] = 0 if "auto_pad" in how else int(draw.integers(0, 2))
        if op == "AveragePool":
            how["count_include_pad"] = int(draw.integers(0, 2))
        return case(op, x, opset=20, **how)
    groups = int(draw.choice([1, 2, 4]))
    weights = (4, 4 // groups) if op == "Conv" else (4, 3)
    bias = None if draw.random() < 0.3 else Held(noise(4 if op == "Conv" else 3 * groups))
    if op == "ConvTranspose":
        how["output_padding"] = [int(draw.integers(0, s)) for s in how["strides"]]
    return case(op, x, Held(noise(*weights, *kernel)), bias, group=groups, **how)


CASES = [
    *elementwise(),
    *over_axes(),
    *products(),
    *normalisation(),
    *quantization(),
    *shaping(),
    *resizing(),
    *(moving(seed) for seed in range(120)),
    case("ConvTranspose", noise(1, 4, 5, 5), Held(noise(4, 2, 3, 3)), strides=[2, 2], output_shape=[10, 9]),
    case("ConvTranspose", noise(1, 4, 5, 5), Held(noise(4, 2, 3, 3)), strides=[3, 3], output_shape=[16, 17]),
]


@pytest.mark.parametrize("one", CASES, ids=str)
def test_an_operator_computes_what_onnxruntime_does(one: Case) -> None:
    given = {f"i{at}": value for at, value in enumerate(one.inputs) if isinstance(value, np.ndarray)}
    check_same(model_of(one), given)


# Whole networks


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks of nets.py as torch writes them, with a free first axis."""
    pytest.importorskip("onnxscript")
    import nets

    place = tmp_path_factory.mktemp("exported")
    batch = torch.export.Dim("batch", min=1, max=64)
    for name, given in GIVEN.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                getattr(nets, name)(),
                tuple(torch.from_numpy(one) for one in given.values()),
                dynamo=True,
                verbose=False,
                input_names=list(given),
                dynamic_shapes=tuple({0: batch} for _ in given),
                opset_version=OPSET,
            )
        program.save(place / f"{name}.onnx")
    return place


def ids(rows: int) -> dict[str, Array]:
    mask = np.ones((rows, 12), np.int64)
    mask[:, 8:] = 0
    return {"input_ids": DRAW.integers(1, 100, (rows, 12)), "attention_mask": mask}


GIVEN: dict[str, dict[str, Array]] = {
    "cnn": {"image": noise(2, 3, SIZE, SIZE)},
    "convs": {"image": noise(2, 3, SIZE, SIZE)},
    "encoder": ids(2),
    "normalised": {"image": noise(2, 3, SIZE, SIZE)},
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_network_gives_what_onnxruntime_gives_for_any_number_of_rows(name: str, exported: Path) -> None:
    path = exported / f"{name}.onnx"
    module, session = onnx_torch.module_of(onnx.load(path)), session_of(onnx.load(path))
    for rows in (1, 2, 7):
        given = {key: np.resize(value, (rows, *value.shape[1:])) for key, value in GIVEN[name].items()}
        np.testing.assert_allclose(answers(module, given)[0], session.run(None, given)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convs", "encoder"])
def test_torch_traces_it_with_a_free_first_axis(name: str, exported: Path) -> None:
    module = onnx_torch.module_of(onnx.load(exported / f"{name}.onnx"))
    given = tuple(torch.from_numpy(one) for one in GIVEN[name].values())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, given, dynamic_shapes=tuple({0: batch} for _ in given))
    assert list(program.graph_signature.user_inputs) == list(GIVEN[name])
    more = tuple(torch.cat([one, one, one]) for one in given)
    np.testing.assert_allclose(
        program.module()(*more).detach().numpy(),
        answers(module, {str(n): v.numpy() for n, v in enumerate(more)})[0],
        rtol=1e-4,
        atol=1e-5,
    )


def test_weights_and_nodes_keep_their_names(exported: Path) -> None:
    path = exported / "cnn.onnx"
    module = onnx_torch.module_of(onnx.load(path))
    file = onnx.load(path)
    held = {one.name: tuple(one.dims) for one in file.graph.initializer}
    assert "dw.weight" in held
    assert dict(module.named_parameters())["dw.weight"].shape == held["dw.weight"]
    assert {node.name for node in file.graph.node if node.op_type == "Conv"} <= set(dict(module.nodes.named_children()))


def test_a_traced_program_says_which_node_an_operator_is_of(exported: Path) -> None:
    module = onnx_torch.module_of(onnx.load(exported / "cnn.onnx"))
    program = torch.export.export(module, (torch.zeros(1, 3, SIZE, SIZE),))
    conv = next(node for node in program.graph.nodes if "conv2d" in str(node.target))
    first = next(node.name for node in onnx.load(exported / "cnn.onnx").graph.node if node.op_type == "Conv")
    assert any(path == f"nodes.{first}" for path, _ in conv.meta["nn_module_stack"].values())


def test_shapes_leave_nothing_in_the_traced_program(exported: Path) -> None:
    module = onnx_torch.module_of(onnx.load(exported / "encoder.onnx"))
    given = tuple(torch.from_numpy(one) for one in GIVEN["encoder"].values())
    program = torch.export.export(module, given)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not {name for name in names if "sym_size" in name or "_local_scalar" in name or ".item" in name}


def test_the_output_is_of_the_classes(exported: Path) -> None:
    (found,) = answers(onnx_torch.module_of(onnx.load(exported / "cnn.onnx")), GIVEN["cnn"])
    assert found.shape == (2, CLASSES)


# Graphs that torch.onnx does not write


def graph_model(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


def test_a_shape_computed_in_the_file_is_known_while_tracing() -> None:
    model = graph_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        net (float[batch, 3, 8] x) => (float[batch, a, b] y)
        <int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] minus = {-1}, int64[1] start = {0}>
        {
            shape = Shape (x)
            rows = Slice (shape, start, one)
            last = Slice (shape, two, three)
            half = Div (last, two)
            wanted = Concat <axis = 0> (rows, minus, half)
            y = Reshape (x, wanted)
        }
    """)
    check_same(model, {"x": noise(5, 3, 8)})
    module = onnx_torch.module_of(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (torch.zeros(2, 3, 8),), dynamic_shapes=({0: batch},))
    assert program.module()(torch.zeros(9, 3, 8)).shape == (9, 6, 4)


def test_a_branch_that_shapes_decide_is_taken() -> None:
    model = graph_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        net (float[n, 3] x) => (float[m, k] y)
        <int64 three = {3}, int64[1] axis = {1}>
        {
            shape = Shape <start = 1> (x)
            length = Squeeze (shape)
            narrow = Equal (length, three)
            y = If (narrow) <
                then_branch = yes () => (float[m, k] a) { a = Relu (x) },
                else_branch = no () => (float[m, k] b) { b = Neg (x) }
            >
        }
    """)
    check_same(model, {"x": noise(4, 3)})


def test_a_function_of_the_file_itself_is_opened() -> None:
    model = graph_model("""
        <ir_version: 9, opset_import: ["" : 18, "own" : 1]>
        net (float[n, 4] x) => (float[n, 4] y) { y = own.twice (x) }
        <domain: "own", opset_import: ["" : 18]>
        twice (a) => (b) { b = Add (a, a) }
    """)
    check_same(model, {"x": noise(2, 4)})


def test_what_follows_from_stored_numbers_alone_is_computed_once() -> None:
    model = graph_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        net (float[n, 4] x) => (float[n, 2] y)
        <int8[4, 2] w = {1, -2, 3, 4, -5, 6, 7, 8}, float s = {0.5}, int8 z = {1}>
        {
            full = DequantizeLinear (w, s, z)
            y = MatMul (x, full)
        }
    """)
    check_same(model, {"x": noise(2, 4)})
    module = onnx_torch.module_of(model)
    assert {name: tuple(one.shape) for name, one in module.named_parameters()} == {"full": (4, 2)}
    assert len(list(module.nodes.children())) == 1


# What cannot be


def refused(model: onnx.ModelProto, *given: Array) -> UnsupportedModel:
    with pytest.raises(UnsupportedModel) as caught:
        onnx_torch.module_of(model)(*(torch.from_numpy(one) for one in given))
    return caught.value


def test_all_unknown_operators_are_named_with_a_node() -> None:
    model = graph_model("""
        <ir_version: 9, opset_import: ["" : 18, "acme" : 1]>
        net (float[n, 4] x) => (float[n, 4] y)
        { a = acme.Foo (x)  b = acme.Foo (a)  c = Det (b)  y = Relu (c) }
    """)
    error = refused(model)
    assert "2 acme.Foo, 1 Det" in error.message
    assert error.hint is not None
    assert "--to onnx" in error.hint


def test_a_shape_that_depends_on_the_data_is_refused_with_its_node() -> None:
    model = graph_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        net (float[n, 4] x, int64[2] shape) => (float[a, b] y) { y = Reshape (x, shape) }
    """)
    error = refused(model, noise(2, 4), np.array([4, 2]))
    assert "Reshape" in error.message
    assert "depends on the data" in error.message


def test_a_condition_that_depends_on_the_data_is_refused() -> None:
    model = graph_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        net (float[n] x, bool which) => (float[m] y) {
            y = If (which) <
                then_branch = yes () => (float[m] a) { a = Relu (x) },
                else_branch = no () => (float[m] b) { b = Neg (x) }
            >
        }
    """)
    assert "depends on the data" in refused(model, noise(2), np.array(True)).message


def test_numbers_that_torch_has_not_are_refused() -> None:
    model = graph_model("""
        <ir_version: 10, opset_import: ["" : 21]>
        net (int4[n, 2] x, float scale) => (float[n, 2] y) { y = DequantizeLinear (x, scale) }
    """)
    assert "'x' is int4" in refused(model).message


@pytest.mark.parametrize(
    "one",
    [
        case("MaxPool", noise(1, 2, 6, 6), outputs=2, kernel_shape=[2, 2]),
        case("Resize", noise(1, 1, 4, 4), None, floats(1, 1, 0.5, 0.5), mode="linear", antialias=1),
        case("Attention", noise(1, 2, 3, 4), noise(1, 2, 3, 4), noise(1, 2, 3, 4), None, noise(1, 2, 2, 4),
             noise(1, 2, 2, 4), opset=23, outputs=3),
        case("Conv", noise(1, 1, 3, 3, 3, 3), Held(noise(1, 1, 1, 1, 1, 1))),
    ],
    ids=str,
)  # fmt: skip
def test_what_an_operator_cannot_do_here_is_refused_with_its_node(one: Case) -> None:
    given = [value for value in one.inputs if isinstance(value, np.ndarray)]
    assert "'the_node'" in refused(model_of(one), *given).message


def test_an_old_operator_set_is_refused() -> None:
    assert "operator set 6" in refused(model_of(case("Relu", noise(2), opset=6))).message
