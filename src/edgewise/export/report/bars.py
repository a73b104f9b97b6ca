"""Bars and intervals as SVG that stands inside a page and takes its colours from it (page.py has the classes)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

Place = Callable[[float], float]

NAMES, WIDTH, VALUES, ROW, TOP, LOW = 150, 350, 260, 26, 8, 24
ACROSS: Final = NAMES + WIDTH + VALUES
LONGEST: Final = 22  # characters of a name that fit


@dataclass(frozen=True, slots=True)
class Bar:
    """A length with its words, and the interval around it if there is one. `bad` is shown as such."""

    name: str
    value: float
    words: str
    low: float | None = None
    high: float | None = None
    bad: bool = False


def bars(title: str, rows: Sequence[Bar], *, mark: tuple[float, str] | None = None) -> str:
    """One line per bar, from zero, to both sides where one is negative. `mark` is a place to see, with its words."""
    places = [0.0, *(place for row in rows for place in (row.value, row.low, row.high) if place is not None)]
    least, most = min(places), max(places)
    if mark is not None and mark[0] > most:
        most = min(mark[0], max(2 * most, mark[0] / 10))  # not so far that nothing of the bars is left to see
    span = (most - least) or 1.0
    height = TOP + ROW * len(rows) + LOW

    def x(value: float) -> float:
        return NAMES + (min(max(value, least), most) - least) / span * WIDTH

    said = f"{title}: " + "; ".join(f"{row.name} {row.words}" for row in rows)
    return "".join(
        [
            f'<svg class="plot" role="img" aria-label="{escape(said)}" viewBox="0 0 {ACROSS} {height}">',
            f'<path class="axis" d="M{x(0):.1f} {TOP}v{ROW * len(rows)}"/>',
            *(part for number, row in enumerate(rows) for part in _row(row, TOP + ROW * number, x)),
            *_mark(mark, most, x(mark[0]) if mark else 0.0, TOP + ROW * len(rows)),
            "</svg>",
        ]
    )


def _row(row: Bar, top: float, x: Place) -> Iterator[str]:
    middle = top + ROW / 2
    kind = "bar bad" if row.bad else "bar"
    begin, end = sorted((x(0.0), x(row.value)))
    length, thick = max(end - begin, 1), ROW - 10
    yield f'<text x="{NAMES - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(_short(row.name))}</text>'
    yield f'<rect class="{kind}" x="{begin:.1f}" y="{top + 5:.1f}" width="{length:.1f}" height="{thick}"/>'
    if row.low is not None and row.high is not None:
        low, high = x(row.low), x(row.high)
        ends = "".join(f"M{end:.1f} {middle - 5:.1f}v10" for end in (low, high))
        yield f'<path class="interval" d="M{low:.1f} {middle:.1f}H{high:.1f}{ends}"/>'
        end = max(end, high)
    yield f'<text class="quiet" x="{end + 8:.1f}" y="{middle + 4:.1f}">{escape(row.words)}</text>'


def _mark(mark: tuple[float, str] | None, most: float, place: float, bottom: float) -> Iterator[str]:
    if mark is None:
        return
    words = mark[1] + (" →" if mark[0] > most else "")
    anchor = "end" if place > NAMES + WIDTH / 2 else "start"
    yield f'<path class="mark" d="M{place:.1f} {TOP}V{bottom + 4}"/>'
    yield f'<text class="quiet" x="{place:.1f}" y="{bottom + 18}" text-anchor="{anchor}">{escape(words)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
