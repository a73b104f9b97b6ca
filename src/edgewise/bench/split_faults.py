"""Faults while a split model answers: the link breaks or falls silent, the worker is killed. Are the tokens the same?

Each trial is one answer through a relay and one fault in it, at a point that the seed draws. The tokens are held
against those of the whole model where the boundary is exact, else against those of the same split undisturbed.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import groupby, product
from typing import Any, Final, Literal

import numpy as np

from edgewise.bench.journal import Journal
from edgewise.bench.relay import Fault, Relay
from edgewise.bench.split_edge import Answer, Edge, WorkerProcess, answer, edge, whole
from edgewise.devices.links import link_named
from edgewise.errors import EngineError
from edgewise.models.bundle import Bundle

Kind = Literal["reset", "cut", "stall", "kill"]

OF_THE_LINK: Final[tuple[Kind, ...]] = ("reset", "cut", "stall")
BEFORE_THE_FIRST: Final = 10  # of so many faults one comes before the first token
QUIET_END: Final = 4  # tokens at the end that no fault is aimed at: it would come too late
JITTER_S: Final = 0.03  # after the token that a fault waits for: anywhere in the making of the next ones
EARLY_S: Final = 0.3  # the same, where it comes before the first token
LASTS_S: Final = (0.02, 1.0)  # how long a link is cut or silent, and a worker is dead before it is started again
SEEN_MS: Final = 100.0  # a reader notices a longer pause
BACK_S: Final = 30.0  # in which the edge must have found a worker that is there
TEXTS: Final = 4  # prompts for each cut and codec, in turn
NEW: Final = 160  # tokens of an answer

COUNTED: Final = ("there", "here", "losses", "returns", "replayed")  # of a Tally
Show = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """A fault of `kind`, `after_s` behind token number `token` (0: behind the request) of the answer to a prompt."""

    number: int
    kind: Kind
    cut: int
    codec: str
    text: int
    token: int
    after_s: float
    lasts_s: float

    @property
    def piece(self) -> str:
        return f"fault {self.number}"


def drawn(link_cuts: int, kills: int, cuts: Sequence[int], codecs: Sequence[str], new: int, seed: int) -> list[Trial]:
    """The trials in the order in which they are to be made: those of one cut and codec one behind the other. Every kind
    of fault comes to every one of them in turn."""
    ways, trials = list(product(cuts, codecs)), []
    for number in range(link_cuts + kills):
        draw = random.Random(f"{seed}/{number}")
        turn, way = divmod(number, len(ways))
        kind = OF_THE_LINK[(turn + way) % len(OF_THE_LINK)] if number < link_cuts else "kill"
        cut, coding = ways[way]
        early = number % BEFORE_THE_FIRST == BEFORE_THE_FIRST - 1
        token = 0 if early else draw.randint(1, new - QUIET_END)
        after_s = draw.uniform(0, EARLY_S if early else JITTER_S)
        lasts_s = LASTS_S[0] * (LASTS_S[1] / LASTS_S[0]) ** draw.random()
        trials.append(Trial(number, kind, cut, coding, turn % TEXTS, token, after_s, lasts_s))
    return sorted(trials, key=lambda trial: (ways.index((trial.cut, trial.codec)), trial.number))


async def campaign(
    bundle: Bundle,
    trials: Sequence[Trial],
    texts: Sequence[Sequence[int]],
    new: int,
    link: str,
    done: Journal,
    show: Show,
) -> list[dict[str, Any]]:
    """A result for each trial; those that `done` has are not made again. EngineError if a worker cannot be started, or
    an edge does not find one that is there."""
    left = [trial for trial in trials if done.get(trial.piece) is None]
    made = len(trials) - len(left)
    if left:
        with _unheard(), WorkerProcess(bundle.path) as worker, Relay(worker.url, link_named(link)) as relay:
            for (cut, coding), some in groupby(left, key=lambda trial: (trial.cut, trial.codec)):
                group = list(some)
                wanted = await _undisturbed(bundle, worker, texts, new, group)
                async with edge(bundle, relay.url, cut, coding) as split:
                    for trial in group:
                        show("faults", made, len(trials))
                        text = texts[trial.text]
                        done.add(trial.piece, await _made(trial, split, text, wanted[trial.text], worker, relay))
                        made += 1
    return done.all(trial.piece for trial in trials)


@contextmanager
def _unheard() -> Iterator[None]:
    """Without a warning for each of our own faults."""
    told = logging.getLogger("edgewise.split")
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        yield
    finally:
        told.setLevel(level)


async def _undisturbed(
    bundle: Bundle, worker: WorkerProcess, texts: Sequence[Sequence[int]], new: int, group: Sequence[Trial]
) -> dict[int, list[int]]:
    """The tokens that must come, by text."""
    numbers, first = sorted({trial.text for trial in group}), group[0]
    if first.codec == "exact":
        async with whole(bundle) as decoder:
            found = {number: await answer(decoder, texts[number], new) for number in numbers}
    else:
        async with edge(bundle, worker.url, first.cut, first.codec) as split:
            found = {number: await answer(split.decoder, texts[number], new) for number in numbers}
            if split.model.tally.here:
                raise EngineError(f"nothing was disturbed, and yet the worker went: {split.model.tally.last_loss}")
    if failed := [one.failed for one in found.values() if one.failed]:
        raise EngineError(f"an answer that nothing disturbed failed: {failed[0]}")
    return {number: one.ids for number, one in found.items()}


async def _made(
    trial: Trial, split: Edge, text: Sequence[int], wanted: list[int], worker: WorkerProcess, relay: Relay
) -> dict[str, Any]:
    """One answer with its fault, and what the tail alone takes for the rows that there were then."""
    found, counts = await _disturbed(trial, split, text, len(wanted), worker, relay)
    rows = [*text, *found.ids[: trial.token]]
    return {
        **{"kind": trial.kind, "cut": trial.cut, "codec": trial.codec, "token": trial.token, "rows": len(rows)},
        **compared(wanted, found.ids),
        "stall_ms": _stall_ms(found, trial.token),
        "tail_prefill_ms": await split.tail_s(rows, trial.cut, trial.codec) * 1e3,
        **counts,
        "failed": found.failed,
    }


async def _disturbed(
    trial: Trial, split: Edge, text: Sequence[int], new: int, worker: WorkerProcess, relay: Relay
) -> tuple[Answer, dict[str, int]]:
    """The answer, and what of the tally it was. All is well again when they are returned."""
    mending: list[asyncio.Task[None]] = []
    before = replace(split.model.tally)

    def seen(count: int) -> None:
        if count == trial.token:
            mending.append(asyncio.create_task(_break(trial, worker, relay)))

    found = await answer(split.decoder, text, new, seen)
    counts = {name: getattr(split.model.tally, name) - getattr(before, name) for name in COUNTED}
    await asyncio.gather(*mending)
    await _well(split, text[-1:])
    return found, counts


async def _well(split: Edge, text: Sequence[int]) -> None:
    """Until answers come from the worker again."""
    until_s, there = time.monotonic() + BACK_S, split.model.tally.there
    while split.model.tally.there == there:
        if time.monotonic() > until_s:
            raise EngineError(
                f"the edge did not find its worker again within {BACK_S:g} s: {split.model.tally.last_loss}"
            )
        await answer(split.decoder, text, 1)


async def _break(trial: Trial, worker: WorkerProcess, relay: Relay) -> None:
    """The fault, to its end."""
    if trial.kind == "kill":
        await asyncio.sleep(trial.after_s)
        await asyncio.to_thread(worker.kill)
        await asyncio.sleep(trial.lasts_s)
        await asyncio.to_thread(worker.start)
    else:
        lasts_s = None if trial.kind == "reset" else trial.lasts_s
        relay.schedule(Fault(trial.kind, after_s=trial.after_s, lasts_s=lasts_s))
        await asyncio.sleep(trial.after_s + (lasts_s or 0.0) + JITTER_S)


def compared(wanted: Sequence[int], came: Sequence[int]) -> dict[str, int]:
    """How many tokens must be put in, taken out or changed to make of those that came those that were wanted."""
    counts = {"lost": 0, "duplicated": 0, "different": 0}
    for what, start, end, first, last in SequenceMatcher(None, wanted, came, autojunk=False).get_opcodes():
        missing, more = end - start, last - first
        if what != "equal":
            counts["different"] += min(missing, more)
            counts["lost"] += max(missing - more, 0)
            counts["duplicated"] += max(more - missing, 0)
    return counts


def _stall_ms(found: Answer, token: int) -> float | None:
    """The longest that the reader waited between two tokens from the fault on; None if it was before the first."""
    gaps = np.diff(found.at_s)[token - 1 :] if token else np.empty(0)
    return float(gaps.max()) * 1e3 if len(gaps) else None


def summary(results: Sequence[dict[str, Any]], link_cuts: int, link: str) -> dict[str, Any]:
    """The report's `cuts`: sums, and the samples of the stalls with what the tail alone took, trial by trial; then the
    same for each kind of fault. A stall counts where the edge or its reader noticed something."""
    kinds = {kind: [one for one in results if one["kind"] == kind] for kind in (*OF_THE_LINK, "kill")}
    return {
        **{"n": link_cuts, "kills": len(results) - link_cuts, "link": link},
        **_told(results),
        "failed": [one["failed"] for one in results if one["failed"]],
        "by_kind": {kind: {"n": len(some), **_told(some)} for kind, some in kinds.items() if some},
    }


def _told(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    felt = [one for one in results if one["losses"] or one["here"] or (one["stall_ms"] or 0) > SEEN_MS]
    stalls = [one for one in felt if one["stall_ms"] is not None]
    return {
        **{name: sum(one[name] for one in results) for name in ("lost", "duplicated", "different")},
        "felt": len(felt),
        "tokens": {name: sum(one[name] for one in results) for name in ("there", "here")},
        "returns": sum(one["returns"] for one in results),
        "replayed_rows": sum(one["replayed"] for one in results),
        "stall_ms": [one["stall_ms"] for one in stalls],
        "tail_prefill_ms": [one["tail_prefill_ms"] for one in stalls],
        "stall_over_tail_ms": [one["stall_ms"] - one["tail_prefill_ms"] for one in stalls],
    }
