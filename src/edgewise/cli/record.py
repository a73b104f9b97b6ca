"""`edgewise record`: a replay of two models that are both here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from edgewise.cli.options import Config, Debug, Json, flags
from edgewise.cli.output import note, progress, result
from edgewise.errors import UsageError
from edgewise.settings import load


def record(
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS", help="JSONL: a `prompt` a line, with `gold` where there is one", show_default=False
        ),
    ],
    edge: Annotated[str, typer.Option(metavar="BUNDLE", help="the edge's model", show_default=False)],
    cloud: Annotated[str, typer.Option(metavar="BUNDLE", help="the cloud's, run here too", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="where the rows go; gzip if it ends in .gz", show_default=False
        ),
    ],
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="so many prompts, drawn; unset: all")] = None,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="draws them")] = 0,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="longest answer, in tokens")] = 48,
    longest: Annotated[int, typer.Option(metavar="N", min=1, help="prompts of more tokens are left out")] = 512,
    judge: Annotated[
        Literal["auto", "teacher"],
        typer.Option(help="auto: by `gold` where a line has it; teacher: by the cloud's model always"),
    ] = "auto",
    plain: Annotated[
        bool, typer.Option("--plain", help="prompts go in as they are, without the models' chat templates")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from a file that is there")] = False,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Let two models answer the same prompts, for `calibrate` and `replay`.

    An answer is right if it is the gold one, or, where there is none, if the cloud's model finds it at most 0.5 nats a
    token less probable than its own."""
    from edgewise.joint.record import questions
    from edgewise.joint.record import record as recorded
    from edgewise.joint.record_file import Plan
    from edgewise.joint.replay import Replay
    from edgewise.models.store import find

    home = load(flags(), config=config).settings.home
    plan = Plan(max_tokens=max_tokens, longest=longest, plain=plain, judge=judge)
    asked = questions(prompts, seed=seed)
    models = find(edge, home, check=False), find(cloud, home, check=False)
    with progress() as show:
        made = asyncio.run(recorded(*models, asked, output, plan, limit=limit, resume=resume, show=show))
    if not made.new + made.before:
        raise UsageError(
            f"{output} has no row: all {made.left_out.total()} prompts are longer than {longest} tokens (--longest) or "
            f"leave no room in the models' contexts for an answer of {max_tokens} (--max-tokens)",
            hint="give a larger --longest, or a smaller --max-tokens",
        )
    for why, count in made.left_out.items():
        note(f"{count} prompts are left out: {why}")
    rows = Replay.open(output)
    speed = made.new / made.seconds if made.new else None
    facts: dict[str, Any] = {
        "path": str(output),
        "edge": models[0].name,
        "cloud": models[1].name,
        "n": len(rows),
        "new": made.new,
        "before": made.before,
        "left_out": dict(made.left_out),
        "judges": dict(made.judges),
        "edge_accuracy": float(rows.edge_right.mean()),
        "cloud_accuracy": float(rows.cloud_right.mean()),
        "seconds": made.seconds,
        "prompts_per_s": speed,
    }
    text = (
        f"{output}: {len(rows)} rows, {made.new} of them new; right are {facts['edge_accuracy']:.1%} of the answers of "
        f"{models[0].name} and {facts['cloud_accuracy']:.1%} of {models[1].name}'s"
    )
    result(facts, text if speed is None else f"{text}; {speed:.1f} prompts a second", as_json=json)
