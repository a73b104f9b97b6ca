"""`edgewise bench import`: another tool's results as a Measurement file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgewise.cli.options import Debug, Json
from edgewise.cli.output import columns, note, result
from edgewise.errors import UsageError

if TYPE_CHECKING:
    from edgewise.bench.measure import Measurement


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

    if out is not None:
        _check_out(out, file)
    found = read(file, tool)
    if out is not None:
        found = msgspec.structs.replace(found, name=out.stem)
        _save(found, out)
    facts: dict[str, Any] = msgspec.to_builtins(found)
    result(facts, columns([_line(name, figure) for name, figure in found.results.items()]), as_json=json)
    for what, count in found.settings.get("left_out", {}).items():
        note(f"left out: {count} {what}")


def _check_out(out: Path, file: Path) -> None:
    if out.suffix != ".json":
        raise UsageError(f"-o {out} is no .json file", hint=f"-o {out.with_suffix('.json')}")
    if out.is_dir():
        raise UsageError(f"-o {out} is a directory", hint=f"-o {out / file.with_suffix('.json').name}")
    if out.exists() and file.exists() and out.samefile(file):
        raise UsageError(f"-o {out} is the file that is read; it would be lost", hint="give -o another name")


def _save(found: Measurement, out: Path) -> None:
    try:
        found.save(out.parent)
    except OSError as error:  # of a file that is renamed when it is whole, and that nobody asked for
        raise OSError(error.errno or 0, error.strerror or str(error), str(out)) from error


def _line(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    """The one value of a figure that says most."""
    from edgewise.bench.importers.result import printable

    kind = next((kind for kind in ("median", "total", "mean") if kind in figure), "count")
    return printable(name), f"{figure.get(kind, 0):.6g}", str(figure["unit"]), kind
