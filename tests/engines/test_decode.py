import asyncio
import gc
import math
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.engines import decode
from edgewise.engines.base import Row
from edgewise.engines.decode import DecodeOptions, Decoder
from edgewise.engines.fake import FakeTokenizer, FakeTokenModel
from edgewise.errors import (
    ContextFull,
    DeadlineExceeded,
    EdgewiseError,
    EngineClosed,
    EngineError,
    Overloaded,
    RequestError,
    Unreachable,
)
from edgewise.types import Chunk, Message, Request, Sampling

STOP = FakeTokenizer.stop_id


@asynccontextmanager
async def decoder(model: FakeTokenModel, **options: int) -> AsyncIterator[Decoder]:
    made = Decoder(model, FakeTokenizer(), options=DecodeOptions(**options))
    try:
        yield made
    finally:
        await made.close()


async def read(generator: Decoder, request: Request) -> list[Chunk]:
    return [chunk async for chunk in generator.generate(request)]


async def ids(generator: Decoder, request: Request) -> list[int]:
    return [token.id for chunk in await read(generator, request) for token in chunk.tokens]


def ask(*prompt: int, **wishes: Any) -> Request:
    return Request(prompt_ids=prompt, **({"max_tokens": 8, "ignore_eos": True} | wishes))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  it is the state of another thread
        await asyncio.sleep(0.001)


def bias(**of: float) -> np.ndarray:
    """A bias of the given token ids ("t65" is 65)."""
    values = np.zeros(FakeTokenizer.vocab, np.float32)
    for name, value in of.items():
        values[int(name[1:])] = value
    return values


async def greedy(prompt: Sequence[int], count: int, **model: Any) -> list[int]:
    """The ids that the fake model goes on with, straight from its logits."""
    fake = FakeTokenModel(**model)
    await fake.open("alone", fake.context)
    out: list[int] = []
    row = np.array(prompt, np.int64)
    for _ in range(count):
        held = fake.lengths["alone"]
        (logits,) = await fake.forward([Row("alone", held, row)])
        out.append(int(logits[-1].argmax()))
        row = np.array(out[-1:], np.int64)
    return out


class Gate:
    """Holds the forwards of a model: `inside` tells that one has come, `go` lets all pass."""

    def __init__(self) -> None:
        self.inside, self.go = threading.Event(), threading.Event()

    def __call__(self, rows: Sequence[Row]) -> None:
        self.inside.set()
        assert self.go.wait(10)


class TestText:
    async def test_greedy_is_the_argmax_of_each_step(self) -> None:
        async with decoder(FakeTokenModel()) as made:
            assert await ids(made, ask(1, 2, 3, max_tokens=30)) == await greedy([1, 2, 3], 30)

    async def test_messages_go_through_the_template(self) -> None:
        turn = Message("user", "hé")
        async with decoder(FakeTokenModel()) as made:
            by_message = await ids(made, Request((turn,), max_tokens=5, ignore_eos=True))
            assert by_message == await ids(made, ask(*FakeTokenizer().chat([turn]), max_tokens=5))

    async def test_the_stop_token_ends_the_answer_and_is_not_part_of_it(self) -> None:
        async with decoder(FakeTokenModel(bias=bias(**{f"t{STOP}": 100.0}))) as made:
            (only,) = await read(made, ask(1, ignore_eos=False))
        assert (only.text, only.tokens, only.finish_reason) == ("", (), "stop")
        assert only.usage is not None
        assert only.usage.completion_tokens == 0

    async def test_ignore_eos_goes_on_past_it(self) -> None:
        async with decoder(FakeTokenModel(bias=bias(**{f"t{STOP}": 100.0}))) as made:
            assert await ids(made, ask(1, max_tokens=4)) == [STOP] * 4

    async def test_a_stop_string_over_several_tokens(self) -> None:
        async with decoder(FakeTokenModel(bias=bias(t97=30.0, t98=29.0))) as made:
            full = "".join(chunk.text for chunk in await read(made, ask(5, max_tokens=40)))
            at = full.index("ab")
            chunks = await read(made, ask(5, max_tokens=40, stop=("ab", "never")))
        assert "".join(chunk.text for chunk in chunks) == full[:at]
        assert chunks[-1].finish_reason == "stop"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == at + 2 == sum(len(chunk.tokens) for chunk in chunks)

    async def test_every_chunk_holds_whole_characters(self) -> None:
        euro = bias(t259=60.0, t260=60.0)  # the two halves of a character
        async with decoder(FakeTokenModel(bias=euro)) as made:
            chunks = await read(made, ask(5, max_tokens=60))
        raw = b"".join(token.raw for chunk in chunks for token in chunk.tokens)
        assert "".join(chunk.text for chunk in chunks) == raw.decode(errors="replace")
        assert "€" in raw.decode(errors="replace")

    async def test_logprobs_are_those_of_the_models_softmax(self) -> None:
        fake = FakeTokenModel()
        await fake.open("alone", 8)
        (logits,) = await fake.forward([Row("alone", 0, np.array([1, 2]))])
        expected = logits[0].astype(np.float64) - math.log(np.exp(logits[0].astype(np.float64)).sum())
        async with decoder(FakeTokenModel()) as made:
            hot = Sampling(temperature=1.5, top_p=0.9, seed=3)
            (only,) = await read(made, ask(1, 2, max_tokens=1, sampling=hot, logprobs=True, top_logprobs=4))
        (token,) = only.tokens
        assert token.logprob == pytest.approx(expected[token.id], abs=1e-6)
        assert [candidate.id for candidate in token.top] == list(np.argsort(-expected)[:4])
        assert [candidate.raw for candidate in token.top] == [FakeTokenizer().token_bytes(c.id) for c in token.top]


class TestContext:
    async def test_a_prompt_without_room_for_one_token_is_refused(self) -> None:
        async with decoder(FakeTokenModel(context=16)) as made:
            with pytest.raises(ContextFull) as caught:
                await read(made, ask(*range(16)))
            assert (caught.value.needed, caught.value.limit) == (17, 16)

    async def test_an_answer_ends_where_the_context_ends(self) -> None:
        async with decoder(FakeTokenModel(context=16)) as made:
            chunks = await read(made, ask(*range(10), max_tokens=1000))
            assert chunks[-1].finish_reason == "length"
            assert chunks[-1].usage is not None
            assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (10, 6)
            assert len(await ids(made, ask(*range(15), max_tokens=1000))) == 1

    @pytest.mark.parametrize("wrong", [-1, FakeTokenizer.vocab, 2**70])
    async def test_ids_outside_the_vocabulary_are_refused(self, wrong: int) -> None:
        async with decoder(FakeTokenModel()) as made:
            with pytest.raises(RequestError, match=str(wrong)):
                await read(made, ask(1, wrong))


class TestScheduling:
    async def test_prompts_are_filled_in_turn_while_answers_go_on(self) -> None:
        gate, steps = Gate(), list[Sequence[Row]]()

        def watch(rows: Sequence[Row]) -> None:
            steps.append(rows)
            gate(rows)

        model = FakeTokenModel(before_forward=watch)
        async with decoder(model, prefill_chunk=8) as made:
            short = asyncio.ensure_future(ids(made, ask(1, max_tokens=40)))
            await asyncio.to_thread(gate.inside.wait, 10)
            long = [asyncio.ensure_future(ids(made, ask(*[i] * 24))) for i in range(3)]
            await until(lambda: len(made._scheduler._waiting) == 3)
            gate.go.set()
            await asyncio.gather(short, *long)
        chunks = [row for rows in steps for row in rows if len(row.ids) > 1]
        assert [len(row.ids) for row in chunks] == [8] * 9
        assert len({row.session for row in chunks[:3]}) == 3
        assert [row.session for row in chunks] == [row.session for row in chunks[:3]] * 3
        assert all(sum(len(row.ids) > 1 for row in rows) <= 1 for rows in steps)  # one chunk of a prompt a step
        assert all(any(len(row.ids) == 1 for row in rows) for rows in steps)  # beside which the others go on

    async def test_a_long_prompt_costs_as_few_steps_as_it_can(self) -> None:
        model = FakeTokenModel()
        async with decoder(model, prefill_chunk=100) as made:
            await ids(made, ask(*[7] * 301, max_tokens=1))
        assert model.calls["forward"] == 4

    async def test_no_more_sessions_than_slots_and_the_rest_waits(self) -> None:
        model = FakeTokenModel(slots=2)
        async with decoder(model) as made:
            answers = await asyncio.gather(*(ids(made, ask(i)) for i in range(9)))
        assert answers == [await greedy([i], 8) for i in range(9)]
        assert model.calls["open"] == 2
        assert model.most_rows == 2

    async def test_beyond_the_queue_is_overloaded_and_room_comes_back(self) -> None:
        gate = Gate()
        async with decoder(FakeTokenModel(slots=1, before_forward=gate), queue=2) as made:
            tasks = [asyncio.ensure_future(ids(made, ask(i))) for i in range(3)]
            await asyncio.to_thread(gate.inside.wait, 10)
            await until(lambda: len(made._scheduler._waiting) == 2)
            with pytest.raises(Overloaded, match="at most 2 may wait"):
                await read(made, ask(9))
            tasks[2].cancel()
            await asyncio.gather(tasks[2], return_exceptions=True)
            late = asyncio.ensure_future(ids(made, ask(9)))
            gate.go.set()
            assert await late == await greedy([9], 8)
            assert await tasks[1] == await greedy([1], 8)


class TestPrefixReuse:
    async def test_the_same_prompt_again_recomputes_its_last_token_only(self) -> None:
        model = FakeTokenModel()
        async with decoder(model) as made:
            first = await read(made, ask(*range(50), max_tokens=4))
            computed = model.computed
            again = await read(made, ask(*range(50), max_tokens=4))
        assert model.computed - computed == 4  # the last of the prompt and three of the answer
        tokens = [[token for chunk in chunks for token in chunk.tokens] for chunks in (first, again)]
        assert tokens[0] == tokens[1]
        assert again[-1].usage is not None
        assert again[-1].usage.cached_tokens == 49

    async def test_a_conversation_goes_on_from_where_it_was(self) -> None:
        async with decoder(FakeTokenModel()) as made:
            answer = await ids(made, ask(*range(20), max_tokens=6))
            chunks = await read(made, ask(*range(20), *answer, 9, 9))
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.cached_tokens == 25  # the last token of the answer was never fed

    async def test_two_conversations_do_not_drive_each_other_out(self) -> None:
        async with decoder(FakeTokenModel()) as made:
            a, b = (1, 2, *range(10, 40)), (1, 2, *range(60, 90))
            for prompt in (a, b):
                await ids(made, ask(*prompt))
            cached = [(await read(made, ask(*prompt, 5)))[-1].usage for prompt in (a, b)]
        assert [usage.cached_tokens for usage in cached if usage] == [32, 32]

    async def test_without_a_free_slot_the_oldest_one_is_taken_over(self) -> None:
        model = FakeTokenModel(slots=2)
        async with decoder(model) as made:
            for start in (100, 200, 100, 50):
                await ids(made, ask(*range(start, start + 30)))
            usage = (await read(made, ask(*range(100, 130))))[-1].usage
        assert model.calls["open"] == 2
        assert usage is not None
        assert usage.cached_tokens == 29


@st.composite
def plans(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Requests with common beginnings; some are left after a few chunks, and they start at different moments."""
    trunk = draw(st.lists(st.integers(0, 9), min_size=1, max_size=30))
    return draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "prompt": st.builds(
                        lambda keep, rest: (*trunk[:keep], *rest),
                        st.integers(0, 30),
                        st.lists(st.integers(0, 9), min_size=1, max_size=20),
                    ),
                    "temperature": st.sampled_from([0.0, 1.0]),
                    "max_tokens": st.integers(1, 12),
                    "leave_after": st.one_of(st.none(), st.integers(0, 6)),
                    "wait": st.integers(0, 6),
                }
            ),
            min_size=1,
            max_size=8,
        )
    )


async def play(made: Decoder, plan: dict[str, Any], seed: int) -> list[int]:
    for _ in range(plan["wait"]):
        await asyncio.sleep(0)
    sampling = Sampling(temperature=plan["temperature"], seed=seed)
    chunks = made.generate(ask(*plan["prompt"], sampling=sampling, max_tokens=plan["max_tokens"]))
    out: list[int] = []
    async for chunk in chunks:
        out += [token.id for token in chunk.tokens]
        if plan["leave_after"] is not None and len(out) > plan["leave_after"]:
            break
    await chunks.aclose()  # type: ignore[attr-defined]
    return out if plan["leave_after"] is None else out[: plan["leave_after"] + 1]  # a chunk may bring more


@settings(max_examples=40, deadline=None)
@given(plans(), st.integers(1, 4), st.integers(1, 16), st.booleans())
def test_each_request_gives_what_it_gives_alone(
    requests: list[dict[str, Any]], slots: int, prefill_chunk: int, remote: bool
) -> None:
    async def together() -> list[list[int]]:
        model = FakeTokenModel(slots=slots, delay_s=0.0 if remote else None)
        async with decoder(model, prefill_chunk=prefill_chunk) as made:
            return await asyncio.gather(*(play(made, plan, seed) for seed, plan in enumerate(requests)))

    async def alone(plan: dict[str, Any], seed: int) -> list[int]:
        async with decoder(FakeTokenModel(slots=1)) as made:
            return await play(made, plan, seed)

    answers = asyncio.run(together())
    for seed, (plan, answer) in enumerate(zip(requests, answers, strict=True)):
        assert answer == asyncio.run(alone(plan, seed))


class TestLeaving:
    @pytest.mark.parametrize("how", ["aclose", "cancel"])
    async def test_work_stops_and_the_slot_is_free_again(self, how: str) -> None:
        model = FakeTokenModel(slots=1, context=100_000)
        async with decoder(model) as made:
            chunks = made.generate(ask(1, max_tokens=90_000))
            await anext(chunks)
            if how == "aclose":
                await chunks.aclose()  # type: ignore[attr-defined]
            else:
                reading = asyncio.ensure_future(_drain(chunks))
                await asyncio.sleep(0)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            assert await ids(made, ask(2)) == await greedy([2], 8)
        assert model.computed < 90_000

    async def test_the_deadline_ends_an_answer_and_a_place_in_the_queue(self) -> None:
        gate = Gate()
        async with decoder(FakeTokenModel(slots=1, before_forward=gate)) as made:
            running = asyncio.ensure_future(read(made, ask(1, deadline_ms=30.0)))
            await asyncio.to_thread(gate.inside.wait, 10)
            waiting = asyncio.ensure_future(read(made, ask(2, deadline_ms=30.0)))
            for task in (running, waiting):
                with pytest.raises(DeadlineExceeded, match="30"):
                    await task
            gate.go.set()
            assert await ids(made, ask(3)) == await greedy([3], 8)

    async def test_a_closed_event_loop_frees_its_slots(self) -> None:
        model = FakeTokenModel(slots=1, context=100_000)
        async with decoder(model) as made:

            def leave_without_a_word() -> None:
                loop = asyncio.new_event_loop()
                chunks = made.generate(ask(1, max_tokens=90_000))
                loop.run_until_complete(anext(chunks))  # type: ignore[arg-type]
                loop.close()
                abandoned.append(chunks)

            abandoned: list[object] = []
            await asyncio.to_thread(leave_without_a_word)
            assert await ids(made, ask(2)) == await greedy([2], 8)
            assert model.computed < 90_000

    async def test_several_event_loops_at_once(self) -> None:
        async with decoder(FakeTokenModel()) as made:
            answers = await asyncio.gather(
                *(asyncio.to_thread(lambda i=i: asyncio.run(ids(made, ask(i)))) for i in range(6))
            )
        assert answers == [await greedy([i], 8) for i in range(6)]


async def _drain(chunks: AsyncIterator[Chunk]) -> None:
    async for _ in chunks:
        pass


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "expected"), [(ValueError("odd"), EngineError), (Unreachable("gone"), Unreachable)]
    )
    async def test_a_failing_step_ends_its_requests_and_no_other(
        self, fault: Exception, expected: type[EdgewiseError]
    ) -> None:
        def fail(rows: Sequence[Row]) -> None:
            if any(66 in row.ids for row in rows):
                raise fault

        model = FakeTokenModel(before_forward=fail, slots=2, bias=bias(t66=-100.0))
        async with decoder(model) as made:
            with pytest.raises(expected) as caught:
                await read(made, ask(1, 66))
            assert caught.value is fault or caught.value.__cause__ is fault
            assert await ids(made, ask(1, 2)) == await greedy([1, 2], 8, bias=bias(t66=-100.0))
            assert len(model.lengths) == 1  # the session of the failed one is gone

    async def test_overflowed_logits_end_one_request(self) -> None:
        class Overflowing(FakeTokenModel):
            async def forward(self, rows: Sequence[Row]) -> list[np.ndarray]:
                results = await super().forward(rows)
                for row, logits in zip(rows, results, strict=True):
                    if 77 in row.ids:
                        logits.fill(np.nan)
                return results

        model = Overflowing(bias=bias(t77=-100.0))
        async with decoder(model) as made:
            good, bad = await asyncio.gather(ids(made, ask(3)), ids(made, ask(77)), return_exceptions=True)
            assert good == await greedy([3], 8, bias=bias(t77=-100.0))
            assert isinstance(bad, EngineError)

    async def test_a_model_that_cannot_open_a_session(self) -> None:
        class Full(FakeTokenModel):
            async def open(self, session: str, limit: int) -> None:
                raise Overloaded("no room here")

        async with decoder(Full()) as made:
            with pytest.raises(Overloaded, match="no room here"):
                await read(made, ask(1))

    async def test_a_tokenizer_that_fails_on_one_token(self) -> None:
        class Broken(FakeTokenizer):
            def token_bytes(self, token_id: int) -> bytes:
                if token_id == 65:
                    raise KeyError(token_id)
                return super().token_bytes(token_id)

        made = Decoder(FakeTokenModel(bias=bias(t65=100.0)), Broken())
        with pytest.raises(EngineError, match="KeyError"):
            await read(made, ask(1))
        await made.close()


class TestClosing:
    async def test_close_ends_running_and_waiting_requests_and_the_thread(self) -> None:
        gate = Gate()
        model = FakeTokenModel(slots=1, before_forward=gate)
        made = Decoder(model, FakeTokenizer())
        tasks = [asyncio.ensure_future(read(made, ask(i))) for i in range(2)]
        await asyncio.to_thread(gate.inside.wait, 10)
        closing = asyncio.ensure_future(made.close())
        await until(lambda: made._scheduler._stopping)
        gate.go.set()
        await asyncio.gather(closing, made.close())
        for task in tasks:
            with pytest.raises(EngineClosed):
                await task
        assert model.calls["shutdown"] == 1
        assert not made._scheduler._thread.is_alive()
        await made.close()
        with pytest.raises(EngineClosed):
            await read(made, ask(1))

    async def test_close_does_not_wait_for_a_remote_model(self) -> None:
        made = Decoder(FakeTokenModel(delay_s=3600), FakeTokenizer())
        reading = asyncio.ensure_future(read(made, ask(1)))
        await asyncio.sleep(0.02)
        await made.close()
        with pytest.raises(EngineClosed):
            await reading

    async def test_a_bug_of_the_scheduler_hangs_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = Decoder(FakeTokenModel(), FakeTokenizer())
        monkeypatch.setattr(made._scheduler, "_retire", lambda task: 1 / 0)
        with pytest.raises(EngineClosed) as caught:
            await asyncio.gather(read(made, ask(1, max_tokens=1)), read(made, ask(2)))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        await made.close()

    def test_one_that_is_dropped_ends_its_thread(self) -> None:
        made = Decoder(FakeTokenModel(), FakeTokenizer())
        asyncio.run(ids(made, ask(1)))
        thread, dropped = made._scheduler._thread, weakref.ref(made)
        del made
        gc.collect()
        thread.join(10)
        assert dropped() is None
        assert not thread.is_alive()

    def test_one_that_is_forgotten_in_the_middle_of_an_answer_does_not_hang_the_exit(self) -> None:
        code = """
            import asyncio
            from edgewise.engines.decode import Decoder
            from edgewise.engines.fake import FakeTokenizer, FakeTokenModel
            from edgewise.types import Request

            made = Decoder(FakeTokenModel(context=10**6), FakeTokenizer())
            loop = asyncio.new_event_loop()
            chunks = made.generate(Request(prompt_ids=(1,), max_tokens=10**6, ignore_eos=True))
            loop.run_until_complete(anext(chunks))
            print("left")
        """
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=30
        )
        assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


# --- sampling and slots -----------------------------------------------------------------------------------------------


async def test_the_prompt_and_the_answer_reach_the_penalties() -> None:
    flat = bias(t65=40.0, t66=39.0, t67=38.0)
    async with decoder(FakeTokenModel(bias=flat)) as made:
        plain = await ids(made, ask(65, max_tokens=3))
        penalised = await ids(made, ask(65, max_tokens=3, sampling=Sampling(repetition_penalty=100.0)))
        banned = await ids(made, ask(65, max_tokens=3, sampling=Sampling(logit_bias=((65, -100.0),))))
    assert 65 in plain
    assert 65 not in banned
    assert penalised[0] != 65
    assert len(set(penalised)) == 3


async def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    async with decoder(FakeTokenModel()) as made:
        with pytest.raises(RequestError, match="allowed is 0 to 264"):
            await ids(made, ask(1, sampling=Sampling(logit_bias=((265, 1.0),))))


async def test_a_request_that_cannot_be_set_up_loses_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeTokenModel(slots=1)
    async with decoder(model) as made:
        expected = await ids(made, ask(1, 2))
        with monkeypatch.context() as patched:
            patched.setattr(decode, "Sampler", None)
            for _ in range(2):
                with pytest.raises(EngineError, match="not callable"):
                    await ids(made, ask(1, 2))
        assert await ids(made, ask(1, 2)) == expected
    assert model.calls["open"] == 1
