"""How far our engine is from the model it was given: KL to the dequantized GGUF in transformers, teacher-forced.

    python benchmarks/fidelity.py [--tokens 2000] [--text FILE] [--json]

Each bundle (exact weights with fp32 and int8 activations, requantized ones) and the reference see the same token ids.
Needs the test environment (torch, transformers); the text is docs/formats/*.md unless a file is given.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import ROOT, write

from edgewise.engines.base import Row
from edgewise.engines.onnx_lm import OnnxLM
from edgewise.evaluate.divergence import Divergence
from edgewise.evaluate.perplexity import Perplexity
from edgewise.models.bundle import Bundle
from edgewise.models.download import ALIASES, packaged
from edgewise.models.source import pull
from edgewise.models.tokenizer import Tokenizer

sys.path.insert(0, str(ROOT / "tests"))
from oracle import llama_from_gguf

HOME = ROOT / ".cache" / "edgewise"
CHUNK = 250
RECIPES: dict[str, dict[str, Any]] = {
    "exact, fp32 activations": {"activations": "fp32"},
    "exact, int8 activations": {},
    "int8, int8 activations": {"requantize": "int8"},
    "int4, int8 activations": {"requantize": "int4"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ids, reference = teacher(args.text, args.tokens)
    rows = {name: asyncio.run(judge(name, recipe, ids, reference)) for name, recipe in RECIPES.items()}
    reference_perplexity = Perplexity()
    reference_perplexity.add(reference[:-1], ids[1:])
    rows = {"reference": {"perplexity": reference_perplexity.result()}, **rows}
    settings = {
        "model": "smollm2-135m",
        "tokens": len(ids),
        "text": args.text.name if args.text else "docs/formats/*.md",
    }
    path = write(
        "fidelity", results=rows, libraries=["onnxruntime", "transformers", "torch", "gguf"], settings=settings
    )
    if args.json:
        print(path.read_text())
    else:
        for name, row in rows.items():
            print(f"{name:26}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()))


def teacher(text: Path | None, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and the reference's logits for them, float32 [tokens, vocab]."""
    files = [text] if text else sorted((ROOT / "docs" / "formats").glob("*.md"))
    path = packaged(ALIASES["smollm2-135m"], HOME, lambda what, done, total: None)
    tokenizer = Tokenizer.open(bundle("tokenizer", {}).path)
    ids = np.array(tokenizer.encode("\n".join(f.read_text() for f in files))[:tokens])
    if len(ids) < tokens:
        raise SystemExit(f"the text has only {len(ids)} tokens, {tokens} are wanted")
    with torch.no_grad():
        logits = llama_from_gguf(path)(torch.from_numpy(ids)[None]).logits[0].numpy()
    return ids, logits


def bundle(name: str, recipe: dict[str, Any]) -> Bundle:
    return pull("smollm2-135m", home=HOME, name="fidelity-" + name.replace(", ", "-").replace(" ", "-"), **recipe)


async def judge(name: str, recipe: dict[str, Any], ids: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    lm = OnnxLM(bundle(name, recipe), slots=1, context=len(ids))
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
