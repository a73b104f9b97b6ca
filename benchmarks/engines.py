"""Our engine against llama.cpp on the same weights, token ids, threads and machine.

    python benchmarks/engines.py [--rounds 5] [--prompt 512] [--new 128] [--json]

Engines take turns (A B C A B C …), each turn a fresh process: load, one short warm-up, one request. Prefill is
prompt tokens over time to the first token; decode is the rate after it, as each engine reports it.
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
from measurement import ROOT, figure, write

from edgewise.engines.decode import Decoder
from edgewise.engines.onnx_lm import Mode, OnnxLM, set_threads
from edgewise.models.download import ALIASES, packaged
from edgewise.models.source import Activations, pull
from edgewise.models.store import find
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import Request

PEER = "llama.cpp"
OURS: dict[str, tuple[Mode, Activations]] = {
    "edgewise fast": ("fast", "int8"),
    "edgewise stable": ("stable", "int8"),
    "edgewise fast, fp32 activations": ("fast", "fp32"),
}
ENGINES = ("edgewise fast", PEER, "edgewise stable", "edgewise fast, fp32 activations")
HOME = ROOT / ".cache" / "edgewise"
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(turn(args.worker, args.prompt, args.new)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    for activations in ("int8", "fp32"):
        pull("smollm2-135m", home=HOME, name=f"bench-{activations}", activations=activations)
    turns: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for n in range(args.rounds):
        for engine in ENGINES:
            turns[engine].append(fresh_process(engine, args))
            print(f"round {n + 1}/{args.rounds} {engine:32} {turns[engine][-1]}", file=sys.stderr)
    results = {
        engine: {key: figure([t[key] for t in rounds], UNITS[key]) for key in UNITS} for engine, rounds in turns.items()
    }
    ratios = {engine: against_llamacpp(turns, engine) for engine in ENGINES if engine != PEER}
    path = write(
        "engines",
        results={"engines": results, "ratio_to_llama.cpp": ratios},
        libraries=["onnxruntime", "xllamacpp", "numpy"],
        settings={"model": "smollm2-135m, exact Q4_1", "threads": THREADS, **vars(args)},
    )
    print(path.read_text() if args.json else table(results, ratios))


UNITS = {
    "prefill_tok_s": "tok/s",
    "decode_tok_s": "tok/s",
    "first_token_ms": "ms",
    "cold_start_s": "s",
    "peak_rss_mb": "MB",
}


def against_llamacpp(turns: dict[str, list[dict[str, float]]], engine: str) -> dict[str, Any]:
    """Ratio of each round's pair, so that drift of the machine cancels."""
    return {
        key: figure([ours[key] / peer[key] for ours, peer in zip(turns[engine], turns[PEER], strict=True)], "ratio")
        for key in ("prefill_tok_s", "decode_tok_s")
    }


def table(results: dict[str, Any], ratios: dict[str, Any]) -> str:
    lines = [f"{'engine':34}" + "".join(f"{key:>18}" for key in UNITS)]
    lines += [
        f"{engine:34}" + "".join(f"{row[key]['median']:18.2f}" for key in UNITS) for engine, row in results.items()
    ]
    for engine, row in ratios.items():
        parts = ", ".join(f"{key} {f['median']:.2f} [{f['low']:.2f}, {f['high']:.2f}]" for key, f in row.items())
        lines.append(f"{engine} / llama.cpp: {parts}")
    return "\n".join(lines)


def fresh_process(engine: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", engine, "--prompt", str(args.prompt), "--new", str(args.new)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise SystemExit(f"{engine} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def turn(engine: str, prompt: int, new: int) -> dict[str, float]:
    ids = np.random.default_rng(1).integers(1000, 40000, prompt).tolist()
    start = time.perf_counter()
    result = llamacpp(ids, new, start) if engine == PEER else ours(*OURS[engine], ids, new, start)
    return {**result, "peak_rss_mb": peak_rss_mb()}


def ours(mode: Mode, activations: Activations, ids: list[int], new: int, start: float) -> dict[str, float]:

    async def run() -> dict[str, float]:
        set_threads(THREADS)
        bundle = find(f"bench-{activations}", HOME)
        engine = Decoder(OnnxLM(bundle, mode=mode, slots=1, context=2048), Tokenizer.open(bundle.path))

        async def answer(ids: list[int], new: int) -> Any:
            last = None
            async for chunk in engine.generate(Request(prompt_ids=tuple(ids), max_tokens=new, ignore_eos=True)):
                last = chunk
            assert last is not None
            assert last.usage is not None
            assert last.usage.completion_tokens == new
            return last.timings

        await answer([1] * 8, 2)
        cold = time.perf_counter() - start
        timings = await answer(ids, new)
        await engine.close()
        return {
            "prefill_tok_s": len(ids) / timings.first_token_ms * 1e3,
            "decode_tok_s": timings.decode_tok_s,
            "first_token_ms": timings.first_token_ms,
            "cold_start_s": cold,
        }

    return asyncio.run(run())


def llamacpp(ids: list[int], new: int, start: float) -> dict[str, float]:
    """llama.cpp through xllamacpp: its own best defaults (flash attention auto, batch 2048/512), our thread count."""
    import xllamacpp as x  # here, so that our own turns are measured without it

    params = x.CommonParams()
    params.model.path = str(packaged(ALIASES["smollm2-135m"], HOME, lambda what, done, total: None))
    params.n_ctx = 2048
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    server = x.Server(params)

    def answer(ids: list[int], new: int) -> Any:
        ask = {"prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return server.handle_completions(ask)["timings"]

    answer([1] * 8, 2)
    cold = time.perf_counter() - start
    timings = answer(ids, new)
    assert timings["prompt_n"] == len(ids)
    assert timings["predicted_n"] == new
    return {
        "prefill_tok_s": timings["prompt_per_second"],
        "decode_tok_s": timings["predicted_per_second"],
        "first_token_ms": timings["prompt_ms"],
        "cold_start_s": cold,
    }


def peak_rss_mb() -> float:
    """High-water mark of resident memory, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1e3
    return float("nan")


if __name__ == "__main__":
    main()
