"""From what a user names to a Generator that runs it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from edgewise import registry
from edgewise.engines.base import Generator
from edgewise.engines.decode import Decoder
from edgewise.engines.local import LocalModel
from edgewise.errors import SourceError, UsageError
from edgewise.models.bundle import Bundle
from edgewise.models.store import find
from edgewise.models.tokenizer import Tokenizer
from edgewise.settings import Mode, ModelSettings, Runtime

Chosen = Literal["native", "onnxruntime"]
DEFAULTS = ModelSettings()


def open_generator(
    spec: str,
    *,
    home: Path,
    runtime: Runtime = DEFAULTS.runtime,
    mode: Mode = DEFAULTS.mode,
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
    bundle = find(spec, home, check=False)  # what is read is verified
    model, tokenizer = loaded(bundle, runtime=runtime, mode=mode, slots=slots, context=context)
    return Decoder(model, tokenizer, name=bundle.name)


def loaded(
    bundle: Bundle,
    *,
    runtime: Runtime = DEFAULTS.runtime,
    mode: Mode = DEFAULTS.mode,
    slots: int = DEFAULTS.slots,
    context: int | None = DEFAULTS.context,
) -> tuple[LocalModel[Any], Tokenizer]:
    """The bundle's model and tokenizer, each of which takes as long to load as the other, side by side."""
    with ThreadPoolExecutor(1) as aside:
        tokenizer = aside.submit(_tokenizer, bundle)
        return local_model(bundle, runtime=runtime, mode=mode, slots=slots, context=context), tokenizer.result()


def _tokenizer(bundle: Bundle) -> Tokenizer:
    bundle.verify(name for name in bundle.manifest.files if "/" not in name)
    return Tokenizer.open(bundle.path)


def local_model(
    bundle: Bundle,
    *,
    runtime: Runtime = DEFAULTS.runtime,
    mode: Mode = DEFAULTS.mode,
    slots: int = DEFAULTS.slots,
    context: int | None = DEFAULTS.context,
) -> LocalModel[Any]:
    """The bundle on the runtime that `chosen_runtime` says. The native kernels are `stable` in either mode."""
    native = chosen_runtime(bundle, runtime) == "native"
    arguments = {"slots": slots, "context": context} if native else {"slots": slots, "context": context, "mode": mode}
    model: LocalModel[Any] = registry.engine("native" if native else "onnx")(bundle, **arguments)
    return model


def chosen_runtime(bundle: Bundle, runtime: Runtime = DEFAULTS.runtime) -> Chosen:
    """The native kernels where they can run the bundle, else onnxruntime; `runtime` insists on one of them. UsageError
    if the native ones are wanted and cannot."""
    reason = None if runtime == "onnxruntime" else registry.engine("native").why_not(bundle)
    if runtime == "native" and reason is not None:
        raise UsageError(
            f"the native kernels cannot run {bundle.name}: {reason}", hint="take the runtime auto or onnxruntime"
        )
    return "onnxruntime" if runtime == "onnxruntime" or reason is not None else "native"


def kv_bytes_per_token(bundle: Bundle, runtime: Runtime = DEFAULTS.runtime) -> int:
    """Bytes of keys and values that one position takes."""
    engine = registry.engine("native" if chosen_runtime(bundle, runtime) == "native" else "onnx")
    return int(bundle.card.kv_values_per_token * engine.KV_BYTES)


def _generator(engine: str, *args: object, **kwargs: object) -> Generator:
    made: Generator = registry.engine(engine)(*args, **kwargs)
    return made


def _file(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not path.is_file():
        raise SourceError(f"there is no file {path}", hint="give the path of a .gguf file, or the name of a bundle")
    return path
