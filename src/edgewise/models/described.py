"""The outline of whatever a user names: a bundle, a .gguf, a Hugging Face directory or config.json, or words such as
"Llama-3.2-1B" and "7B llama-like"."""

from __future__ import annotations

from pathlib import Path

from edgewise.models.known import of_words
from edgewise.models.outline import Outline


def described(source: str, home: Path | None = None) -> Outline:
    """The outline of what the user names: a bundle (its directory, or its name under `home`), a .gguf file, a Hugging
    Face directory or config.json, else words. SourceError or UsageError."""
    path = Path(source)
    if home is not None and path.name == source and (home / "bundles" / source).is_dir():
        path = home / "bundles" / source
    if path.suffix.lower() in {".gguf", ".json"} or path.is_dir():
        from edgewise.models.outline_files import of_path  # its readers take longer to import than a plan to make

        return of_path(path)
    return of_words(source)
