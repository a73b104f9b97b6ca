"""Our reading of MIL's operators: against torch where it has the same, else against the numbers of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from edgewise.errors import SourceError, UnsupportedModel  # noqa: E402
from edgewise.export.targets.coreml.mil import Interpreter, unknown_ops  # noqa: E402
from edgewise.export.targets.coreml.weights import Const, Function, Kind, Op, unpacked  # noqa: E402

Array = npt.NDArray[Any]
DRAW = np.random.default_rng(11)


def noise(*shape: int) -> Array:
    return DRAW.standard_normal(shape).astype(np.float32)


def kind(value: Any, dtype: str = "") -> Kind:
    if isinstance(value, str):
        return Kind("string", ())
    return Kind(dtype or str(value.dtype), tuple(value.shape))


def program(op: str, outputs: list[Kind], opset: str = "CoreML7", **given: Any) -> Function:
    """One operator; every parameter is a constant, lists of arrays are several values."""
    consts, inputs = {}, {}
    for name, value in given.items():
        parts = value if isinstance(value, list) else [value]
        parts = [one if isinstance(one, str) else np.asarray(one) for one in parts]
        parts = [one.astype(np.int32) if not isinstance(one, str) and one.dtype == np.int64 else one for one in parts]
        names = tuple(f"{name} {n}" for n in range(len(parts)))
        consts.update({key: Const(key, kind(one), one) for key, one in zip(names, parts, strict=True)})
        inputs[name] = names
    made = tuple((f"out {n}", one) for n, one in enumerate(outputs))
    return Function("main", opset, {}, tuple(name for name, _ in made), (Op(op, op, inputs, made),), consts, {})


def free(rank: int, dtype: str = "float32") -> Kind:
    return Kind(dtype, (None,) * rank)


def compute(op: str, rank: int, gives: str = "float32", **given: Any) -> Array:
    return Interpreter(program(op, [free(rank, gives)], **given)).run({})[0]


def t(value: Array) -> Any:
    return torch.from_numpy(np.array(value))


X, SMALL = noise(2, 4, 9, 7), noise(2, 4, 5, 5)
W, UP = noise(6, 2, 3, 3), noise(4, 3, 3, 3)
LIKE_TORCH: dict[str, tuple[Callable[[], Array], Callable[[], Any]]] = {
    "conv, uneven custom padding, groups, strides, dilations": (
        lambda: compute(
            "conv", 4, x=X, weight=W, bias=np.arange(6, dtype=np.float32), strides=np.array([2, 1]), groups=np.array(2),
            dilations=np.array([1, 2]), pad_type="custom", pad=np.array([0, 1, 2, 3]),
        ),
        lambda: F.conv2d(F.pad(t(X), (2, 3, 0, 1)), t(W), torch.arange(6.0), (2, 1), 0, (1, 2), 2),
    ),
    "conv, same padding puts the odd one last": (
        lambda: compute("conv", 4, x=X[:, :2], weight=W, strides=np.array([2, 2]), pad_type="same"),
        lambda: F.conv2d(F.pad(t(X[:, :2]), (1, 1, 1, 1)), t(W), None, 2),
    ),
    "conv of one axis": (
        lambda: compute("conv", 3, x=X[:, :, 0], weight=W[:, :, 0], groups=np.array(2)),
        lambda: F.conv1d(t(X[:, :, 0]), t(W[:, :, 0]), groups=2),
    ),
    "conv_transpose, uneven padding": (
        lambda: compute(
            "conv_transpose", 4, x=SMALL, weight=UP, strides=np.array([2, 2]), pad_type="custom",
            pad=np.array([1, 0, 0, 1]),
        ),
        lambda: F.conv_transpose2d(t(SMALL), t(UP), stride=2)[:, :, 1:, :-1],
    ),
    "conv_transpose with an output padding": (
        lambda: compute(
            "conv_transpose", 4, x=SMALL, weight=UP, strides=np.array([2, 2]), pad_type="custom",
            pad=np.array([1, 1, 1, 1]), output_shape=np.array([2, 3, 10, 10]), bias=np.ones(3, np.float32),
        ),
        lambda: F.conv_transpose2d(t(SMALL), t(UP), torch.ones(3), 2, 1, 1),
    ),
    "max_pool": (
        lambda: compute(
            "max_pool", 4, x=X, kernel_sizes=np.array([3, 2]), strides=np.array([2, 2]), pad_type="custom",
            pad=np.array([1, 1, 0, 0]), ceil_mode=np.array(True),
        ),
        lambda: F.max_pool2d(t(X), (3, 2), 2, (1, 0), ceil_mode=True),
    ),
    "avg_pool counts the padding": (
        lambda: compute("avg_pool", 4, x=X, kernel_sizes=np.array([3, 3]), pad_type="custom", pad=np.array([1] * 4)),
        lambda: F.avg_pool2d(t(X), 3, 1, 1),
    ),
    "avg_pool without the padding": (
        lambda: compute(
            "avg_pool", 4, x=X, kernel_sizes=np.array([3, 3]), pad_type="custom", pad=np.array([1] * 4),
            exclude_padding_from_average=np.array(True),
        ),
        lambda: F.avg_pool2d(t(X), 3, 1, 1, count_include_pad=False),
    ),
    "linear": (
        lambda: compute("linear", 4, x=X, weight=noise(3, 7) * 0 + 2, bias=np.ones(3, np.float32)),
        lambda: F.linear(t(X), torch.full((3, 7), 2.0), torch.ones(3)),
    ),
    "matmul, both turned": (
        lambda: compute("matmul", 3, x=X[:, 0], y=SMALL[:, 0][:, :, [0] * 9], transpose_x=True, transpose_y=True),
        lambda: t(X[:, 0]).mT @ t(SMALL[:, 0][:, :, [0] * 9]).mT,
    ),
    "einsum": (
        lambda: compute("einsum", 4, values=[X, SMALL[:, :, :, :]], equation="nchw,nkij->ckhi"),
        lambda: torch.einsum("nchw,nkij->ckhi", t(X), t(SMALL)),
    ),
    "batch_norm": (
        lambda: compute(
            "batch_norm", 4, x=X, mean=np.arange(4.0), variance=np.arange(1.0, 5), gamma=np.arange(4.0), epsilon=1e-3,
            beta=np.ones(4),
        ),
        lambda: F.batch_norm(
            t(X), torch.arange(4.0), torch.arange(1.0, 5), torch.arange(4.0), torch.ones(4), eps=1e-3
        ),
    ),
    "instance_norm": (
        lambda: compute("instance_norm", 4, x=X, gamma=np.arange(4.0), beta=np.ones(4)),
        lambda: F.instance_norm(t(X), weight=torch.arange(4.0), bias=torch.ones(4)),
    ),
    "layer_norm of two axes": (
        lambda: compute("layer_norm", 4, x=X, axes=np.array([-1, 2]), gamma=SMALL[0, 0, 0, 0] * np.ones((9, 7))),
        lambda: F.layer_norm(t(X), (9, 7), float(SMALL[0, 0, 0, 0]) * torch.ones(9, 7)),
    ),
    "local_response_norm": (
        lambda: compute("local_response_norm", 4, x=X, size=np.array(3), alpha=0.5, beta=0.6, k=2.0),
        lambda: F.local_response_norm(t(X), 3, 0.5, 0.6, 2.0),
    ),
    "softmax": (lambda: compute("softmax", 4, x=X, axis=np.array(1)), lambda: t(X).softmax(1)),
    "gelu by tanh": (
        lambda: compute("gelu", 4, x=X, mode="TANH_APPROXIMATION"),
        lambda: F.gelu(t(X), approximate="tanh"),
    ),
    "prelu": (lambda: compute("prelu", 4, x=X, alpha=np.arange(4.0)), lambda: F.prelu(t(X), torch.arange(4.0))),
    "hard swish's parts": (
        lambda: compute("sigmoid_hard", 4, x=X, alpha=1 / 6, beta=0.5),
        lambda: F.hardsigmoid(t(X)),
    ),
    "attention with a mask of booleans": (
        lambda: compute(
            "scaled_dot_product_attention", 3, query=X[:, 0], key=X[:, 1], value=X[:, 2],
            attn_mask=np.tri(9, dtype=bool),
        ),
        lambda: F.scaled_dot_product_attention(t(X[:, 0]), t(X[:, 1]), t(X[:, 2]), is_causal=True),
    ),
    "reduce_log_sum_exp": (
        lambda: compute("reduce_log_sum_exp", 2, x=X, axes=np.array([1, 3])),
        lambda: t(X).logsumexp((1, 3)),
    ),
    "reduce_prod over all axes": (
        lambda: compute("reduce_prod", 0, x=SMALL[0, 0]),
        lambda: t(SMALL[0, 0]).prod(),
    ),
    "reduce_argmin": (
        lambda: compute("reduce_argmin", 3, "int32", x=X, axis=np.array(1)),
        lambda: t(X).argmin(1).int(),
    ),
    "pad reflects": (
        lambda: compute("pad", 4, x=X, pad=np.array([1, 2, 3, 0]), mode="reflect"),
        lambda: F.pad(t(X), (3, 0, 1, 2), "reflect"),
    ),
    "pad repeats": (
        lambda: compute("pad", 4, x=X, pad=np.array([1, 2, 3, 0]), mode="replicate"),
        lambda: F.pad(t(X), (3, 0, 1, 2), "replicate"),
    ),
    "pixel_shuffle": (
        lambda: compute("pixel_shuffle", 4, x=X, upscale_factor=np.array(2)),
        lambda: F.pixel_shuffle(t(X), 2),
    ),
    "upsample_bilinear": (
        lambda: compute(
            "upsample_bilinear", 4, x=X, scale_factor_height=2.0, scale_factor_width=3.0, align_corners=np.array(False)
        ),
        lambda: F.interpolate(t(X), scale_factor=(2, 3), mode="bilinear"),
    ),
    "resize_nearest_neighbor": (
        lambda: compute(
            "resize_nearest_neighbor", 4, x=X, target_size_height=np.array(5), target_size_width=np.array(11)
        ),
        lambda: F.interpolate(t(X), (5, 11), mode="nearest"),
    ),
    "gather_along_axis": (
        lambda: compute("gather_along_axis", 4, x=X, indices=np.ones((2, 4, 2, 7), np.int32), axis=np.array(2)),
        lambda: t(X).gather(2, torch.ones(2, 4, 2, 7, dtype=torch.long)),
    ),
    "gather inside rows": (
        lambda: compute("gather", 3, x=X[:, :, :, 0], indices=np.array([[3, 0], [1, 1]]), axis=np.array(1),
                        batch_dims=np.array(1)),
        lambda: torch.stack([t(X[0, :, :, 0])[[3, 0]], t(X[1, :, :, 0])[[1, 1]]]),
    ),
    "gather_nd": (
        lambda: compute("gather_nd", 3, x=X, indices=np.array([[0, 1], [1, 3]])),
        lambda: t(X)[[0, 1], [1, 3]],
    ),
    "scatter_nd": (
        lambda: compute("scatter_nd", 2, data=SMALL[0, 0], indices=np.array([[1], [1]]), updates=np.ones((2, 5))),
        lambda: t(SMALL[0, 0]) + torch.tensor([0.0, 2, 0, 0, 0])[:, None],
    ),
    "slice_by_index, backwards and with masks": (
        lambda: compute(
            "slice_by_index", 3, x=X, begin=np.array([1, -1, 2, 0]), end=np.array([0, 0, 0, 5]),
            stride=np.array([1, -1, 3, 2]), end_mask=np.array([False, True, True, False]),
            squeeze_mask=np.array([True, False, False, False]),
        ),
        lambda: t(X)[1].flip(0)[:, 2::3, :5:2],
    ),
    "slice_update": (
        lambda: compute(
            "slice_update", 4, x=X, update=np.zeros((2, 4, 3, 7), np.float32), begin=np.array([0, 0, 2, 0]),
            end=np.array([2, 4, 5, 7]),
        ),
        lambda: torch.cat([t(X)[:, :, :2], torch.zeros(2, 4, 3, 7), t(X)[:, :, 5:]], 2),
    ),
    "cumsum, backwards, without itself": (
        lambda: compute("cumsum", 4, x=X, axis=np.array(3), reverse=True, exclusive=True),
        lambda: t(X).flip(3).cumsum(3).flip(3) - t(X),
    ),
    "band_part": (
        lambda: compute("band_part", 2, x=SMALL[0, 0], lower=np.array(1), upper=np.array(2)),
        lambda: t(SMALL[0, 0]).tril(2).triu(-1),
    ),
    "one_hot": (
        lambda: compute("one_hot", 2, indices=np.array([2, 0]), one_hot_vector_size=np.array(4), on_value=3.0),
        lambda: 3.0 * F.one_hot(torch.tensor([2, 0]), 4),
    ),
    "mod keeps the divisor's sign": (
        lambda: compute("mod", 1, x=np.array([-3.0, 3.0]), y=np.array([2.0, -2.0])),
        lambda: torch.tensor([1.0, -1.0]),
    ),
    "rsqrt adds its epsilon": (
        lambda: compute("rsqrt", 1, x=np.array([3.0]), epsilon=1.0),
        lambda: torch.tensor([0.5]),
    ),
    "topk": (lambda: compute("topk", 4, x=X, k=np.array(3)), lambda: t(X).topk(3).values),
}  # fmt: skip


@pytest.mark.parametrize("case", LIKE_TORCH)
def test_as_torch_computes_it(case: str) -> None:
    ours, theirs = LIKE_TORCH[case]
    expected = theirs()
    found = ours()
    assert found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("UNALIGN_CORNERS", [0.0, 0.1, 0.5, 0.9, 1.0]),
        ("ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ("DEFAULT", [0.0, 0.4, 0.8, 1.0, 1.0]),
        ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]),
    ],
)
def test_bilinear_reads_where_the_reference_says(mode: str, expected: list[float]) -> None:
    x = np.array([[[[0.0, 1.0]]]], np.float32)
    sizes = {"target_size_height": np.array(1), "target_size_width": np.array(5)}
    np.testing.assert_allclose(
        compute("resize_bilinear", 4, x=x, sampling_mode=mode, **sizes)[0, 0, 0], expected, atol=1e-6
    )


def test_reshape_counts_zeros_from_the_right() -> None:
    assert compute("reshape", 4, x=noise(2, 50), shape=np.array([1, 0, -1, 0])).shape == (1, 1, 2, 50)


def test_depth_to_space_takes_the_block_from_the_outer_channels() -> None:
    x = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1)
    found = compute("depth_to_space", 4, x=x, block_size=np.array(2))
    np.testing.assert_array_equal(found[0], [[[0, 2], [4, 6]], [[1, 3], [5, 7]]])
    np.testing.assert_array_equal(compute("space_to_depth", 4, x=found, block_size=np.array(2)), x)


def test_concat_interleaves() -> None:
    values = [np.array([[1.0, 2], [3, 4]]), np.array([[5.0, 6], [7, 8]])]
    found = compute("concat", 2, values=values, axis=np.array(0), interleave=True)
    np.testing.assert_array_equal(found, [[1, 2], [5, 6], [3, 4], [7, 8]])


def test_split_gives_several_values() -> None:
    function = program("split", [free(2), free(2)], x=SMALL[0, 0], split_sizes=np.array([2, 3]), axis=np.array(0))
    first, second = Interpreter(function).run({})
    np.testing.assert_array_equal(np.concatenate([first, second]), SMALL[0, 0])


def test_half_precision_rounds_every_result_and_overflows() -> None:
    x = np.array([300.0, 1.0, 1 / 3], np.float32)
    found = compute("mul", 1, "float16", x=x, y=np.array([300.0, 2049.0, 1.0]))
    assert found[0] == np.inf
    assert found[1] == 2048
    assert found[2] == np.float32(np.float16(1 / 3))


def test_casting_to_whole_numbers_cuts_off() -> None:
    found = compute("cast", 1, "int32", x=np.array([-1.7, 1.7, 1e30], np.float32), dtype="int32")
    np.testing.assert_array_equal(found, [-1, 1, 2**31 - 1])


def test_quantized_values_are_clipped() -> None:
    x = np.array([0.0, 0.26, 100.0, -100.0], np.float32)
    found = compute("quantize", 1, "int8", input=x, scale=np.array(0.1), output_dtype="int8")
    np.testing.assert_array_equal(found, [0, 3, 127, -128])


def test_an_index_outside_is_refused_where_the_reference_refuses_it() -> None:
    given = {"x": SMALL[0, 0], "indices": np.array([-1])}
    with pytest.raises(SourceError, match=r"index -1.*0 to 5"):
        compute("gather", 2, **given)
    before = Interpreter(program("gather", [free(2)], opset="CoreML6", **given)).run({})[0]
    np.testing.assert_array_equal(before[0], SMALL[0, 0, -1])


def test_an_unknown_operator_is_named() -> None:
    function = program("lstm", [free(2)], x=SMALL[0, 0])
    assert unknown_ops(function) == {"lstm"}
    with pytest.raises(UnsupportedModel, match="lstm"):
        Interpreter(function)


def test_a_shape_that_the_program_does_not_declare_is_refused() -> None:
    function = program("relu", [Kind("float32", (5, 4))], x=SMALL[0, 0])
    with pytest.raises(SourceError, match=r"gives \[5, 5\].*declares \[5, 4\]"):
        Interpreter(function).run({})


def test_states_are_read_written_and_kept_between_calls() -> None:
    inputs = {"cache": Kind("float16", (2,), state=True), "x": Kind("float16", (2,))}
    out = Kind("float16", (2,))
    ops = (
        Op("read_state", "read", {"input": ("cache",)}, (("had", out),)),
        Op("add", "add", {"x": ("had",), "y": ("x",)}, (("sum", out),)),
        Op("write_state", "write", {"input": ("cache",), "data": ("sum",)}, ()),
    )
    machine = Interpreter(Function("main", "CoreML8", inputs, ("sum",), ops, {}, {}))
    state = machine.new_state()
    for step in (1, 2):
        found = machine.run({"x": np.array([1.0, 2.0], np.float32)}, state)[0]
        np.testing.assert_array_equal(found, [step, 2 * step])
    np.testing.assert_array_equal(machine.run({"x": np.zeros(2, np.float32)})[0], [0, 0])


def test_a_watch_sees_every_value() -> None:
    seen: dict[str, Any] = {}
    machine = Interpreter(program("relu", [free(2)], x=SMALL[0, 0]))
    machine.run({}, watch=lambda op, name, value: seen.update({f"{op.type} {name}": tuple(value.shape)}))
    assert seen == {"relu out 0": (5, 5)}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_packed_numbers_begin_at_the_lowest_bit(bits: int) -> None:
    numbers = DRAW.integers(0, 1 << bits, 21)
    whole = sum(int(one) << (bits * at) for at, one in enumerate(numbers))
    data = np.frombuffer(whole.to_bytes(-(-21 * bits // 8), "little"), np.uint8)
    np.testing.assert_array_equal(unpacked(data, bits, 21), numbers)
