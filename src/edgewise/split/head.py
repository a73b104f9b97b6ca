"""From hidden states behind the last layer to tokens: the same steps at a worker and on the edge."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.engines.local import LocalModel
from edgewise.engines.sampling import BestOf
from edgewise.engines.slots import CHUNK
from edgewise.types import Best, FloatArray


class Head:
    """The head of a local model. Its buffers stay: new pages at every token would cost more than the arithmetic."""

    def __init__(self, model: LocalModel[Any]) -> None:
        self._model = model
        self._best_of = BestOf()
        self._logits = np.empty((1, model.vocab), np.float32)

    def logits(self, hidden: FloatArray) -> FloatArray:
        """float32 [n, vocab] of hidden states [n, hidden], valid until the next call."""
        if len(hidden) > len(self._logits):
            self._logits = np.empty((len(hidden), self._model.vocab), np.float32)
        logits = self._logits[: len(hidden)]
        for start in range(0, len(hidden), CHUNK):
            self._model.project(hidden[start : start + CHUNK], logits[start : start + CHUNK])
        return logits

    def best(self, hidden: FloatArray, count: int) -> Best:
        """The `count` most probable tokens of each."""
        return self._best_of(self.logits(hidden), count)
