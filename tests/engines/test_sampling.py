import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

from edgewise.engines.sampling import Sampler, top_k_set, top_p_set
from edgewise.errors import EngineError
from edgewise.types import Sampling

rows = some.arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))


def normal(n: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, n).astype(np.float32)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    mass = np.exp(scaled - scaled.max())
    return mass / mass.sum()


def nucleus(probabilities: np.ndarray, top_p: float) -> set[int]:
    """The definition, read aloud: heaviest first, until top_p is reached."""
    chosen, total = set(), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        chosen.add(int(token))
        total += probabilities[token]
        if total >= top_p:
            break
    return chosen


def draws(sampling: Sampling, logits: np.ndarray, count: int) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.choose(logits).id for _ in range(count)], minlength=len(logits))


@given(rows)
def test_greedy_takes_the_most_probable_token_and_knows_its_logprob(logits: np.ndarray) -> None:
    choice = Sampler(Sampling()).choose(logits)
    assert choice.id == logits.argmax()
    assert choice.logprob == pytest.approx(math.log(softmax(logits).max()), abs=1e-6)
    assert choice.logprob <= 0


@given(rows, st.integers(1, 20))
def test_the_alternatives_are_the_best_ones_in_order(logits: np.ndarray, top: int) -> None:
    found = Sampler(Sampling(), top).choose(logits).top
    expected = np.sort(np.log(softmax(logits)))[::-1][:top]
    assert [logprob for _, logprob in found] == pytest.approx(list(expected), abs=1e-5)
    assert [logprob for _, logprob in found] == sorted((p for _, p in found), reverse=True)
    assert len({token for token, _ in found}) == len(found) == min(top, len(logits))


def test_logprobs_are_of_the_model_itself_whatever_the_sampling() -> None:
    logits = normal(50)
    for sampling in (Sampling(temperature=0.3, seed=1), Sampling(temperature=2.0, top_p=0.5, seed=1)):
        choice = Sampler(sampling, 3).choose(logits)
        assert choice.logprob == pytest.approx(math.log(softmax(logits)[choice.id]), abs=1e-6)
        assert choice.top == Sampler(Sampling(), 3).choose(logits).top


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.7, 1.0), (1.0, 0.8), (0.7, 0.95), (2.0, 0.3)]
)
def test_tokens_come_as_often_as_they_should(temperature: float, top_p: float) -> None:
    logits, n = normal(12, 1.5), 4000
    expected = softmax(logits, temperature)
    kept = nucleus(expected, top_p)
    expected = np.array([p if token in kept else 0.0 for token, p in enumerate(expected)])
    expected /= expected.sum()
    seen = draws(Sampling(temperature=temperature, top_p=top_p, seed=7), logits, n)
    assert set(np.flatnonzero(seen)) <= kept
    assert np.abs(seen / n - expected).max() < 5 * math.sqrt(0.25 / n)


@given(rows, st.floats(0.01, 0.999))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(logits: np.ndarray, top_p: float) -> None:
    probabilities = softmax(logits)
    found = probabilities[top_p_set(probabilities, top_p)]
    assert found.sum() >= top_p - 1e-6
    assert found.sum() - found.min() < top_p + 1e-6
    assert found.min() >= np.delete(probabilities, top_p_set(probabilities, top_p)).max(initial=0.0) * (1 - 1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.8, 3.0, 10.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.9999])
def test_the_nucleus_of_a_large_vocabulary_however_flat(scale: float, top_p: float) -> None:
    mass = np.exp(normal(20_000, scale).astype(np.float64))
    found = top_p_set(mass, top_p)
    assert len(found) == pytest.approx(len(nucleus(mass / mass.sum(), top_p)), abs=1)
    assert (np.diff(found) > 0).all()


def test_among_equals_the_nucleus_takes_the_lower_ids() -> None:
    assert top_p_set(np.ones(10), 0.35).tolist() == [0, 1, 2, 3]


def test_a_seed_repeats_the_draws_and_another_one_does_not() -> None:
    logits = normal(1000)

    def ids(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=seed))
        return [sampler.choose(logits).id for _ in range(20)]

    assert ids(5) == ids(5) != ids(6)
    assert ids(None) != ids(None)


def test_extreme_temperatures_are_greedy_and_uniform() -> None:
    logits = np.array([0.0, 5.0, 4.0], np.float32)
    assert draws(Sampling(temperature=1e-300, seed=0), logits, 50).tolist() == [0, 50, 0]
    assert draws(Sampling(temperature=1e300, seed=0), logits, 3000).min() > 850


def test_ruled_out_tokens_never_come_and_are_no_alternatives() -> None:
    logits = np.array([-np.inf, 1.0, -np.inf, 0.5], np.float32)
    assert draws(Sampling(temperature=1e6, seed=0), logits, 300)[[0, 2]].tolist() == [0, 0]
    assert [token for token, _ in Sampler(Sampling(), 4).choose(logits).top] == [1, 3]


@pytest.mark.parametrize("wrong", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf], [np.nan, np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_overflowed_logits_are_an_error_and_not_a_token(wrong: list[float], temperature: float) -> None:
    with pytest.raises(EngineError, match="highest logit"):
        Sampler(Sampling(temperature=temperature)).choose(np.array(wrong, np.float32))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_draw_over_many_tokens_is_where_the_running_sum_passes_the_random_number(top_p: float) -> None:
    logits, n = normal(3000, 2.0), 200
    probabilities = softmax(logits)
    if top_p < 1:
        kept = nucleus(probabilities, top_p)
        probabilities = np.array([p if token in kept else 0.0 for token, p in enumerate(probabilities)])
    running = probabilities.cumsum()
    random = np.random.default_rng(9)
    expected = [int(running.searchsorted(random.random() * running[-1], side="right")) for _ in range(n)]
    sampler = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=9))
    assert [sampler.choose(logits).id for _ in range(n)] == expected


# --- the whole order of steps, against a plain reading of it ----------------------------------------------------------


def reference(sampling: Sampling, logits: np.ndarray, prompt: list[int], generated: list[int]) -> np.ndarray:
    """Probabilities float64 [vocab] of the next token, one step after the other, each as its definition reads."""
    wished = logits.astype(np.float64)
    for token, bias in sampling.logit_bias:
        wished[token] += bias
    for token in set(prompt) | set(generated):
        penalty = sampling.repetition_penalty
        wished[token] = wished[token] / penalty if wished[token] > 0 else wished[token] * penalty
    for token in set(generated):
        wished[token] -= sampling.frequency_penalty * generated.count(token) + sampling.presence_penalty
    if sampling.temperature == 0:
        return np.eye(len(wished))[wished.argmax()]
    order = list(np.argsort(-wished, kind="stable"))
    kept = order[: sampling.top_k] if sampling.top_k else order
    chances = softmax(np.where(np.isin(np.arange(len(wished)), kept), wished, -np.inf), sampling.temperature)
    if sampling.top_p < 1:
        kept = [token for token in kept if token in nucleus(chances, sampling.top_p)]
    best = chances.max()
    kept = [token for token in kept if chances[token] >= sampling.min_p * best]
    chances = np.where(np.isin(np.arange(len(wished)), kept), chances, 0.0)
    return chances / chances.sum()


@st.composite
def wishes(draw: st.DrawFn, vocab: int = 12) -> Sampling:
    ids = st.integers(0, vocab - 1)
    return Sampling(
        temperature=draw(st.sampled_from([0.0, 0.4, 1.0, 1.7])),
        top_p=draw(st.sampled_from([1.0, 0.85, 0.5, 0.1])),
        seed=draw(st.integers(0, 1000)),
        top_k=draw(st.sampled_from([0, 1, 3, 7, 12, 500])),
        min_p=draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7, -1.3, 2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.35, -0.6])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        logit_bias=tuple(draw(st.dictionaries(ids, st.sampled_from([-100.0, -1.1, 2.3, 100.0]), max_size=3)).items()),
    )


@settings(max_examples=300, deadline=None)
@given(wishes(), st.lists(st.integers(0, 11), max_size=5), st.integers(0, 1000))
def test_every_draw_is_one_of_the_distribution_that_the_steps_define(
    sampling: Sampling, prompt: list[int], noise: int
) -> None:
    """A draw is where the running sum passes the random number; a share that is slightly wrong would miss it."""
    logits = normal(12, 2.0, noise)
    sampler = Sampler(sampling, prompt=np.array(prompt, np.int64))
    random, generated = np.random.default_rng(sampling.seed), []
    for _ in range(6):
        chances = reference(sampling, logits, prompt, generated)
        chosen = sampler.choose(logits).id
        running = chances.cumsum()
        point = 0.5 if sampling.temperature == 0 else random.random()
        below, above = (running[chosen] - chances[chosen]), running[chosen]
        assert chances[chosen] > 0
        assert sampling.temperature == 0 or below - 1e-5 <= point <= above + 1e-5
        generated.append(chosen)


@given(rows, st.integers(1, 40))
def test_top_k_keeps_the_highest_and_among_equals_the_lower_ids(logits: np.ndarray, top_k: int) -> None:
    top_k = min(top_k, len(logits))
    assert top_k_set(logits, top_k).tolist() == sorted(np.argsort(-logits, kind="stable")[:top_k].tolist())


@pytest.mark.parametrize("vocab", [49_152, 262_144])
def test_narrow_draws_of_a_large_vocabulary_stay_in_their_set(vocab: int) -> None:
    logits = normal(vocab, 1.0)
    best = set(np.argsort(-logits)[:40].tolist())
    seen = {Sampler(Sampling(temperature=2.0, top_k=40, seed=seed)).choose(logits).id for seed in range(40)}
    assert seen <= best
    assert len(seen) > 10
    floor = logits.max() + 2.0 * math.log(0.4)
    seen = {Sampler(Sampling(temperature=2.0, min_p=0.4, seed=seed)).choose(logits).id for seed in range(40)}
    assert all(logits[token] >= floor for token in seen)


def test_a_banned_token_never_comes_and_a_forced_one_always() -> None:
    logits = normal(50)
    best = int(logits.argmax())
    assert Sampler(Sampling(logit_bias=((best, -100.0),))).choose(logits).id == int(np.argsort(-logits)[1])
    hot = Sampling(temperature=2.0, seed=1, logit_bias=((7, 100.0),))
    assert draws(hot, logits, 50)[7] == 50


def test_wishes_leave_the_logprobs_and_the_models_logits_alone() -> None:
    logits = normal(50)
    before = logits.copy()
    wish = Sampling(logit_bias=((3, 50.0),), presence_penalty=1.0, repetition_penalty=1.5)
    choice = Sampler(wish, 3, np.array([1, 2])).choose(logits)
    assert choice.id == 3
    assert choice.logprob == pytest.approx(math.log(softmax(logits)[3]), abs=1e-6)
    assert choice.top == Sampler(Sampling(), 3).choose(logits).top
    assert (logits == before).all()


def test_penalties_of_use_count_the_answer_and_repetition_the_prompt_too() -> None:
    logits = np.array([3.0, 2.9, -1.0, -1.1], np.float32)
    prompt = np.array([0, 0, 0])
    assert Sampler(Sampling(frequency_penalty=2.0), prompt=prompt).choose(logits).id == 0
    assert Sampler(Sampling(repetition_penalty=1.1), prompt=prompt).choose(logits).id == 1
    sampler = Sampler(Sampling(frequency_penalty=2.0, presence_penalty=0.5), prompt=prompt)
    assert [sampler.choose(logits).id for _ in range(4)] == [0, 1, 0, 1]


def test_what_is_not_asked_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was computed")

    for name in ("partition", "sort", "divide", "flatnonzero", "copyto"):
        monkeypatch.setattr(np, name, never)
    assert Sampler(Sampling()).choose(np.array([1.0, 3.0, 2.0], np.float32)).id == 1
    assert Sampler(Sampling(temperature=1.0, seed=0)).choose(np.array([1.0, 3.0, 2.0], np.float32)).id in range(3)
