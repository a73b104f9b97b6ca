"""What `edgewise plan --device host` predicts, beside what `edgewise bench` then measures: in turns, round after round.

    python benchmarks/host_prediction.py [--models smollm2-135m] [--prompts 64,512] [--new 128] [--rounds 5]

Each round measures the machine afresh, predicts, and runs the model in a fresh process. The error is that of the median
prediction against the median measurement.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from edgewise.bench.engines import PROSE, SHORT
from edgewise.bench.host import measured_host
from edgewise.bench.measure import Measurement, figure, typed
from edgewise.bench.turns import in_fresh_process
from edgewise.devices.machine import this_machine
from edgewise.models.bundle import Bundle
from edgewise.models.described import described
from edgewise.models.download import fetch
from edgewise.models.source import pull
from edgewise.models.tokenizer import Tokenizer
from edgewise.plan.planner import Wish, make
from edgewise.plan.sites import ThisMachine
from edgewise.plan.speeds import shipped

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".cache" / "edgewise"
TARGETS = ("decode_tok_s", "prefill_tok_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smollm2-135m")
    parser.add_argument("--prompts", default="64,512")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for model in options.models.split(","):
        bundle = pulled(model)
        for prompt in map(int, options.prompts.split(",")):
            rounds = [one_round(bundle, prompt, options.new) for _ in range(options.rounds)]
            results[f"{Path(model).stem}, {prompt} tokens"] = compared(rounds)
    taken = Measurement.taken(
        "host_prediction",
        command=typed(__file__),
        results=results,
        libraries=["edgewise", "numpy"],
        settings={"new": options.new, "rounds": options.rounds},
    )
    for name, found in results.items():
        for target in TARGETS:
            p, m, error = (found[target][key] for key in ("predicted", "measured", "error"))
            print(f"{name}, {target}: predicted {p['median']:.4g}, measured {m['median']:.4g}, off by {error:+.1%}")
    print(taken.save(ROOT / "benchmarks" / "results"))


def pulled(model: str) -> Bundle:
    source = fetch(model, HOME, lambda what, done, total: None).path
    return pull(str(source), home=HOME, name="predicted", accept_licence=True)


def one_round(bundle: Bundle, prompt: int, new: int) -> dict[str, tuple[float, float]]:
    """(predicted, measured) of each target."""
    host = measured_host(HOME, fresh=True)
    wish = Wish(context=prompt + new // 2, prompt=prompt)
    plan = make(described(str(bundle.path)), ThisMachine(host), shipped(), wish)
    measured = run(bundle, prompt, new)
    return {target: (getattr(plan, target).value, measured[target]) for target in TARGETS}


def run(bundle: Bundle, prompt: int, new: int) -> dict[str, float]:
    prose = Tokenizer.open(bundle.path).encode(PROSE.read_text(encoding="utf-8"))

    def ids(count: int, skip: int) -> list[int]:
        return [prose[(skip + n) % len(prose)] for n in range(count)]

    job = {
        "module": "ours",
        "variant": "fast",
        "turn": "measure",
        "model": str(bundle.path),
        "threads": this_machine().usable_cores,
        "streams": 1,
        "context": prompt + new,
        "short": [ids(SHORT, 0)],
        "warm_up": [ids(prompt, 31)],
        "prompts": [ids(prompt, 0)],
        "new": new,
    }
    return in_fresh_process(job, timeout_s=600)


def compared(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    found = {}
    for target in TARGETS:
        predicted, measured = zip(*(one[target] for one in rounds), strict=True)
        error = median(predicted) / median(measured) - 1
        found[target] = {
            "predicted": figure(predicted, "tok/s"),
            "measured": figure(measured, "tok/s"),
            "error": error,
        }
    return found


if __name__ == "__main__":
    main()
