"""ONNX for language models: a bundle, whose graphs onnxruntime runs in this process.

It is made by the code of `edgewise pull`, and judged through the engine that serves it, a token at a time.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgewise.engines.base import Row
from edgewise.engines.load import local_model
from edgewise.engines.local import LocalModel
from edgewise.errors import UsageError
from edgewise.export.language.passages import Logits, Passage
from edgewise.export.language.source import LanguageSource, Show
from edgewise.export.work.job import Check, Converted, Coverage, Job, Precision, Proved, write_arrays
from edgewise.models.bundle import MANIFEST, NAME, Bundle
from edgewise.models.model_source import ModelSource
from edgewise.models.source import Recipe, open_source, write_bundle
from edgewise.models.tensors import EMBED, embedding, matrices
from edgewise.models.weights import Dense, Matrix, Quantized

INT8: Final = Recipe("int8", "int8")
BITS: Final = {"int4": 4, "int8": 8}
RECIPES: Final[Mapping[Precision, Recipe]] = {  # of weights and activations
    "fp32": Recipe("exact", "fp32"),
    "int8": INT8,
    "int8-dynamic": INT8,
    "int4": Recipe("int4", "int8"),
}
SESSION: Final = "export"


def convert(source: LanguageSource, precision: Precision, artifact: Path, show: Show) -> Converted:
    """`artifact` is the bundle's directory. In fp32 weights stay what they are in the source, int4 blocks of a GGUF
    file among them: nothing is rounded. Nor is it where a source has as few bits as are asked for."""
    recipe = RECIPES.get(precision)
    if recipe is None:
        raise UsageError(f"a bundle has no {precision}", hint=f"take one of {', '.join(RECIPES)}")
    shutil.rmtree(artifact, ignore_errors=True)
    bundle = source.bundle
    notes: tuple[str, ...] = ()
    if bundle is not None and precision == "fp32":
        _copy(bundle, artifact)
        notes = (f"the bundle as it is: {bundle.weights}",)
    else:
        model = open_source(source.directory if bundle is not None else source.origin)
        model.check()
        if _narrow(model, BITS.get(recipe.weights, 0)):
            recipe = replace(recipe, weights="exact")
            notes = ("the source has no more bits: its weights are as they were",)
        name = artifact.name if NAME.fullmatch(artifact.name) else "exported"
        write_bundle(
            model,
            artifact,
            name=name,
            recipe=recipe,
            origin={"origin": str(source.origin)},
            licence=source.licence,
            notices=source.notices,
            progress=show,
        )
    files = sorted(str(file) for file in artifact.rglob("*") if file.is_file())
    return Converted(str(artifact), tuple(files), notes=notes)


def prove(job: Job, passages: Iterable[Passage]) -> Proved:
    """The bundle at `job.artifact`, read from the disk and checked against its hashes."""
    bundle = Bundle.open(Path(job.artifact))
    passages = tuple(passages)
    seconds: list[float] = []
    logits = asyncio.run(_run(bundle, passages, seconds))
    write_arrays(Path(job.work) / "logits", {str(n): rows for n, rows in enumerate(logits)})
    weights = _weights(bundle)
    wanted = {"int4": "int4", "int8": "int8", "int8-dynamic": "int8"}.get(job.precision)
    small = ("int8", "int4") if wanted == "int8" else ("int4",)
    kept = [f"{name} ({kind})" for name, kind in _kinds(bundle).items() if wanted and kind not in small]
    if wanted == "int4":  # the table of the vocabulary keeps 8 bits: its errors reach every logit
        kept = [one for one in kept if not one.startswith((f"{EMBED} ", "head ")) or "float" in one]
    nodes = _nodes(bundle)
    return Proved(
        level="executed",
        ran=True,
        by=f"onnxruntime {version('onnxruntime')}, CPU",
        coverage=Coverage(nodes, nodes, "onnxruntime CPU"),
        weights=weights,
        skipped=tuple(kept),
        checks=(Check("loads", True, f"{len(bundle.manifest.files)} files with the hashes of their manifest"),),
        latency_ms=tuple(1e3 * one for one in seconds),
    )


async def _run(bundle: Bundle, passages: tuple[Passage, ...], seconds: list[float]) -> list[Logits]:
    longest = max(len(passage.ids) for passage in passages)
    model = local_model(bundle, runtime="onnxruntime", slots=1, context=longest)
    try:
        return [await _decoded(model, passage, seconds) for passage in passages]
    finally:
        await model.shutdown()


async def _decoded(model: LocalModel[Any], passage: Passage, seconds: list[float]) -> Logits:
    """float32 [steps, vocab]: the prompt at once, then a token at a time over the cache."""
    await model.open(SESSION, len(passage.ids))
    if passage.start > 1:
        prompt = np.array(passage.ids[: passage.start - 1], np.int64)
        await model.forward([Row(SESSION, 0, prompt, want=0)])
    rows = []
    for step in range(passage.steps):
        started = time.perf_counter()
        row = Row(SESSION, passage.start - 1 + step, np.array([passage.read(step)], np.int64))
        (logits,) = await model.forward([row])
        seconds.append(time.perf_counter() - started)
        rows.append(np.array(logits[0], np.float32))
    await model.close(SESSION)
    return np.stack(rows)


def _narrow(model: ModelSource, bits: int) -> bool:
    """Whether every matrix of its layers has no more bits as it is."""
    layers = (model.layer(n) for n in range(model.card.layers))
    matrices = (one for layer in layers for one in (getattr(layer, field.name) for field in fields(layer)))
    return all(not isinstance(one, Dense) and (not isinstance(one, Quantized) or one.bits <= bits) for one in matrices)


def _copy(bundle: Bundle, directory: Path) -> None:
    for file in (MANIFEST, *bundle.manifest.files):
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / file, directory / file)


def _matrices(bundle: Bundle) -> dict[str, Matrix]:
    found = dict(matrices(bundle))
    found.setdefault(EMBED, embedding(bundle))
    return found


def _kinds(bundle: Bundle) -> dict[str, str]:
    return {name: _kind(matrix) for name, matrix in _matrices(bundle).items()}


def _weights(bundle: Bundle) -> dict[str, int]:
    """Bytes by number type; the scales of blocks are not counted."""
    found: Counter[str] = Counter()
    for matrix in _matrices(bundle).values():
        found[_kind(matrix)] += matrix.packed.nbytes if isinstance(matrix, Quantized) else matrix.values.nbytes
    return dict(found)


def _kind(matrix: Matrix) -> str:
    return f"int{matrix.bits}" if isinstance(matrix, Quantized) else str(matrix.values.dtype)


def _nodes(bundle: Bundle) -> int:
    import onnx

    graphs = bundle.manifest.graphs
    files = (graphs.embed, *(block.file for block in graphs.blocks), graphs.head)
    return sum(len(onnx.load(bundle.file(file), load_external_data=False).graph.node) for file in files)
