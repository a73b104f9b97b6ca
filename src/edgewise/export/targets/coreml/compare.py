"""The weights of a Core ML program against the source's, tensor by tensor, in two steps.

The program against a fresh float32 conversion of the source: all constants in the order of the program, those that the
converter folded (batch norm into a convolution) included. And that conversion against the source itself: each matrix
that a layer of it multiplies by must be in there, its axes perhaps in another order, its channels perhaps scaled; so a
fault of the converter, which the first step would repeat, is seen too.

How far a number may be away follows from how it is stored: half a unit in the last place of float16, half a step of
linear quantization, the distance to the nearest value of a palette.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.export.targets.coreml.weights import Function, Weight
from edgewise.export.work.job import Check

Array = npt.NDArray[Any]

HALF_ULP: Final = 2.0**-11
HALF_TINY: Final = 2.0**-24  # float16's smallest number: the converter keeps what is less from vanishing
HALF_MOST: Final = 65504.0
SINGLE: Final = 2.0**-20
LEVELS: Final = {"int8": 128.0, "uint8": 256.0, "int4": 8.0, "uint4": 16.0}
CHUNK: Final = 1 << 20  # numbers whose distance to a palette is taken at once
NAMED: Final = 3  # tensors that a check names


@dataclass(frozen=True, slots=True)
class Constant:
    """One that an operator takes."""

    op: str
    parameter: str
    name: str
    owner: str  # the operator's own name


@dataclass(frozen=True, slots=True)
class Apart:
    """A tensor that is not the source's: `times` says how many times the allowed distance it is away."""

    name: str
    difference: float
    times: float


def allowed(weight: Weight, source: Array) -> Array | float:
    """How far each number may be from the source's, for how it is stored."""
    size = np.abs(source)
    half = (
        weight.value.dtype == np.float16
    )  # then the source, the step and the quotient were rounded, and the result is
    rounding = size * (4 * HALF_ULP) + HALF_TINY if half else size * SINGLE + 1e-12
    if weight.how == "plain" and weight.stored == "float16":
        return size * (HALF_ULP * 1.001) + HALF_TINY
    if weight.how == "linear" and weight.step is not None:
        most = LEVELS.get(weight.stored, 0.0)  # steps away from zero: each carries what the step itself was rounded by
        return np.abs(weight.step) * 0.501 + rounding + (most * HALF_TINY / 2 if half else 0.0)
    if weight.how == "palette" and weight.palette is not None and weight.groups is not None:
        return _nearest(weight, source) * 1.001 + rounding
    return rounding


def _nearest(weight: Weight, source: Array) -> Array:
    assert weight.palette is not None
    assert weight.groups is not None
    groups = np.broadcast_to(weight.groups, source.shape).reshape(-1)
    flat = source.reshape(-1).astype(np.float32)
    found = np.empty_like(flat)
    for group, table in enumerate(weight.palette.astype(np.float32)):
        mine = np.flatnonzero(groups == group)
        ordered = np.sort(table)
        for at in range(0, len(mine), CHUNK):
            part = mine[at : at + CHUNK]
            place = np.searchsorted(ordered, flat[part]).clip(1, len(ordered) - 1)
            found[part] = np.minimum(np.abs(flat[part] - ordered[place - 1]), np.abs(flat[part] - ordered[place]))
    return found.reshape(source.shape)


def apart(name: str, weight: Weight, source: Array) -> Apart | None:
    """None if they are the same but for how the numbers are stored. What float16 cannot hold may be infinite there."""
    value, source = np.asarray(weight.value, np.float32), np.asarray(source, np.float32)
    if value.shape != source.shape:
        return Apart(f"{name} ({list(value.shape)} for {list(source.shape)})", np.inf, np.inf)
    beyond = (np.abs(source) > HALF_MOST) & (np.abs(value) >= HALF_MOST) & (np.sign(value) == np.sign(source))
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.where(beyond, 0.0, np.abs(value - source))
        times = np.where(beyond, 0.0, distance / np.where(beyond, 1.0, allowed(weight, source)))
    times = np.nan_to_num(times, nan=np.inf).reshape(-1)
    worst = int(times.argmax()) if times.size else 0
    if not times.size or times[worst] <= 1:
        return None
    return Apart(name, float(np.nan_to_num(distance.reshape(-1)[worst], nan=np.inf)), float(times[worst]))


# Against a fresh conversion


def as_converted(ours: Function, fresh: Function) -> Check:
    """Constants that are no numbers, or integers (axes, paddings, strides), must be equal."""
    pairs, lost, extra = _pairs(ours, fresh)
    if lost:
        return Check("weights", False, f"the program lacks {_list(one.name for one in lost)} of the source")
    if extra:
        return Check("weights", False, f"the program has {_list(one.name for one in extra)}, which the source has not")
    wrong, matrices, numbers = [], 0, 0
    for mine, theirs in pairs:
        one, source = ours.weight(mine.name), fresh.weight(theirs.name).value
        if isinstance(one.value, np.ndarray) and one.value.dtype.kind == "f":
            found = apart(f"{mine.name} of {mine.owner}", one, source)
            matrices += one.value.ndim > 1
            numbers += one.value.size
        else:
            found = None if _equal(one.value, source) else Apart(f"{mine.parameter} of {mine.owner}", np.inf, np.inf)
        if found is not None:
            wrong.append(found)
    if wrong:
        return Check("weights", False, _named(wrong))
    return Check(
        "weights", True, f"{len(pairs)} constants, {matrices} of them matrices, {numbers} numbers: the source's own"
    )


def _equal(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def _named(wrong: Sequence[Apart]) -> str:
    worst = sorted(wrong, key=lambda one: -one.times)
    said = [
        f"{one.name} by up to {one.difference:.3g}, {one.times:.3g} times what its storage explains" for one in worst
    ]
    return f"{len(wrong)} differ from the source: {'; '.join(said[:NAMED])}"


def _list(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")


def _pairs(ours: Function, fresh: Function) -> tuple[list[tuple[Constant, Constant]], list[Constant], list[Constant]]:
    """Constants that belong together, and matrices that have no other: of the source, of the program."""
    mine, theirs = list(_constants(ours)), list(_constants(fresh))
    if [_key(one) for one in mine] == [_key(one) for one in theirs]:
        return list(zip(mine, theirs, strict=True)), [], []
    mine, theirs = _floats(ours, mine), _floats(fresh, theirs)
    keys = [[(*_key(one), fn.kind(one.name).shape) for one in of] for fn, of in ((ours, mine), (fresh, theirs))]
    blocks = SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks()
    pairs = [(mine[b.a + n], theirs[b.b + n]) for b in blocks for n in range(b.size)]
    have = [{id(pair[side]) for pair in pairs} for side in (0, 1)]
    lost = [one for one in theirs if id(one) not in have[1] and len(fresh.kind(one.name).shape) > 1]
    extra = [one for one in mine if id(one) not in have[0] and len(ours.kind(one.name).shape) > 1]
    return pairs, lost, extra


def _key(one: Constant) -> tuple[str, str]:
    return one.op, one.parameter


def _constants(function: Function) -> Iterator[Constant]:
    """Casts aside, of which each precision has its own."""
    for op in function.ops:
        if op.type != "cast":
            for parameter, names in op.inputs.items():
                for name in names:
                    if function.is_const(name) and parameter not in ("output_dtype", "validate_indices"):
                        yield Constant(op.type, parameter, name, op.name)


def _floats(function: Function, constants: Sequence[Constant]) -> list[Constant]:
    kinds = {one.name: function.kind(one.name) for one in constants}
    return [one for one in constants if kinds[one.name].dtype.startswith("float") and kinds[one.name].shape]


# Against the source itself


def as_given(function: Function, parameters: Mapping[str, Array]) -> Check:
    """Each of `parameters`, matrices and filters of the source by their names there, is in the program."""
    weights = _matrices(function)
    lost, scaled = [], 0
    for name, parameter in parameters.items():
        how = next((how for one in weights for how in [_is(one, parameter)] if how), "")
        scaled += how == "scaled"
        lost += [] if how else [name]
    if lost:
        return Check("source", False, f"not in the program: {_list(lost)}")
    plain = len(parameters) - scaled
    return Check(
        "source", True, f"all {len(parameters)} matrices of the source found, {plain} as they are, {scaled} scaled"
    )


def _matrices(function: Function) -> list[Weight]:
    named = {one.name: None for one in _floats(function, list(_constants(function)))}
    return [function.weight(name) for name in named if len(function.kind(name).shape) > 1]


def _is(weight: Weight, parameter: Array) -> str:
    """ "same" with its axes perhaps in another order, "scaled" if each channel of an axis has a factor besides."""
    value = np.asarray(weight.value, np.float32)
    if sorted(value.shape) != sorted(parameter.shape):
        return ""
    scaled = ""
    for order in itertools.permutations(range(parameter.ndim)):
        source = parameter.transpose(order)
        if source.shape != value.shape:
            continue
        if apart("", weight, source) is None:
            return "same"
        scaled = scaled or ("scaled" if any(_is_scaled(weight, value, source, axis) for axis in (0, 1)) else "")
    return scaled


def _is_scaled(weight: Weight, value: Array, source: Array, axis: int) -> bool:
    """By least squares a channel: what is left must be what storing explains."""
    rest = tuple(at for at in range(value.ndim) if at != axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = (value * source).sum(rest, keepdims=True) / (source * source).sum(rest, keepdims=True)
    fitted = source * np.nan_to_num(factor)
    left = np.square(value - fitted).sum(rest)
    bound = np.square(np.broadcast_to(allowed(weight, fitted), value.shape)).sum(rest)
    return bool((left <= bound * 1.01 + 1e-12).all())
