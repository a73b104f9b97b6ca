"""`edgewise optimize`: what a platform wants, made and proved."""

from __future__ import annotations

from typing import Annotated

import typer

from edgewise.cli.export import finish
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
from edgewise.export.limits import BOUNDS, THREADS, Bounds
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
    shape: Shape = None,
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
        shapes=shapes_of(shape),
        bounds=Bounds(time_limit, memory_limit),
        threads=threads,
        accept_licence=accept_licence,
    )
    with progress() as show:
        home = load(config=config).settings.home
        facts = optimized(asked, platform, home, device=device, backend=backend, show=show)
    for warning in facts["warnings"]:
        note(warning)
    finish(facts, output, json=json)
