"""The directory that artifacts go to: what lies there may be the user's, and only what an export made gives way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from edgewise.errors import StorageError, UsageError
from edgewise.export.wanted import Wanted

OURS: Final = ".edgewise-export"  # what exports have made here, one a line


@contextmanager
def claimed(output: Path, wanted: Sequence[Wanted]) -> Iterator[None]:
    """UsageError where an artifact would take the place of something else, StorageError where nothing can be written.
    Afterwards, however it ended, what was made is known as ours, and a new directory that nothing came into is gone."""
    _check_place(output)
    new = not output.exists()
    names = [one.key.replace(":", "-") for one in wanted]
    places = ["report.json", "report.html", *(f"{above}{name}" for name in names for above in ("", "refused/"))]
    before = [name for name in places if (output / name).exists()]
    ours = _ours(output)
    if foreign := [name for name in before if name not in ours]:
        raise UsageError(
            f"{output / foreign[0]} is there, and no export has made it",
            hint="it would be replaced: give another -o, or take it away",
        )
    try:
        yield
    finally:
        made = {name for name in places if (output / name).exists()}
        if (now := ours - set(places) | made) != ours:
            (output / OURS).write_text("".join(f"{name}\n" for name in sorted(now)), encoding="utf-8")
        if new:
            with suppress(OSError):  # it is not empty, or was never made
                output.rmdir()


def _ours(output: Path) -> set[str]:
    try:
        return set((output / OURS).read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return set()


def _check_place(output: Path) -> None:
    """Whether the directory is there and open to us, or can be made."""
    there = next(one for one in (output.absolute(), *output.absolute().parents) if one.exists())
    if not there.is_dir():
        raise UsageError(f"{there} is a file, and artifacts go to a directory", hint="give another -o")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"{there} cannot be written to", hint="give another -o, or open it to yourself")
