"""/edgewise/half: the second half of a network that is cut, for edges that send features (docs/formats/features.md)."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edgewise.errors import BadFrame, RequestError
from edgewise.serve.completions import Crowd
from edgewise.serve.errors import failure_of
from edgewise.serve.exchange import Exchange, Limits, read_body
from edgewise.split.halves import BackHalf
from edgewise.split.post import PATH


class Half:
    """The ASGI app behind the path: a body of features in, one of outputs back. What a client costs is bounded as on
    the paths for text; answers are computed `at_once` at a time."""

    def __init__(self, half: BackHalf, limits: Limits | None = None, *, at_once: int = 1) -> None:
        self._half, self._limits = half, limits or Limits()
        self._crowd = Crowd(self._limits.in_flight)
        self._turn = asyncio.Semaphore(at_once)

    @property
    def route(self) -> Route:
        return Route(PATH, self, methods=["POST"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(send, self._limits.send_s)
        try:
            with self._crowd:
                body = await read_body(HttpRequest(scope, receive), self._limits)
                answer = await self._answer(body)
                length = str(len(answer))
                await exchange.start(200, {"content-type": "application/octet-stream", "content-length": length})
                await exchange.end(answer)
        except ClientDisconnect:
            pass
        except Exception as e:  # the last stop: every error becomes an answer in OpenAI's form
            await failure_of(e).response()(scope, receive, send)

    async def _answer(self, body: bytes) -> bytes:
        async with self._turn:
            try:
                return await asyncio.to_thread(self._half.answer, body)
            except BadFrame as error:  # here it is the client who sent it
                raise RequestError(error.message) from error

    async def close(self) -> None:
        await asyncio.to_thread(self._half.close)
