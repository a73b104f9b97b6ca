"""`edgewise distill`: a student from its config."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli.options import Debug, Json
from edgewise.cli.output import note, progress, result
from edgewise.errors import MissingExtra

if TYPE_CHECKING:
    from edgewise.compress.distil.run import Distilled

LIBRARIES = ("torch", "transformers", "accelerate")


def distill(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="what teaches whom: docs/formats/distill.md")],
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint, if there is one")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a student to say what its teacher says. Exit code 1 if the loss stops being a number."""
    from edgewise.compress.distil.config import Config
    from edgewise.settings import load

    wanted = Config.open(config)
    if missing := next((name for name in LIBRARIES if find_spec(name) is None), None):
        raise MissingExtra(missing, "distil")
    from edgewise.compress.distil.run import distil

    with progress() as show:
        found = distil(
            wanted,
            home=load().settings.home,
            resume=resume,
            progress=show,
            tell=note,
            command=f"edgewise distill {config.name}",
        )
    if not found.first:
        return
    facts = _facts(wanted.name, found)
    result(facts, "\n".join(f"{key}: {value}" for key, value in facts.items()), as_json=json)


def _facts(name: str, found: Distilled) -> dict[str, Any]:
    from edgewise.compress.distil.report import held_out

    trained, looks = found.trained, held_out(found.trained.log)
    return {
        "name": name,
        "student": str(found.student),
        "parameters": found.parameters,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "rows": found.corpus.facts.rows,
        "held_out_rows": found.corpus.facts.held_out_rows,
        "resumed_from": None if trained.resumed_from is None else trained.resumed_from.name,
        "held_out": looks[-1]["held_out"] if looks else None,
        "held_out_before": looks[0]["held_out"] if looks else None,
    }
