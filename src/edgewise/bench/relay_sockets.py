"""What a relay asks of the operating system: sockets that hold nothing back, bytes with the time at which they came,
and sleeps that end when they should."""

from __future__ import annotations

import contextlib
import ctypes
import math
import select
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Final

from edgewise.errors import UsageError

SOCKET_BUFFER_BYTES: Final = 1 << 18  # fixed, or the kernel would take megabytes for a target that does not read
EARLY_S: Final = 0.001  # the longer a sleep, the later it ends: up to 0.4 ms here; so wake early, and sleep on
SPIN_S: Final = 0.000_1  # and a short sleep still ends up to this much late
PR_SET_TIMERSLACK: Final = 29  # of Linux's prctl: how much later a sleep may end so that several end together
SO_TIMESTAMPNS: Final = 35  # of Linux: the kernel says when bytes came in
TIMESPEC: Final = struct.Struct("@ll")
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
LINUX: Final = sys.platform == "linux"

Ready = Callable[[int], None]
now_s = time.perf_counter


class Watch:
    """Which sockets are waited for, and whom to call with the events (selectors.EVENT_READ, EVENT_WRITE)."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def __contains__(self, sock: socket.socket) -> bool:
        return sock in self._selector.get_map()

    def set(self, sock: socket.socket, mask: int, ready: Ready) -> None:
        """Watch for these events and for no others; 0 forgets the socket."""
        key = self._selector.get_map().get(sock)
        if key is None and mask:
            self._selector.register(sock, mask, ready)
        elif key is not None and not mask:
            self._selector.unregister(sock)
        elif key is not None and key.events != mask:
            self._selector.modify(sock, mask, ready)

    def forget(self, sock: socket.socket) -> None:
        if sock in self:
            self._selector.unregister(sock)

    def wait(self, until_s: float, *, spin: bool) -> None:
        """For events, but not longer than until then, and call whom they concern. May return early. With `spin` the
        last 100 us before that time go without sleep."""
        left_s = until_s - now_s()
        early_s = EARLY_S if left_s > 2 * EARLY_S else SPIN_S * spin
        events = self._poll(None if left_s == math.inf else max(0.0, left_s - early_s))
        for key, mask in events:
            current = self._selector.get_map().get(key.fd)
            if current and current.fileobj is key.fileobj:  # an event before it may have closed this one
                key.data(mask)
        while spin and not events and now_s() < until_s <= now_s() + SPIN_S:
            pass

    def close(self) -> None:
        self._selector.close()

    def _poll(self, timeout_s: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        if LINUX and timeout_s != 0:  # epoll counts milliseconds, select microseconds
            select.select([self._selector], [], [], timeout_s)
            timeout_s = 0
        return self._selector.select(timeout_s)


def exact_sleeps() -> None:
    """From now on in this thread."""
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


def bound(port: int) -> socket.socket:
    """A socket of a loopback port, 0 for any; UsageError if it is taken."""
    sock = prepared(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", port))
    except OSError as e:
        sock.close()
        raise UsageError(f"port {port} cannot be had: {e.strerror}", hint="port 0 takes any free one") from e
    return sock


def prepared(sock: socket.socket) -> socket.socket:
    """Without waiting, holding back or growing; telling when bytes came in, where the kernel can."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    if LINUX:
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    return sock


def reset_on_close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may be broken already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


def received(sock: socket.socket, count: int) -> tuple[bytes, float]:
    """At most `count` bytes, none at the end, and when they came in, which is a little before we read them.
    OSError as of recv."""
    data, notes, _, _ = sock.recvmsg(count, 64)
    read_s = now_s()
    for level, kind, value in notes:
        if LINUX and level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS and len(value) == TIMESPEC.size:
            seconds, nanoseconds = TIMESPEC.unpack(value)
            read_s -= max(0.0, time.time() - seconds - nanoseconds * 1e-9)
    return data, read_s
