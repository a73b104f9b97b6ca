"""`edgewise list`: the bundles here."""

from __future__ import annotations

from edgewise.cli.options import Config, Debug, Json
from edgewise.cli.output import columns, megabytes, result
from edgewise.cli.show import summary
from edgewise.settings import load


def list_(config: Config = None, json: Json = False, debug: Debug = False) -> None:
    """List the bundles here."""
    from edgewise.models.store import list_bundles

    home = load(config=config).settings.home
    bundles = [summary(bundle) for bundle in list_bundles(home)]
    rows = [
        (b["name"], megabytes(b["bytes"]), b["family"], b["weights"], b["licence"] or "not stated") for b in bundles
    ]
    text = columns([("NAME", "SIZE", "FAMILY", "WEIGHTS", "LICENCE"), *rows]) if rows else f"no bundles in {home}"
    result({"home": str(home), "bundles": bundles}, text, as_json=json)
