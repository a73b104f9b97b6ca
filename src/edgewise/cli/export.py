"""`edgewise export`: a model in other runtimes' formats, each with proof."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from edgewise.cli.options import (
    AcceptLicence,
    Artifacts,
    Config,
    Debug,
    Inputs,
    Json,
    MaxDrop,
    MemoryLimit,
    Shape,
    StepThreads,
    Strict,
    TimeLimit,
    shapes_of,
)
from edgewise.cli.output import columns, megabytes, progress, result
from edgewise.errors import UsageError
from edgewise.export.limits import BOUNDS, MAX_TOKENS, THREADS, Bounds
from edgewise.settings import load

REFUSED, FAILED = "refused", "failed"

Calibration = Annotated[
    Path | None,
    typer.Option(metavar="DATA", help="inputs to calibrate int8 with  [default: 64 of the inputs, kept back]"),
]
Mean = Annotated[str | None, typer.Option(metavar="R,G,B", help="of pixels in 0..1, for photos")]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help="of pixels in 0..1, for photos")]
TaskOf = Annotated[
    str | None, typer.Option(metavar="T", help="classify, embed or numbers  [default: what the model is]")
]
MaxTokens = Annotated[int, typer.Option(min=1, metavar="N", help="to which texts are padded")]


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="module:attribute, an .onnx, .pt2 or .gguf file, a model directory, a bundle, or a name",
        ),
    ],
    to: Annotated[
        str, typer.Option(metavar="A,B,C", help="of onnx, litert, coreml, tensorrt, qnn; litert:int8 for one")
    ],
    output: Artifacts,
    inputs: Inputs = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="P,Q", help="fp32, fp16, int8, int8-dynamic, int4  [default: each target's own]"),
    ] = None,
    max_drop: MaxDrop = None,
    strict: Strict = False,
    calibration: Calibration = None,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="prove this artifact instead of converting: one target")
    ] = None,
    shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    task: TaskOf = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    option: Annotated[
        list[str] | None, typer.Option(metavar="TARGET.KEY=VALUE", help="of one target; docs/export.md lists them")
    ] = None,
    time_limit: TimeLimit = BOUNDS.seconds,
    memory_limit: MemoryLimit = BOUNDS.memory_gb,
    threads: StepThreads = THREADS,
    accept_licence: AcceptLicence = False,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a model to other runtimes' formats, prove on real inputs what each file does, and refuse what lost too
    much. Exit code 1 if one is refused, 3 if one cannot be made."""
    from edgewise.export.order import Asked, exported

    asked = Asked(
        model=model,
        to=to,
        output=output,
        data=inputs,
        precision=precision,
        max_drop=max_drop,
        strict=strict,
        calibration=calibration,
        checked=check,
        shapes=shapes_of(shape),
        preprocessing=preprocessing_of(mean, std),
        task=task_of(task),
        max_tokens=max_tokens,
        options=_options(option),
        bounds=Bounds(time_limit, memory_limit),
        threads=threads,
        accept_licence=accept_licence,
    )
    with ended_alike(), progress() as show:
        facts = exported(asked, load(config=config).settings.home, show)
    finish(facts, text(facts, output), json=json)


@contextmanager
def ended_alike() -> Iterator[None]:
    """A closed terminal and `kill` end a run as Ctrl-C does: with its processes, and without what is half made."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    taken = [one for one in (getattr(signal, name) for name in names) if signal.getsignal(one) == signal.SIG_DFL]
    for one in taken:
        signal.signal(one, stop)
    try:
        yield
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)


def finish(facts: Mapping[str, Any], said: str, *, json: bool) -> None:
    """Prints what was found and ends with the exit code that it has."""
    result(facts, said, as_json=json)
    statuses = {one["status"] for one in facts["targets"].values()}
    if REFUSED in statuses:
        raise typer.Exit(1)
    if FAILED in statuses:
        raise typer.Exit(3)


def text(facts: Mapping[str, Any], output: Path) -> str:
    """A line per artifact, and beneath them why something was refused or failed, and what the figures stand on."""
    rows = [("target", "precision", "status", "level", "size", "drop", "top-1 agreement", "on the accelerator", "file")]
    said = []
    for key, one in facts["targets"].items():
        rows.append((key, *_row(one, output)))
        said += [f"{key}: {line}" for line in _reasons(one)]
    return "\n".join([columns(rows), *said, *_basis(facts), f"report: {output / 'report.html'}"])


def _basis(facts: Mapping[str, Any]) -> list[str]:
    """What a drop is, and of which rows."""
    data = facts["data"]
    drops = [one["drop"] for one in facts["targets"].values() if one["drop"]]
    lines = [f"drop: {drops[0]['metric']} over {drops[0]['n']} rows, with its 95 % interval"] if drops else []
    if data["random"]:
        lines.append("no --inputs: noise was compared, which proves numbers and no accuracy")
    elif data.get("calibration_shared") and any(one["precision"] == "int8" for one in facts["targets"].values()):
        lines.append("the rows that calibrate int8 are judged on too: give 264 or more, or --calibration")
    return lines


def _row(one: Mapping[str, Any], output: Path) -> tuple[str, ...]:
    coverage, drop = one["coverage"], one["drop"]
    parity = one["parity"] or one["interpreted"] or {}
    agreement = parity.get("top1_agreement")
    return (
        one["precision"],
        one["status"],
        one["level"],
        "-" if one["bytes"] is None else megabytes(one["bytes"]),
        "-" if drop is None else f"{drop['point']:.2%} [{drop['low']:.2%}, {drop['high']:.2%}]",
        "-" if agreement is None else f"{agreement:.2%}",
        "-" if coverage is None else f"{coverage['accelerated']} of {coverage['nodes']}",
        "-" if one["path"] is None else _within(output, Path(one["path"])),
    )


def _within(output: Path, path: Path) -> str:
    return str(path.relative_to(output.absolute())) if path.is_relative_to(output.absolute()) else str(path)


def _reasons(one: Mapping[str, Any]) -> list[str]:
    if one["error"] is not None:
        hint = one["error"]["hint"]
        return [one["error"]["message"] + (f" ({hint})" if hint else "")]
    lines = [f"{check['name']}: {check['detail']}" for check in one["checks"] or () if not check["ok"]]
    where = one["where"]
    if where:
        lines.append(f"where: {where.get('words') or where['unknown']}")
    return lines


def preprocessing_of(mean: str | None, std: str | None) -> dict[str, Any]:
    if (mean is None) != (std is None):
        raise UsageError("--mean and --std belong together", hint="give both: of pixels in 0..1")
    return {} if mean is None or std is None else {"mean": _channels("--mean", mean), "std": _channels("--std", std)}


def _channels(flag: str, given: str) -> list[float]:
    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        found = []
    if len(found) != 3 or (flag == "--std" and min(found) <= 0):
        raise UsageError(f"{flag} is {given!r}", hint="three numbers: 0.485,0.456,0.406")
    return found


def task_of(given: str | None) -> Any:
    if given not in (None, "classify", "embed", "numbers"):
        raise UsageError(f"--task is {given!r}", hint="classify, embed and numbers are allowed")
    return given


def _options(given: list[str] | None) -> dict[str, dict[str, Any]]:
    import json

    found: dict[str, dict[str, Any]] = {}
    for one in given or ():
        name, _, value = one.partition("=")
        target, _, key = name.partition(".")
        if not (target and key and value):
            raise UsageError(f"--option is {one!r}", hint="write TARGET.KEY=VALUE: coreml.target=iOS18")
        try:
            found.setdefault(target, {})[key] = json.loads(value)
        except ValueError:
            found.setdefault(target, {})[key] = value
    return found
