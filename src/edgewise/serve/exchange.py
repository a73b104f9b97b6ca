"""One HTTP exchange, whatever its path: the body that comes in, the pieces that go out, a client that leaves."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Send

from edgewise.errors import RequestError
from edgewise.settings import ServeSettings
from edgewise.types import Chunk, Decision
from edgewise.wire import sse

DEFAULTS = ServeSettings()
CLIENT_LEFT = 499  # the status in logs and metrics; nobody is there to receive it
GROUP_CHARS = 100
SLICE = 64 << 10  # bytes that are sent at once: what waits for a slow client beside the answer itself


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may cost the server."""

    body_bytes: int = 8 << 20
    body_s: float = 20.0  # until a request's body must be complete
    in_flight: int = 64  # requests at once; more are told to come back
    choices: int = DEFAULTS.choices  # answers to one request
    ping_s: float = 10.0  # a silent stream shows this often that it is alive
    send_s: float = DEFAULTS.send_s  # that we wait for the client to take its answer, all waits together
    deadline_ms: float = 86_400_000.0  # the longest that may be asked for
    hops: int = 4  # nodes that a request may have come through


class Exchange:
    """Our side of one request: what was sent so far, and what is known of the answer."""

    def __init__(self, send: Send, patience_s: float) -> None:
        self.arrived = time.monotonic()
        self.status = CLIENT_LEFT  # until it is known better
        self.decision: Decision | None = None
        self.first_token_s: float | None = None
        self._send = send
        self._patience_s = patience_s
        self._sends = 0
        self._waited_s = 0.0  # for the client to take what we sent
        self._since = math.inf  # when the wait of this moment began

    def saw(self, chunk: Chunk) -> Chunk:
        """The chunk again, once it is noted when the first token came."""
        if self.first_token_s is None and (chunk.text or chunk.tokens):
            self.first_token_s = time.monotonic() - self.arrived
        return chunk

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._put({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes) -> None:
        """Send a piece of the body, in full events."""
        if data:
            await self._put({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """The last piece, however long."""
        start = 0
        while len(data) - start > SLICE:
            await self.write(data[start : start + SLICE])
            start += SLICE
        await self._put({"type": "http.response.body", "body": data[start:], "more_body": False})

    @asynccontextmanager
    async def pings(self, interval_s: float) -> AsyncIterator[None]:
        """Inside, a comment goes out whenever nothing else did for a whole interval."""
        task = asyncio.create_task(self._ping(interval_s))
        try:
            yield
        finally:
            await stopped(task)

    async def _ping(self, interval_s: float) -> None:
        while True:
            before = self._sends
            await asyncio.sleep(interval_s)
            if self._sends == before and self._since == math.inf:
                await self.write(sse.comment("ping"))

    async def outlast(self) -> None:
        """Ends when the client has let us wait too long, all waits together: then it has left as far as we can tell.
        One timer for the whole answer, because one for each token would cost as much as sending it."""
        left_s = self._patience_s
        while left_s > 0:
            await asyncio.sleep(left_s)
            left_s = self._patience_s - self._waited_s - max(0.0, time.monotonic() - self._since)

    async def _put(self, message: dict[str, object]) -> None:
        """The server below lets us wait once it holds 64 KiB that the client has not taken."""
        self._sends += 1
        self._since = time.monotonic()
        await self._send(message)
        self._waited_s += time.monotonic() - self._since
        self._since = math.inf


def check_media_type(headers: Headers) -> None:
    """A page in a browser can send other types anywhere without asking; JSON it cannot."""
    media_type = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, f"content-type is {media_type[:100]!r}; send application/json")
    if encoding != "identity":
        raise HTTPException(415, f"content-encoding is {encoding[:100]!r}; send the body as it is")


def read_deadline_ms(headers: Headers, most: float) -> float | None:
    text = headers.get("x-request-deadline-ms")
    if text is None:
        return None
    value = float(text) if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", text) else 0.0
    if not 0 < value <= most:
        raise RequestError(
            f"x-request-deadline-ms is {text[:100]!r}, allowed is a number above 0 and at most {most:g}",
            param="x-request-deadline-ms",
        )
    return value


def read_group(headers: Headers) -> str | None:
    text = headers.get("x-edgewise-group")
    if text is not None and not (len(text) <= GROUP_CHARS and text.isprintable() and text.strip()):
        raise RequestError(
            f"x-edgewise-group is {text[:100]!r}, allowed are 1 to {GROUP_CHARS} printable characters",
            param="x-edgewise-group",
        )
    return text


def read_hops(headers: Headers, most: int) -> int:
    text = headers.get("x-edgewise-hops", "0")
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) > most:
        raise RequestError(
            f"x-edgewise-hops is {text[:100]!r}, allowed is a number from 0 to {most}",
            param="x-edgewise-hops",
            hint="nodes that are each other's cloud would ask for ever; give the last one no --cloud",
        )
    return int(text)


async def read_body(http: HttpRequest, limits: Limits) -> bytes:
    """The whole body. 413 as soon as it is clear that it is too long, 408 if it does not come in time."""
    too_long = HTTPException(413, f"the body is longer than {limits.body_bytes} bytes", {"connection": "close"})
    told = http.headers.get("content-length", "")
    if re.fullmatch(r"[0-9]+", told) and int(told[:20]) > limits.body_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for piece in http.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise too_long
    except TimeoutError:
        raise HTTPException(408, f"no complete body within {limits.body_s:g} s", {"connection": "close"}) from None
    return bytes(body)


async def until_left(receive: Receive, exchange: Exchange, work: Coroutine[object, object, None]) -> None:
    """Do the work, or stop it and raise ClientDisconnect when the client leaves or is given up before it is done."""
    working = asyncio.create_task(work)
    watching = [asyncio.create_task(_left(receive)), asyncio.create_task(exchange.outlast())]
    try:
        await asyncio.wait({working, *watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        await working
    finally:
        for task in (working, *watching):
            await stopped(task)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def stopped(task: asyncio.Task[None]) -> None:
    """Cancel the task and wait for its end. What it raised is its owner's business."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen: asyncio shall not complain that nobody looked
