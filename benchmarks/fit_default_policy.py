"""Fit the thresholds of the policy that ships: the confidences of an edge model over many prompts, and where to cut.

    python benchmarks/fit_default_policy.py PROMPTS.jsonl --edge NAME -o src/edgewise/joint/shipped/default.json

Each line of PROMPTS.jsonl is an object with a `prompt`; they must not be the demo's. Whole answers and early decisions
get a threshold each, so that each escalates the share `--escalate`. Early ones are fitted on the answers that are
longer than `early.tokens`: a shorter one is judged as a whole when it is streamed, too.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgewise.bench.measure import Measurement, typed
from edgewise.engines.base import Generator
from edgewise.engines.load import open_generator
from edgewise.joint.pair import Model, Pair
from edgewise.joint.policy import Fitted, Forecast, Policy
from edgewise.joint.signals.evidence import Evidence
from edgewise.settings import Settings
from edgewise.types import Message, Request

QUANTILES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--edge", required=True, help="bundle name or directory")
    parser.add_argument("--home", type=Path, default=Settings().home.expanduser())
    parser.add_argument("--escalate", type=float, default=0.5, help="share of the answers that go to the cloud")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    prompts = read_prompts(options.prompts)[: options.limit]
    whole, early = asyncio.run(collect(options, prompts))
    if min(len(whole), len(early)) < 2:
        parser.error(f"{len(whole)} answers, {len(early)} of them longer than an early decision, are too few")
    policy = fitted(whole, early, options, prompts)
    options.output.write_bytes(policy.to_json())
    report(policy, whole, early, options)


def read_prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


async def collect(options: argparse.Namespace, prompts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Confidences of the whole answers, and of the beginnings of those that are longer than that."""
    policy = Policy.default()
    edge = open_generator(options.edge, home=options.home, slots=1)
    whole, early = [], []
    for number, prompt in enumerate(prompts, 1):
        at_end, at_start = await confidences(edge, prompt, options.max_tokens, policy)
        whole.append(at_end)
        if at_start is not None:
            early.append(at_start)
        print(f"\r{number} of {len(prompts)}", end="", flush=True)
    await edge.close()
    print()
    return whole, early


async def confidences(edge: Generator, prompt: str, max_tokens: int, policy: Policy) -> tuple[float, float | None]:
    request = Request((Message("user", prompt),), max_tokens=max_tokens, logprobs=True)
    chunks = [chunk async for chunk in edge.generate(request)]
    tokens = [token for chunk in chunks for token in chunk.tokens]
    text = "".join(chunk.text for chunk in chunks)
    logprobs, judge = [token.logprob for token in tokens], policy.whole.judge
    at_end = judge.judge(Evidence(prompt, text=text, logprobs=logprobs, finish_reason=chunks[-1].finish_reason))
    assert at_end is not None, f"{edge.name} gives no log-probabilities"
    assert policy.early is not None
    at_start = judge.judge(Evidence(prompt, logprobs=logprobs[: policy.early.tokens]))
    return at_end.worth, at_start.worth if at_start and len(tokens) > policy.early.tokens else None


def fitted(
    whole: Sequence[float], early: Sequence[float], options: argparse.Namespace, prompts: Sequence[str]
) -> Policy:
    policy = Policy.default()
    assert policy.early is not None
    margin = 1.96 * (options.escalate * (1 - options.escalate) / len(whole)) ** 0.5
    low, high = max(options.escalate - margin, 0.0), min(options.escalate + margin, 1.0)
    return msgspec.structs.replace(
        policy,
        pair=Pair(Model(Path(options.edge).name, None), None),
        whole=msgspec.structs.replace(policy.whole, threshold=cut(whole, options.escalate)),
        early=msgspec.structs.replace(policy.early, threshold=cut(early, options.escalate)),
        fitted=Fitted(
            data_sha256=hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
            rows=len(prompts),
            escalation=Forecast(options.escalate, round(low, 4), round(high, 4)),
        ),
    )


def cut(values: Sequence[float], escalate: float) -> float:
    """The threshold at or below which the share lies: half-way to the next value, so that rounding moves nobody."""
    ascending = sorted(values)
    count = min(max(round(escalate * len(ascending)), 1), len(ascending) - 1)
    below, above = ascending[count - 1], ascending[count]
    middle = round((below + above) / 2, 4)
    return middle if below <= middle < above else below


def report(policy: Policy, whole: Sequence[float], early: Sequence[float], options: argparse.Namespace) -> None:
    results = {}
    for name, values, threshold in (("whole", whole, policy.whole.threshold), ("early", early, policy.early.threshold)):
        results[name] = {
            "n": len(values),
            "threshold": threshold,
            "escalated": float(np.mean([value <= threshold for value in values])),
            "quantiles": {str(q): float(np.quantile(values, q)) for q in QUANTILES},
            "samples": [round(value, 4) for value in values],
        }
        print(f"{name}: threshold {threshold}, escalates {results[name]['escalated']:.2f} of {len(values)}")
        print("  " + "  ".join(f"{q:g}: {np.quantile(values, q):.3f}" for q in QUANTILES))
    kept = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    taken = Measurement.taken(
        "default_policy",
        command=typed(__file__),
        results=results,
        libraries=["edgewise", "onnxruntime"],
        settings=kept,
    )
    print(taken.save(Path(__file__).parent / "results"))
    print(options.output)


if __name__ == "__main__":
    main()
