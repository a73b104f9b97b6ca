"""POST /v1/chat/completions and /v1/completions: from the bytes of a request to the bytes of its answer."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final, get_args

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from edgewise.engines.base import Generator
from edgewise.errors import DeadlineExceeded, EngineError, Overloaded, RequestError, UnknownModel
from edgewise.joint.privacy import Rules
from edgewise.serve.choices import Indexed, closing, interleaved, total
from edgewise.serve.errors import failure_of
from edgewise.serve.exchange import (
    CLIENT_LEFT,
    Exchange,
    Limits,
    check_media_type,
    read_body,
    read_deadline_ms,
    read_group,
    read_hops,
    until_left,
)
from edgewise.serve.metrics import Metrics
from edgewise.types import Chunk, Decision, Request, Usage, Wish
from edgewise.wire.encoders import (
    Answer,
    ChatEncoder,
    Stamp,
    StreamEncoder,
    TextEncoder,
    encode_chat_completion,
    encode_text_completion,
)
from edgewise.wire.openai import ChatBody, TextBody, decode_chat, decode_text

log = logging.getLogger(__name__)

WISHES: Final[tuple[Wish, ...]] = get_args(Wish)
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold the stream back otherwise
}

Body = ChatBody | TextBody


@dataclass(frozen=True, slots=True)
class Api:
    """What is different between the two."""

    name: str
    id_prefix: str
    decode: Callable[[bytes], Body]
    whole: Callable[..., bytes]
    stream: Callable[..., StreamEncoder]


CHAT = Api("chat", "chatcmpl", decode_chat, encode_chat_completion, ChatEncoder)
TEXT = Api("text", "cmpl", decode_text, encode_text_completion, TextEncoder)


@dataclass(frozen=True, slots=True)
class Node:
    """What the app has for all its requests: `models` that they may name, `decision` of an engine that has no choice,
    `fingerprint` of this version."""

    generator: Generator
    models: frozenset[str]
    decision: Decision
    limits: Limits
    metrics: Metrics
    fingerprint: str
    rules: Rules | None = None


class Crowd:
    """Counts the requests that are being served, over all paths."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._running = 0

    def __enter__(self) -> None:
        if self._running >= self._most:
            raise Overloaded(f"{self._running} requests are being served, which is the limit", hint="try again later")
        self._running += 1

    def __exit__(self, *failure: object) -> None:
        self._running -= 1


class Completions:
    """The ASGI app behind one path. It decides nothing: model and route go to the generator as they were asked for."""

    def __init__(self, node: Node, api: Api, crowd: Crowd) -> None:
        self._node, self._api, self._crowd = node, api, crowd

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(send, self._node.limits.send_s)
        with self._node.metrics.in_flight.track_inprogress():
            try:
                with self._crowd:  # before the body takes any memory
                    await self._serve(HttpRequest(scope, receive), exchange)
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
        self._node.metrics.record(exchange.status, exchange.decision, total_s, exchange.first_token_s)
        route = exchange.decision.route if exchange.decision else "-"
        log.info("%s %d %s %.0f ms", self._api.name, exchange.status, route, total_s * 1000)

    async def _serve(self, http: HttpRequest, exchange: Exchange) -> None:
        check_media_type(http.headers)
        limits = self._node.limits
        body = self._api.decode(await read_body(http, limits))
        check_choices(body, limits.choices)
        came = Request(
            route=self._route(http.headers, body.model),
            deadline_ms=read_deadline_ms(http.headers, limits.deadline_ms),
            group=read_group(http.headers),
            hops=read_hops(http.headers, limits.hops),
            stay=self._rule(http, body.model),
        )
        requests = body.requests(came)
        answer = self._stream(body, requests, exchange) if body.stream else self._whole(body, requests, exchange)
        await until_left(http.receive, exchange, answer)

    def _rule(self, http: HttpRequest, model: str) -> str | None:
        """The privacy rule that this call meets by how it came."""
        rules = self._node.rules
        return None if rules is None else rules.of_call(http.url.path, model, http.headers)

    def _route(self, headers: Headers, model: str) -> Wish:
        """The header decides, else the model's name; either must be one that is served here."""
        models = self._node.models
        if model not in models:
            known = ", ".join(sorted(models))
            raise UnknownModel(f"there is no model {model[:100]!r} here", param="model", hint=f"there are: {known}")
        asked = headers.get("x-edgewise-route", model if model in WISHES else "auto")
        for wish in WISHES:
            if wish == asked and wish in models:
                return wish
        served = ", ".join(wish for wish in WISHES if wish in models)
        raise RequestError(f"x-edgewise-route is {asked[:100]!r}, served is {served}", param="x-edgewise-route")

    async def _whole(self, body: Body, requests: Sequence[Request], exchange: Exchange) -> None:
        """Where the deadline comes in the middle of the answer, what there is of it is the answer."""
        chunks: list[list[Chunk]] = [[] for _ in requests]
        try:
            async with closing(interleaved(self._node.generator, requests)) as pairs:
                async for index, chunk in pairs:
                    chunks[index].append(exchange.saw(chunk))
        except DeadlineExceeded:
            if exchange.first_token_s is None:
                raise
            answers = [self._answer(body, *pair, cut=True) for pair in enumerate(chunks)]
        else:
            answers = [self._answer(body, *pair, cut=False) for pair in enumerate(chunks)]
        exchange.decision = answers[0].decision
        data = self._api.whole(
            self._stamp(next(chunk for some in chunks for chunk in some)),
            answers,
            total([self._counted(answer) for answer in answers], body.choices),
            logprobs=requests[0].logprobs,
        )
        await exchange.start(200, {"content-type": "application/json"} | decision_headers(exchange.decision))
        await exchange.end(data)

    def _answer(self, body: Body, index: int, chunks: Sequence[Chunk], *, cut: bool) -> Answer:
        last = chunks[-1] if chunks else None
        if not (cut and (last is None or last.finish_reason is None)):
            last, cut = complete(last), False
        told = [chunk.decision for chunk in chunks if chunk.decision is not None]
        return Answer(chunks, told[-1] if told else self._node.decision, cut, body.echoed(index))

    def _counted(self, answer: Answer) -> Usage | None:
        usage = None if answer.cut else answer.chunks[-1].usage
        if usage is not None:
            self._node.metrics.count_tokens(answer.decision, usage)
        return usage

    async def _stream(self, body: Body, requests: Sequence[Request], exchange: Exchange) -> None:
        """The headers wait for the first chunk: it carries the decision, and an error before it has a real status."""
        async with closing(interleaved(self._node.generator, requests)) as pairs:
            first = await anext(pairs, None)
            if first is None:
                raise EngineError("the engine gave no answer at all")
            exchange.decision = first[1].decision or self._node.decision
            encoder = self._api.stream(
                self._stamp(first[1]),
                [body.echoed(index) for index in range(len(requests))],
                logprobs=requests[0].logprobs,
                include_usage=body.include_usage,
            )
            relay = Relay(encoder, len(requests), body.choices, self._node, exchange)
            await exchange.start(200, STREAM_HEADERS | decision_headers(exchange.decision))
            async with exchange.pings(self._node.limits.ping_s):
                ending = await relay.run(first, pairs)
        await exchange.end(ending)

    def _stamp(self, chunk: Chunk) -> Stamp:
        name = chunk.model or self._node.generator.name
        return Stamp(f"{self._api.id_prefix}-{secrets.token_hex(12)}", int(time.time()), name, self._node.fingerprint)


class Relay:
    """Sends the answers to one streamed request."""

    def __init__(self, encoder: StreamEncoder, count: int, choices: int, node: Node, exchange: Exchange) -> None:
        self._encoder, self._choices, self._node, self._exchange = encoder, choices, node, exchange
        self._decisions: list[Decision | None] = [None] * count
        self._lasts: list[Chunk | None] = [None] * count

    async def run(self, first: Indexed, pairs: AsyncIterator[Indexed]) -> bytes:
        """Send all but the end, which is what is returned."""
        exchange = self._exchange
        await exchange.write(self._events(*first))
        try:
            async for index, chunk in pairs:
                await exchange.write(self._events(index, chunk))
            return self._end()
        except ClientDisconnect:
            raise
        except Exception as e:  # the status 200 is sent: all that is left is an event that clients raise
            failure = failure_of(e)
            exchange.status = failure.status
            return self._encoder.failure(failure.body)

    def _events(self, index: int, chunk: Chunk) -> bytes:
        decision = self._decisions[index]
        if decision is not None and chunk.finish_reason is None:  # as nearly all are
            return self._encoder.content(index, self._exchange.saw(chunk))
        events = b""
        if decision is None:
            decision = self._decisions[index] = chunk.decision or self._node.decision
            events = self._encoder.opening(index, decision)
        events += self._encoder.content(index, self._exchange.saw(chunk))
        if chunk.finish_reason is not None:
            events += self._close(index, chunk, chunk.decision or decision)
        return events

    def _close(self, index: int, last: Chunk, decision: Decision) -> bytes:
        self._decisions[index] = self._exchange.decision = decision
        self._lasts[index] = last
        if last.usage is not None:
            self._node.metrics.count_tokens(decision, last.usage)
        return self._encoder.closing(index, last, decision)

    def _end(self) -> bytes:
        lasts = [complete(last) for last in self._lasts]
        decision = self._exchange.decision or self._node.decision
        return self._encoder.end(total([last.usage for last in lasts], self._choices), lasts[-1], decision)


def check_choices(body: Body, most: int) -> None:
    """RequestError for more answers than one request may ask for."""
    asked = body.choices * body.prompt_count
    if asked > most:
        param = "n" if body.choices > 1 else "prompt"
        raise RequestError(
            f"{param} asks for {asked} answers, allowed are {most} to one request",
            param=param,
            hint="send several requests; the setting serve.choices sets how many are allowed",
        )


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
