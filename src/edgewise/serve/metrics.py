"""What /metrics shows. Each app has a registry of its own."""

from __future__ import annotations

from functools import partial
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from edgewise.joint.breaker import Breaker, State
from edgewise.joint.replay_log import ReplayLog, Written
from edgewise.types import Decision, Usage

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MOST_REASONS = 32  # different ones; a label must not grow without end, whatever the engine says
NO_ROUTE = "none"


class Metrics:
    """Counters of the requests for text; `status` is that of HTTP, or 499 where the client left first."""

    def __init__(self, breaker: Breaker | None = None, log: ReplayLog | None = None) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "edgewise_requests", "Requests for text.", ["route", "reason", "status"], registry=self.registry
        )
        self._tokens = Counter("edgewise_tokens", "Tokens read and written.", ["route", "kind"], registry=self.registry)
        self._first_token = Histogram(
            "edgewise_first_token_seconds",
            "From the request's arrival to its first token.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._total = Histogram(
            "edgewise_request_seconds",
            "From the request's arrival to the end of the answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("edgewise_requests_in_flight", "Requests for text being served.", registry=self.registry)
        self._reasons: set[str] = set()
        if breaker is not None:
            self._watch(breaker)
        if log is not None:
            self._count_rows(log)

    def record(self, status: int, decision: Decision | None, total_s: float, first_token_s: float | None) -> None:
        """One request is over; `decision` is None where it never came to one."""
        route = decision.route if decision else NO_ROUTE
        self._requests.labels(route, self._reason(decision), str(status)).inc()
        self._total.labels(route).observe(total_s)
        if first_token_s is not None:
            self._first_token.labels(route).observe(first_token_s)

    def count_tokens(self, decision: Decision, usage: Usage) -> None:
        kinds = {"prompt": usage.prompt_tokens, "cached": usage.cached_tokens, "completion": usage.completion_tokens}
        for kind, count in kinds.items():
            self._tokens.labels(decision.route, kind).inc(count)

    def _watch(self, breaker: Breaker) -> None:
        """Read when somebody asks; one state is 1, the others are 0."""
        gauge = Gauge("edgewise_breaker_state", "Whether the cloud is called.", ["state"], registry=self.registry)
        for state in get_args(State):
            gauge.labels(state).set_function(partial(_is, breaker, state))

    def _count_rows(self, log: ReplayLog) -> None:
        gauge = Gauge("edgewise_log_rows", "Rows of the replay log.", ["state"], registry=self.registry)
        for state in get_args(Written):
            gauge.labels(state).set_function(partial(log.rows.__getitem__, state))

    async def show(self, request: Request) -> Response:
        """GET /metrics in Prometheus' text format."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def _reason(self, decision: Decision | None) -> str:
        reason = decision.reason if decision else NO_ROUTE
        if reason not in self._reasons and len(self._reasons) >= MOST_REASONS:
            return "other"
        self._reasons.add(reason)
        return reason


def _is(breaker: Breaker, state: State) -> float:
    return float(breaker.state == state)
