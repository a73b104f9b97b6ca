"""The onnxruntime engine on the real model: bit equality of rows in `stable` mode, and the TokenModel's edges."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgewise.engines.base import Row
from edgewise.engines.local import set_threads
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.errors import ContextFull, EngineClosed, EngineError
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull

TOKENS = 500


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(1000, 40000, TOKENS)


@pytest.fixture(scope="module")
def bundles(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Bundle]:
    """SmolLM2 with 6 layers a block (the default), 7 (uneven) and 30 (one graph)."""
    home = tmp_path_factory.mktemp("home")
    return {n: pull(str(smollm2_gguf), home=home, name=f"blocks-{n}", layers_per_block=n) for n in (6, 7, 30)}


async def logits(lm: OnnxLM, ids: np.ndarray, sizes: Sequence[int], session: str = "s") -> np.ndarray:
    """All logits of ids fed in chunks of those sizes."""
    out, position = [], 0
    for size in sizes:
        part = ids[position : position + size]
        out.append((await lm.forward([Row(session, position, part, len(part))]))[0].copy())
        position += len(part)
    assert position == len(ids)
    return np.concatenate(out)


@pytest.fixture(scope="module")
def at_once(bundles: dict[int, Bundle], ids: np.ndarray) -> np.ndarray:
    """All logits of one prefill through one graph."""

    async def run() -> np.ndarray:
        lm = OnnxLM(bundles[30], mode="stable", slots=1, context=1024)
        await lm.open("s", 1024)
        return await logits(lm, ids, [TOKENS])

    return asyncio.run(run())


@pytest.mark.parametrize("layers", [6, 7, 30])
@pytest.mark.parametrize(
    "sizes",
    [[1] * TOKENS, [37] * 13 + [19], [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 125], [129] * 3 + [113]],
    ids=len,
)
async def test_rows_have_the_same_bits_however_they_come(
    bundles: dict[int, Bundle], ids: np.ndarray, at_once: np.ndarray, layers: int, sizes: list[int]
) -> None:
    lm = OnnxLM(bundles[layers], mode="stable", slots=1, context=1024)
    await lm.open("s", 1024)
    assert np.array_equal(await logits(lm, ids, sizes), at_once)


async def test_rewound_and_repeated_rows_have_the_same_bits(
    bundles: dict[int, Bundle], ids: np.ndarray, at_once: np.ndarray
) -> None:
    lm = OnnxLM(bundles[6], mode="stable", slots=2, context=1024)
    await lm.open("s", 1024)
    await lm.open("other", 1024)
    await logits(lm, ids, [TOKENS])
    rng = np.random.default_rng(5)
    for _ in range(40):
        position = int(rng.integers(0, TOKENS - 20))
        size = int(rng.integers(1, 20))
        if rng.random() < 0.5:
            await lm.rewind("s", position)  # a row below the length rewinds by itself
        await lm.forward([Row("other", 0, ids[::-1][:size])])  # another slot's work in between
        part = ids[position : position + size]
        got = (await lm.forward([Row("s", position, part, size)]))[0]
        assert np.array_equal(got, at_once[position : position + size])
        rest = ids[position + size :]
        await lm.forward([Row("s", position + size, rest, 0)])


async def test_fast_mode_is_close(bundles: dict[int, Bundle], ids: np.ndarray, at_once: np.ndarray) -> None:
    """One-row kernels round differently; int8 activations amplify it. The distributions stay the same."""
    lm = OnnxLM(bundles[6], mode="fast", slots=1, context=1024)
    await lm.open("s", 1024)
    got = await logits(lm, ids[:100], [1] * 100)
    assert (got.argmax(-1) == at_once[:100].argmax(-1)).mean() > 0.9


async def test_several_sessions_in_one_forward(
    bundles: dict[int, Bundle], ids: np.ndarray, at_once: np.ndarray
) -> None:
    lm = OnnxLM(bundles[6], mode="stable", slots=3, context=600)
    for n in range(3):
        await lm.open(f"s{n}", 600)
    await lm.forward([Row(f"s{n}", 0, ids[: 10 + n], 0) for n in range(3)])
    got = await lm.forward([Row(f"s{n}", 10 + n, ids[10 + n : 20 + n], n) for n in range(3)])
    for n, part in enumerate(got):
        assert np.array_equal(part, at_once[20 : 20 + n])


async def test_the_last_position_of_the_context_works(bundles: dict[int, Bundle], ids: np.ndarray) -> None:
    for mode in ("fast", "stable"):
        lm = OnnxLM(bundles[6], mode=mode, slots=1, context=16)
        await lm.open("s", 16)
        await lm.forward([Row("s", 0, ids[:15], 0)])
        assert np.isfinite((await lm.forward([Row("s", 15, ids[15:16])]))[0]).all()
        with pytest.raises(ContextFull, match="17 tokens of context, the model has 16"):
            await lm.forward([Row("s", 16, ids[16:17])])


async def test_bad_ids_are_refused(bundles: dict[int, Bundle]) -> None:
    lm = OnnxLM(bundles[6], slots=1, context=16)
    await lm.open("s", 16)
    for bad in (-1, lm.vocab):
        with pytest.raises(ValueError, match="token ids must be"):
            await lm.forward([Row("s", 0, np.array([5, bad]))])


def test_a_context_beyond_the_model(bundles: dict[int, Bundle]) -> None:
    with pytest.raises(ContextFull):
        OnnxLM(bundles[6], context=8193)


async def test_after_shutdown(bundles: dict[int, Bundle]) -> None:
    lm = OnnxLM(bundles[6], slots=1, context=16)
    await lm.shutdown()
    await lm.shutdown()
    with pytest.raises(EngineClosed):
        await lm.open("s", 8)


def test_the_thread_pool_is_set_once(bundles: dict[int, Bundle]) -> None:
    OnnxLM(bundles[6], slots=1, context=16)
    with pytest.raises(EngineError, match="threads already"):
        set_threads(97)
