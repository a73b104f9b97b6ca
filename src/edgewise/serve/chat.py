"""POST /v1/chat/completions: from the bytes of a request to the bytes of its answer."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, get_args

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from edgewise.engines.base import Generator
from edgewise.errors import EngineError, Overloaded, RequestError, UnknownModel
from edgewise.serve.errors import failure_of
from edgewise.serve.metrics import Metrics
from edgewise.types import Chunk, Decision, Request, Route, Wish
from edgewise.wire import sse
from edgewise.wire.openai import ChatBody, Stamp, StreamEncoder, decode_chat, encode_completion

log = logging.getLogger(__name__)

WISHES: Final[tuple[Wish, ...]] = get_args(Wish)
CLIENT_LEFT = 499  # the status in logs and metrics; nobody is there to receive it
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold the stream back otherwise
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may cost the server."""

    body_bytes: int = 8 << 20
    body_s: float = 20.0  # until a request's body must be complete
    in_flight: int = 64  # requests at once; more are told to come back
    ping_s: float = 10.0  # a silent stream shows this often that it is alive
    send_s: float = 120.0  # until a client must have taken what we send it
    deadline_ms: float = 86_400_000.0  # the longest that may be asked for
    hops: int = 4  # nodes that a request may have come through


class Chat:
    """The ASGI app behind the path. It decides nothing: model and route go to the generator as they were asked for."""

    def __init__(
        self, generator: Generator, models: frozenset[str], route: Route, limits: Limits, metrics: Metrics, version: str
    ) -> None:
        self._generator = generator
        self._models = models | {"auto"}
        self._decision = Decision(route, None, "only")  # of an engine that has no choice
        self._limits = limits
        self._metrics = metrics
        self._fingerprint = f"edgewise-{version}"
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(send, self._limits.send_s)
        with self._metrics.in_flight.track_inprogress():
            try:
                await self._admit(HttpRequest(scope, receive), exchange)
            except ClientDisconnect:
                exchange.status = CLIENT_LEFT
            except Exception as e:  # the last stop: every error becomes an answer in OpenAI's form
                failure = failure_of(e)
                exchange.status = failure.status
                await failure.response()(scope, receive, send)
            finally:
                self._record(exchange)

    def _record(self, exchange: Exchange) -> None:
        total_s = time.monotonic() - exchange.arrived
        self._metrics.record(exchange.status, exchange.decision, total_s, exchange.first_token_s)
        route = exchange.decision.route if exchange.decision else "-"
        log.info("chat %d %s %.0f ms", exchange.status, route, total_s * 1000)

    async def _admit(self, http: HttpRequest, exchange: Exchange) -> None:
        """Count the request against the limit before its body takes any memory."""
        if self._running >= self._limits.in_flight:
            raise Overloaded(f"{self._running} requests are being served, which is the limit", hint="try again later")
        self._running += 1
        try:
            await self._serve(http, exchange)
        finally:
            self._running -= 1

    async def _serve(self, http: HttpRequest, exchange: Exchange) -> None:
        check_media_type(http.headers)
        body = decode_chat(await read_body(http, self._limits))
        request = body.request(
            route=self._route(http.headers, body.model),
            deadline_ms=read_deadline_ms(http.headers, self._limits.deadline_ms),
            hops=read_hops(http.headers, self._limits.hops),
        )
        answer = self._stream(body, request, exchange) if request.stream else self._whole(body, request, exchange)
        await until_left(http.receive, answer)

    def _route(self, headers: Headers, model: str) -> Wish:
        """The header decides, else the model's name; either must be one that is served here."""
        if model not in self._models:
            known = ", ".join(sorted(self._models))
            raise UnknownModel(f"there is no model {model[:100]!r} here", param="model", hint=f"there are: {known}")
        asked = headers.get("x-edgewise-route", model if model in WISHES else "auto")
        for wish in WISHES:
            if wish == asked and wish in self._models:
                return wish
        served = ", ".join(wish for wish in WISHES if wish in self._models)
        raise RequestError(f"x-edgewise-route is {asked[:100]!r}, served is {served}", param="x-edgewise-route")

    async def _whole(self, body: ChatBody, request: Request, exchange: Exchange) -> None:
        async with closing(self._generator.generate(request)) as chunks:
            answer = [exchange.saw(chunk) async for chunk in chunks]
        last = complete(answer[-1] if answer else None)
        decision = self._conclude(last, exchange)
        stamp = self._stamp(answer[0])
        data = encode_completion(stamp, answer, decision, logprobs=request.logprobs)
        await exchange.start(200, {"content-type": "application/json"} | decision_headers(decision))
        await exchange.end(data)

    async def _stream(self, body: ChatBody, request: Request, exchange: Exchange) -> None:
        """The headers wait for the first chunk: it carries the decision, and an error before it has a real status."""
        async with closing(self._generator.generate(request)) as chunks:
            first = await anext(chunks, None)
            if first is None:
                raise EngineError("the engine gave no answer at all")
            exchange.decision = first.decision or self._decision
            encoder = StreamEncoder(self._stamp(first), logprobs=request.logprobs, include_usage=body.include_usage)
            await exchange.start(200, STREAM_HEADERS | decision_headers(exchange.decision))
            async with exchange.pings(self._limits.ping_s):
                ending = await self._relay(first, chunks, encoder, exchange)
        await exchange.end(ending)

    async def _relay(
        self, first: Chunk, chunks: AsyncIterator[Chunk], encoder: StreamEncoder, exchange: Exchange
    ) -> bytes:
        """Send all but the end of the answer; the end is what is returned."""
        last = exchange.saw(first)
        await exchange.write(encoder.opening(exchange.decision or self._decision) + encoder.content(first))
        try:
            async for last in chunks:
                await exchange.write(encoder.content(exchange.saw(last)))
            return encoder.closing(complete(last), self._conclude(last, exchange))
        except ClientDisconnect:
            raise
        except Exception as e:  # the status 200 is sent: all that is left is an event that clients raise
            failure = failure_of(e)
            exchange.status = failure.status
            return encoder.failure(failure.body)

    def _conclude(self, last: Chunk, exchange: Exchange) -> Decision:
        decision = exchange.decision = last.decision or exchange.decision or self._decision
        if last.usage is not None:
            self._metrics.count_tokens(decision, last.usage)
        return decision

    def _stamp(self, chunk: Chunk) -> Stamp:
        name = chunk.model or self._generator.name
        return Stamp(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), name, self._fingerprint)


class Exchange:
    """Our side of one request: what was sent so far, and what is known of the answer."""

    def __init__(self, send: Send, send_s: float) -> None:
        self.arrived = time.monotonic()
        self.status = CLIENT_LEFT  # until it is known better
        self.decision: Decision | None = None
        self.first_token_s: float | None = None
        self._send = send
        self._send_s = send_s
        self._quiet = True

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
            self._quiet = False
            await self._put({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        await self._put({"type": "http.response.body", "body": data, "more_body": False})

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
            self._quiet = True
            await asyncio.sleep(interval_s)
            if self._quiet:
                await self.write(sse.comment("ping"))

    async def _put(self, message: dict[str, object]) -> None:
        """A client that takes nothing for too long has left, as far as we can tell."""
        try:
            async with asyncio.timeout(self._send_s):
                await self._send(message)
        except TimeoutError:
            raise ClientDisconnect from None


def complete(last: Chunk | None) -> Chunk:
    """The chunk that ends an answer; anything else at its end is a fault of the engine."""
    if last is None or last.finish_reason is None:
        raise EngineError("the engine's answer has no end")
    return last


def decision_headers(decision: Decision) -> dict[str, str]:
    headers = {
        "x-edgewise-route": decision.route,
        "x-edgewise-reason": re.sub(r"[^\x20-\x7e]", "?", decision.reason)[:200],
    }
    if decision.confidence is not None:
        headers["x-edgewise-confidence"] = f"{decision.confidence:.4f}"
    return headers


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


async def until_left(receive: Receive, work: Coroutine[object, object, None]) -> None:
    """Do the work, or stop it and raise ClientDisconnect when the client leaves before it is done."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        await working
    finally:
        await stopped(working)
        await stopped(watching)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def stopped(task: asyncio.Task[None]) -> None:
    """Cancel the task and wait for its end. What it raised is its owner's business."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen: asyncio shall not complain that nobody looked


@asynccontextmanager
async def closing(chunks: AsyncIterator[Chunk]) -> AsyncIterator[AsyncIterator[Chunk]]:
    """Leaving early stops the engine's work now, and not when the iterator happens to be collected."""
    try:
        yield chunks
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
