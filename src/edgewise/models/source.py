"""`pull`: a name, a path or a Hub id becomes a bundle in the store."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from edgewise.errors import LicenceError, SourceError, UsageError
from edgewise.models import download
from edgewise.models.blocks import BlockWriter, Layer
from edgewise.models.bundle import MANIFEST, NAME, BlockEntry, Bundle, Graphs, write_manifest
from edgewise.models.download import Progress
from edgewise.models.from_gguf import GGUFSource
from edgewise.models.from_hf import HuggingFaceSource
from edgewise.models.licence import NOTICES, is_permissive
from edgewise.models.model_source import ModelSource
from edgewise.models.store import bundles_dir, making
from edgewise.models.weights import Matrix, requantize

LAYERS_PER_BLOCK = 6  # measured in docs/performance.md; 1..all give the same numbers
REQUANTIZE_BITS = {"int4": 4, "int8": 8}

Weights = Literal["exact", "int4", "int8"]
Activations = Literal["int8", "fp32"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a bundle is made from its source."""

    weights: Weights = "exact"
    activations: Activations = "int8"
    layers_per_block: int = LAYERS_PER_BLOCK


def pull(
    source: str,
    *,
    home: Path,
    name: str | None = None,
    requantize: Literal["int4", "int8"] | None = None,
    activations: Activations = "int8",
    layers_per_block: int = LAYERS_PER_BLOCK,
    accept_licence: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Make a bundle of `source`: an alias (`smollm2-135m`), a .gguf file, a Hugging Face directory, a Hub id
    (`owner/name`, `owner/name:file.gguf`), or a bundle, which is copied. An existing bundle of that name is replaced
    once the new one is whole.

    SourceError, UnsupportedModel, LicenceError; Unreachable if a download fails; BundleError or HashMismatch for a
    bundle that is damaged."""
    report = progress or (lambda what, done, total: None)
    fetched = download.fetch(source, home, report)
    if name is None:
        name = fetched.name + (f"-{requantize}" if requantize else "")
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no bundle name", hint="letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    if layers_per_block < 1:
        raise UsageError(f"layers_per_block is {layers_per_block}; at least 1 is needed")
    recipe = Recipe(requantize or "exact", activations, layers_per_block)
    if (fetched.path / MANIFEST).is_file():
        return _copied(fetched.path, name, home, recipe, accept_licence)
    model = open_source(fetched.path)
    model.check()
    licence = agreed(fetched.licence or model.licence_id, accept_licence)
    with making(name, home) as work:
        write_bundle(
            model,
            work,
            name=name,
            recipe=recipe,
            origin=fetched.origin,
            licence=licence,
            notices=fetched.notices,
            progress=report,
        )
    return Bundle.open(bundles_dir(home) / name, check=False)


def open_source(path: Path) -> ModelSource:
    """The reader for a file or directory. SourceError if it is none that we know."""
    if path.is_dir():
        return HuggingFaceSource(path)
    with path.open("rb") as f:
        magic = f.read(4)
    if magic == b"GGUF":
        return GGUFSource(path)
    raise SourceError(
        f"{path} is no model that we know: it begins with {magic!r}",
        hint="give a .gguf file, or a directory with config.json and .safetensors files",
    )


def write_bundle(
    model: ModelSource,
    directory: Path,
    *,
    name: str,
    recipe: Recipe,
    origin: dict[str, Any],
    licence: dict[str, Any],
    notices: Path | None,
    progress: Progress,
    quantized: Mapping[str, Any] | None = None,
) -> None:
    """Write all files of a bundle into a new directory, the manifest last. `notices` is the directory whose licence
    files the bundle carries, `quantized` what its manifest says of weights that were quantized before."""
    blocks = directory / "blocks"
    blocks.mkdir(parents=True)
    model.write_tokenizer(directory)
    graphs = _write_graphs(model, blocks, recipe, progress)
    if notices is not None:
        for file in (file for pattern in NOTICES for file in notices.glob(pattern)):
            shutil.copyfile(file, directory / file.name)
    write_manifest(
        directory,
        name=name,
        card=model.card.to_json(),
        graphs=graphs,
        source={"kind": model.kind, **origin},
        licence=licence,
        quantization={
            "source": dict(model.types),
            "weights": recipe.weights,
            "activations": recipe.activations,
            **(quantized or {}),
        },
        parity={},
        tools={"edgewise": version("edgewise"), "onnx": version("onnx"), "python": platform.python_version()},
    )


def _write_graphs(model: ModelSource, directory: Path, recipe: Recipe, progress: Progress) -> Graphs:
    layers, step = model.card.layers, recipe.layers_per_block
    writer = BlockWriter(model.card, directory, int8_activations=recipe.activations == "int8")
    head = model.head()
    # The vocabulary table keeps at least 8 bits: its rounding errors reach every logit directly.
    weigh = _weigher(recipe.weights)
    coarse = "int8" if recipe.weights == "int4" else recipe.weights
    table = _weigher(coarse)
    writer.vocabulary(table(model.embed()), model.norm(), None if head is None else table(head))
    entries = []
    for number, first in enumerate(range(0, layers, step)):
        last = min(first + step, layers) - 1
        progress("writing blocks", first, layers)
        chunk = [_reweigh(model.layer(n), weigh) for n in range(first, last + 1)]
        entries.append(BlockEntry(f"blocks/{writer.block(number, first, chunk)}", first, last))
    progress("writing blocks", layers, layers)
    return Graphs(embed="blocks/embed.onnx", blocks=tuple(entries), head="blocks/head.onnx")


def _weigher(weights: Weights) -> Callable[[Matrix], Matrix]:
    if weights == "exact":
        return lambda matrix: matrix
    bits = REQUANTIZE_BITS[weights]
    return lambda matrix: requantize(matrix, bits)


def _reweigh(layer: Layer, weigh: Callable[[Matrix], Matrix]) -> Layer:
    return replace(
        layer,
        q=weigh(layer.q),
        k=weigh(layer.k),
        v=weigh(layer.v),
        o=weigh(layer.o),
        gate=weigh(layer.gate),
        up=weigh(layer.up),
        down=weigh(layer.down),
    )


def _copied(directory: Path, name: str, home: Path, recipe: Recipe, accept_licence: bool) -> Bundle:
    """The bundle of a directory in the store, verified there."""
    if recipe != Recipe():
        raise UsageError(
            f"{directory.name} is a bundle already: it is copied as it is",
            hint="`edgewise quantize` makes a smaller one of it",
        )
    bundle = Bundle.open(directory, check=False)
    agreed(bundle.manifest.licence.get("id"), accept_licence)
    with making(name, home) as work:
        for file in (MANIFEST, *bundle.manifest.files):
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / file, work / file)
        Bundle.open(work)
    return Bundle.open(bundles_dir(home) / name, check=False)


def agreed(licence: str | None, accepted: bool) -> dict[str, Any]:
    """What a manifest says of a licence. Terms that ask for more than attribution must be accepted by name, else
    LicenceError; a model that declares none is the user's own affair."""
    if licence is not None and not is_permissive(licence) and not accepted:
        raise LicenceError(
            f"the model comes under {licence!r}, whose terms you have to accept",
            hint="read them, then pull with --accept-licence",
        )
    return {"id": licence, "accepted": accepted}
