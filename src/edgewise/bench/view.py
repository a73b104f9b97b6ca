"""A watched run as tracks and counters of a trace, and as the facts of a page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from edgewise.bench.runs import Time
from edgewise.bench.shares import KINDS, Answer, Kind, Served, Share, Shares, Watched
from edgewise.bench.trace import Counter, Span, Track


def tracks(watched: Watched) -> list[Track]:
    """One row with forwards, the graphs in them and the operators in those; then one row per request."""
    shares, model = watched.shares, []
    for step, kinds in zip(shares.steps, shares.kinds, strict=True):
        tokens = {f"{kind}_tokens": count for kind, count in kinds.items()}
        kind = "mixed" if len(kinds) > 1 else next(iter(kinds), "empty")
        model.append(step.time.span("forward", kind=kind, rows=len(step.rows), tokens=step.tokens, **tokens))
    for run in [run for run, _ in watched.placed.runs] + watched.placed.strays:
        model.append(run.time.span(run.graph))
        model += [one.time.span(one.type, node=one.node) for one in run.operators]
    return [Track("model", model), *(Track(f"request {one.answer.number}", _spans(one)) for one in shares.served)]


def _spans(one: Served) -> list[Span]:
    """A request's row: what contains comes before what it contains."""
    answer, work = one.answer, one.work
    first = work.texts[0].end if work.texts else one.worked.end
    spans = [
        answer.time.span(f"request {answer.number}", completion_tokens=answer.usage.completion_tokens),
        answer.prompt.span("template + tokenize", tokens=answer.usage.prompt_tokens),
        one.queue.span("queue wait"),
    ]
    if work.shares:
        spans.append(Time(one.worked.start, first).span("prefill", cached_tokens=answer.usage.cached_tokens))
    if work.of("decode"):
        spans.append(Time(first, one.worked.end).span("decode"))
    spans += (_chunk(share) for share in work.shares)
    spans += (took.span("sampling") for took in work.sampling)
    spans += (took.span("detokenize") for took in work.texts)
    return spans


def _chunk(share: Share) -> Span:
    """The whole forward, which is how long the request waited for it."""
    name = "prefill chunk" if share.kind == "prefill" else "decode step"
    return share.step.time.span(name, tokens=share.tokens, tokens_of_all=share.step.tokens)


def counters(watched: Watched) -> list[Counter]:
    served, rows = watched.shares.served, _level(watched.shares.kv)
    return [
        Counter("KV rows", rows, "rows"),
        Counter("KV bytes", [(at, count * watched.kv_bytes) for at, count in rows], "bytes"),
        Counter("active slots", _level(_edges(one.worked for one in served))),
        Counter("waiting requests", _level(_edges(one.queue for one in served))),
    ]


def _edges(times: Iterable[Time]) -> list[tuple[int, int]]:
    return [edge for took in times for edge in ((took.start, 1), (took.end, -1))]


def _level(changes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The running sum of changes, one point per moment."""
    level, points = 0, {}
    for at, change in sorted(changes):
        level += change
        points[at] = level
    return list(points.items())


def summary(watched: Watched, unwatched: Sequence[Answer]) -> dict[str, Any]:
    """The facts of `edgewise profile --json`. The time of a forward that serves several requests is shared out among
    them in the phases, and stands once under graphs and operators."""
    shares, placed, kv_bytes = watched.shares, watched.placed, watched.kv_bytes
    answers = [one.answer for one in shares.served]
    peak = max((rows for _, rows in _level(shares.kv)), default=0)
    return {
        "requests": len(answers),
        "prompt_tokens": answers[0].usage.prompt_tokens,
        "cached_tokens": [answer.usage.cached_tokens for answer in answers],
        "completion_tokens": [answer.usage.completion_tokens for answer in answers],
        "unwatched": _speed(unwatched),
        "watched": _speed(answers),
        "phases": _phases(shares.served),
        "queue_wait_ms": [one.queue.ms for one in shares.served],
        "graphs": _graphs(watched),
        "operators": _operators(watched),
        "kv": {"bytes_per_row": kv_bytes, "peak_rows": peak, "peak_bytes": peak * kv_bytes},
        "clock_skew_us": None if placed.skew_ns is None else placed.skew_ns / 1000,
        "stray_runs": {"count": len(placed.strays), "ms": sum(run.time.ms for run in placed.strays)},
        "unclaimed": shares.unclaimed,
    }


def _speed(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Medians over the requests."""
    timings = [answer.timings for answer in answers]
    decode = [one.decode_tok_s for one in timings if one.decode_tok_s is not None]
    return {
        "first_token_ms": median(one.first_token_ms for one in timings),
        "total_ms": median(one.total_ms for one in timings),
        "decode_tok_s": median(decode) if decode else None,
    }


def _phases(served: Sequence[Served]) -> list[dict[str, Any]]:
    """Sums over the requests, of the time from their arrival to their last chunk."""
    total = sum(one.answer.time.ms for one in served)
    together = [share for one in served for share in one.work.shares if share.tokens < share.step.tokens]
    parts: dict[str, list[float]] = {
        "template + tokenize": [one.answer.prompt.ms for one in served],
        "queue wait": [one.queue.ms for one in served],
        **{kind: [share.ms for one in served for share in one.work.of(kind)] for kind in KINDS},
        "others in the same forward": [share.others_ms for share in together],
        "sampling": [took.ms for one in served for took in one.work.sampling],
        "detokenize": [took.ms for one in served for took in one.work.texts],
    }
    rows = [_row(name, times, total) for name, times in parts.items()]
    return [*rows, {"name": "other", "count": 0} | _of(total - sum(row["ms"] for row in rows), total)]


def _graphs(watched: Watched) -> list[dict[str, Any]]:
    """Each graph's runs; what of the forwards lies outside of all graphs; and what in them is no operator."""
    forward = sum(step.time.ms for step in watched.shares.steps)
    times: dict[str, list[float]] = defaultdict(list)
    for run, _ in watched.placed.runs:
        times[run.graph].append(run.time.ms)
    rows = [_row(name, took, forward) for name, took in times.items()]
    inside = sum(row["ms"] for row in rows)
    operators = sum(one.time.ms for run, _ in watched.placed.runs for one in run.operators)
    between = {"name": "in graphs, between operators", "count": 0} | _of(inside - operators, forward)
    return [*rows, between, {"name": "outside of graphs", "count": 0} | _of(forward - inside, forward)]


def _operators(watched: Watched) -> list[dict[str, Any]]:
    """By type, the dearest first. Per token, the time of each forward is shared out between its tokens of prompts and
    of answers."""
    shares = watched.shares
    times: dict[str, list[float]] = defaultdict(list)
    by_kind: dict[tuple[str, Kind], float] = defaultdict(float)
    for run, step in watched.placed.runs:
        for one in run.operators:
            times[one.type].append(one.time.ms)
            for kind in KINDS:
                by_kind[one.type, kind] += one.time.ms * 1000 * shares.part(step, kind)
    total = sum(map(sum, times.values()))
    tokens = _tokens(shares)
    rows = [
        _row(name, took, total)
        | {f"{kind}_us_per_token": by_kind[name, kind] / tokens[kind] if tokens[kind] else None for kind in KINDS}
        for name, took in times.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def _tokens(shares: Shares) -> dict[Kind, int]:
    return {kind: sum(kinds.get(kind, 0) for kinds in shares.kinds) for kind in KINDS}


def _row(name: str, times: Sequence[float], total: float) -> dict[str, Any]:
    return {"name": name, "count": len(times)} | _of(sum(times), total)


def _of(ms: float, total: float) -> dict[str, float]:
    return {"ms": ms, "share": ms / total if total else 0.0}
