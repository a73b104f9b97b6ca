import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from edgewise.errors import UsageError
from edgewise.evaluate.divergence import ROWS, Divergence, agreement_length, kl, log_softmax

finite = st.floats(-50, 50, width=32)


def logits_of(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array([probabilities])).astype(np.float32)


def test_the_closed_form_of_two_coins() -> None:
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert kl(logits_of(0.5, 0.5), logits_of(0.25, 0.75)) == pytest.approx([expected], abs=1e-7)


def test_the_order_of_the_arguments_matters() -> None:
    p, q = logits_of(0.9, 0.1), logits_of(0.5, 0.5)
    assert kl(p, q)[0] == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2), abs=1e-6)
    assert kl(q, p)[0] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(5), abs=1e-6)


def test_two_gaussians_on_a_fine_grid_agree_with_their_closed_form() -> None:
    x = np.linspace(-12, 12, 20_001)
    p, q = -((x - 0.3) ** 2) / 2, -((x + 0.5) ** 2) / (2 * 1.5**2)
    expected = np.log(1.5) + (1 + 0.8**2) / (2 * 1.5**2) - 0.5
    assert kl(p[None].astype(np.float32), q[None].astype(np.float32))[0] == pytest.approx(expected, abs=1e-5)


@given(some.arrays(np.float32, (5, 7), elements=finite), some.arrays(np.float32, (5, 7), elements=finite))
def test_never_negative_zero_with_itself_and_blind_to_a_shift(p: np.ndarray, q: np.ndarray) -> None:
    assert (kl(p, q) >= 0).all()
    assert (kl(p, p) == 0).all()
    assert kl(p + np.float32(8), q) == pytest.approx(kl(p, q), rel=1e-4, abs=1e-4)


def test_what_the_reference_rules_out_does_not_count_and_the_reverse_is_infinite() -> None:
    sure, unsure = logits_of(1.0, 0.0), logits_of(0.5, 0.5)
    assert kl(sure, unsure)[0] == pytest.approx(np.log(2))
    assert kl(sure, sure)[0] == 0
    assert kl(unsure, sure)[0] == np.inf


def test_huge_logits_do_not_overflow() -> None:
    p = np.array([[3e38, 1.0]], np.float32)
    assert kl(p, p)[0] == 0
    assert np.exp(log_softmax(p)).sum() == 1


def test_chunks_give_what_the_whole_gives() -> None:
    random = np.random.default_rng(0)
    n = 2 * ROWS + 5
    p, q = random.normal(size=(2, n, 11)).astype(np.float32)
    whole, parts = Divergence(), Divergence()
    whole.add(p, q)
    for at in range(0, n, 7):
        parts.add(p[at : at + 7], q[at : at + 7])
    assert parts.result() == whole.result()
    assert whole.result().positions == n
    assert whole.result().kl_mean == pytest.approx(kl(p, q).mean())
    assert whole.result().top1_agreement == (p.argmax(1) == q.argmax(1)).mean()


def test_p99_is_a_position_that_was_seen() -> None:
    p = np.tile(logits_of(0.5, 0.5), (200, 1))
    q = p.copy()
    q[:3] = logits_of(0.1, 0.9)  # 1.5 % of the positions
    compared = Divergence()
    compared.add(p, q)
    assert compared.result().kl_p99 == kl(p[:1], q[:1])[0]
    assert compared.result().kl_mean == pytest.approx(compared.result().kl_p99 * 3 / 200)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4))),
        (np.zeros(3), np.zeros(3)),
        (np.zeros((1, 0)), np.zeros((1, 0))),
        (np.full((1, 2), np.nan), np.zeros((1, 2))),
        (np.array([[np.inf, 0.0]]), np.zeros((1, 2))),
        (np.full((1, 2), -np.inf), np.zeros((1, 2))),
    ],
)
def test_what_cannot_be_compared_is_refused(p: np.ndarray, q: np.ndarray) -> None:
    with pytest.raises(UsageError):
        kl(p.astype(np.float32), q.astype(np.float32))


def test_nothing_compared_is_no_result() -> None:
    empty = Divergence()
    empty.add(np.empty((0, 4), np.float32), np.empty((0, 4), np.float32))
    with pytest.raises(UsageError, match="at least one position"):
        empty.result()


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 9, 3], [1, 2, 3], 1), ([7], [8], 0)],
)
def test_agreement_length(first: list[int], second: list[int], length: int) -> None:
    assert agreement_length(first, second) == length
