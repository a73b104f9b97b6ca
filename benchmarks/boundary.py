"""What a coded boundary costs: perplexity through every cut of two models, as int8 and as int4.

    python benchmarks/boundary.py --text FILE [--models smollm2-135m,gemma-3-270m] [--codecs int8,int4] [--tokens 55000]
        [--seconds 200] [--table] [--json]

What each window gave is kept beside the result; with --seconds it ends when so much time has passed, and the same call
goes on from there (exit 1: call it again). --table writes the rows into src/edgewise/plan/codecs.json as well.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgewise.bench.boundary import WINDOW, measure
from edgewise.bench.journal import Journal
from edgewise.bench.measure import Measurement, typed
from edgewise.models.download import ALIASES, packaged
from edgewise.models.source import pull
from edgewise.models.tokenizer import Tokenizer
from edgewise.plan.codec_table import FORMAT, SHIPPED, Row

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from gemma import gemma_gguf

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".cache" / "edgewise"
MODELS = {
    "smollm2-135m": lambda: packaged(ALIASES["smollm2-135m"], HOME, lambda what, done, total: None),
    "gemma-3-270m": lambda: gemma_gguf(HOME),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--codecs", default="int8,int4")
    parser.add_argument("--tokens", default="55000", help="of each model, or one number for each, with commas")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds if args.seconds else None
    models, tokens = args.models.split(","), [int(count) for count in args.tokens.split(",")]
    counts = tokens * len(models) if len(tokens) == 1 else tokens
    rows = [row for name, count in zip(models, counts, strict=True) for row in judged(name, count, args, until)]
    settings = {"text": args.text.name, "window": WINDOW, "models": args.models, "codecs": args.codecs}
    taken = Measurement.taken("boundary", command=typed(__file__), results={"rows": rows}, settings=settings)
    path = taken.save(ROOT / "benchmarks" / "results")
    if args.table:
        write_table(rows)
    if args.json:
        print(path.read_text())
    else:
        summary(rows)


def judged(name: str, tokens: int, args: argparse.Namespace, until: float | None) -> list[dict[str, Any]]:
    bundle = pull(str(MODELS[name]()), home=HOME, name=name, accept_licence=True)
    ids = Tokenizer.open(bundle.path).encode(args.text.read_text())
    codecs = args.codecs.split(",")
    what = {"model": name, "weights": bundle.weights, "codecs": codecs, "text": args.text.name, "window": WINDOW}
    done = Journal(HOME / f"boundary-{name}.jsonl", what)

    def show(what: str, n: int, total: int) -> None:
        if until is not None and time.monotonic() > until:
            print(f"{name}: {n} of {total} {what}; call it again", file=sys.stderr)
            raise SystemExit(1)

    cuts = range(1, bundle.card.layers)
    return measure(bundle, cuts, codecs, np.array(ids[: tokens + WINDOW]), done=done, show=show)


def write_table(rows: list[dict[str, Any]]) -> None:
    """In place of those of the same model, cut and codec. By name, as other files of a model are cut as it is."""
    new = [row | {"weights": None, "interval": [round(end, 6) for end in row["interval"]]} for row in rows]
    new = [row | {"ppl_rise": round(row["ppl_rise"], 6)} for row in new]
    key = lambda row: (row["model"], row["cut"], row["codec"])
    kept = {key(row): row for row in msgspec.json.decode(SHIPPED.read_bytes())["rows"]} | {key(row): row for row in new}
    found = [msgspec.convert(row, Row) for row in kept.values()]
    lines = ",\n".join("  " + msgspec.json.encode(row).decode() for row in found)
    SHIPPED.write_text(f'{{"format": {FORMAT}, "rows": [\n{lines}\n]}}\n')


def summary(rows: list[dict[str, Any]]) -> None:
    for model, name in sorted({(row["model"], row["codec"]) for row in rows}):
        its = [row for row in rows if (row["model"], row["codec"]) == (model, name)]
        rises = [row["ppl_rise"] for row in its]
        print(
            f"{model} {name}: {its[0]['bytes']} bytes, {its[0]['tokens']} tokens, {len(its)} cuts: "
            f"median {np.median(rises):+.3%}, worst {max(rises):+.3%} at {its[int(np.argmax(rises))]['cut']}, "
            f"highest upper end {max(row['interval'][1] for row in its):+.3%}"
        )


if __name__ == "__main__":
    main()
