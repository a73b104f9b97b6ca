"""`edgewise bench`: measured, side by side."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli.options import Config, Debug, Json
from edgewise.cli.output import note, progress, result
from edgewise.errors import UsageError
from edgewise.settings import DEFAULT_MODEL, load

if TYPE_CHECKING:
    from edgewise.bench.engines import Comparison

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
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="where the files go")] = Path(),
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
    with progress() as show:
        report = compare(plan, load(config=config).settings.home, show)
    ran = peers_that_ran(report)
    libraries = {c.library for group in PEERS.values() for c in group if c.name in ran}
    measurement = Measurement.taken(
        name,
        command=_command(plan, name, output),
        results=as_results(report),
        libraries=["edgewise", "onnxruntime", *sorted(libraries)],
        settings={"rounds": rounds, "new": new, "threads": threads, "model": plan.model_name},
    )
    written = measurement.save(output)
    drawing = written.with_suffix(".svg")
    drawing.write_text(chart(report), encoding="utf-8")
    note(f"wrote {written} and {drawing}")
    result(report, _table(report) if not json else "", as_json=json)
    if not ran:
        note("no peer could run: " + "; ".join(_reasons(report)))
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


def _command(plan: Comparison, name: str, output: Path) -> str:
    """The call that repeats the run. Of files elsewhere only their names: a Measurement says nothing of the disk."""
    words: list[object] = ["edgewise", "bench", "engines", "--model", plan.model_name]
    words += ["--against", ",".join(plan.against), "--rounds", plan.rounds]
    words += ["--prompts", _list(plan.prompts), "--new", plan.new, "--threads", plan.threads]
    words += ["--streams", _list(plan.streams)] if plan.streams != (1,) else []
    words += [word for peer, path in plan.models.items() for word in ("--peer-model", f"{peer}={path.name}")]
    words += ["--name", name] if name != "engines" else []
    words += ["-o", output] if output != Path() and not output.is_absolute() else []
    return shlex.join(map(str, words))


def _list(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _reasons(report: Mapping[str, Any]) -> list[str]:
    rows = [pair for cell in report["cells"] for pair in cell["engines"].items()]
    return sorted({f"{name}: {row['failed']}" for name, row in rows if row["failed"]})


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "prefill tok/s": ("prefill_tok_s", lambda v: f"{v:.0f}"),
    "decode tok/s": ("decode_tok_s", lambda v: f"{v:.1f}"),
    "first token ms": ("ttft_ms", lambda v: f"{v:.0f}"),
    "cold start s": ("cold_start_s", lambda v: f"{v:.2f}"),
    "peak MB": ("peak_rss_bytes", lambda v: f"{v / 1e6:.0f}"),
}


def _table(report: Mapping[str, Any]) -> str:
    """Medians, cell by cell; the last column says what ours is to a peer, the lines below why some have no ratio."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=io.StringIO(), width=150)
    for cell in report["cells"]:
        table = Table(title=f"{cell['prompt_tokens']} prompt tokens, {cell['streams']} at once", title_justify="left")
        for heading in ("engine", "KL", *COLUMNS, "edgewise fast is"):
            table.add_column(heading, justify="left" if heading.startswith("e") else "right")
        for name, row in cell["engines"].items():
            table.add_row(name, "" if row["kl"] is None else f"{row['kl']:.2g}", *_medians(row), _verdict(cell, name))
        console.print(table)
        for name, row in cell["engines"].items():
            if row["left_out"]:
                console.print(f"{name} is left out: {row['left_out']}", soft_wrap=True, markup=False, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _medians(row: Mapping[str, Any]) -> list[str]:
    return [show(median(row[key])) if row[key] else "" for key, show in COLUMNS.values()]


def _verdict(cell: Mapping[str, Any], name: str) -> str:
    ratio = cell["ratio_to"].get(name)
    if ratio is None:
        return "left out" if cell["engines"][name]["left_out"] else ""
    decode, prefill = ratio["decode_tok_s"], ratio["prefill_tok_s"]
    return f"{prefill['median']:.2f}x in prefill, {decode['median']:.2f}x in decode"
