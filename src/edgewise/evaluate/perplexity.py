"""How well a model foretells a text."""

from __future__ import annotations

import math

import numpy as np

from edgewise.errors import UsageError
from edgewise.evaluate.divergence import ROWS, Doubles, log_softmax
from edgewise.types import FloatArray, IdArray


class Perplexity:
    """exp of the mean negative log-likelihood, added up chunk after chunk."""

    def __init__(self) -> None:
        self.tokens = 0
        self._nll = 0.0

    def add(self, logits: FloatArray, ids: IdArray) -> None:
        """`logits` [n, vocab] and the ids [n] that did come there: logits[i] foretells ids[i]."""
        self._nll += float(nll(logits, ids).sum())
        self.tokens += len(ids)

    def result(self) -> float:
        if not self.tokens:
            raise UsageError("no token was counted; a text of at least two tokens is needed")
        return math.exp(min(self._nll / self.tokens, 700.0))  # beyond, exp overflows; it is nonsense long before


def nll(logits: FloatArray, ids: IdArray) -> Doubles:
    """Negative log-likelihood of each id in nats, float64 [n]."""
    if logits.shape[:1] != ids.shape:
        raise UsageError(f"logits of shape {logits.shape} do not go with ids of shape {ids.shape}; one row per id")
    if len(ids) and not 0 <= ids.min() <= ids.max() < logits.shape[-1]:
        raise UsageError(f"ids from {ids.min()} to {ids.max()} were given, allowed are 0 to {logits.shape[-1] - 1}")
    parts = [_nll(logits[at : at + ROWS], ids[at : at + ROWS]) for at in range(0, len(ids), ROWS)]
    return np.concatenate([np.empty(0), *parts])


def _nll(logits: FloatArray, ids: IdArray) -> Doubles:
    return np.asarray(-log_softmax(logits)[np.arange(len(ids)), ids])
