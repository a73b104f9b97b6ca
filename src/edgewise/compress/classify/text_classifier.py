"""torch: a classifier of short texts for the smallest devices, and the file that it becomes (text_graph.py).

The sum of its n-grams' vectors over the root of their number, one hidden layer, logits: after Joulin et al. 2016, Bag
of Tricks for Efficient Text Classification, with a table of chosen n-grams instead of all. With 10,000 of them, 128
wide, it is 1.7 MB.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewise.compress.classify.text_graph import NGrams, Weights, write
from edgewise.errors import UsageError

START = 0.05  # deviation of the table's numbers before training


class TextClassifier(nn.Module):
    """Rows of n-grams in, logits out. `left_out` is the share of a text's n-grams that one look in training does not
    see, `dropout` that of the hidden numbers. UsageError for sizes below 1 or shares outside 0 to 1.

    Train it as any module, on ids of `ngrams.of(texts)`, by DistillationTrainer or by hand; then `save`."""

    def __init__(
        self,
        ngrams: NGrams,
        classes: int,
        *,
        width: int = 128,
        hidden: int = 256,
        left_out: float = 0.3,
        dropout: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(classes, width, hidden) < 1 or not (0 <= left_out < 1 and 0 <= dropout < 1):
            raise UsageError(
                f"{classes} classes, width {width}, {hidden} hidden numbers, left_out {left_out} and dropout {dropout} "
                "were given; allowed are whole numbers from 1 on, and shares from 0 to below 1"
            )
        self.ngrams, self.left_out = ngrams, left_out
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, classes)
        self.drop = nn.Dropout(dropout)
        drawn = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(ngrams.count, width, generator=drawn) * START)
        for layer in (self.inner, self.outer):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=drawn)
            nn.init.zeros_(layer.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits float32 [batch, classes] of rows int [batch, n-grams], 0 for none."""
        if self.training and self.left_out:
            ids = ids * (torch.rand(ids.shape, device=ids.device) >= self.left_out)
        count = (ids > 0).sum(dim=1, keepdim=True).clamp(min=1)
        summed = functional.embedding_bag(ids, self.table, mode="sum", padding_idx=0)
        hidden = functional.relu(self.inner(self.drop(summed / count.sqrt())))
        return cast(Tensor, self.outer(self.drop(hidden)))

    def save(self, path: Path) -> int:
        """Write the ONNX file and return its bytes; engines/onnx_net.py runs it. OSError if it cannot be written."""
        layers = [
            (layer.weight.detach().cpu().numpy().T, layer.bias.detach().cpu().numpy())
            for layer in (self.inner, self.outer)
        ]
        return write(path, self.ngrams, Weights(self.table.detach().cpu().numpy(), layers))
