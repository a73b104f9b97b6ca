"""Links that break while a split model answers: the tokens are those of an undisturbed answer, each once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from edgewise.bench.relay import Relay
from edgewise.devices.links import LINKS, LinkProfile
from edgewise.engines.decode import Decoder
from edgewise.models.bundle import Bundle
from edgewise.split.channel import Channel, Patience, Way
from edgewise.wire.frame import Hello
from served import eventually
from split.conftest import WorkerProcess
from split.edges import PROMPTS, ask_until, edge, ids, tokens

LAN = LINKS["lan"]
NARROW = LinkProfile("narrow", 5_000, 5_000, 500)


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


def hello(bundle: Bundle) -> Hello:
    return Hello(bundle.name, bundle.weights, "any")


@pytest.mark.parametrize(("link", "times"), [(LINKS["dsl"], 3), (NARROW, 1)], ids=["dsl", "narrow"])
async def test_a_slow_link_is_not_a_dead_one(
    bundle: Bundle, worker: WorkerProcess, link: LinkProfile, times: int
) -> None:
    """A long prompt's rows take seconds on their way."""
    prompt = " ".join(PROMPTS) * times
    with Relay(worker.url, link) as relay:
        async with edge(bundle, relay.url, codec="int8") as split:
            await tokens(split.decoder, prompt, 6)
            assert split.model.tally.losses == 0
            assert split.model.tally.here == 0


def test_a_way_that_became_slow_is_given_more_time_until_it_answers() -> None:
    patience = Patience()
    for _ in range(20):
        patience.learn(0.020, 0.010, 1, 700)
    usual_s = patience.timeout_s(1, 700)
    given_up = 0
    while patience.timeout_s(1, 700) < 3:
        patience.gave_up(700)
        given_up += 1
    assert given_up < 8
    for _ in range(20):
        patience.learn(0.020, 0.010, 1, 700)
    assert patience.timeout_s(1, 700) == usual_s


def test_a_way_that_became_narrow_is_given_more_time_too() -> None:
    patience, size = Patience(), 100_000
    patience.learn(0.02, 0.0, 0, 60)
    patience.learn(0.12, 0.0, 100, size)  # 1 MB/s
    before_s = patience.timeout_s(100, size)
    for _ in range(12):
        patience.gave_up(size)
    assert patience.timeout_s(100, size) > max(50, 10 * before_s)


@pytest.mark.parametrize("tail", [True, False])
async def test_a_connection_that_ended_unnoticed_is_mended_by_the_next_answer(
    bundle: Bundle, worker: WorkerProcess, whole: Decoder, tail: bool
) -> None:
    """The session stays open on both sides, so that nothing is asked of the worker before the first token."""
    expected = ids(await tokens(whole, PROMPTS[3], 40))
    with Relay(worker.url, LAN) as relay:
        async with edge(bundle, relay.url, tail=tail) as split:
            assert ids(await tokens(split.decoder, PROMPTS[3], 40)) == expected
            relay.reset()
            eventually(lambda: not split.model.connected)
            there = split.model.tally.there
            assert ids(await tokens(split.decoder, PROMPTS[3], 40)) == expected
            await ask_until(lambda: split.model.tally.there > there, split.decoder, PROMPTS[3], expected)
            assert split.model.tally.losses == 1


async def test_a_model_that_is_shut_down_while_it_gives_up_a_worker_leaves_no_socket(
    bundle: Bundle, worker: WorkerProcess
) -> None:
    """The good-bye of a connection in a black hole takes a while, and whoever says it is stopped."""
    with Relay(worker.url, LAN) as relay:
        channel = await Channel.open(Way(relay.url), hello(bundle), Patience())
        relay.stall()
        closing = asyncio.create_task(channel.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        assert closing.cancelled()
        assert channel._socket.transport.is_closing()


async def test_several_flaps_in_one_answer(bundle: Bundle, worker: WorkerProcess, whole: Decoder) -> None:
    flaps = dict(zip(range(10, 310, 25), 4 * ("cut", "restore", "reset"), strict=True))
    with Relay(worker.url, LAN) as relay:
        async with edge(bundle, relay.url) as split:
            mine = await tokens(split.decoder, PROMPTS[0], 320, {n: getattr(relay, f) for n, f in flaps.items()})
            assert split.model.tally.there + split.model.tally.here == 320
    assert ids(mine) == ids(await tokens(whole, PROMPTS[0], 320))


@pytest.mark.parametrize("cut", [1, 15, 29])
async def test_a_round_trip_of_25_ms_changes_nothing(
    bundle: Bundle, worker: WorkerProcess, whole: Decoder, cut: int
) -> None:
    with Relay(worker.url, LINKS["5g"]) as relay:
        async with edge(bundle, relay.url, cut=cut) as split:
            mine = await tokens(split.decoder, PROMPTS[2], 16)
            assert (split.model.tally.there, split.model.tally.losses) == (16, 0)
    assert ids(mine) == ids(await tokens(whole, PROMPTS[2], 16))
