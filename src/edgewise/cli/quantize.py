"""`edgewise quantize`: smaller weights, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgewise.cli.options import Config, Debug, Json
from edgewise.cli.output import columns, megabytes, progress, result
from edgewise.errors import UsageError
from edgewise.settings import load

if TYPE_CHECKING:
    from edgewise.compress.quantize.bundle import Quantization
    from edgewise.compress.quantize.qdq import NetQuantization

NETS: dict[str, Literal[8, 16]] = {"qdq-int8": 8, "qdq-int16": 16}  # bits of activations


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="a bundle, a model directory, a .gguf or an .onnx file")
    ],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="R", help="int8, int4, int4-gptq, mixed or a .toml; of an .onnx file qdq-int8 or qdq-int16"
        ),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="NAME|DIR", help="what to call the bundle, or where to put it")
    ],
    budget: Annotated[
        int | None, typer.Option(min=1, metavar="BYTES", help="of the whole bundle, for recipes that choose precisions")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="a text to calibrate and judge on, else the model writes one; of an .onnx file an .npz of inputs",
        ),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL of questions with `gold`, to ask both models: see evaluate --tasks"),
    ] = None,
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="accept terms that ask for it")] = False,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a model's weights smaller by a recipe, and say what it costs: size, KL divergence, agreement, perplexity."""
    if recipe in NETS or model.lower().endswith(".onnx"):
        given = {"--budget": budget, "--tasks": tasks, "--accept-licence": accept_licence or None}
        wrong = [flag for flag, value in given.items() if value is not None]
        _net(model, recipe, Path(output), calibration, wrong, json)
        return
    from edgewise.compress.judge.tasks import read
    from edgewise.compress.judge.texts import text
    from edgewise.compress.quantize.bundle import quantize as made
    from edgewise.compress.quantize.recipe import of

    chosen = of(recipe)
    questions = () if tasks is None else read(tasks)
    with progress() as show:
        found = made(
            model,
            output,
            chosen,
            home=load(config=config).settings.home,
            recipe_name=Path(recipe).stem,
            text=None if calibration is None else text(calibration),
            budget_bytes=budget,
            accept_licence=accept_licence,
            tasks=questions,
            show=show,
        )
    facts = _facts(found)
    result(facts, _text(facts), as_json=json)


def _net(model: str, recipe: str, output: Path, calibration: Path | None, wrong: list[str], json: bool) -> None:
    from edgewise.compress.judge.nets import read_inputs
    from edgewise.compress.quantize.qdq import quantize_net

    if recipe not in NETS or not model.lower().endswith(".onnx"):
        raise UsageError(f"the recipe {recipe!r} is not for {model}", hint=f"{' and '.join(NETS)} are for .onnx files")
    if wrong:
        raise UsageError(
            f"{model} is an .onnx file, and {wrong[0]} is not for one", hint="it has --recipe, --calibration and -o"
        )
    if calibration is None:
        raise UsageError("an .onnx file needs calibration data", hint="give --calibration FILE.npz, an array per input")
    if output.suffix.lower() != ".onnx":
        raise UsageError(f"-o is {str(output)!r}", hint="give the path of an .onnx file")
    with progress() as show:
        found = quantize_net(Path(model), output, read_inputs(calibration), activation_bits=NETS[recipe], show=show)
    facts = _net_facts(found)
    result(facts, columns([*facts.items()]), as_json=json)


def _facts(found: Quantization) -> dict[str, Any]:
    from edgewise.compress.quantize.bundle import figures

    bundle = found.bundle
    return {
        "name": bundle.name,
        "path": str(bundle.path),
        "bytes": bundle.bytes,
        "bytes_source": found.bytes_source,
        **figures(found.judgement, found.accuracy),
        "matrices": found.precisions,
    }


def _text(facts: dict[str, Any]) -> str:
    kinds = list(facts["matrices"].values())
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    rows = [
        ("path", facts["path"]),
        ("size", f"{megabytes(facts['bytes'])}, the source's {megabytes(facts['bytes_source'])}"),
        ("KL to the source", f"{facts['kl_mean']:.4f} nats, p99 {facts['kl_p99']:.4f}"),
        ("same first choice", f"{facts['top1_agreement']:.1%}"),
        ("perplexity", f"{facts['perplexity']:.3f}, the source's {facts['perplexity_source']:.3f}"),
        *_solved(facts["tasks"]),
        ("matrices", counts),
    ]
    return columns(rows)


def _solved(tasks: dict[str, Any] | None) -> list[tuple[str, str]]:
    if tasks is None:
        return []
    return [("accuracy", f"{tasks['accuracy']:.1%} of {tasks['n']} tasks, the source's {tasks['accuracy_source']:.1%}")]


def _net_facts(found: NetQuantization) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "bytes": found.bytes,
        "bytes_source": found.bytes_source,
        "calibrated_on": found.calibrated_on,
        "inputs": found.inputs,
        "max_abs": found.max_abs,
        "cosine": found.cosine,
        "top1_agreement": found.top1_agreement,
    }
