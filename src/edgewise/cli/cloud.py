"""`edgewise cloud`: the cloud tier."""

from __future__ import annotations

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
    TlsCert,
    TlsKey,
    flags,
)
from edgewise.settings import load


def cloud(
    model: Model = None,
    runtime: Runtime = None,
    mode: Mode = None,
    host: Host = None,
    port: Port = None,
    key_env: KeyEnv = None,
    key_file: KeyFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Serve the OpenAI API with one model, and its last layers to edges that split it: the tier behind an edge node.
    The first line of stdout is {"url": ...}, once it is ready."""
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

    from edgewise.cli.tiers import listen, open_model, worker_door

    listen(settings, open_model, route="cloud", wishes=("cloud",), split=worker_door)
