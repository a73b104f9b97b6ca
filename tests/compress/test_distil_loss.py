"""The loss of distillation against values worked out by hand, numpy and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from edgewise.compress.distil import loss as module
from edgewise.compress.distil.loss import IGNORED, Losses, TopTokens, distillation_loss
from edgewise.errors import UsageError

BATCH, TIME, VOCABULARY = 3, 5, 11


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def labels_with_gaps() -> Tensor:
    """[3, 5], of which the foretold ones are 4 + 2 + 1."""
    labels = torch.arange(BATCH * TIME).reshape(BATCH, TIME) % VOCABULARY
    labels[1, 3:] = IGNORED
    labels[2, :4] = IGNORED
    return labels


def top_of(logits: Tensor, k: int) -> TopTokens:
    """What a teacher with these logits would have written down."""
    known = logits.log_softmax(-1)
    best = known.topk(k, -1)
    others = known.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    return TopTokens(best.indices, best.values, others)


def gradient(student: Tensor, *args: object, **kwargs: object) -> Tensor:
    leaf = student.clone().requires_grad_()
    distillation_loss(leaf, *args, **kwargs).total.backward()  # type: ignore[arg-type]  # whatever a case names
    assert leaf.grad is not None
    return leaf.grad


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# By hand


def test_two_classes_at_temperature_one() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2), and the label costs ln 2."""
    found = distillation_loss(
        torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]]), torch.tensor([0]), temperature=1.0, causal=False
    )
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.kl is not None
    assert float(found.kl) == pytest.approx(kl, rel=1e-6)
    assert float(found.ce) == pytest.approx(math.log(2), rel=1e-6)
    assert found.total.item() == pytest.approx(0.5 * kl + 0.5 * math.log(2), rel=1e-6)
    assert found.tokens == 1


def test_two_classes_softened() -> None:
    """At T = 2 odds of 9 to 1 become 3 to 1, and the term counts four times."""
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(9), 0.0]])
    found = distillation_loss(student, teacher, torch.tensor([1]), temperature=2.0, alpha=0.25, causal=False)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.total.item() == pytest.approx(0.25 * 4 * kl + 0.75 * math.log(2), rel=1e-6)


def test_three_classes_a_mean_over_rows() -> None:
    """The first row's student is its teacher; the second's is uniform beside (1/2, 1/4, 1/4): KL = ln 3 - 3/2 ln 2."""
    teacher = torch.tensor([[1.0, 2.0, 3.0], [math.log(2), 0.0, 0.0]])
    student = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    found = distillation_loss(student, teacher, torch.tensor([2, 0]), temperature=1.0, alpha=1.0, causal=False)
    assert found.total.item() == pytest.approx((math.log(3) - 1.5 * math.log(2)) / 2, rel=1e-6)


def test_the_gradient_of_the_softened_term() -> None:
    """d(T² KL)/d(student) = T (q - p), of a mean over n rows an n-th."""
    student, teacher, labels = random(4, 3), random(4, 3, seed=1), torch.zeros(4, dtype=torch.int64)
    found = gradient(student, teacher, labels, temperature=3.0, alpha=1.0, causal=False)
    p, q = softmax(teacher.numpy() / 3), softmax(student.numpy() / 3)
    np.testing.assert_allclose(found.numpy(), 3.0 * (q - p) / 4, rtol=1e-12)


def test_a_hot_limit_is_the_squared_distance_of_centred_logits() -> None:
    student, teacher, labels = random(6, 7), random(6, 7, seed=1), torch.zeros(6, dtype=torch.int64)
    found = distillation_loss(student, teacher, labels, temperature=1e4, alpha=1.0, causal=False)
    apart = student - student.mean(-1, keepdim=True) - teacher + teacher.mean(-1, keepdim=True)
    assert found.total.item() == pytest.approx(float((apart**2).sum(-1).mean()) / (2 * 7), rel=1e-3)


def test_the_factor_keeps_the_size_of_gradients() -> None:
    """Without T² the gradient at T = 64 would be some 256 times smaller than at T = 4."""
    student, teacher, labels = random(32, 50), random(32, 50, seed=1), torch.zeros(32, dtype=torch.int64)
    sizes = [
        float(gradient(student, teacher, labels, temperature=t, alpha=1.0, causal=False).norm()) for t in (4.0, 64.0)
    ]
    assert 0.5 < sizes[1] / sizes[0] < 2.0


# Against finite differences and a reference


@pytest.mark.parametrize("k", [None, 1, 4, VOCABULARY])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradients_are_those_of_finite_differences(k: int | None, temperature: float) -> None:
    student, teacher = random(BATCH, TIME, VOCABULARY), random(BATCH, TIME, VOCABULARY, seed=1)
    known = teacher if k is None else top_of(teacher, k)
    mask = torch.ones(BATCH, TIME, dtype=torch.int64)
    mask[0, 0] = 0

    def total(logits: Tensor) -> Tensor:
        return distillation_loss(
            logits, known, labels_with_gaps(), temperature=temperature, alpha=0.3, causal=True, attention_mask=mask
        ).total

    assert torch.autograd.gradcheck(total, (student.requires_grad_(),), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("k", [1, 3, VOCABULARY - 1])
def test_top_tokens_and_a_bucket(k: int) -> None:
    """The definition read literally, in numpy."""
    student, teacher, labels = random(4, VOCABULARY), random(4, VOCABULARY, seed=1), torch.tensor([3, 0, 10, 7])
    top = top_of(teacher, k)
    found = distillation_loss(student, top, labels, temperature=2.5, alpha=0.6, causal=False)
    totals = []
    for row in range(4):
        q, ids = softmax(student[row].numpy()), top.ids[row].numpy()
        coarse_q = np.append(q[ids], 1 - q[ids].sum())
        coarse_p = np.append(np.exp(top.logprobs[row].numpy()), np.exp(top.rest[row].numpy()))
        soft_p, soft_q = (c ** (1 / 2.5) / (c ** (1 / 2.5)).sum() for c in (coarse_p, coarse_q))
        kl = (soft_p * np.log(soft_p / soft_q)).sum()
        totals.append(0.6 * 2.5**2 * kl - 0.4 * np.log(q[labels[row]]))
    assert found.total.item() == pytest.approx(np.mean(totals), rel=1e-9)


def test_all_tokens_are_the_whole_distribution() -> None:
    student, teacher = random(BATCH, TIME, VOCABULARY), random(BATCH, TIME, VOCABULARY, seed=1)
    settings = {"temperature": 4.0, "alpha": 0.5, "causal": True}
    dense = gradient(student, teacher, labels_with_gaps(), **settings)
    top = gradient(student, top_of(teacher, VOCABULARY), labels_with_gaps(), **settings)
    torch.testing.assert_close(top, dense, rtol=1e-12, atol=1e-15)


def test_nothing_is_left_to_learn_where_the_tokens_have_the_teachers_probabilities() -> None:
    """However the others are shared out."""
    teacher = random(1, VOCABULARY)
    top = top_of(teacher, 3)
    known = teacher.log_softmax(-1)
    student = torch.full_like(teacher, float(top.rest) - math.log(VOCABULARY - 3))
    student.scatter_(-1, top.ids, top.logprobs)
    assert not torch.allclose(student, known)
    slope = gradient(student, top, torch.tensor([0]), temperature=4.0, alpha=1.0, causal=False)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)


def test_a_teacher_that_leaves_nothing_to_the_others() -> None:
    top = TopTokens(torch.tensor([[2, 0]]), torch.tensor([[0.0, -torch.inf]]), torch.tensor([-torch.inf]))
    student = random(1, VOCABULARY)
    found = distillation_loss(student, top, torch.tensor([2]), temperature=1.0, alpha=1.0, causal=False)
    assert found.total.item() == pytest.approx(-float(student.log_softmax(-1)[0, 2]))
    assert gradient(student, top, torch.tensor([2]), temperature=4.0, alpha=1.0, causal=False).isfinite().all()


def test_a_teacher_that_rules_tokens_out() -> None:
    teacher = random(1, 4)
    teacher[0, 1] = -torch.inf
    slope = gradient(random(1, 4, seed=1), teacher, torch.tensor([0]), temperature=2.0, alpha=1.0, causal=False)
    assert slope.isfinite().all()
    assert slope[0, 1] > 0


def test_logits_foretell_the_next_label() -> None:
    student = random(BATCH, TIME, VOCABULARY)
    found = distillation_loss(student, None, labels_with_gaps(), alpha=0.0, causal=True)
    wanted = torch.nn.functional.cross_entropy(
        student[:, :-1].reshape(-1, VOCABULARY), labels_with_gaps()[:, 1:].reshape(-1), ignore_index=IGNORED
    )
    assert found.total.item() == pytest.approx(float(wanted), rel=1e-12)
    assert found.kl is None
    assert found.tokens == 7


# What counts


def test_what_padding_holds_changes_nothing() -> None:
    student, teacher = random(BATCH, TIME, VOCABULARY), random(BATCH, TIME, VOCABULARY, seed=1)
    plain = gradient(student, teacher, labels_with_gaps(), causal=True)
    unread = plain.abs().sum(-1) == 0
    assert int(unread.sum()) == BATCH * TIME - 7
    spoiled, also = student.clone(), teacher.clone()
    spoiled[unread], also[unread] = torch.nan, torch.inf
    torch.testing.assert_close(gradient(spoiled, also, labels_with_gaps(), causal=True), plain, rtol=0, atol=0)


def test_a_mask_is_as_good_as_labels_without_padding() -> None:
    student, teacher = random(2, 4, VOCABULARY), random(2, 4, VOCABULARY, seed=1)
    ids = torch.tensor([[1, 2, 3, 0], [0, 4, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])  # padded right, padded left
    masked = distillation_loss(student, teacher, ids, causal=True, attention_mask=mask)
    left_out = torch.tensor([[IGNORED, 2, 3, IGNORED], [IGNORED, IGNORED, 5, 6]])
    labelled = distillation_loss(student, teacher, left_out, causal=True)
    assert masked.tokens == labelled.tokens == 4
    assert float(masked.total) == float(labelled.total)


def test_a_batch_may_be_split_anywhere() -> None:
    """Weighted with their real tokens, parts give the gradient of the whole; plain means of parts would not."""
    student, teacher, labels = (
        random(BATCH, TIME, VOCABULARY),
        random(BATCH, TIME, VOCABULARY, seed=1),
        labels_with_gaps(),
    )
    whole = gradient(student, teacher, labels, causal=True)
    tokens = distillation_loss(student, teacher, labels, causal=True).tokens
    parts = []
    for at in (slice(0, 1), slice(1, 3)):
        count = distillation_loss(student[at], teacher[at], labels[at], causal=True).tokens
        parts.append(gradient(student[at], teacher[at], labels[at], causal=True) * count / tokens)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("k", [None, 4])
def test_how_many_rows_are_looked_at_together_changes_nothing(monkeypatch: pytest.MonkeyPatch, k: int | None) -> None:
    student, teacher = random(BATCH, TIME, VOCABULARY), random(BATCH, TIME, VOCABULARY, seed=1)
    known = teacher if k is None else top_of(teacher, k)
    at_once = gradient(student, known, labels_with_gaps(), causal=True)
    monkeypatch.setattr(module, "CPU_LOGITS", 2 * VOCABULARY)
    torch.testing.assert_close(gradient(student, known, labels_with_gaps(), causal=True), at_once, rtol=1e-12, atol=0)


def test_without_a_real_token_nothing_is_lost() -> None:
    student = random(1, 3, VOCABULARY).requires_grad_()
    found = distillation_loss(student, random(1, 3, VOCABULARY), torch.full((1, 3), IGNORED), causal=True)
    found.total.backward()
    assert found.tokens == found.total.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_narrow_logits_are_computed_in_float32() -> None:
    student, teacher = random(BATCH, TIME, VOCABULARY).bfloat16(), random(BATCH, TIME, VOCABULARY, seed=1)
    leaf = student.clone().requires_grad_()
    found: Losses = distillation_loss(leaf, teacher.bfloat16(), labels_with_gaps(), causal=True)
    exact = distillation_loss(student.double(), teacher.bfloat16().double(), labels_with_gaps(), causal=True)
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(exact.total.item(), rel=1e-5)
    found.total.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.bfloat16


def test_half_floats_keep_the_gradient_of_many_tokens() -> None:
    """Of 4,000 tokens each gradient is below what half floats hold, were it divided by their number first."""
    student, teacher = random(40, 101, VOCABULARY), random(40, 101, VOCABULARY, seed=1)
    labels = torch.randint(0, VOCABULARY, (40, 101), generator=torch.Generator().manual_seed(0))
    grads = []
    for kind in (torch.float16, torch.float64):
        leaf = student.half().to(kind).requires_grad_()
        found = distillation_loss(leaf, teacher.half().to(kind), labels, causal=True)
        (found.total * 2.0**16).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad.double())
    narrow, exact = grads
    assert (narrow - exact).norm() < 1e-3 * exact.norm()


# What is refused


@pytest.mark.parametrize(
    ("student", "teacher", "labels", "settings", "words"),
    [
        ((2, 3, 8), (2, 3, 9), (2, 3), {}, ["9", "8"]),
        ((2, 3, 8), (2, 4, 8), (2, 3), {}, ["(2, 4, 8)", "(2, 3, 8)"]),
        ((2, 3, 8), (2, 3, 8), (2, 4), {}, ["(2, 3, 8)", "(2, 4)"]),
        ((2, 8), (2, 8), (2,), {}, ["[batch, time, vocabulary]"]),
        ((2, 3, 8), (2, 3, 8), (2, 3), {"temperature": 0.0}, ["0.0"]),
        ((2, 3, 8), (2, 3, 8), (2, 3), {"temperature": math.nan}, ["nan"]),
        ((2, 3, 8), (2, 3, 8), (2, 3), {"alpha": 1.5}, ["1.5"]),
        ((2, 3, 8), None, (2, 3), {"alpha": 0.5}, ["no teacher"]),
        ((2, 3, 8), (2, 3, 8), (2, 3), {"attention_mask": torch.ones(2, 2)}, ["(2, 2)"]),
    ],
)
def test_what_does_not_go_together_is_refused(
    student: tuple[int, ...], teacher: tuple[int, ...] | None, labels: tuple[int, ...], settings: dict, words: list[str]
) -> None:
    known = None if teacher is None else torch.zeros(teacher)
    with pytest.raises(UsageError) as refusal:
        distillation_loss(
            torch.zeros(student), known, torch.zeros(labels, dtype=torch.int64), **{"causal": True} | settings
        )
    assert all(word in str(refusal.value) for word in words)


def test_top_tokens_of_other_shapes_are_refused() -> None:
    student, labels = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
    fitting = TopTokens(torch.zeros(2, 3, 9, dtype=torch.int64), torch.zeros(2, 3, 9), torch.zeros(2, 3))
    with pytest.raises(UsageError, match="9 tokens a position, the student knows 8"):
        distillation_loss(student, fitting, labels, causal=True)
    short = TopTokens(torch.zeros(2, 2, 4, dtype=torch.int64), torch.zeros(2, 2, 4), torch.zeros(2, 2))
    with pytest.raises(UsageError, match=r"\(2, 2, 4\)"):
        distillation_loss(student, short, labels, causal=True)
