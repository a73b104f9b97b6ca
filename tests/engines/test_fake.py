import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgewise.engines.base import Row
from edgewise.engines.fake import FakeGenerator, FakePredictor, FakeTokenizer, FakeTokenModel, Script
from edgewise.errors import DeadlineExceeded, EngineClosed, Unreachable
from edgewise.types import Candidate, Chunk, Message, Request, Token

HI = (Message("user", "hi"),)


async def read(generator: FakeGenerator, seen: list[Chunk] | None = None, **wishes: Any) -> list[Chunk]:
    """All chunks; `seen` has those that came before an error."""
    seen = [] if seen is None else seen
    async for chunk in generator.generate(Request(HI, **wishes)):
        seen.append(chunk)
    return seen


async def test_a_text_is_given_word_by_word_with_its_logprobs() -> None:
    chunks = await read(FakeGenerator(Script.of("one two  three", [-0.5, -1.5])))
    assert [chunk.text for chunk in chunks] == ["one ", "two  ", "three", ""]
    assert [token.logprob for chunk in chunks for token in chunk.tokens] == [-0.5, -1.5, -0.5]


async def test_the_answer_may_depend_on_the_request() -> None:
    fake = FakeGenerator(lambda request: f"{len(request.messages)} message")
    assert "".join(chunk.text for chunk in await read(fake)) == "1 message"
    assert fake.requests == [Request(HI)]


async def test_an_error_comes_at_its_token_at_the_start_and_after_the_last() -> None:
    for breaks_at, expected in ((0, 0), (2, 2), (3, 3)):
        fake = FakeGenerator(replace(Script.of("a b c"), error=Unreachable("gone"), breaks_at=breaks_at))
        seen: list[Chunk] = []
        with pytest.raises(Unreachable):
            await read(fake, seen)
        assert len(seen) == expected == fake.given
        assert fake.finished == fake.active == fake.cancelled == 0


async def test_a_hang_outlives_the_deadline_and_is_ended_by_its_reader() -> None:
    fake = FakeGenerator(replace(Script.of("a b c"), hangs=True, breaks_at=1))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read(fake, deadline_ms=1.0), 0.05)
    assert (fake.given, fake.cancelled, fake.active) == (1, 1, 0)


async def test_delays_keep_the_deadline() -> None:
    with pytest.raises(DeadlineExceeded):
        await read(FakeGenerator(replace(Script.of("a b c"), delay_s=3600)), deadline_ms=5.0)
    with pytest.raises(DeadlineExceeded):
        await read(FakeGenerator(replace(Script.of("a"), start_delay_s=3600)), deadline_ms=5.0)


async def test_leaving_early_is_recorded() -> None:
    fake = FakeGenerator("a b c")
    async with aclosing(fake.generate(Request(HI))) as chunks:
        async for _ in chunks:
            assert fake.active == 1
            break
    assert (fake.given, fake.cancelled, fake.finished, fake.active) == (1, 1, 0, 0)


async def test_close_ends_running_answers() -> None:
    fake = FakeGenerator("a b c")
    chunks = fake.generate(Request(HI))
    await anext(chunks)
    await fake.close()
    with pytest.raises(EngineClosed):
        await anext(chunks)


async def test_scripted_alternatives_are_shown_before_made_up_ones() -> None:
    token = Token(7, b"yes", -1.0, top=(Candidate(8, b"no", -0.6), Candidate(7, b"yes", -1.0)))
    fake = FakeGenerator(Script((token,)))
    plain, rich = await read(fake), await read(fake, logprobs=True, top_logprobs=3)
    assert plain[0].tokens[0].top == ()
    assert [candidate.id for candidate in rich[0].tokens[0].top[:2]] == [8, 7]
    assert len(rich[0].tokens[0].top) == 3


def test_the_tokenizer_cuts_characters_and_knows_its_vocabulary() -> None:
    tokenizer = FakeTokenizer()
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("né 日"))).decode() == "né 日"
    assert tokenizer.chat(HI) == tokenizer.encode("user: hi\nassistant: ")
    pieces = [tokenizer.token_bytes(token_id) for token_id in range(256, FakeTokenizer.stop_id)]
    assert any(piece.decode(errors="replace").endswith("�") for piece in pieces)
    assert tokenizer.token_bytes(FakeTokenizer.stop_id) == b""


async def test_the_token_model_refuses_to_be_called_twice_at_once() -> None:
    model = FakeTokenModel(delay_s=0.01)
    await model.open("a", 4)
    rows = [Row("a", 0, np.array([1]))]
    with pytest.raises(AssertionError, match="while another call runs"):
        await asyncio.gather(model.forward(rows), model.forward(rows))


async def test_the_predictor_answers_records_and_fails_as_told() -> None:
    inputs = {"x": np.ones((2, 3))}
    fixed = FakePredictor({"logits": np.zeros((2, 5))})
    assert (await fixed.predict(inputs))["logits"].shape == (2, 5)
    assert fixed.inputs == [inputs]
    doubled = FakePredictor(lambda given: {"logits": given["x"] * 2})
    assert (await doubled.predict(inputs))["logits"].sum() == 12
    with pytest.raises(Unreachable):
        await FakePredictor({}, error=Unreachable("gone")).predict(inputs)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(FakePredictor({}, hangs=True).predict(inputs), 0.01)
    await fixed.close()
    with pytest.raises(EngineClosed):
        await fixed.predict(inputs)
