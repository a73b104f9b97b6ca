"""What crosses the boundary of one session, kept as it was sent: all that is needed to go on anywhere else."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgewise.engines.local import LocalModel
from edgewise.types import FloatArray, IdArray
from edgewise.wire.codec import ByteArray, Codec, codec, codec_numbered

FIRST_ROOM = 64  # rows


class Codings:
    """The codecs of a model's boundaries: what they round finely depends on the layers behind. Behind the last layer
    is the boundary number `card.layers`, where hidden states come back."""

    def __init__(self, model: LocalModel[Any]) -> None:
        self._model = model
        self._made: dict[tuple[str, int], Codec] = {}

    def named(self, name: str, cut: int) -> Codec:
        """UsageError for another name than there is."""
        if (name, cut) not in self._made:
            self._made[name, cut] = codec(name, self._model.gains(cut))
        return self._made[name, cut]

    def numbered(self, number: int, cut: int) -> Codec:
        """Likewise."""
        return self.named(codec_numbered(number).name, cut)


class BoundaryLog:
    """The ids of a session, and the boundary rows that they became, in the bytes of `codec`. A row is read back from
    its bytes also where it never left: then what computes it there and here computes the same."""

    def __init__(self, codec: Codec, hidden: int) -> None:
        self.codec = codec
        self._hidden = hidden
        self._ids = np.empty(FIRST_ROOM, np.int64)
        self._rows: ByteArray = np.empty((FIRST_ROOM, codec.row_bytes(hidden)), np.uint8)
        self.length = 0

    @property
    def ids(self) -> IdArray:
        return self._ids[: self.length]

    @property
    def row_bytes(self) -> int:
        return self.codec.row_bytes(self._hidden)

    def put(self, position: int, ids: IdArray, hidden: FloatArray) -> None:
        """Rows float32 [n, hidden] at `position`, which is at most the length; what was there and behind is forgotten.
        CodecOverflow if the codec cannot hold them: nothing has changed then."""
        rows, end = self.codec.encode(hidden), position + len(ids)
        if end > len(self._ids):
            room = max(end, 2 * len(self._ids))
            self._ids = np.resize(self._ids, room)
            grown: ByteArray = np.empty((room, self.row_bytes), np.uint8)
            grown[: self.length] = self._rows[: self.length]
            self._rows = grown
        self._ids[position:end] = ids
        self._rows[position:end] = rows
        self.length = end

    def cut_off(self, position: int) -> None:
        """Forget what stands at `position` and behind."""
        self.length = min(self.length, position)

    def payload(self, start: int, end: int) -> bytes:
        return self._rows[start:end].tobytes()

    def decoded(self, start: int, end: int) -> FloatArray:
        """float32 [end - start, hidden], as the other side sees them."""
        return self.codec.decode(self._rows[start:end], self._hidden)
