"""What codecs were measured to cost a model at its cuts (docs/formats/codecs.md), and the cheapest within a budget."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from edgewise.errors import UsageError
from edgewise.models.outline import LAYERS_LIMIT, Outline
from edgewise.wire.codec import codec

SHIPPED: Final = Path(__file__).with_name("codecs.json")
FORMAT: Final = 1
SIZE_LIMIT: Final = 4 << 20  # bytes
EXACT: Final = "exact"
NOISE: Final = {"instruct", "it", "chat", "base", "hf", "gguf"}  # of names: such models are cut alike
HINT: Final = "docs/formats/codecs.md"

Rise = Annotated[float, msgspec.Meta(ge=-1, le=1e9)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Layer = Annotated[int, msgspec.Meta(ge=1, le=LAYERS_LIMIT)]


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A codec at a cut of a model. `ppl_rise` is a share and `interval` its 95 %; both are None if it is refused."""

    model: str
    weights: str | None
    layers: Layer
    width: Count
    cut: Layer
    codec: str
    bytes: Count
    ppl_rise: Rise | None
    interval: tuple[Rise, Rise] | None
    tokens: Count
    refused: Literal["overflow"] | None

    def __post_init__(self) -> None:
        try:
            codec(self.codec)
        except UsageError as e:
            raise ValueError(str(e)) from e  # which the reader tells with the row's place
        if self.cut >= self.layers:
            raise ValueError(f"{self.layers} layers are cut at {self.cut}; 1 to {self.layers - 1} are allowed")
        measured = self.ppl_rise is not None and self.interval is not None
        if measured == (self.refused is not None) or (self.ppl_rise is None) != (self.interval is None):
            raise ValueError("a row has ppl_rise and interval, or it is refused")
        if self.interval is not None and not self.interval[0] <= (self.ppl_rise or 0.0) <= self.interval[1]:
            raise ValueError(f"ppl_rise is {self.ppl_rise}, outside of its interval {self.interval}")


class Chosen(NamedTuple):
    """A codec for a boundary. `ppl_rise` is a share, None where nobody measured it and it is not 0 by nature."""

    codec: str
    row_bytes: int
    ppl_rise: float | None
    reason: str


class CodecTable(msgspec.Struct, frozen=True):
    """Rows of any models; of equal model, weights, cut and codec the last counts."""

    rows: tuple[Row, ...]

    def __add__(self, other: CodecTable) -> CodecTable:
        """With rows that take the place of ours."""
        return CodecTable((*self.rows, *other.rows))

    def cheapest(self, outline: Outline, cut: int, max_rise: float, weights: str | None = None) -> Chosen:
        """The codec of the fewest bytes whose rise of perplexity is at most that share, by the upper end of its
        interval; `exact` where none is known to be. `weights`: the model's hash, if it is known."""
        rows = self._rows(outline, cut, weights)
        exact = codec(EXACT).row_bytes(outline.hidden)
        within = [row for row in rows if row.interval is not None and row.interval[1] <= max_rise]
        best = min(within, key=lambda row: row.bytes, default=None)
        if best is not None and best.bytes < exact:
            assert best.ppl_rise is not None
            assert best.interval is not None
            low, high = best.interval
            reason = (
                f"{best.codec} raises perplexity by {best.ppl_rise:.2%} [{low:.2%}, {high:.2%}] at cut {cut}, measured "
                f"over {best.tokens} tokens; {max_rise:.2%} is allowed"
            )
            return Chosen(best.codec, best.bytes, best.ppl_rise, reason)
        return Chosen(EXACT, exact, 0.0, _why_exact(outline, cut, max_rise, rows))

    def _rows(self, outline: Outline, cut: int, weights: str | None) -> list[Row]:
        found = {
            row.codec: row
            for row in self.rows
            if (row.layers, row.width, row.cut) == (outline.layers, outline.hidden, cut)
            and (row.weights == weights if row.weights and weights else _plain(row.model) == _plain(outline.name))
        }
        return list(found.values())


def _why_exact(outline: Outline, cut: int, max_rise: float, rows: list[Row]) -> str:
    if not rows:
        return (
            f"exact, as nobody measured what a codec costs {outline.name} at cut {cut}; "
            f"`edgewise bench split --model {outline.name}` does"
        )
    told = [f"{row.codec} {'overflows' if row.interval is None else f'up to {row.interval[1]:.2%}'}" for row in rows]
    return f"exact, as no codec is within {max_rise:.2%} at cut {cut}: {', '.join(told)}"


def _plain(name: str) -> tuple[str, ...]:
    """What tells one name from another: its words and numbers, without an owner."""
    words = re.findall(r"[a-z]+|\d+[a-z]*", name.split("/")[-1].lower())
    return tuple(word for word in words if word not in NOISE)


def read(path: Path) -> CodecTable:
    """UsageError, whatever the bytes are, if it is no such file."""
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise UsageError(f"{path} has {path.stat().st_size} bytes; a table of codecs has at most {SIZE_LIMIT}")
        data = path.read_bytes()
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT:
            raise UsageError(f"{path} has format {version!r}; this version reads {FORMAT}", hint=HINT)
        return CodecTable(msgspec.json.decode(data, type=_File).rows)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"{path} is no table of codecs: {e}", hint=HINT) from e


@cache
def shipped() -> CodecTable:
    """The table that comes with Edgewise."""
    return read(SHIPPED)


class _Version(msgspec.Struct):
    """The one key that every format has."""

    format: object = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    rows: tuple[Row, ...]
