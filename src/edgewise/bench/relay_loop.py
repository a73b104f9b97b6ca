"""The sockets of a relay: connections in, connections out, and between them the two lines of a link.

One thread runs `Loop.run`, and everything here happens in it; other threads hand it their calls through `Loop.call`.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import math
import selectors
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

from edgewise.bench.link_model import Flow, Gilbert, Line, Packet, Sign
from edgewise.bench.relay_sockets import Watch, bound, exact_sleeps, now_s, prepared, received, reset_on_close
from edgewise.devices.links import LinkProfile
from edgewise.errors import UsageError

READ_BYTES: Final = 1 << 18
SLACK_BYTES: Final = 16 << 10  # a sender may be ahead of what is under way by this,
SLACK_S: Final = 0.01  # or by what the link carries in this time
SEND_S: Final = 0.000_01  # from the call to the bytes at the sink's kernel, so it is made so much earlier
SPIN_BELOW_RTT_S: Final = 0.03  # of a longer round trip the last 100 us are not worth a busy core
NOTHING: Final = memoryview(b"")

Address = tuple[int, Any]  # of socket.getaddrinfo: family and what connect() takes


@dataclass(slots=True)
class Direction:
    """Up or down: the line, and what has passed it."""

    line: Line
    passed_bytes: int = 0
    marks: list[tuple[int, Callable[[], None]]] = field(default_factory=list)  # to be called when so much has passed

    @property
    def slack_bytes(self) -> int:
        return max(SLACK_BYTES, int(self.line.rate_bytes_per_s * SLACK_S))

    @property
    def limit_bytes(self) -> int:
        """A connection may have so much queued: what is under way in a round trip, and the slack."""
        return int(self.line.rate_bytes_per_s * self.line.rtt_s) + self.slack_bytes


@dataclass(slots=True, eq=False)
class Pipe(Flow):
    """One direction of a connection."""

    direction: Direction = field(kw_only=True)
    source: socket.socket | None = None
    sink: socket.socket | None = None
    reading: bool = False
    reading_since_s: float = math.inf
    blocked: bool = False  # the sink takes nothing for now
    heard_all: bool = False  # nothing more comes from the source
    ended: bool = False  # and the sink knows

    def read(self, on: bool) -> None:
        if on and not self.reading:
            self.reading_since_s = now_s()
        self.reading = on

    def drop(self) -> None:
        self.packets.clear()
        self.missing.clear()
        self.queued_bytes = 0


@dataclass(slots=True, eq=False)
class Connection:
    up: Pipe  # from the client
    down: Pipe  # from the target
    connecting: bool = False

    @property
    def pipes(self) -> tuple[Pipe, Pipe]:
        return self.up, self.down

    def back(self, pipe: Pipe) -> Pipe:
        return self.down if pipe is self.up else self.up


class Loop:
    """Listens on a loopback port and passes on to `target`, as if `profile` lay between."""

    def __init__(self, target: Address, profile: LinkProfile, *, port: int, seed: int) -> None:
        self._target = target
        self.up, self.down = (Direction(Line(1.0, 0.0, Gilbert(0.0, 1.0, f"{seed} {way}"))) for way in ("up", "down"))
        self._adopt(profile)
        self._connections: set[Connection] = set()
        self._opening: set[Connection] = set()  # accepted less than a round trip ago
        self._stalled = self._stopping = self._ended = False
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._calls: SimpleQueue[tuple[Callable[[], None], Future[None]]] = SimpleQueue()
        self._calls_lock = threading.Lock()
        self._listener = bound(port)
        self.port: int = self._listener.getsockname()[1]
        self._watch = Watch()
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)
        self._watch.set(self._woken, selectors.EVENT_READ, self._run_calls)
        self.restore()

    # What other threads may do.

    def call(self, function: Callable[[], None]) -> None:
        """Run it in the loop's thread and wait for its end. UsageError if the loop has ended."""
        future: Future[None] = Future()
        with self._calls_lock:
            if self._ended:
                raise UsageError("the relay has ended", hint="use it inside its with block")
            self._calls.put((function, future))
        with contextlib.suppress(BlockingIOError):  # then it is awake already
            self._wake.send(b"\0")
        future.result()

    def run(self) -> None:
        """Until `stop`."""
        exact_sleeps()
        try:
            while not self._stopping:
                next_s = self._fire_and_deliver()
                self._watch.wait(next_s, spin=self.up.line.rtt_s < SPIN_BELOW_RTT_S)
        finally:
            self._end()

    # What the loop's thread may do, also through `call`.

    def at(self, when_s: float, function: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when_s, next(self._number), function))

    def when_passed(self, direction: Direction, count: int, function: Callable[[], None]) -> None:
        """Call it once `count` more bytes have gone that way; what is behind them has not gone then."""
        direction.marks.append((direction.passed_bytes + count, function))
        direction.marks.sort(key=lambda mark: mark[0])

    def stall(self) -> None:
        self._stalled = True

    def resume(self) -> None:
        if self._stalled:
            self._stalled = False
            self._retime(all_of_it=True)
            for connection in self._opening:
                self._open_later(connection)

    def set_profile(self, profile: LinkProfile) -> None:
        self._adopt(profile)
        self._retime()
        for connection in self._connections:
            self._heed(connection)

    def reset(self) -> None:
        for connection in [*self._connections, *self._opening]:
            self._abort(connection)

    def cut(self) -> None:
        if self._listener in self._watch:  # first, so that nobody who sees the reset is let in again
            self._watch.forget(self._listener)
            self._listener.close()
            self._listener = bound(self.port)  # not listening, so whoever asks is refused, and nobody takes the port
        self.reset()

    def restore(self) -> None:
        if self._listener not in self._watch:
            self._listener.listen(128)
            self._watch.set(self._listener, selectors.EVENT_READ, self._accept)

    def stop(self) -> None:
        self._stopping = True

    # Time.

    def _fire_and_deliver(self) -> float:
        """Do all that is due; returns when the next thing will be."""
        while self._timers and self._timers[0][0] <= now_s():
            heapq.heappop(self._timers)[2]()
        for connection in tuple(self._connections):
            for pipe in connection.pipes:
                self._deliver(connection, pipe)
        timers = (self._timers[0][0],) if self._timers else ()
        pipes = [] if self._stalled else [pipe for connection in self._connections for pipe in connection.pipes]
        heads = (p.packets[0].due_s - SEND_S for p in pipes if p.packets and not p.blocked)
        return min((*timers, *heads), default=math.inf)

    def _adopt(self, profile: LinkProfile) -> None:
        for direction, rate in ((self.up, profile.up_bytes_per_s), (self.down, profile.down_bytes_per_s)):
            direction.line.rate_bytes_per_s, direction.line.rtt_s = rate, profile.rtt_ms / 1000
            direction.line.loss.enter, direction.line.loss.leave = profile.loss_enter, profile.loss_leave

    def _retime(self, *, all_of_it: bool = False) -> None:
        self.up.line.enter_again([c.up for c in self._connections], now_s(), all_of_it=all_of_it)
        self.down.line.enter_again([c.down for c in self._connections], now_s(), all_of_it=all_of_it)

    # Connections.

    def _accept(self, mask: int) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # it was gone before we looked
            return
        prepared(client)
        connection = Connection(Pipe(direction=self.up, source=client), Pipe(direction=self.down, sink=client))
        self._opening.add(connection)
        if not self._stalled:
            self._open_later(connection)

    def _open_later(self, connection: Connection) -> None:
        """The kernel has answered the client at once; on a link it would have taken a round trip."""
        self.at(now_s() + self.up.line.rtt_s, partial(self._open, connection))

    def _open(self, connection: Connection) -> None:
        if connection not in self._opening or self._stalled:
            return
        self._opening.remove(connection)
        self._connections.add(connection)
        self._enter(connection.up, Packet(NOTHING, now_s(), Sign.OPEN))
        self._heed(connection)

    def _connect(self, connection: Connection) -> None:
        family, address = self._target
        target = prepared(socket.socket(family, socket.SOCK_STREAM))
        connection.up.sink = connection.down.source = target
        connection.connecting = connection.up.blocked = True
        if target.connect_ex(address) in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
            self._heed(connection)  # what comes of it is the socket's next event
        else:
            self._abort(connection)

    def _connected(self, connection: Connection) -> None:
        target = connection.up.sink
        if target is None or target.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._abort(connection)
            return
        connection.connecting = connection.up.blocked = False
        self._heed(connection)

    def _heed(self, connection: Connection) -> None:
        """Watch for what the state of the connection calls for."""
        for pipe in connection.pipes:
            if pipe.source is None:
                continue
            limit = pipe.direction.limit_bytes - (0 if pipe.reading else pipe.direction.slack_bytes // 2)
            there = not connection.connecting or pipe is connection.up
            pipe.read(there and not pipe.heard_all and pipe.queued_bytes < limit)
            reads = selectors.EVENT_READ if pipe.reading else 0
            writes = selectors.EVENT_WRITE if connection.back(pipe).blocked else 0
            self._watch.set(pipe.source, reads | writes, partial(self._ready, connection, pipe))

    def _ready(self, connection: Connection, pipe: Pipe, mask: int) -> None:
        """The source of this pipe, which is the sink of the other, can be read or written."""
        if connection.connecting and pipe is connection.down:
            self._connected(connection)
            return
        if mask & selectors.EVENT_WRITE:
            connection.back(pipe).blocked = False
        if mask & selectors.EVENT_READ:
            self._read(connection, pipe)
        if connection in self._connections:
            self._heed(connection)

    def _abort(self, connection: Connection) -> None:
        """Both sides see a reset; what was under way is lost."""
        for sock in (connection.up.source, connection.up.sink):
            if sock is not None:
                reset_on_close(sock)
        self._close(connection)
        self._retime()

    def _close(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._opening.discard(connection)
        for pipe in connection.pipes:
            pipe.drop()
        for sock in (connection.up.source, connection.up.sink):
            if sock is not None:
                self._watch.forget(sock)
                sock.close()

    # Bytes.

    def _read(self, connection: Connection, pipe: Pipe) -> None:
        assert pipe.source is not None
        room = pipe.direction.limit_bytes - pipe.queued_bytes
        if room <= 0:
            return
        try:
            data, came_s = received(pipe.source, min(READ_BYTES, room))
        except BlockingIOError:
            return
        except OSError:
            self._broken(connection, pipe)
            return
        arrival_s = max(came_s, pipe.reading_since_s)
        if data:
            for packet in pipe.direction.line.packets(memoryview(data), arrival_s):
                self._enter(pipe, packet)
        else:
            pipe.heard_all = True
            self._enter(pipe, Packet(NOTHING, arrival_s, Sign.END))

    def _enter(self, pipe: Pipe, packet: Packet) -> None:
        pipe.direction.line.enter(pipe, packet)

    def _broken(self, connection: Connection, pipe: Pipe) -> None:
        """The source was reset: it takes nothing any more, and its other side hears of it in time."""
        back = connection.back(pipe)
        pipe.heard_all = back.heard_all = True
        back.blocked = False
        back.drop()
        self._enter(pipe, Packet(NOTHING, now_s(), Sign.RESET))

    def _deliver(self, connection: Connection, pipe: Pipe) -> None:
        """All that is due, as far as the sink takes it."""
        delivered = False
        while pipe.packets and not pipe.blocked and not self._stalled and pipe.packets[0].due_s - SEND_S <= now_s():
            delivered = True
            packet = pipe.packets[0]
            if packet.sign is Sign.DATA:
                self._send(connection, pipe, packet)
                continue
            pipe.packets.popleft()
            if packet.sign is Sign.OPEN:
                self._connect(connection)
            elif packet.sign is Sign.RESET:
                self._abort(connection)
            else:
                self._pass_end(connection, pipe)
        if delivered and connection in self._connections:
            self._heed(connection)

    def _send(self, connection: Connection, pipe: Pipe, packet: Packet) -> None:
        assert pipe.sink is not None
        direction = pipe.direction
        before_mark = direction.marks[0][0] - direction.passed_bytes if direction.marks else len(packet.data)
        try:
            sent = pipe.sink.send(packet.data[:before_mark])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._abort(connection)
            return
        pipe.blocked = sent < min(before_mark, len(packet.data))
        packet.data = packet.data[sent:]
        pipe.queued_bytes -= sent
        direction.passed_bytes += sent
        if not packet.data:
            pipe.packets.popleft()
        while direction.marks and direction.marks[0][0] <= direction.passed_bytes:
            direction.marks.pop(0)[1]()

    def _pass_end(self, connection: Connection, pipe: Pipe) -> None:
        assert pipe.sink is not None
        pipe.ended = True
        with contextlib.suppress(OSError):  # it has closed already
            pipe.sink.shutdown(socket.SHUT_WR)
        if connection.back(pipe).ended:
            self._close(connection)

    # Calls and the end.

    def _run_calls(self, mask: int = 0) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while not self._calls.empty():
            function, future = self._calls.get()
            try:
                function()
            except Exception as e:
                future.set_exception(e)
            else:
                future.set_result(None)

    def _end(self) -> None:
        self.reset()
        with self._calls_lock:
            self._ended = True
        while not self._calls.empty():
            self._calls.get()[1].set_exception(UsageError("the relay has ended"))
        self._watch.close()
        for sock in (self._listener, self._woken, self._wake):
            sock.close()
