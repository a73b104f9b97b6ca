"""The flags that several verbs share, so that a flag means the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from edgewise.errors import UsageError
from edgewise.settings import BY_FLAG


@dataclass
class Run:
    """What one call of the command line carries from its flags to its end."""

    debug: bool = False


def _debug(context: typer.Context, value: bool) -> bool:
    context.find_root().obj.debug |= value
    return value


def _setting(flag: str, metavar: str) -> Any:
    """An option whose help and default are those of its setting."""
    leaf = BY_FLAG[flag]
    default = "" if leaf.default is None else f"  [default: {leaf.default}]"
    return typer.Option(flag, metavar=metavar, help=leaf.about + default, show_default=False)


def flags(**given: object) -> dict[str, Any]:
    """Values by flag, as `settings.load` takes them: `cloud_key_env` is --cloud-key-env."""
    return {f"--{name.replace('_', '-')}": value for name, value in given.items()}


def shapes_of(given: list[str] | None) -> dict[str, tuple[int, ...]]:
    """What --shape says; UsageError for what it cannot."""
    found = {}
    for one in given or ():
        name, _, axes = one.rpartition("=")
        try:
            found[name] = tuple(int(axis) for axis in axes.split(","))
        except ValueError:
            raise UsageError(
                f"--shape is {one!r}", hint="write the input's name and its axes: image=1,3,224,224"
            ) from None
    return found


Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Debug = Annotated[bool, typer.Option("--debug", callback=_debug, help="show a traceback if Edgewise itself fails")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="settings file  [default: $EDGEWISE_CONFIG, then $EDGEWISE_HOME/edgewise.toml]",
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option("--shape", metavar="NAME=1,3,224,224", help="of an .onnx input with free axes"),
]
Within = Annotated[
    float,
    typer.Option(
        metavar="Q", help="where rows have a quality and no verdict: so much below the other tier's is as good"
    ),
]
Inputs = Annotated[
    Path | None,
    typer.Option(metavar="DATA", help="real inputs: .npz, a directory of photos, .txt or .jsonl  [default: noise]"),
]
Artifacts = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="where the artifacts and the report go")]
MaxDrop = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="SHARE", help="refuse what loses more accuracy (0.01 is a point)"),
]
Strict = Annotated[bool, typer.Option("--strict", help="hold the pessimistic end of the interval against the budget")]
TimeLimit = Annotated[float, typer.Option(min=1, metavar="S", help="seconds that one step may take")]
MemoryLimit = Annotated[float, typer.Option(min=0.1, metavar="GB", help="memory that one step may take")]
StepThreads = Annotated[int, typer.Option(min=1, metavar="N", help="threads of a step")]
AcceptLicence = Annotated[bool, typer.Option("--accept-licence", help="accept terms that ask for it")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="a bundle's name", show_default=False)]

Edge = Annotated[str | None, _setting("--edge", "BUNDLE")]
Model = Annotated[str | None, _setting("--model", "BUNDLE")]
Runtime = Annotated[str | None, _setting("--runtime", "auto|native|onnxruntime")]
Mode = Annotated[str | None, _setting("--mode", "fast|stable")]
Cloud = Annotated[str | None, _setting("--cloud", "URL")]
CloudKeyEnv = Annotated[str | None, _setting("--cloud-key-env", "NAME")]
Threshold = Annotated[str | None, _setting("--threshold", "T")]
Policy = Annotated[str | None, _setting("--policy", "FILE")]
Privacy = Annotated[str | None, _setting("--privacy", "FILE")]
Log = Annotated[str | None, _setting("--log", "FILE")]
LogTexts = Annotated[bool, typer.Option("--log-texts", help=BY_FLAG["--log-texts"].about)]
Audit = Annotated[str | None, _setting("--audit", "SHARE")]
Host = Annotated[str | None, _setting("--host", "ADDRESS")]
Port = Annotated[str | None, _setting("--port", "N")]
KeyEnv = Annotated[str | None, _setting("--key-env", "NAME")]
KeyFile = Annotated[str | None, _setting("--key-file", "FILE")]
TlsCert = Annotated[str | None, _setting("--tls-cert", "FILE")]
TlsKey = Annotated[str | None, _setting("--tls-key", "FILE")]
Split = Annotated[str | None, _setting("--split", "URL")]
SplitKeyFile = Annotated[str | None, _setting("--split-key-file", "FILE")]
SplitCa = Annotated[str | None, _setting("--split-ca", "FILE")]
Cut = Annotated[str | None, _setting("--cut", "N")]
Codec = Annotated[str | None, _setting("--codec", "auto|exact|fp16|int8|int4")]
MaxRise = Annotated[str | None, _setting("--max-rise", "R")]
Head = Annotated[str | None, _setting("--head", "cloud|edge")]
