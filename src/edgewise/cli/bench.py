"""`edgewise bench`: measured, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgewise.cli.options import Config, Debug, Json
from edgewise.cli.output import note, progress, result
from edgewise.errors import UsageError
from edgewise.settings import DEFAULT_MODEL, load

OUTSIDE = 3  # exit code: nothing of what was asked for could run


def engines(
    model: Annotated[
        str, typer.Option(metavar="NAME|PATH|HUB_ID", help="the model, as `pull` takes it")
    ] = DEFAULT_MODEL,
    against: Annotated[
        str, typer.Option(metavar="PEER,…", help="of llamacpp, ort-genai, openvino, litert-lm")
    ] = "llamacpp",
    rounds: Annotated[int, typer.Option(metavar="N", help="turns of each engine")] = 3,
    prompts: Annotated[str, typer.Option(metavar="N,…", help="prompt lengths in tokens")] = "64,512,2048",
    new: Annotated[int, typer.Option(metavar="N", help="tokens of each answer")] = 128,
    threads: Annotated[int, typer.Option(metavar="N", help="threads of each engine")] = 2,
    streams: Annotated[str, typer.Option(metavar="N,…", help="requests at once")] = "1",
    timeout_s: Annotated[float, typer.Option(metavar="S", help="after which a turn is given up")] = 600.0,
    peer_model: Annotated[
        list[str] | None,
        typer.Option(metavar="PEER=PATH", help="the model in that peer's own form, instead of a converted one"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="where the files go; else bench/results of the home directory"
        ),
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="what the files are called")] = "engines",
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="accept terms that ask for it")] = False,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Edgewise and other runtimes on the same model, token ids, threads and machine, in turns.

    Writes NAME.json (a Measurement file) and NAME.svg. Exit code 3 if no peer could run."""
    from edgewise.bench.chart import chart
    from edgewise.bench.engines import Comparison, as_results, compare, peers_that_ran
    from edgewise.bench.measure import Measurement
    from edgewise.bench.peers.base import PEERS
    from edgewise.bench.report import command, reasons, table

    if name != Path(name).name or name.startswith("."):
        raise UsageError(f"--name is {name!r}; the name of a file is needed", hint="-o names its directory")
    plan = Comparison(
        model=model,
        against=tuple(against.split(",")),
        rounds=rounds,
        prompts=_numbers("--prompts", prompts),
        new=new,
        threads=threads,
        streams=_numbers("--streams", streams),
        timeout_s=timeout_s,
        accept_licence=accept_licence,
        models=dict(_peer_model(text) for text in peer_model or []),
    )
    home = load(config=config).settings.home
    with progress() as show:
        report = compare(plan, home, show)
    ran = peers_that_ran(report)
    libraries = {c.library for group in PEERS.values() for c in group if c.name in ran}
    measurement = Measurement.taken(
        name,
        command=command(plan, name, output),
        results=as_results(report),
        libraries=["edgewise", "onnxruntime", *sorted(libraries)],
        settings={"rounds": rounds, "new": new, "threads": threads, "model": plan.model_name},
    )
    written = measurement.save(output or home / "bench" / "results")
    drawing = written.with_suffix(".svg")
    drawing.write_text(chart(report), encoding="utf-8")
    note(f"wrote {written} and {drawing}")
    result(report, table(report) if not json else "", as_json=json)
    if not ran:
        note("no peer could run: " + "; ".join(reasons(report)))
        raise typer.Exit(OUTSIDE)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} is {text!r}; whole numbers with commas between them are needed") from None


def _peer_model(text: str) -> tuple[str, Path]:
    peer, equals, path = text.partition("=")
    if not equals or not Path(path).exists():
        raise UsageError(f"--peer-model is {text!r}; PEER=PATH is needed, where PATH is there")
    return peer, Path(path)
