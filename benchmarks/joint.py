"""How well policies route and how true their promises are, on replays of public sets.

    python benchmarks/joint.py DIRECTORY [--draws 20] [--only NAME,…]      the targets, one policy a draw of labels
    python benchmarks/joint.py DIRECTORY --audit 1000                      the guarantee of --max-drop

DIRECTORY holds the replay files. A policy is never judged on rows that it was fitted on. Writes a Measurement file.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgewise.bench.measure import Measurement, typed
from edgewise.evaluate.deferral import auroc
from edgewise.joint.fit.calibrate import calibrate
from edgewise.joint.fit.target import Budget, Choice, Cost, MaxDrop, Target
from edgewise.joint.judging import judge_replay
from edgewise.joint.policy import Policy
from edgewise.joint.replay import Outcome, Replay, Row


@dataclass(frozen=True)
class Task:
    """One line of the table."""

    name: str
    file: str
    labels: int
    target: Target = field(default_factory=Cost)
    prompt_only: bool = False


TASKS = (
    Task("mmlu, prompt", "routellm-mmlu", 1500, prompt_only=True),
    Task("gsm8k, prompt", "routellm-gsm8k", 330, prompt_only=True),
    Task("gsm8k, answer", "routellm-gsm8k", 330),
    Task("emotion, Qwen 1.8B to Mistral 7B", "emotion-qwen1.8b-mistral7b", 500),
    Task("emotion, Llama 7B to 13B", "emotion-llama7b-llama13b", 500),
    Task("math500, 30 % budget", "math500-qwen1.5b-qwen7b", 200, Budget(0.3)),
)
DROPS = (0.02, 0.03, 0.05, 0.07, 0.1)
SIZES = (100, 300, 1000)
DELTA = 0.1
DECISIONS = 2000  # that are timed in each draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--only", default="", help="names of lines, or of files for the audit, separated by |")
    parser.add_argument("--audit", type=int, metavar="RESAMPLES", help="audit the guarantee instead")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="rows of the audit's fits")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    only = [name for name in options.only.split("|") if name]
    with ProcessPoolExecutor(options.processes) as pool:
        if options.audit:
            results: Mapping[str, Any] = audited(options, only, pool)
        else:
            results = {
                task.name: drawn(task, options.directory, options.draws, pool)
                for task in TASKS
                if not only or task.name in only
            }
    taken = Measurement.taken(
        "joint_audit" if options.audit else "joint",
        command=typed(__file__),
        results=results,
        libraries=["edgewise", "numpy", "scikit-learn"],
        settings={"draws": options.audit or options.draws},
    )
    print(taken.save(Path(__file__).parent / "results"))


# The table


def drawn(task: Task, directory: Path, draws: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    started = time.perf_counter()
    rows = list(pool.map(partial(one_draw, task, directory), range(draws)))
    columns = {key: [row[key] for row in rows if row[key] is not None] for key in rows[0]}
    means = {key: float(np.mean(values)) if len(values) == draws else None for key, values in columns.items()}
    spread = {key: float(np.std(values)) if len(values) == draws else None for key, values in columns.items()}
    took = (time.perf_counter() - started) / draws
    shown = ", ".join(f"{key} {value:.3f}" for key, value in means.items() if value is not None)
    print(f"{task.name}: {shown} ({took:.1f} s a draw)")
    return {"labels": task.labels, "mean": means, "deviation": spread, "draws": rows}


def one_draw(task: Task, directory: Path, seed: int) -> dict[str, float | None]:
    """Figures of one draw; None where the tiers do not differ enough to have one."""
    replay = opened(directory / f"{task.file}.jsonl.gz", task.prompt_only)
    found = calibrate(replay, task.target, labels=task.labels, seed=seed)
    assert found.policy is not None
    judged = judge_replay(replay, found.policy)
    assert not judged.in_sample
    curve = judged.curve
    figures = {
        "apgr": curve.apgr,
        "cpt50": curve.cpt(0.5),
        "cpt80": curve.cpt(0.8),
        "best_over_cloud": float(curve.accuracy.max()) - judged.cloud_accuracy,
        "at_30_over_cloud": curve.at(0.3) - judged.cloud_accuracy,
        "escalated": judged.escalated,
        "forecast_error": judged.escalated - found.escalation.value,
        "accuracy_over_cloud": judged.accuracy.value - judged.cloud_accuracy,
        "ece_over_floor": (judged.ece or 0.0) - (judged.ece_floor or 0.0),
        "auroc": judged.auroc,
        "auroc_over_best_signal": (judged.auroc or 0.0) - best_signal(replay, found.policy.fitted.saw()),
    }
    figures |= decision_us(replay, found.policy)
    baseline = judged.baselines.get("max_softmax") or judged.baselines.get("mean_logprob") or judged.baselines["length"]
    figures["baseline_apgr"] = baseline.apgr
    return {key: None if value is None else float(value) for key, value in figures.items()}


def decision_us(replay: Replay, policy: Policy) -> dict[str, float]:
    """CPU time of this thread for one decision, texts and logits read included, in microseconds."""
    judge, times = policy.whole.judge, []
    for row in replay.rows[:DECISIONS]:
        evidence = row.evidence()
        before = time.thread_time_ns()
        judge.judge(evidence)
        times.append((time.thread_time_ns() - before) / 1000)
    return {"decision_p50_us": float(np.percentile(times, 50)), "decision_p99_us": float(np.percentile(times, 99))}


def best_signal(replay: Replay, seen: set[bytes]) -> float:
    """The AUROC of the best single signal in hindsight, either way round, for whether the edge is right."""
    rows = [(row, right) for row, right in zip(replay, replay.edge_right, strict=True) if row.fingerprint not in seen]
    right = np.array([one for _, one in rows])
    table, best = signals_of(replay), 0.5
    index = {row.id: number for number, row in enumerate(replay)}
    places = [index[row.id] for row, _ in rows]
    for column in table.T:
        values = column[places]
        if not np.isnan(values).any():
            found = auroc(values, right)
            best = best if found is None else max(best, found, 1 - found)
    return best


_tables: dict[int, np.ndarray[Any, Any]] = {}


def signals_of(replay: Replay) -> np.ndarray[Any, Any]:
    from edgewise.joint.signals.evidence import NAMES

    key = id(replay)
    if key not in _tables:
        evidence = [row.evidence() for row in replay]
        names = [*NAMES, *evidence[0].class_names]
        values = [[one.get(name) for name in names] for one in evidence]
        _tables[key] = np.array([[np.nan if value is None else value for value in row] for row in values])
    return _tables[key]


@cache
def opened(path: Path, prompt_only: bool) -> Replay:
    replay = Replay.open(path)
    return Replay([bare(row) for row in replay], sha256=replay.sha256, name=replay.name) if prompt_only else replay


def bare(row: Row) -> Row:
    """What is known before any tier has answered."""
    return msgspec.structs.replace(row, edge=Outcome(row.edge.correct), cloud=Outcome(row.cloud.correct))


# The audit


def audited(options: argparse.Namespace, only: Sequence[str], pool: ProcessPoolExecutor) -> dict[str, Any]:
    """For each file, size and drop: how often the risk among the other rows is above the drop, and how much is kept
    compared with the threshold that an oracle would set for the same judge."""
    files = only or sorted({task.file for task in TASKS})
    results: dict[str, Any] = {}
    for file in files:
        for size in options.sizes:
            path = options.directory / f"{file}.jsonl.gz"
            if size > len(opened(path, False)) // 2:
                continue
            found = list(pool.map(partial(one_audit, path, size), range(options.audit), chunksize=8))
            results[f"{file}, {size} rows"] = summary(found, options.audit)
    return results


def one_audit(path: Path, size: int, seed: int) -> list[tuple[bool, float, float, float]]:
    """For each drop: whether it was promised, the risk, the share kept and that of the oracle's threshold."""
    replay = opened(path, False)
    found = calibrate(replay, MaxDrop(0.5, 0.5), labels=size, seed=seed)
    assert found.policy is not None
    seen = found.policy.fitted.saw()
    fresh = [index for index, row in enumerate(replay) if row.fingerprint not in seen]
    rest = replay.take(fresh)
    worth = np.array([found.policy.whole.judge.judge(row.evidence()).worth for row in rest])
    bad = ~rest.edge_right & rest.cloud_right
    order = np.argsort(-worth, kind="stable")
    risks = np.cumsum(bad[order]) / len(bad)
    outcome = []
    for drop in DROPS:
        choice: Choice = MaxDrop(drop, DELTA).choose(found.whole.worth, found.whole.edge, found.whole.cloud, 1.0)
        kept = worth > (1.0 if choice.threshold is None else choice.threshold)
        best = float(np.searchsorted(risks, drop, side="right") / len(bad))
        outcome.append((choice.threshold is not None, float((kept & bad).mean()), float(kept.mean()), best))
    return outcome


def summary(found: Sequence[Sequence[tuple[bool, float, float, float]]], resamples: int) -> dict[str, Any]:
    table = {}
    for place, drop in enumerate(DROPS):
        cells = [one[place] for one in found]
        violated = float(np.mean([risk > drop for _, risk, _, _ in cells]))
        ratio = float(np.mean([kept / best for _, _, kept, best in cells if best > 0]))
        table[str(drop)] = {
            "promised": float(np.mean([promised for promised, *_ in cells])),
            "violations": violated,
            "allowed": DELTA + 2 * float(np.sqrt(DELTA * (1 - DELTA) / resamples)),
            "kept": float(np.mean([kept for _, _, kept, _ in cells])),
            "kept_of_oracle": ratio,
        }
        print(drop, table[str(drop)])
    return table


if __name__ == "__main__":
    main()
