"""What the user means by MODEL."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from edgewise.errors import SourceError
from edgewise.export.limits import MAX_TOKENS
from edgewise.export.sources.names import NAMES, source
from edgewise.export.work.job import Kind, Source, Task
from edgewise.models.bundle import MANIFEST
from edgewise.models.download import ALIASES, SHIPPED, Progress, fetch
from edgewise.models.store import bundles_dir

PYTHON_NAME: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
LANGUAGE: Final = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True, slots=True)
class Language:
    """A language model: the directory of a bundle or of Hugging Face, or a .gguf file."""

    path: Path
    name: str


def resolved(
    model: str,
    home: Path,
    show: Progress,
    *,
    task: Task | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Source | Language:
    """SourceError for what is none of them; Unreachable where a name must be downloaded and cannot."""
    found = _found(model, home, show)
    if isinstance(found, Language):
        return found
    return replace(found, task=task or found.task, shapes=dict(shapes or {}), max_tokens=max_tokens)


def _found(model: str, home: Path, show: Progress) -> Source | Language:
    if model in NAMES:
        return source(model, home, show)
    if model in ALIASES or model in SHIPPED:
        return Language(fetch(model, home, show).path, model)
    path = Path(model)
    if (bundle := bundles_dir(home) / model / MANIFEST).is_file() and "/" not in model:
        return Language(bundle.parent, model)
    if path.is_dir():
        return _of_directory(path)
    if path.is_file():
        return _of_file(path)
    if PYTHON_NAME.fullmatch(model):
        return Source("torch", model, model.rpartition(":")[2], "classify", search=(str(Path.cwd()),))
    raise SourceError(
        f"there is no model {model!r}",
        hint="give module:attribute, an .onnx, .pt2 or .gguf file, the directory of a bundle, of Hugging Face or of a "
        f"TensorFlow SavedModel, or one of {', '.join([*NAMES, *ALIASES, *SHIPPED])}",
    )


def _of_directory(path: Path) -> Source | Language:
    name = path.resolve().name
    if (path / MANIFEST).is_file():
        return Language(path, name)
    if (path / "saved_model.pb").is_file():
        return Source("savedmodel", str(path.resolve()), name, "classify")
    try:
        config = json.loads((path / "config.json").read_bytes())
        kinds = config.get("architectures") or [""]
    except (OSError, ValueError, AttributeError) as e:
        raise SourceError(
            f"{path} holds no model: {e}", hint="edgewise.json, config.json or saved_model.pb must be in it"
        ) from e
    if str(kinds[0]).endswith(LANGUAGE):
        return Language(path, name)
    return Source("hf", str(path.resolve()), name, "classify")


def _of_file(path: Path) -> Source | Language:
    kinds: dict[str, Kind] = {".onnx": "onnx", ".pt2": "program"}
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return Language(path, path.stem)
    if suffix not in kinds:
        raise SourceError(f"{path} is no model file that we know", hint="known are .onnx, .pt2 and .gguf")
    return Source(kinds[suffix], str(path.resolve()), path.stem, "classify")
