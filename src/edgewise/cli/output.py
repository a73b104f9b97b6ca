"""What a verb says: its result on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgewise.models.download import Progress


def result(data: Mapping[str, object], text: str, *, as_json: bool) -> None:
    """The one result of a verb, for a program or for a reader. JSON is plain ASCII, so no terminal can spoil it."""
    sys.stdout.write((json.dumps(data, allow_nan=False) if as_json else text) + "\n")


def note(text: str) -> None:
    """A line for the person at the terminal."""
    print(f"edgewise: {text}", file=sys.stderr)


def columns(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned text that `grep` and `awk` can work with."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


@contextmanager
def progress() -> Iterator[Progress]:
    """A callback that shows long work on stderr: a bar with the time left on a terminal, else a line per stage."""
    if sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


def _lines() -> Progress:
    told: set[str] = set()

    def show(what: str, done: int, total: int) -> None:
        if what not in told:
            told.add(what)
            note(what)

    return show


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    shape = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars: dict[str, TaskID] = {}
    with Bars(*shape, console=Console(stderr=True)) as live:

        def show(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = live.add_task(what)
            # One step that cannot be measured (0 of 1) runs as a moving bar.
            live.update(bars[what], completed=done, total=None if (done, total) == (0, 1) else total)

        yield show
