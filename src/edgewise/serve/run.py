"""Listen, say where, and end well."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from edgewise.errors import ConfigError
from edgewise.settings import ServeSettings
from edgewise.wire.frame import FRAME_LIMIT

DEFAULTS = ServeSettings()
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(
    app: ASGIApp,
    host: str = DEFAULTS.host,
    port: int = DEFAULTS.port,
    *,
    send_s: float = DEFAULTS.send_s,
    drain_s: float = 30.0,
    tls: Tls | None = None,
    json_logs: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT; port 0 takes any free one. With `tls` it is https.

    Once connections are taken, `{"url": …}` is printed as one line on stdout; logs go to stderr. A signal stops the
    listening, answers under way get `drain_s` to end, and a second signal ends them at once. After SIGTERM it returns,
    after SIGINT it raises KeyboardInterrupt. ConfigError if the address cannot be had.
    """
    log_to_stderr(as_json=json_logs)
    listener = listen(host, port, send_s=send_s)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="websockets-sansio",
        ws_max_size=FRAME_LIMIT,
        ws_per_message_deflate=False,
        ws_ping_interval=None,  # edges see by the answers whether we live, and send when they have something
        ssl_certfile=None if tls is None else tls.cert,
        ssl_keyfile=None if tls is None else tls.key,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )
    server = Server(config, url_of(host, listener, "http" if tls is None else "https"))
    with listener:
        server.run(sockets=[listener])
    if server.caught == signal.SIGINT:
        raise KeyboardInterrupt


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM form: a certificate with its chain, and its private key. ConfigError if they are not that."""

    cert: Path
    key: Path

    def __post_init__(self) -> None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as e:
            why = getattr(e, "strerror", None) or str(e)
            raise ConfigError(f"{self.cert} and {self.key} are no certificate and its key: {why}") from e


class Server(uvicorn.Server):
    """uvicorn's server, which says where it listens and does not die of the signal that ended it."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self.url = url
        self.caught: int | None = None  # the first signal

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(json.dumps({"url": self.url}), flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self.caught = self.caught or sig


def listen(host: str, port: int, *, send_s: float = DEFAULTS.send_s) -> socket.socket:
    """A socket that listens at the first address that `host` means. Where the system can, it drops a connection whose
    other end takes nothing for `send_s`: when an answer is complete, its last bytes are with the system alone.

    It names its protocol: asyncio turns Nagle's algorithm off for none but those, and with it each first token on a
    kept connection would come 40 ms late.
    """
    try:
        where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = where[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as e:
        raise _no_address(host, port, e) from e
    try:
        if os.name == "posix":  # elsewhere it would let two servers share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(send_s * 1000))
        listener.bind(address)
        listener.listen(1024)
    except OSError as e:
        listener.close()
        raise _no_address(host, port, e) from e
    return listener


def _no_address(host: str, port: int, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error)
    return ConfigError(
        f"cannot listen on {host} port {port}: {reason}", hint="choose another --host or --port; 0 is any free port"
    )


def url_of(host: str, listener: socket.socket, scheme: str = "http") -> str:
    """An address under which this machine reaches the listener."""
    wildcards = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
    name = wildcards.get(host, host)
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"


def log_to_stderr(*, as_json: bool) -> None:
    """Unless somebody has set up logging already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request to the cloud


class JsonLines(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
