"""What an artifact must be to be let through. Each step looks for the faults that it can see, in this order:

    converts    the float32 form answers like the source, before anything is quantized (the target's own check)
    loads       the file can be read back, and is what it says
    precision   the weights really have the precision that was asked for
    weights     they are the source's weights (where the target cannot be run)
    range       nothing inside exceeds what half precision holds (LiteRT, whose files are computed in float32 here)
    finite      no output is NaN or infinite
    numbers     outputs are as near as the precision allows
    drop        no more is lost than the budget

The limits of `numbers` are generous: they are for faults that no rounding explains, on data too small for the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import UsageError
from edgewise.export.proof.parity import Drop, Numbers
from edgewise.export.work.job import Check, Precision, Proved

Array = npt.NDArray[Any]

LEAST_ROWS: Final = 200
SKIPPED_NAMED: Final = 4
WIDE: Final = ("float32", "float64")  # kinds of weights that fp32 is of


@dataclass(frozen=True, slots=True)
class Gate:
    """The budget, as shares of one; `strict` holds the pessimistic end of the interval against it."""

    max_drop: float | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Limit:
    """Of one precision: the largest relative L2 distance and the least mean cosine; None where neither means much."""

    rel_l2: float | None = None
    cosine: float | None = None


LIMITS: Final[dict[Precision, Limit]] = {
    "fp32": Limit(rel_l2=1e-3),
    "fp16": Limit(rel_l2=2e-2),
    "int8": Limit(cosine=0.9),
    "int8-dynamic": Limit(cosine=0.95),
    "int4": Limit(cosine=0.7),
}


def check_rows(gate: Gate, rows: int, *, random: bool) -> None:
    """UsageError where a gate would decide on too little."""
    if gate.max_drop is None:
        return
    if random:
        raise UsageError(
            "--max-drop wants real inputs", hint="give --inputs: an .npz, photos or texts (docs/export.md)"
        )
    if rows < LEAST_ROWS:
        raise UsageError(
            f"--max-drop gates on {LEAST_ROWS} inputs or more, and there are {rows} to judge on",
            hint="give more inputs, or leave --max-drop away and read the interval",
        )


def precision_check(proved: Proved, precision: Precision, *, kept: bool = False) -> Check:
    """Whether quantization was skipped, all of it or a part; or done, where float32 was asked for, if weights are not
    `kept` there as the source has them, whatever that is."""
    kinds = ", ".join(f"{size} bytes of {kind}" for kind, size in sorted(proved.weights.items())) or "none"
    if proved.skipped:
        names = ", ".join(proved.skipped[:SKIPPED_NAMED]) + (" …" if len(proved.skipped) > SKIPPED_NAMED else "")
        return Check("precision", False, f"{len(proved.skipped)} are not {precision}: {names}; weights are {kinds}")
    wide = sum(size for kind, size in proved.weights.items() if kind in WIDE)
    ok = precision != "fp32" or kept or 2 * wide >= sum(proved.weights.values())
    return Check("precision", ok, f"weights are {kinds}" + ("" if ok else ", and fp32 was asked for"))


def finite_check(outputs: Sequence[Array], expected: Sequence[Array]) -> Check:
    """Whether an output has a number that the source's had, too."""
    for place, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
        bad = ~np.isfinite(found) & np.isfinite(wanted)
        if bad.any():
            rows = int(bad.reshape(len(bad), -1).any(axis=1).sum())
            return Check("finite", False, f"output {place} is NaN or infinite in {rows} of {len(bad)} rows")
    return Check("finite", True, "every number is finite")


def numbers_check(numbers: Numbers, precision: Precision) -> Check:
    limit = LIMITS[precision]
    if limit.rel_l2 is not None:
        said = f"relative L2 distance {numbers.rel_l2:.2g}, {limit.rel_l2:g} is allowed for {precision}"
        return Check("numbers", numbers.rel_l2 <= limit.rel_l2, said)
    assert limit.cosine is not None
    said = f"cosine {numbers.cosine:.4f}, {limit.cosine:g} or more is wanted for {precision}"
    return Check("numbers", numbers.cosine >= limit.cosine, said)


def drop_check(drop: Drop, gate: Gate) -> Check | None:
    """None without a budget."""
    if gate.max_drop is None:
        return None
    judged, end = (drop.high, "pessimistic end") if gate.strict else (drop.point, "point")
    said = (
        f"{drop.metric}: {drop.point:.2%} lost [{drop.low:.2%}, {drop.high:.2%}] over {drop.n} rows, "
        f"{gate.max_drop:.2%} allowed of the {end}"
    )
    return Check("drop", judged <= gate.max_drop, said)


def told_once(checks: Sequence[Check]) -> tuple[Check, ...]:
    """Of checks of one name, by a target and by us, those that failed, else the last."""
    failed = {one.name for one in checks if not one.ok}
    last = {one.name: one for one in checks}
    return tuple(one for one in checks if (not one.ok if one.name in failed else one is last[one.name]))
