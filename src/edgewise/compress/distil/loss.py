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
CPU_LOGITS, GPU_LOGITS = 1 << 21, 1 << 26  # looked at together: what a CPU's caches hold, what keeps a GPU busy


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

    weights = _Weights(temperature, alpha, max(count, 1))

    def lose(logits: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        few = _at(known, at)
        if isinstance(few, TopTokens):
            return _against_top(logits, few, targets[at], weights)
        return _against_all(logits, few, targets[at], weights)

    logits = student.reshape(-1, classes)
    total, parts = _OverRows.apply(logits, places, lose, weights)  # type: ignore[no-untyped-call]  # torch gives `apply` no types
    return Losses(total, None if teacher is None else parts[1], parts[0], count)


@dataclass(frozen=True, slots=True)
class _Weights:
    temperature: float
    alpha: float
    count: int

    @property
    def text(self) -> float:
        return 1 - self.alpha

    def total(self, ce: Tensor, kl: Tensor) -> Tensor:
        """A term of no weight stays away, even where it is infinite."""
        soft = self.alpha * self.temperature**2
        return ce if not soft else soft * kl if not self.text else self.text * ce + soft * kl


Lose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # rows and their places: CE and KL sums, gradient


class _OverRows(torch.autograd.Function):
    """The loss of rows of logits, a few at a time, with its gradient in closed form on the way: of all that is computed
    nothing but the gradient is as large as the logits, and what stands in a cache is read there again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, lose: Lose, weights: _Weights) -> Any:
        """Of logits [rows, classes] at places int64 [n]: the total, and cross-entropy and KL [2], all of them means."""
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        parts = torch.zeros(2, dtype=_precise(logits.dtype), device=logits.device)
        together = CPU_LOGITS if logits.device.type == "cpu" else GPU_LOGITS
        for at in torch.split(places, max(1, together // logits.shape[-1])):
            ce, kl, slope = lose(logits[at].to(parts.dtype), at)
            parts += torch.stack([ce, kl])
            if gradient is not None:
                gradient[at] = slope.to(gradient.dtype)
        parts /= weights.count
        ctx.gradient, ctx.count = gradient, weights.count
        ctx.mark_non_differentiable(parts)
        return weights.total(*parts.unbind()).clone(), parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Any:
        return ctx.gradient * (upstream / ctx.count), None, None, None  # divided late: half floats end at 6e-8


def _against_all(
    logits: Tensor, teacher: Tensor | None, wanted: Tensor, weights: _Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows [n, classes] beside a teacher's: sums of cross-entropy and KL (zero without one), and the gradient."""
    known = functional.log_softmax(logits, -1)
    ce = -known.gather(-1, wanted[:, None]).sum()
    slope = known.exp_().mul_(weights.text)
    slope.scatter_add_(-1, wanted[:, None], torch.full_like(slope[:, :1], -weights.text))
    if teacher is None:
        return ce, torch.zeros_like(ce), slope
    kl, apart = _softened(logits, teacher.to(logits.dtype), weights.temperature)
    return ce, kl, slope.add_(apart, alpha=weights.alpha * weights.temperature)


def _against_top(
    logits: Tensor, teacher: TopTokens, wanted: Tensor, weights: _Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """The same beside a teacher's most probable tokens. The row is read for its peak and its exponentials alone: what
    becomes of all others is one factor."""
    ids, text = teacher.ids.to(torch.int64), weights.text
    top, peak = logits.gather(-1, ids), logits.amax(-1, keepdim=True)
    others = (logits - peak).exp_().scatter_(-1, ids, 0.0)
    least = torch.finfo(logits.dtype).tiny
    left = others.sum(-1, keepdim=True).clamp_(min=least)
    mass = left + (top - peak).exp().sum(-1, keepdim=True)
    ce = (peak + mass.log() - logits.gather(-1, wanted[:, None])).sum()
    coarse, known = top, teacher.logprobs.to(logits.dtype)
    whole = ids.shape[-1] == logits.shape[-1]
    if not whole:
        coarse = torch.cat([top, peak + left.log()], -1)
        known = torch.cat([known, teacher.rest.to(logits.dtype)[:, None]], -1)
    kl, apart = _softened(coarse, known, weights.temperature)
    apart = apart.mul_(weights.alpha * weights.temperature)
    factor = text / mass if whole else text / mass + apart[:, -1:] / left
    slope = others.mul_(factor)
    slope.scatter_(-1, ids, text * (top - peak).exp() / mass + apart[:, : ids.shape[-1]])
    slope.scatter_add_(-1, wanted[:, None], torch.full_like(mass, -text))
    return ce, kl, slope


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(softmax(teacher / T) ‖ softmax(student / T)) of logits [n, m], summed over rows, and by how much the student's
    softened probabilities exceed the teacher's, [n, m]. What the teacher rules out (-inf) adds nothing to the KL."""
    log_p = functional.log_softmax(teacher / temperature, -1)
    log_q = functional.log_softmax(student / temperature, -1)
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum()
    return kl, log_q.exp_().sub_(p)


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
