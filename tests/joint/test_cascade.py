import asyncio
import math
from contextlib import aclosing
from dataclasses import replace

import pytest
from clock import run
from tiers import CLOUD_TEXT, EDGE_TEXT, SURE, UNSURE, ask, cloud, edge, policy, see, tier

from edgewise.engines.base import Capabilities
from edgewise.engines.fake import FakeGenerator
from edgewise.errors import (
    ContextFull,
    DeadlineExceeded,
    EngineClosed,
    EngineError,
    Overloaded,
    RequestError,
    Unreachable,
)
from edgewise.joint.breaker import Breaker
from edgewise.joint.cascade import Cascade
from edgewise.joint.policy import Policy
from edgewise.types import Chunk, Sampling


def once(edge, cloud=None, rule=None, **wishes):
    """One request through a new cascade: what its caller saw, and the cascade."""
    cascade = Cascade(edge, cloud, rule, Breaker(clock=lambda: 0.0))
    return run(see(cascade, ask(**wishes))), cascade


# Who answers


@pytest.mark.parametrize("stream", [False, True])
def test_a_confident_edge_answers_and_the_cloud_hears_nothing(stream):
    far = cloud()
    seen, _ = once(edge(SURE), far, stream=stream)
    assert (seen.text, seen.way) == (EDGE_TEXT, ("edge", "confident"))
    assert seen.decision.confidence == pytest.approx(math.exp(SURE))
    assert far.requests == []


def test_a_whole_answer_is_judged_when_it_is_whole():
    near, far = edge(), cloud()
    seen, _ = once(near, far)
    assert (seen.text, seen.way) == (CLOUD_TEXT, ("cloud", "unsure"))
    assert near.finished == far.finished == 1
    assert seen.first_s == seen.total_s == pytest.approx(0.41 + 0.13)


def test_a_streamed_answer_is_judged_by_its_first_16_tokens():
    near, far = edge(), cloud()
    seen, _ = once(near, far, stream=True)
    assert (seen.text, seen.way) == (CLOUD_TEXT, ("cloud", "unsure"))
    assert seen.first_s == pytest.approx(0.16 + 0.01)
    assert near.cancelled == 1
    assert near.given <= 18


def test_a_confident_stream_flows_after_the_early_decision():
    seen, _ = once(edge(SURE), cloud(), stream=True)
    assert seen.first_s == pytest.approx(0.16)
    assert seen.total_s == pytest.approx(0.41)


def test_nothing_is_held_back_where_no_cloud_can_be_asked():
    breaker = Breaker(clock=lambda: 0.0)
    breaker.fail(breaker.acquire(), Unreachable("it is gone"))
    for far, reason in ((None, "no_cloud"), (cloud(), "breaker_open")):
        seen = run(see(Cascade(edge(), far, None, breaker), ask(stream=True)))
        assert (seen.text, seen.way) == (EDGE_TEXT, ("edge_fallback", reason))
        assert seen.first_s == pytest.approx(0.01)
        assert seen.decision.confidence == pytest.approx(math.exp(UNSURE))


def test_slow_tokens_are_held_no_longer_than_the_wait_after_the_first():
    seen, _ = once(edge(SURE, delay_s=0.4, start_delay_s=2.0), cloud(), stream=True)
    assert seen.first_s == pytest.approx(2.4 + 1.5)
    assert seen.way == ("edge", "confident")


def test_a_short_stream_is_judged_as_a_whole():
    rule = policy(whole={"threshold": 0.7}, early={"threshold": 0.99})
    seen, _ = once(tier("Yes.", math.log(0.8)), cloud(), rule, stream=True)
    assert seen.way == ("edge", "confident")


@pytest.mark.parametrize("stream", [False, True])
def test_the_threshold_itself_is_not_above_the_threshold(stream):
    at_half = edge(math.log(0.5))
    for threshold, route in ((0.5, "cloud"), (math.nextafter(0.5, 0), "edge")):
        seen, _ = once(at_half, cloud(), Policy.threshold(threshold), stream=stream)
        assert seen.decision.confidence == 0.5
        assert seen.decision.route == route


def test_no_logprobs_is_no_evidence():
    near = FakeGenerator(edge([None]).answer, can=Capabilities())
    seen, _ = once(near, cloud())
    assert seen.way == ("cloud", "no_evidence")
    assert seen.decision.confidence is None
    assert near.requests[0].logprobs is False


def test_a_looping_answer_is_malformed_however_sure():
    seen, _ = once(tier("on and " * 40, SURE), cloud())
    assert seen.way == ("cloud", "malformed")
    assert seen.decision.confidence == 0.0


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_cloud_the_edge_answers_all(stream):
    seen, _ = once(edge(), None, stream=stream)
    assert (seen.text, seen.way) == (EDGE_TEXT, ("edge_fallback", "no_cloud"))
    assert seen.total_s == pytest.approx(0.41)


# Wishes


@pytest.mark.parametrize("stream", [False, True])
def test_asked_for_the_edge_the_cloud_is_never_touched(stream):
    far = cloud()
    seen, _ = once(edge(), far, route="edge", stream=stream)
    assert (seen.text, seen.way) == (EDGE_TEXT, ("edge", "asked"))
    assert far.requests == []
    assert seen.first_s == pytest.approx(0.01 if stream else 0.41)  # nothing to decide, so nothing is held


@pytest.mark.parametrize("stream", [False, True])
def test_asked_for_the_edge_its_failure_is_the_answer(stream):
    far = cloud()
    seen, _ = once(edge(error=EngineError("out of memory")), far, route="edge", stream=stream)
    assert "out of memory" in str(seen.error)
    assert far.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_asked_for_the_cloud_it_answers_at_once(stream):
    near = edge(SURE)
    seen, _ = once(near, cloud(), route="cloud", stream=stream)
    assert (seen.text, seen.way) == (CLOUD_TEXT, ("cloud", "asked"))
    assert near.requests == []
    assert seen.total_s == pytest.approx(0.13)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("deadline_ms", [None, 600])
def test_asked_for_a_dead_cloud_the_edge_answers(stream, deadline_ms):
    far = cloud(hangs=True)
    seen, _ = once(edge(), far, route="cloud", stream=stream, deadline_ms=deadline_ms)
    assert (seen.text, seen.way) == (EDGE_TEXT, ("edge_fallback", "cloud_timeout"))
    assert seen.total_s == pytest.approx(0.55 if deadline_ms else 8.41)  # with a deadline, the edge runs beside it


# Time


@pytest.mark.parametrize("stream", [False, True])
def test_while_the_cloud_is_awaited_the_edge_goes_on(stream):
    seen, _ = once(edge(), cloud(start_delay_s=0.2, error=Unreachable("reset"), breaks_at=0), stream=stream)
    assert seen.way == ("edge_fallback", "cloud_unreachable")
    assert seen.total_s == pytest.approx(0.41 if stream else 0.41 + 0.21)


def test_the_cloud_gets_what_is_left_of_the_deadline_less_the_margin():
    far = cloud()
    once(edge(), far, deadline_ms=1000)
    assert far.requests[0].deadline_ms == pytest.approx(1000 - 410 - 50)


def test_with_no_time_left_the_cloud_is_not_asked():
    far = cloud()
    seen, _ = once(edge(), far, policy(edge={"deadline_share": 0.99}), deadline_ms=430)
    assert (seen.text, seen.way) == (EDGE_TEXT, ("edge_fallback", "deadline"))
    assert far.requests == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_slow_edge_hands_over_at_half_of_the_deadline(stream):
    near = edge(SURE, start_delay_s=30.0)
    seen, _ = once(near, cloud(), stream=stream, deadline_ms=1000)
    assert (seen.text, seen.way) == (CLOUD_TEXT, ("cloud", "edge_slow"))
    assert seen.first_s == pytest.approx(0.51 if stream else 0.63)
    assert near.cancelled == 1


def test_a_slow_edge_that_is_alone_still_answers_in_time():
    seen, _ = once(edge(start_delay_s=0.5), cloud(error=Unreachable("x")), deadline_ms=1000)
    assert (seen.text, seen.way) == (EDGE_TEXT, ("edge_fallback", "cloud_unreachable"))
    assert seen.decision.confidence == pytest.approx(math.exp(UNSURE))
    assert seen.total_s == pytest.approx(0.91)


def test_a_silent_edge_is_slow_without_a_deadline_too():
    seen, _ = once(edge(hangs=True), cloud())
    assert seen.way == ("cloud", "edge_slow")
    assert seen.total_s == pytest.approx(10.13)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("far", [None, cloud(hangs=True)])
def test_nobody_in_time_is_an_error_at_the_deadline(stream, far):
    seen, _ = once(edge(hangs=True), far, stream=stream, deadline_ms=800)
    assert seen.chunks == []
    assert isinstance(seen.error, DeadlineExceeded)
    assert seen.total_s == pytest.approx(0.8)


def test_a_confident_stream_ends_at_the_deadline():
    seen, _ = once(edge(SURE), cloud(), stream=True, deadline_ms=350)
    assert isinstance(seen.error, DeadlineExceeded)
    assert EDGE_TEXT.startswith(seen.text)
    assert seen.total_s == pytest.approx(0.35)


def test_the_policy_has_a_deadline_for_requests_without():
    seen, _ = once(edge(), cloud(hangs=True), policy(deadline_ms=600.0))
    assert seen.way == ("edge_fallback", "cloud_timeout")
    assert seen.total_s == pytest.approx(0.55)


def test_the_deadline_counts_from_the_call():
    async def late():
        stream = Cascade(edge(), cloud(hangs=True)).generate(ask(deadline_ms=600))
        await asyncio.sleep(0.1)
        chunks = [chunk async for chunk in stream]
        assert chunks[0].decision.route == "edge_fallback"
        assert asyncio.get_running_loop().time() == pytest.approx(0.55)

    run(late())


# Failures of the edge, and of both


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error", [EngineError("boom"), Overloaded("full"), ContextFull(9000, 4096), ValueError("a bug")]
)
def test_where_the_edge_fails_the_cloud_answers(stream, error):
    seen, _ = once(edge(error=error, breaks_at=3), cloud(), stream=stream)
    assert (seen.text, seen.way) == (CLOUD_TEXT, ("cloud", "edge_failed"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_bad_for_both(stream):
    far = cloud()
    seen, _ = once(edge(error=RequestError("no such thing", param="stop")), far, stream=stream)
    assert isinstance(seen.error, RequestError)
    assert far.requests == []


@pytest.mark.parametrize(
    "wishes", [{"max_tokens": 0}, {"deadline_ms": -5.0}, {"deadline_ms": math.nan}, {"stop": ("",)}]
)
def test_a_request_that_cannot_be_is_refused_before_any_tier_runs(wishes):
    near, far = edge(), cloud()
    seen, _ = once(near, far, **wishes)
    assert isinstance(seen.error, RequestError)
    assert near.requests == far.requests == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("route", "near", "far", "shown"),
    [
        ("auto", EngineError("edge"), Unreachable("cloud"), "edge"),
        ("cloud", EngineError("edge"), Unreachable("cloud"), "cloud"),
        ("cloud", ContextFull(9000, 4096), Unreachable("cloud"), "9000 tokens"),
        ("auto", ContextFull(9000, 4096), Unreachable("cloud"), "9000 tokens"),
        ("auto", EngineError("edge"), RequestError("wish"), "wish"),
        ("auto", EngineError("edge"), None, "edge"),
    ],
)
def test_of_two_errors_the_more_useful_is_shown(stream, route, near, far, shown):
    breaks_at = 0 if route == "cloud" or far is None else 2  # there the edge is handed on from its first token
    far = None if far is None else cloud(error=far)
    seen, cascade = once(edge(error=near, breaks_at=breaks_at), far, route=route, stream=stream)
    assert seen.chunks == []
    assert shown in str(seen.error)
    assert cascade.stats.errors == 1
    assert not cascade.stats.routes


def test_an_edge_that_breaks_after_its_text_was_sent_is_not_the_cloud_s_fault():
    seen, cascade = once(edge(SURE, error=EngineError("boom"), breaks_at=30), cloud(), stream=True)
    assert str(seen.error) == "boom"
    assert EDGE_TEXT.startswith(seen.text)
    assert cascade.breaker.state == "closed"


class Endless(FakeGenerator):
    """Ends without a last chunk, or goes on after it."""

    def __init__(self, *chunks: Chunk, hangs: bool = False) -> None:
        super().__init__()
        self.chunks, self.goes_on = chunks, hangs

    async def generate(self, request):
        for chunk in self.chunks:
            yield chunk
        if self.goes_on:
            await asyncio.Event().wait()


@pytest.mark.parametrize("chunks", [(), (Chunk("some"),), (Chunk("so"), Chunk("me"))])
def test_an_answer_without_its_last_chunk_is_broken(chunks):
    seen, _ = once(edge(), Endless(*chunks))
    assert (seen.text, seen.way) == (EDGE_TEXT, ("edge_fallback", "cloud_broken"))
    seen, _ = once(Endless(*chunks), cloud())
    assert (seen.text, seen.way) == (CLOUD_TEXT, ("cloud", "edge_failed"))


def test_nobody_waits_for_what_comes_after_the_last_chunk():
    seen, _ = once(edge(), Endless(Chunk("done", finish_reason="stop"), hangs=True))
    assert (seen.text, seen.way) == ("done", ("cloud", "unsure"))
    assert seen.total_s == pytest.approx(0.41)


@pytest.mark.parametrize("text", ["", "the answer"])
def test_an_empty_first_chunk_of_the_cloud_commits_to_nothing(text):
    far = Endless(Chunk(), Chunk(text), hangs=True)
    seen, _ = once(edge(), far, stream=True, deadline_ms=1000)
    if text:
        assert (seen.text, type(seen.error).__name__) == (text, "RemoteTimeout")
    else:
        assert (seen.text, seen.way) == (EDGE_TEXT, ("edge_fallback", "cloud_timeout"))


# The breaker


def test_a_dead_cloud_costs_one_request():
    clock = [0.0]
    far = cloud(hangs=True)
    cascade = Cascade(edge(), far, breaker=Breaker(clock=lambda: clock[0], chance=lambda: 0.0))

    async def many():
        seen = [await see(cascade, ask(deadline_ms=1000)) for _ in range(20)]
        clock[0] = 1.0
        far.answer = cloud().answer
        seen.append(await see(cascade, ask()))  # the probe runs behind its back
        await asyncio.sleep(1.0)
        return [*seen, await see(cascade, ask()), await see(cascade, ask(route="cloud"))]

    first, *others, back, last = run(many())
    assert first.way == ("edge_fallback", "cloud_timeout")
    assert {seen.way for seen in others} == {("edge_fallback", "breaker_open")}
    assert all(seen.total_s == pytest.approx(0.41) for seen in others)
    assert (back.way, last.way) == (("cloud", "unsure"), ("cloud", "asked"))
    assert len(far.requests) == 4


def test_only_one_request_probes():
    clock = [0.0]
    far = cloud(error=Unreachable("down"))
    cascade = Cascade(edge(), far, breaker=Breaker(clock=lambda: clock[0]))

    async def crowd():
        await see(cascade, ask())
        clock[0], far.answer = 1.0, cloud(start_delay_s=1.0).answer
        seen = await asyncio.gather(*(see(cascade, ask()) for _ in range(10)))
        assert len(far.requests) == 2
        await asyncio.sleep(2.0)
        return [*seen, await see(cascade, ask())]

    *during, after = run(crowd())
    assert {seen.way for seen in during} == {("edge_fallback", "breaker_open")}
    assert all(seen.total_s == pytest.approx(0.41) for seen in during)  # nobody waited for the probe
    assert after.way == ("cloud", "unsure")


@pytest.mark.parametrize("wish", ["cloud", "auto"])
def test_who_has_no_edge_answer_probes_for_himself(wish):
    clock = [0.0]
    near, far = edge(), cloud(error=Unreachable("down"))
    cascade = Cascade(near, far, breaker=Breaker(clock=lambda: clock[0]))

    async def later():
        await see(cascade, ask())
        clock[0], far.answer = 1.0, cloud().answer
        if wish == "auto":
            near.answer = edge(error=EngineError("out of memory")).answer
        return await see(cascade, ask(route=wish))

    assert run(later()).way == ("cloud", {"cloud": "asked", "auto": "edge_failed"}[wish])


def test_a_probe_of_a_dead_cloud_ends_by_itself():
    clock = [0.0]
    far = cloud(error=Unreachable("down"))
    cascade = Cascade(edge(), far, breaker=Breaker(clock=lambda: clock[0]))

    async def probe():
        await see(cascade, ask())
        clock[0], far.answer = 1.0, cloud(hangs=True).answer
        assert (await see(cascade, ask())).total_s == pytest.approx(0.41)
        assert cascade.breaker.state == "half_open"
        await asyncio.sleep(cascade.policy.cloud.first_token_ms / 1000 + 1)
        assert cascade.breaker.state == "open"
        clock[0], far.answer = 60.0, cloud().answer
        await see(cascade, ask())
        await asyncio.sleep(1.0)
        assert (await see(cascade, ask())).way == ("cloud", "unsure")

    run(probe())


def test_close_ends_a_probe():
    clock = [0.0]
    far = cloud(error=Unreachable("down"))
    cascade = Cascade(edge(), far, breaker=Breaker(clock=lambda: clock[0]))

    async def close():
        await see(cascade, ask())
        clock[0], far.answer = 1.0, cloud(hangs=True).answer
        await see(cascade, ask())
        await cascade.close()
        await asyncio.sleep(0.2)
        assert len(asyncio.all_tasks()) == 1

    run(close())


@pytest.mark.parametrize("stream", [False, True])
def test_a_cloud_that_a_deadline_gave_no_time_is_not_blamed(stream):
    seen, cascade = once(edge(), cloud(hangs=True), stream=stream, deadline_ms=800 if not stream else 600)
    assert seen.way == ("edge_fallback", "cloud_timeout")
    assert cascade.breaker.state == "closed"


def test_a_cloud_that_dies_in_the_middle_is_blamed():
    _, cascade = once(edge(), cloud(error=Unreachable("reset"), breaks_at=4), stream=True)
    assert cascade.breaker.state == "open"


# Leaving


@pytest.mark.parametrize("wishes", [{}, {"stream": True}, {"route": "cloud", "deadline_ms": 5000}])
@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.1, 0.2, 0.45])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_caller_who_is_cancelled_stops_both_tiers(wishes, after_s, hangs):
    near, far = edge(), cloud(hangs=hangs)

    async def leave():
        task = asyncio.create_task(see(Cascade(near, far), ask(**wishes)))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.wait([task])

    run(leave())
    for side in (near, far):
        assert side.active == 0
        assert side.finished + side.cancelled == len(side.requests)


@pytest.mark.parametrize("logprob", [SURE, UNSURE])
@pytest.mark.parametrize("reads", [1, 2, 5])
def test_closing_the_iterator_stops_both_tiers(logprob, reads):
    near, far = edge(logprob), cloud()

    async def leave():
        async with aclosing(Cascade(near, far).generate(ask(stream=True))) as chunks:
            for _ in range(reads):
                await anext(chunks)
        assert (near.active, far.active) == (0, 0)

    run(leave())
    assert near.cancelled == 1
    assert far.cancelled == (logprob == UNSURE)


def test_an_iterator_that_is_never_read_starts_nothing():
    near = edge()

    async def leave():
        await Cascade(near).generate(ask()).aclose()

    run(leave())
    assert near.requests == []


class Clinging(FakeGenerator):
    """Takes ten seconds to be cancelled."""

    async def generate(self, request):
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(10)
        yield Chunk("never", finish_reason="stop")


def test_a_cloud_that_will_not_go_does_not_hold_up_the_caller():
    async def go():
        cascade = Cascade(edge(), Clinging())
        seen = await see(cascade, ask(deadline_ms=1000))
        assert seen.way == ("edge_fallback", "cloud_timeout")
        assert seen.total_s == pytest.approx(0.95, abs=0.11)
        await asyncio.sleep(11)

    run(go())


def test_close_ends_the_requests_and_the_tiers():
    near, far = edge(hangs=True), cloud()

    async def close():
        cascade = Cascade(near, far)
        task = asyncio.create_task(see(cascade, ask()))
        await asyncio.sleep(0.1)
        await cascade.close()
        seen, after = await task, await see(cascade, ask())
        assert isinstance(seen.error, EngineClosed)
        assert isinstance(after.error, EngineClosed)

    run(close())
    assert near.closed
    assert far.closed
    assert far.requests == []


# What passes through


def test_tokens_usage_and_model_come_as_the_tier_gave_them():
    near = FakeGenerator(edge(SURE).answer, name="small")
    seen, _ = once(near, cloud(), top_logprobs=2, logprobs=True)
    tokens = [token for chunk in seen.chunks for token in chunk.tokens]
    assert b"".join(token.raw for token in tokens).decode() == EDGE_TEXT
    assert {token.logprob for token in tokens} == {SURE}
    assert {len(token.top) for token in tokens} == {2}
    assert {chunk.model for chunk in seen.chunks} == {"small"}
    assert seen.chunks[-1].usage.completion_tokens == 40
    assert near.requests[0].logprobs


def test_the_edge_always_gives_logprobs_and_the_cloud_only_where_asked():
    near, far = edge(), cloud()
    once(near, far)
    assert (near.requests[0].logprobs, far.requests[0].logprobs) == (True, False)
    assert (near.requests[0].route, far.requests[0].route) == ("auto", "auto")


def test_a_cascade_can_what_both_can():
    small = FakeGenerator(can=replace(FakeGenerator.can, top_logprobs=5, context=2048, vocab=300))
    large = FakeGenerator(can=replace(FakeGenerator.can, context=8192, sampling=frozenset({"top_k", "logit_bias"})))
    both = Capabilities(
        logprobs=True, top_logprobs=5, seed=True, sampling=frozenset({"top_k"}), context=8192
    )  # ids mean the tokens of one model
    assert Cascade(small, large).can == both
    assert Cascade(small).can == small.can


def test_the_same_sampling_goes_to_both_tiers():
    near, far = edge(), cloud()
    wish = Sampling(0.5, 0.9, 3, 40, 0.1, 0.2, 0.3, 1.1)
    once(near, far, sampling=wish)
    assert near.requests[0].sampling == far.requests[0].sampling == wish


def test_a_bias_is_for_the_edge_alone():
    near, far = edge(), cloud()
    wish = Sampling(logit_bias=((5, 1.0),))
    refused, _ = once(near, far, sampling=wish)
    assert isinstance(refused.error, RequestError)
    assert "ask the edge alone" in str(refused.error)
    seen, _ = once(near, far, sampling=wish, route="edge")
    assert seen.text == EDGE_TEXT
    assert (len(near.requests), len(far.requests)) == (1, 0)


def test_it_counts():
    cascade = Cascade(edge(), cloud(start_delay_s=0.5))

    async def go():
        for wishes in ({}, {"route": "edge"}, {"route": "cloud"}, {"stream": True}):
            await see(cascade, ask(**wishes))

    run(go())
    assert cascade.stats.routes == {"cloud": 3, "edge": 1}
    assert cascade.stats.reasons == {"unsure": 2, "asked": 2}
    assert cascade.stats.escalations == 3
    assert cascade.stats.escalation_s == pytest.approx(0.63 + 0.63 + 0.51)
    assert cascade.stats.errors == 0
