"""Where the time of an engine goes: the operators of a prompt and of its answer, and the steps of a cold start.

    python benchmarks/where.py [--model smollm2-135m] [--prompt 512] [--new 128] [--rounds 9]

Operators are those that `edgewise profile` sees, each with its share of the operators' time. Cold start: fresh
processes, one after the other, each doing one thing at a time (the engine loads tokenizer and model side by side).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".cache" / "edgewise"
STEPS = ("interpreter", "numpy", "modules", "tokenizer", "model", "first token")
SHORT = "The quick brown fox jumps over"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--child", metavar="STARTED", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(cold_start(options.model, options.child)))
        return

    from edgewise.bench.measure import Measurement, figure, typed
    from edgewise.models.download import fetch
    from edgewise.models.source import pull

    source = fetch(options.model, HOME, lambda what, done, total: None).path
    bundle = pull(str(source), home=HOME, name="where", accept_licence=True)
    starts = [fresh_start(bundle.path) for _ in range(options.rounds + 1)][1:]  # the first fills the system's cache
    results = {
        "cold_start": {step: figure([start[step] for start in starts], "ms") for step in STEPS},
        **operators(bundle, options.prompt, options.new, options.rounds),
    }
    settings = {"prompt_tokens": options.prompt, "new": options.new, "rounds": options.rounds, "model": options.model}
    taken = Measurement.taken(
        "where",
        command=typed(__file__),
        results=results,
        libraries=["edgewise", "numpy", "tokenizers"],
        settings=settings,
    )
    for part, found in results.items():
        print(part, ", ".join(f"{name} {value['median']:.3g} {value['unit']}" for name, value in found.items()))
    print(taken.save(ROOT / "benchmarks" / "results"))


def operators(bundle: Any, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Shares of the operators' time in prefill and in decoding, 0 to 1, one sample a round."""
    from edgewise.bench.measure import figure
    from edgewise.bench.profile import profile
    from edgewise.types import Message

    text = " ".join((ROOT / "src/edgewise/bench/prose.txt").read_text(encoding="utf-8").split()[: prompt * 4 // 5])
    shares: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
    for _ in range(rounds):
        found = profile(bundle, [Message("user", text)], max_tokens=new, slots=1)
        for kind, rows in shares.items():
            times = {row["name"]: row[f"{kind}_us_per_token"] for row in found["operators"]}
            for name, took in times.items():
                rows.setdefault(name, []).append(took / sum(times.values()))
    return {kind: {name: figure(samples, "share") for name, samples in rows.items()} for kind, rows in shares.items()}


def fresh_start(bundle: Path) -> dict[str, float]:
    time.sleep(0.5)
    command = [sys.executable, __file__, "--model", str(bundle), "--child", repr(time.monotonic())]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return found


def cold_start(bundle: str, started: float) -> dict[str, float]:
    """Milliseconds of each step; the imports of this file and its arguments count as the interpreter's."""
    at = [started, time.monotonic()]
    import numpy as np  # a step of its own

    at.append(time.monotonic())
    import asyncio

    from edgewise.engines.base import Row
    from edgewise.engines.load import local_model
    from edgewise.models.bundle import Bundle
    from edgewise.models.tokenizer import Tokenizer

    at.append(time.monotonic())
    opened = Bundle.open(Path(bundle), check=False)
    ids = Tokenizer.open(opened.path).encode(SHORT)
    at.append(time.monotonic())
    model = local_model(opened, slots=1, context=64)
    at.append(time.monotonic())

    async def first() -> None:
        await model.open("s", 64)
        await model.forward([Row("s", 0, np.array(ids))])

    asyncio.run(first())
    at.append(time.monotonic())
    return {step: (end - start) * 1e3 for step, start, end in zip(STEPS, at, at[1:], strict=False)}


if __name__ == "__main__":
    main()
