"""`edgewise bench split`: a model on two machines, under test."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgewise.cli.options import Config, Debug, Json, Model, flags
from edgewise.cli.output import columns, note, progress, result
from edgewise.errors import UsageError
from edgewise.settings import load

if TYPE_CHECKING:
    from edgewise.bench.split import SplitBench

NO = 1  # exit code: tokens were lost or others came


def split(
    model: Model = None,
    cuts: Annotated[
        str | None,
        typer.Option(metavar="N,…|all", help="layers of the edge; unset: a third and a half of the model's"),
    ] = None,
    codecs: Annotated[str, typer.Option(metavar="CODEC,…", help="of exact, fp16, int8, int4")] = "int8,int4,exact",
    tokens: Annotated[int, typer.Option(metavar="N", help="whose perplexity is taken for each cut and codec")] = 2000,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="what they are taken of, and prompts too; unset: some prose")
    ] = None,
    link: Annotated[str, typer.Option(metavar="LINK", help="that the relay stands in for")] = "wifi",
    link_cuts: Annotated[int, typer.Option(metavar="N", help="answers in which the link fails")] = 20,
    worker_kills: Annotated[int, typer.Option(metavar="N", help="answers in which the worker is killed")] = 5,
    prompts: Annotated[int, typer.Option(metavar="N", help="answers that are held against the whole model's")] = 20,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL with a `prompt` a line, for those")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="turns of the split and of the whole model")] = 5,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="keeps what is done; the same call goes on from it if it was interrupted"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="where the files go; else bench/results of the home directory"
        ),
    ] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="what the files are called")] = "split",
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """One model on two machines: how true boundaries are, whether faults cost tokens, how fast it is. 0 leaves a part
    out.

    Writes NAME.json, and NAME_cuts.json for what went through the relay. Exit code 1 if a token was lost, came twice or
    was another."""
    from edgewise.bench.engines import PROSE
    from edgewise.bench.journal import Journal
    from edgewise.bench.split import Campaign, SplitBench, as_printed
    from edgewise.cli.tiers import local_bundle

    if name != Path(name).name or name.startswith("."):
        raise UsageError(f"--name is {name!r}; the name of a file is needed", hint="-o names its directory")
    plan = SplitBench(
        cuts=_cuts(cuts),
        codecs=tuple(codecs.split(",")),
        tokens=tokens,
        text=text or PROSE,
        link=link,
        link_cuts=link_cuts,
        worker_kills=worker_kills,
        prompts=prompts,
        prompt_file=prompt_file,
        rounds=rounds,
    )
    settings = load(flags(model=model), config=config).settings
    bundle = local_bundle(settings)
    with progress() as show:
        campaign = Campaign(plan, bundle, Journal(resume, {"model": bundle.weights, **plan.facts}), show)
        report = campaign.report()
    for path in _save(
        plan, report, output or settings.home / "bench" / "results", name, _command(plan, report, output)
    ):
        note(f"wrote {path}")
    printed = as_printed(report)
    result(printed, _text(printed), as_json=json)
    if _wrong(report):
        raise typer.Exit(NO)


def _cuts(text: str | None) -> tuple[int, ...] | Literal["all"] | None:
    if text is None or text == "all":
        return text  # type: ignore[return-value]  # the two words
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--cuts is {text!r}; all, or whole numbers with commas between them are needed") from None


def _wrong(report: dict[str, Any]) -> bool:
    cuts, identical = report["cuts"] or {}, report["identical"] or {}
    return any(part.get(name) for part in (cuts, identical) for name in ("lost", "duplicated", "different"))


def _save(plan: SplitBench, report: dict[str, Any], directory: Path, name: str, command: str) -> list[Path]:
    """What was measured and what went through the relay are files of their own: the figures of one are no other's."""
    from edgewise.bench.measure import Kind, Measurement
    from edgewise.bench.split import as_results

    results, written = as_results(report), []
    parts: list[tuple[str, Kind, tuple[str, ...]]] = [
        (name, "measured", ("rows", "identical", "speed", "speed_apart")),
        (f"{name}_cuts", "emulated", ("cuts",)),
    ]
    for called, kind, keys in parts:
        if any(results[key] for key in keys):
            measurement = Measurement.taken(
                called,
                command=command,
                results={key: results[key] for key in ("model", *keys)},
                settings=plan.facts,
                libraries=["edgewise", "numpy", "websockets"],
                kind=kind,
            )
            written.append(measurement.save(directory))
    return written


def _command(plan: SplitBench, report: dict[str, Any], output: Path | None) -> str:
    """The call that repeats the run. Of files elsewhere only their names: a Measurement says nothing of the disk."""
    words: list[object] = ["edgewise", "bench", "split", "--model", report["model"]]
    if plan.cuts is not None:
        words += ["--cuts", plan.cuts if plan.cuts == "all" else ",".join(map(str, plan.cuts))]
    words += ["--codecs", ",".join(plan.codecs), "--tokens", plan.tokens]
    words += ["--text", plan.text.name] if plan.text != type(plan)().text else []
    words += ["--link", plan.link, "--link-cuts", plan.link_cuts, "--worker-kills", plan.worker_kills]
    words += ["--prompts", plan.prompts]
    words += ["--prompt-file", plan.prompt_file.name] if plan.prompt_file is not None else []
    words += ["--rounds", plan.rounds]
    words += ["-o", output] if output is not None and not output.is_absolute() else []
    return shlex.join(map(str, words))


def _text(printed: dict[str, Any]) -> str:
    parts = []
    if printed["rows"]:
        head = ("cut", "codec", "bytes", "perplexity", "of tokens")
        lines = [(r["cut"], r["codec"], r["bytes"], f"{r['ppl_rise']:+.2%}", r["tokens"]) for r in printed["rows"]]
        parts.append(columns([head, *lines]))
    if cuts := printed["cuts"]:
        over = cuts["stall_over_tail_ms"]
        parts.append(
            f"{cuts['n']} faults of the link ({cuts['link']}, emulated) and {cuts['kills']} killed workers: "
            f"{cuts['lost']} tokens lost, {cuts['duplicated']} twice, {cuts['different']} others"
        )
        if over is not None:
            parts.append(
                f"stall: median {cuts['stall_ms']['median']:.0f} ms, p95 {cuts['stall_ms']['p95']:.0f} ms; "
                f"beyond the tail's prefill: p95 {over['p95']:.0f} ms"
            )
    if identical := printed["identical"]:
        parts.append(
            f"exact boundary: {identical['different']} of {identical['tokens']} tokens differ from the whole model's"
        )
    for where, speed in (("all cores shared", printed["speed"]), ("a core each", printed["speed_apart"])):
        if speed:
            ratio = speed["ratio"]
            parts.append(
                f"split over whole, tokens/s at no round trip, {where}: {ratio['median']:.2f} "
                f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
            )
    return "\n".join(parts) or "nothing was asked for"
