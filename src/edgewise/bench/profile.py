"""Where the time of a request goes: phases, graphs and operators, KV memory and queue waits.

Nothing in the engine knows that it is watched: a TokenModel and a Tokenizer that pass every call on and note its time
are put in the place of the real ones, and the runtime records its graphs (runs.py). From these three come all spans:

    template + tokenize   within Tokenizer.chat
    queue wait            from there to the request's first row in a forward
    prefill, decode step  the forwards with a row of the request, before and after its first token
    sampling              from a forward's return (or the token before, of the same forward) to the token's bytes
    detokenize            within Tokenizer.token_bytes
    graph, operator       as the runtime timed them

The requests of a run are alike, so which session serves which of them is told by the order in which they queue.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from edgewise.bench.runs import GraphRun, Time, now, recording
from edgewise.bench.trace import Counter, Span, Track, library, write
from edgewise.engines.base import Row, Tokenizer, TokenModel
from edgewise.engines.decode import Decoder
from edgewise.engines.load import Mode, Runtime, chosen_runtime, kv_bytes_per_token, local_model
from edgewise.models.bundle import Bundle
from edgewise.models.tokenizer import Tokenizer as BundleTokenizer
from edgewise.settings import ModelSettings
from edgewise.types import Chunk, FloatArray, Message, Request, Timings, Usage

DEFAULTS = ModelSettings()
Kind = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward of the model, and what it computed: (session, position, ids, logits wanted) per row."""

    time: Time
    rows: tuple[tuple[str, int, int, int], ...]


@dataclass
class Log:
    """What the watchers note. Lists only grow while a run lasts, each from one thread."""

    prompts: dict[int, Time] = field(default_factory=dict)  # by the request's number
    steps: list[Step] = field(default_factory=list)
    texts: list[Time] = field(default_factory=list)  # calls of token_bytes

    def clear(self) -> None:
        self.prompts.clear()
        self.steps.clear()
        self.texts.clear()


_number: ContextVar[int] = ContextVar("number", default=0)  # of the request that a tokenizer call belongs to


class WatchedModel:
    """A TokenModel that notes when each forward ran."""

    def __init__(self, model: TokenModel, log: Log) -> None:
        self._model, self._log = model, log
        self.name, self.vocab, self.context, self.slots = model.name, model.vocab, model.context, model.slots

    async def open(self, session: str, limit: int) -> None:
        await self._model.open(session, limit)

    async def forward(self, rows: Sequence[Row]) -> list[FloatArray]:
        start = now()
        logits = await self._model.forward(rows)
        facts = tuple((row.session, row.position, len(row.ids), row.want) for row in rows)
        self._log.steps.append(Step(Time(start, now()), facts))
        return logits

    async def rewind(self, session: str, position: int) -> None:
        await self._model.rewind(session, position)

    async def close(self, session: str) -> None:
        await self._model.close(session)

    async def shutdown(self) -> None:
        await self._model.shutdown()


class WatchedTokenizer:
    """A Tokenizer that notes when prompts and tokens pass through it."""

    def __init__(self, tokenizer: Tokenizer, log: Log) -> None:
        self._tokenizer, self._log = tokenizer, log
        self.stop_ids = tokenizer.stop_ids

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        start = now()
        ids = self._tokenizer.chat(messages)
        self._log.prompts[_number.get()] = Time(start, now())
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        start = now()
        raw = self._tokenizer.token_bytes(token_id)
        self._log.texts.append(Time(start, now()))
        return raw


@dataclass
class Served:
    """One request from its arrival to its last chunk, and the steps that worked on it."""

    number: int
    time: Time
    prompt: Time
    usage: Usage
    timings: Timings
    rows: int = 0  # of KV that it holds at its end
    filling: list[Step] = field(default_factory=list)
    decoding: list[Step] = field(default_factory=list)
    sampling: list[Time] = field(default_factory=list)
    texts: list[Time] = field(default_factory=list)

    @property
    def queue(self) -> Time:
        return Time(self.prompt.end, max(self.prompt.end, self.filling[0].time.start))

    @property
    def last(self) -> Step:
        return (self.filling + self.decoding)[-1]

    @property
    def worked(self) -> Time:
        """From its first row to its last token."""
        return Time(self.filling[0].time.start, max(self.last.time.end, *(text.end for text in self.texts[-1:]), 0))


def profile(
    bundle: Bundle,
    messages: Sequence[Message],
    *,
    max_tokens: int,
    requests: int = 1,
    runtime: Runtime = DEFAULTS.runtime,
    mode: Mode = DEFAULTS.mode,
    slots: int = DEFAULTS.slots,
    context: int | None = DEFAULTS.context,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Answer the prompt `requests` times at once, first unwatched and then watched, and say where the time went; with
    `trace`, also as a Perfetto trace in that file. The answers are greedy. MissingExtra if a trace is wanted and the
    perfetto package is not installed."""
    if trace is not None:
        library()
    request = Request(tuple(messages), max_tokens=max_tokens)
    tokenizer = BundleTokenizer.open(bundle.path)

    def load() -> TokenModel:
        return local_model(bundle, runtime=runtime, mode=mode, slots=slots, context=context)

    unwatched = _serve(load(), tokenizer, request, requests, Log())
    log = Log()
    with recording(chosen_runtime(bundle, runtime), bundle) as recorded:
        model = WatchedModel(load(), log)
        answers = _serve(model, WatchedTokenizer(tokenizer, log), request, requests, log)
        graphs = recorded.finish()
    view = View(log, answers, graphs, kv_bytes_per_token(bundle, runtime))
    if trace is not None:
        write(trace, f"edgewise {bundle.name}", view.tracks(), view.counters())
    about = {"model": bundle.name, "runtime": recorded.runtime, "timed": recorded.timed, "mode": mode}
    return about | view.summary(unwatched)


def _serve(model: TokenModel, tokenizer: Tokenizer, request: Request, count: int, log: Log) -> list[Served]:
    """The requests answered side by side by a model of their own, after a warm-up of the same shape that is not logged
    and leaves no KV that they could use."""
    prompt = tokenizer.chat(request.messages)
    other = (prompt[0] + 1) % model.vocab
    warming = Request(prompt_ids=(other,) * len(prompt), max_tokens=2, ignore_eos=True)

    async def run() -> list[Served]:
        decoder = Decoder(model, tokenizer)
        try:
            async for _ in decoder.generate(warming):
                pass
            log.clear()
            return await asyncio.gather(*(_answer(decoder, request, n + 1, log) for n in range(count)))
        finally:
            await decoder.close()

    return asyncio.run(run())


async def _answer(decoder: Decoder, request: Request, number: int, log: Log) -> Served:
    _number.set(number)  # each task of gather has a context of its own
    start = now()
    chunks: list[Chunk] = [chunk async for chunk in decoder.generate(request)]
    end, last = now(), chunks[-1]
    assert last.usage is not None
    assert last.timings is not None
    return Served(number, Time(start, end), log.prompts.get(number, Time(start, start)), last.usage, last.timings)


class View:
    """A watched run put together: which steps served whom, which graph runs lie in which step."""

    def __init__(self, log: Log, served: Sequence[Served], runs: Iterable[GraphRun], kv_bytes: int) -> None:
        self._served = [replace(one, prompt=log.prompts[one.number]) for one in served]
        self._steps, self._kv_bytes = log.steps, kv_bytes
        self._kinds: list[Kind] = []
        self._kv: list[tuple[int, int]] = []  # (when, rows that came to it or left)
        self._follow(log)
        self._runs, self._skew_ns = _placed(runs, self._steps)

    def _follow(self, log: Log) -> None:
        """Walk the steps in order and hand each of their rows to the request that it belongs to."""
        queue = iter(sorted(self._served, key=lambda one: one.prompt.end))
        owners: dict[str, tuple[Served, int]] = {}  # session -> whom it serves, and its length
        texts = iter(log.texts)
        for step in self._steps:
            kinds: set[Kind] = set()
            cursor = step.time.end
            for session, position, count, want in step.rows:
                one, length = owners.get(session, (None, 0))
                if one is None or position != length:  # a new request in a new session, or in one that is rewound
                    one, length = next(queue), 0
                owners[session] = one, position + count
                one.rows += position + count - length
                self._kv.append((step.time.end, position + count - length))
                kinds.add("decode" if one.texts else "prefill")
                (one.decoding if one.texts else one.filling).append(step)
                if want and len(one.texts) < one.usage.completion_tokens:  # else it chose the stop token
                    text = next(texts)
                    one.sampling.append(Time(cursor, text.start))
                    one.texts.append(text)
                    cursor = text.end
            self._kinds.append("mixed" if len(kinds) > 1 else kinds.pop())
        self._kv += [(one.worked.end, -one.rows) for one in self._served]

    def tracks(self) -> list[Track]:
        """One row with forwards, the graphs in them and the operators in those; then one row per request."""
        model = []
        for step, kind in zip(self._steps, self._kinds, strict=True):
            model.append(step.time.span("forward", kind=kind, rows=len(step.rows), tokens=_tokens(step)))
        for run, _ in self._runs:
            model.append(run.time.span(run.graph))
            model += [one.time.span(one.type, node=one.node) for one in run.operators]
        return [Track("model", model), *(Track(f"request {one.number}", _spans(one)) for one in self._served)]

    def counters(self) -> list[Counter]:
        rows = _level(self._kv)
        return [
            Counter("KV rows", rows, "rows"),
            Counter("KV bytes", [(at, count * self._kv_bytes) for at, count in rows], "bytes"),
            Counter("active slots", _level(_edges(one.worked for one in self._served))),
            Counter("waiting requests", _level(_edges(one.queue for one in self._served))),
        ]

    def summary(self, unwatched: Sequence[Served]) -> dict[str, Any]:
        """The facts of `edgewise profile --json`. Phases are sums over the requests: a forward that serves two counts
        twice there, and once under graphs and operators."""
        usage = self._served[0].usage
        peak = max((rows for _, rows in _level(self._kv)), default=0)
        return {
            "requests": len(self._served),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": [one.usage.cached_tokens for one in self._served],
            "completion_tokens": [one.usage.completion_tokens for one in self._served],
            "unwatched": _speed(unwatched),
            "watched": _speed(self._served),
            "phases": self._phases(),
            "queue_wait_ms": [one.queue.ms for one in self._served],
            "graphs": self._graphs(),
            "operators": self._operators(),
            "kv": {"bytes_per_row": self._kv_bytes, "peak_rows": peak, "peak_bytes": peak * self._kv_bytes},
            "clock_skew_us": self._skew_ns / 1000,
        }

    def _phases(self) -> list[dict[str, Any]]:
        total = sum(one.time.ms for one in self._served)
        parts: dict[str, list[Time]] = {
            "template + tokenize": [one.prompt for one in self._served],
            "queue wait": [one.queue for one in self._served],
            "prefill": [step.time for one in self._served for step in one.filling],
            "decode": [step.time for one in self._served for step in one.decoding],
            "sampling": [took for one in self._served for took in one.sampling],
            "detokenize": [took for one in self._served for took in one.texts],
        }
        rows = [_row(name, [took.ms for took in times], total) for name, times in parts.items()]
        return [*rows, {"name": "other", "count": 0} | _shared(total - sum(row["ms"] for row in rows), total)]

    def _graphs(self) -> list[dict[str, Any]]:
        """Each graph's runs; what of the forwards lies outside of all graphs; and what in them is no operator."""
        forward = sum(step.time.ms for step in self._steps)
        times: dict[str, list[float]] = defaultdict(list)
        for run, _ in self._runs:
            times[run.graph].append(run.time.ms)
        rows = [_row(name, took, forward) for name, took in times.items()]
        inside = sum(row["ms"] for row in rows)
        operators = sum(one.time.ms for run, _ in self._runs for one in run.operators)
        between = {"name": "in graphs, between operators", "count": 0} | _shared(inside - operators, forward)
        return [*rows, between, {"name": "outside of graphs", "count": 0} | _shared(forward - inside, forward)]

    def _operators(self) -> list[dict[str, Any]]:
        """By type, the dearest first; per token over the steps that only fill prompts, or only decode."""
        times: dict[str, list[float]] = defaultdict(list)
        by_kind: dict[tuple[str, Kind], float] = defaultdict(float)
        for run, step in self._runs:
            for one in run.operators:
                times[one.type].append(one.time.ms)
                by_kind[one.type, self._kinds[step]] += one.time.ms * 1000
        tokens: dict[Kind, int] = defaultdict(int)
        for step_, kind in zip(self._steps, self._kinds, strict=True):
            tokens[kind] += _tokens(step_)
        total = sum(map(sum, times.values()))
        rows = [
            _row(name, took, total)
            | {
                f"{kind}_us_per_token": by_kind[name, kind] / tokens[kind] if tokens[kind] else None
                for kind in ("prefill", "decode")
            }
            for name, took in times.items()
        ]
        return sorted(rows, key=lambda row: -row["ms"])


def _placed(runs: Iterable[GraphRun], steps: Sequence[Step]) -> tuple[list[tuple[GraphRun, int]], int]:
    """Each run with the step that it lies in; those of the warm-up lie in none. Also the most that a run juts out of
    its step, in ns: how far the two clocks differ."""
    starts = [step.time.start for step in steps]
    placed, skew = [], 0
    for run in runs:
        middle = (run.time.start + run.time.end) // 2
        index = bisect_right(starts, middle) - 1
        if index >= 0 and middle <= steps[index].time.end:
            within = steps[index].time
            skew = max(skew, within.start - run.time.start, run.time.end - within.end)
            placed.append((run, index))
    return placed, skew


def _spans(one: Served) -> list[Span]:
    """A request's row: what contains comes before what it contains."""
    first = one.texts[0].end if one.texts else one.worked.end
    return [
        one.time.span(f"request {one.number}", completion_tokens=one.usage.completion_tokens),
        one.prompt.span("template + tokenize", tokens=one.usage.prompt_tokens),
        one.queue.span("queue wait"),
        Time(one.worked.start, first).span("prefill", cached_tokens=one.usage.cached_tokens),
        *([Time(first, one.worked.end).span("decode")] if one.decoding else []),
        *(step.time.span("prefill chunk") for step in one.filling),
        *(step.time.span("decode step") for step in one.decoding),
        *(took.span("sampling") for took in one.sampling),
        *(took.span("detokenize") for took in one.texts),
    ]


def _tokens(step: Step) -> int:
    return sum(count for _, _, count, _ in step.rows)


def _edges(times: Iterable[Time]) -> list[tuple[int, int]]:
    return [edge for took in times for edge in ((took.start, 1), (took.end, -1))]


def _level(changes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The running sum of changes, one point per moment."""
    level, points = 0, {}
    for at, change in sorted(changes):
        level += change
        points[at] = level
    return list(points.items())


def _speed(served: Sequence[Served]) -> dict[str, float | None]:
    """Medians over the requests."""
    decode = [one.timings.decode_tok_s for one in served if one.timings.decode_tok_s is not None]
    return {
        "first_token_ms": median(one.timings.first_token_ms for one in served),
        "total_ms": median(one.timings.total_ms for one in served),
        "decode_tok_s": median(decode) if decode else None,
    }


def _row(name: str, times: Sequence[float], total: float) -> dict[str, Any]:
    return {"name": name, "count": len(times)} | _shared(sum(times), total)


def _shared(ms: float, total: float) -> dict[str, float]:
    return {"ms": ms, "share": ms / total if total else 0.0}
