"""A bundle's decoder layers as a Split of two stages in this process (split/inference.py): token ids in, logits out."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from edgewise.engines.base import StageRow
from edgewise.engines.load import local_model
from edgewise.engines.slots import CHUNK
from edgewise.errors import BadFrame, RequestError, UsageError
from edgewise.models.bundle import Bundle
from edgewise.split.boundary import Codings
from edgewise.split.seam import Crossing
from edgewise.types import FloatArray
from edgewise.wire.codec import codec
from edgewise.wire.feature import Container

T = TypeVar("T")

SESSION: Final = "whole"
ROWS: Final = "rows"


class BundleSplit:
    """The embedding and the layers below `cut` in front; the others and the head behind. Every call is a text of its
    own, from its first token on; edgewise.split.model generates. The rows travel as docs/formats/boundary.md has them,
    in a container of features."""

    def __init__(self, bundle: Bundle, cut: int, codec_name: str) -> None:
        codec(codec_name)  # checked before the model is loaded
        self._model = local_model(bundle, slots=1)
        last = self._model.card.layers
        if not 0 < cut < last or not self._model.cuts_at(cut):
            allowed = [n for n in range(1, last) if self._model.cuts_at(n)]
            raise UsageError(f"{bundle.name} cannot be cut at {cut}", hint=f"allowed are {allowed}")
        self._codec = Codings(self._model).named(codec_name, cut)
        self._front, self._back = self._model.stage(range(cut)), self._model.stage(range(cut, last))
        self.label = f"{bundle.weights[:16]}@{cut} {codec_name}"

    def front(self, x: Any) -> Crossing:
        ids = self._ids(x)
        hidden = self._through(self._front, self._model.embed(ids))
        return Crossing({ROWS: self._codec.encode(hidden)}, self.label, hidden.nbytes)

    def opened(self, received: Container) -> FloatArray:
        if received.label != self.label:
            raise BadFrame(f"the features are of {received.label[:100]!r}, this cut is {self.label!r}")
        rows = received.tensors.get(ROWS)
        width = self._codec.row_bytes(self._front.hidden)
        if rows is None or rows.dtype != np.uint8 or rows.shape[1:] != (width,) or not len(rows):
            raise BadFrame(f"the features hold no rows of {width} bytes")
        return self._codec.decode(rows, self._front.hidden)

    def back(self, x: FloatArray) -> FloatArray:
        """Logits float32 [n, vocab] of hidden states float32 [n, hidden]."""
        hidden = self._through(self._back, x)
        logits = np.empty((len(hidden), self._model.vocab), np.float32)
        for start in range(0, len(hidden), CHUNK):
            self._model.project(hidden[start : start + CHUNK], logits[start : start + CHUNK])
        return logits

    def joined(self, early: object, late: Any) -> Any:
        return late

    def close(self) -> None:
        _done(self._model.shutdown())

    def _ids(self, x: Any) -> npt.NDArray[np.int64]:
        ids = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
        if ids.ndim == 2 and len(ids) == 1:
            ids = ids[0]
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
            raise RequestError(f"token ids are wanted, [n] or [1, n]; this is {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self._model.vocab:
            raise RequestError(f"token ids are 0 to {self._model.vocab - 1} here; these are {ids.min()} to {ids.max()}")
        return ids.astype(np.int64)

    def _through(self, stage: Any, hidden: FloatArray) -> FloatArray:
        count = len(hidden)
        _done(stage.open(SESSION, count, stage.layers))
        try:
            (found,) = _done(stage.forward([StageRow(SESSION, 0, np.ascontiguousarray(hidden, np.float32), count)]))
        finally:
            _done(stage.close(SESSION))
        out: FloatArray = found
        return out


def _done(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing: a local stage computes where it is called."""
    try:
        work.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    work.close()
    raise AssertionError("a local stage waited")
