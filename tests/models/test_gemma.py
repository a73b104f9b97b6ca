"""The real Gemma-3-270M: attention windows of 512, two ropes, heads of 256, Q4_K, Q5_0, Q6_K and Q8_0 in one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgewise.engines.base import Row
from edgewise.engines.load import Chosen, local_model
from edgewise.evaluate.divergence import Divergence
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from edgewise.models.tokenizer import Tokenizer
from oracle import LlamaCpp, from_gguf
from vocabularies import LlamaTokenizer, strings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOKENS = 640  # more than a window
SPECIALS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<unk>", "</table>", "\n\n\n", "\t\t", "▁▁", " " * 7)


@pytest.fixture(scope="module")
def bundles(gemma_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    home = tmp_path_factory.mktemp("home")
    return {
        kind: pull(str(gemma_gguf), home=home, name=kind, activations=kind, accept_licence=True)
        for kind in ("fp32", "int8")
    }


@pytest.fixture(scope="module")
def ids(bundles: dict[str, Bundle]) -> np.ndarray:
    text = (ROOT / "LICENSE").read_text()
    return np.array(Tokenizer.open(bundles["int8"].path).encode(text))[:TOKENS]


@pytest.fixture(scope="module")
def reference(gemma_gguf: Path, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return from_gguf(gemma_gguf)(torch.from_numpy(ids)[None]).logits[0].numpy()


async def logits(bundle: Bundle, ids: np.ndarray, size: int, runtime: Chosen = "onnxruntime") -> np.ndarray:
    """All logits of ids in rows of that size."""
    lm = local_model(bundle, runtime=runtime, mode="stable", slots=1, context=len(ids))
    await lm.open("s", len(ids))
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    rows = [Row("s", n * size, part, len(part)) for n, part in enumerate(parts)]
    out = np.concatenate([(await lm.forward([row]))[0].copy() for row in rows])
    await lm.shutdown()
    return out


ON = [("fp32", "onnxruntime"), ("int8", "onnxruntime"), ("int8", "native")]


@pytest.mark.parametrize(("activations", "runtime"), ON)
async def test_its_distribution_is_that_of_transformers(
    bundles: dict[str, Bundle], ids: np.ndarray, reference: np.ndarray, activations: str, runtime: Chosen
) -> None:
    bound = {"fp32": 1e-6, "int8": 0.01}[activations]
    divergence = Divergence()
    divergence.add(reference, await logits(bundles[activations], ids, 200, runtime))
    assert divergence.result().kl_mean <= bound


@pytest.mark.parametrize(("activations", "runtime"), ON)
async def test_rows_have_the_same_bits_however_they_come(
    bundles: dict[str, Bundle], ids: np.ndarray, activations: str, runtime: Chosen
) -> None:
    at_once = await logits(bundles[activations], ids[:300], 300, runtime)
    for size in (1, 65, 129):
        assert np.array_equal(await logits(bundles[activations], ids[:300], size, runtime), at_once), size


def test_it_is_as_far_from_llama_cpp_as_that_is_from_transformers(
    gemma_gguf: Path, ids: np.ndarray, reference: np.ndarray
) -> None:
    """Of llama.cpp's distribution the likely tokens count one by one, the others as one."""
    judge = LlamaCpp(gemma_gguf, context=1024)
    letter = int(ids[4])
    for end in range(40, TOKENS, 120):
        found = judge.following(ids[:end], 1000, letter)
        expected = torch.log_softmax(torch.from_numpy(reference[end - 1]).double(), -1).numpy()
        theirs, ours = np.array(list(found.values())), expected[list(found)]
        rest = max(1 - np.exp(ours).sum(), 1e-12), max(1 - np.exp(theirs).sum(), 1e-12)
        assert (np.exp(ours) * (ours - theirs)).sum() + rest[0] * np.log(rest[0] / rest[1]) < 0.05


def test_its_tokens_are_those_of_llama_cpp(gemma_gguf: Path, bundles: dict[str, Bundle]) -> None:
    judge, tokenizer = LlamaTokenizer(gemma_gguf), Tokenizer.open(bundles["int8"].path)
    texts = [*strings(1_000, specials=SPECIALS), *(ROOT / "docs" / "rooms.md").read_text().split("\n")]
    assert [tokenizer._ids(text) for text in texts] == judge.many(texts)
    for text in ("Hello", " Hello", ""):
        assert tokenizer.encode(text) == judge.one(text)
