"""Operators that compute numbers: element by element, over axes, products of matrices, normalisation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn import functional as F

from edgewise.export.sources.onnx_ops.node import Array, Node, Tensor, axes_of, constant, operator, whole

UNARY: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": torch.bitwise_not,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
BINARY: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}
MANY: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
}
FEW_BITS: Final = {21: (0, 15), 22: (-8, 7), 25: (0, 3), 26: (-2, 1)}  # by ONNX's number of the type
REDUCED: Final[dict[str, Callable[[Tensor, list[int], bool], Tensor]]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceProd": lambda x, axes, keep: _product(x, axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
}


def _enter() -> None:
    for name, one in UNARY.items():
        operator(name)(functools.partial(lambda one, node, x: one(x), one))
    for name, two in BINARY.items():
        operator(name)(functools.partial(lambda two, node, a, b: two(a, b), two))
    for name, many in MANY.items():
        operator(name)(functools.partial(lambda many, node, *values: functools.reduce(many, values), many))
    for name, reduced in REDUCED.items():
        operator(name, host=(1,))(functools.partial(_reduce, reduced))


# Element by element


@operator("Mean")
def _mean(node: Node, *values: Tensor) -> Tensor:
    return functools.reduce(torch.add, values) / len(values)


@operator("Div")
def _div(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Mod")
def _mod(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


@operator("Pow", either=(1,))
def _pow(node: Node, a: Tensor, b: Tensor | Array) -> Tensor:
    """A power that is one known number is kept as such: squares and roots have operators of their own everywhere."""
    if isinstance(b, torch.Tensor):
        return torch.pow(a, b).to(a.dtype)
    if b.size == 1:
        power = b.reshape(-1)[0].item()
        raised = torch.pow(a, int(power) if power == int(power) else power).to(a.dtype)
        return raised.reshape((1,) * max(b.ndim - a.ndim, 0) + tuple(raised.shape))
    return torch.pow(a, constant(b)).to(a.dtype)


@operator("LeakyRelu")
def _leaky_relu(node: Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.get("alpha", 0.01))


@operator("PRelu")
def _prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("Elu")
def _elu(node: Node, x: Tensor) -> Tensor:
    return F.elu(x, node.get("alpha", 1.0))


@operator("Celu")
def _celu(node: Node, x: Tensor) -> Tensor:
    return F.celu(x, node.get("alpha", 1.0))


@operator("Selu")
def _selu(node: Node, x: Tensor) -> Tensor:
    gamma: float = node.get("gamma", 1.0507009873554805)
    return gamma * F.elu(x, node.get("alpha", 1.6732632423543772))


@operator("ThresholdedRelu")
def _thresholded_relu(node: Node, x: Tensor) -> Tensor:
    return torch.where(x > node.get("alpha", 1.0), x, torch.zeros_like(x))


@operator("HardSigmoid")
def _hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    alpha: float = node.get("alpha", 0.2)
    beta: float = node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return (alpha * x + beta).clamp(0, 1)


@operator("Gelu")
def _gelu(node: Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


@operator("Swish")
def _swish(node: Node, x: Tensor) -> Tensor:
    alpha = node.get("alpha", 1.0)
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("Shrink")
def _shrink(node: Node, x: Tensor) -> Tensor:
    bias, limit = node.get("bias", 0.0), node.get("lambd", 0.5)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


@operator("IsInf")
def _is_inf(node: Node, x: Tensor) -> Tensor:
    found = torch.zeros_like(x, dtype=torch.bool)
    if node.get("detect_positive", 1):
        found = found | (x == math.inf)
    return found | (x == -math.inf) if node.get("detect_negative", 1) else found


@operator("Clip", either=(1, 2))
def _clip(node: Node, x: Tensor, low: Tensor | Array | None = None, high: Tensor | Array | None = None) -> Tensor:
    least, most = (_bound(node, name, value) for name, value in (("min", low), ("max", high)))
    if least is None and most is None:
        return x
    if isinstance(least, torch.Tensor) or isinstance(most, torch.Tensor):
        x = x if least is None else torch.maximum(x, torch.as_tensor(least, dtype=x.dtype))
        return x if most is None else torch.minimum(x, torch.as_tensor(most, dtype=x.dtype))
    if (least, most) == (0, 6):
        return F.relu6(x)  # fused with the convolution before it by more than one target
    return x.clamp(least, most)


def _bound(node: Node, name: str, value: Tensor | Array | None) -> Any:
    """Before operator set 11 bounds were attributes."""
    if value is None:
        return node.get(name)
    return value if isinstance(value, torch.Tensor) else value.reshape(-1)[0].item()


@operator("Where")
def _where(node: Node, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@operator("Cast")
def _cast(node: Node, x: Tensor) -> Tensor:
    if node.get("to") in FEW_BITS:
        raise node.refused("numbers of four bits and fewer cannot be computed in torch")
    return x.to(node.dtype(node.get("to")))


@operator("CastLike")
def _cast_like(node: Node, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@operator("Dropout", host=(1, 2))
def _dropout(node: Node, x: Tensor, ratio: Array | None = None, training: Array | None = None) -> Any:
    if training is not None and bool(training):
        raise node.refused("it is in training", hint="export the model after .eval()")
    return (x, torch.ones_like(x, dtype=torch.bool)) if node.outputs > 1 else x


# Over axes


def _reduce(reduced: Callable[..., Tensor], node: Node, x: Tensor, given: Array | None = None) -> Tensor:
    axes = axes_of(node, given)
    if not axes:
        if node.get("noop_with_empty_axes", 0):  # what is done before and after the sum is done all the same
            return reduced(x.unsqueeze(-1), [x.ndim], False).to(x.dtype)
        axes = list(range(x.ndim))
    if x.ndim == 0:
        return x
    return reduced(x, [axis % x.ndim for axis in axes], bool(node.get("keepdims", 1))).to(x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


@operator("ArgMax", "ArgMin")
def _arg(node: Node, x: Tensor) -> Tensor:
    axis: int = node.get("axis", 0)
    keep = bool(node.get("keepdims", 1))
    found = torch.argmax if node.op == "ArgMax" else torch.argmin
    if not node.get("select_last_index", 0):
        return found(x, axis, keepdim=keep)
    return x.shape[axis] - 1 - found(x.flip(axis), axis, keepdim=keep)


@operator("TopK", host=(1,))
def _top(node: Node, x: Tensor, k: Array | None = None) -> Any:
    count = node.get("k") if k is None else whole(k)[0]
    found = torch.topk(x, count, node.get("axis", -1), bool(node.get("largest", 1)), bool(node.get("sorted", 1)))
    return tuple(found)


@operator("CumSum", host=(1,))
def _cumulated(node: Node, x: Tensor, axis: Array) -> Tensor:
    along = whole(axis)[0]
    turned = x.flip(along) if node.get("reverse", 0) else x
    summed = torch.cumsum(turned, along, dtype=x.dtype)
    if node.get("exclusive", 0):
        summed = summed - turned
    return summed.flip(along) if node.get("reverse", 0) else summed


@operator("Softmax", "LogSoftmax")
def _softmax(node: Node, x: Tensor) -> Tensor:
    """Before operator set 13 all axes from `axis` on were taken together."""
    found = F.softmax if node.op == "Softmax" else F.log_softmax
    if node.version >= 13:
        return found(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.ndim
    return found(x.flatten(axis), axis).reshape(x.shape) if x.ndim - axis > 1 else found(x, axis)


# Products


@operator("MatMul")
def _matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operator("Gemm")
def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha: float = node.get("alpha", 1.0)
    beta: float = node.get("beta", 1.0)
    left = a.t() if node.get("transA", 0) else a
    if alpha == 1 and beta == 1 and (c is None or c.ndim == 1) and a.is_floating_point():
        return F.linear(left, b if node.get("transB", 0) else b.t(), c)
    product = alpha * torch.matmul(left, b.t() if node.get("transB", 0) else b)
    return (product if c is None else product + beta * c).to(a.dtype)


@operator("Einsum")
def _einsum(node: Node, *values: Tensor) -> Tensor:
    return torch.einsum(node.get("equation").replace(" ", ""), *values)


ATTENTION: Final = frozenset(
    {"is_causal", "kv_num_heads", "q_num_heads", "scale", "softcap", "softmax_precision", "qk_matmul_output_mode"}
)


@operator("Attention")
def _attention(
    node: Node,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *cache: Tensor | None,
) -> Tensor:
    unknown = set(node.attributes) - ATTENTION
    if any(one is not None for one in cache) or node.outputs > 1 or unknown:
        what = f"{', '.join(sorted(unknown))}" if unknown else "a cache of keys and values"
        raise node.refused(f"attention with {what} cannot be carried over")
    flat = query.ndim == 3
    heads, groups = node.get("q_num_heads"), node.get("kv_num_heads")
    q, k, v = (_heads(one, count) if flat else one for one, count in ((query, heads), (key, groups), (value, groups)))
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) if q.shape[1] != k.shape[1] else one for one in (k, v))
    bias = _bias(node, mask, q, k)
    if node.get("softcap", 0.0):
        out = _capped(node, q, k, v, bias)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=node.get("scale"))
    return out.transpose(1, 2).flatten(2) if flat else out


def _heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:-1], count, -1).transpose(1, 2)


def _bias(node: Node, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores, the causal mask in it."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    if not node.get("is_causal", 0):
        return mask
    later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    causal = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype).masked_fill(later, -math.inf)
    return causal if mask is None else mask + causal


def _capped(node: Node, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scale = node.get("scale") or 1 / math.sqrt(q.shape[-1])
    cap = node.get("softcap")
    scores = cap * torch.tanh(torch.matmul(q, k.transpose(-1, -2)) * scale / cap)
    return torch.matmul(F.softmax(scores if bias is None else scores + bias, -1), v)


# Normalisation


@operator("BatchNormalization")
def _batch_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.get("training_mode", 0):
        raise node.refused("it is in training", hint="export the model after .eval()")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = node.get("num_groups")
    if scale.shape[0] != x.shape[1]:  # before operator set 21 there was one number for each group
        scale, bias = (one.repeat_interleave(x.shape[1] // groups) for one in (scale, bias))
    return F.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    axis = node.get("axis", -1) % x.ndim
    epsilon = node.get("epsilon", 1e-5)
    if scale.shape == x.shape[axis:] and (bias is None or bias.shape == scale.shape):
        out = F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)
    else:
        out = F.layer_norm(x, x.shape[axis:], eps=epsilon) * scale + (0 if bias is None else bias)
    if node.outputs == 1:
        return out
    axes = list(range(axis, x.ndim))
    mean = x.mean(axes, keepdim=True)
    return out, mean, torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)


@operator("RMSNormalization")
def _rms_norm(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    axes = list(range(node.get("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + node.get("epsilon", 1e-5)) * scale


@operator("LpNormalization")
def _lp_norm(node: Node, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, node.get("p", 2), node.get("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("MeanVarianceNormalization")
def _mean_variance_norm(node: Node, x: Tensor) -> Tensor:
    axes = list(node.get("axes", (0, 2, 3)))
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / ((x.square().mean(axes, keepdim=True) - mean.square()).sqrt() + 1e-9)


@operator("LRN")
def _local_response_norm(node: Node, x: Tensor) -> Tensor:
    size: int = node.get("size")
    bias: float = node.get("bias", 1.0)
    each: float = node.get("alpha", 1e-4) / size
    beta: float = node.get("beta", 0.75)
    around = F.pad(x.square(), (0, 0) * (x.ndim - 2) + ((size - 1) // 2, size // 2))
    summed = sum(around[:, at : at + x.shape[1]] for at in range(size))
    return x / (bias + each * summed) ** beta


# Quantization, each number computed as the file says


@operator("QuantizeLinear")
def _quantize(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    if node.get("block_size", 0):
        raise node.refused("activations that are quantized by blocks cannot be carried over")
    number = node.get("output_dtype", 0)
    kind = node.dtype(number) if number else torch.uint8 if zero is None else zero.dtype
    if kind.is_floating_point or kind not in (torch.int8, torch.uint8, torch.int16, torch.uint16):
        raise node.refused(f"torch cannot quantize to {kind}")
    low, high = FEW_BITS.get(number, (torch.iinfo(kind).min, torch.iinfo(kind).max))
    shape = _along(node, x, scale)
    whole_numbers = torch.round(x / scale.reshape(shape))
    moved = whole_numbers if zero is None else whole_numbers + zero.reshape(shape).to(x.dtype)
    return moved.clamp(low, high).to(kind)


@operator("DequantizeLinear")
def _dequantize(node: Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    block = node.get("block_size", 0)
    if block:
        scale, zero = _spread(node, x, scale), None if zero is None else _spread(node, x, zero)
    shape = scale.shape if block else _along(node, x, scale)
    moved = x.to(scale.dtype) if zero is None else x.to(scale.dtype) - zero.reshape(shape).to(scale.dtype)
    return moved * scale.reshape(shape)


def _spread(node: Node, x: Tensor, blocks: Tensor) -> Tensor:
    """One number for each block, as one for each number."""
    axis: int = node.get("axis", 1)
    return blocks.repeat_interleave(node.get("block_size"), axis).narrow(axis, 0, x.shape[axis])


def _along(node: Node, x: Tensor, scale: Tensor) -> list[int]:
    """Where a scale for each channel stands beside x."""
    if scale.numel() == 1:
        return [1] * min(x.ndim, 1) if scale.ndim else []
    shape = [1] * x.ndim
    shape[node.get("axis", 1)] = -1
    return shape


@operator("DynamicQuantizeLinear")
def _dynamic_quantize(node: Node, x: Tensor) -> Any:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale).clamp(0, 255)
    return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


@operator("MatMulInteger")
def _matmul_integer(node: Node, a: Tensor, b: Tensor, za: Tensor | None = None, zb: Tensor | None = None) -> Tensor:
    """In float64, which holds these sums exactly."""
    left = a.double() if za is None else a.double() - (za.double()[..., None] if za.ndim == 1 else za.double())
    right = b.double() if zb is None else b.double() - zb.double()
    return torch.matmul(left, right).to(torch.int32)


_enter()
