"""`edgewise optimize`: what a platform wants, made and proved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgewise.cli import export
from edgewise.cli.export import (
    Calibration,
    MaxTokens,
    Mean,
    Std,
    TaskOf,
    ended_alike,
    finish,
    preprocessing_of,
    task_of,
)
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
from edgewise.cli.output import note, progress
from edgewise.export.limits import BOUNDS, MAX_TOKENS, THREADS, Bounds
from edgewise.settings import load


def optimize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="as `edgewise export` takes it")],
    platform: Annotated[
        str, typer.Option(metavar="P", help="android, android-int8, ios, ios-palettized, embedded, or a preset's .toml")
    ],
    output: Artifacts,
    inputs: Inputs = None,
    device: Annotated[
        str | None, typer.Option(metavar="D", help="of `edgewise devices`: adds what that one can run")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="B", help="one of the preset's: litert, nnapi, xnnpack …")
    ] = None,
    max_drop: MaxDrop = None,
    strict: Strict = False,
    calibration: Calibration = None,
    shape: Shape = None,
    mean: Mean = None,
    std: Std = None,
    task: TaskOf = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    time_limit: TimeLimit = BOUNDS.seconds,
    memory_limit: MemoryLimit = BOUNDS.memory_gb,
    threads: StepThreads = THREADS,
    accept_licence: AcceptLicence = False,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a model by a platform's preset. Exit code 1 if an artifact is refused, 3 if one cannot be made."""
    from edgewise.export.order import Asked
    from edgewise.toolchain import optimized

    asked = Asked(
        model=model,
        to="",
        output=output,
        data=inputs,
        max_drop=max_drop,
        strict=strict,
        calibration=calibration,
        shapes=shapes_of(shape),
        preprocessing=preprocessing_of(mean, std),
        task=task_of(task),
        max_tokens=max_tokens,
        bounds=Bounds(time_limit, memory_limit),
        threads=threads,
        accept_licence=accept_licence,
    )
    with ended_alike(), progress() as show:
        home = load(config=config).settings.home
        facts = optimized(asked, platform, home, device=device, backend=backend, show=show)
    for warning in facts["warnings"]:
        note(warning)
    finish(facts, text(facts, output), json=json)


def text(facts: Mapping[str, Any], output: Path) -> str:
    """The platform's choice and its advice, above and beneath what `export` says."""
    on = f" on {facts['device']}" if facts["device"] else ""
    order = f", accelerators in the order {', '.join(facts['accelerators'])}" if facts["accelerators"] else ""
    chosen = facts["path"] or "nothing was let through"
    above = [f"{facts['platform']}{on}: {facts['backend']}, {facts['precision']}{order}", chosen]
    return "\n".join([*above, export.text(facts, output), *(f"note: {line}" for line in facts["advice"])])
