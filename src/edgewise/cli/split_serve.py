"""`edgewise split`: layers on two machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from edgewise.cli.options import (
    Config,
    Debug,
    Host,
    KeyEnv,
    KeyFile,
    Mode,
    Model,
    Port,
    Runtime,
    Shape,
    TlsCert,
    TlsKey,
    flags,
    shapes_of,
)
from edgewise.errors import UsageError
from edgewise.settings import load


def serve(
    model: Model = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="FIRST:END", help="the layers that edges may ask for, the end excluded; unset: all"),
    ] = None,
    runtime: Runtime = None,
    mode: Mode = None,
    host: Host = None,
    port: Port = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    shape: Shape = None,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Run the last layers of a model for edges that run its first: of a language model, or of an .onnx file. The first
    line of stdout is {"url": ...}, once it is ready."""
    settings = load(
        flags(
            model=model,
            runtime=runtime,
            mode=mode,
            host=host,
            port=port,
            key_env=key_env,
            key_file=key_file,
            tls_cert=tls_cert,
            tls_key=tls_key,
        ),
        config=config,
    ).settings

    from edgewise.cli.tiers import listen_as_worker, listen_with_half

    if settings.model.name.lower().endswith(".onnx"):
        _only(
            {"--layers": layers, "--runtime": runtime, "--mode": mode}, "language models; of a file any cut is served"
        )
        listen_with_half(settings, shapes_of(shape))
    else:
        _only({"--shape": shape}, ".onnx files")
        listen_as_worker(settings, None if layers is None else _layers(layers))


def _only(given: Mapping[str, object], of: str) -> None:
    for flag, value in given.items():
        if value is not None:
            raise UsageError(f"{flag} is for {of}")


def _layers(text: str) -> range:
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise UsageError(f"--layers is {text!r}; FIRST:END is needed, like 10:30")
    return range(int(first), int(end))
