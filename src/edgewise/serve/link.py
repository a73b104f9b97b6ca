"""/edgewise/bytes: what devices/link.py measures its way to a node with."""

from __future__ import annotations

import os
import re

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from edgewise.errors import RequestError
from edgewise.serve.completions import Crowd
from edgewise.serve.errors import failure_of
from edgewise.serve.exchange import SLICE, Exchange, Limits, read_body, until_left

MOST = 4 << 20  # bytes that one request is given


class Bytes:
    """The ASGI app behind the path: GET gives `count` random bytes, POST takes a body, forgets it and tells its length.
    What a client costs is bounded as on the paths for text, and it takes one of their places meanwhile."""

    def __init__(self, limits: Limits, crowd: Crowd) -> None:
        self._limits, self._crowd = limits, crowd

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(send, self._limits.send_s)
        http = HttpRequest(scope, receive)
        try:
            with self._crowd:
                if http.method == "POST":
                    await self._take(http, exchange)
                else:
                    await until_left(receive, exchange, self._give(_count(http), exchange))
        except ClientDisconnect:
            pass
        except Exception as e:  # the last stop: every error becomes an answer in OpenAI's form
            await failure_of(e).response()(scope, receive, send)

    async def _give(self, count: int, exchange: Exchange) -> None:
        piece = os.urandom(min(count, SLICE))  # what cannot be compressed on the way
        await exchange.start(200, {"content-type": "application/octet-stream", "content-length": str(count)})
        for start in range(0, count, len(piece)):
            await exchange.write(piece[: count - start])
        await exchange.end()

    async def _take(self, http: HttpRequest, exchange: Exchange) -> None:
        body = await read_body(http, self._limits)
        await exchange.start(200, {"content-type": "application/json"})
        await exchange.end(msgspec.json.encode({"count": len(body)}))


def _count(http: HttpRequest) -> int:
    text = http.query_params.get("count", "")
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 0 < int(text) <= MOST:
        raise RequestError(f"count is {text[:100]!r}, allowed is a whole number from 1 to {MOST}", param="count")
    return int(text)
