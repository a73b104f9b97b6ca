"""The bundles under EDGEWISE_HOME: `bundles/NAME/` each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgewise.errors import BundleError, UnknownModel
from edgewise.models.bundle import MANIFEST, Bundle


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
    """Delete a bundle of the store; UnknownModel if it is not there."""
    path = _stored(name, home)
    if path is None:
        find(name, home, check=False)  # its error names what is here
        raise UnknownModel(f"{name!r} is a path outside the store", hint="delete that directory yourself")
    gone = path.with_name(f".{path.name}.removed-{os.getpid()}")
    path.rename(gone)  # a reader never meets half a bundle
    shutil.rmtree(gone)


def _stored(name: str, home: Path) -> Path | None:
    if not name or name.startswith(".") or Path(name).name != name:
        return None
    path = bundles_dir(home) / name
    return path if path.is_dir() else None
