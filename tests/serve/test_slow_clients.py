"""Clients that do not read. What they cost is counted: tokens computed, bytes kept, requests held."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from edgewise.engines.decode import Decoder
from edgewise.engines.fake import FakeGenerator, FakeTokenizer, FakeTokenModel, Script
from edgewise.serve.exchange import Limits
from edgewise.types import Token
from served import Served, eventually

Serve = Callable[..., Served]
FAT = Script((Token(1, b"x" * 4000, -0.1),))
FOR_EVER: dict[str, Any] = {"ignore_eos": True, "max_tokens": 2**31 - 1}
HELD = 16 << 20  # more bytes than the buffers of both sockets and of the server can take


def connect(served: Served, **fields: Any) -> socket.socket:
    """A client with small buffers that has sent its request and reads nothing."""
    body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": "Hi"}]} | fields).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", served.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


@contextmanager
def sipping(client: socket.socket) -> Iterator[None]:
    """Inside, the client reads one byte now and then."""
    done = threading.Event()

    def sip() -> None:
        while not done.wait(0.02) and client.recv(1):
            pass

    thread = threading.Thread(target=sip)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def text_of(served: Served, **fields: Any) -> str:
    body = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}]} | fields
    with httpx2.Client(trust_env=False) as http:
        text: str = http.post(f"{served.url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    return text


def test_others_get_their_answer_in_as_many_steps_as_without_them(serve: Serve) -> None:
    """One that stops reading and one that sips, each with an answer as long as the context, beside one that reads."""
    own = {"max_tokens": 40, "ignore_eos": True, "messages": [{"role": "user", "content": "the one that reads"}]}

    def steps(beside: int) -> tuple[str, int]:
        """The text of the one that reads, and how many forwards there were from its first row to its last."""
        forwards: list[set[str]] = []  # the sessions of each
        model = FakeTokenModel(
            context=2048, slots=3, before_forward=lambda now: forwards.append({row.session for row in now})
        )
        served = serve(Decoder(model, FakeTokenizer()), limits=Limits(send_s=0.5))
        slow = [connect(served, stream=True, logprobs=True, top_logprobs=20, **FOR_EVER) for _ in range(beside)]
        eventually(lambda: len(model.lengths) == beside == len(set().union(*forwards)))
        others = set().union(*forwards)
        text = text_of(served, **own)
        for client in slow:
            client.close()
        (mine,) = set().union(*forwards) - others
        with_mine = [number for number, sessions in enumerate(forwards) if mine in sessions]
        return text, with_mine[-1] - with_mine[0]

    assert steps(2) == steps(0)


@pytest.mark.parametrize("sips", [False, True])
def test_one_that_does_not_keep_up_is_cut_off_and_holds_nothing(serve: Serve, sips: bool) -> None:
    engine = FakeGenerator(FAT)
    served = serve(engine, limits=Limits(send_s=0.3, in_flight=1))
    with connect(served, stream=True, **FOR_EVER) as client:
        if sips:
            with sipping(client):
                eventually(lambda: engine.cancelled == 1)
        else:
            eventually(lambda: engine.cancelled == 1)
    assert engine.given * len(FAT.tokens[0].raw) < HELD
    eventually(lambda: text_of_or_none(served) == FAT.tokens[0].raw.decode())


def test_the_engines_slot_is_free_before_the_slow_client_is_gone(serve: Serve) -> None:
    model = FakeTokenModel(context=4096, slots=1)
    engine = Decoder(model, FakeTokenizer())
    served = serve(engine, limits=Limits(send_s=60.0))
    with connect(served, stream=True, logprobs=True, top_logprobs=20, **FOR_EVER) as client:
        assert text_of(served, max_tokens=3, ignore_eos=True)  # the only slot was given back
        client.setblocking(False)
        assert client.recv(1) == b"H"  # and the slow one is still connected


def test_a_long_whole_answer_is_not_kept_for_one_that_never_reads_it(serve: Serve) -> None:
    engine = FakeGenerator(FAT)
    served = serve(engine, limits=Limits(send_s=0.3, in_flight=1))
    with connect(served, ignore_eos=True, max_tokens=HELD // 4000) as client:
        eventually(lambda: engine.finished == 1)
        eventually(lambda: text_of_or_none(served) is not None)
        taken = len(b"".join(iter(lambda: client.recv(1 << 20), b"")))
    assert taken < HELD


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no TCP_USER_TIMEOUT")
def test_the_system_drops_what_nobody_takes_after_the_answer(serve: Serve) -> None:
    """What a complete answer left in the buffers must not stay there for as long as the client likes."""
    engine = FakeGenerator(FAT)
    served = serve(engine, send_s=0.3)
    with connect(served, ignore_eos=True, max_tokens=20):
        eventually(lambda: engine.finished == 1)
        eventually(lambda: not served.server.server_state.connections)


def text_of_or_none(served: Served) -> str | None:
    try:
        return text_of(served, max_tokens=1)
    except KeyError:  # refused: the one place is taken
        return None
