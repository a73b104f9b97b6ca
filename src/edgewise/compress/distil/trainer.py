"""DistillationTrainer, with torch: a step of distillation for people with two models and a loop of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edgewise.errors import MissingExtra, UsageError

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError as error:
    raise MissingExtra("torch", "distil") from error

from edgewise.compress.distil.loss import IGNORED, Losses, check_weights, distillation_loss


class DistillationTrainer:
    """Teaches `student_model` what `teacher_model` says and what the labels say (loss.py has the formula).

    Both are torch modules, or anything else that can be called with `input_ids` and gives logits: a tensor, or
    something with `.logits`. The teacher is asked in evaluation mode and without gradients, and gets back the mode that
    it had (with alpha 0 it is not asked); the student runs in its own. Logits of three axes are a language model's
    [batch, time, vocabulary], whose labels are those of transformers (the inputs again, not shifted, -100 where none
    counts), others a classifier's [batch, classes] with one label a row; `causal` says otherwise.

    `last` holds the parts of the last step's loss. Optimiser, backward and step are the caller's."""

    last: Losses | None = None

    def __init__(
        self,
        teacher_model: Callable[..., Any],
        student_model: Callable[..., Any],
        temperature: float = 4.0,
        alpha: float = 0.5,
        *,
        causal: bool | None = None,
    ) -> None:
        check_weights(temperature, alpha)
        self.teacher_model = teacher_model
        self.student_model = student_model
        self.temperature = temperature
        self.alpha = alpha
        self.causal = causal

    def train_step(self, input_ids: Any, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The loss, a scalar with its graph: the caller calls backward() and steps.

        `input_ids` goes to both models as it is, with `attention_mask` (1 at tokens, 0 at padding) if there is one.
        UsageError for vocabularies of different sizes, for shapes that do not go together, for labels that no class
        has, and where no token is real."""
        teacher = self._taught(input_ids, attention_mask) if self.alpha else None
        student = logits_of(_call(self.student_model, input_ids, attention_mask), "student")
        _check_labels(labels, student.shape[-1])
        losses = distillation_loss(
            student,
            None if teacher is None else teacher.to(student.device),
            labels,
            temperature=self.temperature,
            alpha=self.alpha,
            causal=student.ndim == 3 if self.causal is None else self.causal,
            attention_mask=attention_mask,
        )
        if not losses.tokens:
            raise UsageError("no token of the batch is real", hint="a label other than -100 is needed")
        self.last = losses
        return losses.total

    def _taught(self, input_ids: Any, attention_mask: Tensor | None) -> Tensor:
        with torch.no_grad(), _evaluating(self.teacher_model):
            return logits_of(_call(self.teacher_model, input_ids, attention_mask), "teacher")


def logits_of(output: Any, who: str) -> Tensor:
    """The logits of a model's output. UsageError if it holds none."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        raise UsageError(
            f"the {who} returned a {type(output).__name__} without logits",
            hint="return a floating tensor [..., classes], or something that has one as `.logits`",
        )
    return logits


def _call(model: Callable[..., Any], input_ids: Any, attention_mask: Tensor | None) -> Any:
    return model(input_ids) if attention_mask is None else model(input_ids, attention_mask=attention_mask)


@contextmanager
def _evaluating(model: object) -> Iterator[None]:
    """In evaluation mode, and afterwards each part in the mode that it had: some are kept from training on purpose."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _check_labels(labels: Tensor, classes: int) -> None:
    named = labels[labels != IGNORED]
    if named.numel() and (int(named.min()) < 0 or int(named.max()) >= classes):
        raise UsageError(
            f"labels from {int(named.min())} to {int(named.max())} were given, the student has {classes} classes",
            hint=f"allowed are 0 to {classes - 1}, and {IGNORED} for none",
        )
