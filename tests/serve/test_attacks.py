"""Bytes that no client of good will sends. The server answers with 4xx or closes, and goes on serving."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgewise.engines.fake import FakeGenerator
from edgewise.serve.exchange import Limits
from edgewise.wire.openai import CHAT_TREATMENT
from served import Served, eventually

Serve = Callable[..., Served]
BODY: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}]}
GOOD = json.dumps(BODY).encode()
PATH = "/v1/chat/completions"

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(FakeGenerator("fine"), limits=Limits(body_bytes=100_000)) as it:
        yield it


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=served.url, trust_env=False, headers={"Content-Type": "application/json"}) as it:
        yield it


def refused(response: httpx2.Response, *statuses: int) -> dict[str, Any]:
    """The error of an answer that is one, in OpenAI's form."""
    assert response.status_code in (statuses or range(400, 500))
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert error["message"]
    return error


def still_serves(served: Served) -> None:
    with httpx2.Client(trust_env=False) as http:
        answer = http.post(served.url + PATH, json=BODY)
    assert answer.json()["choices"][0]["message"]["content"] == "fine"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(CHAT_TREATMENT)) | st.text(max_size=8), JSON, max_size=4), st.booleans())
def test_any_fields_give_an_answer_or_a_4xx(http: httpx2.Client, fields: dict[str, Any], whole: bool) -> None:
    response = http.post(PATH, content=json.dumps((BODY if whole else {}) | fields).encode())
    if response.status_code != 200:
        refused(response, 400, 404)


@FUZZ
@given(
    st.binary(max_size=200)
    | st.builds(lambda at, new: GOOD[:at] + new + GOOD[at + 1 :], st.integers(0, len(GOOD)), st.binary(max_size=4))
)
def test_any_bytes_give_an_answer_or_a_4xx(http: httpx2.Client, body: bytes) -> None:
    response = http.post(PATH, content=body)
    if response.status_code != 200:
        refused(response, 400, 404)


# What may stand in a header at all: the client refuses to send anything else.
HEADER_VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_categories=["Cc"]), max_size=20)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["x-edgewise-route", "x-request-deadline-ms", "content-type", "content-encoding"]),
        HEADER_VALUES.map(lambda value: value.strip().encode("latin-1")),
    )
)
def test_any_headers_give_an_answer_or_a_4xx(http: httpx2.Client, headers: dict[str, bytes]) -> None:
    response = http.post(PATH, content=GOOD, headers=headers)
    if response.status_code not in (200, 504):  # a deadline of a fraction of a millisecond is a wish too
        refused(response, 400, 415)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b"[" * 90_000,
        b'{"tools":' + b"[" * 90_000,
        b'{"messages":[{"content":' + b'[{"a":' * 10_000,
        b"{" + b",".join(b'"k%d":1' % number for number in range(8000)) + b"}",
    ],
)
def test_bodies_that_are_no_request(http: httpx2.Client, served: Served, body: bytes) -> None:
    refused(http.post(PATH, content=body), 400)
    still_serves(served)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": ""},
    ],
)
def test_other_media_types(http: httpx2.Client, headers: dict[str, str]) -> None:
    assert refused(http.post(PATH, content=GOOD, headers=headers), 415)["code"] == "unsupported_media_type"


def test_media_types_that_mean_json(http: httpx2.Client) -> None:
    for name in ("application/json; charset=utf-8", "Application/JSON"):
        assert http.post(PATH, content=GOOD, headers={"Content-Type": name}).status_code == 200


def exchange(served: Served, *pieces: bytes) -> bytes:
    """All that comes back until the server closes."""
    with served.connect() as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                break
        answer = bytearray()
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
        return bytes(answer)


def head(*lines: str) -> bytes:
    return "\r\n".join([f"POST {PATH} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def test_a_body_that_says_it_is_too_long_is_refused_before_it_comes(served: Served) -> None:
    for told in ("100001", "9" * 18):
        answer = exchange(served, head(f"Content-Length: {told}"))
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'"body_too_large"' in answer
    still_serves(served)


def test_a_body_without_a_length_is_cut_off(served: Served) -> None:
    piece = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    answer = exchange(served, head("Transfer-Encoding: chunked"), *[piece] * 20)
    assert answer.startswith(b"HTTP/1.1 413")
    still_serves(served)


def test_the_longest_body_that_is_allowed(served: Served, http: httpx2.Client) -> None:
    padded = GOOD + b" " * (100_000 - len(GOOD))
    assert http.post(PATH, content=padded).status_code == 200
    refused(http.post(PATH, content=padded + b" "), 413)


def test_a_body_that_never_ends_is_given_up(serve: Serve) -> None:
    served = serve(FakeGenerator("fine"), limits=Limits(body_s=0.1))
    answer = exchange(served, head("Content-Length: 50"), b'{"model"')
    assert answer.startswith(b"HTTP/1.1 408")
    still_serves(served)


def test_a_client_that_leaves_in_the_middle_of_its_body(serve: Serve) -> None:
    engine = FakeGenerator("fine")
    served = serve(engine)
    with served.connect() as connection:
        connection.sendall(head("Content-Length: 50") + b'{"model"')
    still_serves(served)
    assert len(engine.requests) == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
        b"\r\n\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST " + PATH.encode() + b" HTTP/9.9\r\n\r\n",
        head("Content-Length: -1"),
        head("Content-Length: 5", "Content-Length: 6") + b"{}{}{}",
        head("Transfer-Encoding: chunked") + b"zzz\r\n",
        head("X: " + "a" * 100_000),
        b"\x00" * 1000,
    ],
)
def test_garbage_instead_of_http(served: Served, garbage: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(garbage)
        connection.shutdown(1)
        answer = b""
        with suppress(ConnectionResetError):  # where the server closes while some of the garbage is still under way
            while piece := connection.recv(65536):
                answer += piece
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 505"))
    still_serves(served)


def test_garbage_behind_a_good_request(served: Served) -> None:
    answer = exchange(
        served,
        head(f"Content-Length: {len(GOOD)}", "Content-Type: application/json") + GOOD + b"\x00\xff garbage\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"HTTP/1.1 400" in answer
    still_serves(served)


def test_a_prompt_of_200_000_tokens_is_a_full_context(serve: Serve) -> None:
    served = serve(FakeGenerator("fine"))
    long = BODY | {"messages": [{"role": "user", "content": "word " * 200_000}]}
    with httpx2.Client(trust_env=False) as http:
        for stream in (False, True):
            error = refused(http.post(served.url + PATH, json=long | {"stream": stream}), 400)
            assert error["code"] == "context_length_exceeded"
            assert error["n_prompt_tokens"] > 1_000_000
    still_serves(served)


def test_connections_that_never_send_their_body_are_counted_and_forgotten(served: Served) -> None:
    idle = [served.connect() for _ in range(Limits().in_flight)]
    for connection in idle:
        connection.sendall(head("Content-Length: 50"))
    eventually(lambda: _in_flight(served) == Limits().in_flight)
    with httpx2.Client(trust_env=False) as http:
        refused(http.post(served.url + PATH, json=BODY), 429)
    for connection in idle:
        connection.close()
    eventually(lambda: _in_flight(served) == 0)
    still_serves(served)


def _in_flight(served: Served) -> float:
    with httpx2.Client(trust_env=False) as http:
        lines = http.get(f"{served.url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("edgewise_requests_in_flight ")).split()[1])
