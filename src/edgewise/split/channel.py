"""The edge's end of a WebSocket to one worker: frames out, their answers in, and how long an answer may take."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    ConnectionClosedOK,
    InvalidHandshake,
    InvalidStatus,
    WebSocketException,
)
from websockets.frames import DATA_OPCODES, Opcode
from websockets.frames import Frame as Piece
from websockets.protocol import OPEN, Event

from edgewise.devices.address import is_loopback
from edgewise.errors import BadFrame, ConfigError, RemoteError, RemoteRefused, RemoteTimeout, Unreachable
from edgewise.wire import frame as wire
from edgewise.wire.frame import Frame, Kind

PATH: Final = "/edgewise/split"
CONNECT_S: Final = 5.0
CLOSE_S: Final = 0.2  # for the good-bye
FIRST_S: Final = 2.0  # for an answer before any was seen
LEAST_S: Final = 0.15  # a busy machine may let a process wait for so long
MOST_S: Final = 10.0
FIRST_BYTES_PER_S: Final = 20_000.0  # of a way that no large frame has gone yet,
FIRST_BYTES_PER_RTT: Final = 3_000.0  # or this, if it is less: ways with long round trips are narrow ones, too
LEAST_BYTES_PER_S: Final = 500.0
BUFFERED: Final = 16384  # bytes that a connection takes however slow it is: half of where it makes senders wait
LARGE: Final = 8192  # bytes: frames whose time says how many a second the way carries
FINAL_CODES: Final = frozenset({"version", "weights", "layers", "limit", "frame"})  # asking again does not help
HINTS: Final[Mapping[str, str]] = {
    "version": "bring both sides to the same version",
    "weights": "pull the same model on both sides",
    "layers": "choose a cut behind the worker's first layer; it was started with --layers",
    "limit": "start the worker with a longer context, or set a shorter one here",
}


_quiet = logging.getLogger(f"{__name__}.socket")
_quiet.setLevel(logging.INFO)  # the library's debugging shows headers, and the key is one


@dataclass(frozen=True, slots=True)
class Way:
    """Where a worker is and how it is spoken to: http(s) or ws(s) addresses; `key` is its bearer key; `ca` a file of
    certificates that are trusted instead of the system's."""

    url: str
    key: str | None = field(default=None, repr=False)
    ca: Path | None = None

    @property
    def address(self) -> str:
        parts = urlsplit(self.url)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        path = parts.path.rstrip("/").removesuffix("/v1")
        return urlunsplit((scheme, parts.netloc, path if path.endswith(PATH) else path + PATH, "", ""))


class Patience:
    """How long an answer may take: the smoothed round trip and four times its deviation (RFC 6298), what the worker
    needs to compute, and what the bytes need on their way."""

    def __init__(self) -> None:
        self.rtt_s: float | None = None
        self._deviation_s = 0.0
        self._row_s = 0.0  # of the worker's time, for each row
        self._bytes_per_s = FIRST_BYTES_PER_S

    def learn(self, elapsed_s: float, computed_s: float, rows: int, size: int) -> None:
        """An answer came: `elapsed_s` after `size` bytes with `rows` rows were sent."""
        way_s = max(elapsed_s - computed_s, 0.0)
        if rows:
            row_s = computed_s / rows
            self._row_s += 0.25 * (row_s - self._row_s) if self._row_s else row_s
        if size >= LARGE and self.rtt_s is not None:
            carried = size / max(way_s - self.rtt_s, 1e-4)
            self._bytes_per_s += 0.25 * (carried - self._bytes_per_s)
        elif self.rtt_s is None:
            self.rtt_s, self._deviation_s = way_s, way_s / 2
            self._bytes_per_s = min(self._bytes_per_s, FIRST_BYTES_PER_RTT / max(way_s, 1e-4))
        else:
            self._deviation_s += 0.25 * (abs(way_s - self.rtt_s) - self._deviation_s)
            self.rtt_s += 0.125 * (way_s - self.rtt_s)

    def gave_up(self, size: int) -> None:
        """No answer came in time, with `size` bytes on their way. Longer next time: a way that has become slow would be
        taken for a dead one for ever, as what is given up teaches nothing."""
        self._deviation_s = min(2 * self._deviation_s + LEAST_S / 4, MOST_S / 4)
        if size >= LARGE:
            self._bytes_per_s = max(self._bytes_per_s / 2, LEAST_BYTES_PER_S)

    def timeout_s(self, rows: int, size: int) -> float:
        """For `rows` rows in `size` bytes, all that wait before them included."""
        if self.rtt_s is None:
            return FIRST_S + size / self._bytes_per_s
        expected = self.rtt_s + 4 * self._deviation_s + 2 * self._row_s * rows + 2 * size / self._bytes_per_s
        return min(max(expected, LEAST_S), MOST_S + 2 * size / self._bytes_per_s)


@dataclass(frozen=True, slots=True)
class _Asked:
    answer: asyncio.Future[Frame]
    sent_s: float
    rows: int
    size: int


class _Socket(ClientConnection):
    """Gives a message to `heard` in the turn of the event loop in which it comes, None for a text, and its end to
    `lost`; sends one at once where it cannot be held up. The library's own ways, a queue and a task that reads it,
    take two more turns of the loop, as long as a tenth of a small model's token."""

    def __init__(
        self,
        *own: Any,
        heard: Callable[[bytes | None], None],
        lost: Callable[[ConnectionClosed], None],
        **options: Any,
    ) -> None:
        super().__init__(*own, **options)
        self._heard, self._lost = heard, lost
        self._pieces: list[bytes] | None = []

    def process_event(self, event: Event) -> None:
        if not isinstance(event, Piece) or event.opcode not in DATA_OPCODES:
            super().process_event(event)
            return
        if event.opcode is not Opcode.CONT:
            self._pieces = None if event.opcode is Opcode.TEXT else []
        if self._pieces is not None:
            self._pieces.append(bytes(event.data))
        if event.fin:
            self._heard(None if self._pieces is None else b"".join(self._pieces))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost(self.close_exc)

    def send_now(self, message: bytes) -> bool:
        """Whether it went; `send` waits until there is room."""
        if self.protocol.state is not OPEN or self.transport.get_write_buffer_size() + len(message) > BUFFERED:
            return False
        self.protocol.send_binary(message)
        self.send_data()
        return True


class Channel:
    """One connection, from `open` until it breaks or is closed. Each question of a session is answered once, in order;
    an answer that comes after its asker has given up is passed over, and shows that the worker lives."""

    _socket: _Socket

    def __init__(self, patience: Patience) -> None:
        self._asked: defaultdict[int, deque[_Asked]] = defaultdict(deque)
        self.patience = patience
        self.welcome = wire.Welcome((0, 0), "", 0, 0)
        self.ended = asyncio.Event()
        self._idle = asyncio.Event()  # all questions were answered
        self.reason: RemoteError = Unreachable("the connection to the worker ended")
        self.bytes_up = self.bytes_down = 0  # frames, headers included

    @classmethod
    async def open(cls, way: Way, hello: wire.Hello, patience: Patience) -> Channel:
        """Connected, and known to the worker. Unreachable or RemoteTimeout where nobody answers; RemoteRefused with the
        reason for a wrong key, version or model; ConfigError for a bad address."""
        channel = cls(patience)
        channel._socket = await _connected(way, partial(_Socket, heard=channel._heard, lost=channel._lost))
        try:
            answer = await channel.ask(Frame(Kind.HELLO, payload=wire.write_body(hello)), within_s=CONNECT_S)
            channel.welcome = wire.read_body(answer, wire.Welcome)
        except BaseException:
            await channel.close()
            raise
        return channel

    def check(self) -> None:
        """Raise the reason if it has ended."""
        if self.ended.is_set():
            raise self.reason

    async def settled(self, within_s: float) -> bool:
        """Whether all questions that are open now, those that nobody waits for any more among them, are answered within
        that time."""
        if self._asked:
            try:
                await asyncio.wait_for(self._idle.wait(), within_s)
            except TimeoutError:
                return False
        return not self.ended.is_set()

    async def ask(self, frame: Frame, *, within_s: float | None = None) -> Frame:
        """The answer to one frame. RemoteTimeout after `within_s` (None: as long as `patience` says); Unreachable if
        the connection breaks; RemoteRefused or RemoteError for an ERROR."""
        asked = await self.send(frame)
        limit_s = self._limit_s() if within_s is None else within_s
        try:
            async with asyncio.timeout(limit_s):
                return await asked.answer
        except TimeoutError:
            self._give_up()
            raise RemoteTimeout(
                f"the worker was silent for {limit_s * 1000:.0f} ms", hint="the edge goes on alone"
            ) from None

    async def send(self, frame: Frame) -> _Asked:
        """Send it; its answer is a future that may fail with what `ask` raises. RemoteTimeout, too, if the other side
        takes nothing in."""
        self.check()
        message = wire.pack(frame)
        loop = asyncio.get_running_loop()
        asked = _Asked(loop.create_future(), loop.time(), frame.rows, len(message))
        asked.answer.add_done_callback(_looked_at)
        self._asked[frame.session].append(asked)
        self._idle.clear()
        if self._socket.send_now(message):
            self.bytes_up += len(message)
            return asked
        try:
            async with asyncio.timeout(self._limit_s()):
                await self._put(message)
        except TimeoutError:
            self._give_up()
            raise RemoteTimeout("the worker takes nothing in", hint="the edge goes on alone") from None
        return asked

    def _limit_s(self) -> float:
        return self.patience.timeout_s(*self._pending())

    def _give_up(self) -> None:
        self.patience.gave_up(self._pending()[1])

    def _pending(self) -> tuple[int, int]:
        """Rows and bytes that wait for an answer."""
        pending = [one for line in self._asked.values() for one in line]
        return sum(one.rows for one in pending), sum(one.size for one in pending)

    async def tell(self, frame: Frame) -> None:
        """Send what has no answer; nothing is raised if the connection is broken."""
        with suppress(RemoteError):
            await self._put(wire.pack(frame))

    async def close(self) -> None:
        self._end(Unreachable("the connection to the worker was closed"))
        try:
            with suppress(TimeoutError, WebSocketException, OSError):
                await asyncio.wait_for(self._socket.close(), CLOSE_S)
        finally:  # also for whoever is cancelled while saying good-bye
            self._socket.transport.abort()

    async def _put(self, message: bytes) -> None:
        try:
            await self._socket.send(message)
        except (WebSocketException, OSError) as e:
            self._end(_broken(e))
            raise self.reason from e
        self.bytes_up += len(message)

    def _heard(self, message: bytes | None) -> None:
        if self.ended.is_set():
            return
        try:
            if message is None:
                raise BadFrame("a text message; frames are binary")
            self._take(wire.unpack(message))
            self.bytes_down += len(message)
        except RemoteError as e:
            self._end(e)

    def _lost(self, error: ConnectionClosed) -> None:
        closed = Unreachable("the worker closed the connection")
        self._end(closed if isinstance(error, ConnectionClosedOK) else _broken(error))

    def _take(self, frame: Frame) -> None:
        refusal = _refusal(frame) if frame.kind == Kind.ERROR else None
        if refusal is not None and not frame.session and 0 not in self._asked:
            raise refusal  # the last that a worker says to somebody who broke the rules
        line = self._asked.get(frame.session)
        if not line:
            raise BadFrame(f"a {frame.kind.name} that answers nothing")
        asked = line.popleft()
        if not line:
            del self._asked[frame.session]
        if not self._asked:
            self._idle.set()
        elapsed_s = asyncio.get_running_loop().time() - asked.sent_s
        if frame.session and refusal is None:
            self.patience.learn(elapsed_s, frame.micros / 1e6, asked.rows, asked.size)
        if asked.answer.done():
            return
        if refusal is None:
            asked.answer.set_result(frame)
        else:
            asked.answer.set_exception(refusal)

    def _end(self, reason: RemoteError) -> None:
        if self.ended.is_set():
            return
        self.reason = reason
        self.ended.set()
        for line in self._asked.values():
            for asked in line:
                if not asked.answer.done():
                    asked.answer.set_exception(reason)
        self._asked.clear()
        self._idle.set()


class Refused(RemoteRefused):
    """An ERROR of the worker; `code` is the reason as docs/formats/frames.md names it, `held` the rows that it has."""

    def __init__(self, code: str, message: str, held: int) -> None:
        super().__init__(f"the worker refuses: {message}", status=409, hint=HINTS.get(code))
        self.code, self.held = code, held
        self.retryable = code not in FINAL_CODES


def _refusal(frame: Frame) -> Refused:
    body = wire.read_body(frame, wire.Refusal)
    return Refused(body.code, body.message, frame.position)


async def _connected(way: Way, made: Callable[..., _Socket]) -> _Socket:
    headers = {"Authorization": f"Bearer {way.key}"} if way.key else {}
    host = urlsplit(way.url).hostname or ""
    try:
        connection = await connect(
            way.address,
            create_connection=made,  # type: ignore[arg-type]  # "a wrapper or a subclass" may be given
            additional_headers=headers,
            compression=None,  # rows of a codec have nothing left to compress
            max_size=wire.FRAME_LIMIT,
            open_timeout=CONNECT_S,
            ping_interval=None,  # whether the worker lives is seen by its answers
            close_timeout=CLOSE_S,
            proxy=None if is_loopback(host) else True,
            logger=_quiet,
            ssl=_trusting(way),
        )
        assert isinstance(connection, _Socket)
        return connection
    except InvalidStatus as e:
        raise _no_upgrade(way, e.response.status_code) from e
    except TimeoutError as e:
        raise RemoteTimeout(f"no connection to {way.url} within {CONNECT_S:g} s") from e
    except ssl.SSLCertVerificationError as e:
        why = f"{way.url} shows a certificate that is not trusted here: {e.verify_message}"
        raise RemoteRefused(why, status=495, hint="--split-ca names the certificates to trust") from e
    except (InvalidHandshake, ssl.SSLError) as e:
        hint = "is it a worker, and the address https if and only if the worker has a --tls-cert?"
        raise Unreachable(f"no connection to {way.url}: {e}", hint=hint) from e
    except OSError as e:
        raise Unreachable(f"no connection to {way.url}: {e}", hint="is the worker running there?") from e
    except (WebSocketException, ValueError) as e:
        raise ConfigError(f"{way.url!r} is no worker's address: {e}", hint="it looks like http://host:8000") from e


def _no_upgrade(way: Way, status: int) -> RemoteRefused:
    if status in (401, 403):
        return RemoteRefused(f"{way.url} refuses the key", status=401, hint="--split-key-file holds the worker's key")
    hint = "is it an Edgewise worker (`edgewise split serve`, `edgewise cloud`)?"
    return RemoteRefused(f"{way.url} has no worker: status {status}", status=status, hint=hint)


def _trusting(way: Way) -> ssl.SSLContext | None:
    if not way.address.startswith("wss:"):
        return None
    try:
        return ssl.create_default_context(cafile=None if way.ca is None else str(way.ca))
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(f"{way.ca} holds no certificates: {e}", hint="a file in PEM form is needed") from e


def _broken(error: Exception) -> Unreachable:
    return Unreachable(f"the connection to the worker broke: {type(error).__name__}", hint="the edge goes on alone")


def _looked_at(answer: asyncio.Future[Frame]) -> None:
    """Who gave up waiting does not want to hear of it."""
    if not answer.cancelled():
        answer.exception()
