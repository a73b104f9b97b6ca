"""`edgewise plan`: what fits a device, how fast it will be, and how far such predictions err."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgewise.cli.options import Config, Debug, Json
from edgewise.cli.output import columns, note, result
from edgewise.errors import UsageError
from edgewise.settings import DEFAULT_MODEL, Settings, load

if TYPE_CHECKING:
    from edgewise.devices.catalogue import Catalogue
    from edgewise.plan.planner import Plan
    from edgewise.plan.rows import Row
    from edgewise.plan.sites import Site
    from edgewise.plan.speeds import Speeds

HOST = "host"
GROUPS = {"all": "all rows", "published": "weights published", "estimated": "weights estimated"}


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help='bundle, .gguf, Hugging Face directory or config.json, a public name, or e.g. "7B llama-like"',
        ),
    ] = DEFAULT_MODEL,
    device: Annotated[
        str, typer.Option(metavar="D", help="a device of `edgewise devices`; host: this machine, measured")
    ] = HOST,
    unit: Annotated[
        Literal["auto", "cpu", "gpu", "npu"], typer.Option(help="the part of the device; auto: the fastest")
    ] = "auto",
    runtime: Annotated[str | None, typer.Option(metavar="NAME", help="e.g. llama.cpp; unset: the usual one")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="P", help="e.g. q4_k_m; unset: the file's own, else the best")
    ] = None,
    context: Annotated[int, typer.Option(metavar="N", help="tokens of context")] = 2048,
    prompt: Annotated[
        int, typer.Option(metavar="N", help="tokens of the prompt, for the time to the first token")
    ] = 512,
    want: Annotated[float, typer.Option(metavar="TOK_S", help="decoding speed that is enough")] = 10.0,
    memory: Annotated[float | None, typer.Option(metavar="GIB", help="memory of the very device")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(metavar="GB_S", help="peak memory bandwidth of the very device")
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Measurement files of that device; they refine the prediction"),
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(metavar="ROWS.csv", help="instead: the error of predictions of published speeds")
    ] = None,
    leave_one_device_out: Annotated[
        bool, typer.Option("--leave-one-device-out", help="each device predicted from the others' rows")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="draw what --evaluate found")] = None,
    mission_table: Annotated[
        bool, typer.Option("--mission-table", help="instead: the guide's performance table with verdicts")
    ] = False,
    catalogue: Annotated[Path | None, typer.Option(metavar="FILE", help="another catalogue of devices")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure this machine again")] = False,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say whether a model fits a device, how fast it will be there and at which precision, with reasons."""
    from edgewise.devices import catalogue as devices
    from edgewise.plan.speeds import shipped

    if evaluate is None and (plot is not None or leave_one_device_out):
        raise UsageError("--plot and --leave-one-device-out go with --evaluate", hint="--evaluate ROWS.csv")
    if evaluate is not None and mission_table:
        raise UsageError("--evaluate and --mission-table are two questions", hint="ask one at a time")
    known = devices.shipped() if catalogue is None else devices.load(catalogue)
    if evaluate is not None:
        _evaluate(evaluate, known, shipped(), leave_out=leave_one_device_out, plot=plot, as_json=json)
    elif mission_table:
        _mission(known, shipped(), as_json=json)
    else:
        from edgewise.models.described import described
        from edgewise.plan.planner import Wish, make
        from edgewise.plan.precision import precision as named

        settings = load(config=config).settings
        wish = Wish(
            part=None if unit == "auto" else unit,
            runtime=runtime,
            precision=None if precision is None else named(precision),
            context=context,
            prompt=prompt,
            tok_s=want,
        )
        outline = described(model, settings.home)
        site = _site(device, known, settings, memory=memory, bandwidth=bandwidth, fresh=fresh, own=bool(measured))
        speeds = _refined(shipped(), site, measured or [])
        found = make(outline, site, speeds, wish)
        result(found.as_json(), _text(found), as_json=json)


def _site(
    name: str,
    known: Catalogue,
    settings: Settings,
    *,
    memory: float | None,
    bandwidth: float | None,
    fresh: bool,
    own: bool,
) -> Site:
    from edgewise.plan.sites import Catalogued, ThisMachine

    for flag, value in (("--memory", memory), ("--bandwidth", bandwidth)):
        if value is not None and not 0 < value <= 1e6:
            raise UsageError(f"{flag} is {value:g}; above 0 and at most 1000000 is allowed")
    if name != HOST:
        id, device = known.find(name)
        return Catalogued(id, device, memory_gib=memory, bandwidth_gb_s=bandwidth, own=own)
    if bandwidth is not None:
        raise UsageError("--bandwidth is for devices of the catalogue; this machine's is measured")
    from edgewise.bench.host import measured_host

    return ThisMachine(measured_host(settings.home, fresh=fresh), memory_gib=memory)


def _refined(speeds: Speeds, site: Site, files: list[Path]) -> Speeds:
    """The fitted speeds after what was measured on that device."""
    from edgewise.plan import measured

    rows: list[Row] = [row for file in files for row in measured.read(file, site.name)]
    return speeds.refined(rows, lambda row: site.machine(row.part, row.runtime)) if rows else speeds


def _text(plan: Plan) -> str:
    fits = {True: "it fits", False: "it does not fit", None: "whether it fits is not known"}[plan.fits]
    lines = [
        f"{plan.model} ({plan.precision}) on {plan.device}, {plan.unit} with {plan.runtime}: {fits}",
        f"  decode       {_interval(plan.decode_tok_s)} tok/s behind {plan.context} tokens",
        f"  prefill      {_interval(plan.prefill_tok_s)} tok/s",
        f"  first token  {_interval(plan.first_token_ms)} ms",
    ]
    if plan.joules_per_token is not None:
        lines.append(f"  energy       {_interval(plan.joules_per_token)} J a token, at the power of the device")
    if plan.best_precision is not None:
        lines.append(f"  best precision  {plan.best_precision}")
    if plan.largest is not None:
        lines.append(f"  largest that fits  {plan.largest['model']} ({plan.largest['precision']})")
    for heading, items in (
        ("why", plan.reasons),
        ("assumed", plan.assumed),
        ("instead", plan.suggestions),
        ("would have to change", plan.changes),
    ):
        lines += [f"{heading}:", *(f"  {item}" for item in items)] if items else []
    return "\n".join(lines)


def _interval(estimate: Any) -> str:
    return f"{estimate.value:.4g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _evaluate(
    path: Path, known: Catalogue, speeds: Speeds, *, leave_out: bool, plot: Path | None, as_json: bool
) -> None:
    from edgewise.plan import evaluate
    from edgewise.plan.rows import by, read

    judged = evaluate.evaluate(read(path), by(known), speeds, leave_one_device_out=leave_out)
    if plot is not None:
        from edgewise.plan.plot import plot as drawn

        how = "each device predicted from the others" if leave_out else "predicted by the shipped speeds"
        plot.write_text(drawn(judged, f"{path.name}, {how}"), encoding="utf-8")
        note(f"wrote {plot}")
    report = evaluate.report(judged)
    rows: list[tuple[str, ...]] = [("", "rows", "median error", "mean error", "p90 error", "in 80 % interval")]
    for target, groups in report.items():
        for group, figures in groups.items():
            shares = (figures[key] for key in ("median_ape", "mean_ape", "p90_ape", "coverage80"))
            shown = ("" if share is None else f"{share:.1%}" for share in shares)
            rows.append((f"{target}, {GROUPS[group]}", str(figures["n"]), *shown))
    result({target: report[target] for target in report}, columns(rows), as_json=as_json)


def _mission(known: Catalogue, speeds: Speeds, *, as_json: bool) -> None:
    from edgewise.plan.mission import table

    found = table(known, speeds)
    rows: list[tuple[str, ...]] = [
        ("model", "device", "figure", "claimed", "ceiling", "predicted", "measured", "verdict")
    ]
    for row in found:
        ceiling = ", ".join(f"{name} {value:.3g}" for name, value in row["ceiling"].items())
        p = row["predicted"]
        rows.append(
            (
                row["model"],
                row["device"],
                f"{row['figure']}, {row['unit']}",
                f"{row['claimed']:g}",
                ceiling,
                f"{p['value']:.3g} [{p['low']:.3g}, {p['high']:.3g}]",
                "none" if row["measured"] is None else f"{row['measured']:g}",
                row["verdict"],
            )
        )
    why = [f"{row['model']} on {row['device']}, {row['figure']}: {row['why']}" for row in found]
    result({"rows": found}, "\n".join([columns(rows), "", *why]), as_json=as_json)
