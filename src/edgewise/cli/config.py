"""`edgewise config`: the settings and where each comes from."""

from __future__ import annotations

import os

from edgewise.cli.options import Config, Debug, Json
from edgewise.cli.output import columns, note, result
from edgewise.settings import LEAVES, load, strays


def config() -> None:
    """The settings."""


def show(config: Config = None, json: Json = False, debug: Debug = False) -> None:
    """Show every setting, its value, where that came from, and the variable that sets it."""
    loaded = load(config=config)
    settings = {
        key: {"value": _plain(found.value), "source": found.source, "variable": LEAVES[key].variable}
        | ({"set": found.value in os.environ} if key.endswith("key_env") and found.value else {})
        for key, found in loaded.found.items()
    }
    for name in strays(loaded):
        note(f"the environment variable {name} means nothing to Edgewise; is it misspelt?")
    rows = [(key, "-" if s["value"] is None else s["value"], s["source"], s["variable"]) for key, s in settings.items()]
    file = str(loaded.file) if loaded.file else None
    text = columns([("KEY", "VALUE", "FROM", "VARIABLE"), *rows])
    result({"file": file, "settings": settings}, text, as_json=json)


def _plain(value: object) -> str | int | float | None:
    return value if value is None or isinstance(value, str | int | float) else str(value)
