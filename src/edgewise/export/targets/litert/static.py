"""Static int8: which operators of a network take it, decided by numbers.

It gives every activation one range. Some cannot be held so: a transformer's residual stream has a few numbers that are
a hundred times as large as the rest, and an additive mask is larger still. So the activations of the calibration rows
are measured first. A product whose input or output would lose more than LOSES of itself keeps its weights in int8 and
measures the range of its input as it runs; and of two ways to treat all the others, the file gets the one whose outputs
stay closer to float32. Where these are still too far off, the products that do so are chosen by what each costs there.

    whole       every operator that XNNPACK has in int8: one chain of integers from end to end
    products    convolutions and matrix products; norms, softmax and sums between them stay float32
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from ai_edge_quantizer import qtyping, recipe_manager

from edgewise.errors import SourceError, UnsupportedModel, UsageError
from edgewise.export.targets.litert.file import File, Operator
from edgewise.export.targets.litert.recipe import (
    ALL,
    STATIC,
    TABLE,
    Array,
    Calibration,
    attends,
    constant,
    named,
    scope,
    with_flat_biases,
    write,
)
from edgewise.export.targets.litert.run import Net, Watched, relative_l2
from edgewise.export.targets.litert.smooth import smoothed
from edgewise.export.targets.mixed import MAY_LOSE, MOST, fewest
from edgewise.export.targets.ranges import SAMPLE, Seen, fitted, seen_of, together

LOSES: Final = 0.05  # relative L2 of an activation's rounding to int8
MEASURED: Final = 8  # rows on which that is taken
JUDGED: Final = 16  # rows on which the two ways are compared
GOOD: Final = 0.05  # relative L2 of the outputs that needs no second way
NEAR: Final = 1.25  # `whole` may be so many times as far off as `products`
APART: Final = 2.0**14  # times one tensor's range may be as wide as another's at the same operator
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


@dataclass(frozen=True, slots=True)
class _Activations:
    """Of each tensor by name: its range over all rows, and what rounding to int8 takes from it (relative L2). `masks`
    are tensors on their way to a softmax: what a mask adds there is so large that what the rest loses does not show."""

    ranges: Mapping[str, tuple[float, float]]
    loss: Mapping[str, float]
    masks: frozenset[str]


def static(source: Path, output: Path, calibration: Calibration) -> tuple[str, ...]:
    """Write `output`; notes on what was done. UsageError without calibration rows."""
    if not calibration.rows or not len(calibration.rows[0]):
        raise UsageError("static int8 needs inputs to calibrate with", hint="give --calibration, or take int8-dynamic")
    source = smoothed(with_flat_biases(source), calibration)
    file = File(source)
    found = _activations(source, calibration, whole=attends(file))
    loose = _loose(file, found)
    expected = _outputs(source, calibration)
    recipes: dict[str, Callable[[Sequence[Operator]], Any]] = {
        "whole": lambda loose: _whole(file, found, loose),
        "products": lambda loose: _products(file, loose),
    }
    errors: dict[str, float] = {}

    def off(name: str, loose: Sequence[Operator]) -> float:
        """Writes the file, too."""
        write(source, output, recipes[name](loose), found.ranges, calibration)
        return _error(expected, output, calibration)

    for name in recipes:
        errors[name] = off(name, loose)
        if errors[name] <= GOOD:
            break
    if not np.isfinite(min(errors.values())):
        raise UnsupportedModel("its static int8 form gives no numbers, or cannot be run", hint="take int8-dynamic")
    chosen = _chosen(errors)
    if errors[chosen] > (most := MAY_LOSE[calibration.task]):
        other = fewest(_static_products(file), lambda kept: off(chosen, kept), most)
        loose = min((loose, other), key=lambda some: off(chosen, some))
    after = off(chosen, loose)
    return _static_notes(file, chosen, errors, after, loose)


def _chosen(errors: Mapping[str, float]) -> str:
    if len(errors) == 1 or errors["whole"] <= NEAR * errors["products"]:
        return "whole"
    return "products"


def _activations(source: Path, calibration: Calibration, *, whole: bool) -> _Activations:
    watched = Watched(source, calibration.inputs, calibration.outputs, calibration.threads)
    count = len(calibration.rows[0])
    parts: dict[str, list[Seen]] = {}
    for at in range(count):
        for name, value in _seen(watched, calibration.rows, at):
            if value.size:
                parts.setdefault(name, []).append(seen_of(value, max(1, SAMPLE // count), at))
    ranges = {name: fitted(together(some), 8, symmetric=False, whole=whole) for name, some in parts.items()}
    lost: dict[str, float] = {}
    held: dict[str, float] = {}
    for at in np.linspace(0, count - 1, min(MEASURED, count)).astype(int):
        for name, value in _seen(watched, calibration.rows, int(at)):
            if name not in ranges:
                continue
            lost[name] = lost.get(name, 0.0) + float(np.square(value - _rounded(value, *ranges[name])).sum())
            held[name] = held.get(name, 0.0) + float(np.square(value).sum())
    loss = {name: (lost[name] / held[name]) ** 0.5 if held[name] else 0.0 for name in lost}
    return _Activations(ranges, loss, watched.masks)


def _seen(watched: Watched, rows: Sequence[Array], at: int) -> Iterator[tuple[str, Array]]:
    """Inputs of real numbers, then all that is computed, by the file's names of tensors."""
    names = {int(one["index"]): one["name"] for one in watched.net.interpreter.get_input_details()}
    for port, value in zip(watched.net.inputs, watched.net.feed(rows, at), strict=True):
        if value.dtype.kind == "f":
            yield names[port.index], value
    yield from watched.seen(rows, at)


def _rounded(value: Array, low: float, high: float) -> Array:
    """As int8 with one range holds it."""
    step = (high - low) / 255 or 1.0
    return np.clip(np.round(value / step), np.round(low / step), np.round(high / step)) * step


def _loose(file: File, found: _Activations) -> list[Operator]:
    """Products with an activation that int8 cannot hold; the worst half at most, else it would not be static int8."""
    products = _static_products(file)
    losses = {op: _loss(file, op, found) for op in products}
    worst = sorted((op for op in products if losses[op] > LOSES), key=lambda op: -losses[op])
    return worst[: int(len(products) * MOST)]


def _static_products(file: File) -> list[Operator]:
    return [op for op in file.operators if named(op) in STATIC and constant(file, op)]


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
        if named(op) not in STATIC and _left_float(file, op, found):
            made.add_quantization_config(scope(file, op), ALL, algorithm_key="no_quantize")
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
        name = qtyping.TFLOperationName(named(op))
        add = made.add_weight_only_config if op.name == "DEPTHWISE_CONV_2D" else made.add_dynamic_config
        add(scope(file, op), name, 8)
    return made


def _outputs(path: Path, calibration: Calibration) -> list[Array]:
    net = Net(path, calibration.inputs, calibration.outputs, calibration.threads)
    return net.all(calibration.rows, min(JUDGED, len(calibration.rows[0])))


def _error(expected: Sequence[Array], path: Path, calibration: Calibration) -> float:
    """Relative L2 of the output that is furthest off; infinite for a file that LiteRT refuses, as the quantizer may
    well write one."""
    try:
        return max(relative_l2(a, b) for a, b in zip(expected, _outputs(path, calibration), strict=True))
    except (SourceError, UnsupportedModel):
        return float("inf")


def _static_notes(
    file: File, chosen: str, errors: Mapping[str, float], after: float, loose: Sequence[Operator]
) -> tuple[str, ...]:
    what = {
        "whole": "activations are int8 from end to end, save operators that XNNPACK has in float32 alone",
        "products": "convolutions and matrix products take int8; norms, softmax and sums between them stay float32",
    }
    seen = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
    notes = [f"{what[chosen]} (relative L2 on calibration rows: {seen})"]
    if loose:
        notes.append(
            f"{len(loose)} of {len(_static_products(file))} matrices keep int8 weights and measure the range of their "
            f"inputs as they run, as one range for all costs them most: relative L2 {after:.3f}"
        )
    return tuple(notes)
