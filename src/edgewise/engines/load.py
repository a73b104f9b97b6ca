"""From what a user names to a Generator that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgewise import registry
from edgewise.engines.base import Generator
from edgewise.engines.decode import Decoder
from edgewise.errors import SourceError
from edgewise.models.store import find
from edgewise.models.tokenizer import Tokenizer
from edgewise.settings import ModelSettings

DEFAULTS = ModelSettings()


def open_generator(
    spec: str,
    *,
    home: Path,
    mode: Literal["fast", "stable"] = DEFAULTS.mode,
    slots: int = DEFAULTS.slots,
    context: int | None = DEFAULTS.context,
) -> Generator:
    """`spec` is the name or directory of a bundle, a .gguf file (run by llama.cpp), or the http(s) address of an
    OpenAI-compatible server; the other arguments hold where the model runs here. Whoever calls this closes it.
    UnknownModel, SourceError, BundleError or MissingExtra say why it cannot be opened."""
    if spec.lower().startswith(("http://", "https://")):
        return _generator("openai", spec)
    if spec.lower().endswith(".gguf"):
        return _generator("llamacpp", _file(spec), slots=slots, context=context)
    bundle = find(spec, home)
    model = registry.engine("onnx")(bundle, mode=mode, slots=slots, context=context)
    return Decoder(model, Tokenizer.open(bundle.path), name=bundle.name)


def _generator(engine: str, *args: object, **kwargs: object) -> Generator:
    made: Generator = registry.engine(engine)(*args, **kwargs)
    return made


def _file(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not path.is_file():
        raise SourceError(f"there is no file {path}", hint="give the path of a .gguf file, or the name of a bundle")
    return path
