"""The loss of distillation, with torch: softened KL to a teacher and cross-entropy with the text, over real tokens.

    loss = alpha · T² · KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 - alpha) · cross-entropy

(Hinton et al. 2015, Distilling the Knowledge in a Neural Network.) Gradients of the softened term shrink with 1/T²; the
factor T² keeps their size. Both terms are sums over classes and means over real tokens: padding counts nowhere, and
neither does the number of classes.

A teacher may be known by its k most probable tokens alone (`TopTokens`). Then teacher and student are both made coarse
first: the k tokens, and one bucket that holds the probability of all others together. These k + 1 log-probabilities
are softened as if they were logits. So the loss is zero where the student gives each of the k tokens the teacher's
probability, however it shares out the rest; with k as large as the vocabulary there is no bucket, and the loss is that
of the whole distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from edgewise.errors import UsageError

IGNORED: Final = -100  # a label that is none, as torch and transformers have it
CPU_LOGITS, GPU_LOGITS = 1 << 20, 1 << 26  # looked at together: what a CPU's caches hold, what keeps a GPU busy


@dataclass(frozen=True, slots=True)
class TopTokens:
    """A teacher's most probable tokens at each position: `ids` int64 [..., k], no id twice, the natural logarithms of
    their probabilities at temperature 1, `logprobs` float [..., k], and that of all others' together, `rest` float
    [...] (-inf where nothing is left)."""

    ids: Tensor
    logprobs: Tensor
    rest: Tensor


@dataclass(frozen=True, slots=True)
class Losses:
    """`total` carries the gradient; `kl` (nats a token at temperature T, without T² and alpha; None without a teacher)
    and `ce` (nats a token) are what it was made of: scalars. `tokens` is how many were real. Without any real token all
    are zero."""

    total: Tensor
    kl: Tensor | None
    ce: Tensor
    tokens: int


def distillation_loss(
    student: Tensor,
    teacher: Tensor | TopTokens | None,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 0.5,
    causal: bool,
    attention_mask: Tensor | None = None,
) -> Losses:
    """The loss of a student's logits, float [..., classes], for labels int64 [...], -100 where there is none.

    `causal`: logits [batch, time, vocabulary] and labels [batch, time] as transformers passes them, not shifted; the
    logits at t foretell the label at t + 1. Otherwise each row of logits has its own label. `attention_mask` [...] is 0
    at padding, which neither foretells nor is foretold. `teacher` is logits of the student's shape, or TopTokens whose
    first axes are those of `labels`, or None, if alpha is 0. No gradient goes to the teacher. Computed in float32, or
    in float64 if the student is; the gradient cannot be differentiated again.

    UsageError for shapes that do not go together, among them vocabularies of different sizes."""
    check_weights(temperature, alpha)
    _check_shapes(student, teacher, labels, causal, attention_mask)
    if teacher is None and alpha:
        raise UsageError(f"alpha is {alpha} and there is no teacher", hint="give one, or alpha=0")
    classes = student.shape[-1]
    targets = targets_of(labels, causal, attention_mask).reshape(-1)
    known = _flat(teacher)
    places = (targets != IGNORED).nonzero()[:, 0]
    count = len(places)

    divisor = max(count, 1)

    def objective(logits: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows [n, classes]: total, cross-entropy and KL, their shares of the mean over all real tokens."""
        ce, kl = _sums(logits, _at(known, at), targets[at], temperature)
        soft = alpha * temperature**2
        total = ce if not soft else soft * kl if alpha == 1 else (1 - alpha) * ce + soft * kl
        return total / divisor, ce / divisor, kl / divisor

    total, parts = _OverRows.apply(student.reshape(-1, classes), places, objective)  # type: ignore[no-untyped-call]
    return Losses(total, None if teacher is None else parts[2], parts[1], count)


Objective = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class _OverRows(torch.autograd.Function):
    """A sum over rows of logits, a few rows at a time, and its gradient on the way: of all that is computed nothing but
    the gradient is as large as the logits, and what stands in a cache is read there again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, objective: Objective) -> Any:
        """Of logits [rows, classes] at places int64 [n]: the sum of the first that `objective` gives, and of all."""
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(logits) if wanted else None
        parts = torch.zeros(3, dtype=_precise(logits.dtype), device=logits.device)
        together = CPU_LOGITS if logits.device.type == "cpu" else GPU_LOGITS
        for at in torch.split(places, max(1, together // logits.shape[-1])):
            with torch.set_grad_enabled(wanted):
                few = logits.detach()[at].to(parts.dtype).requires_grad_(wanted)
                total, *others = objective(few, at)
            if gradient is not None:
                gradient[at] = torch.autograd.grad(total, few)[0].to(gradient.dtype)
            parts += torch.stack([total, *others]).detach()
        ctx.gradient = gradient
        ctx.mark_non_differentiable(parts)
        return parts[0].clone(), parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        return ctx.gradient * upstream, None, None


def check_weights(temperature: float, alpha: float) -> None:
    """UsageError for a temperature or a share that makes no sense."""
    if not 0.0 < temperature < float("inf"):
        raise UsageError(f"the temperature is {temperature!r}; allowed are numbers above 0")
    if not 0.0 <= alpha <= 1.0:
        raise UsageError(f"alpha is {alpha!r}; allowed are 0 (the labels alone) to 1 (the teacher alone)")


def _check_shapes(
    student: Tensor, teacher: Tensor | TopTokens | None, labels: Tensor, causal: bool, mask: Tensor | None
) -> None:
    if student.shape[:-1] != labels.shape or (causal and student.ndim != 3):
        wanted = "[batch, time, vocabulary] and [batch, time]" if causal else "[..., classes] and [...]"
        raise UsageError(
            f"the student's logits have the shape {_shape(student)}, the labels {_shape(labels)}",
            hint=f"{wanted} go together",
        )
    if mask is not None and mask.shape != labels.shape:
        raise UsageError(f"the attention mask has the shape {_shape(mask)}, the labels {_shape(labels)}")
    if isinstance(teacher, Tensor):
        _check_dense(student, teacher)
    elif teacher is not None:
        k = teacher.ids.shape[-1]
        shapes = [_shape(one) for one in (teacher.ids, teacher.logprobs, teacher.rest)]
        if shapes != [(*labels.shape, k), (*labels.shape, k), (*labels.shape,)]:
            raise UsageError(f"the teacher's tokens have the shapes {shapes}, which do not go with {_shape(labels)}")
        if not 1 <= k <= student.shape[-1]:
            raise UsageError(f"the teacher gives {k} tokens a position, the student knows {student.shape[-1]}")


def _check_dense(student: Tensor, teacher: Tensor) -> None:
    if teacher.shape[-1:] != student.shape[-1:]:
        raise UsageError(
            f"the teacher's logits have {teacher.shape[-1]} classes, the student's {student.shape[-1]}",
            hint="both need one vocabulary: prune the teacher's logits to the student's tokens, or pad the student's",
        )
    if teacher.shape != student.shape:
        raise UsageError(
            f"the teacher's logits have the shape {_shape(teacher)}, the student's {_shape(student)}",
            hint="both must see the same inputs",
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def targets_of(labels: Tensor, causal: bool, mask: Tensor | None = None) -> Tensor:
    """What the logits at each place foretell, int64 [...], -100 for nothing."""
    padded = labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
    if not causal:
        return padded
    targets = functional.pad(padded[:, 1:], (0, 1), value=IGNORED)
    return targets if mask is None else targets.masked_fill(mask == 0, IGNORED)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _flat(teacher: Tensor | TopTokens | None) -> Tensor | TopTokens | None:
    """Its positions in one row, without their graph."""
    if teacher is None:
        return None
    if isinstance(teacher, Tensor):
        return teacher.detach().reshape(-1, teacher.shape[-1])
    k = teacher.ids.shape[-1]
    logprobs, rest = teacher.logprobs.detach(), teacher.rest.detach()
    return TopTokens(teacher.ids.reshape(-1, k), logprobs.reshape(-1, k), rest.reshape(-1))


def _at(teacher: Tensor | TopTokens | None, places: Tensor) -> Tensor | TopTokens | None:
    if isinstance(teacher, TopTokens):
        return TopTokens(teacher.ids[places], teacher.logprobs[places], teacher.rest[places])
    return None if teacher is None else teacher[places]


def _sums(
    logits: Tensor, teacher: Tensor | TopTokens | None, wanted: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and softened KL (zero without a teacher), summed over rows [n, classes]."""
    if not isinstance(teacher, TopTokens):
        ce = functional.cross_entropy(logits, wanted, reduction="sum")
        return ce, ce.new_zeros(()) if teacher is None else _softened_kl(logits, teacher.to(logits.dtype), temperature)
    student_coarse, teacher_coarse = _coarse(logits, teacher)
    # The coarse student holds all its probability: its normaliser is that of the whole row, which is read but once.
    chosen = logits.gather(-1, wanted[:, None])[:, 0]
    ce = (student_coarse.logsumexp(-1) - chosen).sum()
    return ce, _softened_kl(student_coarse, teacher_coarse, temperature)


def _coarse(logits: Tensor, teacher: TopTokens) -> tuple[Tensor, Tensor]:
    """Unnormalised log-probabilities [n, k + 1] of the student, and those of the teacher: its tokens, and the rest.
    [n, k] where k is the whole vocabulary."""
    ids = teacher.ids.to(torch.int64)
    top, known = logits.gather(-1, ids), teacher.logprobs.to(logits.dtype)
    if ids.shape[-1] == logits.shape[-1]:
        return top, known
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([top, others], -1), torch.cat([known, teacher.rest.to(logits.dtype)[:, None]], -1)


def _softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / T) ‖ softmax(student / T)) of logits [n, m], summed over rows. What the teacher rules out
    (-inf) adds nothing."""
    log_p = functional.log_softmax(teacher / temperature, -1)
    log_q = functional.log_softmax(student / temperature, -1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sum()
