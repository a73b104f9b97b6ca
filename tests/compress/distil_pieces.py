"""A small run of distillation without a language model: what test_distil_loop.py trains, and, run as a program, the
same in a process that can be killed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from edgewise.compress.distil.config import Config, Data, Loss, Train
from edgewise.compress.distil.loop import Lessons, Trained, train

VOCABULARY, LENGTH, ROWS, HELD_OUT, K = 37, 12, 50, 6, 5


class Small(nn.Module):
    """Ids [b, t] to logits [b, t, 37]: a mean over what came before, with dropout, and a head tied to the table."""

    def __init__(self, seed: int = 0, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(vocabulary, 16)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        here = self.table(ids)
        before = here.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        hidden = torch.nn.functional.gelu(self.mix(torch.cat([here, before], -1)))
        logits: Tensor = self.head(self.dropout(self.norm(hidden)))
        return logits


@dataclass
class Told:
    ids: Any
    logprobs: Any
    rest: Any


class Teacher:
    """The K most probable tokens of another such model."""

    def __init__(self, rows: np.ndarray, k: int = K) -> None:
        with torch.no_grad():
            model = Small(seed=9).eval()
            model.table.weight *= 3
            known = model(torch.from_numpy(rows.clip(min=0)).long()).log_softmax(-1)
        best = known.topk(k, -1)
        rest = known.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
        self._told = best.indices.int().numpy(), best.values.numpy(), rest.numpy()

    def rows(self, at: np.ndarray) -> Told:
        return Told(*(array[at] for array in self._told))


def lessons(*, digest: str = "d", padded: bool = False, vocabulary: int = VOCABULARY) -> Lessons:
    random = np.random.default_rng(3)
    rows = random.integers(0, vocabulary, (ROWS + HELD_OUT, LENGTH), dtype=np.int32)
    if padded:
        for row, length in zip(rows, random.integers(2, LENGTH, len(rows)), strict=True):
            row[length:] = -1
    first, held = rows[:ROWS], rows[ROWS:]
    return Lessons(first, held, Teacher(first), Teacher(held), digest)


def config(output: Path, loss: dict[str, Any] | None = None, **changes: Any) -> Config:
    settings = {"tokens": 20 * 4 * 2 * LENGTH, "batch": 4, "accumulate": 2, "lr": 0.01, "evaluations": 4}
    return Config(
        name="small",
        teacher="none",
        data=Data(length=LENGTH),
        loss=Loss(**{"temperature": 2.0, "top_k": K} | (loss or {})),
        train=Train(**settings | changes),
        output=str(output),
    )


def run(directory: Path, *, resume: bool = False, model: nn.Module | None = None, **changes: Any) -> Trained:
    """Train in `directory`; `lessons` are this file's, if none are given."""
    given = changes.pop("lessons", None) or lessons()
    return train(
        Small() if model is None else model,
        given,
        config(directory, **changes),
        directory,
        resume=resume,
        progress=lambda what, done, total: None,
        tell=lambda text: None,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = msgspec.json.decode(sys.argv[2])
    model = Small()
    model.dropout.p = settings.pop("dropout", model.dropout.p)
    run(Path(sys.argv[1]), resume=True, model=model, **settings)
