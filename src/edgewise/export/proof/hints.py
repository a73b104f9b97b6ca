"""What is known to go wrong on each target, and the way out: for operators that fall back, and for a whole artifact.

A target's own file says why an operator fell back, as it has seen it; where it knows no way out, `with_hints` looks
here. `for_artifact` is for what no tool complains about and users find out on the device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from edgewise.export.work.job import PRECISIONS, Coverage, Fallback, Precision, Tensor

OUTSIDE: Final = "compute it outside of the network"
WHOLE: Final = "give the network int32 indices, or compute them outside of it"
ALL: Final[tuple[Precision, ...]] = PRECISIONS
WHOLE_8: Final[tuple[Precision, ...]] = ("int8", "int8-dynamic")


@dataclass(frozen=True, slots=True)
class Way:
    """Out of a fallback: for any of `ops`, in any of `precisions`. Names as in any format, see `_plain`."""

    target: str
    ops: str  # words
    hint: str
    precisions: tuple[Precision, ...] = ALL


# The first one that fits is told.
WAYS: Final = (
    Way(
        "litert",
        "DEPTHWISE_CONV_2D",
        "XNNPACK takes depthwise convolutions in static int8: give --calibration and take int8, or fp16",
        ("int8-dynamic",),
    ),
    Way("litert", "DEPTHWISE_CONV_2D CONV_2D", "XNNPACK has 4-bit kernels for linear layers: take int8", ("int4",)),
    Way("litert", "SOFTMAX", "end the network with its logits: their order is that of the probabilities", ("int8",)),
    Way("litert", "TRANSPOSE", "give and take images channels last: --option layout=nhwc"),
    Way("litert", "TOPK_V2 STABLEHLO_SORT ARG_MAX ARG_MIN UNIQUE", "end the network with its logits, and sort outside"),
    Way("litert", "CUMSUM STABLEHLO_CUMSUM", "multiply by a triangular matrix of ones"),
    Way("litert", "SIGN", "compare with zero and select"),
    Way("litert", "WHILE IF STABLEHLO_WHILE", "unroll the loop: export with a fixed number of steps"),
    Way("litert", "CAST GATHER GATHER_ND EMBEDDING_LOOKUP SCATTER_ND ONE_HOT RANGE", WHOLE),
    Way("litert", "RESIZE_NEAREST_NEIGHBOR", "upsample bilinearly, or by a transposed convolution"),
    Way("coreml", "constexpr_blockwise_shift_scale", "--option palettize=4 instead of blocks", ("int4",)),
    Way("coreml", "gather gather_along_axis gather_nd scatter scatter_nd one_hot", WHOLE),
    Way(
        "coreml",
        "topk argsort non_zero reduce_argmax reduce_argmin",
        "end the network with its logits, and sort outside",
    ),
    Way("coreml", "while_loop cond", "unroll the loop, or let it compute both and choose with torch.where"),
    Way("coreml", "cumsum", "multiply by a triangular matrix of ones"),
    Way("tensorrt", "NonZero Unique Compress", "its result has no fixed shape: multiply by a mask instead"),
    Way("tensorrt", "If Loop Scan", "unroll the loop, or let it compute both and choose with torch.where"),
    Way(
        "tensorrt",
        "LayerNormalization RMSNormalization Softmax LogSoftmax Exp Pow ReduceSum ReduceMean",
        "it stays in float32 on purpose: half precision overflows there",
        ("fp16", "int8"),
    ),
    Way(
        "qnn",
        "NonZero Unique Compress Where",
        "its result has no fixed shape or is of bool: multiply by a mask instead",
    ),
    Way("qnn", "If Loop Scan", "unroll the loop, or let it compute both and choose with torch.where"),
    Way("qnn", "Gather GatherND OneHot Cast", WHOLE),
    Way("qnn", "Shrink Sign Mod BitShift Det Einsum CumSum", "write it with Mul, Add, MatMul and Clip"),
    Way("onnx", "Softmax Sigmoid LayerNormalization Gelu Erf", "it costs little in float32", WHOLE_8),
)


@dataclass(frozen=True, slots=True)
class Lint:
    """Of a whole artifact. `when` names a sign of `_signs`, `ops` what must be in it if anything must."""

    target: str
    when: str
    hint: str
    precisions: tuple[Precision, ...] = ALL
    ops: str = ""


LINTS: Final = (
    Lint(
        "litert",
        "free axes",
        "inputs of free length: after resize_tensor_input a delegate is applied anew, and some give up; export the "
        "lengths that you need as files of their own",
    ),
    Lint("litert", "int64", "int64 inputs: delegates take int32, and GPU and NPU refuse the graph from there on"),
    Lint(
        "litert",
        "turned",
        "the graph turns NCHW tensors into NHWC ones: --option layout=nhwc saves these copies",
    ),
    Lint(
        "coreml",
        "always",
        "Core ML computes in half precision here: differences about 1e-2 are its own; hold it against :fp32",
        ("fp16",),
    ),
    Lint("coreml", "always", "weights alone are int8: this saves memory on the Neural Engine, not time", ("int8",)),
    Lint(
        "coreml",
        "always",
        "4-bit weights save memory, not time, and blocks of them keep off the Neural Engine: take --option palettize=4",
        ("int4",),
    ),
    Lint("coreml", "free axes", "inputs of free length run on CPU or GPU: the Neural Engine wants fixed shapes"),
    Lint("coreml", "int64", "int64 inputs become int32: hand them over as that"),
    Lint("coreml", "many axes", "tensors of more than five axes keep off the Neural Engine"),
    Lint(
        "tensorrt",
        "has",
        "norms and softmax can overflow half precision: they are kept in float32, keep them so",
        ("fp16", "int8"),
        "LayerNormalization RMSNormalization Softmax LogSoftmax",
    ),
    Lint("tensorrt", "int64", "int64 inputs: cast them to int32 before the network, which runs faster there"),
    Lint("tensorrt", "free axes", "inputs of free length need an optimization profile with the lengths that you use"),
    Lint(
        "tensorrt",
        "always",
        "TensorRT 11 has no calibrators and no precision flags: the precision is what the graph's Q/DQ nodes say",
        ("int8",),
    ),
    Lint("qnn", "free axes", "Hexagon takes no free lengths: one number of rows and one length per context binary"),
    Lint("qnn", "int64", "int64 inputs: Hexagon takes int32, so the first cast runs on the CPU"),
    Lint(
        "onnx",
        "always",
        "integer kernels of x86 processors without VNNI can saturate: judge it on the processor it is for",
        WHOLE_8,
    ),
)
MOST_AXES: Final = 5


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of an artifact: its `inputs` as they were exported, the rows' axis first, and names of operators
    anywhere in it, as far as they were listed."""

    target: str
    precision: Precision
    inputs: tuple[Tensor, ...] = ()
    operators: tuple[str, ...] = ()


def with_hints(target: str, precision: Precision, coverage: Coverage) -> Coverage:
    """The same, with a way out for each operator that had none and has one here."""
    return replace(coverage, fallback=tuple(_hinted(target, precision, one) for one in coverage.fallback))


def for_artifact(seen: Seen) -> tuple[str, ...]:
    """What to know about it, most important first."""
    signs = set(_signs(seen))
    return tuple(
        lint.hint
        for lint in LINTS
        if lint.target == seen.target and seen.precision in lint.precisions and lint.when in signs
        if not lint.ops or _any(lint.ops, seen.operators)
    )


def _hinted(target: str, precision: Precision, one: Fallback) -> Fallback:
    if one.hint is not None:
        return one
    fitting = (way for way in WAYS if way.target == target and precision in way.precisions and _any(way.ops, (one.op,)))
    found = next(fitting, None)
    return one if found is None else replace(one, hint=found.hint)


def _signs(seen: Seen) -> Iterator[str]:
    yield "always"
    yield "has"
    if any(None in one.shape[1:] for one in seen.inputs):
        yield "free axes"
    if any(one.dtype == "int64" for one in seen.inputs):
        yield "int64"
    if any(len(one.shape) > MOST_AXES for one in seen.inputs):
        yield "many axes"
    if _any("TRANSPOSE", seen.operators) and any(len(one.shape) == 4 for one in seen.inputs):
        yield "turned"


def _any(ops: str, there: Collection[str] | Sequence[str]) -> bool:
    return not {_plain(one) for one in ops.split()}.isdisjoint(map(_plain, there))


def _plain(op: str) -> str:
    """DEPTHWISE_CONV_2D, DepthwiseConv2D and ios17.depthwise_conv_2d are one operator."""
    return op.rpartition(".")[2].replace("_", "").lower()
