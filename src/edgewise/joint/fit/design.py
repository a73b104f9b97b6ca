"""What a fit sees of its rows: one matrix for each kind of evidence, all of them scaled to rows of about length 1.

A block times the square root of its strength, under one ridge penalty, is a prior: the strength is how much variance
that kind of evidence may add to a logit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import sparse

from edgewise.joint.judge import HEADS, Array, Labels, Numbers, Text, Words, buckets_of, deviations, nearness
from edgewise.joint.signals.evidence import NAMES, NOT_ALWAYS, Evidence
from edgewise.joint.signals.text import BUCKETS

Floats = npt.NDArray[np.float64]
Block = Literal["linear", "smooth", "group", "class", "prompt words", "answer words", "group words"]

LANDMARKS: Final = 96
WIDTH: Final = 2.0  # of the smooth part's bell, see judge.Numbers
RARE: Final = 2  # rows that must hold a word before it counts
CONSTANT: Final = 1e-9  # of a standard deviation: below it a signal says nothing
LABELS: Final = ("group", "class")
TEXTS: Final[tuple[Text, ...]] = get_args(Text)
_RIDGE: Final = 1e-6  # keeps the landmarks' own matrix invertible


@dataclass(frozen=True)
class Design:
    """The blocks of rows [n, ...], and what turns weights of their columns into parts of a judge."""

    blocks: Mapping[Block, sparse.csr_matrix]
    numbers: _Numbers | None
    labels: Mapping[str, Sequence[str]]
    rarities: Mapping[Text, tuple[Floats, npt.NDArray[np.intp]]]

    @staticmethod
    def of(evidence: Sequence[Evidence], seed: int) -> Design:
        numbers = _Numbers.of(evidence, seed)
        blocks: dict[Block, sparse.csr_matrix] = {} if numbers is None else numbers.blocks()
        labels = {kind: known for kind in LABELS if len(known := _known(evidence, kind)) > 1}
        for kind, known in labels.items():
            blocks["group" if kind == "group" else "class"] = _one_hot(evidence, kind, known)
        rarities = {}
        for text in TEXTS:
            counts = _counts(evidence, text)
            rarity = _rarity(counts)
            columns = np.flatnonzero(rarity)
            if len(columns):
                rarities[text] = (rarity, columns)
                blocks[_WORDS[text]] = _weighed(counts, rarity)[:, columns]
        return Design(blocks, numbers, labels, rarities)

    def parts(self, weights: Mapping[Block, Floats]) -> tuple[Numbers | None, tuple[Labels, ...], tuple[Words, ...]]:
        """The judge's parts for weights [columns, heads] of each block; blocks without weights are left out."""
        numbers = None if self.numbers is None else self.numbers.part(weights.get("linear"), weights.get("smooth"))
        labels = tuple(
            Labels("group" if kind == "group" else "class", tuple(known), Array.of(weights[block]))
            for kind, known in self.labels.items()
            if (block := _LABELS[kind]) in weights
        )
        words = tuple(
            Words.of_table(text, columns, rarity[columns], weights[_WORDS[text]])
            for text, (rarity, columns) in self.rarities.items()
            if _WORDS[text] in weights
        )
        return numbers, labels, words


@dataclass(frozen=True)
class _Numbers:
    names: Sequence[str]
    required: npt.NDArray[np.bool_]
    mean: Floats
    scale: Floats
    values: Floats  # deviations [n, signals]
    landmarks: Floats
    root: Floats  # [landmarks, landmarks]: nearness times root has the inner products of the whole kernel

    @staticmethod
    def of(evidence: Sequence[Evidence], seed: int) -> _Numbers | None:
        names = _names(evidence)
        found = np.array([[_number(one.get(name)) for name in names] for one in evidence]).reshape(len(evidence), -1)
        missing = np.isnan(found)
        met = ~missing.all(axis=0)
        names, found, missing = (
            [name for name, kept in zip(names, met, strict=True) if kept],
            found[:, met],
            missing[:, met],
        )
        finite = np.where(np.isinf(found), np.nan, found)
        mean = np.nan_to_num(np.nanmean(finite, axis=0)) if names else np.empty(0)
        scale = np.nan_to_num(np.nanstd(finite, axis=0)) if names else np.empty(0)
        kept = scale > CONSTANT
        if not kept.any():
            return None
        mean, scale = mean[kept].astype(np.float32).astype(np.float64), scale[kept]
        values = np.where(missing[:, kept], 0.0, deviations(found[:, kept], mean, scale))
        landmarks = _landmarks(values, seed)
        own = nearness(landmarks, landmarks, (landmarks**2).sum(axis=1), WIDTH)
        sizes, vectors = np.linalg.eigh(own + _RIDGE * np.eye(len(landmarks)))
        kept_names = [name for name, one in zip(names, kept, strict=True) if one]
        always = ~missing[:, kept].any(axis=0) & ~np.isin(kept_names, list(NOT_ALWAYS))
        return _Numbers(kept_names, always, mean, scale, values, landmarks, vectors / np.sqrt(sizes))

    def blocks(self) -> dict[Block, sparse.csr_matrix]:
        near = nearness(self.values, self.landmarks, (self.landmarks**2).sum(axis=1), WIDTH)
        return {
            "linear": sparse.csr_matrix(self.values / math.sqrt(len(self.names))),
            "smooth": sparse.csr_matrix(near @ self.root),
        }

    def part(self, linear: Floats | None, smooth: Floats | None) -> Numbers | None:
        if linear is None and smooth is None:
            return None
        count, heads = len(self.names), len(HEADS)
        straight = np.zeros((count, heads)) if linear is None else linear / math.sqrt(count)
        bells = np.zeros((0, heads)) if smooth is None else self.root @ smooth
        landmarks = self.landmarks if smooth is not None else np.zeros((0, count))
        return Numbers(
            tuple(self.names),
            tuple(self.required.tolist()),
            tuple(self.mean.tolist()),
            tuple(self.scale.tolist()),
            WIDTH,
            Array.of(landmarks),
            Array.of(straight),
            Array.of(bells),
        )


_LABELS: Final[Mapping[str, Block]] = {"group": "group", "class": "class"}
_WORDS: Final[Mapping[Text, Block]] = {"prompt": "prompt words", "answer": "answer words", "group": "group words"}


def _names(evidence: Sequence[Evidence]) -> list[str]:
    """All signals that some row may have, those that came from elsewhere first."""
    given = {name: None for one in evidence for name in one.given}
    classes = {name: None for one in evidence for name in one.class_names}
    return list({**given, **dict.fromkeys(NAMES), **classes})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _landmarks(values: Floats, seed: int) -> Floats:
    """Some of the rows, each different one at most once; rounded as the policy will hold them."""
    points = np.unique(values, axis=0)
    random = np.random.default_rng(seed)
    chosen = random.choice(len(points), min(LANDMARKS, len(points)), replace=False)
    return points[chosen].astype(np.float32).astype(np.float64)


def _known(evidence: Sequence[Evidence], kind: str) -> list[str]:
    return sorted({label for one in evidence if (label := one.label(kind)) is not None})


def _one_hot(evidence: Sequence[Evidence], kind: str, known: Sequence[str]) -> sparse.csr_matrix:
    places = {label: place for place, label in enumerate(known)}
    found = [(row, places[label]) for row, one in enumerate(evidence) if (label := one.label(kind)) is not None]
    rows, columns = zip(*found, strict=True)
    return sparse.csr_matrix((np.ones(len(found)), (rows, columns)), shape=(len(evidence), len(known)))


def _counts(evidence: Sequence[Evidence], text: Text) -> sparse.csr_matrix:
    """1 where the row's text holds a word of the bucket [n, BUCKETS]."""
    found = [buckets_of(one, text) for one in evidence]
    starts = np.cumsum([0, *map(len, found)])
    columns = np.fromiter((bucket for one in found for bucket in one), np.int32, starts[-1])
    return sparse.csr_matrix((np.ones(starts[-1]), columns, starts), shape=(len(evidence), BUCKETS))


def _rarity(counts: sparse.csr_matrix) -> Floats:
    """log((1 + rows) / (1 + rows that hold it)); 0 for words in fewer than RARE rows."""
    held = np.asarray(counts.sum(axis=0)).ravel()
    rarity = np.where(held >= RARE, np.log((1 + counts.shape[0]) / (1 + held)), 0.0)
    return rarity.astype(np.float32).astype(np.float64)


def _weighed(counts: sparse.csr_matrix, rarity: Floats) -> sparse.csr_matrix:
    weighed = counts @ sparse.diags_array(rarity)
    lengths = np.sqrt(np.asarray(weighed.multiply(weighed).sum(axis=1)).ravel())
    return sparse.csr_matrix(sparse.diags_array(1 / np.where(lengths > 0, lengths, 1.0)) @ weighed)
