"""The edge's end of a split model: the first layers here, the others at a worker, and no token lost when it goes.

Every row goes through the boundary log, in the bytes that are sent. The worker is behind or ahead of the log, never
beside it: to bring one up, a new one or one that was away, is to send the rows that it lacks. While none answers, the
tail runs here over the very same rows, so that the tokens are those that the worker would have given (on the same
kernels; docs/split.md). A worker that is back catches up beside it and takes over between two tokens.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from edgewise.engines.base import Row, StageRow
from edgewise.engines.local import LocalModel
from edgewise.engines.slots import CHUNK
from edgewise.errors import EngineClosed, RemoteBroken, RemoteError, RemoteTimeout, TailLost, UsageError
from edgewise.split.boundary import BoundaryLog, Codings
from edgewise.split.channel import CONNECT_S, Channel, Patience, Refused, Way
from edgewise.split.head import Head
from edgewise.types import Best, FloatArray
from edgewise.wire import frame as wire
from edgewise.wire.codec import codec
from edgewise.wire.frame import Frame, Kind

NEAR: Final = 64  # rows that a worker may lack when it takes over: they go with its first question
SETTLE_S: Final = 1.0  # that a worker has for the answers which came too late, before it is connected anew
FIRST_PAUSE_S: Final = 0.05  # between attempts to connect, doubled each time
LONGEST_PAUSE_S: Final = 2.0
TURNS: Final = 4  # of the event loop after a token that was computed here: what mends the connection needs some

Place = Literal["cloud", "edge"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """`cut`: layers that run here. `codec` of the boundary. `head`: where hidden states become tokens; `edge` gives
    nothing but hidden states away and takes nothing else. `tail`: the layers behind the cut may run here while no
    worker answers; without it a request ends with TailLost after `patience_s` without one."""

    cut: int
    codec: str = "int8"
    head: Place = "cloud"
    tail: bool = True
    patience_s: float = 30.0


@dataclass
class Tally:
    """What came of the wanted positions since the model was made."""

    there: int = 0  # computed by a worker
    here: int = 0  # by the tail of this device
    losses: int = 0  # times that a worker went, as sessions felt it
    returns: int = 0  # times that one took over again
    replayed: int = 0  # rows that were sent once more
    bytes_up: int = 0  # payloads of rows
    bytes_down: int = 0  # payloads of answers
    last_loss: str = ""


@dataclass
class _Session:
    name: str
    limit: int
    cut: int
    log: BoundaryLog
    number: int = field(default_factory=lambda: 1 + secrets.randbelow((1 << 64) - 1))
    epoch: int = 0
    sent: int = 0  # rows of the log that the worker has, or will when it reads what is on its way
    ever_sent: int = 0  # the most that `sent` was: what is below it goes once more
    joined: asyncio.Event = field(default_factory=asyncio.Event)  # the worker can be asked
    tail: bool = False  # the tail has it open

    def forget(self, position: int) -> None:
        self.log.cut_off(position)
        self.sent = min(self.sent, position)
        self.ever_sent = min(self.ever_sent, position)


class SplitModel:
    """A TokenModel over `model`, of which it runs the first layers, and workers at `ways`, any of which will do.
    It owns the model. `weights` is that of the bundle. UsageError for a cut that cannot be."""

    def __init__(self, model: LocalModel[Any], weights: str, ways: Sequence[Way], options: SplitOptions) -> None:
        last = model.card.layers
        if not 0 < options.cut < last or not model.cuts_at(options.cut):
            allowed = [n for n in range(1, last) if model.cuts_at(n)]
            raise UsageError(f"{model.name} cannot be cut at {options.cut}", hint=f"allowed are {allowed}")
        self.name, self.vocab, self.context, self.slots = model.name, model.vocab, model.context, model.slots
        self.tally = Tally()
        self._model, self._options = model, options
        self._hello = wire.Hello(model.name, weights, model.numerics)
        self._codings = Codings(model)
        self._wanted = (options.cut, codec(options.codec).name)
        self._front, self._back = model.stage(range(last)), model.stage(range(last))
        self._head = Head(model)
        self._sessions: dict[str, _Session] = {}
        self._ways, self._patience = list(ways), Patience()
        self._channel: Channel | None = None
        self._doubted = False  # it has let somebody wait too long
        self._trouble: RemoteError | None = None  # why there is no channel
        self._tending: asyncio.Task[None] | None = None
        self._called = asyncio.Event()  # somebody needs the worker
        self._tried = asyncio.Event()  # a first connection was made, or could not be
        self._closed = False

    @property
    def connected(self) -> bool:
        return self._channel is not None and not self._channel.ended.is_set()

    def move(self, cut: int, codec_name: str | None = None) -> None:
        """Cut here from now on. Sessions that run follow at their next token: their rows are made anew from their ids
        and sent in a new epoch. UsageError as in the constructor."""
        if not 0 < cut < self._model.card.layers or not self._model.cuts_at(cut):
            raise UsageError(f"{self.name} cannot be cut at {cut}", hint=f"1 to {self._model.card.layers - 1}")
        self._wanted = (cut, self._wanted[1] if codec_name is None else codec(codec_name).name)

    async def open(self, session: str, limit: int) -> None:
        if self._closed:
            raise EngineClosed(f"{self.name} was shut down")
        cut, coding = self._wanted
        await self._front.open(session, limit, range(cut))
        rows = BoundaryLog(self._codings.named(coding, cut), self._front.hidden)
        self._sessions[session] = _Session(session, limit, cut, rows)
        if self._tending is None:
            self._tending = asyncio.create_task(self._tend())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._tried.wait(), CONNECT_S)
        elif self.connected:
            with suppress(RemoteError):  # then it is mended like any other loss
                await self._join(self._sessions[session])
        self._called.set()

    async def forward(self, rows: Sequence[Row]) -> list[FloatArray | Best]:
        for row in rows:
            await self._follow(self._sessions[row.session])
        hidden = await self._front.forward(
            [StageRow(row.session, row.position, self._model.embed(row.ids), len(row.ids)) for row in rows]
        )
        for row, states in zip(rows, hidden, strict=True):
            await self._put(self._sessions[row.session], row, states)
        waiting = [self._finished(self._sessions[row.session], row) for row in rows]
        return [await waiting[0]] if len(waiting) == 1 else list(await asyncio.gather(*waiting))

    async def rewind(self, session: str, position: int) -> None:
        await self._front.rewind(session, position)
        await self._forget(self._sessions[session], position)

    async def close(self, session: str) -> None:
        await self._front.close(session)
        await self._back.close(session)
        known = self._sessions.pop(session, None)
        if known is not None and self._channel is not None:
            await self._channel.tell(Frame(Kind.CLOSE, known.number, known.epoch))

    async def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            for session in [*self._sessions]:
                await self.close(session)
            if self._tending is not None:
                self._tending.cancel()
                await asyncio.wait([self._tending])
            if self._channel is not None:
                await self._channel.close()
            await self._model.shutdown()

    # What is computed here, and what crosses.

    async def _put(self, session: _Session, row: Row, hidden: FloatArray) -> None:
        await self._forget(session, row.position)
        session.log.put(row.position, row.ids, hidden)

    async def _forget(self, session: _Session, position: int) -> None:
        session.forget(position)
        if session.tail and self._back.length(session.name) > position:
            await self._back.rewind(session.name, position)

    async def _follow(self, session: _Session) -> None:
        """To the cut and codec that are wanted now."""
        cut, coding = self._wanted
        if (session.cut, session.log.codec.name) == (cut, coding):
            return
        ids, moved = session.log.ids.copy(), BoundaryLog(self._codings.named(coding, cut), self._front.hidden)
        await self._front.close(session.name)
        await self._front.open(session.name, session.limit, range(cut))
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            (hidden,) = await self._front.forward([StageRow(session.name, start, self._model.embed(part), len(part))])
            moved.put(start, part, hidden)
        await self._back.close(session.name)
        session.tail, session.cut, session.log = False, cut, moved
        session.epoch, session.sent, session.ever_sent = session.epoch + 1, 0, 0
        session.joined.clear()
        if self.connected:
            with suppress(RemoteError):  # then it is mended like any other loss
                await self._join(session)
        self._called.set()

    async def _finished(self, session: _Session, row: Row) -> FloatArray | Best:
        """What the row wanted, from wherever it can be had."""
        while True:
            if session.joined.is_set():  # it may have ended since: then that is noticed here
                try:
                    return await self._there(session, row)
                except RemoteError as e:
                    self._lose(session, e)
            if self._options.tail:
                return await self._here(session, row)
            await self._rejoined(session)

    async def _there(self, session: _Session, row: Row) -> FloatArray | Best:
        channel = self._channel
        assert channel is not None
        channel.check()
        best = row.best if self._options.head == "cloud" else 0
        self._model.expect(soon=False)
        found = []
        for frame in self._frames(session, row.want, best):
            if frame.want:
                answer = await channel.ask(frame)
                self._model.expect(soon=True)  # the next token's row, once it is chosen
                self.tally.bytes_down += len(answer.payload)
                found.append(self._read(answer, frame))
            else:
                await channel.send(frame)
        self.tally.there += row.want
        if best:
            return Best(np.concatenate([b.ids for b in found]), np.concatenate([b.logprobs for b in found]))
        return np.concatenate(found) if found else np.empty((0, self.vocab), np.float32)

    def _frames(self, session: _Session, want: int, best: int) -> list[Frame]:
        """The rows that the worker lacks, and those that are wanted of it, in frames; they count as sent."""
        rows, end = session.log, session.log.length
        most = max(1, min(wire.MOST_ROWS, wire.ROWS_LIMIT // rows.row_bytes))
        back = rows.codec.number if self._options.head == "edge" else 0
        made = []
        first = min(session.sent, end - want)
        for start in range(first, end, most):
            stop = min(start + most, end)
            wanted = max(stop - max(start, end - want), 0)
            payload = rows.payload(start, stop)
            made.append(
                Frame(
                    Kind.ROWS,
                    session.number,
                    session.epoch,
                    start,
                    stop - start,
                    wanted,
                    codec=rows.codec.number,
                    best=best if wanted else 0,
                    back=back,
                    payload=payload,
                )
            )
            self.tally.bytes_up += len(payload)
        self.tally.replayed += max(min(session.ever_sent, end) - first, 0)
        session.sent, session.ever_sent = end, max(end, session.ever_sent)
        return made

    def _read(self, answer: Frame, asked: Frame) -> Any:
        if asked.best and answer.kind == Kind.TOKENS and (answer.want, answer.best) == (asked.want, asked.best):
            return wire.read_best(answer)
        if not asked.best and answer.kind == Kind.HIDDEN and (answer.want, answer.back) == (asked.want, asked.back):
            coding = self._codings.numbered(asked.back, self._model.card.layers)
            rows = wire.rows_of(answer, coding.row_bytes(self._front.hidden))
            return self._head.logits(coding.decode(rows, self._front.hidden)).copy()
        raise RemoteBroken(f"the worker answered rows with {answer.kind.name} of {answer.want}", hint="is it Edgewise?")

    async def _here(self, session: _Session, row: Row) -> FloatArray | Best:
        """The tail, over all rows that it has not seen."""
        if not session.tail:
            await self._back.open(session.name, session.limit, range(session.cut, self._model.card.layers))
            session.tail = True
        start, end = self._back.length(session.name), session.log.length
        states = session.log.decoded(start, end)
        (hidden,) = await self._back.forward([StageRow(session.name, start, states, row.want)])
        self.tally.here += row.want
        for _ in range(TURNS):
            await asyncio.sleep(0)
        if self._options.head == "edge" and row.want:
            coding = self._codings.named(session.log.codec.name, self._model.card.layers)  # as it would have come back
            hidden = coding.decode(coding.encode(hidden), self._front.hidden)
        if row.best and self._options.head == "cloud":
            return self._head.best(hidden, row.best)
        return self._head.logits(hidden).copy()  # of other sessions there may be more before they are read

    # The worker: lost, found, brought up.

    def _lose(self, session: _Session, why: RemoteError) -> None:
        for other in self._sessions.values() if isinstance(why, RemoteTimeout) else (session,):
            other.joined.clear()  # they need not find out for themselves
        self._doubted |= isinstance(why, RemoteTimeout)
        self.tally.losses += 1
        self.tally.last_loss = why.message
        log.warning("%s: the worker is gone at position %d: %s", self.name, session.log.length, why.message)
        self._trouble = why
        self._called.set()

    async def _rejoined(self, session: _Session) -> None:
        """Wait for a worker. TailLost if none is there in time."""
        self._called.set()
        try:
            await asyncio.wait_for(session.joined.wait(), self._options.patience_s)
        except TimeoutError:
            why = "no worker answered" if self._trouble is None else self._trouble.message
            raise TailLost(
                f"layers {session.cut} to {self._model.card.layers} of {self.name} are out of reach after "
                f"{session.log.length} tokens: {why}",
                hint="give this device the memory for the tail, or another worker",
            ) from self._trouble

    async def _tend(self) -> None:
        """Connect, join the sessions, wait until somebody needs more."""
        pause_s = FIRST_PAUSE_S
        while True:
            self._called.clear()
            try:
                await self._connect()
                joined = await self._join_all()
                self._tried.set()
                if joined:
                    pause_s = FIRST_PAUSE_S
                    await self._called.wait()
                else:
                    await asyncio.sleep(LONGEST_PAUSE_S)
            except RemoteError as e:
                self._trouble = e
                self._tried.set()
                await self._drop()
                await asyncio.sleep(FIRST_PAUSE_S)
                with suppress(TimeoutError):  # sooner, if somebody waits
                    await asyncio.wait_for(self._called.wait(), pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _connect(self) -> None:
        """A channel that works: the one there is, in doubt once it has answered all that it was asked, or another. The
        ways are tried in turn."""
        channel = self._channel
        if channel and not channel.ended.is_set() and (not self._doubted or await channel.settled(SETTLE_S)):
            self._doubted = False
            return
        await self._drop()
        way = self._ways[0]
        self._ways = [*self._ways[1:], way]
        channel = await Channel.open(way, self._hello, self._patience)
        if channel.welcome.numerics != self._hello.numerics:
            log.warning(
                "the worker computes with %s, this device with %s: after a fault the tokens may differ",
                channel.welcome.numerics,
                self._hello.numerics,
            )
        self._ways = [way, *self._ways[:-1]]  # it goes first next time
        self._channel, self._doubted = channel, False

    async def _drop(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            for session in self._sessions.values():
                session.joined.clear()
            await channel.close()

    async def _join_all(self) -> bool:
        """Whether the worker took all sessions; one that it refuses does not keep others from it."""
        refused = False
        for session in [s for s in self._sessions.values() if not s.joined.is_set()]:
            try:
                await self._join(session)
            except Refused as e:
                self._trouble, refused = e, True
                log.warning("%s: %s", self.name, e)
        return not refused

    async def _join(self, session: _Session) -> None:
        """Open it at the worker, and send what it lacks until it is near."""
        assert self._channel is not None
        channel, epoch = self._channel, session.epoch
        body = wire.write_body(wire.Open(session.limit, session.cut))
        opened = await channel.ask(Frame(Kind.OPEN, session.number, epoch, payload=body))
        session.sent = min(session.sent, opened.position)
        while session.epoch == epoch and session.log.length - session.sent > NEAR:
            for frame in self._frames(session, 0, 0):
                await channel.ask(frame)
        if session.epoch == epoch and channel is self._channel:
            if session.tail:
                self.tally.returns += 1
            session.joined.set()


async def greeted(way: Way, model: LocalModel[Any], weights: str) -> wire.Welcome:
    """What a worker says of itself. RemoteRefused, with the reason, if it will not have us; Unreachable or
    RemoteTimeout if there is none."""
    channel = await Channel.open(way, wire.Hello(model.name, weights, model.numerics), Patience())
    await channel.close()
    return channel.welcome
