"""Log-probabilities of given answers, against those of the whole text computed in one piece."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgewise.engines.base import Row
from edgewise.engines.load import local_model
from edgewise.engines.local import LocalModel
from edgewise.engines.score import ROWS, Scorer, log_probs
from edgewise.errors import ContextFull, EngineError
from edgewise.evaluate.divergence import log_softmax
from edgewise.models.source import pull
from tiny import VOCAB, save_gguf, tiny

STOP = {VOCAB - 1, VOCAB - 3}
PROMPT = (5, 6, 7, 8, 9)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    return save_gguf(tiny("llama"), home / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0)


@pytest.fixture
async def model(source: Path) -> AsyncIterator[LocalModel[Any]]:
    made = local_model(pull(str(source), home=source.parent, name="tiny"), slots=1, context=256)
    yield made
    await made.shutdown()


async def alone(model: LocalModel[Any], ids: list[int]) -> np.ndarray:
    """Log-probabilities behind each of the ids, [n, vocab], float64."""
    await model.open("alone", 256)
    (logits,) = await model.forward([Row("alone", 0, np.array(ids), len(ids))])
    await model.close("alone")
    return log_softmax(logits)


@pytest.mark.parametrize("length", [0, 1, 3, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 5])
async def test_an_answer_behind_its_prompt(model: LocalModel[Any], length: int) -> None:
    answer = [(7 * n + 3) % 250 for n in range(length)]
    (found,) = await Scorer(model, STOP).score(PROMPT, [answer])
    all_ids = [*PROMPT, *answer]
    expected = await alone(model, all_ids)
    foretold = [expected[len(PROMPT) - 1 + n, id] for n, id in enumerate(answer)]
    assert found.tokens == pytest.approx(np.array(foretold), abs=1e-5)
    assert found.end == pytest.approx(np.logaddexp.reduce(expected[-1, sorted(STOP)]), abs=1e-5)


async def test_answers_do_not_see_each_other(model: LocalModel[Any]) -> None:
    one, other = [1, 2, 3, 4], [200, 201]
    scorer = Scorer(model, STOP)
    both = await scorer.score(PROMPT, [one, other, one])
    (first,), (second,) = await scorer.score(PROMPT, [one]), await scorer.score(PROMPT, [other])
    for seen, expected in zip(both, (first, second, first), strict=True):
        assert seen.tokens == pytest.approx(expected.tokens, abs=1e-6)
        assert seen.end == pytest.approx(expected.end, abs=1e-6)


async def test_a_mean_with_and_without_the_end(model: LocalModel[Any]) -> None:
    (found,) = await Scorer(model, STOP).score((5,), [[1, 2, 3]])
    assert found.mean(ended=False) == pytest.approx(found.tokens.mean())
    assert found.mean(ended=True) == pytest.approx((found.tokens.sum() + found.end) / 4)
    (empty,) = await Scorer(model, STOP).score((5,), [[]])
    assert empty.mean(ended=True) == empty.end
    assert np.isnan(empty.mean(ended=False))


async def test_no_end_that_a_model_could_give(model: LocalModel[Any]) -> None:
    (found,) = await Scorer(model, ()).score(PROMPT, [[1]])
    assert found.end == -np.inf


async def test_what_does_not_fit_leaves_the_slot_free(model: LocalModel[Any]) -> None:
    scorer = Scorer(model, STOP)
    with pytest.raises(ContextFull):
        await scorer.score(PROMPT, [[1] * 252])
    assert len(await scorer.score(PROMPT, [[1] * 251])) == 1


def test_log_probs() -> None:
    logits = np.random.default_rng(0).normal(0, 9, (4, 50)).astype(np.float32)
    expected = log_softmax(logits)
    assert log_probs(logits, "m") is logits
    assert logits == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_logits(bad: float) -> None:
    with pytest.raises(EngineError, match="m gives logits that are NaN"):
        log_probs(np.array([[0.0, bad]], np.float32), "m")
