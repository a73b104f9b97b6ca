"""A split model under test: how true coded boundaries are, whether faults cost tokens, whether exact ones change any,
and how fast it is beside the whole model."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from edgewise.bench import boundary, split_faults
from edgewise.bench.engines import PROSE
from edgewise.bench.journal import Journal
from edgewise.bench.measure import figure
from edgewise.bench.split_edge import WorkerProcess, answer, edge, whole
from edgewise.bench.split_faults import Show, compared
from edgewise.bench.turns import PAUSE_S, in_fresh_process
from edgewise.devices.links import link_named
from edgewise.errors import EngineError, UsageError
from edgewise.models.bundle import Bundle
from edgewise.models.tokenizer import Tokenizer
from edgewise.wire.codec import codec

NEW: Final = 64  # tokens of an answer, but those whose speed is measured
TIMED_NEW: Final = 128
TIMED_PROMPT: Final = 64
LEAST_TOKENS: Final = 64  # of a text
SHORTEST, LONGEST = 16, 512  # tokens of a prompt, if the model's context has room for them
LEAST_WINDOWS: Final = 4  # that perplexity is taken over
PATIENCE_S: Final = 300.0  # for one turn
SPEEDS: Final = ("split_tok_s", "whole_tok_s", "split_first_token_ms", "whole_first_token_ms")
MIDDLE: Final = ("median", "low", "high")
STALLS: Final = ("stall_ms", "tail_prefill_ms", "stall_over_tail_ms")


@dataclass(frozen=True, slots=True)
class SplitBench:
    """What `bench split` does. A number that is 0 leaves its part out. `cuts` None: behind a third and a half of the
    layers; "all": each that there is. `text` is what perplexity and prompts are taken of; a JSONL file with a `prompt`
    a line, `prompt_file`, may take its place for the prompts."""

    cuts: tuple[int, ...] | Literal["all"] | None = None
    codecs: tuple[str, ...] = ("int8", "int4", "exact")
    tokens: int = 2000  # whose perplexity is taken, for each cut and codec
    text: Path = PROSE
    link: str = "wifi"
    link_cuts: int = 20
    worker_kills: int = 5
    prompts: int = 20
    prompt_file: Path | None = None
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, given, most in (
            ("--tokens", self.tokens, 1 << 24),
            ("--link-cuts", self.link_cuts, 100_000),
            ("--worker-kills", self.worker_kills, 100_000),
            ("--prompts", self.prompts, 100_000),
            ("--rounds", self.rounds, 1000),
        ):
            if not 0 <= given <= most:
                raise UsageError(f"{name} is {given}; 0 to {most} are allowed")
        if 0 < self.tokens < LEAST_TOKENS:
            raise UsageError(f"--tokens is {self.tokens}; {LEAST_TOKENS} or more are needed", hint="0 leaves them out")
        for name in self.codecs:
            codec(name)
        link_named(self.link)
        if not self.codecs or self.cuts == ():
            raise UsageError("at least one cut and one codec are needed")

    @property
    def facts(self) -> dict[str, Any]:
        """What was fixed, for a Measurement; of files only their names."""
        return {
            "cuts": list(self.cuts) if isinstance(self.cuts, tuple) else self.cuts,
            "codecs": list(self.codecs),
            "tokens": self.tokens,
            "text": self.text.name,
            "link": self.link,
            "link_cuts": self.link_cuts,
            "worker_kills": self.worker_kills,
            "prompts": self.prompts,
            "prompt_file": None if self.prompt_file is None else self.prompt_file.name,
            "rounds": self.rounds,
            "seed": self.seed,
        }


class Campaign:
    """The parts of one bench on one bundle."""

    def __init__(self, plan: SplitBench, bundle: Bundle, done: Journal, show: Show) -> None:
        self._plan, self._bundle, self._done, self._show = plan, bundle, done, show
        last = bundle.card.layers
        usual = tuple(sorted({max(last // 3, 1), max(last // 2, 1)}))
        self._cuts = usual if plan.cuts is None else tuple(range(1, last)) if plan.cuts == "all" else plan.cuts
        if wrong := [cut for cut in self._cuts if not 0 < cut < last]:
            raise UsageError(f"{bundle.name} cannot be cut at {wrong[0]}", hint=f"1 to {last - 1} are allowed")
        self._tokenizer = Tokenizer.open(bundle.path)
        self._ids = self._tokenizer.encode(read(plan.text))
        if len(self._ids) < LEAST_TOKENS:
            raise UsageError(f"{plan.text.name} has {len(self._ids)} tokens; {LEAST_TOKENS} or more are needed")

        self._new = min(NEW, bundle.card.context // 4)
        self._prompts = self._read_prompts(self._longest(self._new))

    def report(self) -> dict[str, Any]:
        """The report (docs/formats/measurement.md). EngineError if a worker or a turn fails."""
        plan = self._plan
        return {
            "model": self._bundle.name,
            "rows": self._rows() if plan.tokens else [],
            "cuts": asyncio.run(self._faults()) if plan.link_cuts + plan.worker_kills else None,
            "identical": asyncio.run(self._identity()) if plan.prompts else None,
            "speed": self._speed(apart=False) if plan.rounds else None,
            "speed_apart": self._speed(apart=True) if plan.rounds and two_cores() else None,
        }

    def _rows(self) -> list[dict[str, Any]]:
        """Of a short text the windows are shorter, so that there are some to compare."""
        ids = self._ids[: self._plan.tokens]
        window = min(boundary.WINDOW, len(ids) // LEAST_WINDOWS)
        return boundary.measure(
            self._bundle, self._cuts, self._plan.codecs, ids, window=window, done=self._done, show=self._show
        )

    async def _faults(self) -> dict[str, Any]:
        plan, new = self._plan, min(split_faults.NEW, self._bundle.card.context // 2)
        trials = split_faults.drawn(plan.link_cuts, plan.worker_kills, self._cuts, plan.codecs, new, plan.seed)
        each = self._longest(new) // split_faults.TEXTS
        texts = [self._repeated(31 * n, (n + 1) * each) for n in range(split_faults.TEXTS)]
        found = await split_faults.campaign(self._bundle, trials, texts, new, plan.link, self._done, self._show)
        return split_faults.summary(found, plan.link_cuts, plan.link)

    async def _identity(self) -> dict[str, Any]:
        """Answers over an exact boundary beside those of the whole model, the cuts in turn."""
        new, prompts = self._new, self._prompts
        left = [number for number in range(len(prompts)) if self._done.get(f"prompt {number}") is None]
        if left:
            with WorkerProcess(self._bundle.path) as worker:
                async with edge(self._bundle, worker.url, self._cuts[0], "exact") as split, whole(self._bundle) as one:
                    for number in left:
                        self._show("identity", number, len(prompts))
                        split.model.move(self._cuts[number % len(self._cuts)])
                        mine = await answer(split.decoder, prompts[number], new)
                        wanted = await answer(one, prompts[number], new)
                        if failed := mine.failed or wanted.failed:
                            raise EngineError(f"prompt {number}: {failed}")
                        differ = sum(compared(wanted.ids, mine.ids).values())
                        here = split.model.tally.here
                        self._done.add(
                            f"prompt {number}", {"tokens": len(wanted.ids), "different": differ, "here": here}
                        )
        found = [result for number in range(len(prompts)) if (result := self._done.get(f"prompt {number}")) is not None]
        if here := max(one["here"] for one in found):
            raise EngineError(f"{here} tokens were computed here, though nothing was disturbed")
        sums = {name: sum(one[name] for one in found) for name in ("tokens", "different")}
        return {"prompts": len(found), **sums, "cuts": list(self._cuts)}

    def _speed(self, *, apart: bool) -> dict[str, Any]:
        """Whole, split, whole, split, …: each turn of an edge process of its own, and for a split a worker. `apart`:
        two machines of one core, on one of which the whole model runs; else both processes have all cores."""
        rounds = []
        for number in range(self._plan.rounds):
            piece = f"{'apart' if apart else 'round'} {number}"
            self._show("speed", number, self._plan.rounds)
            rounds.append(self._done.get(piece) or self._done.add(piece, self._round(number, apart)))
        first, context = rounds[0], self._bundle.card.context
        return {
            **{"cut": self._cuts[0], "codec": "exact", "prompt_tokens": min(TIMED_PROMPT, context // 4)},
            **{"new_tokens": min(TIMED_NEW, context // 2), "different": sum(one["different"] for one in rounds)},
            **{name: [one[name] for one in rounds] for name in first if name != "different"},
            "ratio": [one["split_tok_s"] / one["whole_tok_s"] for one in rounds],
        }

    def _round(self, number: int, apart: bool) -> dict[str, Any]:
        """The same ids for both; who begins changes from round to round, and every second one who has which core: on a
        machine with neighbours they are not equally fast."""
        turns = {}
        edge_core, worker_core = _cores(number) if apart else (None, None)
        for name in ("whole", "split") if number % 2 == 0 else ("split", "whole"):
            if name == "whole":
                turns[name] = self._turn(None, edge_core)
            else:
                with WorkerProcess(self._bundle.path, worker_core) as worker:
                    turns[name] = self._turn(worker.url, edge_core)
        split, one = turns["split"], turns["whole"]
        return {
            **{"split_tok_s": split["tok_s"], "whole_tok_s": one["tok_s"]},
            **{"split_first_token_ms": split["first_token_ms"], "whole_first_token_ms": one["first_token_ms"]},
            "different": sum(compared(one["ids"], split["ids"]).values()),
        }

    def _turn(self, url: str | None, core: int | None) -> dict[str, Any]:
        context = self._bundle.card.context
        new, prompt = min(TIMED_NEW, context // 2), min(TIMED_PROMPT, context // 4)
        job = {
            **{"turn": "split", "bundle": str(self._bundle.path), "url": url, "cut": self._cuts[0], "codec": "exact"},
            **{"core": core, "prompt": self._repeated(0, prompt), "warm_up": self._repeated(31, prompt), "new": new},
        }
        time.sleep(PAUSE_S)
        return in_fresh_process(job, timeout_s=PATIENCE_S)

    def _longest(self, new: int) -> int:
        return min(LONGEST, self._bundle.card.context - new)

    def _read_prompts(self, longest: int) -> list[list[int]]:
        plan = self._plan
        if plan.prompt_file is None:
            return [self._window(f"prompt {number}", min(longest, 4 * SHORTEST)) for number in range(plan.prompts)]
        lines = read(plan.prompt_file).splitlines()[: plan.prompts]
        found = [
            self._tokenizer.encode(_prompt(line, n, plan.prompt_file))[:longest] for n, line in enumerate(lines, 1)
        ]
        if len(found) < plan.prompts:
            raise UsageError(f"{plan.prompt_file.name} has {len(found)} prompts, {plan.prompts} are wanted")
        return found

    def _window(self, what: str, longest: int) -> list[int]:
        """A piece of the text of SHORTEST to `longest` tokens."""
        draw = random.Random(f"{self._plan.seed}/{what}")
        return self._repeated(draw.randrange(len(self._ids)), draw.randint(SHORTEST, longest))

    def _repeated(self, start: int, count: int) -> list[int]:
        """So many ids of the text from there on; it begins again where it ends."""
        return [self._ids[(start + n) % len(self._ids)] for n in range(count)]


def two_cores() -> bool:
    """Whether two processes can have a core each."""
    return hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1


def _cores(number: int) -> tuple[int, int]:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    return (second, first) if number % 4 > 1 else (first, second)


def read(file: Path) -> str:
    """UsageError if it is no text; OSError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(f"{file.name} is no UTF-8 text: {e}") from e


def _prompt(line: str, number: int, file: Path) -> str:
    try:
        found = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError):
        found = None
    if not isinstance(found, str) or not found:
        raise UsageError(f"line {number} of {file.name} has no `prompt`", hint='one object a line: {"prompt": "…"}')
    return found


def as_printed(report: dict[str, Any]) -> dict[str, Any]:
    """The report as `--json` shows it: of samples their middle and their ends; those of speeds stay."""
    return _with_samples(
        report, _spread, lambda ratio: {k: v for k, v in figure(ratio, "ratio").items() if k in MIDDLE}
    )


def as_results(report: dict[str, Any]) -> dict[str, Any]:
    """The report as a Measurement's results: samples become figures."""
    changed = _with_samples(report, _figure, lambda ratio: figure(ratio, "ratio"))
    units = {name: name.split("_", 1)[1].replace("first_token_", "").replace("_", "/") for name in SPEEDS}
    for part in ("speed", "speed_apart"):
        if changed[part]:
            changed[part] |= {name: figure(changed[part][name], unit) for name, unit in units.items()}
    return changed


def _with_samples(
    report: dict[str, Any],
    stalls: Callable[[Sequence[float]], dict[str, Any] | None],
    ratio: Callable[[Sequence[float]], dict[str, Any]],
) -> dict[str, Any]:
    def told(part: dict[str, Any]) -> dict[str, Any]:
        return part | {name: stalls(part[name]) for name in STALLS}

    cuts, speeds = report["cuts"], {name: report[name] for name in ("speed", "speed_apart")}
    return report | {
        "cuts": cuts and told(cuts) | {"by_kind": {kind: told(one) for kind, one in cuts["by_kind"].items()}},
        **{name: speed and speed | {"ratio": ratio(speed["ratio"])} for name, speed in speeds.items()},
    }


def _spread(samples: Sequence[float]) -> dict[str, Any] | None:
    """Median, 95th percentile and the most; None of none."""
    if not samples:
        return None
    return {"median": float(np.median(samples)), "p95": float(np.quantile(samples, 0.95)), "max": max(samples)}


def _figure(samples: Sequence[float]) -> dict[str, Any] | None:
    return {**figure(samples, "ms"), **(_spread(samples) or {})} if samples else None
