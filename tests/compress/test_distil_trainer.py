"""DistillationTrainer with models of every kind that it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgewise
from edgewise.compress.distil.loss import IGNORED, distillation_loss
from edgewise.compress.distil.trainer import DistillationTrainer
from edgewise.errors import UsageError
from tiny import VOCAB, tiny


class Bag(nn.Module):
    """Ids [b, t] to logits [b, t, classes], or [b, classes] when they are added up; with dropout in training."""

    def __init__(self, classes: int, *, pooled: bool = False, wrapped: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(16, 12)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, classes)
        self.pooled, self.wrapped = pooled, wrapped

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.dropout(self.table(ids))
        if self.pooled:
            hidden = hidden.mean(1)
        logits = self.head(hidden)
        return SimpleNamespace(logits=logits) if self.wrapped else logits


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 7]])
LABELS = torch.tensor([[1, 2, 3, 4], [5, 6, IGNORED, IGNORED]])


def test_a_step_is_the_loss_of_both_models() -> None:
    teacher, student = Bag(16, seed=1), Bag(16, wrapped=True, seed=2).eval()
    trainer = edgewise.DistillationTrainer(teacher, student, temperature=2.0)
    found = trainer.train_step(IDS, LABELS)
    wanted = distillation_loss(
        student(IDS).logits, teacher.eval()(IDS), LABELS, temperature=2.0, alpha=0.5, causal=True
    )
    assert found.shape == ()
    torch.testing.assert_close(found, wanted.total)
    assert trainer.last is not None
    assert trainer.last.tokens == 4


def test_the_defaults_are_those_of_the_guide() -> None:
    trainer = DistillationTrainer(Bag(16), Bag(16))
    assert (trainer.temperature, trainer.alpha) == (4.0, 0.5)


def test_the_teacher_is_left_as_it_was() -> None:
    teacher, student = Bag(16, seed=1), Bag(16, seed=2)
    teacher.dropout.eval()  # kept from training on purpose
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    seen: list[bool] = []
    teacher.head.register_forward_hook(lambda part, *_: seen.extend([part.training, torch.is_grad_enabled()]))
    DistillationTrainer(teacher, student).train_step(IDS, LABELS).backward()
    assert seen == [False, False]
    assert [part.training for part in (teacher, teacher.table, teacher.dropout, teacher.head)] == [1, 1, 0, 1]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert student.training


def test_a_classifier_has_a_label_a_row() -> None:
    teacher, student, labels = (
        Bag(5, pooled=True, seed=1).eval(),
        Bag(5, pooled=True, seed=2).eval(),
        torch.tensor([4, 0]),
    )
    found = DistillationTrainer(teacher, student, alpha=0.25).train_step(IDS, labels)
    wanted = distillation_loss(student(IDS), teacher(IDS), labels, temperature=4.0, alpha=0.25, causal=False)
    torch.testing.assert_close(found, wanted.total)


def test_a_tagger_says_that_it_is_not_causal() -> None:
    teacher, student = Bag(16, seed=1).eval(), Bag(16, seed=2).eval()
    tagger = DistillationTrainer(teacher, student, causal=False)
    tagger.train_step(IDS, LABELS)
    assert tagger.last is not None
    assert tagger.last.tokens == 6


def test_without_alpha_the_teacher_is_not_asked() -> None:
    def unwilling(ids: Tensor) -> Tensor:
        raise AssertionError("asked")

    student = Bag(16).eval()
    found = DistillationTrainer(unwilling, student, alpha=0.0).train_step(IDS, LABELS)
    torch.testing.assert_close(found, distillation_loss(student(IDS), None, LABELS, alpha=0.0, causal=True).total)


def test_a_few_steps_bring_the_student_near() -> None:
    """transformers' models, and a loop as people write it."""
    teacher = tiny("llama")
    student = tiny("llama", num_hidden_layers=1).train()
    trainer = DistillationTrainer(teacher, student, temperature=2.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    ids = torch.randint(0, VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = trainer.train_step(ids, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_padding_reaches_the_models_as_a_mask() -> None:
    teacher, student = tiny("llama"), tiny("llama", num_hidden_layers=1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    trainer = DistillationTrainer(teacher, student)
    loss = trainer.train_step(IDS, IDS, attention_mask=mask)
    other = IDS.masked_fill(mask == 0, 200)
    torch.testing.assert_close(trainer.train_step(other, other, attention_mask=mask), loss)


def test_vocabularies_of_two_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="teacher's logits have 20 classes, the student's 16"):
        DistillationTrainer(Bag(20), Bag(16)).train_step(IDS, LABELS)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.full((2, 4), IGNORED), "no token of the batch is real"),
        (torch.full((2, 4), 16), "labels from 16 to 16 were given, the student has 16 classes"),
        (torch.full((2, 4), -1), "labels from -1 to -1"),
    ],
)
def test_labels_that_teach_nothing_are_refused(labels: Tensor, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DistillationTrainer(Bag(16), Bag(16)).train_step(IDS, labels)


def test_models_without_logits_are_refused() -> None:
    with pytest.raises(UsageError, match="the teacher returned a str without logits"):
        DistillationTrainer(lambda ids: "logits", Bag(16)).train_step(IDS, LABELS)
    with pytest.raises(UsageError, match="the temperature is -1"):
        DistillationTrainer(Bag(16), Bag(16), temperature=-1)
