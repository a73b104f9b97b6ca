"""MIL operators that compute numbers: activations, arithmetic, convolutions, products, norms, sums. See mil.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn import functional as F

from edgewise.export.targets.coreml.mil_call import Call, T, torch_padding

# One value in


def _one(made: Callable[[T], T]) -> Callable[[Call], T]:
    return lambda call: made(call.x)


def _gelu(call: Call) -> T:
    mode = call.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return call.x * torch.sigmoid(1.702 * call.x)
    return F.gelu(call.x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def _per_channel(call: Call, name: str) -> T:
    """A parameter with a value for each channel, the second axis."""
    given = call.tensor(name)
    return given.reshape(-1, *[1] * (call.x.ndim - 2)) if given.numel() > 1 else given


def _clamped_relu(call: Call) -> T:
    x = call.x
    return torch.where(x >= 0, x, call.float("alpha") * x).clamp(max=call.float("beta"))


# Two values in


def _two(made: Callable[[T, T], T]) -> Callable[[Call], T]:
    return lambda call: made(call.x, call.tensor("y"))


def _divided(x: T, y: T) -> T:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _select(call: Call) -> T:
    return torch.where(call.tensor("cond").bool(), call.tensor("a"), call.tensor("b"))


# Convolution and pooling


def _padding(call: Call, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Before and after each spatial axis, in their order."""
    kind = call.text("pad_type", "valid").lower()
    if kind == "valid":
        return [0] * 2 * len(kernel)
    if kind == "custom":
        return call.ints("pad", [0] * 2 * len(kernel))
    found = []
    for size, k, s, d in zip(call.x.shape[2:], kernel, strides, dilations, strict=True):
        total = max(0, s * math.ceil(size / s) - size + (k - 1) * d + 1 - s)
        less, more = total // 2, total - total // 2
        found += [less, more] if kind == "same" else [more, less]
    return found


def _conv(call: Call) -> T:
    x, weight = call.x, call.tensor("weight")
    axes = weight.ndim - 2
    strides, dilations = call.ints("strides", [1] * axes), call.ints("dilations", [1] * axes)
    pads = _padding(call, weight.shape[2:], strides, dilations)
    if pads[::2] != pads[1::2]:
        x, pads = F.pad(x, torch_padding(pads)), [0] * 2 * axes
    made: Any = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    found: T = made(x, weight, call.maybe("bias"), strides, pads[::2], dilations, call.int("groups", 1))
    return found


def _conv_transpose(call: Call) -> T:
    x, weight = call.x, call.tensor("weight")
    axes = weight.ndim - 2
    strides, dilations = call.ints("strides", [1] * axes), call.ints("dilations", [1] * axes)
    made: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    full: T = made(x, weight, None, strides, 0, 0, call.int("groups", 1), dilations)
    kind = call.text("pad_type", "valid").lower()
    before = [0] * axes
    sizes = [int(one) for one in full.shape[2:]]
    if kind == "custom":
        pads = call.ints("pad", [0] * 2 * axes)
        before = pads[::2]
        sizes = [size - a - b for size, a, b in zip(sizes, pads[::2], pads[1::2], strict=True)]
    elif kind != "valid":
        wanted = [size * s for size, s in zip(x.shape[2:], strides, strict=True)]
        spare = [max(0, size - want) for size, want in zip(sizes, wanted, strict=True)]
        before = [one // 2 if kind == "same" else one - one // 2 for one in spare]
        sizes = wanted
    if "output_shape" in call.op.inputs:
        sizes = call.ints("output_shape")[2:]
    for axis, (start, size) in enumerate(zip(before, sizes, strict=True)):
        short = start + size - full.shape[axis + 2]
        if short > 0:  # an output that no input reaches is zero
            full = F.pad(full, [0, 0] * (axes - axis - 1) + [0, short])
        full = full.narrow(axis + 2, start, size)
    bias = call.maybe("bias")
    return full if bias is None else full + bias.reshape(-1, *[1] * axes)


def _pool(call: Call, *, most: bool, power: int = 1) -> T:
    """Of a maximum, or an average of powers."""
    kernel = call.ints("kernel_sizes")
    axes = len(kernel)
    strides = call.ints("strides", [1] * axes)
    pads = _padding(call, kernel, strides, [1] * axes)
    ceil = call.flag("ceil_mode")
    x = call.x
    even = pads[::2] == pads[1::2] and all(2 * pad <= k for pad, k in zip(pads[::2], kernel, strict=True))
    if most:
        if not even:
            x, pads = F.pad(x, torch_padding(pads), value=-math.inf), [0] * 2 * axes
        maximum: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[axes - 1]
        found: T = maximum(x, kernel, strides, pads[::2], 1, ceil)
        return found
    average: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    inside = call.flag("exclude_padding_from_average")
    if even:
        found = average(x**power if power > 1 else x, kernel, strides, pads[::2], ceil, not inside)
        return found
    ones = torch.ones_like(x[:1, :1])
    around = torch_padding(pads)
    found = average(F.pad(x, around) ** power, kernel, strides, 0, ceil)
    return found / average(F.pad(ones, around), kernel, strides, 0, ceil) if inside else found


def _l2_pool(call: Call) -> T:
    return (_pool(call, most=False, power=2) * math.prod(call.ints("kernel_sizes"))).sqrt()


# Matrices


def _linear(call: Call) -> T:
    return F.linear(call.x, call.tensor("weight"), call.maybe("bias"))


def _matmul(call: Call) -> T:
    x, y = call.x, call.tensor("y")
    if call.flag("transpose_x"):
        x = x.transpose(-1, -2)
    return x @ (y.transpose(-1, -2) if call.flag("transpose_y") else y)


def _einsum(call: Call) -> T:
    found: T = torch.einsum(call.text("equation", ""), *call.tensors("values"))
    return found


def _attention(call: Call) -> T:
    query, key, value = call.tensor("query"), call.tensor("key"), call.tensor("value")
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    mask = call.maybe("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1) @ value


# Normalization


def _batch_norm(call: Call) -> T:
    mean, variance = call.tensor("mean"), call.tensor("variance")
    return F.batch_norm(
        call.x, mean, variance, call.maybe("gamma"), call.maybe("beta"), eps=call.float("epsilon", 1e-5)
    )


def _instance_norm(call: Call) -> T:
    return F.instance_norm(call.x, weight=call.maybe("gamma"), bias=call.maybe("beta"), eps=call.float("epsilon", 1e-5))


def _layer_norm(call: Call) -> T:
    x = call.x
    axes = sorted(axis % x.ndim for axis in call.ints("axes", range(x.ndim)))
    centred = x - x.mean(axes, keepdim=True)
    found = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + call.float("epsilon", 1e-5))
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    gamma, beta = call.maybe("gamma"), call.maybe("beta")
    if gamma is not None:
        found = found * gamma.reshape(shape)
    return found if beta is None else found + beta.reshape(shape)


def _l2_norm(call: Call) -> T:
    x = call.x
    return x / (x.square().sum((-3, -2, -1), keepdim=True) + call.float("epsilon", 1e-6)).sqrt()


def _local_response_norm(call: Call) -> T:
    alpha, beta = call.float("alpha", 1e-4), call.float("beta", 0.75)
    return F.local_response_norm(call.x, call.int("size"), alpha, beta, call.float("k", 1.0))


# Reductions


def _over(made: Callable[[T, list[int], bool], T]) -> Callable[[Call], T]:
    def reduce(call: Call) -> T:
        return made(call.x, call.ints("axes", range(call.x.ndim)), call.flag("keep_dims"))

    return reduce


def _product(x: T, axes: list[int], keep: bool) -> T:
    for axis in sorted((one % x.ndim for one in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _argument(which: Callable[..., T]) -> Callable[[Call], T]:
    return lambda call: which(call.x, dim=call.int("axis", -1), keepdim=call.flag("keep_dims"))


# Quantized activations


def _quantize(call: Call) -> T:
    x = call.tensor("input")
    scale, zero = _along(call, x, "scale"), _along(call, x, "zero_point")
    least, most = (0, 255) if call.text("output_dtype", "int8") == "uint8" else (-128, 127)
    return (torch.round(x / scale) + zero).clamp(least, most)


def _dequantize(call: Call) -> T:
    x = call.tensor("input").float()
    return (x - _along(call, x, "zero_point")) * _along(call, x, "scale")


def _along(call: Call, x: T, name: str) -> T:
    """A number for all of x, or one for each place of the axis."""
    given = call.maybe(name)
    if given is None:
        return torch.zeros(())
    shape = [-1 if at == call.int("axis", 0) % x.ndim else 1 for at in range(x.ndim)]
    return given.float().reshape(shape) if given.ndim else given.float()


def _cast_op(call: Call) -> T:
    return call.x  # to what the output is declared to be


NUMBERS: Final[Mapping[str, Callable[[Call], T | list[T]]]] = {
    "abs": _one(torch.abs),
    "acos": _one(torch.acos),
    "asin": _one(torch.asin),
    "atan": _one(torch.atan),
    "atanh": _one(torch.atanh),
    "ceil": _one(torch.ceil),
    "cos": _one(torch.cos),
    "cosh": _one(torch.cosh),
    "erf": _one(torch.erf),
    "exp": _one(torch.exp),
    "exp2": _one(torch.exp2),
    "floor": _one(torch.floor),
    "identity": _one(lambda x: x),
    "logical_not": _one(torch.logical_not),
    "non_zero": _one(torch.nonzero),
    "relu": _one(torch.relu),
    "relu6": _one(F.relu6),
    "round": _one(torch.round),
    "shape": _one(lambda x: torch.tensor(x.shape, dtype=torch.int32)),
    "sigmoid": _one(torch.sigmoid),
    "sign": _one(torch.sign),
    "silu": _one(F.silu),
    "sin": _one(torch.sin),
    "sinh": _one(torch.sinh),
    "softplus": _one(F.softplus),
    "softsign": _one(F.softsign),
    "sqrt": _one(torch.sqrt),
    "square": _one(torch.square),
    "tan": _one(torch.tan),
    "tanh": _one(torch.tanh),
    "clamped_relu": _clamped_relu,
    "clip": lambda call: call.x.clamp(call.float("alpha"), call.float("beta")),
    "elu": lambda call: F.elu(call.x, call.float("alpha")),
    "gelu": _gelu,
    "inverse": lambda call: 1 / (call.x + call.float("epsilon", 1e-4)),
    "leaky_relu": lambda call: F.leaky_relu(call.x, call.float("alpha")),
    "linear_activation": lambda call: call.x * call.float("alpha") + call.float("beta"),
    "log": lambda call: torch.log(call.x + call.float("epsilon", 1e-45)),
    "prelu": lambda call: torch.where(call.x > 0, call.x, _per_channel(call, "alpha") * call.x),
    "rsqrt": lambda call: torch.rsqrt(call.x + call.float("epsilon", 1e-12)),
    "scaled_tanh": lambda call: call.float("alpha") * torch.tanh(call.float("beta") * call.x),
    "sigmoid_hard": lambda call: (call.float("alpha") * call.x + call.float("beta")).clamp(0, 1),
    "softmax": lambda call: torch.softmax(call.x, call.int("axis", -1)),
    "softplus_parametric": lambda call: _per_channel(call, "alpha") * F.softplus(_per_channel(call, "beta") * call.x),
    "threshold": lambda call: call.x.clamp(min=call.float("alpha")),
    "thresholded_relu": lambda call: torch.where(call.x >= call.float("alpha"), call.x, torch.zeros_like(call.x)),
    "add": _two(torch.add),
    "equal": _two(torch.eq),
    "floor_div": _two(lambda x, y: torch.div(x, y, rounding_mode="floor")),
    "greater": _two(torch.gt),
    "greater_equal": _two(torch.ge),
    "less": _two(torch.lt),
    "less_equal": _two(torch.le),
    "logical_and": _two(torch.logical_and),
    "logical_or": _two(torch.logical_or),
    "logical_xor": _two(torch.logical_xor),
    "maximum": _two(torch.maximum),
    "minimum": _two(torch.minimum),
    "mod": _two(torch.remainder),
    "mul": _two(torch.mul),
    "not_equal": _two(torch.ne),
    "pow": _two(torch.pow),
    "real_div": _two(_divided),
    "sub": _two(torch.sub),
    "select": _select,
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "avg_pool": lambda call: _pool(call, most=False),
    "max_pool": lambda call: _pool(call, most=True),
    "l2_pool": _l2_pool,
    "linear": _linear,
    "matmul": _matmul,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "l2_norm": _l2_norm,
    "local_response_norm": _local_response_norm,
    "reduce_argmax": _argument(torch.argmax),
    "reduce_argmin": _argument(torch.argmin),
    "reduce_l1_norm": _over(lambda x, axes, keep: x.abs().sum(axes, keep)),
    "reduce_l2_norm": _over(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "reduce_log_sum": _over(lambda x, axes, keep: x.sum(axes, keep).log()),
    "reduce_log_sum_exp": _over(lambda x, axes, keep: torch.logsumexp(x, axes, keep)),
    "reduce_max": _over(lambda x, axes, keep: x.amax(axes, keep)),
    "reduce_mean": _over(lambda x, axes, keep: x.mean(axes, keep)),
    "reduce_min": _over(lambda x, axes, keep: x.amin(axes, keep)),
    "reduce_prod": _over(_product),
    "reduce_sum": _over(lambda x, axes, keep: x.sum(axes, keep)),
    "reduce_sum_square": _over(lambda x, axes, keep: x.square().sum(axes, keep)),
    "cast": _cast_op,
    "dequantize": _dequantize,
    "quantize": _quantize,
}
