"""What a teacher says of every position of some rows, computed once and kept (docs/formats/corpus.md).

Of each position its most probable next tokens are kept with their log-probabilities, and the log of the mass that is
left: enough for a student's loss, epoch after epoch, at a thousandth of the size of all logits. The teacher runs on our
own engine. Where the student has a part of its vocabulary, its distribution over that part is what is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from edgewise.compress.storing import check_room, storing
from edgewise.engines.base import Row
from edgewise.engines.load import local_model
from edgewise.engines.local import LocalModel, fixed_threads
from edgewise.errors import EngineError, SourceError, UsageError
from edgewise.models.bundle import Bundle
from edgewise.types import FloatArray, IdArray

FORMAT: Final = 1
FACTS: Final = "taught.json"
SHARD_TOKENS: Final = 1 << 14  # of a file, so that a killed process repeats seconds
STEPS: Final = 2048  # of a nat: log-probabilities are whole numbers of such steps below 0, in 16 bits
NOTHING: Final = (1 << 16) - 1  # stands for the log of 0, and for all below -32 nats
TOGETHER: Final = 16  # positions whose best are looked for at once, by each thread: what they need stays in its cache
Ints = npt.NDArray[np.int32]
Codes = npt.NDArray[np.uint16]
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TopK:
    """The k most probable next tokens of each position, best first: `ids` int32 [..., k] in the student's numbering,
    natural `logprobs` float32 [..., k], and `rest` float32 [...], the log of the mass of all others (-inf: none)."""

    ids: Ints
    logprobs: FloatArray
    rest: FloatArray


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """taught.json: what all shards are of."""

    format: int
    teacher: str  # Bundle.weights
    numerics: str
    content: str  # SHA-256 over the rows
    kept: str  # SHA-256 over the teacher's ids of the student's tokens; "" for all
    vocab: int  # of the student
    k: int
    rows: int
    length: int
    shard_rows: int


@dataclass(frozen=True, slots=True)
class Taught:
    """The teacher's word on some rows. A file is mapped while a row of it is read, and no longer: a large corpus has
    more files than a process may hold open."""

    directory: Path
    facts: Facts

    @staticmethod
    def open(directory: Path) -> Taught:
        """What `teach` left there. SourceError if it is nothing of that kind."""
        return Taught(directory, _facts(directory))

    def rows(self, at: IdArray) -> TopK:
        """Of the rows `at` int64 [b]: `ids` and `logprobs` are [b, length, k], `rest` [b, length]. The last position of
        a row foretells a token behind it. IndexError for rows that there are not."""
        facts = self.facts
        if len(at) and not 0 <= at.min() <= at.max() < facts.rows:
            raise IndexError(f"rows {at.min()} to {at.max()} are wanted, there are 0 to {facts.rows - 1}")
        found = np.empty((len(at), facts.length), _kind(facts.vocab, facts.k))
        for place, row in enumerate(at.tolist()):
            number, at_row = divmod(row, facts.shard_rows)
            found[place] = _read(self.directory / _name(number), facts, number)[at_row]
        return TopK(found["ids"].astype(np.int32), _decoded(found["logprobs"]), _decoded(found["rest"]))


def teach(
    teacher: Bundle,
    rows: Ints,
    k: int,
    directory: Path,
    tell: Tell = lambda what, done, total: None,
    *,
    kept: IdArray | None = None,
) -> Taught:
    """What the bundle says of `rows`, int32 [n, length] in the student's numbering; `kept` int64 [its vocabulary] is
    the teacher's id of each of its tokens (None: they are the same). The files that are there already stay, the others
    follow. UsageError for ids that the teacher has not, a `k` above the vocabulary, rows longer than its context, or
    files of other rows or of another teacher; StorageError if the disk is full."""
    vocab = teacher.card.vocab if kept is None else len(kept)
    _check(teacher, rows, k, vocab, kept)
    wanted = Facts(
        format=FORMAT,
        teacher=teacher.weights,
        numerics="",
        content=_sha256(rows, "<i4"),
        kept="" if kept is None else _sha256(kept, "<i8"),
        vocab=vocab,
        k=k,
        rows=len(rows),
        length=rows.shape[1],
        shard_rows=max(SHARD_TOKENS // rows.shape[1], 1),
    )
    if (directory / FACTS).exists():
        there = _facts(directory)
        if msgspec.structs.replace(there, numerics="") != wanted:
            raise UsageError(
                f"{directory} holds what another teacher said, or of other rows: {_difference(there, wanted)}",
                hint="remove it, or name another directory",
            )
        wanted = there
    missing = [number for number in range(_shards(wanted)) if not (directory / _name(number)).is_file()]
    if missing:
        directory.mkdir(parents=True, exist_ok=True)
        wanted = asyncio.run(_teach(teacher, rows, kept, wanted, directory, missing, tell))
    tell("asking the teacher", len(rows), len(rows))
    return Taught(directory, wanted)


async def _teach(
    teacher: Bundle,
    rows: Ints,
    kept: IdArray | None,
    wanted: Facts,
    directory: Path,
    missing: list[int],
    tell: Tell,
) -> Facts:
    """Write what is missing; the facts with what computed them."""
    model = local_model(teacher, slots=1, context=wanted.length)
    try:
        if wanted.numerics not in ("", model.numerics):
            raise UsageError(
                f"{directory} was begun on {wanted.numerics}, here is {model.numerics}, which rounds otherwise",
                hint="go on where it was begun, or remove it",
            )
        wanted = msgspec.structs.replace(wanted, numerics=model.numerics)
        check_room(directory, len(missing) * _bytes(wanted))
        with storing(directory / FACTS) as work:
            work.write_bytes(msgspec.json.format(msgspec.json.encode(wanted), indent=1) + b"\n")
        with _Asker(model, kept, wanted) as asker:
            for number in missing:
                tell("asking the teacher", number * wanted.shard_rows, wanted.rows)
                with storing(directory / _name(number)) as work:
                    work.write_bytes((await asker.ask(_its(rows, wanted, number))).tobytes())
    finally:
        await model.shutdown()
    return wanted


class _Asker:
    """The teacher, and two threads that look for the best of what it says."""

    def __init__(self, model: LocalModel[Any], kept: IdArray | None, facts: Facts) -> None:
        self._model, self._kept, self._facts = model, kept, facts
        self._pool = ThreadPoolExecutor(fixed_threads())

    def __enter__(self) -> _Asker:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    async def ask(self, rows: Ints) -> npt.NDArray[Any]:
        """Of rows [n, length]: [n, length] of `_kind`."""
        found = np.empty(rows.shape, _kind(self._facts.vocab, self._facts.k))
        await self._model.open("row", rows.shape[1])
        for row, its in zip(rows, found, strict=True):
            ids = row.astype(np.int64) if self._kept is None else self._kept[row]
            (logits,) = await self._model.forward([Row("row", 0, ids, len(ids))])  # from 0, so the one before goes
            parts = [slice(at, at + TOGETHER) for at in range(0, len(ids), TOGETHER)]
            for _ in self._pool.map(lambda part, its=its, logits=logits: self._keep(logits[part], its[part]), parts):
                pass
        await self._model.close("row")
        return found

    def _keep(self, logits: FloatArray, out: npt.NDArray[Any]) -> None:
        if self._kept is not None:
            logits = np.take(logits, self._kept, axis=1, mode="clip")  # all are there; looking at each takes longer
        best = best_of(logits, self._facts.k)
        out["ids"], out["logprobs"] = best.ids, np.minimum(_coded(best.logprobs), NOTHING - 1)
        out["rest"] = _coded(best.rest)


def best_of(logits: FloatArray, k: int) -> TopK:
    """The k most probable of each of n positions, from logits [n, vocab]; of equal ones any. EngineError for NaN, +inf
    or a position of -inf alone."""
    peaks = logits.max(axis=1, keepdims=True)
    if not np.isfinite(peaks).all():
        raise EngineError("the teacher gives logits that are NaN or infinite", hint="its weights are damaged")
    shifted = logits - peaks
    mass = np.exp(shifted)
    total = mass.sum(axis=1, dtype=np.float64)
    vocab = logits.shape[1]
    ids = (
        np.argpartition(shifted, vocab - k, axis=1)[:, vocab - k :]
        if k < vocab
        else np.tile(np.arange(vocab), (len(logits), 1))
    )
    order = np.argsort(-np.take_along_axis(shifted, ids, axis=1), axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    left = total - np.take_along_axis(mass, ids, axis=1).sum(axis=1, dtype=np.float64)
    log_total = np.log(total)
    with np.errstate(divide="ignore"):
        rest = np.log(np.maximum(left, 0.0) if k < vocab else np.zeros(len(logits))) - log_total
    logprobs = np.take_along_axis(shifted, ids, axis=1) - log_total[:, None]
    return TopK(ids.astype(np.int32), logprobs.astype(np.float32), rest.astype(np.float32))


def _coded(logs: FloatArray) -> Codes:
    """In steps below 0, rounded to the nearest: within a 4096th of a nat."""
    steps: FloatArray = np.rint(np.minimum(logs * np.float32(-STEPS), np.float32(NOTHING)))
    return steps.astype(np.uint16)


def _decoded(codes: Codes) -> FloatArray:
    logs = codes.astype(np.float32)
    logs *= np.float32(-1 / STEPS)
    logs[codes == NOTHING] = -np.inf
    return logs


def _check(teacher: Bundle, rows: Ints, k: int, vocab: int, kept: IdArray | None) -> None:
    if rows.ndim != 2 or not rows.size or not 0 <= rows.min() <= rows.max() < vocab:
        seen = f"of the shape {rows.shape}" + (f" with ids from {rows.min()} to {rows.max()}" if rows.size else "")
        raise UsageError(f"rows {seen} are given", hint=f"[rows, length] of ids 0 to {vocab - 1} are needed")
    if kept is not None and not 0 <= kept.min() <= kept.max() < teacher.card.vocab:
        raise UsageError(
            f"the student's tokens have ids of the teacher from {kept.min()} to {kept.max()}",
            hint=f"{teacher.name} has 0 to {teacher.card.vocab - 1}; prune the vocabulary of the same model",
        )
    if not 0 < k <= vocab:
        raise UsageError(f"the {k} most probable tokens are wanted of {vocab}", hint="lower loss.top_k")
    if rows.shape[1] > teacher.card.context:
        raise UsageError(
            f"rows of {rows.shape[1]} tokens are longer than the {teacher.card.context} that {teacher.name} can read",
            hint="lower data.length",
        )


def _facts(directory: Path) -> Facts:
    try:
        return msgspec.json.decode((directory / FACTS).read_bytes(), type=Facts)
    except (OSError, msgspec.MsgspecError) as e:
        raise SourceError(f"{directory / FACTS} cannot be read: {e}", hint="remove the directory") from e


def _difference(there: Facts, wanted: Facts) -> str:
    names = [name for name in Facts.__struct_fields__ if name != "numerics"]
    return ", ".join(name for name in names if getattr(there, name) != getattr(wanted, name)) + " differ"


def _kind(vocab: int, k: int) -> np.dtype[Any]:
    """A position on disk."""
    return np.dtype([("ids", "<u2" if vocab <= 1 << 16 else "<u4", (k,)), ("logprobs", "<u2", (k,)), ("rest", "<u2")])


def _shards(facts: Facts) -> int:
    return -(-facts.rows // facts.shard_rows)


def _its(rows: Ints, facts: Facts, number: int) -> Ints:
    return rows[number * facts.shard_rows : (number + 1) * facts.shard_rows]


def _bytes(facts: Facts) -> int:
    """Of a whole file."""
    return facts.shard_rows * facts.length * _kind(facts.vocab, facts.k).itemsize


def _name(number: int) -> str:
    return f"{number:05d}.taught"


def _read(file: Path, facts: Facts, number: int) -> npt.NDArray[Any]:
    kind = _kind(facts.vocab, facts.k)
    rows = min(facts.shard_rows, facts.rows - number * facts.shard_rows)
    try:
        if (size := file.stat().st_size) != (due := rows * facts.length * kind.itemsize):
            raise SourceError(
                f"{file} has {size} bytes, {due} are due", hint="remove it, and the teacher is asked again"
            )
        return np.memmap(file, kind, "r", shape=(rows, facts.length))
    except OSError as e:
        raise SourceError(
            f"{file} cannot be read: {e}", hint="the teacher is asked again where a file is not there"
        ) from e


def _sha256(values: npt.NDArray[Any], kind: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(values, kind).data).hexdigest()
