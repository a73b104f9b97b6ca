"""A float32 .tflite file in fewer bits, by ai-edge-quantizer; what is left out of int8, and why, is decided by numbers.

Static int8 gives every activation one range. Some cannot be held so: a transformer's residual stream has a few numbers
that are a hundred times as large as the rest, and an additive mask is larger still. So the activations of the
calibration rows are measured first. An operator whose input or output would lose more than LOSES of itself keeps its
weights in int8 and measures the range of its input as it runs; and of two ways to treat all the others, the file gets
the one whose outputs stay closer to float32:

    whole       every operator that XNNPACK has in int8: one chain of integers from end to end
    products    convolutions and matrix products; norms, softmax and sums between them stay float32
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ai_edge_quantizer import qtyping, quantizer, recipe_manager  # type: ignore[import-not-found,unused-ignore]

from edgewise.errors import UnsupportedModel, UsageError
from edgewise.export.targets.litert_file import File, Operator
from edgewise.export.targets.litert_run import Net, Watched, relative_l2
from edgewise.export.work.job import Precision, Tensor

Array = npt.NDArray[Any]

LOSES: Final = 0.05  # relative L2 of an activation's rounding to int8
MEASURED: Final = 8  # rows on which that is taken
JUDGED: Final = 16  # rows on which the two ways are compared
GOOD: Final = 0.05  # relative L2 of the outputs that needs no second way
NEAR: Final = 1.25  # `whole` may be so many times as far off as `products`
APART: Final = 2.0**14  # times one tensor's range may be as wide as another's at the same operator
BLOCK: Final = 32  # weights to a scale, in int4
STATIC: Final = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED")
FLOAT_BETTER: Final = (  # XNNPACK has no int8 kernels for these
    "AVERAGE_POOL_2D",
    "HARD_SWISH",
    "SOFTMAX",
    "GELU",
    "RSQRT",
    "SQRT",
    "DIV",
    "SQUARED_DIFFERENCE",
    "MAXIMUM",
    "BATCH_MATMUL",
)
QUANTIZER_NAME: Final = {"TRANSPOSE_CONV": "CONV_2D_TRANSPOSE"}  # what it calls an operator, where it is not the file's
ALL: Final = qtyping.TFLOperationName.ALL_SUPPORTED
TABLE: Final = "EMBEDDING_LOOKUP"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows as the source takes them."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    rows: Sequence[Array]
    threads: int


def quantize(source: Path, output: Path, precision: Precision, calibration: Calibration) -> tuple[str, ...]:
    """Write `output`; notes on what was done. UnsupportedModel for a network that has nothing to quantize so."""
    try:
        if precision == "int8":
            return _static(source, output, calibration)
        recipe, notes = _RECIPES[precision](File(source))
        _write(source, output, recipe, None)
        return notes
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as e:  # the quantizer's own
        why = " ".join(str(e).split())[:300]
        raise UnsupportedModel(
            f"ai-edge-quantizer cannot make it {precision}: {why}", hint="take fp16 or int8-dynamic"
        ) from e


# Weights alone


def _fp16(file: File) -> tuple[Any, tuple[str, ...]]:
    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    made = recipe_manager.RecipeManager()
    made.add_quantization_config(".*", ALL, config, algorithm_key="float_casting")
    return made, ("weights are float16; a CPU computes in float32, a GPU may take float16 throughout",)


def _dynamic(file: File) -> tuple[Any, tuple[str, ...]]:
    made = recipe_manager.RecipeManager()
    _add_dynamic(made)
    return made, (_depthwise_note(file),) if _has(file, "DEPTHWISE_CONV_2D") else ()


def _add_dynamic(made: Any) -> None:
    """Depthwise filters are kept in int8 and computed in float32: LiteRT's own kernel for them is ten times slower than
    XNNPACK's for float32, and XNNPACK has none."""
    made.add_dynamic_config(".*", ALL, 8)
    made.add_weight_only_config(".*", qtyping.TFLOperationName.DEPTHWISE_CONV_2D, 8)


def _depthwise_note(file: File) -> str:
    return "depthwise filters are stored in int8 and computed in float32: XNNPACK has no kernel that takes both"


def _int4(file: File) -> tuple[Any, tuple[str, ...]]:
    """Blocks of 32 weights share a scale where rows can be cut so: closer than a scale for a row, and as fast. There
    are no int4 kernels for convolutions, so they get int8."""
    small = [op for op in file.operators if op.name in ("FULLY_CONNECTED", TABLE) and _constant(file, op)]
    if not small:
        raise UnsupportedModel(
            "the network has no matrix product or table of embeddings, and LiteRT has int4 kernels for nothing else",
            hint="take int8 or int8-dynamic",
        )
    made = recipe_manager.RecipeManager()
    _add_dynamic(made)
    kinds = qtyping.QuantGranularity
    cut = 0
    for op in small:
        fits = file.tensors[op.inputs[1]].shape[-1] % BLOCK == 0
        cut += fits
        made.add_dynamic_config(
            _scope(file, op),
            qtyping.TFLOperationName(op.name),
            4,
            granularity=kinds.BLOCKWISE_32 if fits else kinds.CHANNELWISE,
            algorithm_key="min_max_uniform_quantize" if fits else "OCTAV",
        )
    notes = [f"int4 weights: {cut} matrices in blocks of {BLOCK}, {len(small) - cut} with a scale for each row"]
    if any(_has(file, name) for name in ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")):
        notes.append("convolutions have int8 weights: LiteRT has no int4 kernels for them that are worth having")
    return made, tuple(notes)


_RECIPES: Final = {"fp16": _fp16, "int8-dynamic": _dynamic, "int4": _int4}


# Static int8


@dataclass(frozen=True, slots=True)
class _Activations:
    """Of each tensor by name: its range over all rows, and what rounding to int8 takes from it (relative L2). `masks`
    are tensors on their way to a softmax: what a mask adds there is so large that what the rest loses does not show."""

    ranges: Mapping[str, tuple[float, float]]
    loss: Mapping[str, float]
    masks: frozenset[str]


def _static(source: Path, output: Path, calibration: Calibration) -> tuple[str, ...]:
    if not calibration.rows or not len(calibration.rows[0]):
        raise UsageError("static int8 needs inputs to calibrate with", hint="give --calibration, or take int8-dynamic")
    file = File(source)
    found = _activations(source, calibration)
    loose = _loose(file, found)
    expected = _outputs(source, calibration)
    ways = {"whole": _whole(file, found, loose), "products": _products(file, loose)}
    errors = {}
    for name, recipe in ways.items():
        _write(source, output.with_suffix(f".{name}"), recipe, found, calibration)
        errors[name] = _error(expected, _outputs(output.with_suffix(f".{name}"), calibration))
        if errors[name] <= GOOD:
            break
    chosen = _chosen(errors)
    for name in errors:
        part = output.with_suffix(f".{name}")
        part.replace(output) if name == chosen else part.unlink()
    return _static_notes(file, chosen, errors, loose, found)


def _chosen(errors: Mapping[str, float]) -> str:
    if len(errors) == 1 or errors["whole"] <= NEAR * errors["products"]:
        return "whole"
    return "products"


def _activations(source: Path, calibration: Calibration) -> _Activations:
    watched = Watched(source, calibration.inputs, calibration.outputs, calibration.threads)
    rows, ranges = calibration.rows, _ranges_of_inputs(watched.net, calibration.rows)
    for at in range(len(rows[0])):
        for name, value in watched.seen(rows, at):
            low, high = ranges.get(name, (0.0, 0.0))  # zero is in every range: padding is zero
            ranges[name] = (min(low, float(value.min(initial=0))), max(high, float(value.max(initial=0))))
    lost: dict[str, float] = {}
    held: dict[str, float] = {}
    for at in np.linspace(0, len(rows[0]) - 1, min(MEASURED, len(rows[0]))).astype(int):
        for name, value in watched.seen(rows, int(at)):
            lost[name] = lost.get(name, 0.0) + float(np.square(value - _rounded(value, *ranges[name])).sum())
            held[name] = held.get(name, 0.0) + float(np.square(value).sum())
    loss = {name: (lost[name] / held[name]) ** 0.5 if held[name] else 0.0 for name in lost}
    return _Activations(ranges, loss, watched.masks)


def _ranges_of_inputs(net: Net, rows: Sequence[Array]) -> dict[str, tuple[float, float]]:
    """By the file's own names of tensors."""
    names = {int(one["index"]): one["name"] for one in net.interpreter.get_input_details()}
    return {
        names[port.index]: (min(float(value.min()), 0.0), max(float(value.max()), 0.0))
        for port, value in zip(net.inputs, rows, strict=True)
    }


def _rounded(value: Array, low: float, high: float) -> Array:
    """As int8 with one range holds it."""
    step = (high - low) / 255 or 1.0
    return np.clip(np.round(value / step), np.round(low / step), np.round(high / step)) * step


def _loose(file: File, found: _Activations) -> tuple[Operator, ...]:
    """Products with an activation that int8 cannot hold; the worst half at most, else it would not be static int8."""
    products = [op for op in file.operators if _named(op) in STATIC and _constant(file, op)]
    losses = {op: _loss(file, op, found) for op in products}
    worst = sorted((op for op in products if losses[op] > LOSES), key=lambda op: -losses[op])
    return tuple(worst[: len(products) // 2])


def _loss(file: File, op: Operator, found: _Activations) -> float:
    tensors = [file.tensors[n].name for n in (*op.inputs, *op.outputs) if n >= 0]
    return max((found.loss.get(name, 0.0) for name in tensors), default=0.0)


def _whole(file: File, found: _Activations, loose: Iterable[Operator]) -> Any:
    made = recipe_manager.RecipeManager()
    made.add_static_config(".*", ALL, 8, 8)
    for name in (*FLOAT_BETTER, "INPUT", "OUTPUT"):
        made.add_quantization_config(".*", qtyping.TFLOperationName(name), algorithm_key="no_quantize")
    _add_tables(made)
    for op in file.operators:
        if _named(op) not in STATIC and _left_float(file, op, found):
            made.add_quantization_config(_scope(file, op), ALL, algorithm_key="no_quantize")
    return _with(made, file, loose)


def _left_float(file: File, op: Operator, found: _Activations) -> bool:
    """LiteRT's kernels end the whole process at ranges that are too far apart, so the last is no matter of taste."""
    names = [file.tensors[n].name for n in (*op.inputs, *op.outputs) if n >= 0]
    spans = [high - low for low, high in (found.ranges[name] for name in names if name in found.ranges)]
    apart = max(spans, default=0.0) > APART * min(spans, default=0.0)
    return apart or _loss(file, op, found) > LOSES or any(name in found.masks for name in names)


def _products(file: File, loose: Iterable[Operator]) -> Any:
    made = recipe_manager.RecipeManager()
    for name in STATIC:
        made.add_static_config(".*", qtyping.TFLOperationName(name), 8, 8)
    _add_tables(made)
    return _with(made, file, loose)


def _add_tables(made: Any) -> None:
    """Constants without an activation beside them that has a range of its own."""
    for name in (TABLE, "BATCH_MATMUL"):
        made.add_dynamic_config(".*", qtyping.TFLOperationName(name), 8)


def _with(made: Any, file: File, loose: Iterable[Operator]) -> Any:
    for op in loose:
        name = qtyping.TFLOperationName(_named(op))
        add = made.add_weight_only_config if op.name == "DEPTHWISE_CONV_2D" else made.add_dynamic_config
        add(_scope(file, op), name, 8)
    return made


def _outputs(path: Path, calibration: Calibration) -> list[Array]:
    net = Net(path, calibration.inputs, calibration.outputs, calibration.threads)
    return net.all(calibration.rows, min(JUDGED, len(calibration.rows[0])))


def _error(expected: Sequence[Array], found: Sequence[Array]) -> float:
    """Relative L2 of the output that is furthest off."""
    return max(relative_l2(a, b) for a, b in zip(expected, found, strict=True))


def _static_notes(
    file: File, chosen: str, errors: Mapping[str, float], loose: Sequence[Operator], found: _Activations
) -> tuple[str, ...]:
    what = {
        "whole": "activations are int8 from end to end, save operators that XNNPACK has in float32 alone",
        "products": "convolutions and matrix products take int8; norms, softmax and sums between them stay float32",
    }
    seen = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
    notes = [f"{what[chosen]} (relative L2 on calibration rows: {seen})"]
    if loose:
        worst = max(loose, key=lambda op: _loss(file, op, found))
        notes.append(
            f"{len(loose)} matrices keep int8 weights and measure the range of their inputs as they run: int8 with one"
            f" range would lose up to {_loss(file, worst, found):.0%} of what they give"
        )
    return tuple(notes)


# The quantizer


def _write(
    source: Path, output: Path, recipe: Any, found: _Activations | None, calibration: Calibration | None = None
) -> None:
    made = quantizer.Quantizer(str(source))
    made.load_quantization_recipe(recipe.get_quantization_recipe())
    with contextlib.redirect_stdout(sys.stderr):  # it prints sizes
        ranges = None
        if found is not None and calibration is not None and made.need_calibration:
            ranges = _with_ranges(_calibrated(made, source, calibration), found)
        done = made.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
        output.unlink(missing_ok=True)
        done.export_model(str(output))


def _calibrated(made: Any, source: Path, calibration: Calibration) -> Mapping[str, Any]:
    """The quantizer's own statistics of one row: which tensors it wants, and in which form."""
    net = Net(source, calibration.inputs, calibration.outputs, calibration.threads)
    signatures = net.interpreter.get_signature_list()
    feed = dict(zip((port.name for port in net.inputs), net.feed(calibration.rows, 0), strict=True))
    found: Mapping[str, Any] = made.calibrate({next(iter(signatures)): [feed]}, num_threads=calibration.threads)
    return found


def _with_ranges(wanted: Mapping[str, Any], found: _Activations) -> dict[str, Any]:
    """The quantizer lets the first rows weigh most (a moving average); these are the ranges of all rows."""
    made = dict(wanted)
    for name, value in wanted.items():
        if value and name in found.ranges:
            low, high = found.ranges[name]
            made[name] = {"min": np.full_like(value["min"], low), "max": np.full_like(value["max"], high)}
    return made


def _scope(file: File, op: Operator) -> str:
    """A pattern that fits this operator alone, as the quantizer names it: by its output."""
    return f"^{re.escape(file.tensors[op.outputs[0]].name)};?$"


def _named(op: Operator) -> str:
    return QUANTIZER_NAME.get(op.name, op.name)


def _constant(file: File, op: Operator) -> bool:
    return len(op.inputs) > 1 and op.inputs[1] >= 0 and file.tensors[op.inputs[1]].constant


def _has(file: File, name: str) -> bool:
    return any(op.name == name for op in file.operators)
