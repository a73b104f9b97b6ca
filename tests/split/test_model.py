"""A split model beside the whole one: the same tokens, whatever happens to the worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from edgewise.engines.decode import Decoder
from edgewise.engines.load import local_model
from edgewise.errors import TailLost, UsageError
from edgewise.models.bundle import Bundle
from edgewise.split.model import SplitModel, SplitOptions
from edgewise.types import Sampling
from split.conftest import WorkerProcess
from split.edges import PROMPTS, ask_until, edge, ids, tokens


@pytest.mark.parametrize("options", [{"cut": 1}, {"cut": 17}, {"cut": 29}, {"cut": 10, "head": "edge"}], ids=str)
async def test_exact_rows_give_the_whole_models_tokens(
    bundle: Bundle, worker: WorkerProcess, whole: Decoder, options: dict[str, Any]
) -> None:
    async with edge(bundle, worker.url, **options) as split:
        for prompt in PROMPTS:
            mine, expected = await tokens(split.decoder, prompt), await tokens(whole, prompt)
            assert ids(mine) == ids(expected)
            for a, b in zip(mine, expected, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-6)
        assert split.model.tally.here == 0
        assert split.model.tally.there == 48 * len(PROMPTS)


@pytest.mark.parametrize(
    "wishes",
    [
        {"sampling": Sampling(temperature=0.9, seed=7, top_p=0.95)},
        {"sampling": Sampling(repetition_penalty=1.3, logit_bias=((260, 4.0),))},
        {"logprobs": True, "top_logprobs": 5},
    ],
    ids=["drawn", "penalties", "alternatives"],
)
async def test_all_that_a_decoder_does_works_over_a_split(
    bundle: Bundle, worker: WorkerProcess, whole: Decoder, wishes: dict[str, Any]
) -> None:
    async with edge(bundle, worker.url) as split:
        mine, expected = await tokens(split.decoder, PROMPTS[0], **wishes), await tokens(whole, PROMPTS[0], **wishes)
    assert ids(mine) == ids(expected)
    assert [[c.id for c in t.top] for t in mine] == [[c.id for c in t.top] for t in expected]


async def test_sessions_at_once_and_prompts_with_a_common_start(
    bundle: Bundle, worker: WorkerProcess, whole: Decoder
) -> None:
    prompts = [*PROMPTS, PROMPTS[0] + " the storm", PROMPTS[0] + " the sea"]
    async with edge(bundle, worker.url) as split:
        mine = await asyncio.gather(*(tokens(split.decoder, prompt, 32) for prompt in prompts))
        again = await tokens(split.decoder, prompts[-1], 32)
    expected = [await tokens(whole, prompt, 32) for prompt in prompts]
    assert [ids(one) for one in mine] == [ids(one) for one in expected]
    assert ids(again) == ids(expected[-1])


async def test_a_worker_that_is_killed_costs_no_token_and_takes_over_when_it_is_back(
    bundle: Bundle, start_worker: Callable[..., WorkerProcess], whole: Decoder
) -> None:
    worker = start_worker()
    expected = ids(await tokens(whole, PROMPTS[0], 300))
    async with edge(bundle, worker.url) as split:
        mine = await tokens(split.decoder, PROMPTS[0], 300, {20: worker.kill, 60: worker.start})
        tally = split.model.tally
        assert ids(mine) == expected
        assert (tally.losses, tally.here > 0) == (1, True)
        await ask_until(lambda: tally.there > 20, split.decoder, PROMPTS[0], expected)
        assert tally.returns == 1
        assert tally.replayed > 0


@pytest.mark.parametrize("codec", ["int8", "int4"])
async def test_a_coded_boundary_survives_as_it_was_sent(
    bundle: Bundle, start_worker: Callable[..., WorkerProcess], worker: WorkerProcess, codec: str
) -> None:
    """Lossy rows give tokens of their own; with a cut in the middle they are still the same ones."""
    async with edge(bundle, worker.url, codec=codec) as split:
        expected = await tokens(split.decoder, PROMPTS[1], 80)
    victim = start_worker()
    async with edge(bundle, victim.url, codec=codec) as split:
        assert ids(await tokens(split.decoder, PROMPTS[1], 80, {30: victim.kill})) == ids(expected)
        assert split.model.tally.here > 0


async def test_without_a_tail_another_worker_is_brought_up_by_replay(
    bundle: Bundle, start_worker: Callable[..., WorkerProcess], whole: Decoder
) -> None:
    first, second = start_worker(), start_worker()
    async with edge(bundle, first.url, second.url, tail=False) as split:
        mine = await tokens(split.decoder, PROMPTS[2], 80, {25: first.kill})
        assert split.model.tally.here == 0
        assert split.model.tally.losses >= 1
    assert ids(mine) == ids(await tokens(whole, PROMPTS[2], 80))


async def test_without_a_tail_and_without_a_worker_the_ending_is_typed(
    bundle: Bundle, start_worker: Callable[..., WorkerProcess]
) -> None:
    worker = start_worker()
    async with edge(bundle, worker.url, tail=False, patience_s=0.5) as split:
        with pytest.raises(TailLost, match=r"layers 10 to 30 of smollm2 are out of reach after \d+ tokens") as caught:
            await tokens(split.decoder, PROMPTS[2], 80, {25: worker.kill})
        assert caught.value.retryable
        worker.start()
        assert len(await tokens(split.decoder, PROMPTS[2], 20)) == 20


async def test_the_cut_and_the_codec_move_while_a_generation_runs(
    bundle: Bundle, worker: WorkerProcess, whole: Decoder
) -> None:
    async with edge(bundle, worker.url) as split:
        moves = {n: (lambda cut=cut: split.model.move(cut)) for n, cut in ((15, 20), (30, 3), (45, 29))}
        mine = await tokens(split.decoder, PROMPTS[3], 64, moves)
        assert split.model.tally.here == 0
        split.model.move(12, "int8")
        assert len(await tokens(split.decoder, PROMPTS[3], 8)) == 8
        with pytest.raises(UsageError, match="cannot be cut at 30"):
            split.model.move(30)
    assert ids(mine) == ids(await tokens(whole, PROMPTS[3], 64))


async def test_nobody_there_is_no_hindrance_where_the_tail_is_here(bundle: Bundle, whole: Decoder) -> None:
    async with edge(bundle, "http://127.0.0.1:9") as split:
        assert ids(await tokens(split.decoder, PROMPTS[0])) == ids(await tokens(whole, PROMPTS[0]))
        assert split.model.tally.there == 0


async def test_bytes_are_those_of_the_codec(bundle: Bundle, worker: WorkerProcess) -> None:
    async with edge(bundle, worker.url, codec="int8") as split:
        await tokens(split.decoder, "Hello", 10)
        rows = split.model.tally.bytes_up // split.model.tally.there
        assert split.model.tally.bytes_down == 8 * 10
        assert rows <= 640


@pytest.mark.parametrize("cut", [0, 30, 31])
def test_a_cut_that_cannot_be_is_refused(bundle: Bundle, cut: int) -> None:
    with pytest.raises(UsageError, match=f"cannot be cut at {cut}"):
        SplitModel(local_model(bundle), bundle.weights, [], SplitOptions(cut))


async def test_a_session_that_the_worker_refuses_does_not_hurt_the_others(
    bundle: Bundle, worker: WorkerProcess, whole: Decoder
) -> None:
    """It has four slots, and six sessions ask for one."""
    async with edge(bundle, worker.url) as one, edge(bundle, worker.url) as two:
        answers = await asyncio.gather(*(tokens(e.decoder, p, 32) for e in (one, two) for p in PROMPTS[:3]))
    expected = [ids(await tokens(whole, prompt, 32)) for prompt in PROMPTS[:3]]
    assert [ids(answer) for answer in answers] == expected * 2
