"""The process: where it says that it listens, and how it ends."""

from __future__ import annotations

import json
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from edgewise.errors import ConfigError
from edgewise.serve.run import JsonLines, listen, url_of
from served import eventually

PROGRAM = """
from dataclasses import replace
from edgewise.engines.fake import FakeGenerator, Script
from edgewise.serve.app import create_app
from edgewise.serve.run import run

script = replace(Script.of("one two three four five"), delay_s=0.1)
try:
    run(create_app(FakeGenerator(script), models=["auto"], route="edge"), drain_s={drain_s}, json_logs=True)
except KeyboardInterrupt:
    raise SystemExit(130)
print("ended well")
"""
BODY = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


@contextmanager
def node(drain_s: float = 10.0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and its URL."""
    command = [sys.executable, "-c", PROGRAM.format(drain_s=drain_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["url"]
        finally:
            process.kill()


def test_the_first_line_tells_the_url_and_logs_go_to_stderr() -> None:
    with node() as (process, url):
        assert httpx2.get(f"{url}/livez", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out == "ended well\n"
    assert all(json.loads(line)["level"] == "info" for line in err.splitlines())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_answers_end_and_takes_no_more(number: int, code: int) -> None:
    with (
        node() as (process, url),
        httpx2.Client(trust_env=False) as http,
        http.stream("POST", f"{url}/v1/chat/completions", json=BODY) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(number)
        eventually(lambda: not _takes_connections(url))
        rest = list(lines)
        assert process.wait(timeout=20) == code
    assert rest[-2] == "data: [DONE]"
    assert sum('"content":"' in line for line in rest) >= 4


def _takes_connections(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_second_signal_ends_at_once() -> None:
    endless = BODY | {"ignore_eos": True, "max_tokens": 100_000}
    with (
        node(drain_s=1000) as (process, url),
        httpx2.Client(trust_env=False) as http,
        http.stream("POST", f"{url}/v1/chat/completions", json=endless) as response,
    ):
        next(response.iter_lines())
        process.send_signal(signal.SIGTERM)
        eventually(lambda: not _takes_connections(url))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_a_port_that_is_taken_is_a_clear_error() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: "):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.1", "a" * 300, "\0"])
def test_a_host_that_is_not_ours_is_a_clear_error(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        listen(host, 0)


def test_the_listener_names_its_protocol() -> None:
    """Without it asyncio leaves Nagle's algorithm on, and kept connections answer 40 ms late."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize(
    ("host", "start"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:")]
)
def test_urls_can_be_reached_from_here(host: str, start: str) -> None:
    with listen("127.0.0.1", 0) as listener:
        assert url_of(host, listener) == f"{start}{listener.getsockname()[1]}"


def test_a_log_line_is_one_line_whatever_it_says() -> None:
    record = logging.LogRecord("edgewise", logging.INFO, "", 0, "two\nlines and a %s", ('"quote"',), None)
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == 'two\nlines and a "quote"'
