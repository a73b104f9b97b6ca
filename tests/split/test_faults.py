"""Links that break while a split model answers: the tokens are those of an undisturbed answer, each once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from edgewise.bench.relay import Relay
from edgewise.devices.links import LINKS
from edgewise.engines.decode import Decoder
from edgewise.models.bundle import Bundle
from split.conftest import WorkerProcess
from split.edges import PROMPTS, ask_until, edge, ids, tokens

LAN = LINKS["lan"]


async def test_a_black_hole_is_noticed_and_the_worker_comes_back(
    bundle: Bundle, worker: WorkerProcess, whole: Decoder
) -> None:
    expected = ids(await tokens(whole, PROMPTS[0], 120))
    with Relay(worker.url, LAN) as relay:
        async with edge(bundle, relay.url) as split:
            mine = await tokens(split.decoder, PROMPTS[0], 120, {20: relay.stall})
            assert ids(mine) == expected
            assert split.model.tally.here > 0
            assert split.model.tally.losses >= 1
            relay.resume()
            await ask_until(lambda: split.model.tally.returns, split.decoder, PROMPTS[0], expected)


async def test_a_stall_that_ends_in_time_loses_nothing_and_counts_nothing_twice(
    bundle: Bundle, worker: WorkerProcess, whole: Decoder
) -> None:
    """The answer that was late comes in the end; the token is there already."""
    with Relay(worker.url, LAN) as relay:
        async with edge(bundle, relay.url) as split:
            mine = await tokens(split.decoder, PROMPTS[1], 200, {15: relay.stall, 60: relay.resume})
            assert split.model.tally.there + split.model.tally.here == 200
    assert ids(mine) == ids(await tokens(whole, PROMPTS[1], 200))


@pytest.mark.parametrize("fault", ["cut", "reset", "stall"])
async def test_without_a_tail_an_answer_waits_for_the_link(
    bundle: Bundle, worker: WorkerProcess, whole: Decoder, fault: str
) -> None:
    with Relay(worker.url, LAN) as relay:
        async with edge(bundle, relay.url, tail=False) as split:

            def happen() -> None:
                getattr(relay, fault)()
                back = {"cut": relay.restore, "stall": relay.resume}.get(fault)
                if back is not None:
                    asyncio.get_running_loop().call_later(0.4, back)

            mine = await tokens(split.decoder, PROMPTS[2], 60, {20: happen})
            assert split.model.tally.here == 0
    assert ids(mine) == ids(await tokens(whole, PROMPTS[2], 60))


async def test_thirty_random_faults(bundle: Bundle, worker: WorkerProcess, whole: Decoder) -> None:
    expected = {prompt: ids(await tokens(whole, prompt, 60)) for prompt in PROMPTS}
    draw = random.Random(5)
    with Relay(worker.url, LAN) as relay:
        async with edge(bundle, relay.url) as split:
            for number in range(30):
                prompt, at = PROMPTS[number % len(PROMPTS)], draw.randrange(1, 58)
                happen: Callable[[], object] = (relay.reset, relay.cut, relay.stall)[number % 3]
                found = await tokens(split.decoder, prompt, 60, {at: happen})
                assert ids(found) == expected[prompt], (number, at)
                relay.restore()
                relay.resume()
            assert split.model.tally.losses > 0


async def test_four_sessions_at_once_survive_one_cut(bundle: Bundle, worker: WorkerProcess, whole: Decoder) -> None:
    expected = [ids(await tokens(whole, prompt, 80)) for prompt in PROMPTS]
    with Relay(worker.url, LAN) as relay:
        async with edge(bundle, relay.url) as split:
            answers = await asyncio.gather(
                tokens(split.decoder, PROMPTS[0], 80, {20: relay.cut, 50: relay.restore}),
                *(tokens(split.decoder, prompt, 80) for prompt in PROMPTS[1:]),
            )
    assert [ids(answer) for answer in answers] == expected


async def test_a_slow_link_is_not_a_dead_one(bundle: Bundle, worker: WorkerProcess, whole: Decoder) -> None:
    """A long prompt's rows take seconds on their way."""
    prompt = " ".join(PROMPTS) * 3
    with Relay(worker.url, LINKS["dsl"]) as relay:
        async with edge(bundle, relay.url, codec="int8") as split:
            await tokens(split.decoder, prompt, 6)
            assert split.model.tally.losses == 0
            assert split.model.tally.here == 0
