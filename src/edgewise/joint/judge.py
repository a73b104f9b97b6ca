"""What an edge answer is worth: a judge reads the evidence and says how sure the edge may be, and whether to keep it.

Two kinds stand in policies (docs/formats/policy.md). `SignalsJudge` is a line over a few signals, for thresholds that
people set. `GainJudge` is fitted: it knows for each request how likely the edge is right, how likely the cloud would
fix a wrong answer, and how likely it would break a right one. Here it is evaluated, with numpy alone.
"""

from __future__ import annotations

import base64
import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Final, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgewise.joint.signals.answer import GATES
from edgewise.joint.signals.evidence import NAMES, Evidence
from edgewise.joint.signals.text import BUCKETS, Reading

Floats = npt.NDArray[np.float64]
Link = Literal["exp", "logistic", "identity"]
Order = Literal["gain", "fixed"]
Amount = TypeVar("Amount", float, Floats)
Text = Literal["prompt", "answer", "group"]

HEADS: Final = ("right", "fixed", "broken")  # the columns of all weights
CLIP: Final = 4.0  # a number counts as at most so many deviations from its mean
LOGIT_CLIP: Final = 30.0
NUMBERS_LIMIT, LANDMARKS_LIMIT, LABELS_LIMIT = 4096, 1024, 1 << 16


class Judgement(NamedTuple):
    """`confidence`: how likely the edge's answer is right, 0..1. `worth`: what is compared with the threshold, 0..1;
    the answer is kept if it is strictly greater."""

    confidence: float
    worth: float


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every part of a policy: frozen, and no key that we do not know."""


class SignalsJudge(Part, frozen=True, tag_field="kind", tag="signals"):
    """Signals in, a number 0..1 out: link(bias + sum of weight · signal). The confidence is the worth."""

    weights: dict[str, float]
    bias: float
    link: Link
    gates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(NAMES))
        if unknown or not self.weights:
            raise ValueError(f"`weights` names {unknown or 'no signal'}; allowed are {list(NAMES)}")
        if not all(math.isfinite(number) for number in (self.bias, *self.weights.values())):
            raise ValueError("`weights` and `bias` must be finite numbers")
        if strangers := sorted(set(self.gates) - set(GATES)):
            raise ValueError(f"`gates` names {strangers}; allowed are {list(GATES)}")

    @property
    def reads(self) -> Sequence[str]:
        """The signals that it looks at."""
        return (*self.weights, *self.gates)

    def judge(self, evidence: Evidence) -> Judgement | None:
        """None where a signal that counts is missing."""
        if self.fails_gate(evidence):
            return Judgement(0.0, 0.0)
        score = self.bias
        for name, weight in self.weights.items():
            value = evidence.get(name)
            if value is None:
                return None
            score += weight * value
        if math.isnan(score):
            return None
        confidence = min(max(self._linked(score), 0.0), 1.0)
        return Judgement(confidence, confidence)

    def fails_gate(self, evidence: Evidence) -> bool:
        """An answer that fails a gate is not to be kept, whatever its signals say."""
        return any(evidence.get(gate) == 0.0 for gate in self.gates)

    def _linked(self, score: float) -> float:
        match self.link:
            case "exp":
                return math.exp(min(score, 0.0))  # above 0 it is cut to 1 anyway, and must not overflow
            case "logistic":
                return 1.0 / (1.0 + math.exp(-score)) if score >= -700.0 else 0.0
            case "identity":
                return score


class Array(Part, frozen=True, dict=True):
    """Numbers [rows, columns] as the base64 of little-endian float32."""

    shape: tuple[int, int]
    data: str

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if min(rows, columns) < 0 or rows * columns * 4 != len(self._raw):
            raise ValueError(f"an array of the shape {list(self.shape)} has {len(self._raw)} bytes of data")
        if not np.isfinite(self.values).all():
            raise ValueError("an array holds a number that is not finite")

    @cached_property
    def values(self) -> Floats:
        return np.frombuffer(self._raw, "<f4").reshape(self.shape).astype(np.float64)

    @cached_property
    def _raw(self) -> bytes:
        return _decoded(self.data)

    @staticmethod
    def of(values: Floats) -> Array:
        """Of numbers [rows, columns], rounded to float32."""
        rows, columns = values.shape
        return Array((rows, columns), base64.b64encode(values.astype("<f4").tobytes()).decode())


class Numbers(Part, frozen=True, dict=True):
    """Signals as deviations from their means: a straight part and a smooth one over distances to landmarks,
    exp(-width · d² / (2 · signals)). A signal that was always there must be there; others count as their mean."""

    names: tuple[str, ...]
    required: tuple[bool, ...]
    mean: tuple[float, ...]
    scale: tuple[Annotated[float, Meta(gt=0.0)], ...]
    width: Annotated[float, Meta(gt=0.0)]
    landmarks: Array  # [landmarks, signals]
    linear: Array  # [signals, heads]
    smooth: Array  # [landmarks, heads]

    def __post_init__(self) -> None:
        count = len(self.names)
        if not 1 <= count <= NUMBERS_LIMIT or len({*self.names}) < count:
            raise ValueError(f"`names` holds {count} signals; allowed are 1 to {NUMBERS_LIMIT}, each once")
        if any(len(one) != count for one in (self.required, self.mean, self.scale)):
            raise ValueError(f"`required`, `mean` and `scale` need one entry for each of the {count} signals")
        if not all(map(math.isfinite, (*self.mean, *self.scale, self.width))):
            raise ValueError("`mean`, `scale` and `width` must be finite numbers")
        points = self.landmarks.shape[0]
        _check_shape("linear", self.linear, count)
        _check_shape("smooth", self.smooth, points)
        if points > LANDMARKS_LIMIT or self.landmarks.shape[1] != count:
            raise ValueError(f"`landmarks` has the shape {list(self.landmarks.shape)}; allowed is at most "
                             f"{LANDMARKS_LIMIT} times {count}")  # fmt: skip

    def add(self, evidence: Evidence, logits: Floats) -> bool:
        """Add this part to the heads' logits; False where a required signal is missing."""
        found = evidence.all(self.names)
        if None in found:
            if any(value is None and needed for value, needed in zip(found, self.required, strict=True)):
                return False
            found = [mean if value is None else value for value, mean in zip(found, self.mean, strict=True)]
        values = deviations(np.array(found, np.float64), self._mean, self._scale)
        if np.isnan(values).any():
            return False
        logits += values @ self.linear.values
        if len(self.landmarks.values):
            logits += nearness(values, self.landmarks.values, self._squares, self.width) @ self.smooth.values
        return True

    @cached_property
    def _mean(self) -> Floats:
        return np.array(self.mean)

    @cached_property
    def _scale(self) -> Floats:
        return np.array(self.scale)

    @cached_property
    def _squares(self) -> Floats:
        squares: Floats = (self.landmarks.values**2).sum(axis=1)
        return squares


class Labels(Part, frozen=True, dict=True):
    """A word instead of a number (`group`, `class`): a row of weights for each that the fit met."""

    of: Literal["group", "class"]
    known: tuple[str, ...]
    weights: Array  # [labels, heads]

    def __post_init__(self) -> None:
        if len(self.known) > LABELS_LIMIT:
            raise ValueError(f"`known` holds {len(self.known)} labels; allowed are {LABELS_LIMIT}")
        _check_shape("weights", self.weights, len(self.known))

    def add(self, evidence: Evidence, logits: Floats) -> None:
        place = self._places.get(evidence.label(self.of) or "")
        if place is not None:
            logits += self.weights.values[place]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {label: place for place, label in enumerate(self.known)}


class Words(Part, frozen=True, dict=True):
    """The words of a text, by bucket: the sum of their weights, over the length of all their rarities. Buckets that are
    not listed count for nothing."""

    of: Text
    buckets: str  # base64 of little-endian uint16, rising
    rarity: Array  # [listed, 1]
    weights: Array  # [listed, heads], already times the rarity

    def __post_init__(self) -> None:
        places = self._places
        if (np.diff(places.astype(int)) <= 0).any() or (places >= BUCKETS).any():
            raise ValueError(f"`buckets` must rise and be below {BUCKETS}")
        _check_shape("weights", self.weights, len(places))
        if self.rarity.shape != (len(places), 1):
            raise ValueError(f"`rarity` has the shape {list(self.rarity.shape)}; allowed is [{len(places)}, 1]")

    def add(self, evidence: Evidence, logits: Floats) -> None:
        places = buckets_of(evidence, self.of)
        if places:
            *sums, squares = self._table.take(places, axis=0).sum(axis=0).tolist()
            if squares > 0:
                logits += np.array(sums) / math.sqrt(squares)

    @cached_property
    def _table(self) -> Floats:
        """For all buckets: the heads' weights, and the squared rarity."""
        table = np.zeros((BUCKETS, len(HEADS) + 1))
        table[self._places, :-1] = self.weights.values
        table[self._places, -1] = self.rarity.values[:, 0] ** 2
        return table

    @cached_property
    def _places(self) -> npt.NDArray[np.uint16]:
        raw = _decoded(self.buckets)
        if len(raw) % 2:
            raise ValueError("`buckets` must hold two bytes for each")
        return np.frombuffer(raw, "<u2")

    @staticmethod
    def of_table(text: Text, buckets: npt.NDArray[np.intp], rarity: Floats, weights: Floats) -> Words:
        """For `buckets` [k], rising, with their rarity [k] and weights [k, heads], not yet times the rarity."""
        listed = base64.b64encode(buckets.astype("<u2").tobytes()).decode()
        return Words(text, listed, Array.of(rarity[:, None]), Array.of(weights * rarity[:, None]))


class Calibration(Part, frozen=True, dict=True):
    """Makes one head's logit a true probability: sigmoid(slope · logit + offset), or between points of a rising line
    over the logit, flat beyond them."""

    slope: Annotated[float, Meta(ge=0.0)] = 1.0
    offset: float = 0.0
    logits: tuple[float, ...] = ()
    shares: tuple[Annotated[float, Meta(ge=0.0, le=1.0)], ...] = ()

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.slope, self.offset, *self.logits))):
            raise ValueError("`slope`, `offset` and `logits` must be finite numbers")
        rising = all(list(line) == sorted(line) for line in (self.logits, self.shares))
        if len(self.logits) != len(self.shares) or not rising:
            raise ValueError("`logits` and `shares` must be two rising lists of one length")

    def of(self, logit: float) -> float:
        if self.logits:
            return self._between(logit)
        score = self.slope * logit + self.offset
        return 1.0 / (1.0 + math.exp(-min(max(score, -LOGIT_CLIP), LOGIT_CLIP)))

    def _between(self, logit: float) -> float:
        place = bisect_right(self.logits, logit)
        if place in (0, len(self.logits)):
            return self.shares[max(place - 1, 0)]
        left, right = self.logits[place - 1 : place + 1]
        low, high = self.shares[place - 1 : place + 1]
        return low + (high - low) * (logit - left) / (right - left)


class Lean(Part, frozen=True):
    """Draws `fixed` and `broken` towards what they would be if the cloud fixed the same share of all wrong answers and
    broke the same share of all right ones."""

    share: Annotated[float, Meta(ge=0.0, le=1.0)]
    fixes: Annotated[float, Meta(ge=0.0, le=1.0)]
    breaks: Annotated[float, Meta(ge=0.0, le=1.0)]

    def chances(self, right: Amount, fixed: Amount, broken: Amount) -> tuple[Amount, Amount]:
        """`fixed` and `broken`, drawn."""
        own = 1.0 - self.share
        return own * fixed + self.share * self.fixes * (1.0 - right), own * broken + self.share * self.breaks * right


class GainJudge(Part, frozen=True, tag_field="kind", tag="gain"):
    """Three probabilities of one request: the edge is `right`; the edge is wrong and the cloud right (`fixed`); the
    edge is right and the cloud wrong (`broken`). The worth is (1 - fixed + broken) / 2, so 0.5 says that the cloud is
    expected to gain nothing; with the order `fixed` it is 1 - fixed."""

    order: Order
    lean: Lean
    bias: tuple[float, float, float]
    numbers: Numbers | None
    labels: tuple[Labels, ...]
    words: tuple[Words, ...]
    calibration: tuple[Calibration, Calibration, Calibration]

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.bias)):
            raise ValueError("`bias` must be finite numbers")

    @property
    def reads(self) -> Sequence[str]:
        """The signals that it looks at, beside labels and words."""
        return () if self.numbers is None else self.numbers.names

    def judge(self, evidence: Evidence) -> Judgement | None:
        """None where a signal is missing that was there whenever the fit looked."""
        chances = self.chances(evidence)
        if chances is None:
            return None
        return Judgement(chances[0], self.worth(*chances))

    def worth(self, right: Amount, fixed: Amount, broken: Amount) -> Amount:
        """0..1, of one request's probabilities or of many."""
        return worth_of(self.order, *self.lean.chances(right, fixed, broken))

    def chances(self, evidence: Evidence) -> tuple[float, float, float] | None:
        """The probabilities of HEADS."""
        logits = np.array(self.bias)
        if self.numbers is not None and not self.numbers.add(evidence, logits):
            return None
        for label in self.labels:
            label.add(evidence, logits)
        for text in self.words:
            text.add(evidence, logits)
        right, fixed, broken = (one.of(value) for one, value in zip(self.calibration, logits.tolist(), strict=True))
        return right, fixed, broken

    def fails_gate(self, evidence: Evidence) -> bool:
        """It has no gates: what they would look at are signals to it."""
        return False


Judge = SignalsJudge | GainJudge


def worth_of(order: Order, fixed: Amount, broken: Amount) -> Amount:
    """What keeping the edge's answer is worth, 0..1."""
    return 1.0 - fixed if order == "fixed" else (1.0 - fixed + broken) / 2


def deviations(values: Floats, mean: Floats, scale: Floats) -> Floats:
    """Numbers [..., signals] as deviations, cut at CLIP."""
    return np.minimum(np.maximum((values - mean) / scale, -CLIP), CLIP)


def nearness(values: Floats, landmarks: Floats, squares: Floats, width: float) -> Floats:
    """exp(-width · d² / (2 · signals)) of deviations [..., signals] to landmarks [m, signals], whose squared lengths
    are `squares` [m]: [..., m]."""
    distance = (values**2).sum(axis=-1, keepdims=True) + squares - 2 * (values @ landmarks.T)
    near: Floats = np.exp(-width / (2 * landmarks.shape[1]) * np.maximum(distance, 0.0))
    return near


def buckets_of(evidence: Evidence, text: Text) -> Sequence[int]:
    """The words of that text as buckets, none where there is no such text."""
    match text:
        case "prompt":
            return [] if evidence.asked is None else evidence.asked.buckets
        case "answer":
            return [] if evidence.said is None else evidence.said.buckets
        case "group":
            return Reading((evidence.group or "").replace("_", " ")).buckets


def _check_shape(name: str, array: Array, rows: int) -> None:
    if array.shape != (rows, len(HEADS)):
        raise ValueError(f"`{name}` has the shape {list(array.shape)}; allowed is [{rows}, {len(HEADS)}]")


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"what should be base64 is not: {error}") from error
