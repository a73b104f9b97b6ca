"""A language model as the user names it, made a Hugging Face directory, which every converter reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewise.models import hf_weights
from edgewise.models.bundle import MANIFEST, Bundle
from edgewise.models.card import Card
from edgewise.models.from_hf import HuggingFaceSource
from edgewise.models.source import agreed
from edgewise.models.store import find
from edgewise.models.tokenizer import Tokenizer

Show = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LanguageSource:
    """`directory` is the Hugging Face directory; `origin` what it was made of: itself, a .gguf file, or a bundle's
    directory. `licence` is what manifests say of it."""

    name: str
    origin: Path
    directory: Path
    card: Card
    tokenizer: Tokenizer
    licence: dict[str, Any]
    notices: Path | None

    @property
    def bundle(self) -> Bundle | None:
        return Bundle.open(self.origin, check=False) if (self.origin / MANIFEST).is_file() else None


def opened(
    source: str | Path, *, home: Path, work: Path, name: str | None = None, accept_licence: bool = False
) -> LanguageSource:
    """`source` is a .gguf file, a Hugging Face directory or a bundle, by its directory or its name. `work` is a
    directory for what has to be written.

    SourceError, BundleError, UnknownModel; UnsupportedModel for a model that no llama, qwen2 or qwen3 of transformers
    is like, unless it comes as a Hugging Face directory; LicenceError for terms that were not accepted."""
    path = Path(source).expanduser()
    if not path.exists():
        path = find(str(source), home, check=False).path
    weights = hf_weights.of(path)
    licence = agreed(weights.licence, accept_licence)
    if path.is_dir() and not (path / MANIFEST).is_file():
        directory = path.resolve()
    else:
        directory = hf_weights.write(weights, work / "model")
    return LanguageSource(
        name=name or weights.name,
        origin=path.resolve(),
        directory=directory,
        card=HuggingFaceSource(directory).card,
        tokenizer=weights.tokenizer.opened(),
        licence=licence,
        notices=weights.notices,
    )
