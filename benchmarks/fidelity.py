"""How far our engine is from the models it was given: KL to the dequantized GGUF in transformers, teacher-forced.

    python benchmarks/fidelity.py [--models smollm2-135m,gemma-3-270m] [--tokens 2000] [--text FILE] [--json]

Each bundle (exact weights with fp32 and int8 activations, requantized ones), on each runtime that takes it, and the
reference see the same token ids.
Needs the test environment (torch, transformers); the text is docs/formats/*.md unless a file is given.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgewise.bench.measure import Measurement, typed
from edgewise.engines.base import Row
from edgewise.engines.load import Runtime, chosen_runtime, local_model
from edgewise.evaluate.divergence import Divergence
from edgewise.evaluate.perplexity import Perplexity
from edgewise.models.bundle import Bundle
from edgewise.models.download import ALIASES, packaged
from edgewise.models.source import pull
from edgewise.models.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from gemma import gemma_gguf
from oracle import from_gguf

ROOT = Path(__file__).parents[1]
HOME = ROOT / ".cache" / "edgewise"
CHUNK = 250
EXACT: dict[str, dict[str, Any]] = {
    "exact, fp32 activations": {"activations": "fp32"},
    "exact, int8 activations": {},
}
REQUANTIZED: dict[str, dict[str, Any]] = {
    "int8, int8 activations": {"requantize": "int8"},
    "int4, int8 activations": {"requantize": "int4"},
}


@dataclass(frozen=True, slots=True)
class Model:
    """A model to judge, the most tokens of text for it, and the bundles to make of it."""

    gguf: Callable[[Path], Path]
    tokens: int
    recipes: dict[str, dict[str, Any]]


MODELS = {
    "smollm2-135m": Model(
        lambda home: packaged(ALIASES["smollm2-135m"], home, lambda what, done, total: None),
        1 << 20,
        EXACT | REQUANTIZED,
    ),
    "gemma-3-270m": Model(gemma_gguf, 800, EXACT),  # more than its window of 512; a row of logits is 1 MB
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    tokens = {}
    for name in args.models.split(","):
        tokens[name] = min(args.tokens, MODELS[name].tokens)
        rows |= {f"{name}: {bundle}": row for bundle, row in judged(name, args.text, tokens[name]).items()}
    settings = {"tokens": tokens, "text": args.text.name if args.text else "docs/formats/*.md"}
    taken = Measurement.taken(
        "fidelity",
        command=typed(__file__),
        results=rows,
        libraries=["onnxruntime", "transformers", "torch", "gguf"],
        settings=settings,
    )
    path = taken.save(ROOT / "benchmarks" / "results")
    if args.json:
        print(path.read_text())
    else:
        for name, row in rows.items():
            print(f"{name:54}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))


def judged(name: str, text: Path | None, tokens: int) -> dict[str, dict[str, float]]:
    """A row for the reference and for each bundle."""
    model = MODELS[name]
    path = model.gguf(HOME)
    bundles = {made: bundle(path, f"{name}-{made}", recipe) for made, recipe in model.recipes.items()}
    ids, reference = teacher(path, next(iter(bundles.values())), text, tokens)
    perplexity = Perplexity()
    perplexity.add(reference[:-1], ids[1:])
    rows = {"reference": {"perplexity": perplexity.result()}}
    for made, its in bundles.items():
        for runtime in sorted({chosen_runtime(its), "onnxruntime"}):
            rows[f"{made}, {runtime}"] = asyncio.run(judge(its, runtime, ids, reference))
    return rows


def teacher(gguf: Path, of: Bundle, text: Path | None, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and the reference's logits for them, float32 [tokens, vocab]."""
    files = [text] if text else sorted((ROOT / "docs" / "formats").glob("*.md"))
    ids = np.array(Tokenizer.open(of.path).encode("\n".join(f.read_text() for f in files))[:tokens])
    if len(ids) < tokens:
        raise SystemExit(f"the text has only {len(ids)} tokens, {tokens} are wanted")
    with torch.no_grad():
        return ids, from_gguf(gguf)(torch.from_numpy(ids)[None]).logits[0].numpy()


def bundle(gguf: Path, name: str, recipe: dict[str, Any]) -> Bundle:
    made = "fidelity-" + name.replace(", ", "-").replace(" ", "-")
    return pull(str(gguf), home=HOME, name=made, accept_licence=True, **recipe)


async def judge(its: Bundle, runtime: Runtime, ids: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    lm = local_model(its, runtime=runtime, slots=1, context=len(ids))
    await lm.open("s", len(ids))
    divergence, perplexity = Divergence(), Perplexity()
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        logits = (await lm.forward([Row("s", start, part, len(part))]))[0]
        divergence.add(reference[start : start + CHUNK], logits)
        following = ids[start + 1 : start + 1 + len(part)]
        perplexity.add(logits[: len(following)], following)
    await lm.shutdown()
    return {**asdict(divergence.result()), "perplexity": perplexity.result()}


if __name__ == "__main__":
    main()
