"""The breaker: a dead cloud costs one request, not every request.

    closed ──failures reach their limit──> open ──its time is over, and a request comes──> half_open
       ^                                    ^                                                  │
       └───────────the probe succeeds───────┼──────────────────────────────────────────────────┤
                                            └──the probe fails (longer) or is dropped (as long)┘

No sockets, no tasks, no sleep: calls in, states out, the clock is the caller's. One event loop owns it: no locks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NewType

from edgewise.errors import ContextFull, DeadlineExceeded, RemoteRefused, RemoteTimeout, RequestError, Unreachable

State = Literal["closed", "open", "half_open"]
Ticket = NewType("Ticket", int)

# Refusals that the next request would meet too: credentials, payment, quota. Any other 4xx is its own request's fault
# and shows that the cloud is alive.
LASTING_REFUSALS = frozenset({401, 402, 403, 407, 408, 429})


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """Consecutive failures that open the breaker, by kind of the last one, and how long it stays open: `base_s` doubled
    with each failed probe up to `longest_s`, less a random share of at most `jitter`: no fleet returns all at once."""

    timeouts: int = 1
    unreachable: int = 1
    refused: int = 1
    broken: int = 3
    base_s: float = 1.0
    longest_s: float = 30.0
    jitter: float = 0.2
    longest_retry_after_s: float = 300.0  # a wrong Retry-After must not switch the cloud off for a day

    def limit(self, error: Exception) -> int:
        match error:
            case TimeoutError() | RemoteTimeout() | DeadlineExceeded():
                return self.timeouts
            case Unreachable():
                return self.unreachable
            case RemoteRefused():
                return self.refused
            case _:
                return self.broken


class Breaker:
    """`acquire` a ticket, call the cloud, then `succeed`, `fail` or `drop` with it.

    A ticket belongs to the state in which it was given: one that comes back after the state has changed says nothing
    new and is ignored, so settling twice or late does no harm. In half_open there is one ticket, the probe.
    """

    def __init__(
        self,
        settings: BreakerSettings = BreakerSettings(),
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._chance = chance
        self._state: State = "closed"
        self._epoch = 0
        self._failures = 0  # in a row, while closed
        self._openings = 0  # in a row, without a success between
        self._open_s = 0.0
        self._until = 0.0

    @property
    def state(self) -> State:
        return self._state

    @property
    def retry_in_s(self) -> float:
        """Seconds until a request may probe; 0 unless open."""
        return max(0.0, self._until - self._clock()) if self._state == "open" else 0.0

    def acquire(self) -> Ticket | None:
        """Leave to call the cloud, or None: then it is not to be called."""
        if self._state == "open" and self._clock() >= self._until:
            self._enter("half_open")
            return Ticket(self._epoch)
        return Ticket(self._epoch) if self._state == "closed" else None

    def succeed(self, ticket: Ticket) -> None:
        """The cloud answered."""
        if ticket != self._epoch:
            return
        self._failures = self._openings = 0
        if self._state == "half_open":
            self._enter("closed")

    def fail(self, ticket: Ticket, error: Exception) -> None:
        """The cloud did not deliver, for this reason."""
        refused = isinstance(error, RemoteRefused) and error.status not in LASTING_REFUSALS
        if refused or isinstance(error, ContextFull):  # it answered, and the next request may fit
            self.succeed(ticket)
        elif isinstance(error, RequestError):  # raised on this side, before the cloud was called
            self.drop(ticket)
        elif ticket == self._epoch:
            self._count(error)

    def drop(self, ticket: Ticket) -> None:
        """The caller left before the cloud's answer was known."""
        if ticket == self._epoch and self._state == "half_open":
            self._open()

    def _count(self, error: Exception) -> None:
        self._failures += 1
        if self._state == "half_open" or self._failures >= self._settings.limit(error):
            self._open_s = self._pause_s(error)
            self._openings += 1
            self._open()

    def _open(self) -> None:
        self._until = self._clock() + self._open_s
        self._enter("open")

    def _enter(self, state: State) -> None:
        self._state = state
        self._epoch += 1
        self._failures = 0

    def _pause_s(self, error: Exception) -> float:
        settings = self._settings
        asked_s = error.retry_after_s if isinstance(error, RemoteRefused) else None
        if asked_s is not None and asked_s > 0.0:
            return min(asked_s, settings.longest_retry_after_s)
        doubled = settings.base_s * 2.0 ** min(self._openings, 60)
        return min(doubled, settings.longest_s) * (1.0 - settings.jitter * self._chance())
