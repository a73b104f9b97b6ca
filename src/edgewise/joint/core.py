"""One decision between two tiers, whatever they send: chunks of text, tensors, anything.

A tier is an async iterator. Each is read in a task of its own into a buffer (`Feed`), so that the edge goes on while
the cloud is awaited, and nothing that it said is lost. `Course` takes one request from its start to its last item:

    edge, until there is enough to judge ──confident──> edge
        └─else─> cloud, until it has begun (streamed) or ended (whole) ──> cloud, and the edge is cancelled
                     └─no cloud, no time, breaker open, failed─> edge_fallback, from the edge's buffer

When the last item is handed on, the course may be followed: the tier that was not heard answers too, for a log alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Generic, TypeVar

from edgewise.errors import (
    ContextFull,
    DeadlineExceeded,
    EngineClosed,
    EngineError,
    RemoteRefused,
    RemoteTimeout,
    RequestError,
    Unreachable,
    UsageError,
)
from edgewise.joint.breaker import Breaker, Ticket
from edgewise.joint.judge import Judge
from edgewise.joint.policy import Policy
from edgewise.joint.signals.evidence import Evidence
from edgewise.types import Decision, Route, Wish

logger = logging.getLogger(__name__)

T = TypeVar("T")

CLOSING_S: Final = 0.1  # a tier that was cancelled is awaited so long; then it may end by itself
FOLLOWED: Final = 16  # answered requests at once whose other tier still works


class Reason(StrEnum):
    """Why an answer came by its route; docs/formats/policy.md says what each word means."""

    CONFIDENT = "confident"
    ASKED = "asked"
    UNSURE = "unsure"
    MALFORMED = "malformed"
    NO_EVIDENCE = "no_evidence"
    EDGE_SLOW = "edge_slow"
    EDGE_FAILED = "edge_failed"
    NO_CLOUD = "no_cloud"
    PRIVATE = "private"
    BREAKER_OPEN = "breaker_open"
    DEADLINE = "deadline"
    CLOUD_UNREACHABLE = "cloud_unreachable"
    CLOUD_TIMEOUT = "cloud_timeout"
    CLOUD_REFUSED = "cloud_refused"
    CLOUD_BROKEN = "cloud_broken"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the edge's answer is worth; only CONFIDENT keeps it on the edge."""

    confidence: float | None
    reason: Reason


@dataclass(frozen=True, slots=True)
class Trail(Generic[T]):
    """What an answered request came to. None for a tier that was not heard to its end. `both` says that both were heard
    for the answer's own sake, and not because the request was drawn."""

    decision: Decision
    edge: Sequence[T] | None
    cloud: Sequence[T] | None
    both: bool


@dataclass(frozen=True, slots=True)
class Follow(Generic[T]):
    """What is wanted of a request beyond its answer: with `drawn`, to hear both tiers to their ends."""

    drawn: bool
    report: Callable[[Trail[T]], None]


@dataclass(frozen=True, slots=True)
class Case(Generic[T]):
    """One request. `deadline` is a time on the running loop's clock."""

    edge: Callable[[], AsyncIterator[T]]
    cloud: Callable[[float | None], AsyncIterator[T]] | None  # takes the seconds that it has, None without a deadline
    judge: Callable[[Sequence[T], bool], Verdict]  # of these items, which are the whole answer or its beginning
    enough: Callable[[Sequence[T]], bool]  # whether these items of the edge suffice for an early decision
    speaks: Callable[[T], bool]  # whether an item shows the caller anything
    ends: Callable[[T], bool]  # whether an item is a tier's last
    stream: bool  # decide early, and hand items on as they come
    wish: Wish
    deadline: float | None
    no_cloud: Reason = Reason.NO_CLOUD  # why there is none, where there is none
    follow: Follow[T] | None = None


@dataclass(slots=True)
class Stats:
    """Counts since the start, for metrics. `escalation_s` is the sum, over all `escalations`, of the time from asking
    the cloud to its first text (streamed), its end (whole) or its failure."""

    routes: Counter[Route] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    errors: int = 0  # requests that ended in an error, with or without a route
    escalations: int = 0
    escalation_s: float = 0.0


class Late(Exception):
    """A time limit of ours passed; a tier's own TimeoutError is something else."""


class Feed(Generic[T]):
    """Reads one tier to its end, whether or not anyone waits. At most one waiter. What comes after the last item, and
    how long the tier takes to end then, is nobody's concern."""

    def __init__(self, stream: AsyncIterator[T], ends: Callable[[T], bool]) -> None:
        self.items: list[T] = []
        self._ends = ends
        self.done = False
        self.error: Exception | None = None
        self.moved_at = asyncio.get_running_loop().time()  # when it was opened or last gave an item
        self._ready: Callable[[], bool] = lambda: True
        self._waiter: asyncio.Future[None] | None = None
        self.task = asyncio.create_task(self._read(stream))

    async def until(self, ready: Callable[[], bool], at: float = math.inf) -> bool:
        """Wait until `ready()` or the end of the feed; False if the loop's time `at` came before."""
        if self.done or ready():
            return True
        self._ready, self._waiter = ready, asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout_at(None if at == math.inf else at):
                await self._waiter
        except TimeoutError:
            return self.done or ready()
        finally:
            self._waiter = None
        return True

    async def has(self, count: int, at: float = math.inf) -> bool:
        """Wait for item number `count`, 1 the first; False at the end of the feed. `Late` at the loop's time `at`; the
        feed's own error once its items are used up."""
        if not await self.until(lambda: len(self.items) >= count, at):
            raise Late
        if len(self.items) >= count:
            return True
        if self.error is not None:
            raise self.error
        return False

    def cancel(self) -> None:
        self.task.cancel()

    async def _read(self, stream: AsyncIterator[T]) -> None:
        try:
            async for item in stream:
                if not self.done:
                    self.items.append(item)
                    self.done = self._ends(item)
                    self.moved_at = asyncio.get_running_loop().time()
                    self._notify()
        except asyncio.CancelledError:
            self._fail(EngineClosed("the work was cancelled before its end"))
            raise
        except Exception as error:  # a tier may be anyone's code: whatever it raises is its answer, and is judged
            self._fail(error)
        finally:
            self.done = True
            self._notify()

    def _fail(self, error: Exception) -> None:
        if not self.done:
            self.error = error

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done() and (self.done or self._ready()):
            self._waiter.set_result(None)


class Core:
    """What all requests of one cascade share: policy, breaker, counts, and the tasks that are being closed."""

    def __init__(self, policy: Policy, breaker: Breaker) -> None:
        self.policy = policy
        self.breaker = breaker
        self.stats = Stats()
        self._tasks: set[asyncio.Task[None]] = set()
        self._following = 0
        self._closed = False

    async def run(self, case: Case[T]) -> AsyncGenerator[tuple[T, Decision]]:
        """The answer's items, each with the decision, which is the same for all of them.

        RemoteError or DeadlineExceeded if the tier that was chosen dies after items were handed out. If no tier has an
        answer: the error of the tier that was asked first, a RequestError before all others."""
        course = Course(self, case)
        try:
            async with aclosing(course.items()) as items:
                async for pair in items:
                    yield pair
        except Exception:
            self.stats.errors += 1
            raise
        finally:
            if not self._follow(course):
                await course.stop()

    async def single(self, case: Case[T]) -> tuple[T, Decision]:
        """`run` for tiers that give one item."""
        async with aclosing(self.run(case)) as pairs:
            async for pair in pairs:
                return pair
        raise EngineError("the edge ended without an answer")

    def open(self, stream: AsyncIterator[T], ends: Callable[[T], bool]) -> Feed[T]:
        if self._closed:
            raise EngineClosed("the cascade was closed")
        feed = Feed(stream, ends)
        self._keep(feed.task)
        return feed

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _follow(self, course: Course[T]) -> bool:
        """Whether it goes on behind the caller's back, and will stop by itself."""
        if not course.wants_following or self._closed or self._following >= FOLLOWED:
            return False
        self._following += 1
        self._keep(asyncio.create_task(self._followed(course)))
        return True

    async def _followed(self, course: Course[T]) -> None:
        try:
            await course.follow()
        except Exception as error:  # the request is answered: nothing of this may reach its caller
            logger.warning("an answered request could not be followed: %r", error)
        finally:
            self._following -= 1
            await course.stop()

    def probe(self, case: Case[T], ticket: Ticket) -> None:
        """See whether the cloud is back, with this request but not for it: its caller has the edge's answer."""
        self._keep(asyncio.create_task(self._probe(case, ticket)))

    async def _probe(self, case: Case[T], ticket: Ticket) -> None:
        assert case.cloud is not None, "there is no cloud to probe"
        limit_s = self.policy.cloud.first_token_ms / 1000
        feed = self.open(case.cloud(limit_s), case.ends)
        try:
            if await feed.has(1, asyncio.get_running_loop().time() + limit_s):
                self.breaker.succeed(ticket)
            else:
                self.breaker.fail(ticket, Unreachable("the cloud says that it is not available"))
        except Late:
            self.breaker.fail(ticket, RemoteTimeout(f"the cloud sent nothing within {limit_s:g} s"))
        except Exception as error:  # whatever a tier raises is its answer
            self.breaker.fail(ticket, error)
        finally:
            feed.cancel()
            self.breaker.drop(ticket)

    async def close(self) -> None:
        """End all requests: their callers get EngineClosed."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=CLOSING_S)


class Course(Generic[T]):
    """One request on its way."""

    def __init__(self, core: Core, case: Case[T]) -> None:
        self._core = core
        self._case = case
        self._policy = core.policy
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._end = math.inf if case.deadline is None else case.deadline
        self._edge: Feed[T] | None = None
        self._cloud: Feed[T] | None = None
        self._ticket: Ticket | None = None
        self._asked_at = 0.0
        self._decision: Decision | None = None
        self._both = False  # see Trail
        self._complete = False

    async def items(self) -> AsyncGenerator[tuple[T, Decision]]:
        decision = self._decision = await self._decide()
        self._core.stats.routes[decision.route] += 1
        self._core.stats.reasons[decision.reason] += 1
        relay = self._cloud_items() if decision.route == "cloud" else self._edge_items()
        async with aclosing(relay) as items:
            async for item in items:
                self._complete = self._complete or self._case.ends(item)
                yield item, decision

    @property
    def wants_following(self) -> bool:
        """Only of a request that left the choice to us, and got its whole answer."""
        return self._complete and self._case.follow is not None and self._case.wish == "auto"

    async def follow(self) -> None:
        """Hear the tier that was not heard, if this request was drawn for it, and report what both said."""
        follow, decision = self._case.follow, self._decision
        assert follow is not None, "nobody wants to know"
        assert decision is not None, "there is no answer yet"
        if follow.drawn and not self._both and decision.route != "edge_fallback":
            self._end = math.inf  # nobody waits any more
            await self._hear_both()
        follow.report(Trail(decision, self._heard(self._edge), self._heard(self._cloud), self._both))

    async def _hear_both(self) -> None:
        at = self._loop.time() + self._policy.cloud.total_ms / 1000
        await self._open_edge().until(lambda: False, at)
        if self._cloud is None and await self._ask_cloud() is None:
            async for _ in self._cloud_items():
                pass

    def _heard(self, feed: Feed[T] | None) -> Sequence[T] | None:
        whole = feed is not None and feed.error is None and bool(feed.items) and self._case.ends(feed.items[-1])
        return feed.items if whole and feed is not None else None

    async def stop(self) -> None:
        """Cancel what still runs, and wait for it a moment: a tier that will not end must not hold up the caller."""
        tasks = [feed.task for feed in (self._edge, self._cloud) if feed is not None and not feed.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSING_S)

    # The decision

    async def _decide(self) -> Decision:
        match self._case.wish:
            case "edge":
                await self._edge_ready()
                return Decision("edge", self._final_confidence(None), Reason.ASKED)
            case "cloud":
                if self._case.deadline is not None:
                    self._open_edge()  # what the cloud may take of the deadline is too long to start only then
                return await self._escalate(Verdict(None, Reason.ASKED))
            case _:
                verdict = await self._look()
                if verdict.reason is Reason.CONFIDENT:
                    return Decision("edge", verdict.confidence, verdict.reason)
                return await self._escalate(verdict)

    async def _look(self) -> Verdict:
        """Judge the edge by as much of its answer as the case needs, or by what there is when its time is up."""
        case, limits, feed = self._case, self._policy.edge, self._open_edge()
        latest = self._started + limits.deadline_share * (self._end - self._started)
        await feed.until(lambda: bool(feed.items), min(latest, self._started + limits.first_token_ms / 1000))
        if case.stream and feed.items and self._may_ask():
            early = self._policy.early
            hold_until = math.inf if early is None else feed.moved_at + early.max_wait_ms / 1000
            await feed.until(lambda: case.enough(feed.items), min(latest, hold_until))
        elif feed.items and not case.stream:
            await feed.until(lambda: False, latest)
        if feed.error is not None:
            return self._failed(feed.error)
        if not feed.done and not (case.stream and feed.items):
            return Verdict(None, Reason.EDGE_SLOW)
        return case.judge(feed.items, feed.done)

    def _may_ask(self) -> bool:
        """Whether the cloud could be called now; where it cannot, there is nothing to hold tokens back for."""
        return self._case.cloud is not None and self._core.breaker.retry_in_s == 0

    async def _escalate(self, verdict: Verdict) -> Decision:
        failure = await self._ask_cloud()
        if self._cloud is not None:
            self._core.stats.escalations += 1
            self._core.stats.escalation_s += self._loop.time() - self._asked_at
        if failure is None:
            self._both = self._heard(self._edge) is not None
            if self._edge is not None and not self._drawn:
                self._edge.cancel()
            return Decision("cloud", verdict.confidence, verdict.reason)
        reason, error = failure
        try:
            await self._edge_ready()
        except Exception as edge_error:
            if error is not None and self._cloud_counts_more(edge_error, error):
                raise error from edge_error
            raise edge_error from error
        return Decision("edge_fallback", self._final_confidence(verdict.confidence), reason)

    def _cloud_counts_more(self, edge: Exception, cloud: Exception) -> bool:
        """Which of two errors to show: what is wrong with the request, else what the tier says that was asked first."""
        if isinstance(edge, RequestError) or isinstance(cloud, RequestError):
            return not isinstance(edge, RequestError)
        return self._case.wish == "cloud"

    @property
    def _drawn(self) -> bool:
        return self._case.follow is not None and self._case.follow.drawn and self._case.wish == "auto"

    # The edge

    def _open_edge(self) -> Feed[T]:
        if self._edge is None:
            self._edge = self._core.open(self._case.edge(), self._case.ends)
        return self._edge

    async def _edge_ready(self) -> None:
        """Wait until the edge can be handed on: from its first item (streamed), or whole. Raises its error. When the
        deadline comes before that, what there is of the answer is handed on, and the error after it."""
        feed = self._open_edge()
        if not await feed.until(lambda: self._case.stream and bool(feed.items), self._end) and not feed.items:
            raise self._too_late(feed)
        if feed.error is not None:
            raise feed.error

    def _final_confidence(self, early: float | None) -> float | None:
        """Of the whole answer, or of what the deadline left of it, where none of it was handed on before."""
        feed = self._edge
        if self._case.stream or feed is None:
            return early
        return self._case.judge(feed.items, feed.done).confidence

    async def _edge_items(self) -> AsyncGenerator[T]:
        feed, count = self._open_edge(), 0
        try:
            while await feed.has(count + 1, self._end):
                yield feed.items[count]
                count += 1
        except Late:
            raise self._too_late(feed) from None

    def _failed(self, error: Exception) -> Verdict:
        """The cloud may answer where the edge failed, but not where the request is wrong for both."""
        if isinstance(error, UsageError) or (isinstance(error, RequestError) and not isinstance(error, ContextFull)):
            raise error
        if self._case.cloud is not None:
            logger.warning("the edge failed, the cloud is asked: %r", error)
        return Verdict(None, Reason.EDGE_FAILED)

    def _too_late(self, feed: Feed[T]) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"the request's deadline passed before the edge's answer was whole; {len(feed.items)} pieces were there",
            hint="allow more time or fewer tokens",
        )

    # The cloud

    async def _ask_cloud(self) -> tuple[Reason, Exception | None] | None:
        """Call the cloud and wait until it can be handed on. None if it can, else why not."""
        core, case = self._core, self._case
        if case.cloud is None:
            return case.no_cloud, None
        self._asked_at = self._loop.time()
        until = self._end - self._policy.cloud.margin_ms / 1000
        if self._asked_at >= until:
            return Reason.DEADLINE, None
        self._ticket = core.breaker.acquire()
        if self._ticket is None:
            retry_s = core.breaker.retry_in_s
            return Reason.BREAKER_OPEN, Unreachable(f"the cloud failed and is not tried again for {retry_s:.1f} s")
        if core.breaker.state == "half_open" and self._edge_stands():
            core.probe(case, self._ticket)
            return Reason.BREAKER_OPEN, Unreachable("the cloud failed and is being tried again meanwhile")
        try:
            self._cloud = core.open(case.cloud(None if until == math.inf else until - self._asked_at), case.ends)
            if not await self._cloud_ready(until):
                return Reason.CLOUD_UNREACHABLE, Unreachable("the cloud says that it is not available")
            core.breaker.succeed(self._ticket)
            return None
        except Exception as error:
            self._blame(error)
            return reason_of(error), error
        finally:
            core.breaker.drop(self._ticket)

    def _edge_stands(self) -> bool:
        """Whether the edge has something to answer with, so that nobody has to wait for a cloud that may be dead."""
        edge = self._edge
        return self._case.wish == "auto" and edge is not None and edge.error is None and bool(edge.items)

    async def _cloud_ready(self, until: float) -> bool:
        """Wait for an item that shows something (streamed) or for the end. False for a tier that ends without an item,
        which is how one says that it is not available."""
        count = 0
        while await self._cloud_has(count + 1, until):
            count += 1
            if self._case.stream and self._case.speaks(self._the_cloud.items[count - 1]):
                return True
        return count > 0

    async def _cloud_items(self) -> AsyncGenerator[T]:
        feed, count = self._the_cloud, 0
        try:
            while await self._cloud_has(count + 1, self._end):
                yield feed.items[count]
                count += 1
        except Exception as error:
            self._blame(error)
            raise

    async def _cloud_has(self, count: int, until: float) -> bool:
        """Feed.has under the policy's limits; RemoteTimeout or DeadlineExceeded when they pass."""
        feed, limits = self._the_cloud, self._policy.cloud
        gap_ms = limits.stall_ms if count > 1 else limits.first_token_ms
        at = min(feed.moved_at + gap_ms / 1000, self._asked_at + limits.total_ms / 1000)
        try:
            return await feed.has(count, min(at, until))
        except Late:
            waited_ms = (self._loop.time() - self._asked_at) * 1000
            kind = RemoteTimeout if at < until else DeadlineExceeded
            raise kind(
                f"the cloud was given {waited_ms:.0f} ms and sent {len(feed.items)} pieces, not the whole answer",
                hint="raise the policy's cloud limits or the deadline",
            ) from None

    @property
    def _the_cloud(self) -> Feed[T]:
        assert self._cloud is not None, "the cloud was not opened"
        return self._cloud

    def _blame(self, error: Exception) -> None:
        """Stop the cloud and tell the breaker, unless it was the request's deadline that gave it too little time."""
        logger.warning("the cloud did not deliver: %r", error)
        if self._cloud is not None:
            self._cloud.cancel()
        if self._ticket is not None and not (isinstance(error, DeadlineExceeded) and self._seems_alive()):
            self._core.breaker.fail(self._ticket, error)

    def _seems_alive(self) -> bool:
        had_ms = (self._loop.time() - self._asked_at) * 1000
        return bool(self._cloud and self._cloud.items) or had_ms < self._policy.cloud.patience_ms


def verdict(judge: Judge, evidence: Evidence, threshold: float) -> Verdict:
    """What this evidence is worth to the judge; strictly above the threshold is confident."""
    if judge.fails_gate(evidence):
        return Verdict(0.0, Reason.MALFORMED)
    judgement = judge.judge(evidence)
    if judgement is None:
        return Verdict(None, Reason.NO_EVIDENCE)
    return Verdict(judgement.confidence, Reason.CONFIDENT if judgement.worth > threshold else Reason.UNSURE)


def reason_of(error: Exception) -> Reason:
    """The word for what the cloud did instead of answering."""
    match error:
        case TimeoutError() | RemoteTimeout() | DeadlineExceeded():
            return Reason.CLOUD_TIMEOUT
        case Unreachable() | ConnectionError():
            return Reason.CLOUD_UNREACHABLE
        case RemoteRefused() | RequestError():
            return Reason.CLOUD_REFUSED
        case _:
            return Reason.CLOUD_BROKEN
