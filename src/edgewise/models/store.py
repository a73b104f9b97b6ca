"""The bundles under EDGEWISE_HOME: `bundles/NAME/` each, and how they come and go.

Whoever makes or removes one holds its lock in `locks/`, which the system releases when a process ends, however it ends.
So whatever lies beside a bundle under a name beginning with a dot while the lock is free was left by a process that was
killed, and the next one to hold the lock clears it away. A reader needs no lock: a bundle is there whole, or not.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from edgewise.errors import BundleError, UnknownModel
from edgewise.models.bundle import MANIFEST, Bundle

if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def bundles_dir(home: Path) -> Path:
    return home / "bundles"


def list_bundles(home: Path) -> list[Bundle]:
    """All readable bundles, by name, their files not hashed. `find` says what is wrong with an unreadable one."""
    found = []
    for manifest in sorted(bundles_dir(home).glob(f"*/{MANIFEST}")):
        if not manifest.parent.name.startswith("."):
            try:
                found.append(Bundle.open(manifest.parent, check=False))
            except BundleError:
                continue
    return found


def find(name_or_path: str, home: Path, check: bool = True) -> Bundle:
    """A bundle by name, or by the path of its directory. UnknownModel, or what Bundle.open raises."""
    path = _stored(name_or_path, home)
    if path is None and (Path(name_or_path) / MANIFEST).is_file():
        path = Path(name_or_path)
    if path is None:
        here = ", ".join(b.name for b in list_bundles(home)) or "none"
        raise UnknownModel(
            f"there is no bundle {name_or_path!r}; here: {here}", param="model", hint=f"edgewise pull {name_or_path}"
        )
    return Bundle.open(path, check=check)


def remove(name: str, home: Path) -> None:
    """Delete a bundle of the store; UnknownModel if it is not there, BundleError if it is being replaced."""
    path = _stored(name, home)
    if path is None:
        find(name, home, check=False)  # its error names what is here
        raise UnknownModel(f"{name!r} is a path outside the store", hint="delete that directory yourself")
    with locked(home, name):
        work, _ = _clear_leftovers(path)
        path.rename(work)  # a reader never meets half a bundle
        shutil.rmtree(work)


@contextmanager
def making(name: str, home: Path) -> Iterator[Path]:
    """The path of a directory to be made: when the block ends it becomes the bundle `name`, in place of an older one;
    when the block fails nothing has changed. BundleError if somebody else is making or removing that bundle."""
    target = bundles_dir(home) / name
    with locked(home, name):
        work, old = _clear_leftovers(target)
        try:
            yield work
            if target.exists():
                target.rename(old)
            work.rename(target)
        finally:
            _clear_leftovers(target)


@contextmanager
def locked(home: Path, name: str) -> Iterator[None]:
    """Alone, among processes and threads, at work on the bundle or download `name`; BundleError if that is taken."""
    path = home / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            _try_lock(file)
        except (BlockingIOError, PermissionError) as e:  # as POSIX and as Windows say it
            raise BundleError(
                f"another pull or rm is at work on {name!r}",
                hint="wait until it is done: it may be making just what you want",
            ) from e
        yield


def _clear_leftovers(target: Path) -> tuple[Path, Path]:
    """The paths of a bundle that is not whole and of one that is being replaced, both free now. Who was killed between
    the two renames left the old bundle in the second: it comes back."""
    work, old = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (work, old):
        shutil.rmtree(leftover, ignore_errors=True)
    return work, old


def _stored(name: str, home: Path) -> Path | None:
    if not name or name.startswith(".") or Path(name).name != name:
        return None
    path = bundles_dir(home) / name
    return path if path.is_dir() else None
