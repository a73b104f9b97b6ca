"""Which options targets have and which values these take, so that a wrong one is named before any work and is never
passed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from edgewise.errors import UsageError


@dataclass(frozen=True, slots=True)
class Value:
    """`words` follow "give"."""

    words: str
    fits: Callable[[Any], bool]


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

    return Value(f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]}", fits)


SWITCH: Final = Value("true or false", lambda value: isinstance(value, bool))
NAME: Final = Value("a name", _name)
NAMES: Final = Value('a name, or several: ["A", "B"]', _names)
COUNT: Final = Value("a whole number above 0", _count)

PALETTE: Final = _one_of(4, 6, 8)
GROUP: Final = Value("a whole number, 0 for one table a matrix", _count_or_none)

Options = Mapping[str, Mapping[str, Value]]  # of each target; each is explained in the target's own file

OPTIONS: Final[Options] = {
    "onnx": {
        "dynamic": Value('the free axes of inputs by name: {"input_ids": [1]}', _axes),
        "input_name": NAME,
        "batch_name": NAME,
        "optimize": SWITCH,
        "reduce_range": SWITCH,
    },
    "litert": {"layout": _one_of("nhwc", "nchw"), "dynamic_batch": SWITCH},
    "coreml": {
        "target": _one_of("iOS17", "iOS18"),
        "palettize": PALETTE,
        "group": GROUP,
        "block": COUNT,
        "dynamic_batch": SWITCH,
    },
    "tensorrt": {
        "compute": NAMES,
        "batches": Value("the least, the best and the largest number of rows: [1, 1, 8]", _batches),
    },
    "qnn": {"socs": NAMES, "activations": _one_of(8, 16)},
}
LANGUAGE_OPTIONS: Final[Options] = {
    "onnx": {},
    "litert": {"recipe": NAME, "prefill": Value("lengths: [32, 128]", _counts), "cache": COUNT},
    "coreml": {"palettize": PALETTE, "prefill": COUNT, "cache": COUNT},
}


def check(target: str, given: Mapping[str, Any], known: Mapping[str, Value]) -> None:
    """UsageError for an option that is not among the `known` ones of the target, and for a value that it does not
    take."""
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"{target} has no option {name}", hint=f"it has {', '.join(known) or 'none here'}")
        if not known[name].fits(value):
            raise UsageError(f"the option {target}.{name} is {value!r}", hint=f"give {known[name].words}")
