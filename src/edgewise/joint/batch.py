"""A batch of rows that are judged one by one: which of them the cloud must answer, and the answer put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import RemoteBroken
from edgewise.joint.core import Reason, Verdict, verdict
from edgewise.joint.judge import Judge
from edgewise.joint.signals.evidence import Evidence
from edgewise.types import Decision, Wish

Numbers = npt.NDArray[np.generic]
NOTHING: Final = Verdict(None, Reason.NO_EVIDENCE)


@dataclass
class Batch:
    """One batch on its way. What the core hears of it is the least of its rows: one that is not sure is reason enough
    to ask the cloud, but only that row is sent."""

    judge: Judge
    threshold: float
    verdicts: Sequence[Verdict] = field(default_factory=list)  # one a row, once the edge answered

    def look(self, rows: Sequence[Evidence]) -> Verdict:
        """The verdict of the whole: of its row that is worth least."""
        self.verdicts = [verdict(self.judge, row, self.threshold) for row in rows]
        unsure = [one for one in self.verdicts if one.reason is not Reason.CONFIDENT]
        return min(unsure or self.verdicts, key=lambda one: one.confidence or 0.0, default=NOTHING)

    @property
    def asked(self) -> Sequence[int] | None:
        """The rows that the cloud must answer; None for all of them."""
        unsure = [row for row, one in enumerate(self.verdicts) if one.reason is not Reason.CONFIDENT]
        return unsure if 0 < len(unsure) < len(self.verdicts) else None

    def decisions(self, made: Decision, count: int, wish: Wish = "auto") -> tuple[Decision, ...]:
        """One for each of `count` rows, when that decision was made of the whole. A sure row stays where it was, unless
        its caller had another wish."""
        if len(self.verdicts) != count:
            return (made,) * count
        if wish != "auto":
            return tuple(Decision(made.route, one.confidence, made.reason) for one in self.verdicts)
        fallen = made.reason if made.route == "edge_fallback" else None
        return tuple(
            Decision("edge", one.confidence, one.reason)
            if one.reason is Reason.CONFIDENT and (fallen or self.asked is not None or made.route == "edge")
            else Decision(made.route, one.confidence, fallen or one.reason)
            for one in self.verdicts
        )


def evidence_of(logits: npt.ArrayLike | None, runs: Sequence[npt.ArrayLike] = ()) -> Sequence[Evidence]:
    """The rows of logits [rows, ..., classes] or [classes]; `runs` are those of the same rows in other runs."""
    if logits is None:
        return [Evidence()]
    values = np.asarray(logits, dtype=np.float64)
    others = [np.asarray(run, dtype=np.float64) for run in runs]
    if values.ndim < 2:
        return [Evidence(logits=values, runs=others)]
    return [Evidence(logits=row, runs=[run[place] for run in others]) for place, row in enumerate(values)]


def rows_of(inputs: Any, rows: Sequence[int] | None) -> Any:
    """These rows of an array, a tensor, a sequence, or of all that a mapping holds; all for None."""
    if rows is None:
        return inputs
    if isinstance(inputs, Mapping):
        return {name: rows_of(value, rows) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)([inputs[row] for row in rows])
    return inputs[list(rows)]


def joined(edge: npt.ArrayLike, cloud: npt.ArrayLike, rows: Sequence[int], what: str) -> Numbers:
    """The edge's rows with those `rows` from the cloud. RemoteBroken if they are not as many or not alike."""
    mine, theirs = np.array(edge), np.asarray(cloud)
    if theirs.shape != (len(rows), *mine.shape[1:]):
        raise RemoteBroken(
            f"the cloud's {what} has the shape {list(theirs.shape)}; beside the edge's allowed is "
            f"{[len(rows), *mine.shape[1:]]}",
            hint="both tiers must give the same outputs; send rows one by one where they do not",
        )
    mine = mine.astype(np.result_type(mine, theirs), copy=False)
    mine[list(rows)] = theirs
    return mine
