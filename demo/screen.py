"""What the demo shows: a live table on a terminal, a line per answer elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

COLUMNS = ("prompt", "route", "conf.", "first ms", "tok/s", "answer")
WIDTHS = (30, 13, 5, 8, 5, 46)
COLOURS = {"edge": "green", "cloud": "blue", "edge_fallback": "yellow"}


class Screen:
    def __init__(self) -> None:
        self._console = Console()
        self._rows: list[tuple[str, ...]] = []
        self._live = Live(console=self._console, transient=True, auto_refresh=False)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        else:
            print(_line(COLUMNS), flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
            self._console.print(self._table())

    def row(self, *cells: str) -> None:
        """The next row: prompt, route, confidence, first token, rate, answer. Too long ones are cut."""
        self._rows.append(cells)
        if self._console.is_terminal:
            self._live.update(self._table(), refresh=True)
        else:
            print(_line(cells), flush=True)

    def _table(self) -> Table:
        table = Table(*COLUMNS)
        for cells in self._rows:
            texts = [Text(_cut(cell, width)) for cell, width in zip(cells, WIDTHS, strict=True)]
            table.add_row(*texts, style=COLOURS.get(cells[1], "bold red"))
        return table


def _line(cells: tuple[str, ...]) -> str:
    return "  ".join(_cut(cell, width).ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _cut(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
