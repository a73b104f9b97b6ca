"""`edgewise rm`: delete a bundle."""

from __future__ import annotations

from pathlib import Path

from edgewise.cli.options import Config, Debug, Json, Name
from edgewise.cli.output import megabytes, result
from edgewise.settings import load


def rm(name: Name, config: Config = None, json: Json = False, debug: Debug = False) -> None:
    """Delete a bundle. The downloaded source stays, so that the bundle can be made again without a network."""
    from edgewise.models.store import bundles_dir, remove

    home = load(config=config).settings.home
    freed = sum(file.stat().st_size for file in (bundles_dir(home) / Path(name).name).rglob("*") if file.is_file())
    remove(name, home)
    result({"removed": name, "freed_bytes": freed}, f"removed {name}, {megabytes(freed)} freed", as_json=json)
