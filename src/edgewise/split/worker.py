"""The side that holds the last layers: sessions of many edges, frames in and frames out, without sockets.

What waits when a step begins is computed together, a frame of each session. Each connection may have WAITING frames
on their way; then nothing more is read from it, so that an edge that sends faster than we compute, or that does not
read, is slowed down by its own connection and costs no memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from edgewise.engines.base import StageRow
from edgewise.engines.local import LocalModel
from edgewise.errors import BadFrame, EdgewiseError, Overloaded, UsageError
from edgewise.split.boundary import Codings
from edgewise.split.head import Head
from edgewise.types import FloatArray
from edgewise.wire import frame as wire
from edgewise.wire.frame import Frame, Kind

WAITING: Final = 8  # frames of a connection whose answers have not been sent
KEEP_S: Final = 120.0
MOST_MICROS: Final = (1 << 32) - 1

Receive = Callable[[], Awaitable[bytes | None]]  # None: the connection has ended
Send = Callable[[bytes], Awaitable[None]]
Result = TypeVar("Result")

log = logging.getLogger(__name__)


@dataclass
class _Held:
    """A session and whom it belongs to: the connection that opened it last."""

    epoch: int
    cut: int
    limit: int
    owner: _Connection | None
    used: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Connection:
    """One edge. `answers` holds what is to be sent, in the order in which it came to be; who sends goes on until none
    is left, so that nothing overtakes."""

    send: Send
    known: bool = False  # its HELLO was accepted
    ended: bool = False
    sending: bool = False
    gone: bool = False  # it could not be sent an answer
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(WAITING))
    answers: deque[Frame] = field(default_factory=deque)
    called: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, answer: Frame) -> None:
        self.answers.append(answer)
        self.called.set()

    def end(self) -> None:
        """Nothing is read any more; `write` sends what is left and ends."""
        self.ended = True
        self.called.set()

    async def write(self) -> None:
        """Send what comes, until the end."""
        while True:
            await self.called.wait()
            self.called.clear()
            await self.flush()
            if self.ended or self.gone:
                return

    async def flush(self) -> None:
        """Send what is there, if nobody does: to wake `write` takes a turn of the loop, which a token feels."""
        if self.sending:
            return
        self.sending = True
        try:
            while self.answers and not self.gone:
                await self._send(self.answers.popleft())
        finally:
            self.sending = False

    async def _send(self, answer: Frame) -> None:
        try:
            await self.send(wire.pack(answer))
        except Exception as why:  # whatever a server says when nobody is at the other end
            log.info("an edge went before its answers came: %s", type(why).__name__)
            self.gone = True
        finally:
            self.room.release()  # who waits to read on learns that it goes on, or that nobody is there


@dataclass(frozen=True, slots=True)
class _Job:
    connection: _Connection
    frame: Frame


class Worker:
    """Layers `layers` of `model` (None: all) and its head, for as many sessions as it has slots. `weights` is that of
    the bundle. All calls come from one event loop. With `inline`, steps are computed in that loop, which then does
    nothing else meanwhile: for a process that has nothing else to do. Whoever made it shuts the model down."""

    def __init__(
        self,
        model: LocalModel[Any],
        weights: str,
        *,
        layers: range | None = None,
        inline: bool = False,
        keep_s: float = KEEP_S,
    ) -> None:
        layers = range(model.card.layers) if layers is None else layers
        if layers.stop != model.card.layers:
            raise UsageError(
                f"layers {layers.start} to {layers.stop} of {model.name} were asked for",
                hint=f"a worker holds the last ones: START:{model.card.layers}",
            )
        self.model, self.weights, self.layers = model, weights, layers
        self._stage, self._head, self._codings = model.stage(layers), Head(model), Codings(model)
        self._inline, self._keep_s = inline, keep_s
        self._sessions: dict[int, _Held] = {}
        self._waiting: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._steps: asyncio.Task[None] | None = None
        self._step_now: asyncio.Task[list[Frame]] | None = None  # in a thread
        self.answered = 0  # frames

    @property
    def sessions(self) -> int:
        """How many are held, those whose edge is gone for the moment included."""
        return len(self._sessions)

    async def converse(self, receive: Receive, send: Send) -> None:
        """One connection, from its first frame to its end. It ends by itself where an edge breaks the rules; the reason
        is the last that it is sent."""
        if self._steps is None and not self._inline:
            self._steps = asyncio.create_task(self._work())
        connection = _Connection(send)
        writer = asyncio.create_task(connection.write())
        try:
            await self._read(connection, receive)
        finally:
            connection.end()
            for held in self._sessions.values():
                if held.owner is connection:
                    held.owner, held.used = None, time.monotonic()
            await asyncio.wait([writer])

    async def close(self) -> None:
        """End the steps; the one that is being computed ends first. Idempotent."""
        if self._steps is not None:
            self._steps.cancel()
            await asyncio.wait([self._steps])
            self._steps = None
        if self._step_now is not None:
            await asyncio.wait([self._step_now])

    async def _read(self, connection: _Connection, receive: Receive) -> None:
        while not connection.gone:
            await connection.room.acquire()
            message = await receive()
            if message is None:
                return
            self.model.expect(soon=True)
            try:
                frame = wire.unpack(message)
                answer = await self._answer(connection, frame)
            except BadFrame as e:
                connection.put(_error(Frame(Kind.ERROR), e.code, str(e)))
                return
            if answer is not None:
                connection.put(answer)
                if answer.kind == Kind.ERROR and not answer.session:
                    return
            await connection.flush()

    async def _answer(self, connection: _Connection, frame: Frame) -> Frame | None:
        """What can be said at once; None for what waits for its turn."""
        if frame.kind == Kind.HELLO:
            return self._greet(connection, frame)
        if not connection.known:
            raise BadFrame(f"a {frame.kind.name} before a HELLO was accepted")
        if frame.kind not in (Kind.OPEN, Kind.ROWS, Kind.CLOSE):
            raise BadFrame(f"a {frame.kind.name}, which edges do not send")
        if not frame.session:
            raise BadFrame(f"a {frame.kind.name} of session 0, which is the connection")
        self._waiting.append(_Job(connection, frame))
        if not self._inline:
            self._wake.set()
            return None
        if len(self._sessions) > 1:
            await asyncio.sleep(0)  # what came meanwhile joins the step
        while self._waiting:
            await self._turn(self._next_jobs())
        self.model.expect(soon=False)
        return None

    def _greet(self, connection: _Connection, frame: Frame) -> Frame:
        hello = wire.read_body(frame, wire.Hello)
        if hello.weights != self.weights:
            told = f"this worker holds {self.model.name} ({self.weights[:12]}…), not {hello.model[:100]} "
            return _error(Frame(Kind.ERROR), "weights", f"{told}({hello.weights[:12]}…)")
        connection.known = True
        here = wire.Welcome(
            (self.layers.start, self.layers.stop), self.model.numerics, self.model.context, self._stage.slots
        )
        return Frame(Kind.WELCOME, payload=wire.write_body(here))

    async def _open(self, connection: _Connection, frame: Frame) -> Frame:
        try:
            wanted = wire.read_body(frame, wire.Open)
        except BadFrame as e:
            return _error(frame, e.code, str(e))
        held = self._sessions.get(frame.session)
        if held is not None and frame.epoch < held.epoch:
            return _error(frame, "stale", f"the session is in epoch {held.epoch}, the frame in {frame.epoch}")
        if held is not None and (held.epoch, held.cut) == (frame.epoch, wanted.cut):
            held.owner = None if connection.ended else connection
            return Frame(Kind.OPENED, frame.session, frame.epoch, self._stage.length(_name(frame.session)))
        if wanted.limit > self.model.context:
            return _error(frame, "limit", f"{wanted.limit} positions; this worker's model has {self.model.context}")
        await self._forget(frame.session)
        await self._make_room()
        try:
            await self._stage.open(_name(frame.session), wanted.limit, range(wanted.cut, self.layers.stop))
        except UsageError as e:
            return _error(frame, "layers", str(e))
        except Overloaded as e:
            return _error(frame, "full", str(e))
        owner = None if connection.ended else connection  # it may have gone while this waited for its turn
        self._sessions[frame.session] = _Held(frame.epoch, wanted.cut, wanted.limit, owner)
        return Frame(Kind.OPENED, frame.session, frame.epoch)

    async def _close(self, connection: _Connection, frame: Frame) -> None:
        held = self._sessions.get(frame.session)
        if held is not None and held.owner in (connection, None) and held.epoch == frame.epoch:
            await self._forget(frame.session)
        connection.room.release()  # nothing is answered

    async def _forget(self, session: int) -> None:
        if self._sessions.pop(session, None) is not None:
            await self._stage.close(_name(session))

    async def _make_room(self) -> None:
        """Sessions that nobody came back to go when their time is over, the oldest also when a slot is needed."""
        left = sorted((held.used, number) for number, held in self._sessions.items() if held.owner is None)
        over = time.monotonic() - self._keep_s
        for used, number in left:
            if used < over or len(self._sessions) >= self._stage.slots:
                await self._forget(number)

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await self._turn(self._next_jobs())
                await asyncio.sleep(0)  # answers leave, and what came meanwhile joins the next step

    async def _turn(self, jobs: list[_Job]) -> None:
        """Sessions come and go between steps, never during one."""
        rows = []
        for job in jobs:
            if job.frame.kind == Kind.OPEN:
                self._reply(job, await self._open(job.connection, job.frame))
            elif job.frame.kind == Kind.CLOSE:
                await self._close(job.connection, job.frame)
            else:
                rows.append(job)
        if rows:
            for job, answer in zip(rows, await self._computed(rows), strict=True):
                self._reply(job, answer)

    async def _computed(self, rows: list[_Job]) -> list[Frame]:
        if self._inline:
            return await self._step(rows)
        self._step_now = asyncio.create_task(asyncio.to_thread(_run, self._step(rows)))
        return await asyncio.shield(self._step_now)  # a thread cannot be stopped

    def _reply(self, job: _Job, answer: Frame) -> None:
        job.connection.put(answer)
        self.answered += 1

    def _next_jobs(self) -> list[_Job]:
        """The first that waits of each session: those that free a slot before those that want one, those of one cut
        side by side, as they are computed together."""
        found: dict[int, _Job] = {}
        later: deque[_Job] = deque()
        for job in self._waiting:
            if job.frame.session in found:
                later.append(job)
            else:
                found[job.frame.session] = job
        self._waiting = later
        return sorted(
            found.values(),
            key=lambda job: (job.frame.kind != Kind.CLOSE, held.cut if (held := self._held(job)) else -1),
        )

    def _held(self, job: _Job) -> _Held | None:
        return self._sessions.get(job.frame.session)

    async def _step(self, jobs: list[_Job]) -> list[Frame]:
        """An answer to each."""
        started = time.perf_counter()
        try:
            checked = [self._checked(job) for job in jobs]
            rows = [row for row in checked if isinstance(row, StageRow)]
            hidden = iter(await self._stage.forward(rows) if rows else ())
            answers = [
                self._result(job.frame, next(hidden)) if isinstance(row, StageRow) else row
                for job, row in zip(jobs, checked, strict=True)
            ]
        except Exception as e:  # whatever it is, the edges go on alone and the next step is another
            log.exception("a step of %d sessions failed", len(jobs))
            return [_error(job.frame, "failed", str(e)) for job in jobs]
        micros = min(round((time.perf_counter() - started) * 1e6), MOST_MICROS)
        return [replace(answer, micros=micros) for answer in answers]

    def _checked(self, job: _Job) -> StageRow | Frame:
        """The row to compute, or why not."""
        frame, held = job.frame, self._held(job)
        if held is None:
            return _error(frame, "unknown", "this session is not open here")
        if held.owner is not job.connection or frame.epoch != held.epoch:
            return _error(frame, "stale", f"the session is in epoch {held.epoch}, of this or another connection")
        length = self._stage.length(_name(frame.session))
        if frame.position > length:
            return _error(frame, "gap", f"rows from {frame.position} on; {length} are held", position=length)
        if frame.position + frame.rows > held.limit:
            return _error(frame, "limit", f"{frame.position + frame.rows} positions; the session has {held.limit}")
        held.used = time.monotonic()
        try:
            coding = self._codings.numbered(frame.codec, held.cut)
            self._codings.numbered(frame.back, self.layers.stop)
            hidden = coding.decode(wire.rows_of(frame, coding.row_bytes(self._stage.hidden)), self._stage.hidden)
        except EdgewiseError as e:
            return _error(frame, "frame", str(e))
        return StageRow(_name(frame.session), frame.position, hidden, frame.want)

    def _result(self, frame: Frame, hidden: FloatArray) -> Frame:
        if not frame.want:
            held = frame.position + frame.rows
            return Frame(Kind.HELD, frame.session, frame.epoch, held)
        common = (frame.session, frame.epoch, frame.position, frame.rows, frame.want)
        try:
            if not frame.best:
                payload = self._codings.numbered(frame.back, self.layers.stop).encode(hidden).tobytes()
                return Frame(Kind.HIDDEN, *common, back=frame.back, payload=payload)
            best = self._head.best(hidden, frame.best)
        except EdgewiseError as e:  # numbers that no codec holds or no token follows from: the others' are their own
            return _error(frame, "failed", str(e))
        return Frame(Kind.TOKENS, *common, best=frame.best, payload=wire.write_best(best))


def _error(frame: Frame, code: str, message: str, position: int = 0) -> Frame:
    body = wire.write_body(wire.Refusal(code, message[:1000]))
    return Frame(Kind.ERROR, frame.session, frame.epoch, position, payload=body)


def _name(session: int) -> str:
    return f"{session:x}"


def _run(step: Coroutine[Any, Any, Result]) -> Result:
    """A coroutine of a local model never waits: it runs to its end in the thread that it is in."""
    try:
        step.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # that is what a coroutine's end holds
    raise AssertionError("a local stage waited")
