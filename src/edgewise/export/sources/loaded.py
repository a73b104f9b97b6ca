"""A source as every target gets it: a torch module, and what goes in and comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from edgewise.export.sources.data import Tokenize
from edgewise.export.work.job import Task, Tensor


@dataclass(frozen=True)
class Loaded:
    """`module` takes tensors in the order of `inputs` and gives a tensor or a tuple of them, named `outputs`. `example`
    holds two rows of each input: with one, an exporter would take the batch for a constant."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    task: Task
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    tokenize: Tokenize | None = None

    @property
    def example(self) -> dict[str, torch.Tensor]:
        return {one.name: _example(one, 2) for one in self.inputs}

    @property
    def one_row(self) -> tuple[torch.Tensor, ...]:
        """For targets whose batch is one."""
        return tuple(_example(one, 1) for one in self.inputs)


def _example(one: Tensor, rows: int) -> torch.Tensor:
    shape = (rows, *(axis or 1 for axis in one.shape[1:]))
    dtype = getattr(torch, one.dtype)
    if dtype.is_floating_point:
        return torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return torch.ones(shape, dtype=dtype)
