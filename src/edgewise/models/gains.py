"""How much the layers behind a cut make of each number that crosses it, as far as their norms tell.

A model reads its residual stream through norms, and their scales undo what its channels differ by: in Gemma-3-270M
those of one norm span two orders of magnitude, and the channels with small scales are the ones with large numbers. A
boundary codec rounds more finely where the scales are large (docs/formats/boundary.md). No data is needed for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from edgewise.models.bundle import Bundle
from edgewise.models.card import Card
from edgewise.models.tensors import FINAL_NORM, vectors
from edgewise.types import FloatArray

DECAY: Final = 0.8  # what the next norm counts beside one; measured, as the power is, on two models
LEAST: Final = 2.0**-10  # of the largest gain; a channel that no norm reads is kept that finely

Doubles = npt.NDArray[np.float64]


class Gains:
    """Of a model's boundaries. Each is made of exact operations and correctly rounded ones alone, so that two machines
    have the same bits."""

    def __init__(self, card: Card, norms: Mapping[str, FloatArray]) -> None:
        """`norms` as `vectors` names them; what is missing scales nothing."""
        self._card = card
        self._scales = [
            [norms.get(f"layer{n}.{name}") for name in ("attention_norm", "ffn_norm")] for n in range(card.layers)
        ]
        self._last = norms.get(FINAL_NORM)
        self._made: dict[int, FloatArray] = {}

    @staticmethod
    def of(bundle: Bundle) -> Gains:
        return Gains(bundle.card, vectors(bundle))

    def at(self, cut: int) -> FloatArray:
        """float32 [hidden], above 0 and at most 1, of the boundary before layer `cut` (0 .. layers)."""
        if cut not in self._made:
            self._made[cut] = self._at(cut)
        return self._made[cut]

    def _at(self, cut: int) -> FloatArray:
        total, share = np.zeros(self._card.hidden), 1.0
        for scale in self._behind(cut):
            squares = np.ones(self._card.hidden) if scale is None else scale.astype(np.float64) ** 2
            total += share * squares / (math.fsum(squares) or 1.0)
            share *= DECAY
        fourth = np.sqrt(np.sqrt(total))
        gains = fourth * np.sqrt(fourth) * np.sqrt(np.sqrt(fourth))  # the root of the sum of squares, to the 7/8
        largest = gains.max() or 1.0
        return np.maximum(gains / largest, LEAST).astype(np.float32)

    def _behind(self, cut: int) -> Iterator[FloatArray | None]:
        for scales in self._scales[cut:]:
            yield from scales
        yield self._last
