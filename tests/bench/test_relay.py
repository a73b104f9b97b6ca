"""A relay between real sockets: what passes is what was sent, and each fault looks as it does on a real link."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from edgewise.bench.relay import Fault, Happened, Relay
from edgewise.devices.links import LINKS, LinkProfile
from edgewise.errors import Unreachable, UsageError
from served import eventually

QUICK = LinkProfile("quick", 50e6, 50e6, 2.0)
SLOW = LinkProfile("slow", 20_000, 20_000, 2.0)


class Target:
    """A server on loopback that answers each connection in a thread of its own."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self.connections: list[socket.socket] = []
        self.failures: list[Exception] = []
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._listen)]

    def __enter__(self) -> Target:
        self._threads[0].start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for connection in self.connections:
            connection.close()
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            self._threads.append(threading.Thread(target=self._one, args=(connection,)))
            self._threads[-1].start()

    def _one(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        try:
            self._answer(connection)
        except OSError as e:
            self.failures.append(e)


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


def hold(connection: socket.socket) -> None:
    """Take nothing and say nothing."""


@contextmanager
def relayed(answer: Callable[[socket.socket], None], profile: LinkProfile = QUICK, **more: object) -> Iterator[Relay]:
    with Target(answer) as target, Relay(target.address, profile, **more) as relay:
        yield relay


def connect(relay: Relay) -> socket.socket:
    return socket.create_connection(("127.0.0.1", relay.port), timeout=20)


def exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, f"it ended after {len(data)} of {count} bytes"
        data += piece
    return data


def all_of(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def send_in_pieces(sock: socket.socket, data: bytes, seed: int) -> None:
    sizes = random.Random(seed)
    while data:
        count = sizes.choice([1, 7, 100, 1448, 5000, 70_000])
        sock.sendall(data[:count])
        data = data[count:]
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("profile", [QUICK, replace(QUICK, loss_enter=0.02, loss_leave=0.5), LINKS["lan"]], ids=str)
def test_bytes_arrive_unchanged_and_in_order(profile: LinkProfile, seed: int) -> None:
    data = random.Random(seed).randbytes(400_000)
    with relayed(echo, profile, seed=seed) as relay, connect(relay) as one, connect(relay) as other:
        for sock, sent in ((one, data), (other, data[::-1])):
            threading.Thread(target=send_in_pieces, args=(sock, sent, seed)).start()
        assert all_of(one) == data
        assert all_of(other) == data[::-1]
        assert relay.bytes_up == relay.bytes_down == 2 * len(data)


def test_a_round_trip_is_not_shorter_than_the_link_says() -> None:
    with relayed(echo, replace(QUICK, rtt_ms=100)) as relay:
        began_s = time.monotonic()
        with connect(relay) as sock:
            for trips in (2, 3):  # the first byte comes back after two: one opens the connection
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
                assert time.monotonic() - began_s >= 0.099 * trips


def test_bytes_are_not_faster_than_the_rate() -> None:
    with relayed(echo, replace(QUICK, up_bytes_per_s=50_000)) as relay, connect(relay) as one, connect(relay) as other:
        began_s = time.monotonic()
        one.sendall(bytes(10_000))
        other.sendall(bytes(10_000))
        exactly(one, 10_000)
        exactly(other, 10_000)
        assert time.monotonic() - began_s >= 0.399  # the two share the line


def test_one_side_may_end_before_the_other() -> None:
    def after_the_end(connection: socket.socket) -> None:
        while connection.recv(1000):
            pass
        connection.sendall(b"now I know all")
        connection.close()

    with relayed(after_the_end) as relay, connect(relay) as sock:
        sock.sendall(b"question")
        sock.shutdown(socket.SHUT_WR)
        assert all_of(sock) == b"now I know all"


def test_a_reset_of_one_side_reaches_the_other() -> None:
    with Target(echo) as target, Relay(target.address, QUICK) as relay:
        sock = connect(relay)
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        sock.close()
        eventually(lambda: [type(e) for e in target.failures] == [ConnectionResetError])


def test_a_target_that_is_not_there_resets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = gone.getsockname()
    with Relay(address, QUICK) as relay, connect(relay) as sock, pytest.raises(ConnectionResetError):
        sock.recv(1)


def test_reset_is_seen_by_both_sides_and_the_next_connection_works() -> None:
    with Target(echo) as target, Relay(target.address, QUICK) as relay:
        with connect(relay) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            relay.reset()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            eventually(lambda: [type(e) for e in target.failures] == [ConnectionResetError])
        with connect(relay) as sock:
            sock.sendall(b"y")
            assert sock.recv(1) == b"y"


def test_a_stall_keeps_the_connection_and_resume_brings_what_was_under_way() -> None:
    with relayed(echo) as relay, connect(relay) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        relay.stall()
        sock.sendall(b"into the hole")
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(20)
        with connect(relay) as late:
            late.sendall(b"me too")
            assert (relay.bytes_up, relay.bytes_down) == (1, 1)
            relay.resume()
            assert exactly(sock, 13) == b"into the hole"
            assert exactly(late, 6) == b"me too"


def test_cut_resets_and_refuses_until_restored() -> None:
    with relayed(echo) as relay:
        with connect(relay) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            relay.cut()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                connect(relay)
        relay.cut()  # changes nothing
        relay.restore()
        relay.restore()
        with connect(relay) as sock:
            sock.sendall(b"y")
            assert sock.recv(1) == b"y"


@pytest.mark.parametrize("count", [1, 1448, 30_011])
def test_a_cut_after_bytes_is_exact(count: int) -> None:
    def talk(connection: socket.socket) -> None:
        connection.sendall(bytes(10**7))

    with relayed(talk, LINKS["lan"], faults=[Fault("cut", after_bytes_down=count)]) as relay, connect(relay) as sock:
        assert exactly(sock, count) == bytes(count)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert relay.bytes_down == count
        with pytest.raises(ConnectionRefusedError):
            connect(relay)


def test_bytes_are_counted_from_when_a_fault_is_scheduled() -> None:
    happened: list[Happened] = []
    with relayed(echo, tell=happened.append) as relay, connect(relay) as sock:
        sock.sendall(bytes(1000))
        exactly(sock, 1000)
        relay.schedule(Fault("stall", after_bytes_up=70, lasts_s=0.05))
        relay.schedule(Fault("reset", after_bytes_down=200))
        sock.sendall(bytes(300))
        exactly(sock, 200)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert [each.fault for each in happened] == ["stall", "resume", "reset"]
    assert [each.bytes_up for each in happened[:2]] == [1070, 1070]
    assert happened[2].bytes_down == 1200


def test_a_scheduled_cut_ends_by_itself() -> None:
    happened: list[Happened] = []
    faults = [Fault("cut", after_s=0.0, lasts_s=0.1)]
    with relayed(echo, faults=faults, tell=happened.append) as relay:
        eventually(lambda: [each.fault for each in happened] == ["cut", "restore"])
        with connect(relay) as sock:
            sock.sendall(b"y")
            assert sock.recv(1) == b"y"
    assert happened[1].at_s - happened[0].at_s >= 0.1


def test_another_profile_is_for_what_waits_as_well() -> None:
    with relayed(echo, replace(QUICK, up_bytes_per_s=10)) as relay, connect(relay) as sock:
        sock.sendall(bytes(3000))  # would take five minutes
        eventually(lambda: len(relay._loop._connections) == 1)
        relay.set_profile(replace(QUICK, up_bytes_per_s=1000))
        relay.set_profile(replace(QUICK, up_bytes_per_s=10, rtt_ms=50))
        relay.reset()
        with connect(relay) as other:
            relay.set_profile(QUICK)  # and what was reset no longer stands before it
            other.sendall(b"x")
            assert other.recv(1) == b"x"


def test_what_a_target_does_not_read_is_not_hoarded() -> None:
    sent = 0
    with relayed(hold, LINKS["5g"]) as relay, connect(relay) as sock:
        sock.setblocking(False)
        quiet = 0
        while quiet < 20:  # until nothing more is taken for half a second
            try:
                sent += sock.send(bytes(1 << 16))
                quiet = 0
            except BlockingIOError:
                quiet += 1
                time.sleep(0.025)
            assert sent < 16 << 20
        pipes = [pipe for connection in relay._loop._connections for pipe in connection.pipes]
        assert max(pipe.queued_bytes for pipe in pipes) <= relay._loop.up.limit_bytes


def test_it_stops_with_connections_open_and_its_port_is_free() -> None:
    with Target(echo) as target:
        with Relay(target.address, SLOW) as relay:
            sock = connect(relay)
            sock.sendall(bytes(100_000))
        with pytest.raises(ConnectionResetError), sock:
            all_of(sock)
        assert not relay._thread.is_alive()
        with pytest.raises(UsageError, match="has ended"):
            relay.cut()
        with Relay(target.address, QUICK, port=relay.port) as again, connect(again) as sock:
            sock.sendall(b"y")
            assert sock.recv(1) == b"y"
            with pytest.raises(UsageError, match=f"port {again.port} cannot be had"):
                Relay(target.address, QUICK, port=again.port)


def test_a_relay_that_never_began_closes_too() -> None:
    Relay(("127.0.0.1", 1), QUICK).close()


def test_the_url_keeps_what_is_not_the_address() -> None:
    with Relay("ws://localhost:7/split?x=1", QUICK) as relay:
        assert relay.url == f"ws://127.0.0.1:{relay.port}/split?x=1"
    with Relay(("127.0.0.1", 7), QUICK) as relay:
        assert relay.url == f"http://127.0.0.1:{relay.port}"


def test_what_is_no_target_no_link_or_no_fault_is_refused() -> None:
    with pytest.raises(UsageError, match="no URL of a target"):
        Relay("127.0.0.1:7", QUICK)
    with pytest.raises(Unreachable, match="is not known"):
        Relay("http://nowhere.invalid:7", QUICK)
    with pytest.raises(UsageError, match="is no link"):
        Relay(("127.0.0.1", 7), replace(QUICK, up_bytes_per_s=0))
    for wrong in (
        {"kind": "cut"},
        {"kind": "cut", "after_s": 1.0, "after_bytes_up": 1},
        {"kind": "cut", "after_s": -1.0},
        {"kind": "flood", "after_s": 1.0},
        {"kind": "profile", "after_s": 1.0},
        {"kind": "cut", "after_s": 1.0, "profile": QUICK},
        {"kind": "reset", "after_s": 1.0, "lasts_s": 1.0},
    ):
        with pytest.raises(UsageError):
            Fault(**wrong)  # type: ignore[arg-type]


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "edgewise.bench.relay", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_process_of_its_own() -> None:
    with Target(echo) as target:
        url = f"http://127.0.0.1:{target.address[1]}/v1"
        faults = ["--cut-after-bytes-down", "5", "--restore-after", "0.05"]
        with started(url, "--link", "lan", "--loss-enter", "0.1", "--loss-leave", "0.5", *faults) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            found = json.loads(process.stdout.readline())["url"]
            assert found.endswith("/v1")
            port = int(found.removesuffix("/v1").rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
                sock.sendall(b"0123456789")
                assert exactly(sock, 5) == b"01234"
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
            lines = [json.loads(process.stderr.readline()) for _ in range(2)]
            assert [line["fault"] for line in lines] == ["cut", "restore"]
            assert (lines[0]["bytes_up"], lines[0]["bytes_down"]) == (10, 5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def test_a_process_that_obeys_and_ends_with_its_input() -> None:
    with (
        Target(echo) as target,
        started(f"ws://127.0.0.1:{target.address[1]}", "--link", "lan", "--control") as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdin.write("stall\nresume\nwifi\nflood\n")
        process.stdin.flush()
        found = [process.stderr.readline() for _ in range(4)]
        assert [json.loads(line)["fault"] for line in found[:3]] == ["stall", "resume", "profile"]
        assert "'flood' is neither a fault nor a link" in found[3]
        process.stdin.close()
        assert process.wait(20) == 0


def test_a_process_ends_by_itself_and_says_what_is_wrong() -> None:
    with started("http://127.0.0.1:9", "--link", "lan", "--seconds", "0") as process:
        assert process.wait(20) == 0
    with started("127.0.0.1:9", "--link", "lan") as process:
        assert process.wait(20) == 2
        assert process.stderr is not None
        assert "no URL of a target" in process.stderr.read()
