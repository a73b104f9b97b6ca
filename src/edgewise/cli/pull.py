"""`edgewise pull`: make a bundle."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from edgewise.cli.options import Config, Debug, Json
from edgewise.cli.output import note, progress, result
from edgewise.cli.show import summary
from edgewise.settings import DEFAULT_MODEL, load


def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="NAME|PATH|HUB_ID", help="an alias, a .gguf file, a directory of a model or bundle, or owner/name"
        ),
    ] = DEFAULT_MODEL,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="what to call the bundle")] = None,
    requantize: Annotated[
        Literal["int4", "int8"] | None, typer.Option(help="round the weights again: smaller, and not the same model")
    ] = None,
    activations: Annotated[
        Literal["int8", "fp32"], typer.Option(help="what quantized weights are multiplied with")
    ] = "int8",
    accept_licence: Annotated[bool, typer.Option("--accept-licence", help="accept terms that ask for it")] = False,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a bundle of a model: download it if need be, check it, write its graphs."""
    from edgewise.models import source as models

    home = load(config=config).settings.home
    with progress() as show:
        bundle = models.pull(
            source,
            home=home,
            name=name,
            requantize=requantize,
            activations=activations,
            accept_licence=accept_licence,
            progress=show,
        )
    facts = summary(bundle)
    if facts["licence"] is None:
        note("the source names no licence; whether you may use it is for you to find out")
    result(facts, "\n".join(f"{key}: {value}" for key, value in facts.items()), as_json=json)
