"""Files that are whole or not there: written beside their place, forced to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgewise.errors import StorageError

ROOM = "make room, or name a directory on another disk; what is done so far stays, and the same call goes on from it"


@contextmanager
def storing(path: Path) -> Iterator[Path]:
    """The path of a file to be written, which becomes `path` when the block ends; when it fails nothing has changed.
    StorageError if the disk will not take it."""
    work = path.with_name(f".{path.name}.partial")
    try:
        yield work
        _to_disk(work)
        os.replace(work, path)
    except OSError as e:
        raise no_room(path, e) from e
    finally:
        with suppress(OSError):
            work.unlink(missing_ok=True)


@contextmanager
def storing_directory(path: Path) -> Iterator[Path]:
    """The same for an empty directory, in place of an older one. What a killed process left is cleared away."""
    work, old = (path.with_name(f".{path.name}.{state}") for state in ("partial", "replaced"))
    if old.exists() and not path.exists():  # killed between the two renames
        old.rename(path)
    _clear(work, old)
    try:
        work.mkdir(parents=True)
        yield work
        for file in (file for file in work.rglob("*") if file.is_file()):
            _to_disk(file)
        if path.exists():
            path.rename(old)
        work.rename(path)
    except OSError as e:
        raise no_room(path, e) from e
    finally:
        _clear(work, old)


def check_room(directory: Path, needed_bytes: int) -> None:
    """StorageError if the disk of the directory, which need not be there yet, has less."""
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise StorageError(
            f"{directory} needs {needed_bytes / 1e6:.0f} MB, and its disk has {free / 1e6:.0f} MB left", hint=ROOM
        )


def no_room(path: Path, error: OSError) -> StorageError:
    """What the system says of a file that it would not write."""
    why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
    return StorageError(f"{path} could not be written: {why}", hint=ROOM)


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _clear(*directories: Path) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
