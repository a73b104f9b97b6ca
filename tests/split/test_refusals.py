"""Who is refused, by whom, and with what words. Keys are never among them."""

from __future__ import annotations

import asyncio
import http.server
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import gguf
import pytest
import trustme
from websockets.asyncio.server import ServerConnection, serve

from edgewise.engines.load import local_model
from edgewise.errors import BadFrame, ConfigError, EdgewiseError, RemoteRefused, Unreachable
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from edgewise.split.channel import Refused, Way
from edgewise.split.model import greeted
from edgewise.wire import frame as wire
from split.conftest import WorkerProcess
from tiny import save_gguf, tiny

KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny model of three layers."""
    home = tmp_path_factory.mktemp("tiny")
    return pull(str(save_gguf(tiny("llama"), home / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0)), home=home)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def locked(
    small: Bundle, authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[WorkerProcess, Path]]:
    """A worker behind TLS and a key, and the certificate to trust."""
    place = tmp_path_factory.mktemp("keys")
    issued = authority.issue_cert("127.0.0.1")
    (place / "keys").write_text(f"# workers\nanother-key\n{KEY}\n")
    issued.private_key_pem.write_to_path(place / "key.pem")
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(place / "cert.pem", append=number > 0)
    authority.cert_pem.write_to_path(place / "ca.pem")
    flags = ("--key-file", "keys", "--tls-cert", "cert.pem", "--tls-key", "key.pem")
    process = WorkerProcess(small.path, *(str(place / f) if not f.startswith("--") else f for f in flags))
    yield process, place / "ca.pem"
    process.stop()


def told(way: Way, bundle: Bundle) -> EdgewiseError:
    """What the greeting of that worker fails with."""
    with pytest.raises(EdgewiseError) as caught:
        asyncio.run(greeted(way, local_model(bundle), bundle.weights))
    assert KEY not in str(caught.value)
    assert "wrong-key" not in str(caught.value)
    return caught.value


def test_a_key_and_a_trusted_certificate_open(
    locked: tuple[WorkerProcess, Path], small: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    worker, ca = locked
    assert worker.url.startswith("https://")
    with caplog.at_level(logging.DEBUG):
        welcome = asyncio.run(greeted(Way(worker.url, KEY, ca), local_model(small), small.weights))
    assert welcome.layers == (0, 3)
    assert KEY not in caplog.text
    assert KEY not in repr(Way(worker.url, KEY, ca))


@pytest.mark.parametrize("key", [None, "wrong-key"])
def test_a_wrong_key_is_refused_before_anything_is_said(
    locked: tuple[WorkerProcess, Path], small: Bundle, key: str | None
) -> None:
    worker, ca = locked
    error = told(Way(worker.url, key, ca), small)
    assert isinstance(error, RemoteRefused)
    assert error.status == 401
    assert "refuses the key" in str(error)
    assert "--split-key-file" in str(error)


def test_a_certificate_that_nobody_trusts(locked: tuple[WorkerProcess, Path], small: Bundle) -> None:
    error = told(Way(locked[0].url, KEY), small)
    assert isinstance(error, RemoteRefused)
    assert "not trusted here" in str(error)
    assert "--split-ca" in str(error)


def test_a_file_that_holds_no_certificates(locked: tuple[WorkerProcess, Path], small: Bundle, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    assert isinstance(told(Way(locked[0].url, KEY, tmp_path / "ca.pem"), small), ConfigError)


def test_http_against_https(locked: tuple[WorkerProcess, Path], small: Bundle) -> None:
    error = told(Way(locked[0].url.replace("https", "http"), KEY), small)
    assert isinstance(error, Unreachable)
    assert "https if and only if the worker has a --tls-cert" in str(error)


def test_https_against_http(worker: WorkerProcess, small: Bundle) -> None:
    error = told(Way(worker.url.replace("http", "https"), KEY), small)
    assert isinstance(error, Unreachable)
    assert "https if and only if the worker has a --tls-cert" in str(error)


def test_another_model_is_refused_with_both_hashes(worker: WorkerProcess, bundle: Bundle, small: Bundle) -> None:
    error = told(Way(worker.url), small)
    assert isinstance(error, Refused)
    assert error.code == "weights"
    assert not error.retryable
    for part in (bundle.weights[:12], small.weights[:12], "pull the same model"):
        assert part in str(error)


def test_another_version_is_refused_with_both_numbers(small: Bundle) -> None:
    async def later(edge: ServerConnection) -> None:
        await edge.recv()
        answer = bytearray(wire.pack(wire.Frame(wire.Kind.WELCOME)))
        answer[2] = 2
        await edge.send(bytes(answer))

    async def meet() -> None:
        async with serve(later, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(EdgewiseError, match=r"version 2; this side speaks version 1"):
                await greeted(Way(f"http://127.0.0.1:{port}"), local_model(small), small.weights)

    asyncio.run(meet())


def test_a_server_that_is_no_worker(small: Bundle) -> None:
    class Plain(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        error = told(Way(f"http://127.0.0.1:{server.server_port}"), small)
        server.shutdown()
    assert "has no worker" in str(error)


async def silent(edge: ServerConnection) -> None:
    """Gone as soon as it was greeted."""
    await edge.recv()
    edge.transport.abort()


async def chatty(edge: ServerConnection) -> None:
    """Some other service over a WebSocket."""
    await edge.recv()
    await edge.send("welcome!")


@pytest.mark.parametrize(
    ("other", "kind", "said"),
    [(silent, Unreachable, "the connection to the worker"), (chatty, BadFrame, "is the other side Edgewise")],
)
def test_who_does_not_answer_a_greeting_as_a_worker_does(
    small: Bundle, other: Callable[[ServerConnection], Awaitable[None]], kind: type[EdgewiseError], said: str
) -> None:
    async def meet() -> None:
        async with serve(other, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(kind, match=said):
                await greeted(Way(f"http://127.0.0.1:{port}"), local_model(small), small.weights)

    asyncio.run(meet())


def test_a_worker_that_dies_in_the_handshake(small: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def die() -> None:
            listener.accept()[0].close()

        dying = threading.Thread(target=die)
        dying.start()
        error = told(Way(f"http://127.0.0.1:{listener.getsockname()[1]}"), small)
        dying.join()
    assert isinstance(error, Unreachable)
    assert "is it a worker" in str(error)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://host"])
def test_an_address_with_nobody_behind_it(small: Bundle, url: str) -> None:
    assert isinstance(told(Way(url), small), Unreachable | ConfigError)
