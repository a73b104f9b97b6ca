"""The loop of a distillation, with torch and Accelerate: steps, checkpoints, the training log.

Every step is a function of the config, the data and the step's number: its rows, its learning rate and its random state
follow from them. So a run that was killed and resumed goes the way of one that was not. On several processes (data
parallel) a step takes batch · accumulate rows in each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from edgewise.compress.distil import checkpoint
from edgewise.compress.distil.config import Config, Train
from edgewise.compress.distil.loss import IGNORED, Losses, TopTokens, distillation_loss, targets_of
from edgewise.compress.distil.trainer import logits_of
from edgewise.errors import Diverged, UsageError
from edgewise.models.download import Progress
from edgewise.types import IdArray

LOG: Final = "training.jsonl"
CHECKPOINTS: Final = "checkpoints"
BETAS: Final = (0.9, 0.95)

Tell = Callable[[str], None]
Line = dict[str, Any]
Rows = npt.NDArray[np.integer[Any]]


class Told(Protocol):
    """What a teacher says of rows: `ids` int [b, length, k], `logprobs` float [b, length, k], `rest` float
    [b, length], as TopTokens has them; at t of the token at t + 1."""

    @property
    def ids(self) -> npt.NDArray[Any]: ...
    @property
    def logprobs(self) -> npt.NDArray[Any]: ...
    @property
    def rest(self) -> npt.NDArray[Any]: ...


class Teaching(Protocol):
    def rows(self, at: IdArray, /) -> Told: ...


@dataclass(frozen=True, slots=True)
class Lessons:
    """Rows of ids [n, length] to learn from and [m, length] to be judged by, negative where there is only padding, and
    what the teacher says of each. `digest` is of all that."""

    train: Rows
    held_out: Rows
    taught: Teaching | None
    held_out_taught: Teaching | None
    digest: str


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run came to: steps done, tokens seen, the training log, and the checkpoint it was resumed from."""

    steps: int
    tokens: int
    log: list[Line]
    resumed_from: Path | None


def train(
    model: nn.Module,
    lessons: Lessons,
    config: Config,
    directory: Path,
    *,
    resume: bool,
    progress: Progress,
    tell: Tell,
) -> Trained:
    """Train `model` (ids [b, length] in, logits [b, length, vocabulary] out) in place, for `config.train.tokens` tokens
    of whole steps. `directory` gets checkpoints/ and training.jsonl; with `resume` the run goes on from its last
    checkpoint, or begins if there is none.

    UsageError where there are checkpoints and they are not to be resumed, or are of another config, other data or
    another model; Diverged where the loss is no number any more; CheckpointError where the disk is full. The last
    checkpoint stays in each case."""
    loop = Loop(model, lessons, config, directory, tell)
    resumed_from = loop.begin(resume)
    for step in range(loop.done, loop.steps):
        loop.step(step)
        progress("training", loop.done * loop.tokens_per_step, loop.steps * loop.tokens_per_step)
    loop.finish()
    lines = [msgspec.json.decode(line) for line in bytes(loop.log).splitlines()]
    return Trained(loop.steps, loop.steps * loop.tokens_per_step, lines, resumed_from)


def rows_of_step(step: int, per_step: int, rows: int, seed: int) -> IdArray:
    """Which rows a step learns from, int64 [per_step]: the next ones of epochs that each have an order of their own,
    which follows from the seed and the epoch alone."""
    epochs, places = np.divmod(np.arange(step * per_step, (step + 1) * per_step), rows)
    return np.array([_order(seed, int(epoch), rows)[at] for epoch, at in zip(epochs, places, strict=True)], np.int64)


@lru_cache(maxsize=2)  # a step may reach into the next epoch
def _order(seed: int, epoch: int, rows: int) -> IdArray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def learning_rate(step: int, steps: int, train: Train) -> float:
    """Up in a straight line over the share `warmup` of the steps, then down a half cosine to zero behind the last."""
    up = round(train.warmup * steps)
    if step < up:
        return train.lr * (step + 1) / (up + 1)
    return train.lr * 0.5 * (1 + math.cos(math.pi * (step - up) / max(steps - up, 1)))


def adamw(model: nn.Module, train: Train) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019); gains and biases do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr, betas=BETAS, fused=True)


class Loop:
    """One run. `train` drives it; whoever measures steps does it alike: `begin`, `step` for each number from `done` to
    `steps`, `finish`."""

    def __init__(self, model: nn.Module, lessons: Lessons, config: Config, directory: Path, tell: Tell) -> None:
        self._lessons, self._config, self._tell = lessons, config, tell
        self._train, self._loss = config.train, config.loss
        self._accelerator = Accelerator(mixed_precision="no")  # autocast is ours: its logits stay as narrow as they are
        self._model, self._optimizer = self._accelerator.prepare(model, adamw(model, config.train))
        self._plain: nn.Module = self._accelerator.unwrap_model(self._model)
        self._narrow = _narrow(self._train.precision, self._accelerator.device)
        self._directory, self._checkpoints = directory, directory / CHECKPOINTS
        self._rows_per_step = self._train.batch * self._train.accumulate * self._accelerator.num_processes
        self.tokens_per_step = self._rows_per_step * lessons.train.shape[1]
        self.steps = math.ceil(self._train.tokens / self.tokens_per_step)
        self.done = 0
        self.log = bytearray()
        self._saved_step, self._saved_s = 0, time.monotonic()
        self._began_s, self._began_at, self._before_s = time.monotonic(), 0, 0.0

    # From the first step to the last

    def begin(self, resume: bool) -> Path | None:
        """Put everything where the last checkpoint left it; without one, look at the student as it is."""
        if not len(self._lessons.train):
            raise UsageError("the data has no row to train on", hint="more text, or a smaller data.length")
        path = begun(self._directory, self._config, resume)
        if path is None:
            self._write(fresh=True)
            self._evaluate()
            return None
        state = checkpoint.read_state(path)
        _check_same(state.facts, self._facts(), path)
        self.log = bytearray(checkpoint.load(path, self._plain, self._optimizer))
        self.done = self._began_at = self._saved_step = state.step
        self._before_s = max(line.get("elapsed_s", 0.0) for line in map(msgspec.json.decode, self.log.splitlines()))
        self._write(fresh=True)
        return path

    def step(self, step: int) -> None:
        """One step of the optimiser, and what is due behind it."""
        started_s = time.monotonic()
        rate = learning_rate(step, self.steps, self._train)
        figures = self._learn(step, rate)
        self.done = step + 1
        self._note({"step": self.done, "tokens": self.done * self.tokens_per_step, **figures, "lr": rate,
                    "elapsed_s": round(self._elapsed_s(), 3)})  # fmt: skip
        if self.done * self._train.evaluations // self.steps > step * self._train.evaluations // self.steps:
            self._evaluate()
        took_s = time.monotonic() - started_s
        if time.monotonic() - self._saved_s + took_s > self._train.checkpoint_s:
            self._save()

    def finish(self) -> None:
        if self._saved_step < self.done:
            self._save()
        self._accelerator.wait_for_everyone()

    # A step

    def _learn(self, step: int, rate: float) -> dict[str, float]:
        """Gradients of all the step's rows, each real token with one weight wherever it stands, and the update."""
        accelerator, train = self._accelerator, self._train
        torch.manual_seed(_seed(train.seed, step, accelerator.process_index))
        rows = rows_of_step(step, self._rows_per_step, len(self._lessons.train), train.seed)
        tokens = int((self._lessons.train[np.sort(rows)][:, 1:] >= 0).sum())
        mine = rows.reshape(train.accumulate, accelerator.num_processes, train.batch)[:, accelerator.process_index]
        sums = torch.zeros(3)
        self._plain.train()
        for number, at in enumerate(mine):
            last = number == len(mine) - 1
            with nullcontext() if last else accelerator.no_sync(self._model):
                losses = self._lose(self._model, self._lessons.train[at], _told(self._lessons.taught, at))[0]
                share = losses.tokens / max(tokens, 1)
                accelerator.backward(losses.total * (share * accelerator.num_processes))  # which the mean divides by
            sums += share * _parts(losses)
        loss, kl, ce = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        norm = float(accelerator.clip_grad_norm_(self._plain.parameters(), train.clip))
        self._check_finite(step + 1, {"loss": loss, "gradient_norm": norm})
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"loss": loss, **({"kl": kl} if self._loss.alpha else {}), "ce": ce, "gradient_norm": norm}

    def _lose(self, model: Any, ids: Rows, told: Told | None) -> tuple[Losses, Tensor, Tensor]:
        """The losses of rows, and their logits and labels. What is judged is computed in float32."""
        device = self._accelerator.device
        labels = torch.from_numpy(np.where(ids < 0, IGNORED, ids).astype(np.int64)).to(device)
        narrow = self._narrow if torch.is_grad_enabled() else None
        with torch.autocast(device.type, narrow or torch.bfloat16, enabled=narrow is not None):
            logits = logits_of(model(labels.clamp(min=0)), "student")
        teacher = None if told is None else _on(device, told, logits.shape[-1])
        losses = distillation_loss(
            logits,
            teacher if self._loss.alpha else None,
            labels,
            temperature=self._loss.temperature,
            alpha=self._loss.alpha,
            causal=True,
        )
        return losses, logits, labels

    def _check_finite(self, step: int, figures: Mapping[str, float]) -> None:
        bad = {name: value for name, value in figures.items() if not math.isfinite(value)}
        if bad:
            last = checkpoint.latest(self._checkpoints)
            what = " and ".join(f"{name} {value}" for name, value in bad.items())
            raise Diverged(
                f"step {step} has {what}; "
                + (f"the last checkpoint is {last}" if last else "there is no checkpoint yet"),
                hint="a resumed run would come here again: begin anew with a smaller train.lr or a longer train.warmup",
            )

    # Beside the steps

    def _evaluate(self) -> None:
        """How the student does on rows that it never learns from; the KL is at temperature 1."""
        if not self._accelerator.is_main_process or not len(self._lessons.held_out):
            return
        rows = np.arange(min(self._train.evaluation_rows, len(self._lessons.held_out)))
        self._plain.eval()
        with torch.no_grad():
            parts = [self._judge(at) for at in _few(rows, self._train.batch)]
        tokens = sum(part["tokens"] for part in parts)
        if not tokens:
            return
        figures = {key: sum(p[key] for p in parts) / tokens for key in parts[0] if key != "tokens"}
        self._check_finite(self.done, figures)
        self._note({"step": self.done, "tokens": self.done * self.tokens_per_step, "held_out": figures})
        self._tell(self._told_of(figures))

    def _judge(self, at: IdArray) -> dict[str, float]:
        """Sums over the real tokens of some held-out rows."""
        told = _told(self._lessons.held_out_taught, at)
        losses, logits, labels = self._lose(self._plain, self._lessons.held_out[at], told)
        total, _, ce = _parts(losses).tolist()
        sums = {"tokens": losses.tokens, "loss": total * losses.tokens, "ce": ce * losses.tokens}
        if told is not None:
            teacher = _on(logits.device, told, logits.shape[-1])
            exact = distillation_loss(logits, teacher, labels, temperature=1.0, alpha=1.0, causal=True)
            best = teacher.ids.gather(-1, teacher.logprobs.argmax(-1, keepdim=True))[..., 0]
            real = targets_of(labels, causal=True) != IGNORED
            sums["kl"] = exact.total.item() * losses.tokens
            sums["top1_agreement"] = float((logits.argmax(-1) == best)[real].sum())
        return sums

    def _told_of(self, figures: Mapping[str, float]) -> str:
        words = [f"held-out loss {figures['loss']:.3f}, {figures['ce']:.3f} nats a token"]
        if "kl" in figures:
            words.append(f"KL {figures['kl']:.3f}, top-1 agreement {figures['top1_agreement']:.1%}")
        made = self.done - self._began_at
        if made:
            left_s = (self.steps - self.done) * (time.monotonic() - self._began_s) / made
            words.append(f"{left_s / 60:.0f} min left")
        return f"step {self.done} of {self.steps}: {', '.join(words)}"

    def _save(self) -> None:
        if self._accelerator.is_main_process:
            tokens = self.done * self.tokens_per_step
            state = checkpoint.State(step=self.done, tokens=tokens, facts=self._facts())
            checkpoint.save(self._checkpoints, self._plain, self._optimizer, state, bytes(self.log))
        self._saved_step, self._saved_s = self.done, time.monotonic()

    def _note(self, line: Line) -> None:
        self.log += msgspec.json.encode(line) + b"\n"
        self._write(msgspec.json.encode(line) + b"\n")

    def _write(self, more: bytes = b"", *, fresh: bool = False) -> None:
        """The log on disk: behind what is there, or all of it afresh, without what came after the checkpoint."""
        if not self._accelerator.is_main_process:
            return
        with checkpoint.writing(self._checkpoints):
            self._directory.mkdir(parents=True, exist_ok=True)
            with (self._directory / LOG).open("wb" if fresh else "ab") as file:
                file.write(bytes(self.log) if fresh else more)

    def _facts(self) -> dict[str, Any]:
        return {
            **_plain(self._config.facts),
            "data": self._lessons.digest,
            "processes": self._accelerator.num_processes,
        }

    def _elapsed_s(self) -> float:
        """Over all the run's processes, one after the other."""
        return self._before_s + time.monotonic() - self._began_s


def begun(directory: Path, config: Config, resume: bool) -> Path | None:
    """The last checkpoint of a run that is to go on in `directory`; None if none began there. UsageError if there is
    one and it is not to be resumed, or was of another config."""
    path = checkpoint.latest(directory / CHECKPOINTS)
    if path is None:
        return None
    if not resume:
        raise UsageError(
            f"{directory} holds a run already: {path.name}", hint="go on with --resume, or name another output"
        )
    now = _plain(config.facts)
    before = checkpoint.read_state(path).facts
    _check_same({key: before[key] for key in before if key in now}, now, path)
    return path


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    other = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if other:
        what = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in other)
        raise UsageError(
            f"{path} is of another run: {what}", hint="put it back as it was, or name another output to begin anew"
        )


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from a checkpoint."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(facts))
    return plain


def _narrow(precision: str, device: torch.device) -> torch.dtype | None:
    """The type that matrices are multiplied in, where it is not float32."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and able) else None


def _seed(seed: int, step: int, process: int) -> int:
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0] >> 1)


def _told(teaching: Teaching | None, at: IdArray) -> Told | None:
    return None if teaching is None else teaching.rows(at)


def _on(device: torch.device, told: Told, vocabulary: int) -> TopTokens:
    """The teacher's tokens as tensors. UsageError if the student lacks one of them."""
    most = int(told.ids.max())
    if most >= vocabulary:
        raise UsageError(
            f"the teacher speaks of token {most}, the student has {vocabulary} tokens, 0 to {vocabulary - 1}",
            hint="both need one vocabulary: teach again with the student's",
        )
    ids, logprobs, rest = (
        torch.from_numpy(np.ascontiguousarray(array, dtype)).to(device)
        for array, dtype in ((told.ids, np.int64), (told.logprobs, np.float32), (told.rest, np.float32))
    )
    return TopTokens(ids, logprobs, rest)


def _parts(losses: Losses) -> Tensor:
    """Total, KL and cross-entropy, float32 [3]."""
    kl = torch.zeros(()) if losses.kl is None else losses.kl.cpu()
    return torch.stack([losses.total.detach().cpu(), kl, losses.ce.cpu()])


def _few(rows: IdArray, size: int) -> Iterator[IdArray]:
    return (rows[at : at + size] for at in range(0, len(rows), size))
