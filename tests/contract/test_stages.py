"""What every Stage promises, asked of each of them over a real model."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from edgewise.engines import native_lm
from edgewise.engines.base import Row, StageRow
from edgewise.engines.local import LocalModel, LocalStage
from edgewise.engines.native_lm import NativeLM
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.errors import ContextFull, EngineClosed, GapError, Overloaded, UsageError
from edgewise.models.bundle import Bundle

CONTEXT, SLOTS = 64, 3
IDS = np.random.default_rng(3).integers(0, 250, 40)
CUTS = (6, 12, 18)  # where blocks of six layers meet


@pytest.fixture(params=["onnx", "native"])
async def model(request: pytest.FixtureRequest, bundle: Bundle) -> AsyncIterator[LocalModel]:
    if request.param == "native" and native_lm.probe() is None:
        pytest.skip("the native kernels are not built for this machine")
    made: LocalModel = (
        NativeLM(bundle, slots=SLOTS, context=CONTEXT)
        if request.param == "native"
        else OnnxLM(bundle, mode="stable", slots=SLOTS, context=CONTEXT)
    )
    yield made
    await made.shutdown()


async def through(stage: LocalStage, hidden: np.ndarray, position: int = 0, want: int | None = None) -> np.ndarray:
    want = len(hidden) if want is None else want
    (out,) = await stage.forward([StageRow("s", position, hidden, want)])
    return out


async def test_two_stages_and_the_head_are_the_model(model: LocalModel) -> None:
    """To the last bit, whole and token by token, wherever it is cut: the boundary is the residual sum alone."""
    await model.open("whole", CONTEXT)
    (expected,) = await model.forward([Row("whole", 0, IDS, len(IDS))])
    expected = expected.copy()
    for cut in CUTS:
        front, back = model.stage(range(cut)), model.stage(range(cut, model.card.layers))
        await front.open("s", CONTEXT, front.layers)
        await back.open("s", CONTEXT, back.layers)
        pieces = [(0, 25), *((n, n + 1) for n in range(25, len(IDS)))]
        logits = np.empty_like(expected)
        for start, end in pieces:
            boundary = await through(front, model.embed(IDS[start:end]), start)
            model.project(await through(back, boundary, start), logits[start:end])
        assert np.array_equal(logits, expected)


async def test_only_what_is_wanted_comes_out(model: LocalModel) -> None:
    stage = model.stage()
    await stage.open("s", CONTEXT, stage.layers)
    hidden = model.embed(IDS[:9])
    everything = await through(stage, hidden)
    assert everything.shape == (9, stage.hidden)
    assert everything.dtype == np.float32
    assert np.array_equal(await through(stage, hidden, want=2), everything[7:])
    assert (await through(stage, hidden, want=0)).shape == (0, stage.hidden)
    assert stage.length("s") == 9


async def test_a_row_below_the_length_rewinds_and_a_gap_is_an_error(model: LocalModel) -> None:
    stage = model.stage(range(6))
    await stage.open("s", CONTEXT, stage.layers)
    hidden = model.embed(IDS)
    expected = await through(stage, hidden[:20])
    await through(stage, hidden[5:30][::-1].copy(), 3, 0)
    assert np.array_equal(await through(stage, hidden[3:20], 3), expected[3:])
    assert np.array_equal(await through(stage, hidden[3:20], 3), expected[3:])
    with pytest.raises(GapError) as caught:
        await through(stage, hidden[:1], 21)
    assert caught.value.length == 20
    await stage.rewind("s", 4)
    with pytest.raises(GapError):
        await stage.rewind("s", 5)
    with pytest.raises(ContextFull):
        await through(stage, model.embed(np.resize(IDS, CONTEXT)), 4)


async def test_sessions_of_different_layers_share_a_forward(model: LocalModel) -> None:
    stage = model.stage()
    hidden = model.embed(IDS)
    ranges = {"a": range(6), "b": range(6, 18), "c": range(6)}
    alone = {}
    for name, layers in ranges.items():
        await stage.open(name, CONTEXT, layers)
        (alone[name],) = await stage.forward([StageRow(name, 0, hidden[:7], 7)])
        await stage.rewind(name, 0)
    together = await stage.forward([StageRow(name, 0, hidden[:7], 7) for name in ranges])
    for name, out in zip(ranges, together, strict=True):
        assert np.array_equal(out, alone[name])
    assert not np.array_equal(alone["a"], alone["b"])


async def test_a_stage_gives_its_own_layers_alone(model: LocalModel) -> None:
    stage = model.stage(range(6, 18))
    for layers in (range(18), range(6, 24), range(12, 12), range(18, 12)):
        with pytest.raises(UsageError, match="holds 6 to 18"):
            await stage.open("s", CONTEXT, layers)
    await stage.open("s", CONTEXT, range(12, 18))
    with pytest.raises(ValueError, match="float32"):
        await through(stage, np.zeros((2, stage.hidden + 1), np.float32))
    with pytest.raises(KeyError):
        await stage.forward([StageRow("t", 0, np.zeros((1, stage.hidden), np.float32), 1)])


async def test_a_cut_inside_a_block_graph_is_refused_where_blocks_are_graphs(model: LocalModel) -> None:
    if model.cuts_at(7):
        assert isinstance(model, NativeLM)
        model.stage(range(7))
    else:
        with pytest.raises(UsageError, match=r"\[0, 6, 12, 18, 24, 30\]"):
            model.stage(range(7))


async def test_slots_are_counted_come_back_and_end_with_the_model(model: LocalModel) -> None:
    stage = model.stage()
    for n in range(SLOTS):
        await stage.open(f"{n}", CONTEXT, stage.layers)
    with pytest.raises(Overloaded):
        await stage.open("more", CONTEXT, stage.layers)
    await stage.close("0")
    await stage.close("never opened")
    await stage.open("more", CONTEXT, range(6))
    await model.shutdown()
    with pytest.raises(EngineClosed):
        await stage.open("again", CONTEXT, stage.layers)
