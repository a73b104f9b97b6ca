"""How well the relay keeps to a link: round trips and goodput through it against the figures of each profile.

    python benchmarks/relay.py [--links lan wifi …] [--rounds 3]

The relay and the target are processes of their own. A round trip is an echo of 64 bytes; without a relay the same echo
takes what the two programs and the kernel need, and that much is no error of the link: each round measures it too, and
`rtt_error` is what remains. `rtt_error_whole` takes nothing off. Goodput is that of one connection after its first
bytes have come, timed where the bytes arrive.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from edgewise.bench.measure import Measurement, figure, typed
from edgewise.devices.links import LINKS, LinkProfile, link_named

ECHO_BYTES = 64
READ_BYTES = 1 << 18
COUNT = struct.Struct("!Q")
SPEED = struct.Struct("!d")
WARM_UP = 2  # echoes before the first that counts
ECHOES_S = 1.0  # for so long, but at least
LEAST_ECHOES = 3
BULK_S = 1.0  # so long takes what is sent to measure goodput
DIRECT_ECHOES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    results = measure([link_named(name) for name in options.links], options.rounds)
    settings = {**vars(options), "echo_bytes": ECHO_BYTES, "bulk_s": BULK_S}
    taken = Measurement.taken(
        "relay", command=typed(__file__), results=results, settings=settings, libraries=["edgewise"], kind="emulated"
    )
    path = taken.save(Path(__file__).parent / "results")
    for name, found in results["links"].items():
        errors = [f"{key} {found[key]:+.2%}" for key in found if "error" in key]
        print(f"{name:10} {', '.join(errors)}")
    print(path)


def measure(links: list[LinkProfile], rounds: int) -> dict[str, dict[str, object]]:
    samples: dict[str, dict[str, list[float]]] = {
        link.name: {"direct_ms": [], "rtt_ms": [], "up": [], "down": []} for link in links
    }
    with target() as port:
        for _ in range(rounds):
            for link in links:
                found = samples[link.name]
                found["direct_ms"].append(echo_ms(port, DIRECT_ECHOES))
                with relay(port, link.name) as relayed:
                    found["rtt_ms"].append(echo_ms(relayed, max(LEAST_ECHOES, int(ECHOES_S * 1000 / link.rtt_ms))))
                    found["up"].append(goodput_up(relayed, int(link.up_bytes_per_s * BULK_S)))
                    found["down"].append(goodput_down(relayed, int(link.down_bytes_per_s * BULK_S)))
    return {"links": {link.name: judged(link, samples[link.name]) for link in links}}


def judged(link: LinkProfile, found: dict[str, list[float]]) -> dict[str, object]:
    """The profile's figures, what was measured, and by how much it differs, as shares."""
    bytes_ms = ECHO_BYTES * 1000 * (1 / link.up_bytes_per_s + 1 / link.down_bytes_per_s)
    expected_ms = link.rtt_ms + bytes_ms
    net_ms = [rtt_ms - direct_ms for rtt_ms, direct_ms in zip(found["rtt_ms"], found["direct_ms"], strict=True)]
    return {
        "profile": {"rtt_ms": link.rtt_ms, "up": link.up_bytes_per_s, "down": link.down_bytes_per_s},
        "expected_rtt_ms": expected_ms,
        "rtt_error": float(np.median(net_ms)) / expected_ms - 1,
        "rtt_error_whole": float(np.median(found["rtt_ms"])) / expected_ms - 1,
        "up_error": float(np.median(found["up"])) / link.up_bytes_per_s - 1,
        "down_error": float(np.median(found["down"])) / link.down_bytes_per_s - 1,
        "direct_ms": figure(found["direct_ms"], "ms"),
        "rtt_ms": figure(found["rtt_ms"], "ms"),
        "up": figure(found["up"], "bytes/s"),
        "down": figure(found["down"], "bytes/s"),
    }


@contextmanager
def target() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("fork").Process(target=serve, args=(listener,), daemon=True)
        process.start()
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            process.join()


def serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def answer(connection: socket.socket) -> None:
    """`e`: say everything again. `u` and a count: take so many bytes and say how fast they came. `d`: give them."""
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind = connection.recv(1)
        if kind == b"e":
            while data := connection.recv(READ_BYTES):
                connection.sendall(data)
            return
        (count,) = COUNT.unpack(connection.recv(COUNT.size, socket.MSG_WAITALL))
        if kind == b"u":
            connection.sendall(SPEED.pack(speed(connection, count)))
        else:
            connection.sendall(bytes(count))


def speed(connection: socket.socket, count: int) -> float:
    """Bytes a second, of all but those that came first."""
    first = left = count - len(connection.recv(READ_BYTES))
    began_s = time.perf_counter()
    while left:
        left -= len(connection.recv(READ_BYTES))
    return first / (time.perf_counter() - began_s)


@contextmanager
def relay(port: int, link: str) -> Iterator[int]:
    call = [sys.executable, "-m", "edgewise.bench.relay", f"http://127.0.0.1:{port}", "--link", link, "--control"]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        relayed = urlsplit(json.loads(process.stdout.readline())["url"]).port
        assert relayed is not None
        yield relayed
        process.stdin.close()  # which ends it


def connected(port: int, kind: bytes) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(kind)
    return sock


def echo_ms(port: int, count: int) -> float:
    """The median."""
    times = []
    with connected(port, b"e") as sock:
        for _ in range(WARM_UP + count):
            began_s = time.perf_counter()
            sock.sendall(bytes(ECHO_BYTES))
            sock.recv(ECHO_BYTES, socket.MSG_WAITALL)
            times.append((time.perf_counter() - began_s) * 1000)
    return float(np.median(times[WARM_UP:]))


def goodput_up(port: int, count: int) -> float:
    with connected(port, b"u" + COUNT.pack(count)) as sock:
        sock.sendall(bytes(count))
        (found,) = SPEED.unpack(sock.recv(SPEED.size, socket.MSG_WAITALL))
        return float(found)


def goodput_down(port: int, count: int) -> float:
    with connected(port, b"d" + COUNT.pack(count)) as sock:
        return speed(sock, count)


if __name__ == "__main__":
    main()
