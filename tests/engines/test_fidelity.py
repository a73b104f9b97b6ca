"""The default model against its own GGUF, dequantized and run by transformers: teacher-forced KL.

`benchmarks/fidelity.py` reports the figures over 2,000 tokens; here a shorter text guards the bounds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgewise.engines.base import Row
from edgewise.engines.load import Chosen, local_model
from edgewise.evaluate.divergence import Comparison, Divergence
from edgewise.models.source import pull
from edgewise.models.tokenizer import Tokenizer
from oracle import from_gguf

TEXT = Path(__file__).parents[2] / "LICENSE"
TOKENS = 600


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray, Path]:
    home = tmp_path_factory.mktemp("home")
    tokenizer = Tokenizer.open(pull(str(smollm2_gguf), home=home).path)
    ids = np.array(tokenizer.encode(TEXT.read_text()))[:TOKENS]
    assert len(ids) == TOKENS
    with torch.no_grad():
        return ids, from_gguf(smollm2_gguf)(torch.from_numpy(ids)[None]).logits[0].numpy(), home


@pytest.mark.parametrize(
    ("activations", "runtime", "bound"),
    [("fp32", "onnxruntime", 1e-5), ("int8", "onnxruntime", 0.01), ("int8", "native", 0.01)],
)
async def test_exact_weights(
    smollm2_gguf: Path,
    reference: tuple[np.ndarray, np.ndarray, Path],
    activations: str,
    runtime: Chosen,
    bound: float,
) -> None:
    assert (await compare(smollm2_gguf, reference, runtime, activations=activations)).kl_mean <= bound


async def test_int4_is_visibly_worse(smollm2_gguf: Path, reference: tuple[np.ndarray, np.ndarray, Path]) -> None:
    """Why requantizing is never silent."""
    result = await compare(smollm2_gguf, reference, "onnxruntime", requantize="int4")
    assert 0.05 < result.kl_mean < 1.0
    assert 0.5 < result.top1_agreement < 0.95


async def compare(
    gguf: Path, reference: tuple[np.ndarray, np.ndarray, Path], runtime: Chosen, **recipe: str
) -> Comparison:
    ids, expected, home = reference
    bundle = pull(str(gguf), home=home, name="judged", **recipe)
    lm = local_model(bundle, runtime=runtime, slots=1, context=TOKENS)
    await lm.open("s", TOKENS)
    divergence = Divergence()
    for start in range(0, TOKENS, 200):
        part = ids[start : start + 200]
        divergence.add(expected[start : start + 200], (await lm.forward([Row("s", start, part, len(part))]))[0])
    await lm.shutdown()
    return divergence.result()
