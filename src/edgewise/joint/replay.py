"""The replay: past requests with both tiers' outcomes. docs/formats/replay.md is the format."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from edgewise.errors import UsageError
from edgewise.joint.signals.evidence import Evidence
from edgewise.types import FinishReason

LINE_LIMIT: Final = 16 << 20  # bytes
SEEN_BYTES: Final = 6  # of a row's fingerprint
_SEE: Final = "docs/formats/replay.md says what a replay holds"


class Outcome(msgspec.Struct, frozen=True):
    """What one tier made of a request."""

    correct: bool | None = None
    quality: float | None = None
    text: str | None = None
    finish_reason: FinishReason | None = None
    logits: tuple[float, ...] | None = None
    token_logprobs: tuple[float | None, ...] | None = None
    signals: dict[str, float | None] = {}
    cost: float | None = None


class Row(msgspec.Struct, frozen=True):
    """One request. `gold` is for people."""

    id: str
    edge: Outcome
    cloud: Outcome
    prompt: str | None = None
    group: str | None = None
    gold: Any = None

    @property
    def right(self) -> tuple[bool, bool] | None:
        """Whether the edge and the cloud were right; None for a row that nobody judged."""
        edge, cloud = self.edge, self.cloud
        if edge.correct is not None and cloud.correct is not None:
            return edge.correct, cloud.correct
        if edge.quality is None or cloud.quality is None:
            return None
        return edge.quality >= cloud.quality, cloud.quality >= edge.quality

    @property
    def fingerprint(self) -> bytes:
        """The same for the same id and prompt, in whatever file."""
        text = msgspec.json.encode([self.id, self.prompt])
        return hashlib.blake2b(text, digest_size=SEEN_BYTES).digest()

    def evidence(self, beginning: int | None = None) -> Evidence:
        """What a decision may look at: of the whole answer, or of its first tokens."""
        edge = self.edge
        logprobs = edge.token_logprobs or ()
        if beginning is not None:
            return Evidence(self.prompt, self.group, logprobs=logprobs[:beginning])
        ended: FinishReason | None = edge.finish_reason or (None if edge.text is None else "stop")
        return Evidence(
            self.prompt,
            self.group,
            edge.text,
            logprobs,
            finish_reason=ended,
            logits=None if edge.logits is None else np.array(edge.logits),
            given=edge.signals,
        )


class Replay(Sequence[Row]):
    """Rows that both tiers were judged on, in the order of their file, and how many were not."""

    def __init__(self, rows: Sequence[Row], *, skipped: int = 0, sha256: str = "", name: str = "the replay") -> None:
        self.rows = rows
        self.skipped = skipped
        self.sha256 = sha256  # of the file's bytes
        self.name = name
        right = np.array([row.right for row in rows], bool).reshape(-1, 2)
        self.edge_right, self.cloud_right = right[:, 0], right[:, 1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def take(self, indices: Sequence[int]) -> Replay:
        return Replay([self.rows[index] for index in indices], sha256=self.sha256, name=self.name)

    @staticmethod
    def open(path: Path) -> Replay:
        """Read a replay file. UsageError for one that cannot be read, is none, or has no judged row; it names the line
        and the key."""
        digest, rows, names, skipped = hashlib.sha256(), [], set[str](), 0
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
            if row.right is None:
                skipped += 1
            else:
                rows.append(row)
        if not rows:
            raise UsageError(
                f"{path} holds no request of which both tiers' outcomes are known ({skipped} are not judged)",
                hint=f"`correct` is needed under `edge` and under `cloud`; {_SEE}",
            )
        return Replay(rows, skipped=skipped, sha256=digest.hexdigest(), name=path.name)


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
