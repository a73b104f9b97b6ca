import numpy as np
import pytest

from edgewise.errors import UsageError
from edgewise.evaluate.divergence import ROWS
from edgewise.evaluate.perplexity import Perplexity, nll


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_a_model_without_an_opinion_has_its_vocabulary_as_perplexity() -> None:
    figure = Perplexity()
    figure.add(np.zeros((10, 37), np.float32), ids(*range(10)))
    assert figure.result() == pytest.approx(37)
    assert figure.tokens == 10


def test_the_closed_form_of_given_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32))
    assert nll(logits, ids(1, 2)) == pytest.approx([-np.log(0.25), -np.log(0.8)], rel=1e-6)
    figure = Perplexity()
    figure.add(logits, ids(1, 2))
    assert figure.result() == pytest.approx((0.25 * 0.8) ** -0.5, rel=1e-6)


def test_chunks_give_what_the_whole_gives() -> None:
    random = np.random.default_rng(1)
    n = ROWS + 9
    logits, wanted = random.normal(size=(n, 13)).astype(np.float32), random.integers(13, size=n)
    whole, parts = Perplexity(), Perplexity()
    whole.add(logits, wanted)
    for at in range(0, n, 4):
        parts.add(logits[at : at + 4], wanted[at : at + 4])
    assert parts.result() == pytest.approx(whole.result(), rel=1e-12)


def test_a_token_that_was_ruled_out_gives_a_huge_figure_and_no_overflow() -> None:
    figure = Perplexity()
    figure.add(np.array([[0.0, -np.inf]], np.float32), ids(1))
    assert 1e300 < figure.result() < np.inf


@pytest.mark.parametrize("wrong", [ids(0), ids(0, 5), ids(-1, 0), ids(0, 1, 2)])
def test_ids_that_do_not_go_with_the_logits_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(UsageError):
        nll(np.zeros((2, 5), np.float32), wrong)


def test_no_tokens_no_result() -> None:
    figure = Perplexity()
    figure.add(np.empty((0, 5), np.float32), ids())
    with pytest.raises(UsageError, match="no token"):
        figure.result()
