"""`edgewise split plan`: which layers of a model run here and which in the cloud, what that takes, and why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from edgewise.cli.options import Config, Debug, Json
from edgewise.cli.output import columns, result
from edgewise.cli.split_profile import show_plan
from edgewise.errors import UsageError
from edgewise.settings import DEFAULT_MODEL, Settings, load

if TYPE_CHECKING:
    from edgewise.devices.links import LinkProfile
    from edgewise.plan.partition import SplitPlan
    from edgewise.plan.sites import Site

HOST: Final = "host"
NO: Final = 1
UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help='bundle, .gguf, Hugging Face directory or config.json, a name, e.g. "7B llama-like"; or an .onnx',
        ),
    ] = DEFAULT_MODEL,
    link: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="e.g. 5g, wifi; or what `edgewise devices --link URL --json` said")
    ] = "wifi",
    device: Annotated[
        str, typer.Option(metavar="D", help="the edge: a device of `edgewise devices`; host: this machine, measured")
    ] = HOST,
    cloud_device: Annotated[
        str, typer.Option(metavar="D", help="the cloud, likewise; host: a machine like this one")
    ] = HOST,
    edge_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="for the model here, e.g. 64MB, 1.5GiB; unset: what is free")
    ] = None,
    privacy_depth: Annotated[int, typer.Option(metavar="N", help="layers that must run here at least")] = 0,
    max_ms: Annotated[float | None, typer.Option(metavar="MS", help="a token may take so long")] = None,
    price: Annotated[float | None, typer.Option(metavar="P", help="of one layer for one token in the cloud")] = None,
    max_rise: Annotated[
        float, typer.Option(metavar="SHARE", help="of perplexity, by the codec of the boundary")
    ] = 0.01,
    head: Annotated[Literal["cloud", "edge"], typer.Option(help="where hidden states become tokens")] = "cloud",
    keep_tail: Annotated[
        bool, typer.Option("--keep-tail", help="the cloud's layers must fit here too, for when it is gone")
    ] = False,
    precision: Annotated[
        str | None, typer.Option(metavar="P", help="e.g. q4_1; unset: the file's own, else q4_1")
    ] = None,
    context: Annotated[int, typer.Option(metavar="N", help="tokens of context")] = 2048,
    prompt: Annotated[
        int, typer.Option(metavar="N", help="tokens of the prompt, for the time to the first token")
    ] = 512,
    codecs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="what codecs cost, as `edgewise bench split` measured it")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="of an .onnx file: what `edgewise split profile` measured; unset: it is measured now"
        ),
    ] = None,
    edge_slower: Annotated[
        float, typer.Option(metavar="X", help="of an .onnx file: the edge takes so many times what was measured")
    ] = 1.0,
    max_error: Annotated[
        float | None, typer.Option(metavar="SHARE", help="of an .onnx file: of its answer's power, by the codec")
    ] = None,
    config: Config = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say how many of a model's layers should run here and the others in the cloud, with reasons. Exit code 1 if no
    cut keeps to all limits."""
    settings = load(config=config).settings
    if Path(model).suffix.lower() == ".onnx":
        _only_of_decoders(privacy_depth, max_ms, price, codecs, precision)
        show_plan(
            Path(model),
            profile,
            _link(link),
            home=settings.home,
            edge=edge_slower,
            max_error=max_error,
            edge_bytes=None if edge_memory is None else size(edge_memory, "--edge-memory"),
            as_json=json,
        )
        return
    if profile is not None or max_error is not None or edge_slower != 1:
        raise UsageError(
            "--profile, --max-error and --edge-slower are for .onnx files", hint=f"{model} is planned from its sizes"
        )
    from edgewise.models.described import described
    from edgewise.plan import codec_table, partition
    from edgewise.plan.cuts import Wish
    from edgewise.plan.precision import precision as named
    from edgewise.plan.speeds import shipped

    table = codec_table.shipped()
    wish = Wish(
        edge_memory_bytes=None if edge_memory is None else size(edge_memory, "--edge-memory"),
        privacy_depth=privacy_depth,
        max_ms=max_ms,
        price=price,
        max_rise=max_rise,
        head=head,
        keep_tail=keep_tail,
        context=context,
        prompt=prompt,
    )
    found = partition.make(
        described(model, settings.home),
        _site(device, settings),
        _site(cloud_device, settings),
        _link(link),
        shipped(),
        table if codecs is None else table + codec_table.read(codecs),
        wish,
        precision=None if precision is None else named(precision),
        weights_hash=_hash(model, settings.home),
    )
    result(found.as_json(), _text(found), as_json=json)
    if not found.feasible:
        raise typer.Exit(NO)


def _only_of_decoders(depth: int, max_ms: float | None, price: float | None, *files: object) -> None:
    """UsageError for wishes that a plan of an .onnx file would pass over."""
    if depth or max_ms is not None or price is not None or any(one is not None for one in files):
        raise UsageError(
            "an .onnx file is cut where its answer comes soonest; --privacy-depth, --max-ms, --price, --codecs and "
            "--precision are for language models",
            hint="allowed are --profile, --edge-slower, --max-error, --edge-memory and --link",
        )


def size(text: str, flag: str) -> int:
    """Bytes of "64MB", "1.5GiB", "4096". UsageError naming the flag for anything else."""
    shape = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([kmg]i?|)b?\s*", text.lower())
    if shape is None:
        raise UsageError(f"{flag} is {text!r}, which is no size", hint="bytes, or e.g. 64MB, 1.5GiB")
    return round(float(shape[1]) * UNITS[shape[2]])


def _site(name: str, settings: Settings) -> Site:
    from edgewise.plan.sites import Catalogued, ThisMachine

    if name == HOST:
        from edgewise.bench.host import measured_host

        return ThisMachine(measured_host(settings.home))
    from edgewise.devices.catalogue import shipped

    return Catalogued(*shipped().find(name))


def _link(name: str) -> LinkProfile:
    """By its name, or as it was measured."""
    from edgewise.devices.links import LinkProfile, link_named

    path = Path(name)
    if path.suffix.lower() != ".json":
        return link_named(name)
    import msgspec

    from edgewise.devices.link import Link

    try:
        found = msgspec.json.decode(path.read_bytes(), type=Link)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is no measured link: {e}", hint="edgewise devices --link URL --json > FILE") from e
    if found.up_bytes_per_s is None or found.down_bytes_per_s is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in found.unknown.items())
        raise UsageError(f"{path} does not say how many bytes a second the link carries ({why})", hint="measure again")
    return LinkProfile(found.url, found.up_bytes_per_s.median, found.down_bytes_per_s.median, found.rtt_ms.median)


def _hash(model: str, home: Path) -> str | None:
    """Of the weights, where the model is a bundle."""
    from edgewise.models.bundle import MANIFEST, Bundle

    path = next((p for p in (home / "bundles" / model, Path(model)) if (p / MANIFEST).is_file()), None)
    return None if path is None else Bundle.open(path, check=False).weights


def _text(plan: SplitPlan) -> str:
    head = f"{plan.model} ({plan.precision}), {plan.layers} layers, on {plan.edge} and {plan.cloud} over {plan.link}"
    alone = plan.baselines
    rows: list[tuple[str, ...]] = [
        ("", "ms a token", "first token ms", "bytes up", "bytes down"),
        ("edge alone", f"{alone['edge_only_ms']:.4g}", f"{alone['edge_only_first_token_ms']:.4g}", "0", "0"),
        ("cloud alone", f"{alone['cloud_only_ms']:.4g}", f"{alone['cloud_only_first_token_ms']:.4g}", "ids", "ids"),
    ]
    if plan.feasible:
        split = (plan.predicted_ms, plan.first_token_ms, plan.bytes_per_token_up, plan.bytes_per_token_down)
        rows.insert(1, (f"split at {plan.cut}", *(f"{figure:.4g}" for figure in split if figure is not None)))
        low, high = plan.predicted_interval_ms or (0.0, 0.0)
        head += (
            f"\n{plan.cut} layers here, {plan.layers - (plan.cut or 0)} there; codec {plan.codec}, "
            f"{(plan.edge_bytes or 0) / 1e6:.1f} MB here, {low:.3g} to {high:.3g} ms a token"
        )
    else:
        head += "\nno cut keeps to all limits"
    lines = [head, columns(rows)]
    for heading, items in (("why", plan.reasons), ("assumed", plan.assumed)):
        lines += [f"{heading}:", *(f"  {item}" for item in items)] if items else []
    return "\n".join(lines)
