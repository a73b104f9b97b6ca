"""`edgewise serve`: the edge node."""

from __future__ import annotations

from functools import partial

from edgewise.cli.options import (
    Audit,
    Cloud,
    CloudKeyEnv,
    Config,
    Debug,
    Edge,
    Host,
    KeyEnv,
    KeyFile,
    Log,
    LogTexts,
    Mode,
    Policy,
    Port,
    Privacy,
    Runtime,
    Threshold,
    TlsCert,
    TlsKey,
    flags,
)
from edgewise.settings import load


def serve(
    edge: Edge = None,
    cloud: Cloud = None,
    cloud_key_env: CloudKeyEnv = None,
    threshold: Threshold = None,
    policy: Policy = None,
    privacy: Privacy = None,
    log: Log = None,
    log_texts: LogTexts = False,
    audit: Audit = None,
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
    """Serve the OpenAI API from this machine: the edge answers, the cloud helps. The first line of stdout is
    {"url": ...}, once the node is ready."""
    settings = load(
        flags(
            edge=edge,
            cloud=cloud,
            cloud_key_env=cloud_key_env,
            threshold=threshold,
            policy=policy,
            privacy=privacy,
            log=log,
            log_texts="true" if log_texts else None,
            audit=audit,
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

    from edgewise.cli.tiers import listen, open_edge

    listen(settings, partial(open_edge, keep_log=True), route="edge", wishes=("edge", "cloud"))
