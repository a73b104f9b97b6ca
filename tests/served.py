"""A real server on a free loopback port, in a thread with an event loop of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from edgewise.engines.base import Generator
from edgewise.serve.app import create_app
from edgewise.serve.run import listen

MODELS = ("auto", "edge", "cloud", "maker/model:q4")


class Served:
    """`with Served(generator, keys=[…])`: the app over it runs; leaving stops it and waits for its end."""

    def __init__(self, generator: Generator, *, send_s: float = 120.0, **options: Any) -> None:
        app = create_app(generator, **({"models": MODELS, "route": "edge"} | options))
        self.listener = listen("127.0.0.1", 0, send_s=send_s)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="on", ws="none", timeout_graceful_shutdown=2
            )
        )
        self._thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def __enter__(self) -> Served:
        self._thread.start()
        eventually(lambda: self.server.started)
        return self

    def __exit__(self, *failure: object) -> None:
        self.server.should_exit = True
        self._thread.join()
        self.listener.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until it holds; fail if it never does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.005)
