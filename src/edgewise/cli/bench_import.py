"""`edgewise bench import`: another tool's results as a Measurement file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgewise.cli.options import Debug, Json
from edgewise.cli.output import columns, result
from edgewise.errors import UsageError


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="what the tool wrote", show_default=False)],
    tool: Annotated[
        str | None,
        typer.Option("--from", metavar="TOOL", help="llama-bench, onnxruntime, litert, xctrace or perfetto"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="where to write it, NAME.json")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Read results of llama-bench, onnxruntime, LiteRT, Xcode Instruments or Android as a Measurement."""
    import msgspec

    from edgewise.bench.importers.open import read

    if out is not None and out.suffix != ".json":
        raise UsageError(f"-o {out} is no .json file", hint=f"-o {out.with_suffix('.json')}")
    found = read(file, tool)
    if out is not None:
        found = msgspec.structs.replace(found, name=out.stem)
        found.save(out.parent)
    facts: dict[str, Any] = msgspec.to_builtins(found)
    result(facts, columns([_line(name, figure) for name, figure in found.results.items()]), as_json=json)


def _line(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    """The one value of a figure that says most."""
    kind = next((kind for kind in ("median", "total", "mean") if kind in figure), "count")
    return name, f"{figure.get(kind, 0):.6g}", str(figure["unit"]), kind
