"""Which options targets have, which values these take and of which precisions they are, so that a wrong one is named
before any work and none is passed over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from edgewise.errors import UsageError
from edgewise.export.wanted import Wanted
from edgewise.export.work.job import PRECISIONS, Precision


@dataclass(frozen=True, slots=True)
class Value:
    """`words` follow "give"; artifacts of other precisions than `of` have no use for it, and neither has the proof of
    one that somebody else has made, unless it `proves`."""

    words: str
    fits: Callable[[Any], bool]
    of: Collection[Precision] = PRECISIONS
    proves: bool = False


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _count_or_none(value: Any) -> bool:
    return _count(value) or (value == 0 and not isinstance(value, bool))


def _name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _names(value: Any) -> bool:
    return _name(value) or (isinstance(value, list) and bool(value) and all(map(_name, value)))


def _counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_count, value))


def _axes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_counts, value.values()))


def _batches(value: Any) -> bool:
    return _counts(value) and len(value) == 3 and value == sorted(value)


def _one_of(*allowed: str | int) -> Value:
    def fits(value: Any) -> bool:
        return any(type(value) is type(one) and value == one for one in allowed)

    *others, last = map(str, allowed)
    return Value(f"{', '.join(others)} or {last}" if others else last, fits)


def _of(value: Value, *precisions: Precision) -> Value:
    return replace(value, of=precisions)


SWITCH: Final = Value("true or false", lambda value: isinstance(value, bool))
NAME: Final = Value("a name", _name)
NAMES: Final = Value('a name, or several: ["A", "B"]', _names)
COUNT: Final = Value("a whole number above 0", _count)


Options = Mapping[str, Mapping[str, Value]]  # of each target; each is explained in the target's own file

OPTIONS: Final[Options] = {
    "onnx": {
        "dynamic": Value('the free axes of inputs by name: {"input_ids": [1]}', _axes),
        "input_name": NAME,
        "batch_name": NAME,
        "optimize": replace(SWITCH, proves=True),
        "reduce_range": _of(SWITCH, "int8", "int8-dynamic"),
    },
    "litert": {"layout": _one_of("nhwc", "nchw"), "dynamic_batch": SWITCH},
    "coreml": {
        "target": _one_of("iOS17", "iOS18"),
        "palettize": replace(_of(_one_of(4, 6, 8), "int8", "int4"), proves=True),
        "group": _of(Value("a whole number, 0 for one table a matrix", _count_or_none), "int8", "int4"),
        "block": replace(_of(COUNT, "int4"), proves=True),
        "dynamic_batch": SWITCH,
    },
    "tensorrt": {
        "compute": NAMES,
        "batches": Value("the least, the best and the largest number of rows: [1, 1, 8]", _batches),
    },
    "qnn": {"socs": NAMES, "activations": _of(_one_of(8, 16), "int8")},
}
LANGUAGE_OPTIONS: Final[Options] = {
    "onnx": {},
    "litert": {"recipe": NAME, "prefill": Value("lengths: [32, 128]", _counts), "cache": COUNT},
    "coreml": {"palettize": _of(_one_of(4), "int4"), "prefill": COUNT, "cache": COUNT},
}


def _check(target: str, given: Mapping[str, Any], known: Mapping[str, Value]) -> None:
    """UsageError for an option that is not among the `known` ones of the target, and for a value that it does not
    take."""
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"{target} has no option {name}", hint=f"it has {', '.join(known) or 'none here'}")
        if not known[name].fits(value):
            raise UsageError(f"the option {target}.{name} is {value!r}", hint=f"give {known[name].words}")


def taken(
    wanted: Sequence[Wanted], given: Mapping[str, Mapping[str, Any]], known: Options, *, made: bool = True
) -> tuple[Wanted, ...]:
    """Each artifact with those of the options that its precision has a use for; not `made` are those that somebody else
    has made. UsageError for options of targets that are not asked for, for unknown ones, for values that they do not
    take, and for what no artifact has a use for."""
    targets = dict.fromkeys(one.target for one in wanted)
    for target, its in given.items():
        if target not in targets:
            raise UsageError(
                f"options are given for {target}, and only {', '.join(targets)} will be made",
                hint="leave them away, or make it too",
            )
        _check(target, its, known[target])
        for name in its:
            option, value = f"{target}.{name}", known[target][name]
            if not made and not value.proves:
                raise UsageError(f"{option} is for what is made here, not for --check", hint="leave it away")
            _check_use(option, value, [one for one in wanted if one.target == target])
    return tuple(
        replace(one, options={**one.options, **useful(given.get(one.target, {}), known[one.target], one.precision)})
        for one in wanted
    )


def useful(given: Mapping[str, Any], known: Mapping[str, Value], precision: Precision) -> dict[str, Any]:
    """Those that an artifact of that precision has a use for."""
    return {
        name: value
        for name, value in given.items()
        if name in known and precision in known[name].of and known[name].fits(value)
    }


def _check_use(option: str, value: Value, artifacts: Sequence[Wanted]) -> None:
    if not any(one.precision in value.of for one in artifacts):
        asked = ", ".join(one.precision for one in artifacts)
        raise UsageError(f"the option {option} is of {' and '.join(value.of)}, not of {asked}", hint="leave it away")
