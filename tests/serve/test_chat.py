"""The real client of OpenAI against the real server, with a scripted engine behind it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from edgewise.engines.fake import FakeGenerator, Script
from edgewise.engines.openai import OpenAI
from edgewise.errors import (
    ContextFull,
    DeadlineExceeded,
    EdgewiseError,
    EngineClosed,
    EngineError,
    GapError,
    Overloaded,
    RemoteBroken,
    RemoteRefused,
    RemoteTimeout,
    RequestError,
    UnknownModel,
    Unreachable,
)
from edgewise.joint.breaker import Breaker
from edgewise.joint.cascade import Cascade
from edgewise.joint.privacy import Rules
from edgewise.serve.errors import failure_of
from edgewise.serve.exchange import Limits
from edgewise.types import Chunk, Decision, Message, Request, Token
from edgewise.wire.answers import ErrorBody
from served import MODELS, Served, eventually

Serve = Callable[..., Served]
HELLO: Any = [{"role": "user", "content": "Hello"}]
TEXT = "Grüße aus 日本, 👍 und mehr."


@contextmanager
def client(served: Served, **options: Any) -> Iterator[openai.OpenAI]:
    options = {"api_key": "none", "max_retries": 0} | options
    with openai.OpenAI(base_url=f"{served.url}/v1", **options) as it:
        yield it


class Cascading(FakeGenerator):
    """Tells a decision on the first and on the last chunk, as a cascade does."""

    decision = Decision("edge_fallback", 0.123456, "cloud\nunreachable")

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        first = True
        async for chunk in super().generate(request):
            known = first or chunk.finish_reason
            yield replace(chunk, decision=self.decision if known else None, model="small")
            first = False


class Silent(FakeGenerator):
    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        for _ in ():
            yield Chunk()


class Endless(FakeGenerator):
    """Never says why it ended."""

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        yield Chunk("text", (Token(1, b"text", -0.1),))


@pytest.fixture(scope="module")
def shared_engine() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture(scope="module")
def shared(shared_engine: FakeGenerator) -> Iterator[Served]:
    """One server for the many small cases; whoever wants another answer gives `shared_engine` one."""
    with Served(shared_engine) as served:
        yield served


def test_a_whole_answer(serve: Serve) -> None:
    with client(serve(FakeGenerator(TEXT))) as api:
        answer = api.chat.completions.create(model="auto", messages=HELLO)
    choice = answer.choices[0]
    assert choice.message.content == TEXT
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "fake"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(TEXT.split())


def test_a_streamed_answer(serve: Serve) -> None:
    with client(serve(FakeGenerator(TEXT))) as api:
        chunks = list(api.chat.completions.create(model="auto", messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert not chunks[-1].choices[0].delta.content
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_async_client_and_many_at_once(serve: Serve) -> None:
    served = serve(FakeGenerator(lambda request: f"You said {request.messages[-1].content}."))

    async def ask(api: openai.AsyncOpenAI, number: int) -> str:
        messages: Any = [{"role": "user", "content": f"number {number}"}]
        if number % 2:
            stream = await api.chat.completions.create(model="edge", messages=messages, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        answer = await api.chat.completions.create(model="edge", messages=messages)
        return answer.choices[0].message.content or ""

    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as api:
        answers = await asyncio.gather(*(ask(api, number) for number in range(40)))
    assert answers == [f"You said number {number}." for number in range(40)]


def test_usage_is_streamed_when_asked_for(serve: Serve) -> None:
    with client(serve(FakeGenerator(TEXT))) as api:
        chunks = list(
            api.chat.completions.create(
                model="auto", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        )
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(serve: Serve, stream: bool) -> None:
    half = Script((Token(1, b"\xf0\x9f", -0.5), Token(2, b"\x91\x8d", -1.5), Token(3, b"!", -2.0)))
    with client(serve(FakeGenerator(half))) as api:
        asked: Any = {"model": "auto", "messages": HELLO, "logprobs": True, "top_logprobs": 2, "stream": stream}
        answer = api.chat.completions.create(**asked)
        pieces = list(answer) if stream else [answer]
    tokens = [
        token
        for piece in pieces
        for choice in piece.choices
        if choice.logprobs
        for token in choice.logprobs.content or []
    ]
    assert [token.logprob for token in tokens] == [-0.5, -1.5, -2.0]
    assert bytes(byte for token in tokens for byte in token.bytes or []).decode() == "👍!"
    assert [len(token.top_logprobs) for token in tokens] == [2, 2, 2]


def test_stop_seed_and_limits_reach_the_engine(serve: Serve) -> None:
    engine = FakeGenerator("one two three four")
    with client(serve(engine)) as api:
        answer = api.chat.completions.create(
            model="auto", messages=HELLO, stop=["three"], seed=7, temperature=0.5, top_p=0.9, max_tokens=9, user="u"
        )
        cut = api.chat.completions.create(model="auto", messages=HELLO, max_completion_tokens=2)
    assert answer.choices[0].message.content == "one two "
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("one two ", "length")
    request = engine.requests[0]
    assert (request.sampling.seed, request.sampling.temperature, request.sampling.top_p) == (7, 0.5, 0.9)
    assert (request.stop, request.max_tokens) == (("three",), 9)


def test_an_answer_that_is_sent_back_is_understood(serve: Serve) -> None:
    engine = FakeGenerator("Hi.")
    with client(serve(engine)) as api:
        answer = api.chat.completions.create(model="auto", messages=HELLO)
        turns: Any = [*HELLO, answer.choices[0].message, {"role": "user", "content": "More"}]
        api.chat.completions.create(model="auto", messages=turns)
        dumped: Any = [*HELLO, answer.choices[0].message.model_dump(), {"role": "user", "content": "More"}]
        api.chat.completions.create(model="auto", messages=dumped)
    assert engine.requests[1].messages[1] == Message("assistant", "Hi.")
    assert engine.requests[2].messages == engine.requests[1].messages


# --- route and headers ------------------------------------------------------------------------------------------------


def post(served: Served, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
    body = {"model": "auto", "messages": HELLO} | fields
    with httpx2.Client(trust_env=False) as http:
        return http.post(f"{served.url}/v1/chat/completions", json=body, headers=headers or {})


@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_tells_route_confidence_and_reason(serve: Serve, stream: bool) -> None:
    response = post(serve(Cascading("a b")), stream=stream)
    assert response.headers["x-edgewise-route"] == "edge_fallback"
    assert response.headers["x-edgewise-confidence"] == "0.1235"
    assert response.headers["x-edgewise-reason"] == "cloud?unreachable"
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line and "[DONE]" not in line]
    told = [answer["x_edgewise"] for answer in map(json.loads, lines) if "x_edgewise" in answer]
    assert [tell["route"] for tell in told] == ["edge_fallback"] * (2 if stream else 1)
    assert [tell["timings"] is None for tell in told] == ([True, False] if stream else [False])
    assert {json.loads(line)["model"] for line in lines} == {"small"}


def test_an_engine_without_a_choice_has_the_route_of_the_app(serve: Serve) -> None:
    response = post(serve(FakeGenerator(), route="cloud"))
    assert response.headers["x-edgewise-route"] == "cloud"
    assert "x-edgewise-confidence" not in response.headers
    assert response.json()["x_edgewise"]["confidence"] is None


@pytest.mark.parametrize(
    ("model", "header", "route"),
    [
        ("auto", None, "auto"),
        ("edge", None, "edge"),
        ("cloud", None, "cloud"),
        ("maker/model:q4", None, "auto"),
        ("maker/model:q4", "cloud", "cloud"),
        ("cloud", "edge", "edge"),
    ],
)
def test_the_route_that_is_wished_for(
    shared: Served, shared_engine: FakeGenerator, model: str, header: str | None, route: str
) -> None:
    response = post(shared, {"x-edgewise-route": header} if header else None, model=model)
    assert response.status_code == 200
    assert shared_engine.requests[-1].route == route


def test_the_deadline_reaches_the_engine(serve: Serve) -> None:
    engine = FakeGenerator()
    post(serve(engine), {"x-request-deadline-ms": "2500.5"})
    assert engine.requests[0].deadline_ms == 2500.5


@pytest.mark.parametrize(
    ("headers", "param"),
    [({"x-edgewise-route": "moon"}, "x-edgewise-route")]
    + [
        ({"x-request-deadline-ms": text}, "x-request-deadline-ms")
        for text in ("", "0", "-1", "nan", "inf", "1e3", "soon", "86400001", "9" * 400)
    ],
)
def test_headers_with_a_bad_value_are_named(shared: Served, headers: dict[str, str], param: str) -> None:
    response = post(shared, headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_route_that_is_not_served_is_refused(serve: Serve) -> None:
    served = serve(FakeGenerator(), models=["auto", "cloud"], route="cloud")
    assert post(served, model="edge").status_code == 404
    assert post(served, {"x-edgewise-route": "edge"}).status_code == 400
    assert post(served, model="cloud").status_code == 200


def test_stream_headers(serve: Serve) -> None:
    response = post(serve(), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.text.endswith("data: [DONE]\n\n")


# --- models, health, keys, metrics ------------------------------------------------------------------------------------


def test_models(serve: Serve) -> None:
    with client(serve()) as api:
        assert [model.id for model in api.models.list()] == list(MODELS)
        assert api.models.retrieve("maker/model:q4").id == "maker/model:q4"
        with pytest.raises(openai.NotFoundError) as caught:
            api.models.retrieve("other")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            api.chat.completions.create(model="other", messages=HELLO)


def get(served: Served, path: str, method: str = "GET", **headers: str) -> httpx2.Response:
    with httpx2.Client(trust_env=False) as http:
        return http.request(method, served.url + path, headers=headers)


def test_health(serve: Serve) -> None:
    async def broken() -> bool:
        raise ValueError("a secret")

    async def loading() -> bool:
        return False

    served = serve()
    assert get(served, "/livez").status_code == get(served, "/readyz").status_code == 200
    for ready in (broken, loading):
        served = serve(ready=ready)
        assert get(served, "/livez").status_code == 200
        assert get(served, "/readyz").status_code == 503
        assert "secret" not in get(served, "/readyz").text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_path"),
        ("GET", "/v1/responses", 404, "unknown_path"),
        ("POST", "/v1/chat/completions/", 404, "unknown_path"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/%ff%fe", 404, "unknown_path"),
    ],
)
def test_wrong_paths_are_told_in_json(shared: Served, method: str, path: str, status: int, code: str) -> None:
    response = get(shared, path, method)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == code


def test_a_key_opens_all_but_the_probes(serve: Serve) -> None:
    served = serve(keys=["s3cret"])
    with client(served, api_key="s3cret") as api:
        assert api.chat.completions.create(model="auto", messages=HELLO).choices
    for wrong in ("s3cre", "s3crett", "S3CRET", ""):
        with client(served, api_key=wrong or "-") as api, pytest.raises(openai.AuthenticationError) as caught:
            api.models.list()
        assert caught.value.code == "invalid_api_key"
    for authorization in (b"", b"s3cret", b"Basic s3cret", b"Bearer \xe9", b"bearer s3cret"):
        with httpx2.Client(trust_env=False) as http:
            response = http.get(f"{served.url}/v1/models", headers={"Authorization": authorization})
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    assert [get(served, path).status_code for path in ("/livez", "/readyz", "/metrics")] == [200] * 3
    assert get(served, "/v1/nowhere").status_code == 401


def sample(served: Served, name: str) -> dict[str, float]:
    """The samples of one metric, by their labels."""
    lines = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", get(served, "/metrics").text, re.MULTILINE)
    return {labels: float(value) for labels, value in lines}


def test_metrics_count_routes_reasons_and_tokens(serve: Serve) -> None:
    served = serve(Cascading("a b c"))
    post(served)
    post(served, stream=True)
    post(served, temperature="hot")
    fallback = '{reason="cloud\\nunreachable",route="edge_fallback",status="200"}'
    expected = {fallback: 2, '{reason="none",route="none",status="400"}': 1}
    eventually(lambda: sample(served, "edgewise_requests_total") == expected)
    assert sample(served, "edgewise_tokens_total")['{kind="completion",route="edge_fallback"}'] == 6
    assert sample(served, "edgewise_first_token_seconds_count") == {'{route="edge_fallback"}': 2}
    assert sample(served, "edgewise_request_seconds_count")['{route="edge_fallback"}'] == 2
    eventually(lambda: sample(served, "edgewise_requests_in_flight") == {"": 0})


def test_metrics_tell_the_breakers_state(serve: Serve) -> None:
    breaker = Breaker()
    served = serve(FakeGenerator(), breaker=breaker)
    assert sample(served, "edgewise_breaker_state") == {
        '{state="closed"}': 1, '{state="open"}': 0, '{state="half_open"}': 0
    }  # fmt: skip
    ticket = breaker.acquire()
    assert ticket is not None
    breaker.fail(ticket, Unreachable("gone"))
    assert sample(served, "edgewise_breaker_state")['{state="open"}'] == 1
    assert sample(serve(), "edgewise_breaker_state") == {}


def test_reasons_without_end_do_not_grow_the_metrics(serve: Serve) -> None:
    engine = Cascading("a")
    served = serve(engine)
    for number in range(40):
        engine.decision = Decision("edge", None, f"reason {number}")
        post(served)
    eventually(lambda: sum(sample(served, "edgewise_requests_total").values()) == 40)
    reasons = sample(served, "edgewise_requests_total")
    assert len(reasons) == 33
    assert reasons['{reason="other",route="edge",status="200"}'] == 8


# --- errors -----------------------------------------------------------------------------------------------------------

ERRORS: list[tuple[EdgewiseError, int, str | None, bool]] = [
    (RequestError("bad", param="stop"), 400, None, False),
    (ContextFull(5000, 4096), 400, "context_length_exceeded", False),
    (UnknownModel("none"), 404, "model_not_found", False),
    (Overloaded("full"), 429, "overloaded", True),
    (EngineClosed("closed"), 503, "shutting_down", False),
    (DeadlineExceeded("late"), 504, "deadline_exceeded", False),
    (Unreachable("gone"), 502, "remote_unreachable", True),
    (RemoteTimeout("silent"), 504, "remote_timeout", True),
    (RemoteRefused("no", status=401), 502, "remote_refused", False),
    (RemoteRefused("quota", status=429, retry_after_s=3.2), 503, "remote_refused", True),
    (RemoteBroken("nonsense"), 502, "remote_broken", True),
    (EngineError("wires"), 500, "internal_error", False),
    (GapError("s", 3, 1), 500, "internal_error", False),
]


@pytest.mark.parametrize(("error", "status", "code", "retry"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_chunk_have_their_status(
    shared: Served,
    shared_engine: FakeGenerator,
    monkeypatch: pytest.MonkeyPatch,
    error: EdgewiseError,
    status: int,
    code: str | None,
    retry: bool,
    stream: bool,
) -> None:
    monkeypatch.setattr(shared_engine, "answer", Script((), error=error))
    response = post(shared, stream=stream)
    told = response.json()["error"]
    assert (response.status_code, told["code"]) == (status, code)
    assert response.headers["x-should-retry"] == ("true" if retry else "false")
    assert ("retry-after" in response.headers) == (retry and status in (429, 503))
    assert set(told) >= {"message", "type", "param", "code"}
    assert (error.message in told["message"]) == (status != 500)


def test_a_long_wait_is_told_as_one_that_clients_still_take() -> None:
    assert failure_of(RemoteRefused("", status=429, retry_after_s=3.2)).headers["retry-after"] == "4"
    assert failure_of(RemoteRefused("", status=429, retry_after_s=1e9)).headers["retry-after"] == "120"
    assert failure_of(Overloaded("")).headers["retry-after"] == "1"


def test_a_full_context_tells_the_numbers(serve: Serve) -> None:
    with client(serve()) as api, pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="auto", messages=[{"role": "user", "content": "word " * 5000}])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    body: Any = caught.value.body
    assert body["n_ctx"] == 4096
    assert body["n_prompt_tokens"] > 25_000


def test_what_the_engine_cannot_do_is_refused_by_name(serve: Serve) -> None:
    weak = FakeGenerator(can=replace(FakeGenerator.can, logprobs=False, top_logprobs=0, seed=False))
    served = serve(weak)
    assert post(served, logprobs=True).json()["error"]["param"] == "logprobs"
    assert post(served, seed=3).json()["error"]["param"] == "seed"


def test_a_bug_is_hidden_from_clients_and_found_in_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    script = Script((), error=ValueError("the user's words"))
    response = post(serve(FakeGenerator(script)))
    message = response.json()["error"]["message"]
    number = re.search(r"[0-9a-f]{12}", message)
    assert response.status_code == 500
    assert number is not None
    assert number[0] in caplog.text
    assert "ValueError" in caplog.text
    assert "the user's words" not in caplog.text + response.text


@pytest.mark.parametrize("engine", [Silent(), Endless()])
def test_an_answer_without_an_end_is_an_error(serve: Serve, engine: FakeGenerator) -> None:
    served = serve(engine)
    assert post(served).status_code == 500
    streamed = post(served, stream=True)
    assert '"internal_error"' in streamed.text
    assert "[DONE]" not in streamed.text


def test_an_error_in_the_middle_is_an_event_and_no_end_mark(serve: Serve) -> None:
    script = replace(Script.of("one two three"), error=RemoteBroken("it broke"), breaks_at=2)
    served = serve(FakeGenerator(script))
    response = post(served, stream=True)
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    last = response.text.strip().split("\n\n")[-1]
    assert ErrorBody(**json.loads(last.removeprefix("data: "))["error"]).code == "remote_broken"
    with client(served) as api, pytest.raises(openai.APIError, match="it broke"):
        list(api.chat.completions.create(model="auto", messages=HELLO, stream=True))
    expected = {'{reason="only",route="edge",status="502"}': 2}
    eventually(lambda: sample(served, "edgewise_requests_total") == expected)


def test_no_message_and_no_answer_gets_into_the_log(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    served = serve(FakeGenerator("the secret answer"), keys=["s3cret"])
    secret: Any = [{"role": "user", "content": "a secret question"}]
    auth = {"Authorization": "Bearer s3cret"}
    for fields in ({"stream": True}, {"stream": False}, {"tools": ["secret"]}, {"temperature": "secret"}):
        post(served, auth, messages=secret, **fields)

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.startswith("edgewise")]

    eventually(lambda: len(lines()) == 4)
    assert "secret" not in "".join(lines())


# --- clients that leave, crowds, silence ------------------------------------------------------------------------------


def send(served: Served, **fields: Any) -> socket.socket:
    """The raw connection of a request that is complete."""
    body = json.dumps({"model": "auto", "messages": HELLO} | fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connection = served.connect()
    connection.sendall(head + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("breaks_at", [0, 2])
def test_work_stops_when_the_client_leaves(serve: Serve, stream: bool, breaks_at: int) -> None:
    engine = FakeGenerator(replace(Script.of("one two three"), hangs=True, breaks_at=breaks_at))
    served = serve(engine)
    with send(served, stream=stream):
        eventually(lambda: engine.active == 1 and engine.given == breaks_at)
        assert engine.cancelled == 0
    eventually(lambda: engine.cancelled == 1 and engine.active == 0)
    eventually(lambda: sample(served, "edgewise_requests_in_flight") == {"": 0})
    assert [labels for labels in sample(served, "edgewise_requests_total") if 'status="499"' in labels]
    engine.answer = "still here"
    assert post(served).json()["choices"][0]["message"]["content"] == "still here"


def test_the_client_library_that_leaves_a_stream(serve: Serve) -> None:
    engine = FakeGenerator(replace(Script.of("one two three"), hangs=True, breaks_at=1))
    with client(serve(engine)) as api:
        stream = api.chat.completions.create(model="auto", messages=HELLO, stream=True)
        next(iter(stream))
        stream.close()
        eventually(lambda: engine.cancelled == 1)


def test_a_request_on_the_same_connection_waits_for_its_turn(serve: Serve) -> None:
    served = serve(FakeGenerator("first answer"))
    body = json.dumps({"model": "auto", "messages": HELLO}).encode()
    one = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    last = one.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n")
    with served.connect() as connection:
        connection.sendall(one + one + last)
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.count(b"first answer") == 3


def test_a_crowd_is_told_to_come_back(serve: Serve) -> None:
    engine = FakeGenerator(replace(Script.of("a b"), hangs=True, breaks_at=1))
    served = serve(engine, limits=Limits(in_flight=2))
    with send(served), send(served, stream=True):
        eventually(lambda: engine.active == 2)
        refused = post(served)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-should-retry"] == "true"
        assert get(served, "/livez").status_code == 200
    eventually(lambda: engine.active == 0)
    engine.answer = "room again"
    eventually(lambda: post(served).status_code == 200)


def test_a_silent_stream_sends_pings(serve: Serve) -> None:
    engine = FakeGenerator(replace(Script.of("one two"), hangs=True, breaks_at=1))
    served = serve(engine, limits=Limits(ping_s=0.01))
    with send(served, stream=True) as connection:
        seen = b""
        while seen.count(b": ping\n\n") < 3:
            seen += connection.recv(65536)
    assert seen.index(b'"one ') < seen.index(b": ping")


def test_a_client_that_takes_nothing_is_let_go(serve: Serve) -> None:
    endless = FakeGenerator(Script((Token(1, b"x" * 4000, -0.1),)))
    served = serve(endless, limits=Limits(send_s=0.2))
    with send(served, stream=True, ignore_eos=True, max_tokens=2**31 - 1):
        eventually(lambda: endless.cancelled == 1)


def test_the_generator_is_closed_with_the_server(serve: Serve) -> None:
    engine = FakeGenerator()
    with Served(engine):
        assert not engine.closed
    assert engine.closed


class Door(FakeGenerator):
    """Leads to another generator, which is built when the address of this one is known."""

    inner: Any = None

    def generate(self, request: Request) -> AsyncIterator[Chunk]:
        return self.inner.generate(request)

    async def close(self) -> None:
        await self.inner.close()


def test_a_node_that_is_its_own_cloud_still_answers(serve: Serve) -> None:
    door, edge = Door(), FakeGenerator(Script.of("the edge's answer", logprob=-5.0))
    served = serve(door)
    door.inner = Cascade(edge, OpenAI(served.url))
    with client(served) as it:
        answer = it.chat.completions.create(model="auto", messages=HELLO)
    assert answer.choices[0].message.content == "the edge's answer"
    assert len(edge.requests) == Limits().hops + 1


@pytest.mark.parametrize("hops", ["5", "-1", "x", "1e9"])
def test_bad_hops_are_refused(serve: Serve, hops: str) -> None:
    served = serve()
    body = {"model": "auto", "messages": HELLO}
    answer = httpx2.post(f"{served.url}/v1/chat/completions", json=body, headers={"x-edgewise-hops": hops})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-edgewise-hops"


def test_privacy_rules_by_header_path_and_model(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text(
        "format = 1\n[[rule]]\nname = 'tenant'\nheader = 'X-Tenant'\nvalue = 'clinic-.*'\n"
        "[[rule]]\nname = 'old'\nroute = '/v1/completions'\n[[rule]]\nname = 'here'\nmodel = 'maker/model:q4'\n"
        "[[rule]]\nname = 'word'\npattern = 'secret'\n"
    )
    rules = Rules.open(tmp_path / "rules.toml")
    far = FakeGenerator(Script.of("from afar", -0.1))
    served = serve(Cascade(FakeGenerator(Script.of("from here", -3.0)), far, rules=rules), rules=rules)
    chat = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}]}
    private = [
        ("chat/completions", chat, {"x-tenant": "clinic-7"}),
        ("chat/completions", chat | {"model": "maker/model:q4"}, {}),
        ("chat/completions", chat | {"messages": [{"role": "user", "content": "a SECRET"}]}, {}),
        ("completions", {"model": "auto", "prompt": "Hi"}, {}),
    ]
    with httpx2.Client(trust_env=False) as http:
        for path, body, headers in private:
            for stream in (False, True):
                answer = http.post(f"{served.url}/v1/{path}", json=body | {"stream": stream}, headers=headers)
                assert answer.headers["x-edgewise-reason"] == "private", (path, stream)
                assert "here" in answer.text
            refused = http.post(f"{served.url}/v1/{path}", json=body, headers=headers | {"x-edgewise-route": "cloud"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "privacy_rule")
        assert far.requests == []
        assert http.post(f"{served.url}/v1/chat/completions", json=chat).headers["x-edgewise-route"] == "cloud"
        assert "SECRET" not in http.get(f"{served.url}/metrics").text
