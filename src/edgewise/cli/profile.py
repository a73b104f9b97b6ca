"""`edgewise profile`: where the time of a request goes."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer

from edgewise.cli.options import Config, Debug, Json, Mode, Model, Runtime, flags
from edgewise.cli.output import columns, note, result
from edgewise.settings import load

Cells = tuple[str, ...]
WIDTH = 110
TOP = 12  # operator types on the page; --json has all


def profile(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="what is asked; - reads it from stdin", show_default=False)
    ],
    model: Model = None,
    runtime: Runtime = None,
    mode: Mode = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="longest answer, in tokens")] = 64,
    requests: Annotated[
        int, typer.Option(metavar="K", min=1, max=64, help="ask so many times at once; more than slots wait")
    ] = 1,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="also write a Perfetto trace, e.g. out.pftrace")
    ] = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a prompt and show where the time goes: phases, graphs, operators, KV memory, queue waits."""
    from edgewise.cli.ask import prompt_text

    settings = load(flags(model=model, runtime=runtime, mode=mode), config=config).settings
    text = prompt_text(prompt)

    from edgewise.bench import profile as bench
    from edgewise.cli.tiers import local_bundle
    from edgewise.types import Message

    facts = bench.profile(
        local_bundle(settings),
        (Message("user", text),),
        max_tokens=max_tokens,
        requests=requests,
        runtime=settings.model.runtime,
        mode=settings.model.mode,
        slots=settings.model.slots,
        context=settings.model.context,
        trace=trace,
    )
    facts["trace"] = None if trace is None else str(trace)
    result(facts, page(facts), as_json=json)
    if trace is not None:
        note(f"{trace} opens in ui.perfetto.dev")


def page(facts: dict[str, Any]) -> str:
    """The facts of `bench.profile.profile` as text."""
    tokens = sum(facts["completion_tokens"])
    kv = facts["kv"]
    return "\n\n".join(
        [
            f"{facts['model']} on {facts['runtime']}, mode {facts['mode']}: {facts['requests']} at once, "
            f"{facts['prompt_tokens']} prompt tokens each ({sum(facts['cached_tokens'])} of all cached), "
            f"{tokens} tokens generated",
            columns(_speeds(facts)),
            columns([("phase", "count", "ms", "share"), *map(_line, facts["phases"])]),
            columns([("graph", "runs", "ms", "share of forwards"), *map(_line, facts["graphs"])]),
            columns(_operators(facts["operators"])),
            f"KV: at most {kv['peak_rows']} rows of {kv['bytes_per_row']} bytes in use, "
            f"{kv['peak_bytes'] / 1e6:.1f} MB. Queue wait: {_range(facts['queue_wait_ms'])} ms.",
            "Phases are timed around the calls of tokenizer and model, with profiling on, and summed over requests.\n"
            "A forward that serves several requests is shared out among them by their tokens.\n"
            f"{fill(facts['timed'], WIDTH)}\n"
            "Take shares from this page, and speeds from the run with profiling off.\n" + "\n".join(_doubts(facts)),
        ]
    )


def _doubts(facts: dict[str, Any]) -> list[str]:
    """How well what was noted fits together."""
    skew, strays = facts["clock_skew_us"], facts["stray_runs"]
    said = []
    if skew is not None:
        said.append(f"No run of a graph juts out of its forward by more than {skew:.0f} us.")
    if strays["count"]:
        said.append(f"{strays['count']} runs of graphs ({strays['ms']:.2f} ms) lie in no forward and are not counted.")
    said += [f"{count} {what}: their phases are missing here." for what, count in facts["unclaimed"].items()]
    return said or ["The runtime recorded no run of a graph."]


def _speeds(facts: dict[str, Any]) -> list[Cells]:
    rows: list[Cells] = [("median of the requests", "profiling off", "profiling on", "on / off")]
    for name, key in (("first token, ms", "first_token_ms"), ("decode, tok/s", "decode_tok_s")):
        off, on = facts["unwatched"][key], facts["watched"][key]
        rows.append((name, _number(off), _number(on), _number(on / off if on and off else None, 2)))
    return rows


def _operators(operators: list[dict[str, Any]]) -> list[Cells]:
    head = ("operator", "count", "ms", "share", "us/token prefill", "us/token decode")
    rows: list[Cells] = [head]
    for row in operators[:TOP]:
        rows.append((*_line(row), _number(row["prefill_us_per_token"]), _number(row["decode_us_per_token"])))
    return rows


def _line(row: dict[str, Any]) -> Cells:
    return row["name"], str(row["count"] or ""), f"{row['ms']:.2f}", f"{row['share']:.1%}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.1f}" if low == high else f"{low:.1f} to {high:.1f}"
