"""Text as rows of tokens on disk (docs/formats/corpus.md): what a student learns from, and what it is held to.

What is in it, and where, depends on the documents alone and not on the order in which they came: alike ones are one,
each has its side of the split by its hash, and rows are filled in the order of hashes, which is as good as a shuffle.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from edgewise.compress.lessons.documents import Document
from edgewise.compress.storing import storing_directory
from edgewise.errors import SourceError, UsageError

FORMAT: Final = 1
FACTS, TRAIN, HELD_OUT, SPOOL = "corpus.json", "train.i32", "held_out.i32", "documents.jsonl"
TELL_EVERY: Final = 1000  # documents
Rows = npt.NDArray[np.int32]
Tell = Callable[[str, int, int], None]


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """corpus.json. `documents` are those in its rows, `alike` those left out as another says the same."""

    format: int
    recipe: str
    length: int
    end: int
    held_out: float
    limit_tokens: int | None
    documents: int
    held_out_documents: int
    alike: int
    rows: int
    held_out_rows: int
    digest: str
    sources: dict[str, int]

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Corpus:
    """`train` int32 [rows, length] and `held_out` [held_out_rows, length], mapped and not to be written. `digest`,
    SHA-256 in hex, is over both."""

    train: Rows
    held_out: Rows
    digest: str
    facts: Facts

    @staticmethod
    def open(directory: Path) -> Corpus:
        """SourceError if it is none, or damaged."""
        try:
            facts = msgspec.json.decode((directory / FACTS).read_bytes(), type=Facts)
            if facts.format != FORMAT:
                raise SourceError(f"{directory} has format {facts.format}, this version reads {FORMAT}", hint=_AGAIN)
            train = _rows(directory / TRAIN, facts.rows, facts.length)
            held_out = _rows(directory / HELD_OUT, facts.held_out_rows, facts.length)
        except (OSError, ValueError, msgspec.MsgspecError) as e:
            raise SourceError(f"{directory} holds no corpus: {e}", hint=_AGAIN) from e
        if _digest(train, held_out, facts.length) != facts.digest:
            raise SourceError(f"the rows in {directory} are not those that its {FACTS} is of", hint=_AGAIN)
        return Corpus(train, held_out, facts.digest, facts)


_AGAIN: Final = "remove it, and it is built again"


def build(
    sources: Mapping[str, Iterable[Document]],
    encode: Callable[[Document], list[int]],
    directory: Path,
    *,
    end: int,
    length: int = 256,
    held_out: float = 0.01,
    limit_tokens: int | None = None,
    recipe: str = "",
    replace: bool = True,
    tell: Tell = lambda what, done, total: None,
) -> Corpus:
    """The corpus of all documents of `sources` (by what each is called), of at most `limit_tokens` tokens to learn
    from. `encode` gives a document's ids without the token `end`, which is put behind. `recipe` says what it is made
    of, tokenizer included: a corpus of the same recipe and arguments that is there already is taken as it is, another
    one replaced once the new one is whole, or refused unless `replace`. UsageError then, and if there is not one row of
    either kind; StorageError if the disk is full."""
    same: dict[str, Any] = {
        "recipe": recipe,
        "length": length,
        "end": end,
        "held_out": held_out,
        "limit_tokens": limit_tokens,
    }
    there = _there(directory, same)
    if there is not None:
        return there
    if not replace and (directory / FACTS).is_file():
        raise UsageError(
            f"{directory} holds other rows than the text and the config would make now, and a run learnt from them",
            hint="put text and config back as they were, or name another output",
        )
    with storing_directory(directory) as work:
        with _Spool(work / SPOOL) as spool:
            for name, documents in sources.items():
                spool.take(name, documents, tell)
        sides = _sides(spool, held_out)
        limits = (limit_tokens, None if limit_tokens is None else int(limit_tokens * held_out / (1 - held_out)))
        packed = [
            _pack(spool, side, encode, work / file, end, length, limit, tell)
            for file, side, limit in zip((TRAIN, HELD_OUT), sides, limits, strict=True)
        ]
        (documents_used, rows), (held_out_documents, held_out_rows) = packed
        facts = Facts(
            format=FORMAT,
            **same,
            documents=documents_used,
            held_out_documents=held_out_documents,
            alike=spool.alike,
            rows=rows,
            held_out_rows=held_out_rows,
            digest=_digest(_rows(work / TRAIN, rows, length), _rows(work / HELD_OUT, held_out_rows, length), length),
            sources=spool.sources,
        )
        spool.path.unlink()
        (work / FACTS).write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=1) + b"\n")
    return Corpus.open(directory)


def learnt(facts: Facts, sources: Mapping[str, Iterable[Document]]) -> list[Document]:
    """The documents of `sources` that a corpus made of them has in its rows to learn from."""
    found: dict[bytes, Document] = {}
    for document in itertools.chain(*sources.values()):
        other = found.get(document.likeness)
        if other is None or document.digest < other.digest:
            found[document.likeness] = document
    places = sorted(found.values(), key=lambda document: document.digest)
    return [document for document in places if not _held_out(document.family, facts.held_out)][: facts.documents]


def _held_out(family: bytes, share: float) -> bool:
    return int.from_bytes(family[:8], "big") < int(share * (1 << 64))


def _there(directory: Path, same: Mapping[str, Any]) -> Corpus | None:
    if not (directory / FACTS).is_file():
        return None
    try:
        found = Corpus.open(directory)
    except SourceError:
        return None
    return found if all(getattr(found.facts, key) == value for key, value in same.items()) else None


@dataclass(frozen=True, slots=True)
class _Place:
    """A document of the spool; of alike ones that with the least digest."""

    digest: bytes
    family: bytes
    offset: int


class _Spool:
    """All documents that differ, in a file, so that they can be had in another order than they came in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.alike = 0
        self.sources: dict[str, int] = {}
        self.places: dict[bytes, _Place] = {}
        self._file = path.open("wb+")

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def take(self, name: str, documents: Iterable[Document], tell: Tell) -> None:
        count = 0
        for count, document in enumerate(documents, 1):
            if count % TELL_EVERY == 0:
                tell(f"reading {name}", 0, 1)
            self._take(document)
        self.sources[name] = count

    def _take(self, document: Document) -> None:
        other = self.places.get(document.likeness)
        if other is not None:
            self.alike += 1
            if other.digest <= document.digest:
                return
        line = json.dumps([document.text, document.prompt, document.cut]).encode() + b"\n"
        self.places[document.likeness] = _Place(document.digest, document.family, self._file.tell())
        self._file.write(line)

    def read(self, places: Iterable[_Place]) -> Iterator[Document]:
        with self.path.open("rb") as file:
            for place in places:
                file.seek(place.offset)
                yield Document(*json.loads(file.readline()))


def _sides(spool: _Spool, held_out: float) -> tuple[list[_Place], list[_Place]]:
    """What is learnt from and what is held out, each in the order of digests."""
    places = sorted(spool.places.values(), key=lambda place: place.digest)
    sides: tuple[list[_Place], list[_Place]] = ([], [])
    for place in places:
        sides[_held_out(place.family, held_out)].append(place)
    return sides


def _pack(
    spool: _Spool,
    places: list[_Place],
    encode: Callable[[Document], list[int]],
    file: Path,
    end: int,
    length: int,
    limit_tokens: int | None,
    tell: Tell,
) -> tuple[int, int]:
    """Write the rows that the documents fill; how many documents were taken and how many rows they are. What is left
    over of a row is dropped."""
    most = None if limit_tokens is None else max(limit_tokens // length, 1)
    learning = file.name == TRAIN
    what = "packing what is learnt from" if learning else "packing what is held out"
    taken, count = 0, 0
    left: list[int] = []
    with file.open("wb") as out:
        for taken, document in enumerate(spool.read(places), 1):
            if taken % TELL_EVERY == 0:
                tell(what, *((taken, len(places)) if most is None else (count, most)))
            left += [*encode(document), end]
            rows = len(left) // length if most is None else min(len(left) // length, most - count)
            out.write(np.array(left[: rows * length], "<i4").tobytes())
            left, count = left[rows * length :], count + rows
            if count == most:
                break
    if not count:
        raise UsageError(
            f"the text {'to learn from' if learning else 'held out'} has {len(left)} tokens, one row has {length}",
            hint="give more text, shorter rows" + ("" if learning else ", or a larger held_out"),
        )
    return taken, count


def _rows(file: Path, rows: int, length: int) -> Rows:
    """ValueError if the file is not so long."""
    if file.stat().st_size != rows * length * 4 or not rows:
        raise ValueError(
            f"{file.name} has {file.stat().st_size} bytes, {rows} rows of {length} are {rows * length * 4}"
        )
    return np.memmap(file, "<i4", "r", shape=(rows, length))


def _digest(train: Rows, held_out: Rows, length: int) -> str:
    found = hashlib.sha256(f"edgewise corpus {FORMAT} {length}".encode())
    for rows in (train, held_out):
        found.update(len(rows).to_bytes(8, "little"))
        found.update(np.ascontiguousarray(rows, "<i4").data)
    return found.hexdigest()
