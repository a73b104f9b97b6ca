"""Before int8: channels of a product's input made alike, and its matrix the other way round.

A transformer's activations have a few channels that are many times as large as the others, and one range for all leaves
these no steps. What goes into a product with a stored matrix is multiplied by a number for each channel, and the rows
of the matrix are divided by it (SmoothQuant, Xiao et al. 2023): the product is the same, and both round well. How much
of the spread goes to the matrix is searched for each input, by what the rounded products lose (as AWQ does, Lin et al.
2023). all-MiniLM-L6-v2's embeddings in int8 are off by 0.12 without it and by 0.06 with it (relative L2)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Final, TypeVar

import numpy as np

from edgewise.export.work.job import Array

VECTORS: Final = 512  # of each input that the search takes, over all rows
SHARES: Final = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)  # of the spread that goes to the matrix
SMALLEST: Final = 1e-5
QUIET: Final = 0.1  # of the middle one's reach, below which a channel is not made louder any more
GAINS: Final = 0.5  # of the squared error may be left, else the factors are not worth an operator

Product = TypeVar("Product")


def together(products: Sequence[Product], names: Callable[[Product], tuple[Hashable, Hashable]]) -> list[list[Product]]:
    """Products that must have the same factors, as they share an input or, as the layers of ALBERT do, a matrix.
    `names` gives those of one product; no input may have a matrix's."""
    groups: list[tuple[set[Hashable], list[Product]]] = []
    for product in products:
        joined, its = set(names(product)), [product]
        apart = []
        for group in groups:
            if joined.isdisjoint(group[0]):
                apart.append(group)
            else:
                joined, its = joined | group[0], [*group[1], *its]
        groups = [*apart, (joined, its)]
    return [its for _, its in groups]


class Channels:
    """What was seen of the inputs of products that share factors: the ends of each channel, and some vectors."""

    def __init__(self, values: int) -> None:
        """For so many values in all, one of each input for each row."""
        self._each = max(1, VECTORS // values)
        self._samples: list[Array] = []
        self.least: Array | None = None
        self.most: Array | None = None

    def add(self, value: Array) -> None:
        """[…, channels], of one row."""
        flat = value.reshape(-1, value.shape[-1])
        low, high = flat.min(0), flat.max(0)
        self.least = low if self.least is None else np.minimum(self.least, low)
        self.most = high if self.most is None else np.maximum(self.most, high)
        draw = np.random.default_rng((len(flat), len(self._samples)))  # other vectors in each row
        places = draw.integers(0, len(flat), min(self._each, len(flat)))
        self._samples.append(flat[places])

    def factors(self, matrices: Sequence[Array]) -> Array | None:
        """float32 [channels], for the inputs of products with `matrices`, [channels, outputs] each; None where that
        gains too little."""
        assert self.least is not None
        assert self.most is not None
        sample = np.concatenate(self._samples)
        reach = _reach(np.maximum(self.most, -self.least))
        weight = np.maximum(np.max([np.abs(one).max(1) for one in matrices], axis=0), SMALLEST)
        exact = [sample @ one for one in matrices]

        def lost(by: Array) -> float:
            ends = np.stack([self.least * by, self.most * by])
            return _lost(sample * by, ends, [one / by[:, None] for one in matrices], exact)

        tried = [_normal(weight ** (1 - share) / reach**share) for share in SHARES]
        best = min(tried, key=lost)
        return best if lost(best) < GAINS * lost(np.ones_like(best)) else None


def _reach(most: Array) -> Array:
    """As factors are taken from: a channel that was silent on these rows may speak on others."""
    speak = most > SMALLEST
    middle = float(np.median(most[speak])) if speak.any() else 1.0
    return np.where(speak, np.maximum(most, QUIET * middle), middle)


def _normal(factors: Array) -> Array:
    """With a geometric mean of one."""
    return np.asarray(factors / np.exp(np.log(factors).mean()), np.float32)


def _lost(sample: Array, ends: Array, matrices: Sequence[Array], exact: Sequence[Array]) -> float:
    """Squared error of the products, with one range for the input and one for each column of a matrix."""
    step = max(float(ends.max(initial=0.0) - ends.min(initial=0.0)), SMALLEST) / 255
    rounded = np.rint(sample / step) * step
    lost = 0.0
    for matrix, right in zip(matrices, exact, strict=True):
        steps = np.maximum(np.abs(matrix).max(0) / 127, np.finfo(np.float32).tiny)
        lost += float(np.square(rounded @ (np.rint(matrix / steps) * steps) - right).sum())
    return lost
