"""What every Generator promises, asked of each of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from edgewise.engines.base import Generator, Row
from edgewise.engines.decode import Decoder
from edgewise.engines.fake import FakeGenerator, FakeTokenizer, FakeTokenModel, Script
from edgewise.engines.llamacpp import LlamaCpp
from edgewise.engines.local import LocalModel
from edgewise.engines.native_lm import NativeLM
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.engines.openai import OpenAI
from edgewise.errors import ContextFull, EngineClosed, RequestError
from edgewise.models.bundle import Bundle
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import Chunk, Message, Request, Sampling
from served import Served, eventually

CONTEXT = 2048
LONG = 1900  # tokens: more than any subject has made when its reader leaves
WORDS = " ".join(f"word{n}" for n in range(40)) + " "


@dataclass
class Subject:
    """A Generator, and how to see what it does: steps of work done so far, and whether it works now."""

    generator: Generator
    steps: Callable[[], int]
    busy: Callable[[], bool]
    whole_tokens: bool = True  # a Token for each token counted, even for a part of a character


class Spy:
    """llama.cpp's server, with its calls counted."""

    def __init__(self, server: Any) -> None:
        self._server, self.steps, self.running = server, 0, 0

    def handle_chat_completions(self, body: object, hear: Callable[[object], bool]) -> None:
        self._count(self._server.handle_chat_completions, body, hear)

    def handle_completions(self, body: object, hear: Callable[[object], bool]) -> None:
        self._count(self._server.handle_completions, body, hear)

    def _count(self, handle: Callable[..., None], body: object, hear: Callable[[object], bool]) -> None:
        def heard(event: object) -> bool:
            self.steps += 1
            return hear(event)

        self.running += 1
        handle(body, heard)
        self.running -= 1


class Counted(LocalModel[Any]):
    steps = 0

    async def forward(self, rows: Sequence[Row]) -> list[np.ndarray]:
        self.steps += sum(len(row.ids) for row in rows)
        return await super().forward(rows)


class CountedOnnx(Counted, OnnxLM): ...


class CountedNative(Counted, NativeLM): ...


def scripted() -> FakeGenerator:
    return FakeGenerator(replace(Script.of(WORDS, [-0.1, -0.7, -2.0]), delay_s=0.001))


@asynccontextmanager
async def fake(_: Any) -> AsyncIterator[Subject]:
    made = scripted()
    yield Subject(made, lambda: made.given, lambda: made.active > 0)
    await made.close()


@asynccontextmanager
async def openai(_: Any) -> AsyncIterator[Subject]:
    behind = scripted()
    with Served(behind) as server:
        made = OpenAI(server.url)
        yield Subject(made, lambda: behind.given, lambda: behind.active > 0)
        await made.close()


@asynccontextmanager
async def decoder(_: Any, delay_s: float | None = None) -> AsyncIterator[Subject]:
    model = FakeTokenModel(context=CONTEXT, delay_s=delay_s)
    made = Decoder(model, FakeTokenizer())
    yield Subject(made, lambda: model.computed, lambda: bool(made._scheduler._active))
    await made.close()


def remote_decoder(_: Any) -> Any:
    return decoder(_, delay_s=0.0001)


@asynccontextmanager
async def llamacpp(ask: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    made = LlamaCpp(ask.getfixturevalue("smollm2_gguf"), context=CONTEXT, slots=1, threads=1)
    spy = made._server = Spy(made._server)
    yield Subject(made, lambda: spy.steps, lambda: spy.running > 0, whole_tokens=False)
    await made.close()


@asynccontextmanager
async def onnx(ask: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    bundle: Bundle = ask.getfixturevalue("bundle")
    async with decoding(CountedOnnx(bundle, mode="stable", slots=2, context=CONTEXT), bundle) as subject:
        yield subject


@asynccontextmanager
async def native(ask: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    bundle: Bundle = ask.getfixturevalue("bundle")
    if NativeLM.why_not(bundle) is not None:
        pytest.skip("the native kernels are not built for this machine")
    async with decoding(CountedNative(bundle, slots=2, context=CONTEXT), bundle) as subject:
        yield subject


@asynccontextmanager
async def decoding(model: Counted, bundle: Bundle) -> AsyncIterator[Subject]:
    made = Decoder(model, Tokenizer.open(bundle.path))
    yield Subject(made, lambda: model.steps, lambda: bool(made._scheduler._active))
    await made.close()


@pytest.fixture(params=[fake, openai, decoder, remote_decoder, llamacpp, onnx, native], ids=lambda make: make.__name__)
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(request.param(request))


@pytest.fixture
def generator(subject: Subject) -> Generator:
    return subject.generator


def ask(content: str = "Name three rivers.", **wishes: Any) -> Request:
    return Request((Message("user", content),), **({"max_tokens": 12, "ignore_eos": True} | wishes))


async def read(generator: Generator, request: Request) -> list[Chunk]:
    return [chunk async for chunk in generator.generate(request)]


async def text(generator: Generator, request: Request) -> str:
    return "".join(chunk.text for chunk in await read(generator, request))


async def test_the_last_chunk_and_no_other_says_how_it_ended(generator: Generator) -> None:
    *first, last = await read(generator, ask())
    assert all(chunk.finish_reason is chunk.usage is chunk.timings is None for chunk in first)
    assert last.finish_reason == "length"
    assert last.usage is not None
    assert last.timings is not None
    assert 0 < last.timings.first_token_ms <= last.timings.total_ms
    assert all(chunk.model for chunk in (*first, last))


async def test_max_tokens_is_kept_exactly(subject: Subject) -> None:
    for wanted in (1, 2, 12):
        chunks = await read(subject.generator, ask(max_tokens=wanted))
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.completion_tokens == wanted
        assert 0 <= usage.cached_tokens < usage.prompt_tokens
        given = sum(len(chunk.tokens) for chunk in chunks)
        assert given == wanted if subject.whole_tokens else 1 <= given <= wanted


async def test_the_texts_of_the_chunks_are_the_text_of_the_tokens(generator: Generator) -> None:
    chunks = await read(generator, ask())
    raw = b"".join(token.raw for chunk in chunks for token in chunk.tokens)
    assert "".join(chunk.text for chunk in chunks) == raw.decode(errors="replace") != ""


async def test_the_answer_ends_before_a_stop_string(generator: Generator) -> None:
    full = await text(generator, ask(max_tokens=30))
    stop = full[len(full) // 2 :][:4]
    chunks = await read(generator, ask(max_tokens=30, stop=("\0", stop)))
    assert "".join(chunk.text for chunk in chunks) == full[: full.index(stop)]
    assert chunks[-1].finish_reason == "stop"


async def test_greedy_answers_repeat(generator: Generator) -> None:
    assert await text(generator, ask()) == await text(generator, ask())


async def test_a_seed_repeats_an_answer(generator: Generator) -> None:
    assert generator.can.seed
    hot = ask(sampling=Sampling(temperature=1.2, top_p=0.9, seed=11))
    assert await text(generator, hot) == await text(generator, hot)


async def test_logprobs_are_logs_and_alternatives_are_in_order(generator: Generator) -> None:
    assert generator.can.logprobs
    chunks = await read(generator, ask(logprobs=True, top_logprobs=5))
    tokens = [token for chunk in chunks for token in chunk.tokens]
    for token in tokens:
        assert token.logprob is not None
        assert token.logprob <= 0
        best = [candidate.logprob for candidate in token.top]
        assert len(best) == 5
        assert best == sorted(best, reverse=True)
        assert max(best) <= 0
        assert best[0] >= token.logprob - 1e-6


async def test_without_a_wish_there_are_no_alternatives(generator: Generator) -> None:
    chunks = await read(generator, ask(logprobs=True))
    assert not any(token.top for chunk in chunks for token in chunk.tokens)


@pytest.mark.parametrize("how", ["aclose", "cancel"])
async def test_leaving_stops_the_work(subject: Subject, how: str) -> None:
    chunks: Any = subject.generator.generate(ask(max_tokens=LONG))
    await anext(chunks)
    if how == "aclose":
        await chunks.aclose()
    else:
        reading = asyncio.ensure_future(_drain(chunks))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    await asyncio.to_thread(eventually, lambda: not subject.busy())
    assert subject.steps() < LONG
    assert await text(subject.generator, ask()) != ""


async def _drain(chunks: AsyncIterator[Chunk]) -> None:
    async for _ in chunks:
        pass


async def test_a_prompt_longer_than_the_context_is_refused_and_others_are_not(generator: Generator) -> None:
    if generator.can.context is None:
        pytest.skip("it does not know its context")
    with pytest.raises(ContextFull) as caught:
        await read(generator, ask("many words " * generator.can.context))
    assert caught.value.needed > caught.value.limit == generator.can.context
    assert await text(generator, ask()) != ""


async def test_ids_are_taken_as_they_are(generator: Generator) -> None:
    request = Request(prompt_ids=(1, 40, 50, 60), max_tokens=5, ignore_eos=True)
    if not generator.can.prompt_ids:
        with pytest.raises(RequestError, match="prompt_ids"):
            await read(generator, request)
        return
    chunks = await read(generator, request)
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (4, 5)


async def test_what_cannot_be_honoured_is_refused_before_the_first_chunk(subject: Subject) -> None:
    for wrong in (ask(max_tokens=0), ask(top_logprobs=99), ask(sampling=Sampling(top_p=0.0)), ask(stop=("",))):
        with pytest.raises(RequestError):
            await read(subject.generator, wrong)
    assert subject.steps() == 0


async def test_four_at_once_are_answered_as_each_alone(generator: Generator) -> None:
    requests = [ask(f"Tell me about the number {n}.") for n in range(4)]
    together = await asyncio.gather(*(text(generator, request) for request in requests))
    assert together == [await text(generator, request) for request in requests]


async def test_close_is_idempotent_and_final(subject: Subject) -> None:
    running = asyncio.ensure_future(read(subject.generator, ask(max_tokens=LONG)))
    await asyncio.to_thread(eventually, subject.busy)
    await subject.generator.close()
    await subject.generator.close()
    with pytest.raises(EngineClosed):
        await running
    with pytest.raises(EngineClosed):
        await read(subject.generator, ask())
