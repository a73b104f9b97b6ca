import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from edgewise.errors import (
    ContextFull,
    DeadlineExceeded,
    RemoteBroken,
    RemoteRefused,
    RemoteTimeout,
    RequestError,
    Unreachable,
)
from edgewise.joint.breaker import LASTING_REFUSALS, Breaker, BreakerSettings


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def breaker(chance: float = 0.0, **settings: float) -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker(BreakerSettings(**settings), clock=clock, chance=lambda: chance), clock


def fail(it: Breaker, error: Exception) -> None:
    it.fail(it.acquire(), error)


@pytest.mark.parametrize("error", [Unreachable("x"), RemoteTimeout("x"), DeadlineExceeded("x"), TimeoutError()])
def test_one_silence_opens_it(error):
    it, _ = breaker()
    fail(it, error)
    assert it.state == "open"
    assert it.acquire() is None


def test_broken_answers_open_it_at_the_third_in_a_row():
    it, _ = breaker()
    fail(it, RemoteBroken("500"))
    fail(it, RemoteBroken("500"))
    it.succeed(it.acquire())
    for state in ("closed", "closed", "open"):
        fail(it, RemoteBroken("500"))
        assert it.state == state


@pytest.mark.parametrize("status", [400, 404, 413, 422, *sorted(LASTING_REFUSALS)])
def test_only_refusals_that_would_meet_everyone_open_it(status):
    it, _ = breaker()
    fail(it, RemoteRefused("no", status=status))
    assert it.state == ("open" if status in LASTING_REFUSALS else "closed")


@pytest.mark.parametrize("error", [RemoteRefused("bad request", status=400), ContextFull(5000, 4096)])
def test_a_request_at_fault_proves_that_the_cloud_is_alive(error):
    it, clock = breaker()
    fail(it, Unreachable("x"))
    clock.now = 1.0
    fail(it, error)
    assert it.state == "closed"


def test_an_error_of_our_own_side_proves_nothing():
    it, clock = breaker()
    fail(it, RequestError("x"))
    assert it.state == "closed"
    fail(it, Unreachable("x"))
    clock.now = 1.0
    fail(it, RequestError("x"))
    assert it.state == "open"


@pytest.mark.parametrize(
    ("asked", "waits"), [(7.0, 7.0), (1e9, 300.0), (None, 1.0), (0.0, 1.0), (float("nan"), 1.0), (-5, 1.0)]
)
def test_retry_after_is_honoured_within_reason(asked, waits):
    it, clock = breaker()
    fail(it, RemoteRefused("slow down", status=429, retry_after_s=asked))
    assert it.retry_in_s == waits
    clock.now = waits
    assert it.retry_in_s == 0.0
    assert it.acquire() is not None


def test_failed_probes_wait_twice_as_long_up_to_the_longest():
    it, clock = breaker()
    waits = []
    for _ in range(7):
        fail(it, Unreachable("x"))
        waits.append(it.retry_in_s)
        clock.now += it.retry_in_s
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    it.succeed(it.acquire())
    fail(it, Unreachable("x"))
    assert it.retry_in_s == 1


def test_jitter_shortens_by_its_share_at_most():
    it, _ = breaker(chance=1.0)
    fail(it, Unreachable("x"))
    assert it.retry_in_s == pytest.approx(0.8)


def test_a_thousand_failures_do_not_overflow():
    it, clock = breaker()
    for _ in range(1500):
        fail(it, Unreachable("x"))
        clock.now += it.retry_in_s
    assert it.retry_in_s == 0.0


def test_one_probe_at_a_time_and_a_dropped_one_waits_as_long_again():
    it, clock = breaker()
    fail(it, Unreachable("x"))
    clock.now = 1.0
    probe = it.acquire()
    assert it.state == "half_open"
    assert it.acquire() is None
    it.drop(probe)
    assert (it.state, it.retry_in_s) == ("open", 1.0)


class BreakerMachine(RuleBasedStateMachine):
    """Any number of callers, in any order, each settling once, twice, late or never but the probe."""

    tickets = Bundle("tickets")

    @initialize()
    def start(self):
        self.clock = Clock()
        self.it = Breaker(BreakerSettings(), clock=self.clock, chance=lambda: 0.5)
        self.probe = None

    @rule(target=tickets)
    def acquire(self):
        before, ready = self.it.state, self.it.retry_in_s == 0.0
        ticket = self.it.acquire()
        if before == "closed":
            assert ticket is not None
            assert self.it.state == "closed"
        elif before == "open" and ready:
            assert ticket is not None
            assert self.it.state == "half_open"
            self.probe = ticket
        else:
            assert ticket is None
            assert self.it.state == before
        return ticket

    @rule(ticket=tickets)
    def succeed(self, ticket):
        before = self.it.state
        if ticket is not None:
            self.it.succeed(ticket)
        if before == "half_open":
            assert self.it.state == ("closed" if ticket == self.probe else "half_open")
        else:
            assert self.it.state == before

    @rule(ticket=tickets, error=st.sampled_from([Unreachable("x"), RemoteBroken("x"), RemoteTimeout("x")]))
    def fail(self, ticket, error):
        before = self.it.state
        if ticket is not None:
            self.it.fail(ticket, error)
        if before == "half_open":
            assert self.it.state == ("open" if ticket == self.probe else "half_open")
        if before == "open":
            assert self.it.state == "open"
        if before == "closed" and self.it.state == "open":
            assert 0 < self.it.retry_in_s <= 30

    @rule(ticket=consumes(tickets))
    def drop(self, ticket):
        before = self.it.state
        if ticket is not None:
            self.it.drop(ticket)
        probing = before == "half_open" and ticket == self.probe
        assert self.it.state == ("open" if probing else before)

    @rule(seconds=st.floats(0.0, 40.0))
    def wait(self, seconds):
        self.clock.now += seconds

    @precondition(lambda self: self.it.state == "open")
    @rule()
    def heal(self):
        """Whatever happened, a cloud that is back is used again after at most the longest pause."""
        self.clock.now += 30.0
        self.it.succeed(self.it.acquire())
        assert self.it.state == "closed"

    @invariant()
    def waits_are_bounded(self):
        assert 0.0 <= self.it.retry_in_s <= 30.0
        assert self.it.state in ("closed", "open", "half_open")


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
