"""What of a watched run is whose, made of forwards, tokens and graph runs by hand."""

from __future__ import annotations

from typing import Any

import pytest

from edgewise.bench import view
from edgewise.bench.runs import GraphRun, Operator, Time
from edgewise.bench.shares import Answer, Watched, placed, shared_out
from edgewise.bench.watch import Log, Part, Step
from edgewise.cli.profile import page
from edgewise.types import Timings, Usage

MS = 1_000_000


def answer(number: int, *, prompt: int, end: int, tokens: int) -> Answer:
    """Of a request that comes at 0 and has its prompt at `prompt` ms."""
    times = Time(0, end * MS), Time(0, prompt * MS)
    return Answer(number, *times, Usage(24, tokens), Timings(1.0, float(end), None))


def step(start: int, end: int, *rows: tuple[str, int, int, int]) -> Step:
    return Step(Time(start * MS, end * MS), tuple(Part(*row) for row in rows))


def texts(*at: float) -> list[Time]:
    return [Time(int(when * MS), int((when + 0.25) * MS)) for when in at]


def two_at_once() -> tuple[Log, list[Answer]]:
    """The second is filled (24 tokens) in the forward that decodes the first's second token; then both decode."""
    log = Log(began=0)
    log.steps = [
        step(10, 20, ("a", 0, 24, 1)),
        step(30, 55, ("a", 24, 1, 1), ("b", 0, 24, 1)),
        step(60, 70, ("a", 25, 1, 1), ("b", 24, 1, 1)),
    ]
    log.texts = texts(20.5, 56, 57, 71, 72)
    return log, [answer(2, prompt=2, end=80, tokens=2), answer(1, prompt=1, end=80, tokens=3)]


def test_a_forwards_time_is_shared_out_by_tokens() -> None:
    shares = shared_out(*two_at_once())
    first, second = (one.work for one in shares.served)
    assert [share.ms for share in first.shares] == [10, 1, 5]
    assert [share.ms for share in second.shares] == [24, 5]
    assert [share.others_ms for share in first.shares] == [0, 24, 5]
    assert sum(share.ms for work in (first, second) for share in work.shares) == 10 + 25 + 10
    assert shares.kinds == [{"prefill": 24}, {"decode": 1, "prefill": 24}, {"decode": 2}]
    assert (len(first.texts), len(second.texts)) == (3, 2)
    assert [took.ms for took in second.sampling] == [0.75, 0.75]  # from the token before, of the same forward
    assert shares.unclaimed == {}


def run(graph: str, start: float, end: float) -> GraphRun:
    time = Time(int(start * MS), int(end * MS))
    return GraphRun(graph, time, (Operator(time, "qkv", "layer0.qkv"),))


def summary(log: Log, answers: list[Answer], *runs: GraphRun) -> dict[str, Any]:
    facts = view.summary(Watched(shared_out(log, answers), placed(runs, log), 8), answers)
    return facts | {"model": "tiny", "runtime": "native", "mode": "fast", "timed": "By hand."}


def test_one_graph_run_for_many_rows_is_shared_out_once() -> None:
    log, answers = two_at_once()
    facts = summary(log, answers, run("block", 10, 20), run("block", 30, 55), run("block", 60, 70))
    (operator,) = facts["operators"]
    assert (operator["count"], operator["ms"]) == (3, 45)
    assert operator["prefill_us_per_token"] == pytest.approx((10 + 24) * 1000 / 48)
    assert operator["decode_us_per_token"] == pytest.approx((1 + 10) * 1000 / 3)
    phases = {row["name"]: row for row in facts["phases"]}
    assert (phases["prefill"]["ms"], phases["decode"]["ms"]) == (34, 11)
    assert (phases["prefill"]["count"], phases["decode"]["count"]) == (2, 3)
    assert phases["others in the same forward"]["ms"] == 24 + 5 + 1 + 5
    assert sum(row["ms"] for row in facts["phases"]) == pytest.approx(160)  # what both callers waited
    assert min(row["ms"] for row in facts["phases"]) >= 0
    assert facts["kv"]["peak_rows"] == 24 + 1 + 1 + 24 + 1


def test_a_session_that_is_rewound_works_for_the_next_request() -> None:
    log = Log()
    log.steps = [step(1, 2, ("a", 0, 4, 0)), step(3, 4, ("a", 4, 4, 1)), step(5, 6, ("a", 7, 1, 1))]
    log.texts = texts(4, 6)
    shares = shared_out(log, [answer(n, prompt=0, end=9, tokens=1) for n in (1, 2)])
    assert [[share.kind for share in one.work.shares] for one in shares.served] == [["prefill"] * 2, ["prefill"]]
    assert shares.kv[-2:] == [(int(4.25 * MS), -8), (int(6.25 * MS), -8)]
    assert shares.unclaimed == {}


def test_the_stop_token_has_no_text() -> None:
    log, answers = two_at_once()
    answers[1] = answer(1, prompt=1, end=80, tokens=2)  # the first chooses it last
    del log.texts[3]
    shares = shared_out(log, answers)
    assert [len(one.work.texts) for one in shares.served] == [2, 2]
    assert shares.unclaimed == {}


def test_what_fits_nobody_is_counted_and_nothing_breaks() -> None:
    log, answers = two_at_once()
    log.texts += texts(5, 73, 74)  # before all forwards, and two too many
    facts = summary(log, [*answers[1:], answer(3, prompt=3, end=80, tokens=1), answer(4, prompt=4, end=80, tokens=1)])
    assert facts["unclaimed"] == {"requests without rows": 1, "tokens without a row": 4}
    assert facts["queue_wait_ms"] == [9, 27, 0]
    facts = summary(log, answers[:1])
    assert facts["unclaimed"]["rows without a request"] == 2
    assert "2 rows without a request: their phases are missing here." in page(facts)
    assert len(view.tracks(Watched(shared_out(log, answers[:1]), placed([], log), 8))) == 2
    assert summary(Log(), answers)["unclaimed"] == {"requests without rows": 2}


def test_graph_runs_outside_every_forward_are_told() -> None:
    log, answers = two_at_once()
    log.began = 5 * MS
    warm_up, inside, between = run("block", 1, 2), run("block", 9.5, 20), run("block", 21, 24)
    facts = summary(log, answers, warm_up, inside, between)
    assert facts["stray_runs"] == {"count": 1, "ms": 3}
    assert facts["clock_skew_us"] == 500
    assert "juts out of its forward by more than 500 us." in page(facts)
    assert "1 runs of graphs (3.00 ms) lie in no forward and are not counted." in page(facts)
    lost = summary(log, answers, warm_up, between)
    assert lost["clock_skew_us"] is None
    assert "juts out" not in page(lost)
    assert "The runtime recorded no run of a graph." in page(summary(log, answers, warm_up))
