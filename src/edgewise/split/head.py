"""From hidden states behind the last layer to tokens: the same steps at a worker and on the edge."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from edgewise.engines.local import LocalModel
from edgewise.engines.sampling import BestOf
from edgewise.engines.slots import CHUNK
from edgewise.types import Best, FloatArray

ROWS: Final = 16  # whose logits are there at once where only the best are wanted


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
        """The `count` most probable tokens of each. Few rows at a time: logits of all would be two hundred megabytes
        for the most that a frame may want of a usual vocabulary."""
        parts = [self._best_of(self.logits(hidden[n : n + ROWS]), count) for n in range(0, max(len(hidden), 1), ROWS)]
        if len(parts) == 1:
            return parts[0]
        return Best(np.concatenate([part.ids for part in parts]), np.concatenate([part.logprobs for part in parts]))
