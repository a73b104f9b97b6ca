"""What of a watched run is whose: rows of forwards, tokens and graph runs, given to requests and forwards.

No row says which request it is for, and the requests of a run are alike. So rows of a session that go on from one
another are one request's work; works begin in the order in which their requests queue, first come, first served. What
does not fit (a work without a request, a token without a row) is counted and told, and nothing is made to fit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edgewise.bench.runs import GraphRun, Time
from edgewise.bench.watch import Log, Part, Step
from edgewise.types import Timings, Usage

Kind = Literal["prefill", "decode"]
KINDS: tuple[Kind, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Answer:
    """A request as its caller saw it, from its arrival to its last chunk."""

    number: int
    time: Time
    prompt: Time
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Share:
    """A row's part of a forward. All rows of a forward may be computed at once, so its time is shared out by their
    tokens: the shares of a forward add up to its time, however many requests it serves."""

    step: Step
    kind: Kind
    tokens: int

    @property
    def ms(self) -> float:
        return self.step.time.ms * self.tokens / self.step.tokens

    @property
    def others_ms(self) -> float:
        """What the forward took for other rows, which this one waited for."""
        return self.step.time.ms - self.ms


@dataclass
class Work:
    """Rows of a session that go on from one another, and the tokens chosen from them."""

    most: int | None = None  # tokens; None if it is not known
    length: int = 0  # rows of KV that it holds
    shares: list[Share] = field(default_factory=list)
    sampling: list[Time] = field(default_factory=list)
    texts: list[Time] = field(default_factory=list)
    chose: bool = False  # it has had logits

    def goes_on(self, row: Part) -> bool:
        return row.position == self.length

    def take(self, step: Step, row: Part) -> Share:
        share = Share(step, "decode" if self.chose else "prefill", row.tokens)
        self.shares.append(share)
        self.length = row.position + row.tokens
        self.chose |= row.want > 0
        return share

    @property
    def full(self) -> bool:
        """It has all its tokens: from its last logits it chose the stop token, which has no text."""
        return self.most is not None and len(self.texts) >= self.most

    @property
    def end(self) -> int:
        return max(self.shares[-1].step.time.end, *(text.end for text in self.texts[-1:]), 0)

    def of(self, kind: Kind) -> list[Share]:
        return [share for share in self.shares if share.kind == kind]


@dataclass(frozen=True, slots=True)
class Served:
    """A request and the work that was done for it."""

    answer: Answer
    work: Work

    @property
    def worked(self) -> Time:
        """From its first row to its last token."""
        prompt, work = self.answer.prompt, self.work
        if not work.shares:
            return Time(prompt.end, prompt.end)
        return Time(work.shares[0].step.time.start, work.end)

    @property
    def queue(self) -> Time:
        ready = self.answer.prompt.end
        return Time(ready, max(ready, self.worked.start))


@dataclass
class Shares:
    """A run's forwards, requests and KV."""

    steps: Sequence[Step]
    served: list[Served] = field(default_factory=list)  # in the order of their numbers
    kinds: list[dict[Kind, int]] = field(default_factory=list)  # tokens of each step
    kv: list[tuple[int, int]] = field(default_factory=list)  # (when, rows that came to it or left)
    unclaimed: dict[str, int] = field(default_factory=dict)  # what was noted and is nobody's

    def part(self, step: int, kind: Kind) -> float:
        """How much of a forward's time is of that kind, 0 to 1."""
        return self.kinds[step].get(kind, 0) / max(self.steps[step].tokens, 1)


def shared_out(log: Log, answers: Iterable[Answer]) -> Shares:
    waiting = deque(sorted(answers, key=lambda answer: answer.prompt.end))
    shares, choosing = Shares(log.steps), list[list[Work]]()
    works: dict[str, Work] = {}  # by session, the latest
    strangers: list[Work] = []

    def begun() -> Work:
        if not waiting:
            strangers.append(Work())
            return strangers[-1]
        answer = waiting.popleft()
        shares.served.append(Served(answer, Work(answer.usage.completion_tokens)))
        return shares.served[-1].work

    for step in log.steps:
        kinds: dict[Kind, int] = {}
        choosing.append([])
        for row in step.rows:
            work = works.get(row.session)
            if work is None or not work.goes_on(row):  # in a new session, or in one that is rewound
                work = works[row.session] = begun()
            before = work.length
            share = work.take(step, row)
            kinds[share.kind] = kinds.get(share.kind, 0) + share.tokens
            shares.kv.append((step.time.end, work.length - before))
            if row.want:
                choosing[-1].append(work)
        shares.kinds.append(kinds)

    lost = _give_tokens(log, choosing)
    shares.served += (Served(answer, Work()) for answer in waiting)
    shares.served.sort(key=lambda one: one.answer.number)
    shares.kv += ((one.worked.end, -one.work.length) for one in shares.served)
    shares.kv += ((work.end, -work.length) for work in strangers)
    seen = {"requests without rows": len(waiting), "rows without a request": sum(len(w.shares) for w in strangers)}
    shares.unclaimed = {what: count for what, count in (seen | {"tokens without a row": lost}).items() if count}
    return shares


def _give_tokens(log: Log, choosing: Sequence[Sequence[Work]]) -> int:
    """Each token to the row that it was chosen from: after a forward the rows that had logits choose, in their order.
    How many tokens fit none."""
    chosen: list[list[Time]] = [[] for _ in log.steps]
    ends = [step.time.end for step in log.steps]
    early = 0
    for text in log.texts:
        after = bisect_right(ends, text.start) - 1
        if after < 0:
            early += 1
        else:
            chosen[after].append(text)
    fitting = 0
    for end, works, texts in zip(ends, choosing, chosen, strict=True):
        for work, text in zip((work for work in works if not work.full), texts, strict=False):
            work.sampling.append(Time(end, text.start))
            work.texts.append(text)
            end = text.end
            fitting += 1
    return len(log.texts) - fitting


@dataclass(frozen=True, slots=True)
class Placed:
    """Graph runs with the number of the forward that each lies in."""

    runs: list[tuple[GraphRun, int]]
    strays: list[GraphRun]  # in no forward: the two clocks do not agree, or something else ran
    skew_ns: int | None  # the most that a run juts out of its forward; None if there is no run


def placed(runs: Iterable[GraphRun], log: Log) -> Placed:
    """Those of the warm-up are left out."""
    starts = [step.time.start for step in log.steps]
    found, strays, skew = [], [], 0
    for run in runs:
        middle = (run.time.start + run.time.end) // 2
        index = bisect_right(starts, middle) - 1
        if index >= 0 and middle <= log.steps[index].time.end:
            within = log.steps[index].time
            skew = max(skew, within.start - run.time.start, run.time.end - within.end)
            found.append((run, index))
        elif run.time.end > log.began:
            strays.append(run)
    return Placed(found, strays, skew if found else None)


@dataclass(frozen=True, slots=True)
class Watched:
    """A watched run put together."""

    shares: Shares
    placed: Placed
    kv_bytes: int  # of a row
