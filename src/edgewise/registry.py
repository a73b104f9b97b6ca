"""Names of engines, and where their classes are. A library is imported when its engine is first used, not before."""

from __future__ import annotations

import importlib
from typing import Any

from edgewise.errors import UsageError

ENGINES = {
    "native": "edgewise.engines.native_lm:NativeLM",
    "onnx": "edgewise.engines.onnx_lm:OnnxLM",
    "llamacpp": "edgewise.engines.llamacpp:LlamaCpp",
    "openai": "edgewise.engines.openai:OpenAI",
}


def engine(name: str) -> Any:
    """The engine's class; to call it is MissingExtra if its library is not installed. UsageError for other names."""
    if name not in ENGINES:
        raise UsageError(f"there is no engine {name!r}; known are {', '.join(ENGINES)}")
    module, attribute = ENGINES[name].split(":")
    return getattr(importlib.import_module(module), attribute)
