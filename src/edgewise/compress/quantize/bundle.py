"""`quantize`: a bundle of smaller weights, made by a recipe and judged against its source."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import msgspec
import numpy as np

from edgewise.compress.judge.bundles import ANSWER, Judgement, judged
from edgewise.compress.judge.tasks import Accuracy, Task, accuracy
from edgewise.compress.quantize import calibration, mixed
from edgewise.compress.quantize.mixed import Show
from edgewise.compress.quantize.recipe import Precision, Recipe
from edgewise.compress.quantize.rewrite import BundleSource, rewritten
from edgewise.engines import packed
from edgewise.engines.load import local_model
from edgewise.errors import OverBudget, UnknownModel, UsageError
from edgewise.models import download
from edgewise.models.blocks import Layer
from edgewise.models.bundle import MANIFEST, NAME, Bundle
from edgewise.models.licence import NOTICES
from edgewise.models.model_source import ModelSource
from edgewise.models.source import Recipe as Writing
from edgewise.models.source import agreed, open_source, write_bundle
from edgewise.models.store import bundles_dir, find, making
from edgewise.models.tokenizer import Tokenizer
from edgewise.models.weights import Dense, Quantized
from edgewise.types import FloatArray, IdArray

GRAPH_BYTES: Final = 6144  # of a layer's nodes, and of embedding and head together; more than they ever are
VECTOR_BYTES: Final = 1024  # below, a vector stands in its graph


@dataclass(frozen=True, slots=True)
class Quantization:
    """A finished bundle, the precision of each matrix, and how it differs from the source with its own weights and
    float32 activations. `bytes_source` are those of the source itself: a bundle's without its manifest, a .gguf file's,
    or of a directory those of its .safetensors, .json and .jinja files. `accuracy` is None without tasks."""

    bundle: Bundle
    bytes_source: int
    precisions: dict[str, Precision]
    judgement: Judgement
    accuracy: Accuracy | None


@dataclass(frozen=True, slots=True)
class _Source:
    """What is quantized, and what its bundle says of where it came from."""

    model: ModelSource
    bytes: int
    origin: dict[str, Any]
    licence: dict[str, Any]
    notices: Path | None


def quantize(
    source: str,
    output: str,
    recipe: Recipe,
    *,
    home: Path,
    recipe_name: str,
    text: str | None = None,
    budget_bytes: int | None = None,
    accept_licence: bool = False,
    tasks: Sequence[Task] = (),
    show: Show = lambda what, done, total: None,
) -> Quantization:
    """Make the bundle `output`, a name in the store under `home` or the path of a new directory, of a bundle, a .gguf
    file, a Hugging Face directory or whatever else `pull` takes. An existing bundle of that name is replaced once the
    new one is whole, unless it is the source. `text` calibrates where the recipe needs that, and its other windows are
    judged on; without one, the model writes both itself. Both models are asked the `tasks`.

    UsageError for a recipe that does not fit the model or an output that is the source, OverBudget if no choice of
    precisions is small enough; what `pull`, `judged` and `accuracy` raise."""
    name = _free(output)
    there = _opened(source, home, accept_licence, show)
    _check_apart(there.model.path, output, home)
    names = mixed.names(there.model.card)
    asked = recipe.precisions(names)
    budget = budget_bytes or (recipe.mixed.budget_bytes if recipe.mixed else None)
    if budget is None and None in asked.values():
        raise UsageError("this recipe chooses precisions under a budget, and none is given", hint="give --budget BYTES")
    with tempfile.TemporaryDirectory(prefix="quantize-", dir=_directory(home)) as work:
        reference = _reference(there, Path(work) / "reference", show)
        rows, held = _windows(reference, recipe, text, show)
        precisions = _precisions(there, recipe, asked, budget, rows, Path(work), show)
        model = rewritten(there.model, recipe, precisions, rows, show)
        with _place(output, home) as target:
            write_bundle(
                model,
                target,
                name=name,
                recipe=Writing("exact", recipe.activations),
                origin=there.origin,
                licence=there.licence,
                notices=there.notices,
                progress=show,
                quantized={"weights": recipe_name, "recipe": msgspec.to_builtins(recipe), "matrices": precisions},
            )
            bundle = Bundle.open(target, check=False)
            if budget is not None and bundle.bytes > budget:
                raise OverBudget(f"the bundle has {bundle.bytes} bytes; the budget is {budget}")
            found = judged(bundle, reference, held, show=show)
            solved = accuracy(bundle, reference, tasks, max_tokens=ANSWER, show=show) if tasks else None
            _note(target, found, solved)
    return Quantization(_finished(output, home), there.bytes, precisions, found, solved)


def figures(found: Judgement, solved: Accuracy | None = None) -> dict[str, Any]:
    """What a manifest and `--json` say of a judgement, and of tasks if there were any."""
    return {
        "kl_mean": found.kl_mean,
        "kl_p99": found.kl_p99,
        "top1_agreement": found.top1_agreement,
        "perplexity": found.perplexity,
        "perplexity_source": found.perplexity_source,
        "tokens": found.tokens,
        "intervals": found.facts()["intervals"],
        "tasks": None if solved is None else solved.facts(),
    }


def _opened(source: str, home: Path, accept_licence: bool, show: Show) -> _Source:
    try:
        bundle = find(source, home)
    except UnknownModel:
        fetched = download.fetch(source, home, show)
        if not (fetched.path / MANIFEST).is_file():
            return _of_files(fetched, accept_licence)
        bundle = Bundle.open(fetched.path)
        agreed(bundle.manifest.licence.get("id"), accept_licence)
        return _of_bundle(bundle, fetched.name)
    return _of_bundle(bundle, bundle.name)


def _of_files(fetched: download.Fetched, accept_licence: bool) -> _Source:
    model, path = open_source(fetched.path), fetched.path
    model.check()
    licence = agreed(fetched.licence or model.licence_id, accept_licence)
    files = [file for pattern in download.HUB_CHECKPOINT for file in path.glob(pattern)] if path.is_dir() else [path]
    return _Source(model, sum(file.stat().st_size for file in files), fetched.origin, licence, fetched.notices)


def _of_bundle(bundle: Bundle, name: str) -> _Source:
    origin = {"origin": name, "weights": bundle.weights, "source": bundle.manifest.source}
    return _Source(BundleSource(bundle), bundle.bytes, origin, bundle.manifest.licence, bundle.path)


def _reference(there: _Source, directory: Path, show: Show) -> Bundle:
    """The source's own weights, with float32 activations."""
    write_bundle(
        there.model,
        directory,
        name="reference",
        recipe=Writing("exact", "fp32"),
        origin=there.origin,
        licence=there.licence,
        notices=None,
        progress=lambda what, done, total: show("writing the source's blocks", done, total),
    )
    return Bundle.open(directory, check=False)


def _windows(reference: Bundle, recipe: Recipe, text: str | None, show: Show) -> tuple[IdArray, IdArray]:
    """Of token ids, [n, length] each: what is calibrated on, and what is judged on."""
    asked, tokenizer = recipe.calibration, Tokenizer.open(reference.path)
    length = min(asked.length, reference.card.context)
    if text is not None:
        return calibration.of_text(tokenizer, text, asked.windows, length)
    calibrates = recipe.method == "gptq" or recipe.mixed is not None
    count = asked.windows if calibrates else 0
    model = local_model(reference, slots=calibration.AT_ONCE, context=length)
    ids = calibration.written(model, tokenizer, count + calibration.JUDGED, length, show)
    return ids[calibration.JUDGED :], ids[: calibration.JUDGED]


def _precisions(
    there: _Source,
    recipe: Recipe,
    asked: Mapping[str, Precision | None],
    budget: int | None,
    rows: IdArray,
    work: Path,
    show: Show,
) -> dict[str, Precision]:
    """Those of the recipe, and for the rest the best under the budget."""
    fixed = {name: precision for name, precision in asked.items() if precision is not None}
    wanted = [name for name in asked if name not in fixed]
    if not wanted or recipe.mixed is None or budget is None:
        return fixed
    some = calibration.spread(rows, recipe.mixed.windows)[:, : recipe.mixed.length]
    options = mixed.options(there.model, some, recipe.mixed.choices, wanted, show)
    room = budget - _overhead(there, work) - sum(_bytes(there.model, name, fixed[name]) for name in fixed)
    found = mixed.chosen(options, room)
    if found is None:
        least = budget - room + sum(min(option.bytes for option in those) for those in options.values())
        raise OverBudget(
            f"the budget is {budget} bytes; with these choices the bundle has {least} at least",
            hint="give more, or choices with fewer bits",
        )
    return {name: fixed[name] if name in fixed else found[name].precision for name in asked}


def _overhead(there: _Source, work: Path) -> int:
    """Bytes of a bundle that are no matrices: tokenizer, licences, norms, biases, graphs."""
    model, papers = there.model, work / "papers"
    papers.mkdir()
    model.write_tokenizer(papers)
    files = [*papers.iterdir()]
    if there.notices is not None:
        files += [file for pattern in NOTICES for file in there.notices.glob(pattern)]
    vectors = [model.norm()]
    for n in range(model.card.layers):
        vectors += _vectors(model.layer(n))
    sizes = [v.nbytes if v.nbytes < VECTOR_BYTES else mixed.pages(v.nbytes) for v in vectors]
    return sum(file.stat().st_size for file in files) + sum(sizes) + GRAPH_BYTES * (model.card.layers + 1)


def _vectors(layer: Layer) -> list[FloatArray]:
    """A layer's norms and biases."""
    found: list[FloatArray] = []
    for field in fields(layer):
        value = getattr(layer, field.name)
        if not isinstance(value, Quantized | Dense) and value is not None:
            found += [value] if isinstance(value, np.ndarray) else value
    return found


def _bytes(model: ModelSource, name: str, precision: Precision) -> int:
    found = mixed.parts(model, name)
    if precision == "exact":
        return mixed.exact_bytes(found)
    return mixed.matrix_bytes((sum(part.shape[0] for part in found), found[0].shape[1]), precision)


@contextmanager
def _place(output: str, home: Path) -> Iterator[Path]:
    """The path of a directory to be made, which becomes the bundle `output` when the block ends."""
    if _named(output):
        with making(output, home) as work:
            yield work
        return
    target = Path(output)
    work = target.with_name(f".{target.name}.partial")
    rmtree(work, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield work
        work.rename(target)
    finally:
        rmtree(work, ignore_errors=True)


def _named(output: str) -> bool:
    return NAME.fullmatch(output) is not None


def _free(output: str) -> str:
    """What the bundle is called in its manifest. UsageError if it cannot be called so, or its directory is there."""
    name = output if _named(output) else Path(output).name
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no bundle name", hint="letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    if not _named(output) and Path(output).exists():
        raise UsageError(f"{output} is there already", hint="take another directory, or remove that one")
    return name


def _check_apart(source: Path, output: str, home: Path) -> None:
    target = bundles_dir(home) / output
    if _named(output) and target.exists() and target.samefile(source):
        raise UsageError(f"{output} is the bundle that is quantized", hint="give the new one a name of its own")


def _finished(output: str, home: Path) -> Bundle:
    return Bundle.open(bundles_dir(home) / output if _named(output) else Path(output), check=False)


def _note(directory: Path, found: Judgement, solved: Accuracy | None) -> None:
    """The figures into the manifest of a bundle that is whole but for them. What the engine packed beside it goes: it
    fits the manifest of before."""
    for file in directory.glob(f"{packed.DATA}*"):
        file.unlink()
    (directory / packed.INDEX).unlink(missing_ok=True)
    path = directory / MANIFEST
    manifest = Bundle.open(directory, check=False).manifest
    noted = msgspec.structs.replace(manifest, parity=figures(found, solved))
    path.write_bytes(msgspec.json.format(msgspec.json.encode(noted), indent=1) + b"\n")


def _directory(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
