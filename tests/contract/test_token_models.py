"""What every TokenModel promises, asked of each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from edgewise.engines import native_lm
from edgewise.engines.base import Row, TokenModel
from edgewise.engines.fake import FakeTokenModel
from edgewise.engines.native_lm import NativeLM
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.errors import ContextFull, EngineClosed, GapError, Overloaded

CONTEXT, SLOTS = 64, 2
IDS = np.random.default_rng(3).integers(0, 250, 40)


@pytest.fixture(params=["fake", "remote-fake", "onnx", "native"])
async def model(request: pytest.FixtureRequest) -> AsyncIterator[TokenModel]:
    """With session "s" open."""
    made: TokenModel
    if request.param == "onnx":  # `stable`: this suite asks for equal bits
        made = OnnxLM(request.getfixturevalue("bundle"), mode="stable", slots=SLOTS, context=CONTEXT)
    elif request.param == "native":
        if native_lm.probe() is None:
            pytest.skip("the native kernels are not built for this machine")
        made = NativeLM(request.getfixturevalue("bundle"), slots=SLOTS, context=CONTEXT)
    else:
        made = FakeTokenModel(context=CONTEXT, slots=SLOTS, delay_s=0.0 if request.param == "remote-fake" else None)
    await made.open("s", CONTEXT)
    yield made
    await made.shutdown()


async def feed(model: TokenModel, start: int, end: int, want: int = 1, session: str = "s") -> np.ndarray:
    (logits,) = await model.forward([Row(session, start, IDS[start:end], want)])
    return logits.copy()


async def test_logits_have_the_shape_and_type_that_was_wanted(model: TokenModel) -> None:
    for want in (0, 1, 7):
        logits = await feed(model, 0, 7, want)
        assert logits.shape == (want, model.vocab)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()


async def test_wanted_are_the_last_positions(model: TokenModel) -> None:
    everything = await feed(model, 0, 7, 7)
    assert np.array_equal(await feed(model, 0, 7, 3), everything[4:])


async def test_chunks_and_single_rows_give_what_the_whole_gives(model: TokenModel) -> None:
    whole = await feed(model, 0, 12)
    await feed(model, 0, 5, 0)
    await feed(model, 5, 11, 0)
    assert np.array_equal(await feed(model, 11, 12), whole)


async def test_repeating_a_row_changes_nothing(model: TokenModel) -> None:
    await feed(model, 0, 6, 0)
    first = await feed(model, 6, 9)
    assert np.array_equal(await feed(model, 6, 9), first)
    assert np.array_equal(await feed(model, 0, 9), first)


async def test_a_row_below_the_length_forgets_what_follows(model: TokenModel) -> None:
    expected = await feed(model, 0, 20)
    await model.forward([Row("s", 4, IDS[::-1][:30].copy(), 0)])
    await feed(model, 4, 10, 0)
    assert np.array_equal(await feed(model, 10, 20), expected)


async def test_rewind_forgets(model: TokenModel) -> None:
    expected = await feed(model, 0, 9)
    await model.rewind("s", 4)
    with pytest.raises(GapError):
        await feed(model, 5, 9)
    assert np.array_equal(await feed(model, 4, 9), expected)
    await model.rewind("s", 0)
    assert np.array_equal(await feed(model, 0, 9), expected)


async def test_a_gap_is_an_error_that_tells_where_to_go_on(model: TokenModel) -> None:
    await feed(model, 0, 3)
    with pytest.raises(GapError) as caught:
        await feed(model, 4, 6)
    assert (caught.value.position, caught.value.length) == (4, 3)
    with pytest.raises(GapError):
        await model.rewind("s", 4)


async def test_the_limit_of_a_session_holds(model: TokenModel) -> None:
    await model.open("small", 8)
    await feed(model, 0, 8, session="small")
    with pytest.raises(ContextFull) as caught:
        await feed(model, 8, 9, session="small")
    assert (caught.value.needed, caught.value.limit) == (9, 8)
    await feed(model, 7, 8, session="small")


async def test_no_session_beyond_the_context(model: TokenModel) -> None:
    with pytest.raises(ContextFull):
        await model.open("large", CONTEXT + 1)
    await model.open("large", CONTEXT)


async def test_slots_are_counted_and_come_back(model: TokenModel) -> None:
    await model.open("t", 8)
    with pytest.raises(Overloaded):
        await model.open("u", 8)
    with pytest.raises(ValueError, match="open already"):
        await model.open("t", 8)
    await model.close("t")
    await model.open("u", 8)
    with pytest.raises(KeyError):
        await feed(model, 0, 1, session="t")
    await model.close("never opened")


async def test_a_slot_keeps_nothing_of_the_session_before(model: TokenModel) -> None:
    expected = await feed(model, 0, 5)
    await model.close("s")
    await model.open("s", CONTEXT)
    with pytest.raises(GapError):
        await feed(model, 1, 5)
    assert np.array_equal(await feed(model, 0, 5), expected)


async def test_sessions_in_one_forward_do_not_mix(model: TokenModel) -> None:
    await model.open("t", CONTEXT)
    alone = await feed(model, 0, 9)
    await model.rewind("s", 0)
    await feed(model, 0, 8, 0)
    other = IDS[20:26].copy()
    mine, its = await model.forward([Row("s", 8, IDS[8:9]), Row("t", 0, other, 2)])
    mine, its = mine.copy(), its.copy()
    assert np.array_equal(mine, alone)
    assert np.array_equal((await model.forward([Row("t", 0, other, 2)]))[0], its)


@pytest.mark.parametrize("bad", ["gap", "limit", "unknown"])
async def test_nothing_is_applied_when_one_row_is_wrong(model: TokenModel, bad: str) -> None:
    expected = await feed(model, 0, 6)
    await model.rewind("s", 5)
    await model.open("t", 4)
    wrong = {"gap": Row("t", 1, IDS[:1]), "limit": Row("t", 0, IDS[:5]), "unknown": Row("u", 0, IDS[:1])}[bad]
    with pytest.raises((GapError, ContextFull, KeyError)):
        await model.forward([Row("s", 5, IDS[5:8], 0), wrong])
    with pytest.raises(GapError):
        await feed(model, 6, 7)
    assert np.array_equal(await feed(model, 5, 6), expected)


async def test_shutdown_is_idempotent_and_final(model: TokenModel) -> None:
    await model.shutdown()
    await model.shutdown()
    with pytest.raises(EngineClosed):
        await model.open("v", 4)
