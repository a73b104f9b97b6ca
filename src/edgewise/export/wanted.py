"""What may be asked for: targets, the precisions of each, and how the command line writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, get_args

from edgewise.errors import UsageError
from edgewise.export.work.job import PRECISIONS, Precision

PRECISIONS_OF: Final[Mapping[str, tuple[Precision, ...]]] = {  # the first is the default
    "onnx": ("fp32", "fp16", "int8", "int8-dynamic", "int4"),
    "litert": ("fp16", "fp32", "int8", "int8-dynamic", "int4"),
    "coreml": ("fp16", "fp32", "int8", "int4"),
    "tensorrt": ("int8", "fp16", "fp32"),
    "qnn": ("int8", "fp16"),
}
LANGUAGE_PRECISIONS: Final[Mapping[str, tuple[Precision, ...]]] = {
    "onnx": ("int4", "int8", "fp32"),
    "litert": ("int8-dynamic", "fp32", "int4"),
    "coreml": ("fp16", "int8", "int4"),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One artifact. `key` is its name in the report and of its directory."""

    key: str
    target: str
    precision: Precision
    options: Mapping[str, Any] = field(default_factory=dict)


def parsed(to: str, precisions: str | None, *, language: bool = False) -> tuple[Wanted, ...]:
    """Of `onnx,litert:int8` and the precisions for those that name none; several make an artifact each. UsageError for
    what a target does not have."""
    allowed = LANGUAGE_PRECISIONS if language else PRECISIONS_OF
    general = [one.strip() for one in precisions.split(",")] if precisions else []
    found: list[Wanted] = []
    for part in (one.strip() for one in to.split(",") if one.strip()):
        target, _, own = part.partition(":")
        if target not in allowed:
            raise UsageError(
                f"there is no target {target!r}"
                + (" for a language model" if language and target in PRECISIONS_OF else ""),
                hint=f"known are {', '.join(allowed)}",
            )
        chosen = [own] if own else general or [allowed[target][0]]
        for one in chosen:
            key = part if own or len(chosen) == 1 else f"{target}:{one}"
            found.append(Wanted(key, target, _precision(target, one, allowed[target])))
    if not found:
        raise UsageError("--to names no target", hint=f"known are {', '.join(allowed)}")
    keys = [one.key for one in found]
    if len(set(keys)) != len(keys):
        raise UsageError(f"--to names a target twice: {', '.join(keys)}", hint="name each once")
    return tuple(found)


def _precision(target: str, name: str, allowed: Sequence[Precision]) -> Precision:
    for one in get_args(Precision):
        if one == name and one in allowed:
            found: Precision = one
            return found
    known = "no precision" if name not in PRECISIONS else f"no precision of {target} here"
    raise UsageError(f"{name!r} is {known}", hint=f"{target} has {', '.join(allowed)}")
