"""Ours and the others on the same model, token ids, threads and machine: what each costs and how true it stays.

Every contestant is prepared (outside all timings), judged once (KL to the source model, teacher-forced; a greedy answer
to compare with ours) and then measured in turns. A ratio compares figures of one round. The reference of the KL is our
bundle with exact weights and float32 activations, which benchmarks/fidelity.py holds against transformers.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.bench.host import measured_host
from edgewise.bench.limits import ceilings
from edgewise.bench.measure import figure
from edgewise.bench.peers.base import FAST, OUR_NAMES, OURS, PEERS, REFERENCE, STABLE, Contestant
from edgewise.bench.turns import Taken, TurnFailed, in_fresh_process, take_turns
from edgewise.devices.host import ENVIRONMENT, Host
from edgewise.devices.machine import usable_cores
from edgewise.errors import EngineError, UsageError
from edgewise.evaluate.divergence import Divergence, agreement_length, log_softmax
from edgewise.models.bundle import Bundle
from edgewise.models.described import described
from edgewise.models.download import Progress, fetch
from edgewise.models.source import Activations, pull
from edgewise.models.tokenizer import Tokenizer
from edgewise.plan.planner import Wish, make
from edgewise.plan.sites import ThisMachine
from edgewise.plan.speeds import shipped
from edgewise.settings import DEFAULT_MODEL
from edgewise.types import FloatArray

Row = dict[str, Any]  # of a contestant in a cell

KL_MARGIN: Final = 0.01  # nats; a peer that strays farther than ours by more does another task, and gets no ratio
PROSE = Path(__file__).with_name("prose.txt")
JUDGED = 256  # positions whose distributions are compared
GREEDY = 64  # tokens of the prompt, and of the answer, that show whether engines agree
SHORT = 8  # tokens of the prompt that a cold start answers
PREPARE_TIMEOUT_S = 3600.0  # converters take as long as the model is large
MOST_TOKENS = 1 << 24
MOST_THREADS = 4  # times the cores: more only wait for each other
DAY_S = 86400.0
LOCAL = {"HF_HUB_OFFLINE": "1"}  # the source is here; no converter has to ask the Hub for it
UNITS = {"decode_tok_s": "tok/s", "prefill_tok_s": "tok/s", "ttft_ms": "ms", "cold_start_s": "s", "peak_rss_bytes": "B"}
MORE_IS_BETTER = {"decode_tok_s", "prefill_tok_s"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `bench engines` does. `models` gives a peer its own form of the model, instead of a converted one."""

    model: str = DEFAULT_MODEL
    against: tuple[str, ...] = tuple(PEERS)
    rounds: int = 3
    prompts: tuple[int, ...] = (64, 512, 2048)
    new: int = 128
    threads: int = 2
    streams: tuple[int, ...] = (1,)
    timeout_s: float = 600.0  # of a turn
    accept_licence: bool = False
    models: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.against, *self.models):
            if name not in PEERS:
                raise UsageError(f"there is no peer {name!r}", hint=f"known: {', '.join(PEERS)}")
        if not (self.against and self.prompts and self.streams):
            raise UsageError("at least one peer, one prompt length and one number of streams are needed")
        for name, least, most, given in (
            ("--rounds", 1, 1000, (self.rounds,)),
            ("--prompts", 1, MOST_TOKENS, self.prompts),
            ("--new", 2, MOST_TOKENS, (self.new,)),
            ("--threads", 1, MOST_THREADS * (os.cpu_count() or 1), (self.threads,)),
            ("--streams", 1, 1000, self.streams),
        ):
            if wrong := [number for number in given if not least <= number <= most]:
                raise UsageError(f"{name} is {wrong[0]}; {least} to {most} are allowed")
        if not 0 < self.timeout_s <= DAY_S:
            raise UsageError(f"--timeout-s is {self.timeout_s:g}; more than 0 and at most {DAY_S:g} is allowed")

    @property
    def model_name(self) -> str:
        """As given, but of a path only its end: a report says nothing of the disk that it was made on."""
        return Path(self.model).name if Path(self.model).exists() else self.model


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a contestant before it is measured. `failed` says why it cannot be."""

    contestant: Contestant
    version: str | None = None
    model: str | None = None  # where it lies in the contestant's own form
    kl: float | None = None  # mean, nats; None if it shows no distributions
    greedy: tuple[int, ...] | None = None
    failed: str | None = None


def compare(plan: Comparison, home: Path, show: Progress) -> dict[str, Any]:
    """The report (docs/formats/measurement.md). UsageError, or what `pull` raises, before the first turn; EngineError
    if our own engine fails, as there is nothing to compare then."""
    desk = Desk(plan, home, show)
    standings = desk.standings()
    if broken := [s for s in standings if s.contestant.ours and s.failed]:
        raise EngineError(f"{broken[0].contestant.name} failed: {broken[0].failed}")
    probed, host = desk.limits(), desk.host()
    cells = [desk.cell(standings, probed, host, *pair) for pair in product(plan.prompts, plan.streams)]
    return {"model": plan.model_name, "limits": probed, "cells": cells}


class Desk:
    """Gives out the jobs of one comparison. Our bundles and the peers' conversions are kept under HOME/bench; ours are
    written anew each time, as they belong to the block writer of this version."""

    def __init__(self, plan: Comparison, home: Path, show: Progress) -> None:
        self._plan, self._show = plan, show
        self._source = fetch(plan.model, home, show).path.resolve()
        self._home = home / "bench"
        self._bundle = self._pull("int8")
        self._prose = Tokenizer.open(self._bundle.path).encode(PROSE.read_text(encoding="utf-8"))
        longest = _context(max(plan.prompts), plan.new)
        if longest > self._bundle.card.context:
            raise UsageError(
                f"prompt and answer have up to {longest} tokens, the model's context {self._bundle.card.context}",
                hint="give smaller --prompts or a smaller --new",
            )

    def standings(self) -> list[Standing]:
        """All contestants in the order of their turns, ours first: prepared and judged, or failed with a reason."""
        asked = [*OURS, *(contestant for name in self._plan.against for contestant in PEERS[name])]
        with tempfile.TemporaryDirectory(prefix="edgewise-bench-") as folder:
            file = Path(folder) / "logits.npy"
            self._judge(Standing(REFERENCE, model=str(self._pull("fp32").path)), file)
            reference = np.load(file)
            standings = []
            for number, contestant in enumerate(asked):
                self._show(f"judging {contestant.name}", number, len(asked))
                standings.append(self._standing(contestant, reference, file))
        return standings

    def limits(self) -> dict[str, Any]:
        self._show("measuring the machine's limits", 0, 1)
        job = {"turn": "limits", "bundle": str(self._bundle.path), "threads": self._plan.threads}
        return in_fresh_process(job, timeout_s=self._plan.timeout_s, environment=ENVIRONMENT)

    def host(self) -> Host | None:
        """This machine as it is now, for what a plan would have predicted; None if that is not what is measured."""
        if self._plan.threads != usable_cores() or 1 not in self._plan.streams:
            return None
        self._show("measuring what our kernels reach", 0, 1)
        return measured_host(self._home, fresh=True)

    def cell(
        self, standings: Sequence[Standing], probed: Mapping[str, Any], host: Host | None, prompt: int, streams: int
    ) -> dict[str, Any]:
        """One prompt length and number of streams: the turns of all who can take them."""
        plan, able = self._plan, {s.contestant.name: s for s in standings if s.failed is None}
        what, count = f"{prompt} tokens, {streams} streams", plan.rounds * len(able)

        def turn(name: str, number: int) -> dict[str, Any]:
            self._show(what, number * len(able) + list(able).index(name), count)
            return self._measure(able[name], prompt, streams)

        taken = take_turns(list(able), plan.rounds, turn)
        fast = able[FAST]
        engines = {s.contestant.name: row(s, taken.get(s.contestant.name), fast) for s in standings}
        ceiling = ceilings(self._bundle.card, probed, prompt, plan.new)
        return {
            "prompt_tokens": prompt,
            "streams": streams,
            "engines": engines,
            "ratio_to_best": ratios_to_best(engines, FAST),
            "ratio_to_best_stable": ratios_to_best(engines, STABLE),
            "ratio_to": {name: ratios(engines[FAST], engines[name]) for name in fit(engines)},
            "predicted": None if host is None or streams > 1 else self._predicted(host, prompt),
            "limits": {**ceiling, "share": {n: shares(r, ceiling) for n, r in engines.items() if r["decode_tok_s"]}},
        }

    def _predicted(self, host: Host, prompt: int) -> dict[str, Any]:
        """What `edgewise plan --device host` says of our engine."""
        wish = Wish(runtime="edgewise", context=_context(prompt, self._plan.new // 2), prompt=prompt)
        plan = make(described(str(self._bundle.path)), ThisMachine(host), shipped(), wish)
        return {"decode_tok_s": plan.decode_tok_s._asdict(), "prefill_tok_s": plan.prefill_tok_s._asdict()}

    def _pull(self, activations: Activations) -> Bundle:
        return pull(
            str(self._source),
            home=self._home,
            name=f"exact-{activations}",
            activations=activations,
            accept_licence=self._plan.accept_licence,
            progress=self._show,
        )

    def _standing(self, contestant: Contestant, reference: FloatArray, file: Path) -> Standing:
        try:
            found = version(contestant.library)
        except PackageNotFoundError:
            return Standing(contestant, failed=f"not installed; pip install {contestant.install}")
        try:
            standing = Standing(contestant, found, self._prepared(contestant, found))
            judged = self._judge(standing, file)
        except TurnFailed as e:
            return Standing(contestant, found, failed=e.message)
        kl = divergence(reference, np.load(file)) if judged["logits"] else None
        greedy = judged["greedy"] and tuple(judged["greedy"])
        return Standing(contestant, found, standing.model, kl, greedy)

    def _prepared(self, contestant: Contestant, found: str) -> str:
        given = [path for peer, path in self._plan.models.items() if contestant in PEERS[peer]]
        if given:
            return str(given[0].resolve())
        kept = f"{contestant.module}-{contestant.variant}-{found}-{_stamp(self._source)}"
        job = {
            **_who(contestant),
            "turn": "prepare",
            "source": str(self._source),
            "bundle": str(self._bundle.path),
            "work": str(self._home / "peers" / kept),
        }
        path: str = in_fresh_process(job, timeout_s=PREPARE_TIMEOUT_S, environment=LOCAL)["path"]
        return path

    def _judge(self, standing: Standing, file: Path) -> dict[str, Any]:
        count = min(JUDGED, self._bundle.card.context - 1)  # llama.cpp computes no row without room for its answer
        job = {
            **self._room(standing, count + 1, streams=1),
            "turn": "judge",
            "ids": self._ids(count, 0),
            "prompt": self._ids(min(GREEDY, count // 2), 0),
            "new": min(GREEDY, count // 2),
            "logits": str(file),
        }
        return in_fresh_process(job, timeout_s=self._plan.timeout_s, environment=LOCAL)

    def _measure(self, standing: Standing, prompt: int, streams: int) -> dict[str, Any]:
        job = {
            **self._room(standing, _context(prompt, self._plan.new), streams),
            "turn": "measure",
            "short": [self._ids(SHORT, 0)],
            "warm_up": [self._ids(prompt, 2 * n + 1) for n in range(streams)],
            "prompts": [self._ids(prompt, 2 * n) for n in range(streams)],
            "new": self._plan.new,
        }
        return in_fresh_process(job, timeout_s=self._plan.timeout_s, environment=LOCAL)

    def _room(self, standing: Standing, context: int, streams: int) -> dict[str, Any]:
        room = {"threads": self._plan.threads, "streams": streams, "context": context}
        return {**_who(standing.contestant), "model": standing.model, **room}

    def _ids(self, count: int, skip: int) -> list[int]:
        """So many ids of the prose, from another place for another `skip`; it starts again where it ends."""
        return [self._prose[(31 * skip + n) % len(self._prose)] for n in range(count)]


def row(standing: Standing, taken: Taken | None, ours: Standing) -> Row:
    """A contestant's line: samples of the rounds that it finished, and why it has no ratio, if it has none."""
    results = taken.results if taken else []
    failed = standing.failed or (taken.failed if taken else None)
    agreed = None if standing.greedy is None else agreement_length(standing.greedy, ours.greedy or ())
    return {
        "version": standing.version,
        "kl": standing.kl,
        **{key: [result[key] for result in results] for key in UNITS},
        "failed": failed,
        "left_out": None if standing.contestant.ours else left_out(standing.kl, ours.kl, failed),
        "greedy_agreement": agreed,
    }


def left_out(kl: float | None, ours: float | None, failed: str | None) -> str | None:
    """Why a peer has no ratio; None if it has one."""
    if failed is not None:
        return failed
    if kl is None or ours is None:
        return "it shows no distributions, so its fidelity is not known"
    if kl > ours + KL_MARGIN:
        return f"its KL of {kl:.3g} exceeds ours, {ours:.3g}, by more than {KL_MARGIN}"
    return None


def fit(engines: Mapping[str, Row]) -> list[str]:
    """The peers that ours may be compared with."""
    return [name for name, found in engines.items() if name not in OUR_NAMES and found["left_out"] is None]


def ratios(ours: Row, peer: Row) -> dict[str, dict[str, Any]]:
    """Ours over the peer's, figure by figure: of the two in each round, then median and interval."""
    pairs = {key: list(zip(ours[key], peer[key], strict=False)) for key in UNITS}
    return {key: _ratio(found) for key, found in pairs.items() if found}


def ratios_to_best(engines: Mapping[str, Row], name: str) -> dict[str, dict[str, Any]]:
    """Of each figure the ratio to the peer that is best in it by its median, and who that is."""
    found = {}
    for key in UNITS:
        medians = {peer: float(np.median(engines[peer][key])) for peer in fit(engines)}
        if medians and engines[name][key]:
            best = (max if key in MORE_IS_BETTER else min)(medians, key=lambda peer: medians[peer])
            found[key] = {**ratios(engines[name], engines[best])[key], "best": best}
    return found


def shares(found: Row, ceiling: Mapping[str, float]) -> dict[str, float]:
    """How much of each limit a contestant's median reaches."""
    decode, prefill = (float(np.median(found[key])) for key in ("decode_tok_s", "prefill_tok_s"))
    reached = {"decode_read": decode, "decode_int8": decode, "prefill_int8": prefill, "prefill_fp32": prefill}
    return {key: speed / ceiling[f"{key}_tok_s"] for key, speed in reached.items()}


def peers_that_ran(report: Mapping[str, Any]) -> dict[str, str]:
    """Name and version of each peer with at least one finished round."""
    rows = [pair for cell in report["cells"] for pair in cell["engines"].items()]
    return {name: found["version"] for name, found in rows if found["decode_tok_s"] and name not in OUR_NAMES}


def as_results(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report as a Measurement's results: samples become figures."""

    def figures(found: Row) -> Row:
        return found | {key: figure(found[key], unit) for key, unit in UNITS.items() if found[key]}

    cells = [cell | {"engines": {n: figures(r) for n, r in cell["engines"].items()}} for cell in report["cells"]]
    return {**report, "cells": cells}


def _ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return figure([ours / peer for ours, peer in pairs], "ratio")


def _context(prompt: int, new: int) -> int:
    return max(prompt, SHORT) + new


def _who(contestant: Contestant) -> dict[str, str]:
    return {"module": contestant.module, "variant": contestant.variant}


def _stamp(source: Path) -> str:
    """Tells one state of a source from another without reading its gigabytes."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(source), facts)).encode()).hexdigest()[:16]


def divergence(reference: FloatArray, logits: FloatArray) -> float:
    """Mean KL(reference || engine), nats. What an engine does not tell (NaN) shares the rest of its probability as it
    does in the reference: the KL is then a lower bound, short by how the tails differ, which favours the engine."""
    told = logits[:, : reference.shape[1]]  # some engines pad their vocabulary; the padding is no token
    unknown = np.isnan(told)
    if unknown.any():
        p = log_softmax(reference)
        rest = -np.expm1(np.minimum(_log_sum(np.where(unknown, -np.inf, told)), -1e-9))
        told = np.where(unknown, p + np.log(rest) - _log_sum(np.where(unknown, p, -np.inf)), told)
    found = Divergence()
    found.add(reference, told.astype(np.float32))
    return found.result().kl_mean


def _log_sum(logs: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """log of the sum of exp over each row, [n, 1]; -inf for a row of nothing."""
    return np.asarray(np.logaddexp.reduce(logs.astype(np.float64), axis=1, keepdims=True))
