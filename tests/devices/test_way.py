"""The way to another machine, measured against real servers on loopback."""

from __future__ import annotations

import http.server
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from edgewise.devices import link
from edgewise.devices.address import is_loopback
from edgewise.devices.link import measure
from edgewise.engines.fake import FakeGenerator
from edgewise.errors import ConfigError, RemoteBroken, RemoteError, RemoteTimeout, Unreachable
from edgewise.serve.exchange import Limits
from edgewise.serve.link import MOST
from served import Served


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"REQUESTS_S": 0.2, "DIRECTION_S": 0.3, "LONG_S": 0.01, "TIMEOUT_S": 0.5}.items():
        monkeypatch.setattr(link, name, value)


@contextmanager
def plain_server(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Answers(http.server.BaseHTTPRequestHandler):
    """Says the same to everything."""

    protocol_version = "HTTP/1.1"
    status = 404

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


class Fails(Answers):
    status = 500


def test_a_node_shows_every_figure() -> None:
    with Served(FakeGenerator()) as served:
        found = measure(served.url + "/v1")
    assert found.url == served.url
    assert found.rtt_ms.median > 0
    assert found.connect_ms is not None
    assert found.up_bytes_per_s is not None
    assert found.down_bytes_per_s is not None
    assert found.tls_ms is None
    assert set(found.unknown) <= {"lost_share", "tcp_rtt_ms"}


def test_a_key_is_sent_and_without_it_the_reason_is_told() -> None:
    with Served(FakeGenerator(), keys=["secret"]) as served:
        assert measure(served.url, "secret").down_bytes_per_s is not None
        without = measure(served.url)
    assert without.down_bytes_per_s is None
    assert "it wants a key" in without.unknown["down_bytes_per_s"]


def test_another_server_shows_what_it_can() -> None:
    with plain_server(Answers) as url:
        found = measure(url)
    assert found.rtt_ms.median > 0
    assert found.down_bytes_per_s is None
    assert "only Edgewise nodes" in found.unknown["down_bytes_per_s"]


def test_a_server_that_only_fails_is_said_to() -> None:
    with plain_server(Fails) as url, pytest.raises(RemoteBroken, match="answers 500"):
        measure(url)


def test_nobody_there_and_nobody_who_speaks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises((RemoteTimeout, Unreachable)):
            measure(f"http://127.0.0.1:{port}")
    with pytest.raises(RemoteError, match="no connection"):
        measure(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("url", ["", "host", "ftp://host", "http://", "http://h:0", "http://h/?q", "http://h o", "//h"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        measure(url)


def test_an_address_with_credentials_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        measure("http://me:hunter2@host/")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "ours"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("a.localhost", True), ("10.0.0.1", False), ("x", False)],
)
def test_our_own_machine_is_known_by_its_names(host: str, ours: bool) -> None:
    assert is_loopback(host) is ours


def test_bytes_are_given_and_taken_within_bounds() -> None:
    with Served(FakeGenerator()) as served:
        at = f"{served.url}/edgewise/bytes"
        with urllib.request.urlopen(f"{at}?count=70000") as answer:
            assert len(answer.read()) == 70_000
        with urllib.request.urlopen(
            urllib.request.Request(at, data=b"x" * 5000, headers={"content-type": "application/octet-stream"})
        ) as answer:
            assert answer.read() == b'{"count":5000}'
        for wrong in ("", "?count=0", "?count=-1", "?count=x", f"?count={MOST + 1}", "?count=1e3"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(at + wrong)
            with caught.value as answer:  # which holds its connection
                assert answer.code == 400, wrong
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(at, method="PUT"))
        with caught.value as answer:
            assert answer.code == 405
        with served.connect() as client:  # refused by its length, before its bytes
            client.sendall(b"POST /edgewise/bytes HTTP/1.1\r\nhost: x\r\n")
            client.sendall(b"content-length: %d\r\n\r\n" % (Limits().body_bytes + 1))
            assert client.recv(100).startswith(b"HTTP/1.1 413")
