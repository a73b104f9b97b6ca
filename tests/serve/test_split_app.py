"""The app that edges of a split model connect to: who gets in, how many, and what is left when they go."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import gguf
import httpx2
import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from edgewise.engines.fake import FakeGenerator
from edgewise.engines.load import local_model
from edgewise.errors import EngineClosed
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from edgewise.serve.app import create_app, create_worker_app
from edgewise.serve.run import listen
from edgewise.serve.split import SPLIT, Split
from edgewise.split.worker import Worker
from edgewise.wire import frame as wire
from edgewise.wire.codec import codec
from edgewise.wire.frame import Frame, Kind
from served import eventually
from tiny import save_gguf, tiny

KEY = "a-long-key"
CONTEXT = 64


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    home = tmp_path_factory.mktemp("tiny")
    return pull(str(save_gguf(tiny("llama"), home / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0)), home=home)


class Opener:
    """Opens workers, and knows them."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.opened: list[Worker] = []
        self.fails = False

    def __call__(self) -> Worker:
        if self.fails:
            raise MemoryError("no room for the weights")
        self.opened.append(Worker(local_model(self._bundle, slots=2, context=CONTEXT), self._bundle.weights))
        return self.opened[-1]


@pytest.fixture
def opener(bundle: Bundle) -> Opener:
    return Opener(bundle)


@contextmanager
def running(app: Starlette) -> Iterator[str]:
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        app,
        log_config=None,
        lifespan="on",
        ws="websockets-sansio",
        ws_max_size=wire.FRAME_LIMIT,
        ws_per_message_deflate=False,
        ws_ping_interval=None,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def edge(host: str, key: str | None = None) -> ClientConnection:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return connect(f"ws://{host}{SPLIT}", additional_headers=headers, compression=None, max_size=wire.FRAME_LIMIT)


def ask(edge: ClientConnection, frame: Frame) -> Frame:
    edge.send(wire.pack(frame))
    return answer(edge)


def answer(edge: ClientConnection) -> Frame:
    message = edge.recv(20)
    assert isinstance(message, bytes)
    return wire.unpack(message)


def hello(bundle: Bundle) -> Frame:
    return Frame(Kind.HELLO, payload=wire.write_body(wire.Hello("tiny", bundle.weights, "any")))


def opening(session: int = 1) -> Frame:
    return Frame(Kind.OPEN, session, payload=wire.write_body(wire.Open(CONTEXT, 1)))


def rows(count: int, want: int = 0, session: int = 1) -> Frame:
    hidden = np.random.default_rng(1).normal(size=(count, 64)).astype(np.float32)
    payload = codec("exact").encode(hidden).tobytes()
    return Frame(Kind.ROWS, session, 0, 0, count, want, best=20 if want else 0, payload=payload)


def test_probes_are_open_and_all_else_wants_a_key(bundle: Bundle, opener: Opener) -> None:
    with running(create_worker_app(Split(opener), keys=[KEY, "another"])) as host:
        assert httpx2.get(f"http://{host}/livez").json() == {"status": "live"}
        assert httpx2.get(f"http://{host}/readyz").status_code == 200
        for path in ("/edgewise/bytes", SPLIT, "/nothing"):
            assert httpx2.get(f"http://{host}{path}").status_code == 401
        for key in (None, "a-long-keyy", "", "ä"):
            with pytest.raises(InvalidStatus) as caught:
                edge(host, key)
            assert caught.value.response.status_code == 401
        assert not opener.opened
        for key in (KEY, "another"):
            with edge(host, key) as one:
                assert ask(one, hello(bundle)).kind == Kind.WELCOME
        assert len(opener.opened) == 1


def test_a_worker_is_opened_once_when_the_first_edge_comes_and_shut_down_at_the_end(
    bundle: Bundle, opener: Opener
) -> None:
    with running(create_app(FakeGenerator(), models=["auto"], route="cloud", split=Split(opener))) as host:
        assert httpx2.get(f"http://{host}/v1/models").status_code == 200
        assert not opener.opened
        with edge(host) as one, edge(host) as two:
            for number, each in enumerate((one, two), 1):
                assert ask(each, hello(bundle)).kind == Kind.WELCOME
                assert ask(each, opening(number)).kind == Kind.OPENED
            chat = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
            assert httpx2.post(f"http://{host}/v1/chat/completions", json=chat).status_code == 200
            assert ask(two, rows(3, 1, 2)).kind == Kind.TOKENS
        (worker,) = opener.opened
    with pytest.raises(EngineClosed):
        asyncio.run(worker.model.open("more", CONTEXT))


def test_a_worker_that_could_not_be_opened_is_tried_again(bundle: Bundle, opener: Opener) -> None:
    opener.fails = True
    with running(create_worker_app(Split(opener))) as host:
        with pytest.raises(InvalidStatus) as caught:
            edge(host)
        assert caught.value.response.status_code == 500
        opener.fails = False
        with edge(host) as one:
            assert ask(one, hello(bundle)).kind == Kind.WELCOME


def test_one_edge_too_many_comes_later(bundle: Bundle, opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewise.serve.split.CONNECTIONS", 2)
    split = Split(opener)
    with running(create_worker_app(split)) as host:
        with edge(host) as one, edge(host):
            with pytest.raises(InvalidStatus) as caught:
                edge(host)
            assert caught.value.response.status_code == 503
            assert caught.value.response.headers["retry-after"] == "1"
            assert ask(one, hello(bundle)).kind == Kind.WELCOME
        eventually(lambda: split._open == 0)
        with edge(host) as three:
            assert ask(three, hello(bundle)).kind == Kind.WELCOME


def test_an_edge_that_asks_much_reads_nothing_and_goes_leaves_nothing(bundle: Bundle, opener: Opener) -> None:
    """Its answers fill what the system takes, and the worker waits for it; then it is gone."""
    split = Split(opener)
    with running(create_worker_app(split)) as host:
        for session in (1, 2, 3):
            with edge(host) as silent:
                ask(silent, hello(bundle))
                ask(silent, opening(session))
                message = wire.pack(rows(CONTEXT, CONTEXT, session))
                flood = threading.Thread(target=_flood, args=(silent, message))
                flood.start()
                until_it_waits(opener.opened[0])
                silent.socket.shutdown(socket.SHUT_RDWR)
                flood.join()
        eventually(lambda: split._open == 0)
        with edge(host) as one:
            ask(one, hello(bundle))
            assert ask(one, opening(99)).kind == Kind.OPENED


def until_it_waits(worker: Worker) -> None:
    """For its edge to read."""
    before = -1
    while worker.answered != before:
        before = worker.answered
        time.sleep(0.2)


def _flood(edge: ClientConnection, message: bytes) -> None:
    """Until it is gone."""
    with suppress(ConnectionClosed, OSError):
        while True:
            edge.send(message)


@pytest.mark.parametrize("message", ["hello", b"\0" * 100], ids=["text", "zeros"])
def test_what_is_no_frame_ends_its_own_connection(bundle: Bundle, opener: Opener, message: str | bytes) -> None:
    with running(create_worker_app(Split(opener))) as host, edge(host) as good:
        ask(good, hello(bundle))
        with edge(host) as bad:
            ask(bad, hello(bundle))
            bad.send(message)
            told = wire.read_body(answer(bad), wire.Refusal)
            assert (told.code, "a message" in told.message) == ("frame", True)
            with pytest.raises(ConnectionClosed) as caught:
                bad.recv(20)
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1000
        assert ask(good, opening()).kind == Kind.OPENED


def test_a_message_longer_than_any_frame_is_not_taken_in(bundle: Bundle, opener: Opener) -> None:
    with running(create_worker_app(Split(opener))) as host, edge(host) as good:
        ask(good, hello(bundle))
        with edge(host) as bad:
            ask(bad, hello(bundle))
            with pytest.raises(ConnectionClosed):
                bad.send(bytes(wire.FRAME_LIMIT + 1))
        assert ask(good, opening()).kind == Kind.OPENED
