"""The client side against servers that misbehave in every way, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import httpx2
import pytest

from edgewise.engines import openai as engine_room
from edgewise.engines.fake import FakeGenerator, Script
from edgewise.engines.openai import VENDOR_ERRORS, OpenAI
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
from edgewise.types import Chunk, Message, Request, Token, Usage
from served import Served, eventually

ASK = Request(messages=(Message("user", "Hi"),))
KEY = "sk-very-secret"

Reply = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Remote:
    """A server that reads requests and answers with bytes as scripted; `heads` and `bodies` are what it read."""

    def __init__(self, reply: bytes | Reply) -> None:
        self._reply = reply
        self.heads: list[str] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.asked = asyncio.Event()  # a request is there
        self.left = asyncio.Event()  # a client hung up
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head.decode("latin-1").lower())
                length = self.heads[-1].partition("content-length: ")[2].partition("\r\n")[0]
                self.bodies.append(await reader.readexactly(int(length or 0)))
                self.asked.set()
                if isinstance(self._reply, bytes):
                    writer.write(self._reply)
                    await writer.drain()
                    if not self._reply.endswith(b"\r\n0\r\n\r\n"):
                        return
                else:
                    return await self._reply(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.left.set()
            writer.close()


@asynccontextmanager
async def remote(reply: bytes | Reply) -> AsyncIterator[Remote]:
    it = Remote(reply)
    server = await asyncio.start_server(it.serve, "127.0.0.1", 0)
    it.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield it


@asynccontextmanager
async def engine(url: str, **options: object) -> AsyncIterator[OpenAI]:
    it = OpenAI(url, **{"read_timeout_s": 5.0} | options)  # type: ignore[arg-type]
    try:
        yield it
    finally:
        await it.close()


async def answer(it: OpenAI, request: Request = ASK) -> list[Chunk]:
    return [chunk async for chunk in it.generate(request)]


async def answer_of(reply: bytes | Reply, request: Request = ASK, **options: object) -> list[Chunk]:
    async with remote(reply) as server, engine(server.url, **options) as it:
        return await answer(it, request)


def http(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def events(*datas: str) -> bytes:
    return "".join(f"data: {data}\n\n" for data in datas).encode()


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + (b"0\r\n\r\n" if end else b"")


def piece(text: str = "", reason: str | None = None, **more: object) -> str:
    return json.dumps(
        {"model": "m", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]} | more
    )


GOOD = events(piece("Hel"), piece("lo"), piece(reason="stop"), "[DONE]")


# --- good answers -----------------------------------------------------------------------------------------------------


async def test_an_answer_of_text_alone() -> None:
    *chunks, last = await answer_of(chunked(GOOD))
    assert [chunk.text for chunk in chunks] == ["Hel", "lo"]
    assert [chunk.tokens for chunk in chunks] == [(Token(-1, b"Hel", None),), (Token(-1, b"lo", None),)]
    assert (last.finish_reason, last.usage, last.text, last.model) == ("stop", None, "", "m")
    assert last.timings is not None
    assert 0 < last.timings.first_token_ms <= last.timings.total_ms
    assert all(chunk.finish_reason is chunk.usage is chunk.timings is None for chunk in chunks)


@pytest.mark.parametrize(
    ("stream", "text", "reason", "usage"),
    [
        pytest.param(
            events(piece("a", "stop"), '{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}', "[DONE]"),
            "a", "stop", Usage(3, 1), id="reason beside the last text, usage after it",
        ),
        pytest.param(events(piece("a"), "[DONE]"), "a", "stop", None, id="no reason"),
        pytest.param(events(piece("a"), piece(reason="length")), "a", "length", None, id="no end mark"),
        pytest.param(events(piece("a"), piece(reason="eos")), "a", "stop", None, id="a reason of its own"),
        pytest.param(events(piece("a"), piece(reason="stop"), "nonsense"), "a", "stop", None, id="nonsense behind it"),
        pytest.param(events(piece("a"), "[DONE]", piece("b")), "a", "stop", None, id="text after the end mark"),
        pytest.param(b": ping\r\n\r\n" + GOOD.replace(b"\n", b"\r\n"), "Hello", "stop", None, id="comments and CRLF"),
        pytest.param(events(piece("a"), piece(reason="stop")).rstrip(), "a", "stop", None, id="no last line end"),
        pytest.param(
            events(json.dumps({"choices": [{"index": 1, "delta": {"content": "x"}}]}), piece("a", "stop")),
            "a", "stop", None, id="another choice",
        ),
        pytest.param(events("{}", piece("", "stop")), "", "stop", None, id="empty answer"),
    ],
)  # fmt: skip
async def test_answers_of_many_kinds_of_servers(stream: bytes, text: str, reason: str, usage: Usage | None) -> None:
    for reply in (chunked(stream), chunked(*(bytes([byte]) for byte in stream)), http(200, stream)):
        *chunks, last = await answer_of(reply)
        assert "".join(chunk.text for chunk in chunks) == text
        assert (last.finish_reason, last.usage) == (reason, usage)


async def test_a_complete_answer_stays_one_when_the_connection_breaks_behind_it() -> None:
    *_, last = await answer_of(chunked(events(piece("a"), piece(reason="stop")), b"cut off", end=False)[:-3])
    assert last.finish_reason == "stop"


async def test_a_complete_answer_does_not_wait_for_an_end_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(chunked(events(piece("a"), piece(reason="stop")), end=False))
        await reader.read()

    monkeypatch.setattr(engine_room, "USAGE_WAIT_S", 0.01)
    *_, last = await answer_of(reply, read_timeout_s=60)
    assert last.finish_reason == "stop"


async def test_logprobs_of_a_real_server_arrive_to_the_byte() -> None:
    tokens = (Token(1, b"\xf0\x9f", -0.5), Token(2, b"\x91\x8d", -1.5), Token(3, b"!", -2.0))
    with Served(FakeGenerator(Script(tokens))) as served:
        async with engine(served.url) as it:
            *chunks, last = await answer(it, replace(ASK, logprobs=True, top_logprobs=2))
    arrived = [token for chunk in chunks for token in chunk.tokens]
    assert [(token.raw, token.logprob, len(token.top)) for token in arrived] == [
        (token.raw, token.logprob, 2) for token in tokens
    ]
    assert "".join(chunk.text for chunk in chunks) == "👍!"
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


async def test_what_is_sent() -> None:
    async with remote(chunked(GOOD)) as server, engine(server.url + "/v1/", model="big", key=KEY) as it:
        await answer(it, replace(ASK, route="cloud", deadline_ms=5000.0))
    head, body = server.heads[0], json.loads(server.bodies[0])
    assert head.startswith("post /v1/chat/completions http/1.1")
    assert f"authorization: bearer {KEY}" in head
    assert "accept-encoding: identity" in head
    assert "x-edgewise-route: cloud" in head
    assert 4000 < int(head.partition("x-request-deadline-ms: ")[2].partition("\r\n")[0]) <= 5000
    assert body["model"] == "big"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert "logprobs" not in body


async def test_connections_are_kept_and_each_loop_has_its_own() -> None:
    async with remote(chunked(GOOD)) as server, engine(server.url) as it:
        for _ in range(5):
            await answer(it)
        assert server.connections == 1
        assert await asyncio.to_thread(lambda: len(asyncio.run(_once(it)))) == 3
        await answer(it)
        assert server.connections == 2


async def _once(it: OpenAI) -> list[Chunk]:
    chunks = await answer(it)
    await it._client().aclose()
    return chunks


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (http(401, b'{"error":{"message":"bad key ' + KEY.encode() + b'"}}'), RemoteRefused, "401: bad key ***"),
        (http(403, b""), RemoteRefused, "no reason given"),
        (http(404, b'{"error":"model not found"}'), RemoteRefused, "model not found"),
        (http(422, b"<html>" + b"x" * 100_000), RemoteRefused, "422: <html>"),
        (http(302, b"", "Location: http://other/v1"), RemoteBroken, "http://other/v1"),
        (http(408, b""), RemoteTimeout, "408"),
        (http(500, b"oops"), RemoteBroken, "500: oops"),
        (http(503, b""), RemoteBroken, "503"),
        (http(504, b'{"error":{"message":"late","code":"deadline_exceeded"}}'), RemoteTimeout, "late"),
        (http(204, b""), RemoteBroken, "204"),
        (http(200, b'{"choices":[{"message":{"content":"whole"}}]}'), RemoteBroken, "before the answer was complete"),
        (http(200, b""), RemoteBroken, "before the answer was complete"),
        (chunked(events(piece("a"))), RemoteBroken, "before the answer was complete"),
        (chunked(events(piece("a"), "{nonsense")), RemoteBroken, "makes no sense"),
        (chunked(b"data: \xff\n\n"), RemoteBroken, "makes no sense"),
        (chunked(events(piece("a")), end=False), RemoteBroken, "RemoteProtocolError"),
        (chunked(events('{"error":{"message":"no memory","code":500}}')), RemoteBroken, "no memory"),
        (chunked(events(piece("a"), '{"error":{"message":"slow down","code":429}}')), RemoteRefused, "slow down"),
        (chunked(events(piece("a"), '{"error":"crashed"}')), RemoteBroken, "crashed"),
        (chunked(events('{"error":{"message":"late","code":"deadline_exceeded"}}')), RemoteTimeout, "late"),
        (chunked(events(piece("a", "content_filter"))), RemoteRefused, "content filter"),
        (chunked(GOOD).replace(b"Type: text", b"Encoding: gzip\r\nX: text"), RemoteBroken, "compressed"),
        (b"", RemoteBroken, "RemoteProtocolError"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", RemoteBroken, "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", RemoteBroken, "RemoteProtocolError"),
    ],
)  # fmt: skip
async def test_every_bad_answer_has_its_error(reply: bytes, error: type[EdgewiseError], words: str) -> None:
    with pytest.raises(error) as caught:
        await answer_of(reply, key=KEY)
    assert words in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ((), None),
        (("Retry-After: 7",), 7.0),
        (("Retry-After: 0.5",), 0.5),
        (("Retry-After: Wed, 21 Oct 2015 07:28:00 GMT",), 0.0),
        (("Retry-After: soon",), None),
        (("Retry-After: " + "9" * 500,), None),
    ],
)
async def test_a_used_up_quota_tells_when_to_come_back(headers: tuple[str, ...], seconds: float | None) -> None:
    with pytest.raises(RemoteRefused) as caught:
        await answer_of(http(429, b"{}", *headers))
    assert (caught.value.status, caught.value.retryable, caught.value.retry_after_s) == (429, True, seconds)


@pytest.mark.parametrize(
    "error",
    [
        {"message": "the prompt is long", "n_prompt_tokens": 5000, "n_ctx": 4096, "code": 400},
        {"message": "the request needs 5000 tokens of context, the model has 4096", "code": "context_length_exceeded"},
        {"message": "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4500 in "
                    "the messages, 500 in the completion)."},
    ],
)  # fmt: skip
async def test_a_full_context_is_told_apart(error: dict[str, object]) -> None:
    body = json.dumps({"error": error}).encode()
    for reply in (http(400, body), chunked(events(body.decode()))):
        with pytest.raises(ContextFull) as caught:
            await answer_of(reply)
        assert caught.value.limit == 4096
        assert caught.value.needed == 5000


async def test_a_full_context_without_numbers_is_a_refusal() -> None:
    with pytest.raises(RemoteRefused):
        await answer_of(http(400, b'{"error":{"message":"context length exceeded"}}'))


async def test_the_full_context_of_a_real_server() -> None:
    with Served(FakeGenerator()) as served:
        async with engine(served.url) as it:
            with pytest.raises(ContextFull) as caught:
                await answer(it, replace(ASK, messages=(Message("user", "word " * 5000),)))
    assert caught.value.limit == 4096
    assert caught.value.needed > 25_000


async def test_a_server_without_tls() -> None:
    async with (
        remote(chunked(GOOD)) as server,
        engine(server.url.replace("http:", "https:"), connect_timeout_s=0.2) as it,
    ):
        with pytest.raises(Unreachable):
            await answer(it)


async def test_nobody_there() -> None:
    async with remote(b"") as server:
        pass
    async with engine(server.url) as it:
        for ask in (answer(it), it.probe()):
            with pytest.raises(Unreachable, match="no connection") as caught:
                await ask
            assert server.url in str(caught.value)


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def silence_after_a_piece(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(chunked(events(piece("a")), end=False))
    await reader.read()


async def pings_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(chunked(end=False))
    while not reader.at_eof():
        writer.write(b"8\r\n: ping\n\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("reply", [silence, silence_after_a_piece])
async def test_silence_is_a_timeout(reply: Reply) -> None:
    with pytest.raises(RemoteTimeout, match=r"silent for 0\.05 s"):
        await answer_of(reply, read_timeout_s=0.05)


async def headers_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not reader.at_eof():
        writer.write(b"X: y\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("reply", [pings_for_ever, headers_for_ever])
async def test_without_a_deadline_a_trickle_ends_too(reply: Reply) -> None:
    with pytest.raises(RemoteTimeout, match=r"not done after 0\.1 s"):
        await answer_of(reply, answer_timeout_s=0.1)


@pytest.mark.parametrize("reply", [silence, silence_after_a_piece, pings_for_ever])
async def test_the_deadline_holds_whatever_the_other_side_does(reply: Reply) -> None:
    async with remote(reply) as server, engine(server.url) as it:
        with pytest.raises(DeadlineExceeded):
            await answer(it, replace(ASK, deadline_ms=100.0))
        await asyncio.wait_for(server.left.wait(), 10)


async def test_the_deadline_counts_from_the_call() -> None:
    async with remote(chunked(GOOD)) as server, engine(server.url) as it:
        late = it.generate(replace(ASK, deadline_ms=1.0))
        await asyncio.sleep(0.01)
        with pytest.raises(DeadlineExceeded):
            await anext(late)
    assert server.connections == 0


async def test_a_reader_that_takes_its_time_is_not_interrupted() -> None:
    async with remote(chunked(GOOD)) as server, engine(server.url, read_timeout_s=0.05) as it:
        async for chunk in it.generate(ASK):
            await asyncio.sleep(0.1)
            assert chunk.model == "m"


@pytest.mark.parametrize("reply", [silence, silence_after_a_piece])
async def test_a_cancelled_reader_hangs_up(reply: Reply) -> None:
    async with remote(reply) as server, engine(server.url) as it:
        task = asyncio.create_task(answer(it))
        await asyncio.wait_for(server.asked.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(server.left.wait(), 10)


async def test_a_reader_that_stops_early_hangs_up() -> None:
    async with remote(silence_after_a_piece) as server, engine(server.url) as it:
        chunks = it.generate(ASK)
        assert inspect.isasyncgen(chunks)
        async with aclosing(chunks):
            assert (await anext(chunks)).text == "a"
        await asyncio.wait_for(server.left.wait(), 10)


async def test_the_work_of_a_real_server_stops_too() -> None:
    fake = FakeGenerator(replace(Script.of("one two"), hangs=True, breaks_at=1))
    with Served(fake) as served:
        async with engine(served.url) as it:
            chunks = it.generate(ASK)
            assert inspect.isasyncgen(chunks)
            await anext(chunks)
            await chunks.aclose()
            await asyncio.to_thread(eventually, lambda: fake.cancelled == 1)


async def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = events(piece("x" * 1000))
        writer.write(chunked(end=False))
        while not writer.is_closing():
            writer.write(b"%x\r\n%b\r\n" % (len(body), body))
            await writer.drain()

    monkeypatch.setattr(engine_room, "ANSWER_LIMIT", 50_000)
    with pytest.raises(RemoteBroken, match="longer than 50000 bytes"):
        await answer_of(reply)


async def test_an_event_without_end_is_cut_off() -> None:
    with pytest.raises(RemoteBroken, match="an event of the stream is longer"):
        await answer_of(chunked(b"data: " + b"x" * (5 << 20)))


async def test_tokens_that_come_in_one_burst_have_no_speed() -> None:
    chunks = await answer_of(chunked(events(*[piece("word ")] * 200, "[DONE]")))
    assert sum(len(chunk.tokens) for chunk in chunks) == 200
    timings = chunks[-1].timings
    assert timings is not None
    assert timings.decode_tok_s is None


# --- what this engine cannot do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wish", "sent"), [({"prompt_ids": (1, 2)}, [1, 2]), ({"prompt": "Once"}, "Once")])
async def test_what_is_no_conversation_goes_to_the_older_api(wish: dict[str, object], sent: object) -> None:
    piece = b'data: {"choices":[{"index":0,"text":" upon","logprobs":{"tokens":["bytes:\\\\xe2\\\\x82"],'
    piece += b'"token_logprobs":[-0.5],"top_logprobs":[{"a":-2.0,"b":-1.0}]},"finish_reason":"stop"}]}\n\n'
    async with remote(chunked(piece + b"data: [DONE]\n\n")) as server, engine(server.url) as it:
        chunks = await answer(it, replace(Request(**wish), logprobs=True, top_logprobs=2))
    assert server.heads[0].startswith("post /v1/completions ")
    assert json.loads(server.bodies[0])["prompt"] == sent
    assert chunks[0].text == " upon"
    assert chunks[0].tokens[0].raw == b"\xe2\x82"
    assert [candidate.raw for candidate in chunks[0].tokens[0].top] == [b"b", b"a"]


async def test_a_closed_engine_says_so() -> None:
    async with remote(chunked(GOOD)) as server, engine(server.url) as it:
        await answer(it)
        await it.close()
        await it.close()
        for ask in (answer(it), it.probe()):
            with pytest.raises(EngineClosed):
                await ask


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://host", "http://", "http://host:99999", "http://host:0", "http://[::1",
     "http://ho st/", "http://user:pass@host", "http://host/v1?key=x", "http://host/#x", "http://host\n/", "file:///etc/passwd"],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenAI(url)
    assert "pass" not in str(caught.value) or "passwd" in url


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "schlüssel"])
def test_keys_that_are_none_are_not_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OpenAI("http://host", key=key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("https://host/openai/v1", "https://host/openai/v1"),
        ("http://[::1]:80/x", "http://[::1]:80/x/v1"),
    ],
)
def test_addresses_with_and_without_the_version(url: str, base: str) -> None:
    it = OpenAI(url, key=KEY)
    assert it.url == base
    assert KEY not in repr(it) + str(it) + it.name


# --- probe ------------------------------------------------------------------------------------------------------------


async def test_the_probe_lists_the_models() -> None:
    with Served(FakeGenerator(), keys=[KEY]) as served:
        async with engine(served.url, key=KEY) as it:
            assert await it.probe() == ["auto", "edge", "cloud", "maker/model:q4"]
        async with engine(served.url) as it:
            with pytest.raises(RemoteRefused, match="check the key"):
                await it.probe()


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (silence, RemoteTimeout),
        (http(200, b"nonsense"), RemoteBroken),
        (http(200, b'{"data":[' + b" " * (2 << 20) + b"]}"), RemoteBroken),
        (http(500, b""), RemoteBroken),
    ],
)
async def test_a_probe_is_bounded(reply: bytes | Reply, error: type[EdgewiseError]) -> None:
    async with remote(reply) as server, engine(server.url) as it:
        with pytest.raises(error):
            await it.probe(timeout_s=0.2)


# --- the vendor's errors ----------------------------------------------------------------------------------------------


def vendor_errors() -> list[type[Exception]]:
    found = [getattr(httpx2, name) for name in httpx2.__all__]
    return [it for it in found if inspect.isclass(it) and issubclass(it, Exception)]


@pytest.mark.parametrize("kind", vendor_errors())
def test_every_error_of_the_vendor_is_mapped(kind: type[Exception]) -> None:
    assert issubclass(kind, VENDOR_ERRORS)
    error = kind.__new__(kind)
    with pytest.raises(EdgewiseError, match="http://host/v1") as caught, OpenAI("http://host")._mapped_errors():
        raise error
    assert not isinstance(caught.value, httpx2.HTTPError)


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        (httpx2.ConnectTimeout, Unreachable),
        (httpx2.ConnectError, Unreachable),
        (httpx2.ReadError, Unreachable),
        (httpx2.WriteError, Unreachable),
        (httpx2.ReadTimeout, RemoteTimeout),
        (httpx2.RemoteProtocolError, RemoteBroken),
        (httpx2.InvalidURL, ConfigError),
    ],
)
def test_what_becomes_of_the_commonest(kind: type[Exception], ours: type[EdgewiseError]) -> None:
    with pytest.raises(ours), OpenAI("http://host")._mapped_errors():
        raise kind("text")


async def test_nothing_is_left_behind() -> None:
    """Connections that nobody closes would be warnings here, and warnings are errors."""
    for reply in (chunked(GOOD), http(500, b""), chunked(events(piece("a")))):
        async with remote(reply) as server:
            async with engine(server.url) as it:
                for _ in range(3):
                    try:
                        await answer(it)
                    except RemoteBroken:
                        continue
            await asyncio.wait_for(server.left.wait(), 10)
    gc.collect()
