"""Speed against layers per block: how much a cut-able model costs.

    python benchmarks/block_size.py [--rounds 7] [--json]

SmolLM2 with 1, 2, 3, 6, 10, 15 and 30 layers a block; sizes take turns in one process, `fast` mode.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import numpy as np

from edgewise.bench.measure import Measurement, figure, typed
from edgewise.engines.base import Row
from edgewise.engines.local import set_threads
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.models.source import pull

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".cache" / "edgewise"
SIZES = (1, 2, 3, 6, 10, 15, 30)
PROMPT, NEW, THREADS = 256, 32, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    set_threads(THREADS)
    models = {
        n: OnnxLM(pull("smollm2-135m", home=HOME, name=f"blocks-{n}", layers_per_block=n), slots=1, mode="fast")
        for n in SIZES
    }
    asyncio.run(warm_up(models))
    prefill: dict[int, list[float]] = {n: [] for n in SIZES}
    decode: dict[int, list[float]] = {n: [] for n in SIZES}
    for _ in range(args.rounds):
        for n, lm in models.items():
            p, d = asyncio.run(turn(lm))
            prefill[n].append(p)
            decode[n].append(d)
    results = {
        str(n): {"prefill_tok_s": figure(prefill[n], "tok/s"), "decode_tok_s": figure(decode[n], "tok/s")}
        for n in SIZES
    }
    settings = {"model": "smollm2-135m", "threads": THREADS, "prompt": PROMPT, "new": NEW, "rounds": args.rounds}
    taken = Measurement.taken(
        "block_size", command=typed(__file__), results=results, libraries=["onnxruntime"], settings=settings
    )
    path = taken.save(ROOT / "benchmarks" / "results")
    if args.json:
        print(path.read_text())
    else:
        for n, row in results.items():
            print(f"{n:>3} layers a block: " + "  ".join(f"{key} {f['median']:.1f}" for key, f in row.items()))


async def warm_up(models: dict[int, OnnxLM]) -> None:
    for lm in models.values():
        await lm.open("s", lm.context)
        await turn(lm)


async def turn(lm: OnnxLM) -> tuple[float, float]:
    """Prefill and decode speed, tok/s."""
    ids = np.random.default_rng(1).integers(1000, 40000, PROMPT + NEW)
    start = time.perf_counter()
    await lm.forward([Row("s", 0, ids[:PROMPT])])
    filled = time.perf_counter()
    for n in range(PROMPT, PROMPT + NEW):
        await lm.forward([Row("s", n, ids[n : n + 1])])
    return PROMPT / (filled - start), NEW / (time.perf_counter() - filled)


if __name__ == "__main__":
    main()
