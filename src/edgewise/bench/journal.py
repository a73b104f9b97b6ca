"""What of a long campaign is done: one JSON line for each finished piece, so that the same call goes on from there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgewise.errors import UsageError


class Journal:
    """Kept in `file`, or in memory alone (None). `what` says which campaign it is of: UsageError if the file holds
    another's, or no journal. A last line that was cut short is a piece that is not done."""

    def __init__(self, file: Path | None, what: dict[str, Any]) -> None:
        self._file = file
        self._done: dict[str, dict[str, Any]] = {}
        if file is None:
            return
        lines = _lines(file)
        if not lines:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(what) + "\n", encoding="utf-8")
        elif lines[0] != json.loads(json.dumps(what)):
            raise UsageError(f"{file} belongs to another campaign: {lines[0]}", hint="name another file, or remove it")
        for line in lines[1:]:
            self._done[line["piece"]] = line["result"]
        if lines:
            whole = [json.dumps(line) for line in lines]
            file.write_text("\n".join(whole) + "\n", encoding="utf-8")

    def get(self, piece: str) -> dict[str, Any] | None:
        """What came of it; None if it is to be done."""
        return self._done.get(piece)

    def all(self, pieces: Iterable[str]) -> list[dict[str, Any]]:
        """What came of them, those that are not done left out."""
        return [self._done[piece] for piece in pieces if piece in self._done]

    def add(self, piece: str, result: dict[str, Any]) -> dict[str, Any]:
        self._done[piece] = result
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"piece": piece, "result": result}) + "\n")
        return result


def _lines(file: Path) -> list[Any]:
    if not file.is_file():
        return []
    found = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            break
    if file.stat().st_size and not found:
        raise UsageError(f"{file} is no journal of a campaign", hint="name another file")
    return found
