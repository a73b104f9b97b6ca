"""`edgewise show`: all about one bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgewise.cli.options import Config, Debug, Json, Name
from edgewise.cli.output import columns, result
from edgewise.settings import load

if TYPE_CHECKING:
    from edgewise.models.bundle import Bundle


def summary(bundle: Bundle) -> dict[str, Any]:
    """What `pull` and `list` say about a bundle."""
    return {
        "name": bundle.name,
        "path": str(bundle.path),
        "bytes": bundle.bytes,
        "licence": bundle.manifest.licence.get("id"),
        "family": bundle.card.family,
        "weights": bundle.manifest.quantization.get("weights"),
    }


def show(name: Name, config: Config = None, json: Json = False, debug: Debug = False) -> None:
    """Show a bundle's card, origin and licence, after checking every file against its hash."""
    from edgewise.engines.load import kv_bytes_per_token
    from edgewise.models.store import find

    settings = load(config=config).settings
    bundle = find(name, settings.home)
    manifest = bundle.manifest
    card = {key: value for key, value in bundle.card.to_json().items() if key != "rope"}
    facts = summary(bundle) | {
        "files": len(manifest.files),
        "intact": True,
        "blocks": len(manifest.graphs.blocks),
        "kv_bytes_per_token": kv_bytes_per_token(bundle, settings.model.runtime),
        "card": card,
        "source": manifest.source,
        "quantization": manifest.quantization,
        "parity": manifest.parity,
        "tools": manifest.tools,
    }
    result(facts, columns(list(_flat(facts))), as_json=json)


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested facts as dotted rows."""
    rows: list[tuple[str, Any]] = []
    for key, value in facts.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows
