"""The WebSocket at which edges find the rest of their model's layers. It carries messages and knows no frame."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import JSONResponse
from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from edgewise.split.worker import Worker

SPLIT = "/edgewise/split"
CONNECTIONS = 256  # edges at once; one more is told to come later


class Split:
    """An endpoint over the worker that `opened` gives, which it calls when the first edge comes: a node that nobody
    splits a model with holds none. It closes the worker's steps when the app ends."""

    def __init__(self, opened: Callable[[], Worker]) -> None:
        self._opened = opened
        self._worker: Worker | None = None
        self._lock = asyncio.Lock()
        self._open = 0

    @property
    def route(self) -> WebSocketRoute:
        return WebSocketRoute(SPLIT, self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        socket = WebSocket(scope, receive, send)
        if self._open >= CONNECTIONS:
            busy = JSONResponse({"error": f"{self._open} edges are connected"}, 503, {"retry-after": "1"})
            await socket.send_denial_response(busy)
            return
        self._open += 1
        try:
            worker = await self._ready()
            await socket.accept()
            await worker.converse(_reader(receive), socket.send_bytes)
        finally:
            self._open -= 1
        await _good_bye(socket)

    async def close(self) -> None:
        if self._worker is not None:
            await self._worker.close()
            await self._worker.model.shutdown()

    async def _ready(self) -> Worker:
        async with self._lock:
            if self._worker is None:
                self._worker = await asyncio.to_thread(self._opened)
            return self._worker


def _reader(receive: Receive) -> Callable[[], Awaitable[bytes | None]]:
    async def message() -> bytes | None:
        """The next one's bytes; a text has none, which no frame is."""
        event = await receive()
        return None if event["type"] == "websocket.disconnect" else event.get("bytes") or b""

    return message


async def _good_bye(socket: WebSocket) -> None:
    try:
        await socket.close()
    except (RuntimeError, WebSocketDisconnect):  # the edge has gone first
        return
