"""The replay: past requests with both tiers' outcomes. docs/formats/replay.md is the format."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta

from edgewise.errors import UsageError
from edgewise.joint.pair import Pair
from edgewise.joint.signals.evidence import Evidence
from edgewise.types import FinishReason, Route

LINE_LIMIT: Final = 16 << 20  # bytes
SEEN_BYTES: Final = 6  # of a row's fingerprint
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
_SEE: Final = "docs/formats/replay.md says what a replay holds"


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one tier made of a request."""

    correct: bool | None = None
    quality: float | None = None
    text: str | None = None
    finish_reason: FinishReason | None = None
    logits: tuple[float, ...] | None = None
    runs: tuple[tuple[float, ...], ...] = ()
    token_logprobs: tuple[float | None, ...] | None = None
    signals: dict[str, float | None] = {}
    cost: float | None = None


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request. `gold` is for people; what follows it stands in the rows that a node writes."""

    id: str
    edge: Outcome
    cloud: Outcome
    prompt: str | None = None
    group: str | None = None
    gold: Any = None
    time: float | None = None  # seconds since 1970
    pair: Pair | None = None
    route: Route | None = None
    reason: str | None = None
    confidence: float | None = None
    drawn: Share | None = None  # how likely it was that both tiers answered a request that went this way

    def right(self, within: float = 0.0) -> tuple[bool, bool] | None:
        """Whether the edge and the cloud were right; None for a row that nobody judged. A quality that is at most
        `within` below the other tier's is as good as that."""
        edge, cloud = self.edge, self.cloud
        if edge.correct is not None and cloud.correct is not None:
            return edge.correct, cloud.correct
        if edge.quality is None or cloud.quality is None:
            return None
        return edge.quality >= cloud.quality - within, cloud.quality >= edge.quality - within

    @property
    def fingerprint(self) -> bytes:
        """The same for the same id and prompt, in whatever file."""
        text = msgspec.json.encode([self.id, self.prompt])
        return hashlib.blake2b(text, digest_size=SEEN_BYTES).digest()

    def evidence(self) -> Evidence:
        """What a decision may look at."""
        edge = self.edge
        ended: FinishReason | None = edge.finish_reason or (None if edge.text is None else "stop")
        return Evidence(
            self.prompt,
            self.group,
            edge.text,
            edge.token_logprobs or (),
            finish_reason=ended,
            logits=None if edge.logits is None else np.array(edge.logits),
            runs=[np.array(run) for run in edge.runs],
            given=edge.signals,
        )


class Replay(Sequence[Row]):
    """Rows that both tiers were judged on, in the order of their file. `left_out` says how many more there were, by
    why they do not count."""

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        left_out: Mapping[str, int] | None = None,
        within: float = 0.0,
        sha256: str = "",
        name: str = "the replay",
    ) -> None:
        self.rows = rows
        self.left_out = left_out or {}
        self.within = within
        self.sha256 = sha256  # of the file's bytes
        self.name = name
        right = np.array([row.right(within) for row in rows], bool).reshape(-1, 2)
        self.edge_right, self.cloud_right = right[:, 0], right[:, 1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def pair(self) -> Pair | None:
        """The models that answered, where a node wrote the rows."""
        return self.rows[-1].pair if self.rows else None

    def take(self, indices: Sequence[int]) -> Replay:
        rows = [self.rows[index] for index in indices]
        return Replay(rows, within=self.within, sha256=self.sha256, name=self.name)

    @staticmethod
    def open(path: Path, *, within: float = 0.0) -> Replay:
        """Read a replay file. UsageError for one that cannot be read, is none, or has no row that counts; it names the
        line and the key. Of a node's log those rows count that are of the models of its last row, and of what it
        compared more often than the rest it takes no larger a share."""
        if not 0.0 <= within < math.inf:
            raise UsageError(f"within is {within}; allowed are finite numbers from 0")
        digest, names, sieve = hashlib.sha256(), set[str](), _Sieve(within)
        for number, line in _lines(path):
            digest.update(line)
            if not line.strip():
                continue
            row = _parsed(line, f"{path}, line {number}")
            if row.id in names:
                raise UsageError(
                    f"{path}, line {number}: the id {row.id[:100]!r} stands there a second time", hint=_SEE
                )
            names.add(row.id)
            sieve.add(row)
        rows = sieve.through()
        if not rows:
            why = "; ".join(f"{count} {reason}" for reason, count in sieve.left_out.items()) or "it is empty"
            raise UsageError(
                f"{path} holds no request of which both tiers' outcomes are known: {why}",
                hint=f"`correct` is needed under `edge` and under `cloud`; {_SEE}",
            )
        return Replay(rows, left_out=sieve.left_out, within=within, sha256=digest.hexdigest(), name=path.name)


@dataclass
class _Sieve:
    """Which rows of a file count."""

    within: float
    left_out: Counter[str] = field(default_factory=Counter)
    _rows: list[Row] = field(default_factory=list)
    _last: Pair | None = None

    def add(self, row: Row) -> None:
        self._last = row.pair
        if row.right(self.within) is None:
            self.left_out["not judged"] += 1
        elif row.drawn == 0.0:
            self.left_out["of a node that compared no answers of the edge"] += 1
        else:
            self._rows.append(row)

    def through(self) -> list[Row]:
        """A sample in which each request of the node had one chance to be: a row that was the likelier to be compared
        is kept the more rarely, always the same ones."""
        rows = [row for row in self._rows if row.pair == self._last]
        self._count("of other models than the last", len(self._rows) - len(rows))
        least = min((row.drawn for row in rows if row.drawn is not None), default=1.0)
        even = [row for row in rows if row.drawn is None or _lot(row.id) * row.drawn < least]
        self._count("of what was compared more often than the rest", len(rows) - len(even))
        return even

    def _count(self, why: str, count: int) -> None:
        if count:
            self.left_out[why] += count


def _lot(name: str) -> float:
    """0..1, the same for the same name, and all of them alike."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) / (1 << 48)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise UsageError(f"{path}, line {number}: longer than {LINE_LIMIT} bytes", hint=_SEE)
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"the replay {path} cannot be read: {reason}", hint=_SEE) from error


_decoder = msgspec.json.Decoder(Row)


def _parsed(line: bytes, place: str) -> Row:
    try:
        row = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{place}: {error}", hint=_SEE) from error
    for name, tier in (("edge", row.edge), ("cloud", row.cloud)):
        if tier.quality is not None and not math.isfinite(tier.quality):
            raise UsageError(f"{place}: `{name}.quality` is {tier.quality}, allowed are finite numbers", hint=_SEE)
    return row
