"""Frames in, frames out: what a worker says to edges that keep the rules, that break them, and that go away."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgewise.engines.base import Row, StageRow
from edgewise.engines.load import local_model
from edgewise.engines.local import LocalModel
from edgewise.errors import UsageError
from edgewise.models.bundle import Bundle
from edgewise.split.worker import WAITING, Worker
from edgewise.types import FloatArray, IdArray
from edgewise.wire import frame as wire
from edgewise.wire.codec import Codec, codec
from edgewise.wire.frame import Frame, Kind, Open, Refusal, Welcome

CONTEXT, SLOTS, LAYERS = 64, 3, 6
IDS = np.random.default_rng(5).integers(0, 250, 40)
Model = LocalModel[Any]


@pytest.fixture(scope="module")
def model(small: Bundle) -> Model:
    """What workers compute with."""
    return local_model(small, slots=SLOTS, context=CONTEXT)


@pytest.fixture(scope="module")
def reference(small: Bundle) -> Model:
    return local_model(small, slots=SLOTS, context=CONTEXT)


@pytest.fixture(params=["inline", "threaded"])
async def worker(request: pytest.FixtureRequest, small: Bundle, model: Model) -> AsyncIterator[Worker]:
    made = Worker(model, small.weights, inline=request.param == "inline")
    yield made
    await made.close()


class Edge:
    """One connection. `reads` is cleared while it takes no answer; `broken` says that it can take none any more."""

    def __init__(self, worker: Worker) -> None:
        self.messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.answers: asyncio.Queue[Frame] = asyncio.Queue()
        self.reads, self.broken = asyncio.Event(), False
        self.reads.set()
        self.talk = asyncio.create_task(worker.converse(self.messages.get, self._take))

    async def _take(self, message: bytes) -> None:
        await self.reads.wait()
        if self.broken:
            raise ConnectionResetError
        self.answers.put_nowait(wire.unpack(message))

    def put(self, *frames: Frame | bytes | None) -> None:
        for frame in frames:
            self.messages.put_nowait(wire.pack(frame) if isinstance(frame, Frame) else frame)

    async def next(self) -> Frame:
        return await asyncio.wait_for(self.answers.get(), 20)

    async def ask(self, frame: Frame | bytes) -> Frame:
        self.put(frame)
        return await self.next()

    async def rest(self, last: Frame) -> set[Kind | str]:
        """The kinds of all answers, errors by their codes, to the end: or until `last`, which is always refused, has
        been asked often enough for all before it to have had their turns."""
        found: set[Kind | str] = set()
        for _ in range(20):
            self.put(last)
            while not (self.talk.done() and self.answers.empty()):
                answer = await self.next()
                found.add(refusal(answer)[0] if answer.kind == Kind.ERROR else answer.kind)
                if answer.kind == Kind.ERROR and answer.session in (0, last.session):
                    break
        await self.end()
        return found

    async def end(self) -> None:
        self.put(None)
        await self.over()

    async def over(self) -> None:
        await asyncio.wait_for(self.talk, 20)


@asynccontextmanager
async def edge(worker: Worker, *opened: Frame) -> AsyncIterator[Edge]:
    """One that is known, with those sessions."""
    made = Edge(worker)
    assert (await made.ask(hello(worker))).kind == Kind.WELCOME
    for frame in opened:
        assert (await made.ask(frame)).kind == Kind.OPENED
    yield made
    if not made.talk.done():
        await made.end()


def hello(worker: Worker, weights: str | None = None) -> Frame:
    body = wire.Hello("small", worker.weights if weights is None else weights, worker.model.numerics)
    return Frame(Kind.HELLO, payload=wire.write_body(body))


def opening(session: int = 1, epoch: int = 0, cut: int = 2, limit: int = CONTEXT) -> Frame:
    return Frame(Kind.OPEN, session, epoch, payload=wire.write_body(Open(limit, cut)))


def rows(
    hidden: FloatArray,
    position: int = 0,
    want: int = 0,
    session: int = 1,
    *,
    best: int = 1,
    coded: Codec = codec("exact"),  # noqa: B008 - a frozen value
) -> Frame:
    """Of boundary rows [n, hidden] as a whole, those from `position` on."""
    sent, chosen = hidden[position:], coded
    return Frame(
        Kind.ROWS,
        session,
        0,
        position,
        len(sent),
        want,
        codec=chosen.number,
        best=best if want else 0,
        payload=chosen.encode(sent).tobytes(),
    )


async def boundary(model: Model, ids: IdArray = IDS, cut: int = 2) -> FloatArray:
    stage = model.stage(range(cut))
    await stage.open("s", CONTEXT, stage.layers)
    (hidden,) = await stage.forward([StageRow("s", 0, model.embed(ids), len(ids))])
    return hidden.copy()


async def logits(model: Model, ids: IdArray = IDS) -> FloatArray:
    await model.open("whole", CONTEXT)
    (found,) = await model.forward([Row("whole", 0, ids, len(ids))])
    await model.close("whole")
    return found.copy()


def refusal(frame: Frame) -> tuple[str, str]:
    assert frame.kind == Kind.ERROR
    body = wire.read_body(frame, Refusal)
    return body.code, body.message


def top(found: FloatArray, count: int = 1) -> list[list[int]]:
    return [[int(i) for i in np.argsort(-row, kind="stable")[:count]] for row in found]


def tokens(frame: Frame) -> list[list[int]]:
    assert frame.kind == Kind.TOKENS, refusal(frame)
    return [[int(i) for i in row] for row in wire.read_best(frame).ids]


async def alike(worker: Worker, reference: Model) -> None:
    """A new edge gets the right tokens, and leaves nothing behind."""
    hidden, expected = await boundary(reference, IDS[:8]), top(await logits(reference, IDS[:8]))
    async with edge(worker, opening(99)) as one:
        assert tokens(await one.ask(rows(hidden, 0, 8, 99))) == expected
        one.put(Frame(Kind.CLOSE, 99))


# Who is let in


async def test_a_greeting_says_what_is_here(worker: Worker) -> None:
    one = Edge(worker)
    answer = await one.ask(hello(worker))
    told = wire.read_body(answer, Welcome)
    assert told == Welcome((0, LAYERS), worker.model.numerics, CONTEXT, SLOTS)
    assert (answer.kind, answer.session) == (Kind.WELCOME, 0)
    await one.end()


async def test_another_models_weights_are_refused_with_both_names_and_the_connection_ends(worker: Worker) -> None:
    one = Edge(worker)
    code, message = refusal(await one.ask(hello(worker, "f" * 64)))
    assert code == "weights"
    assert "ffffffffffff" in message
    assert worker.weights[:12] in message
    await one.over()


@pytest.mark.parametrize("first", [opening(), Frame(Kind.ROWS, 1, rows=1), Frame(Kind.CLOSE, 1)], ids=lambda f: f.kind)
async def test_nothing_is_done_before_a_greeting(worker: Worker, first: Frame) -> None:
    """However much of it comes: the first is the last that is read."""
    one = Edge(worker)
    one.put(*[first] * 100)
    code, message = refusal(await one.next())
    await one.over()
    assert (code, "before a HELLO" in message) == ("frame", True)
    assert (one.messages.qsize(), one.answers.empty(), worker.sessions) == (99, True, 0)


async def test_a_frame_of_another_version_is_refused_with_both_numbers(worker: Worker) -> None:
    message = bytearray(wire.pack(hello(worker)))
    message[2] = 2
    one = Edge(worker)
    code, told = refusal(await one.ask(resealed(message)))
    assert (code, "version 2" in told, "version 1" in told) == ("version", True, True)
    await one.over()


@pytest.mark.parametrize(
    "bad",
    [
        b"",  # what a text message holds
        b"EW",
        wire.pack(opening())[:-1],
        wire.pack(opening())[:-1] + b"x",
        Frame(Kind.WELCOME),
        Frame(Kind.TOKENS, 1),
        Frame(Kind.ERROR, 1, payload=wire.write_body(Refusal("gap", ""))),
        opening(0),
        Frame(Kind.HELLO, payload=b"[]"),
    ],
    ids=str,
)
async def test_who_breaks_a_rule_is_told_and_the_connection_ends(
    worker: Worker, reference: Model, bad: Frame | bytes
) -> None:
    async with edge(worker) as one:
        answer = await one.ask(bad)
        assert (refusal(answer)[0], answer.session) == ("frame", 0)
        await one.over()
    await alike(worker, reference)


def test_a_worker_holds_the_last_layers(model: Model, small: Bundle) -> None:
    with pytest.raises(UsageError, match=r"layers 0 to 3 of small were asked for \(a worker holds the last ones"):
        Worker(model, small.weights, layers=range(3))
    assert Worker(model, small.weights, layers=range(4, LAYERS)).layers == range(4, LAYERS)


# Sessions


async def test_a_session_is_kept_in_its_epoch_and_starts_empty_in_a_newer_one(worker: Worker, reference: Model) -> None:
    hidden = await boundary(reference)
    async with edge(worker, opening(epoch=3)) as one:
        await one.ask(replace(rows(hidden[:9]), epoch=3))
        assert (await one.ask(opening(epoch=3))).position == 9
        assert (await one.ask(opening(epoch=4))).position == 0
        assert refusal(await one.ask(opening(epoch=3)))[0] == "stale"
        assert refusal(await one.ask(replace(rows(hidden[:9]), epoch=3)))[0] == "stale"
        assert (await one.ask(opening(epoch=4))).position == 0
        assert (await one.ask(opening(epoch=4, cut=3))).position == 0
        assert worker.sessions == 1


async def test_another_cut_in_the_same_epoch_starts_empty(worker: Worker, reference: Model) -> None:
    async with edge(worker, opening()) as one:
        await one.ask(rows((await boundary(reference))[:5]))
        assert (await one.ask(opening(cut=4))).position == 0


async def test_a_session_follows_its_edge_to_another_connection(worker: Worker, reference: Model) -> None:
    """The old one is not over yet, as far as the worker knows: what still comes from it changes nothing."""
    hidden, expected = await boundary(reference), top(await logits(reference))
    async with edge(worker, opening()) as old, edge(worker) as new:
        await old.ask(rows(hidden[:10]))
        assert (await new.ask(opening())).position == 10
        assert refusal(await old.ask(rows(hidden[::-1][:10])))[0] == "stale"
        old.put(Frame(Kind.CLOSE, 1))
        assert refusal(await old.ask(rows(hidden[:11], 10, 1)))[0] == "stale"
        assert tokens(await new.ask(rows(hidden[:12], 10, 2))) == expected[10:12]
        await old.end()
        assert tokens(await new.ask(rows(hidden[:13], 12, 1))) == expected[12:13]


async def test_a_closed_session_frees_its_slot(worker: Worker, reference: Model) -> None:
    async with edge(worker, *(opening(n) for n in range(1, SLOTS + 1))) as one:
        assert refusal(await one.ask(opening(9)))[0] == "full"
        one.put(Frame(Kind.CLOSE, 2), Frame(Kind.CLOSE, 77))
        assert (await one.ask(opening(9))).kind == Kind.OPENED
        hidden = await boundary(reference)
        assert refusal(await one.ask(rows(hidden[:4], 0, 1, 2)))[0] == "unknown"
        assert worker.sessions == SLOTS


async def test_who_stays_keeps_the_slot_and_who_left_longest_ago_loses_it(worker: Worker, reference: Model) -> None:
    hidden = await boundary(reference)
    async with edge(worker, opening(1)) as stays:
        for session in (2, 3):
            async with edge(worker, opening(session)) as leaves:
                await leaves.ask(rows(hidden[:7], session=session))
        assert worker.sessions == 3
        async with edge(worker, opening(4)) as new:
            assert (await new.ask(opening(3))).position == 7
            assert refusal(await new.ask(opening(2)))[0] == "full"
        assert (await stays.ask(rows(hidden[:3]))).kind == Kind.HELD


async def test_who_does_not_come_back_in_time_is_forgotten(small: Bundle, model: Model, reference: Model) -> None:
    worker = Worker(model, small.weights, inline=True, keep_s=0)
    async with edge(worker, opening(1), opening(2)):
        pass
    assert worker.sessions == 2
    async with edge(worker, opening(3)) as one:
        assert worker.sessions == 1
        assert refusal(await one.ask(rows(await boundary(reference))))[0] == "unknown"


@pytest.mark.parametrize("more", [(), (rows(np.zeros((3, 64), np.float32)),), (Frame(Kind.CLOSE, 1),)], ids=len)
async def test_who_opens_a_session_and_goes_at_once_takes_no_slot_with_it(
    worker: Worker, more: Sequence[Frame]
) -> None:
    for session in range(1, 3 * SLOTS):
        one = Edge(worker)
        one.put(hello(worker), opening(session), *(replace(frame, session=session) for frame in more), None)
        await one.over()
    async with edge(worker, *(opening(100 + n) for n in range(SLOTS))):
        assert worker.sessions == SLOTS


async def test_a_session_that_is_closed_by_the_last_frame_is_gone(worker: Worker) -> None:
    one = Edge(worker)
    one.put(hello(worker), opening(), Frame(Kind.CLOSE, 1), None)
    await one.over()
    await asyncio.sleep(0.01)
    async with edge(worker):
        assert worker.sessions == 0


@pytest.mark.parametrize("cut", [-1, 1, LAYERS, LAYERS + 1, 1 << 80])
async def test_a_cut_that_is_not_here_is_refused(small: Bundle, model: Model, cut: int) -> None:
    worker = Worker(model, small.weights, layers=range(2, LAYERS), inline=True)
    async with edge(worker) as one:
        answer = await one.ask(opening(cut=cut))
        code, message = refusal(answer)
        assert (code, answer.session, worker.sessions) == ("layers", 1, 0)
        assert f"layers {cut} to 6 are wanted" in message
        assert "2 to 6" in message
        assert (await one.ask(opening(cut=2))).kind == Kind.OPENED


async def test_more_positions_than_there_are_cost_nobody_else_an_answer(
    worker: Worker, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, expected = await boundary(reference), top(await logits(reference))
    async with edge(worker, opening(1, limit=10)) as greedy, edge(worker, opening(2)) as other:
        assert refusal(await greedy.ask(opening(3, limit=CONTEXT + 1)))[0] == "limit"
        greedy.put(rows(hidden[:11], 0, 1))
        other.put(rows(hidden[:11], 0, 1, 2))
        code, message = refusal(await greedy.next())
        assert (code, message) == ("limit", "11 positions; the session has 10")
        assert tokens(await other.next()) == expected[10:11]
        assert tokens(await greedy.ask(rows(hidden[:10], 0, 1))) == expected[9:10]


# Rows


async def test_rows_below_the_length_take_its_place_and_above_it_are_a_gap(worker: Worker, reference: Model) -> None:
    hidden, expected = await boundary(reference), top(await logits(reference))
    async with edge(worker, opening()) as one:
        assert refusal(await one.ask(rows(hidden[:2], 1, 1)))[0] == "gap"
        held = await one.ask(rows(hidden[:20]))
        assert (held.kind, held.position, len(held.payload)) == (Kind.HELD, 20, 0)
        first = await one.ask(rows(hidden[:20], 17, 3))
        again = await one.ask(rows(hidden[:20], 17, 3))
        assert bytes(again.payload) == bytes(first.payload)
        assert (first.position, first.rows, first.want, first.best) == (17, 3, 3, 1)
        await one.ask(rows(hidden[::-1][:15], 5))  # what is wrong behind 5 is made good again
        gap = await one.ask(rows(hidden, 30, 1))
        assert (refusal(gap)[0], gap.position) == ("gap", 15)
        assert tokens(await one.ask(rows(hidden, 5, 30))) == expected[10:]


async def test_as_many_tokens_as_were_asked_for_or_the_hidden_state(worker: Worker, reference: Model) -> None:
    hidden, full = await boundary(reference), await logits(reference)
    behind = await boundary(reference, cut=LAYERS)
    async with edge(worker, opening()) as one:
        found = await one.ask(rows(hidden, 0, 4, best=5))
        assert tokens(found) == top(full[-4:], 5)
        probabilities = full[-4:] - np.logaddexp.reduce(full[-4:].astype(np.float64), axis=1, keepdims=True)
        assert np.allclose(wire.read_best(found).logprobs, -np.sort(-probabilities, axis=1)[:, :5], atol=1e-5)
        for name in ("exact", "fp16", "int8", "int4"):
            back = codec(name, reference.gains(LAYERS))
            answer = await one.ask(replace(rows(hidden, 0, 4, best=0), back=back.number))
            assert (answer.kind, answer.want, answer.back) == (Kind.HIDDEN, 4, back.number)
            assert bytes(answer.payload) == back.encode(behind[-4:]).tobytes()


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
async def test_rows_of_any_codec_are_read(worker: Worker, reference: Model, name: str) -> None:
    hidden = await boundary(reference)
    coding = codec(name, reference.gains(2))
    seen = coding.decode(coding.encode(hidden), hidden.shape[1])
    async with edge(worker, opening(1), opening(2)) as one:
        coded = await one.ask(rows(hidden, 0, 40, 1, coded=coding))
        exact = await one.ask(rows(seen, 0, 40, 2))
        assert bytes(coded.payload) == bytes(exact.payload)


@pytest.mark.parametrize(
    "change",
    [
        {"codec": 4},
        {"codec": 255},
        {"back": 4},
        {"codec": 1},
        {"rows": 39},
        {"rows": 0, "want": 0},
        {"payload": b""},
        {"payload": b"\xff" * 40 * 256},
    ],
    ids=str,
)
async def test_rows_that_cannot_be_are_refused_and_the_connection_goes_on(
    worker: Worker, reference: Model, change: dict[str, Any]
) -> None:
    hidden, expected = await boundary(reference), top(await logits(reference))
    async with edge(worker, opening()) as one:
        answer = await one.ask(replace(rows(hidden, 0, 1), **change))
        assert (refusal(answer)[0], answer.session) == ("frame", 1)
        assert tokens(await one.ask(rows(hidden, 0, 1))) == expected[-1:]


async def test_numbers_that_no_token_follows_from_fail_their_own_session_alone(
    worker: Worker, reference: Model
) -> None:
    hidden, expected = await boundary(reference), top(await logits(reference))
    huge = np.where(np.arange(64) % 2, np.float32(3e38), np.float32(-3e38))[None].repeat(4, axis=0)
    async with edge(worker, opening(1)) as bad, edge(worker, opening(2)) as good:
        for best, back in ((1, 0), (0, 0), (0, 1), (0, 3)):
            bad.put(replace(rows(huge, 0, 4, 1, best=best), back=back))
            good.put(rows(hidden, 0, 2, 2))
            assert tokens(await good.next()) == expected[-2:]
            answer = await bad.next()
            assert answer.kind in (Kind.TOKENS, Kind.HIDDEN) or refusal(answer)[0] == "failed"
        assert tokens(await bad.ask(rows(hidden, 0, 1))) == expected[-1:]


# Several at once


async def test_sessions_of_any_cut_in_one_step_get_what_each_gets_alone(
    worker: Worker, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = {1: 1, 2: 4, 3: 4}
    sent = {session: await boundary(reference, IDS[session : session + 20], cut) for session, cut in cuts.items()}
    full = {session: top(await logits(reference, IDS[session : session + 20]), 3) for session in cuts}
    steps: list[int] = []
    forward = worker._stage.forward

    async def counted(together: Sequence[StageRow]) -> list[FloatArray]:
        steps.append(len(together))
        return await forward(together)

    monkeypatch.setattr(worker._stage, "forward", counted)
    edges = [Edge(worker) for _ in cuts]
    for (session, cut), one in zip(cuts.items(), edges, strict=True):
        await one.ask(hello(worker))
        await one.ask(opening(session, cut=cut))
    for start in (0, 12, 13):
        for session, one in zip(cuts, edges, strict=True):
            end = start + (12 if start == 0 else 1)
            one.put(rows(sent[session][:end], start, 1, session, best=3))
        for session, one in zip(cuts, edges, strict=True):
            assert tokens(await one.next()) == full[session][end - 1 : end]
    assert steps == [3, 3, 3]
    for one in edges:
        await one.end()


async def test_frames_of_one_session_are_answered_in_their_order(worker: Worker, reference: Model) -> None:
    hidden, expected = await boundary(reference), top(await logits(reference))
    async with edge(worker, opening()) as one:
        one.put(rows(hidden[:30]), *(rows(hidden[: n + 1], n, 1) for n in range(30, 36)), Frame(Kind.CLOSE, 1))
        assert (await one.next()).kind == Kind.HELD
        for n in range(30, 36):
            answer = await one.next()
            assert (answer.position, tokens(answer)) == (n, expected[n : n + 1])


async def test_a_step_that_fails_is_told_and_the_next_one_works(
    worker: Worker, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, expected = await boundary(reference), top(await logits(reference))

    def broken(*arguments: object) -> FloatArray:
        raise MemoryError("no pages")

    async with edge(worker, opening()) as one:
        await one.ask(rows(hidden[:30]))
        with monkeypatch.context() as patch:
            patch.setattr(worker.model, "run", broken)
            assert refusal(await one.ask(rows(hidden, 30, 1))) == ("failed", "no pages")
        assert (await one.ask(opening())).position == 30
        assert tokens(await one.ask(rows(hidden, 30, 1))) == expected[-1:]


# Those that take more than they should


async def test_an_edge_that_does_not_read_is_not_read(worker: Worker, reference: Model) -> None:
    hidden = await boundary(reference)
    async with edge(worker, opening()) as one:
        one.reads.clear()
        one.put(*[rows(hidden, 0, 1)] * 100)
        await alike(worker, reference)  # others are served meanwhile
        assert 100 - WAITING <= one.messages.qsize() < 100
        one.reads.set()
        assert len({bytes((await one.next()).payload) for _ in range(100)}) == 1


async def test_no_answer_overtakes_another_on_a_way_that_stops_and_goes(worker: Worker, reference: Model) -> None:
    """Whoever sends, the reader of a connection or its writer: one message at a time, in the order of the questions."""
    hidden, sent, under_way = await boundary(reference), list[bytes](), 0
    questions = [hello(worker), opening(), *[rows(hidden[: n + 1], n, 1) for n in range(12)]]
    left, answered = iter(map(wire.pack, questions)), asyncio.Event()

    async def receive() -> bytes | None:
        await asyncio.sleep(0)
        message = next(left, None)
        if message is None:
            await answered.wait()
        return message

    async def send(message: bytes) -> None:
        nonlocal under_way
        under_way += 1
        assert under_way == 1
        await asyncio.sleep(0.005 * (len(sent) % 2))
        sent.append(message)
        under_way -= 1
        if len(sent) == len(questions):
            answered.set()

    await worker.converse(receive, send)
    frames = [wire.unpack(message) for message in sent]
    assert [frame.kind for frame in frames] == [Kind.WELCOME, Kind.OPENED, *[Kind.TOKENS] * 12]
    assert [frame.position for frame in frames[2:]] == [*range(12)]


async def test_an_edge_that_breaks_off_without_reading_is_let_go(
    worker: Worker, reference: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hidden = await boundary(reference)
    one = Edge(worker)
    one.put(hello(worker), opening())
    await one.next()
    await one.next()
    one.reads.clear()
    one.put(*[rows(hidden, 0, 1)] * 50)
    await alike(worker, reference)
    one.broken = True
    one.reads.set()
    one.put(None)
    await one.over()
    async with edge(worker, *(opening(n) for n in range(10, 10 + SLOTS))):
        assert worker.sessions == SLOTS
    del one
    gc.collect()
    assert [record.levelname for record in caplog.records] == ["INFO"]


async def test_a_worker_that_is_closed_finishes_its_step_first(
    small: Bundle, model: Model, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever closes it frees the weights next."""
    worker, begun, may_end = Worker(model, small.weights), threading.Event(), threading.Event()
    run, ended = model.run, []

    def slow(*arguments: Any) -> FloatArray:
        begun.set()
        may_end.wait(20)
        ended.append(run(*arguments))
        return ended[-1]

    monkeypatch.setattr(model, "run", slow)
    async with edge(worker, opening()) as one:
        one.put(rows(await boundary(reference), 0, 1))
        await asyncio.to_thread(begun.wait, 20)
        closing = asyncio.create_task(worker.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        may_end.set()
        await closing
        assert len(ended) == 1


# Mutated conversations


def resealed(message: bytearray) -> bytes:
    """With the length and the checksum that it needs."""
    if len(message) >= wire.HEADER.size:
        message[32:36] = (len(message) - wire.HEADER.size).to_bytes(4, "little")
        message[36:40] = zlib.crc32(message[40:], zlib.crc32(message[:36])).to_bytes(4, "little")
    return bytes(message)


def mutated(rng: random.Random, messages: list[bytes]) -> list[bytes]:
    """Some messages lost, doubled, in another order, or with other bytes; the greeting is left alone more often, as
    nothing comes after it otherwise."""
    found = list(messages)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(0 if rng.random() < 0.1 else 1, len(found))
        action = rng.randrange(6)
        if action == 0:
            del found[at]
        elif action == 1:
            found.insert(rng.randrange(1, len(found) + 1), found[at])
        elif action == 2:
            other = rng.randrange(1, len(found))
            found[at], found[other] = found[other], found[at]
        else:
            message = bytearray(found[at])
            for _ in range(rng.randint(1, 3)):
                where = rng.randrange(3, len(message)) if rng.random() < 0.3 else rng.randrange(3, 32)
                message[where % len(message)] = rng.choice((0, 1, 2, 3, 7, 127, 128, 255, rng.randrange(256)))
            if action == 3:
                del message[rng.randrange(len(message)) :]
            found[at] = resealed(message) if rng.random() < 0.9 else bytes(message)
        if len(found) < 2:
            break
    return found


async def conversation(worker: Worker, reference: Model, session: int, coding: str) -> list[bytes]:
    hidden, coded = await boundary(reference), codec(coding, reference.gains(2))
    frames = [hello(worker), opening(session), rows(hidden[:12], session=session, coded=coded)]
    frames += [rows(hidden[: n + 1], n, 1, session, best=n % 4, coded=coded) for n in (12, 13, 13)]
    return [wire.pack(frame) for frame in (*frames, opening(session, 1), Frame(Kind.CLOSE, session, 1))]


async def test_a_conversation_may_end_anywhere(worker: Worker, reference: Model) -> None:
    messages = await conversation(worker, reference, 1, "exact")
    for count in range(len(messages) + 1):
        one = Edge(worker)
        one.put(*messages[:count], None)
        await one.over()
        if count:
            cut_short = messages[count - 1]
            two = Edge(worker)
            two.put(*messages[: count - 1], cut_short[: len(cut_short) // 2], None)
            await two.over()
    await alike(worker, reference)


async def test_mutated_conversations_hurt_nobody(worker: Worker, reference: Model) -> None:
    """Two at a time, with a good edge beside them now and then."""
    rng, last = random.Random(3), opening(777, limit=CONTEXT + 1)
    numbered = [await conversation(worker, reference, 1 + n % 2, c) for n, c in enumerate(("exact", "int8", "int4"))]
    kinds: set[Kind | str] = set()
    for turn in range(1000):
        edges = []
        for _ in range(2):
            one = Edge(worker)
            one.put(*mutated(rng, rng.choice(numbered)))
            edges.append(one)
        if turn % 100 == 0:
            await alike(worker, reference)
        for one in edges:
            kinds |= await one.rest(last)
    await alike(worker, reference)
    assert worker.sessions <= SLOTS
    assert kinds >= {Kind.WELCOME, Kind.OPENED, Kind.HELD, Kind.TOKENS, Kind.HIDDEN, "frame", "gap", "unknown", "stale"}
