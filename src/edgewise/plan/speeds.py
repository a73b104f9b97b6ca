"""The fitted speeds that come with Edgewise (speeds.json, made by benchmarks/plan_fit.py), and those that a user's own
measurements refine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np

from edgewise.errors import UsageError
from edgewise.plan import fit
from edgewise.plan.fit import BELIEFS, Beliefs, Estimate, Posterior, Problem, Score, Spread, Target, Times, held_out
from edgewise.plan.rows import Machines, Row, observations
from edgewise.plan.speed import Situation

SHIPPED: Final = Path(__file__).with_name("speeds.json")
FORMAT: Final = 1
SIZE_LIMIT: Final = 16 << 20  # bytes
DIGITS: Final = 7

Finite = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
Effect = Annotated[float, msgspec.Meta(ge=-50, le=50)]  # a logarithm
EFFECTS_LIMIT: Final = 2000  # the precision has the square of it
Index = Annotated[int, msgspec.Meta(ge=0, lt=EFFECTS_LIMIT)]


class Fitted(msgspec.Struct, frozen=True):
    """One target's effects, how far held-out rows fell, and how wide that makes an interval."""

    target: Target
    beliefs: Beliefs
    posterior: Posterior
    scores: tuple[Score, ...]
    spread: Spread

    @staticmethod
    def of(target: Target, beliefs: Beliefs, posterior: Posterior, scores: Iterable[Score]) -> Fitted:
        kept = tuple(scores)
        return Fitted(target, beliefs, posterior, kept, Spread.learned(kept, beliefs.level))

    def predict(self, situations: Sequence[Situation]) -> list[Estimate]:
        """tok/s, each with its 80 % interval. Many at once cost as much as one."""
        values, sds = fit.predict(self.target, self.beliefs, situations, self.posterior)
        return fit.estimates(values, sds, situations, self.spread)

    def times(self, situation: Situation) -> Times:
        """Where the time of a token goes."""
        return fit.times(self.target, self.beliefs, situation, self.posterior)

    def refined(self, rows: Sequence[Row], machines: Machines) -> Fitted:
        """After rows of the user's own, which it must not have seen. Intervals keep their width in sds: those of a
        device that was measured narrow as its sds do."""
        found = observations(rows, machines, self.target)
        if not found:
            return self
        own = fit.of_own_rows(self.beliefs, self.target, found)
        problem = Problem(self.target, own, found, self.posterior)
        return msgspec.structs.replace(self, beliefs=own, posterior=problem.solve(problem.everything))


class Speeds(msgspec.Struct, frozen=True):
    """`devices` are the names of those whose rows it has seen."""

    decode: Fitted
    prefill: Fitted
    devices: frozenset[str]

    def of(self, target: Target) -> Fitted:
        return self.decode if target == "decode" else self.prefill

    @staticmethod
    def fitted(rows: Sequence[Row], machines: Machines, beliefs: Mapping[Target, Beliefs] = BELIEFS) -> Speeds:
        """From the beliefs and these rows alone."""

        def learned(target: Target) -> Fitted:
            problem = Problem(target, beliefs[target], observations(rows, machines, target))
            posterior = problem.solve(problem.everything)
            return Fitted.of(target, beliefs[target], posterior, held_out(problem, problem.everything, posterior))

        return Speeds(learned("decode"), learned("prefill"), frozenset(row.device for row in rows))

    def refined(self, rows: Sequence[Row], machines: Machines) -> Speeds:
        return Speeds(
            self.decode.refined(rows, machines),
            self.prefill.refined(rows, machines),
            self.devices | {row.device for row in rows},
        )

    def save(self, path: Path) -> None:
        file = _File(FORMAT, sorted(self.devices), _written(self.decode), _written(self.prefill))
        path.write_bytes(msgspec.json.encode(file).replace(b'"],["', b'"],\n["').replace(b',"', b',\n"') + b"\n")

    @staticmethod
    def read(path: Path) -> Speeds:
        """UsageError, whatever the bytes are, if it is no file of speeds of this format."""
        try:
            if path.stat().st_size > SIZE_LIMIT:
                raise UsageError(f"{path} has {path.stat().st_size} bytes; a file of speeds has at most {SIZE_LIMIT}")
            data = path.read_bytes()
            found = msgspec.json.decode(data, type=_Version).format
            if found != FORMAT:
                raise UsageError(f"{path} has format {found!r}; this version reads {FORMAT}", hint=AGAIN)
            file = msgspec.json.decode(data, type=_File)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise UsageError(f"{path} is no file of speeds: {e}", hint=AGAIN) from e
        return Speeds(_read("decode", file.decode, path), _read("prefill", file.prefill, path), frozenset(file.devices))


AGAIN: Final = "python benchmarks/plan_fit.py ROWS.csv makes one"


@cache
def shipped() -> Speeds:
    """The speeds that come with Edgewise."""
    return Speeds.read(SHIPPED)


class _Version(msgspec.Struct):
    """The one key that every format has."""

    format: object = None


class _Fitted(msgspec.Struct, forbid_unknown_fields=True):
    """`precision` holds the entries of the lower triangle that are not 0: row, column, value."""

    effects: Annotated[dict[str, Effect], msgspec.Meta(max_length=EFFECTS_LIMIT)]
    precision: list[tuple[Index, Index, Finite]]
    scores: list[tuple[str, str, Annotated[float, msgspec.Meta(ge=0, le=1e6)]]]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    devices: list[str]
    decode: _Fitted
    prefill: _Fitted


def _written(fitted: Fitted) -> _Fitted:
    posterior = fitted.posterior
    lower = np.tril(posterior.precision)
    return _Fitted(
        effects={name: _short(value) for name, value in zip(posterior.names, posterior.mean, strict=True)},
        precision=[(int(row), int(column), _short(lower[row, column])) for row, column in np.argwhere(lower)],
        scores=[(score.device, score.runtime, _short(score.z)) for score in fitted.scores],
    )


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _read(target: Target, file: _Fitted, path: Path) -> Fitted:
    names = tuple(file.effects)
    for name in names:
        if not BELIEFS[target].knows(name):
            raise UsageError(f"{path} has an unknown effect {name!r} of {target}", hint=AGAIN)
    entries = np.array(file.precision, dtype=np.float64).reshape(-1, 3)
    at = entries[:, :2].astype(np.intp)
    if at.max(initial=-1) >= len(names):
        raise UsageError(f"{path} has a precision of effect {at.max()} of {len(names)}", hint=AGAIN)
    precision = np.zeros((len(names), len(names)))
    precision[at[:, 0], at[:, 1]] = precision[at[:, 1], at[:, 0]] = entries[:, 2]
    try:
        np.linalg.cholesky(precision)
    except np.linalg.LinAlgError as e:
        raise UsageError(f"{path} holds a precision of {target} that no rows can have left", hint=AGAIN) from e
    posterior = Posterior(names, np.array(list(file.effects.values())), precision)
    return Fitted.of(target, BELIEFS[target], posterior, (Score(*score) for score in file.scores))
