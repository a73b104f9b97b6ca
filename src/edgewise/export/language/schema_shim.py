"""litert-torch imports tensorflow for one module, the schema of its files, which ai_edge_litert has as well."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

SCHEMA = "schema_py_generated"


def install() -> None:
    """In this process, unless tensorflow itself is here."""
    if find_spec("tensorflow") is not None:
        return
    place = ""
    for name in ("tensorflow", "lite", "python"):
        place = f"{place}.{name}" if place else name
        module: Any = ModuleType(place)
        module.__path__ = []
        module.__spec__ = ModuleSpec(place, None, is_package=True)  # libraries that look for it ask for its spec
        sys.modules[place] = module
    schema = importlib.import_module(f"ai_edge_litert.{SCHEMA}")
    sys.modules[f"{place}.{SCHEMA}"] = schema
    setattr(sys.modules[place], SCHEMA, schema)
