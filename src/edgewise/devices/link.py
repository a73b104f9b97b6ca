"""The way to another machine: how long it takes there and back, what is lost, how many bytes a second it carries.

It is measured as requests go, through a proxy where they do: then connection and loss are those of the way to the
proxy. Bytes are exchanged with /edgewise/bytes, which our nodes have; another server only shows how fast it takes them
in. What cannot be measured is unknown, and says why.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import httpx2
import msgspec

from edgewise.devices.address import is_loopback
from edgewise.devices.reading import Reading, reading
from edgewise.errors import ConfigError, RemoteBroken, RemoteError, RemoteTimeout, Unreachable

CONNECTS: Final = 3
REQUESTS: Final = 15
REQUESTS_S: Final = 2.0  # for all of them; three are made in any case
DIRECTION_S: Final = 2.0  # for all bytes of one direction
TIMEOUT_S: Final = 4.0  # for a connection, and for silence
LONG_S: Final = 0.2  # a transfer that takes so long is long enough; the next one is larger else
FIRST, MOST, GROWTH = 16 << 10, 4 << 20, 4  # bytes of a transfer
TRANSFERS: Final = 3  # of the last size
PIECE: Final = 16 << 10
PLACES: Final = ("/livez", "/health", "/v1/models")  # the first that is there is asked
BYTES: Final = "/edgewise/bytes"
ENOUGH_SEGMENTS: Final = 200  # to say what share is lost

# First match counts. The text of the library stays out of messages: it may repeat headers.
ERRORS: Final[tuple[tuple[type[Exception], type[RemoteError], str], ...]] = (
    (httpx2.ConnectTimeout, Unreachable, f"no connection within {TIMEOUT_S:g} s"),
    (httpx2.TimeoutException, RemoteTimeout, f"silent for {TIMEOUT_S:g} s"),
    (httpx2.ConnectError, Unreachable, "no connection"),
    (httpx2.NetworkError, Unreachable, "the connection broke"),
    (httpx2.ProxyError, Unreachable, "the proxy gives no connection"),
    (httpx2.HTTPError, RemoteBroken, "the answer breaks the rules of HTTP, or ends too early"),
)
HINT: Final = (
    "check the address (https needs a certificate that this machine trusts), the network, and that a server runs"
)


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`rtt_ms` is that of a small request on a kept connection, the server's work on it included, `tcp_rtt_ms` the
    system's own; `lost_share` is of the segments that we sent. `unknown` says why a figure is None."""

    url: str
    date: str
    rtt_ms: Reading
    connect_ms: Reading | None = None
    tls_ms: Reading | None = None
    tcp_rtt_ms: float | None = None
    lost_share: float | None = None
    up_bytes_per_s: Reading | None = None
    down_bytes_per_s: Reading | None = None
    unknown: dict[str, str]


def measure(url: str, key: str | None = None) -> Link:
    """Some eight seconds at most where the other side answers. `key` goes into the Authorization header and nowhere
    else. ConfigError for a bad address; RemoteError where nobody answers, or no HTTP server."""
    root = _root(url)
    with _mapped_errors(root):
        connections = [_connected(root, key) for _ in range(CONNECTS)]
        with _client(root, key) as client:
            return _measured(_Way(client, root), connections)


def _root(url: str) -> str:
    """The address without the `/v1` that it may end in."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or re.search(r"[\s\x00-\x1f\x7f?#]", url):
        raise ConfigError(f"{url!r} is not an address", hint="it looks like http://host:8000 or https://host/v1")
    if "@" in parts.netloc:
        raise ConfigError(f"the address of {parts.hostname} holds credentials", hint="--cloud-key-env names a key")
    return url.rstrip("/").removesuffix("/v1")


@contextmanager
def _mapped_errors(root: str) -> Iterator[None]:
    try:
        yield
    except httpx2.HTTPError as e:
        ours, text = next((ours, text) for vendor, ours, text in ERRORS if isinstance(e, vendor))
        raise ours(f"{root}: {text} ({type(e).__name__})", hint=HINT) from None


def _client(root: str, key: str | None) -> httpx2.Client:
    return httpx2.Client(
        timeout=TIMEOUT_S,
        trust_env=not is_loopback(urlsplit(root).hostname or ""),
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    )


class _Connection(NamedTuple):
    """Seconds that two steps of connecting took; None for a step that was not taken."""

    tcp_s: float | None
    tls_s: float | None


def _connected(root: str, key: str | None) -> _Connection:
    times: dict[str, float] = {}

    def note(event: str, _: Mapping[str, object]) -> None:
        times[event] = time.perf_counter()

    def taken(step: str) -> float | None:
        ends = times.get(f"{step}.started"), times.get(f"{step}.complete")
        return None if ends[0] is None or ends[1] is None else ends[1] - ends[0]

    with _client(root, key) as client:
        client.get(root + PLACES[0], extensions={"trace": note})
    return _Connection(taken("connection.connect_tcp"), taken("connection.start_tls"))


def _measured(way: _Way, connections: list[_Connection]) -> Link:
    found: dict[str, Any] = {
        "connect_ms": _milliseconds("connect_ms", [c.tcp_s for c in connections]),
        "tls_ms": _milliseconds("tls_ms", [c.tls_s for c in connections]),
    }
    unknown: dict[str, str] = {}
    trips = way.round_trips()
    for name, take in (("down_bytes_per_s", way.down), ("up_bytes_per_s", way.up)):
        try:
            found[name] = reading(name, take())
        except _Unknown as e:
            unknown[name] = str(e)
        except httpx2.HTTPError as e:
            unknown[name] = f"the transfer broke ({type(e).__name__})"
    counters = _counters(way.socket)
    if counters is None:
        unknown |= dict.fromkeys(("tcp_rtt_ms", "lost_share"), "the system does not tell")
    else:
        found["tcp_rtt_ms"] = counters.rtt_us / 1000
        if counters.sent >= ENOUGH_SEGMENTS:
            found["lost_share"] = counters.sent_again / counters.sent
        else:
            unknown["lost_share"] = f"{counters.sent} segments are too few to tell"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Link(url=way.root, date=date, rtt_ms=reading("rtt_ms", (1e3 * s for s in trips)), unknown=unknown, **found)


def _milliseconds(name: str, seconds: list[float | None]) -> Reading | None:
    known = [1e3 * s for s in seconds if s is not None]
    return reading(name, known) if known else None


class _Unknown(Exception):
    """A figure cannot be had; the message says why."""


class _Way:
    """One kept connection; `socket` is the one that was used last."""

    def __init__(self, client: httpx2.Client, root: str) -> None:
        self.root = root
        self.socket: socket.socket | None = None
        self._client = client
        self._rtt_s = 0.0

    def round_trips(self) -> list[float]:
        """Seconds each. What it takes to connect is not in them."""
        place = next((place for place in PLACES if self._get(place) == 200), PLACES[-1])
        if (status := self._get(place)) >= 500:
            raise RemoteBroken(f"{self.root}{place} answers {status}", hint="see what its log says")
        trips: list[float] = []
        end = time.perf_counter() + REQUESTS_S
        while len(trips) < REQUESTS and (len(trips) < 3 or time.perf_counter() < end):
            start = time.perf_counter()
            self._get(place)
            trips.append(time.perf_counter() - start)
        self._rtt_s = min(trips)
        return trips

    def down(self) -> list[float]:
        """Bytes a second, transfer by transfer."""
        return _transfers(self._download)

    def up(self) -> list[float]:
        return _transfers(self._upload)

    def _get(self, place: str) -> int:
        with self._client.stream("GET", self.root + place) as response:
            self._note(response)
            response.read()
            return response.status_code

    def _download(self, size: int, end: float) -> tuple[int, float]:
        with self._client.stream("GET", self.root + BYTES, params={"count": size}) as response:
            self._note(response)
            if response.status_code != 200:
                raise _Unknown(_refusal(response.status_code))
            come, start = 0, time.perf_counter()
            for piece in response.iter_raw(PIECE):
                come += len(piece)
                if time.perf_counter() > end:
                    break
            return come, time.perf_counter() - start

    def _upload(self, size: int, end: float) -> tuple[int, float]:
        body = _Body(size, end)
        start = time.perf_counter()
        with self._client.stream("POST", self.root + BYTES, content=iter(body)) as response:
            self._note(response)
            response.read()
            status, kept = response.status_code, response.headers.get("connection", "").lower() != "close"
            if status in (401, 403) or not kept:
                raise _Unknown(_refusal(status))
            if status != 200:  # it may have said no before all had left
                self._wait_until_sent(end)
            return body.gone, time.perf_counter() - start - self._rtt_s

    def _note(self, response: httpx2.Response) -> None:
        self.socket = response.extensions["network_stream"].get_extra_info("socket")

    def _wait_until_sent(self, end: float) -> None:
        while (left := _unsent(self.socket)) != 0:
            if left is None or time.perf_counter() > end:
                raise _Unknown("it cannot be seen when the bytes were taken in")
            time.sleep(0.001)


class _Body:
    """A request's body of random bytes; `gone` counts those that the connection took."""

    def __init__(self, size: int, end: float) -> None:
        self._size, self._end = size, end
        self.gone = 0

    def __iter__(self) -> Iterator[bytes]:
        piece = os.urandom(PIECE)  # what cannot be compressed on the way
        while self.gone < self._size and time.perf_counter() < self._end:
            yield piece
            self.gone += len(piece)


def _refusal(status: int) -> str:
    if status in (401, 403):
        return f"the server answers {status}: it wants a key, or another one"
    return f"the server answers {status}: only Edgewise nodes have {BYTES}"


def _transfers(transfer: Callable[[int, float], tuple[int, float]]) -> list[float]:
    """Bytes a second of transfers that are long enough to tell, as far as the time allows. `transfer(size, end)` moves
    so many bytes, or fewer at the time `end`, and gives their number and the seconds."""
    end = time.perf_counter() + DIRECTION_S
    size = FIRST
    moved, seconds = transfer(size, end)
    while seconds < LONG_S and size < MOST and time.perf_counter() < end:
        size = min(MOST, GROWTH * size)
        moved, seconds = transfer(size, end)
    rates = [moved / max(seconds, 1e-6)]
    while len(rates) < TRANSFERS and time.perf_counter() < end:
        moved, seconds = transfer(size, end)
        rates.append(moved / max(seconds, 1e-6))
    return rates


@dataclass(frozen=True, slots=True)
class _Counters:
    """Of a connection: its shortest round trip in microseconds, segments sent, and those of them sent again."""

    rtt_us: int
    sent: int
    sent_again: int


def _counters(connection: socket.socket | None) -> _Counters | None:
    if sys.platform != "linux" or connection is None:
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
        return _Counters(*(struct.unpack_from("=I", info, at)[0] for at in (148, 156, 100)))  # struct tcp_info
    except (OSError, ValueError, struct.error):  # closed, or an old system
        return None


def _unsent(connection: socket.socket | None) -> int | None:
    """Bytes that the other side has not acknowledged."""
    if sys.platform != "linux" or connection is None:
        return None
    import fcntl
    import termios

    try:
        return int(struct.unpack("=i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0])
    except (OSError, ValueError):  # closed
        return None
