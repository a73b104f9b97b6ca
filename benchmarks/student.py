"""The default student: how fast beside its teacher, how near to it, and what its teacher's word was worth.

    python benchmarks/student.py STUDENT TEACHER RUN BASELINE --replay FILE [--trials RUN…] [--rounds 7] [--json]

STUDENT and TEACHER are bundles under EDGEWISE_HOME; RUN and BASELINE the outputs of two runs of `edgewise distill` over
the same rows, of which the second knew no teacher (alpha = 0). Decoding: turns of both bundles, each in a process of
its own. Agreement: of both runs' float32 students with the teacher, row by row of what was held out, and the bundle's.
The replay, which `edgewise record` made of both on prompts that the student has not learnt from (student_prompts.py)
and that the policy was not fitted on, says what the pair does with the policy that ships. Of trials, shorter runs over
those rows, what their logs say is taken down too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bench.measure import Measurement, figure, typed
from edgewise.compress.distil import checkpoint
from edgewise.compress.judge.bundles import PROMPTS, judged
from edgewise.compress.judge.kept import kept_ids
from edgewise.compress.lessons.corpus import Corpus
from edgewise.compress.lessons.teacher import Taught
from edgewise.engines.decode import Decoder
from edgewise.engines.load import loaded
from edgewise.engines.together import answers, prompt_ids
from edgewise.evaluate.chart import Axis, Line, chart
from edgewise.evaluate.interval import bootstrap
from edgewise.joint.judging import judge_replay
from edgewise.joint.pair import Pair, identity
from edgewise.joint.policy import Policy
from edgewise.joint.replay import Replay
from edgewise.models.bundle import MANIFEST
from edgewise.models.store import find
from edgewise.models.tokenizer import Tokenizer
from edgewise.settings import load
from edgewise.types import Request

ROOT = Path(__file__).parents[1]
PROMPT, NEW = "Tell me a long story about a lighthouse and the people who live near it.", 256
TOGETHER = 8  # rows
Array = np.ndarray[Any, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("run", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--replay", type=Path, required=True)
    parser.add_argument("--trials", type=Path, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    if sys.argv[1:2] == ["--turn"]:
        print(json.dumps(asyncio.run(turn(sys.argv[2]))))
        return
    args = parser.parse_args()
    corpus = Corpus.open(args.run / "corpus")
    if Corpus.open(args.baseline / "corpus").digest != corpus.digest:
        raise SystemExit("the two runs are not over the same rows")
    results = {
        "decode": decoding(args.student, args.teacher, args.rounds),
        "agreement": agreement(corpus, args.run, args.baseline),
        "bundle": bundle(args.student, args.teacher, corpus),
        "pair": pair(args.student, args.replay),
        "training": {"distilled": training(args.run), "text_alone": training(args.baseline)},
        "trials": [training(trial) for trial in args.trials],
    }
    settings = {"new_tokens": NEW, "rounds": args.rounds, "held_out_rows": len(corpus.held_out)}
    libraries = ["numpy", "torch", "transformers"]
    taken = Measurement.taken(
        "student", command=typed(__file__), results=results, libraries=libraries, settings=settings
    )
    path = taken.save(ROOT / "benchmarks" / "results")
    path.with_suffix(".svg").write_text(plot(results["training"]), encoding="utf-8")
    print(path.read_text() if args.json else f"wrote {path.name}")


async def turn(name: str) -> float:
    """Tokens a second of one greedy answer of NEW tokens, whether it would end or not, after a short one."""
    model, tokenizer = loaded(find(name, load().settings.home), slots=1)
    decoder = Decoder(model, tokenizer, name=name)
    try:
        ids = prompt_ids(tokenizer, PROMPT, plain=False)
        for new in (8, NEW):
            began = time.perf_counter()
            (answer,) = await answers(decoder, [Request(prompt_ids=ids, max_tokens=new, ignore_eos=True)], at_once=1)
            took_s = time.perf_counter() - began
        return len(answer.tokens) / took_s
    finally:
        await decoder.close()


def decoding(student: str, teacher: str, rounds: int) -> dict[str, Any]:
    taken: dict[str, list[float]] = {student: [], teacher: []}
    for number in range(rounds):
        for name in (student, teacher) if number % 2 else (teacher, student):
            done = subprocess.run(
                [sys.executable, __file__, "--turn", name], capture_output=True, check=True, text=True
            )
            taken[name].append(float(json.loads(done.stdout.splitlines()[-1])))
    mine, its = (np.array(taken[name]) for name in (student, teacher))
    return {
        "student": figure(mine, "tok/s"),
        "teacher": figure(its, "tok/s"),
        "ratio": figure(mine / its, "1"),
    }


def agreement(corpus: Corpus, run: Path, baseline: Path) -> dict[str, Any]:
    """How often each run's student would say what the teacher would, of all tokens that follow another in their row."""
    directory = run / "taught" / "held_out"
    best = Taught.open(directory).rows(np.arange(len(corpus.held_out))).ids[:, :-1, 0]
    distilled, alone = (
        (choices(path / "student", corpus.held_out)[:, :-1] == best).mean(axis=1) for path in (run, baseline)
    )
    return {
        "tokens": best.size,
        "distilled": interval(distilled),
        "text_alone": interval(alone),
        "gain": interval(distilled - alone),
    }


def choices(directory: Path, rows: Array) -> Array:
    """A student's most probable next token at each position of rows [n, length]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        parts = [
            model(torch.from_numpy(rows[at : at + TOGETHER].astype(np.int64))).logits.argmax(-1).numpy()
            for at in range(0, len(rows), TOGETHER)
        ]
    return np.concatenate(parts)


def bundle(student: str, teacher: str, corpus: Corpus) -> dict[str, Any]:
    home = load().settings.home
    here, there = find(student, home), find(teacher, home)
    kept = kept_ids(Tokenizer.open(here.path), Tokenizer.open(there.path))
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    found = judged(here, there, corpus.held_out.astype(np.int64), kept=kept, prompts=prompts)
    return {"bytes": here.bytes, "bytes_of_teacher": there.bytes, **found.facts()}


def pair(student: str, replay: Path) -> dict[str, Any]:
    """The shipped policy's whole-answer decisions over prompts that it was not fitted on."""
    rows = Replay.open(replay)
    edge = identity(student, find(student, load().settings.home).path / MANIFEST)
    found = judge_replay(rows, Policy.shipped(Pair(edge, None)))
    if found.in_sample:
        raise SystemExit(f"the policy was fitted on all of {replay.name}")
    return {
        "rows": found.n,
        "escalated": found.escalated,
        "accuracy": {"value": found.accuracy.value, "low": found.accuracy.low, "high": found.accuracy.high},
        "edge_accuracy": found.edge_accuracy,
        "cloud_accuracy": found.cloud_accuracy,
        "drop": found.drop,
        "apgr": found.curve.apgr,
        "baselines": {name: curve.apgr for name, curve in found.baselines.items()},
    }


def training(output: Path) -> dict[str, Any]:
    """What a run's last checkpoint and its log say of it."""
    last = checkpoint.latest(output / "checkpoints")
    assert last is not None, f"{output} has no checkpoint"
    state = checkpoint.read_state(last)
    log = [json.loads(line) for line in (output / "training.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    return {
        "run": output.name,
        "config": state.facts,
        "steps": state.step,
        "tokens": state.tokens,
        "hours": steps[-1]["elapsed_s"] / 3600,
        "held_out": [{"tokens": line["tokens"], **line["held_out"]} for line in log if "held_out" in line],
    }


def plot(runs: dict[str, Any]) -> str:
    """Agreement with the teacher over tokens seen, with its word and without."""
    names = {"teacher and text": "distilled", "text alone": "text_alone"}
    keys = ("tokens", "top1_agreement")
    lines = {
        words: Line(*(np.array([look[key] for look in runs[name]["held_out"]], np.float64) for key in keys))
        for words, name in names.items()
    }
    end = max(run["tokens"] for run in runs.values())
    axis = Axis(end, [(end * part / 4, f"{end * part / 4e6:.1f} M") for part in range(5)])
    return chart("edgewise-student", lines, axis, "top-1 agreement with its teacher (up) by tokens seen (across)")


def interval(values: Array) -> dict[str, float]:
    found = bootstrap(values)
    return {"value": found.value, "low": found.low, "high": found.high}


if __name__ == "__main__":
    main()
