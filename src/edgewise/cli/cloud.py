"""`edgewise cloud`: the cloud tier."""

from __future__ import annotations

from edgewise.cli.options import Config, Debug, Host, KeyEnv, Mode, Model, Port, Runtime, flags
from edgewise.settings import load


def cloud(
    model: Model = None,
    runtime: Runtime = None,
    mode: Mode = None,
    host: Host = None,
    port: Port = None,
    key_env: KeyEnv = None,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Serve the OpenAI API with one model: the tier behind an edge node. The first line of stdout is {"url": ...},
    once it is ready."""
    settings = load(
        flags(model=model, runtime=runtime, mode=mode, host=host, port=port, key_env=key_env),
        config=config,
    ).settings

    from edgewise.cli.tiers import listen, open_model

    listen(settings, open_model, route="cloud", wishes=("cloud",))
