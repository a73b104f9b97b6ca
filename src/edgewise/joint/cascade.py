"""The cascade: two Generators that answer as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

from edgewise.engines.answer import check_request
from edgewise.engines.base import Capabilities, Generator, Predictor
from edgewise.errors import (
    DeadlineExceeded,
    EdgewiseError,
    EngineError,
    Forbidden,
    RemoteBroken,
    RemoteError,
    RemoteTimeout,
    Unreachable,
)
from edgewise.joint.breaker import Breaker
from edgewise.joint.core import Case, Core, Reason, Stats, Trail, Verdict, verdict
from edgewise.joint.policies import Policies
from edgewise.joint.policy import Policy
from edgewise.joint.privacy import Rules
from edgewise.joint.replay_log import ReplayLog, Seen, likeness
from edgewise.joint.signals.evidence import Evidence
from edgewise.types import Chunk, Request, Timings

Tier = TypeVar("Tier", Generator, Predictor)

ALTERNATIVES = 5  # to each token, where signals of them are wanted
EDGE_ALONE = "either tier may answer: ask the edge alone (route or model `edge`)"


class Tiers(Generic[Tier]):
    """What every cascade is made of: an edge, perhaps a cloud, and the core that decides between them."""

    def __init__(
        self,
        edge: Tier,
        cloud: Tier | None,
        policy: Policy | Policies,
        breaker: Breaker | None,
        name: str,
        log: ReplayLog | None,
    ) -> None:
        self.name = name
        self.breaker = breaker or Breaker()
        self.log = log
        self._edge: Tier = edge
        self._cloud: Tier | None = cloud
        self._policies = policy if isinstance(policy, Policies) else None
        self._core = Core(policy.current() if isinstance(policy, Policies) else policy, self.breaker)

    @property
    def policy(self) -> Policy:
        """The policy of requests from now on, which may be another each time; those under way keep theirs."""
        if self._policies is not None:
            self._core.policy = self._policies.current()
        return self._core.policy

    @property
    def stats(self) -> Stats:
        """Counts for metrics; `breaker.state` stands beside them."""
        return self._core.stats

    async def close(self) -> None:
        await self._core.close()
        if self.log is not None:
            self.log.close()
        await self._edge.close()
        if self._cloud is not None:
            await self._cloud.close()


class Cascade(Tiers[Generator]):
    """A Generator over two. The edge answers; where it is not sure enough, the cloud does; where the cloud does not
    deliver in time, the edge's answer stands. The first and the last chunk carry the same Decision.

    Whole answers are judged when they are whole. Streamed ones (`request.stream`) are judged by their first tokens,
    which are held back for that; what was sent is never taken back. A cloud that dies after its text was sent is a
    RemoteError from the iterator, which says how much was sent. `rules` say which requests must not leave the edge;
    Forbidden if such a one asks for the cloud. The `log` gets all requests that leave the choice to the cascade and
    meet no rule. The edge's tokens carry log-probabilities wherever it has them, whether or not the request asked.
    The cascade owns its tiers and its log: `close` closes them.
    """

    def __init__(
        self,
        edge: Generator,
        cloud: Generator | None = None,
        policy: Policy | Policies | None = None,
        breaker: Breaker | None = None,
        *,
        name: str = "auto",
        rules: Rules | None = None,
        log: ReplayLog | None = None,
    ) -> None:
        super().__init__(edge, cloud, policy or Policy.default(), breaker, name, log)
        self.rules = rules
        self.can = edge.can if cloud is None else _both(edge.can, cloud.can)

    def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        return self._answer(request, asyncio.get_running_loop().time())

    async def _answer(self, request: Request, arrived: float) -> AsyncGenerator[Chunk]:
        check_request(request, self._edge.can if request.route == "edge" else self.can, elsewhere=EDGE_ALONE)
        sent, decision, first_s, top = 0, None, 0.0, request.top_logprobs
        clock = asyncio.get_running_loop().time
        async with aclosing(self._core.run(self._case(request, arrived))) as pairs:
            try:
                async for chunk, made in pairs:
                    chunk = _as_asked(chunk, top)
                    if decision is None:
                        decision, first_s = made, clock() - arrived
                        chunk = replace(chunk, decision=made)
                    if _is_last(chunk):
                        timings = _as_seen(chunk.timings, first_s if request.stream else None, clock() - arrived)
                        chunk = replace(chunk, decision=made, timings=timings)
                    yield chunk
                    sent += len(chunk.text)
            except Exception as error:
                if decision is None or decision.route != "cloud":
                    raise
                raise _cut_short(error, sent) from error

    def _case(self, request: Request, arrived: float) -> Case[Chunk]:
        """Where a rule keeps the request here, there is no cloud in its case: nothing could be sent by any path."""
        rule = request.stay or (None if self.rules is None else self.rules.of_request(request))
        if rule is not None and request.route == "cloud":
            raise Forbidden(rule)
        request = replace(request, stay=rule)  # an edge that has tiers of its own must know it too
        cloud = None if rule is not None else self._cloud
        policy = self.policy
        deadline_ms = policy.deadline_ms if request.deadline_ms is None else request.deadline_ms
        asked = Evidence(request.asked, request.group)
        return Case(
            edge=partial(self._ask_edge, request, policy),
            cloud=None if cloud is None else partial(self._ask_cloud, cloud, request),
            judge=partial(_judge_text, policy, asked),
            enough=partial(_enough, policy),
            speaks=lambda chunk: bool(chunk.text) or _is_last(chunk),
            ends=_is_last,
            stream=request.stream,
            wish=request.route,
            deadline=None if deadline_ms is None else arrived + deadline_ms / 1000,
            no_cloud=Reason.NO_CLOUD if rule is None else Reason.PRIVATE,
            follow=None if rule is not None or self.log is None else self.log.follow(partial(_seen, asked)),
        )

    def _ask_edge(self, request: Request, policy: Policy) -> AsyncIterator[Chunk]:
        """Without the deadline, which the core keeps, and with all that a judge may want to see."""
        can = self._edge.can
        wanted = ALTERNATIVES if policy.needs_alternatives or self.log is not None else 0
        asked = replace(
            request,
            route="auto",
            deadline_ms=None,
            logprobs=request.logprobs or can.logprobs,
            top_logprobs=max(request.top_logprobs, min(wanted, can.top_logprobs)),
        )
        return _whole(self._edge.generate(asked), EngineError(f"{self._edge.name} broke off its answer"))

    def _ask_cloud(self, cloud: Generator, request: Request, left_s: float | None) -> AsyncIterator[Chunk]:
        asked = replace(request, route="auto", deadline_ms=None if left_s is None else left_s * 1000)
        return _whole(cloud.generate(asked), RemoteBroken(f"{cloud.name} broke off its answer"))


def _judge_text(policy: Policy, asked: Evidence, chunks: Sequence[Chunk], whole: bool) -> Verdict:
    """Of a whole answer, or of its beginning. A policy without early decisions waits for the whole, as long as the
    request lets it."""
    evidence = _answered(asked, chunks, whole)
    if whole:
        return verdict(policy.whole.judge, evidence, policy.whole.threshold)
    if policy.early is None:
        return Verdict(None, Reason.EDGE_SLOW)
    return verdict(policy.early.judge or policy.whole.judge, evidence, policy.early.threshold)


def _answered(asked: Evidence, chunks: Sequence[Chunk], whole: bool) -> Evidence:
    tokens = [token for chunk in chunks for token in chunk.tokens]
    return asked.answered(
        text="".join(chunk.text for chunk in chunks),
        logprobs=[token.logprob for token in tokens],
        tokens=tokens,
        finish_reason=chunks[-1].finish_reason if whole and chunks else None,
    )


def _seen(asked: Evidence, trail: Trail[Chunk]) -> Sequence[Seen]:
    near, far = (None if chunks is None else _answered(asked, chunks, True) for chunks in (trail.edge, trail.cloud))
    alike = None if near is None or far is None else likeness(near.text or "", far.text or "")
    return [Seen(trail.decision, near or asked, far, alike, trail.both)]


def _as_asked(chunk: Chunk, top: int) -> Chunk:
    """Without alternatives that a judge alone wanted."""
    if all(len(token.top) <= top for token in chunk.tokens):
        return chunk
    return replace(chunk, tokens=tuple(replace(token, top=token.top[:top]) for token in chunk.tokens))


def _enough(policy: Policy, chunks: Sequence[Chunk]) -> bool:
    return policy.early is not None and sum(len(chunk.tokens) for chunk in chunks) >= policy.early.tokens


def _as_seen(timings: Timings | None, first_s: float | None, total_s: float) -> Timings | None:
    """The tier's timings with the waiting around them that the caller saw."""
    if timings is None:
        return None
    first_ms = timings.first_token_ms if first_s is None else first_s * 1000
    return replace(timings, first_token_ms=first_ms, total_ms=total_s * 1000)


def _is_last(chunk: Chunk) -> bool:
    return chunk.finish_reason is not None


async def _whole(chunks: AsyncIterator[Chunk], broken: EdgewiseError) -> AsyncGenerator[Chunk]:
    """The chunks; `broken` if they end without a last one."""
    ended = False
    async for chunk in chunks:
        ended = ended or _is_last(chunk)
        yield chunk
    if not ended:
        raise broken


def _cut_short(error: Exception, sent: int) -> RemoteError:
    late = isinstance(error, TimeoutError | RemoteTimeout | DeadlineExceeded)
    kind = RemoteTimeout if late else Unreachable if isinstance(error, Unreachable) else RemoteBroken
    return kind(
        f"the cloud broke off after {sent} characters of its answer were sent: {error}",
        hint="what was sent stands; ask again for the whole answer",
    )


def _both(edge: Capabilities, cloud: Capabilities) -> Capabilities:
    """What a request may ask for that either may get. A prompt too long for one may still fit the other. A token id
    means one model's token, so `prompt_ids` and `logit_bias` are for the edge alone, on the route `edge`."""
    known = edge.context is not None and cloud.context is not None
    return Capabilities(
        logprobs=edge.logprobs and cloud.logprobs,
        top_logprobs=min(edge.top_logprobs, cloud.top_logprobs),
        seed=edge.seed and cloud.seed,
        sampling=(edge.sampling & cloud.sampling) - {"logit_bias"},
        prompt_ids=False,
        continuation=False,
        context=max(edge.context or 0, cloud.context or 0) if known else None,
    )
