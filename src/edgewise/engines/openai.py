"""Any OpenAI-compatible address as a Generator: another Edgewise node, llama-server, vLLM, Ollama, a cloud.

The remote side always streams, so that its silence is noticed and its work can be stopped.
"""

from __future__ import annotations

import asyncio
import email.utils
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Final
from urllib.parse import SplitResult, urlsplit

import httpx2

from edgewise.devices.address import is_loopback
from edgewise.engines.answer import Stopwatch, check_request
from edgewise.engines.base import ALL_SAMPLING, Capabilities
from edgewise.errors import (
    ConfigError,
    ContextFull,
    DeadlineExceeded,
    EdgewiseError,
    EngineClosed,
    RemoteBroken,
    RemoteRefused,
    RemoteTimeout,
    Unreachable,
)
from edgewise.settings import CloudSettings
from edgewise.types import Chunk, FinishReason, Request, Token, Usage
from edgewise.wire import sse
from edgewise.wire.answers import (
    ChunkBody,
    ErrorBody,
    TextCompletion,
    decode_chunk,
    decode_error,
    decode_models,
    decode_text_chunk,
)
from edgewise.wire.openai import encode_request

DEFAULTS = CloudSettings()
ANSWER_LIMIT = 64 << 20  # bytes of one answer, all events together
ERROR_LIMIT = 64 << 10  # bytes of an error answer that are read
MODELS_LIMIT = 1 << 20
USAGE_WAIT_S = 1.0  # for what may follow a complete answer: its usage, the end mark
DRAIN_WAIT_S = 0.1  # for the end of the body after the end mark; then the connection can be used again

# First match counts. A connection that breaks in the middle counts as unreachable: the answer may come from elsewhere.
ERRORS: Final[tuple[tuple[type[Exception], type[EdgewiseError], str], ...]] = (
    (httpx2.ConnectTimeout, Unreachable, "no connection within {connect:g} s"),
    (httpx2.TimeoutException, RemoteTimeout, "silent for {read:g} s"),
    (httpx2.ConnectError, Unreachable, "no connection"),
    (httpx2.NetworkError, Unreachable, "the connection broke"),
    (httpx2.ProxyError, Unreachable, "the proxy gives no connection"),
    (httpx2.RemoteProtocolError, RemoteBroken, "the answer breaks the rules of HTTP or ends too early"),
    (httpx2.UnsupportedProtocol, ConfigError, "not an http or https address"),
    (httpx2.InvalidURL, ConfigError, "not an address"),
    (httpx2.HTTPError, RemoteBroken, "the exchange failed"),
    (httpx2.CookieConflict, RemoteBroken, "the exchange failed"),
    (httpx2.StreamError, RemoteBroken, "the exchange failed"),
)
VENDOR_ERRORS = tuple(vendor for vendor, _, _ in ERRORS)
Piece = ChunkBody | TextCompletion
_ANY_FAILURE: Final[tuple[type[Exception], ...]] = (*VENDOR_ERRORS, TimeoutError, EdgewiseError)


class OpenAI:
    """A Generator over `url` (with or without a final `/v1`).

    Tokens carry what the remote side tells: where it sends no log-probs, each piece of text counts as one token with
    `logprob` None and id -1. All that was asked for is sent, also what OpenAI's API does not have (wire/openai.py names
    it): that API refuses it, as it should, but a server that skips unknown fields will skip those.

    `key` goes into the Authorization header and nowhere else. `answer_timeout_s` bounds an answer as a whole, for
    servers that trickle. ConfigError for a bad address or key. May be used from several event loops; each has its own
    connections, and `close` closes those of its loop.
    """

    can = Capabilities(logprobs=True, top_logprobs=20, seed=True, sampling=ALL_SAMPLING, prompt_ids=True)

    def __init__(
        self,
        url: str,
        *,
        model: str = "auto",
        key: str | None = None,
        connect_timeout_s: float = 3.0,
        read_timeout_s: float = 60.0,
        answer_timeout_s: float = DEFAULTS.answer_s,
    ) -> None:
        parts = _checked_url(url)
        self.name = parts.netloc if model == "auto" else model
        self.model = model
        self.url = _base(parts)
        self._key = _checked_key(key)
        self._trust_environment = not is_loopback(parts.hostname or "")  # a proxy has no way to our own machine
        self._answer_timeout_s = answer_timeout_s
        self._timeout = httpx2.Timeout(read_timeout_s, connect=connect_timeout_s)
        self._limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32)  # callers bound the rest
        self._clients: dict[asyncio.AbstractEventLoop, httpx2.AsyncClient] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"OpenAI({self.url!r}, model={self.model!r})"

    def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """Besides what the seam promises: RemoteError however the other side fails, ContextFull if it says so."""
        return self._generate(request, Stopwatch(request.deadline_ms))

    async def probe(self, *, timeout_s: float = 2.0) -> list[str]:
        """Names of the models at the address, within `timeout_s`; RemoteError if they do not come."""
        client = self._client()
        try:
            with self._mapped_errors():
                async with (
                    asyncio.timeout(timeout_s),
                    client.stream("GET", f"{self.url}/models", headers=self._headers()) as response,
                ):
                    body = await _read(response, MODELS_LIMIT)
        except TimeoutError:
            raise RemoteTimeout(f"{self.url} does not list its models within {timeout_s:g} s") from None
        if response.status_code != 200:
            raise self._refusal(response.status_code, response.headers, decode_error(body))
        return decode_models(body)

    async def close(self) -> None:
        self._closed = True
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    # --- one answer -------------------------------------------------------------------------------------------------

    async def _generate(self, request: Request, watch: Stopwatch) -> AsyncIterator[Chunk]:
        check_request(request, self.can)
        watch.check()
        answer = _Answer(self._answer_timeout_s)
        async with aclosing(self._pieces(request, watch, answer)) as pieces:
            async for piece in pieces:
                tokens = answer.take(piece)
                for _ in tokens:
                    watch.token(answer.read_at)
                if answer.text or tokens:
                    yield Chunk(answer.text, tokens, model=answer.model or self.name)
        if answer.finish_reason is None:
            raise RemoteBroken(f"{self.url} ended the stream before the answer was complete")
        yield Chunk(
            finish_reason=answer.finish_reason,
            usage=answer.usage,
            timings=watch.timings(),
            model=answer.model or self.name,
        )

    async def _pieces(self, request: Request, watch: Stopwatch, answer: _Answer) -> AsyncGenerator[Piece, None]:
        """The pieces of the answer as they come. Once it is complete, nothing that goes wrong with the rest counts."""
        decode = decode_chunk if request.messages else decode_text_chunk
        with self._mapped_errors():
            response = await self._send(request, watch, answer)
            try:
                async with aclosing(_events(response, watch, answer)) as events:
                    async for event in events:
                        if event.data == b"[DONE]":
                            answer.end()
                        elif not answer.ended:
                            yield self._checked(decode(event.data), response.headers)
            except _ANY_FAILURE:
                if answer.finish_reason is None:
                    raise
            finally:
                await response.aclose()

    async def _send(self, request: Request, watch: Stopwatch, answer: _Answer) -> httpx2.Response:
        """The response, its body unread; whoever gets it closes it. Anything but a 200 is raised."""
        client = self._client()
        message = client.build_request(
            "POST",
            f"{self.url}/{'chat/completions' if request.messages else 'completions'}",
            content=encode_request(request, self.model),
            headers=self._headers() | _wishes(request, watch),
        )
        async with _until(watch, answer.patience_s):
            response = await client.send(message, stream=True)
            try:
                if response.status_code == 200:
                    return response
                error = decode_error(await _read(response, ERROR_LIMIT))
            except BaseException:
                await response.aclose()
                raise
            await response.aclose()
        raise self._refusal(response.status_code, response.headers, error)

    def _checked(self, piece: Piece, headers: Mapping[str, str]) -> Piece:
        """The piece, if it is not an error in the place of one."""
        error = ErrorBody(message=piece.error) if isinstance(piece.error, str) else piece.error
        if isinstance(error, ErrorBody):
            raise self._refusal(_status_of(error), headers, error)
        return piece

    # --- what goes wrong --------------------------------------------------------------------------------------------

    def _refusal(self, status: int, headers: Mapping[str, str], error: ErrorBody) -> EdgewiseError:
        """Our error for an HTTP status and what the error answer says."""
        if full := _context_full(error):
            return full
        message = f"{self.url} answers {status}: {self._clean(error.message or 'no reason given')}"
        if status in (408, 504):
            return RemoteTimeout(message)
        if 300 <= status < 400:
            return RemoteBroken(message, hint=f"it points to {headers.get('location', 'another address')!r}: use that")
        if 400 <= status < 500:
            return RemoteRefused(message, status=status, retry_after_s=_retry_after_s(headers), hint=_HINTS.get(status))
        return RemoteBroken(message)

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        """Errors of httpx2 leave as ours, without its text: that may repeat headers."""
        try:
            yield
        except TimeoutError:  # ours, and with no answer: that of a complete one is nobody's concern
            raise RemoteTimeout(
                f"{self.url} was not done after {self._answer_timeout_s:g} s",
                hint="cloud.answer_s sets how long an answer may take",
            ) from None
        except VENDOR_ERRORS as e:
            self._check_open()  # close() breaks the connections of what still runs
            ours, text = next((ours, text) for vendor, ours, text in ERRORS if isinstance(e, vendor))
            what = text.format(connect=self._timeout.connect, read=self._timeout.read)
            hint = "check that a server runs there" if ours is Unreachable else None
            raise ours(f"{self.url}: {what} ({type(e).__name__})", hint=hint) from e

    def _clean(self, text: str) -> str:
        """A remote text in one bounded line, without our key should it be repeated there."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text.split())[:300]

    # --- connections ------------------------------------------------------------------------------------------------

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed(f"{self.name} was closed")

    def _client(self) -> httpx2.AsyncClient:
        """The connections of this event loop; those of loops that are gone are dropped."""
        self._check_open()
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients = {kept: client for kept, client in self._clients.items() if not kept.is_closed()}
            self._clients[loop] = httpx2.AsyncClient(
                timeout=self._timeout,
                limits=self._limits,
                trust_env=self._trust_environment,
                headers={"Accept-Encoding": "identity", "Content-Type": "application/json"},
            )
        return self._clients[loop]


class _Answer:
    """What is known so far of an answer, which may take `most_s`; `text` is that of the newest piece, `read_at` when it
    came in (the monotonic clock): pieces that came together were not made in the time that it takes to read them."""

    def __init__(self, most_s: float) -> None:
        self._end = time.monotonic() + most_s
        self.read_at = 0.0
        self.text = ""
        self.model: str | None = None
        self.usage: Usage | None = None
        self.finish_reason: FinishReason | None = None
        self.ended = False

    @property
    def patience_s(self) -> float:
        """How long to wait for more; the timeouts of the connection bound it too."""
        if self.ended:
            return DRAIN_WAIT_S
        return self._end - time.monotonic() if self.finish_reason is None else USAGE_WAIT_S

    def take(self, piece: Piece) -> tuple[Token, ...]:
        """The tokens of one more piece."""
        self.text = ""
        self.model = self.model or piece.model
        if piece.usage:
            self.usage = piece.usage.value()
        choice = next((choice for choice in piece.choices or () if choice.index == 0), None)
        if choice is None:
            return ()
        if choice.finish_reason == "content_filter":
            raise RemoteRefused("the other side's content filter ended the answer", status=200)
        if choice.finish_reason:
            self.finish_reason = "length" if choice.finish_reason == "length" else "stop"
        self.text = choice.text
        return choice.tokens()

    def end(self) -> None:
        """The end mark came; some servers leave the reason out."""
        self.finish_reason = self.finish_reason or "stop"
        self.ended = True


async def _events(response: httpx2.Response, watch: Stopwatch, answer: _Answer) -> AsyncGenerator[sse.Event, None]:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise RemoteBroken(
            f"the answer is compressed ({response.headers['content-encoding']}), which was not asked for"
        )
    decoder = sse.Decoder()
    left = ANSWER_LIMIT
    async with aclosing(response.aiter_raw()) as pieces:
        while True:
            async with _until(watch, answer.patience_s):
                piece = await anext(pieces, None)
            if piece is None:
                break
            answer.read_at = time.monotonic()
            left -= len(piece)
            if left < 0:
                raise RemoteBroken(f"the answer is longer than {ANSWER_LIMIT} bytes")
            for event in decoder.feed(piece):
                yield event
    for event in decoder.end():
        yield event


@asynccontextmanager
async def _until(watch: Stopwatch, most_s: float) -> AsyncIterator[None]:
    """Bounds what is awaited inside by the deadline of the request, which then is DeadlineExceeded, and by `most_s`,
    which is TimeoutError. Never held across a yield: it would cancel the reader."""
    left_s = watch.remaining_s()
    try:
        async with asyncio.timeout(min(left_s, most_s)):
            yield
    except TimeoutError:
        if most_s < left_s:
            raise
        raise DeadlineExceeded("the request's deadline passed before the other side's answer was complete") from None


async def _read(response: httpx2.Response, limit: int) -> bytes:
    """The body, or its first `limit` bytes and a little more."""
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > limit:
            break
    return bytes(body)


def _wishes(request: Request, watch: Stopwatch) -> dict[str, str]:
    """What Edgewise nodes understand beyond OpenAI's body."""
    wishes = {"x-edgewise-hops": str(request.hops + 1)}
    if request.route != "auto":
        wishes["x-edgewise-route"] = request.route
    if request.deadline_ms is not None:
        wishes["x-request-deadline-ms"] = str(max(1, int(watch.remaining_s() * 1000)))
    return wishes


_HINTS = {
    401: "check the key",
    403: "check the key",
    404: "check the address and the model's name",
    429: "its quota is used up, or it is busy",
}
_CONTEXT_WORDS = re.compile(r"context[ _](length|size|window)", re.IGNORECASE)
_CONTEXT_LIMIT = re.compile(r"context (?:length|size|window)(?: is| of|:)? (\d{1,9})\b", re.IGNORECASE)


def _context_full(error: ErrorBody) -> ContextFull | None:
    """Whether the prompt was too long, as OpenAI, vLLM and llama-server say it. The need is the largest number in the
    text; the limit is the one that is called so, else the largest below the need. None where there are no two."""
    if isinstance(error.n_prompt_tokens, int) and isinstance(error.n_ctx, int):
        return ContextFull(error.n_prompt_tokens, error.n_ctx, param=error.param)
    text = error.message or ""
    if error.code != "context_length_exceeded" and not _CONTEXT_WORDS.search(text):
        return None
    *below, needed = sorted({int(number) for number in re.findall(r"\b\d{1,9}\b", text)}) or [0]
    named = _CONTEXT_LIMIT.search(text)
    limit = int(named[1]) if named else max(below, default=needed)
    return ContextFull(needed, limit, param=error.param) if limit < needed else None


def _status_of(error: ErrorBody) -> int:
    """The status that an error inside a stream would have had."""
    if error.code == "deadline_exceeded":
        return 504
    return error.code if isinstance(error.code, int) and 400 <= error.code <= 599 else 500


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Retry-After in seconds, from either of its forms; None without one that makes sense."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


# --- settings ---------------------------------------------------------------------------------------------------------


def _checked_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        good = False
    if not good or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ConfigError(f"{url!r} is not an address", hint="it looks like http://host:8000 or https://host/v1")
    if "@" in parts.netloc:
        raise ConfigError(f"the address of {parts.hostname} holds credentials", hint="give the key as `key`")
    if parts.query or parts.fragment:
        raise ConfigError(f"{url!r} has a query or a fragment", hint="give the address alone, as http://host:8000")
    return parts


def _base(parts: SplitResult) -> str:
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _checked_key(key: str | None) -> str | None:
    """An error about a key never shows it."""
    if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError("the key is empty, or holds a space, a line break or a letter outside ASCII")
    return key
