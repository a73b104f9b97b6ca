"""Where an artifact went wrong: the first layer whose error exceeds its neighbours', out of the intermediate tensors of
the source and of the artifact on the same rows.

Names do not survive a converter, so a layer of the source finds its counterpart by content: a tensor of as many numbers
that is the nearest to it, in the source's order of axes or another one (NCHW and NHWC), while no other layer of the
source is nearer still to that tensor. The layer's error is the relative L2 distance to it. A layer that was fused into
another one has no counterpart and is passed over.

The search halves the stretch between two layers over which the error grows most, until that is one step. So a jump is
found with about log2(n) looks wherever it is, behind the slow growth of rounding too; and if the largest step is no
larger than growth makes them, there is no jump: the error "grows evenly".
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]
Layers = Sequence[tuple[str, Array]]

NOISE: Final = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.03, "int8-dynamic": 0.03, "int4": 0.1}  # by precision
LOOKED_AT: Final = 4096  # numbers of a tensor by which counterparts are told apart
UNLIKE: Final = 0.7  # from here on, two tensors have nothing to do with each other
TIED: Final = 1.02  # as near as this times the nearest is as near: copies of a tensor, reshaped ones
NEAR: Final = 6  # layers around one without a counterpart, or around a jump, that are looked at
PARTS: Final = 8  # of the network, at whose ends is looked first
EQUAL: Final = 1e-9
JUMP: Final = math.log(2)  # the logarithm of an error grows by that at least where something went wrong ...
STEEPER: Final = 4.0  # ... and by that times as much as over the other layers
WORST: Final = 1e6  # an error beyond it is as bad as infinite
MOST_AXES: Final = 4  # of which all orders are tried
TRIES: Final = 20  # at jumps from which the layers behind recover: those were no counterparts


@dataclass(frozen=True, slots=True)
class Found:
    """`layer` of the source is the first that is wrong; `between` it and the layer `before` are those that have no
    counterpart, in one of which the fault may lie as well. `even`: no layer stands out, and this is the largest step.
    An error is infinite where the artifact's numbers are not finite."""

    layer: str
    error: float
    before: tuple[str, float] | None
    after: tuple[str, float] | None
    looked_at: int
    even: bool = False
    between: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """For a report; None stands for an infinite error."""
        return {
            **asdict(self),
            "error": _finite(self.error),
            "before": self.before and {"layer": self.before[0], "error": _finite(self.before[1])},
            "after": self.after and {"layer": self.after[0], "error": _finite(self.after[1])},
            "between": list(self.between),
            "words": self.words(),
        }

    def words(self) -> str:
        if self.even:
            return f"the error grows evenly, no single layer: the largest step is to {_words(self.layer, self.error)}"
        if self.before is None:
            return f"wrong from the start: {_words(self.layer, self.error)}, so look at the inputs and this layer"
        or_in = f" (or in {self.between[0]} … {self.between[-1]}, which were fused)" if self.between else ""
        behind = f" and {_words(*self.after)} behind it" if self.after else ""
        return f"in {_words(self.layer, self.error)}{or_in}, with {_words(*self.before)} before it{behind}"


def where(reference: Layers, artifact: Layers, noise: float = 1e-5) -> Found | None:
    """The first layer that is wrong, of tensors [rows, …] in the order of computing. An error up to `noise` is what the
    artifact's number type does anyway. None if nothing is wrong by more than that, or nothing can be compared."""
    if not reference or not artifact:
        return None
    return _Search(_Errors(reference, artifact), noise).found()


class _Errors:
    """Errors of the source's layers, looked up when asked for; None without a counterpart."""

    def __init__(self, reference: Layers, artifact: Layers) -> None:
        self.reference, self.artifact = reference, artifact
        self.known: dict[int, float | None] = {}
        self.counterparts: dict[int, int] = {}  # the first one, in the artifact's order
        self._alike: dict[int, list[int]] = {}
        for layer, (_, value) in enumerate(reference):
            self._alike.setdefault(value.size, []).append(layer)
        self._there: dict[int, list[int]] = {}
        for one, (_, value) in enumerate(artifact):
            self._there.setdefault(value.size, []).append(one)
        self._theirs: dict[int, Floats] = {}  # samples of the artifact, and of the source in each order of axes
        self._ours: dict[tuple[int, tuple[int, ...]], Floats] = {}

    def of(self, layer: int) -> float | None:
        if layer not in self.known:
            near = {one: self.sample(layer, one) for one in self.of_its_size(layer)}
            best = min(near.values(), default=math.inf)
            nearest = [one for one, error in near.items() if error <= _tied(best) and best < UNLIKE]
            self.keep(layer, [one for one in nearest if self._is_ours(layer, one)])
        return self.known[layer]

    def of_output(self) -> float | None:
        """The last layer has a counterpart, however far that is: the artifact's last of its size, None without one."""
        last = len(self.reference) - 1
        if self.of(last) is None:
            self.keep(last, self.of_its_size(last)[-1:])
        return self.known[last]

    def of_its_size(self, layer: int) -> list[int]:
        return self._there.get(self.reference[layer][1].size, [])

    def sample(self, layer: int, one: int) -> float:
        """The error by some of the numbers."""
        value, other = self.reference[layer][1], self.artifact[one][1]
        at = _places(value.size)
        if one not in self._theirs:
            self._theirs[one] = _flat(other, at)
        for axes in _orders(value.shape, other.shape):
            if (layer, axes) not in self._ours:
                self._ours[layer, axes] = _ordered(value, axes, at)
        ours = (self._ours[layer, axes] for axes in _orders(value.shape, other.shape))
        return min(_relative(one_order, self._theirs[one]) for one_order in ours)

    def _is_ours(self, layer: int, one: int) -> bool:
        """Whether no other layer is nearer to it."""
        rivals = self._alike[self.reference[layer][1].size]
        return self.sample(layer, one) <= _tied(min(self.sample(rival, one) for rival in rivals))

    def keep(self, layer: int, ones: Sequence[int]) -> None:
        errors = [(_distance(self.reference[layer][1], self.artifact[one][1]), one) for one in ones]
        self.known[layer], self.counterparts[layer] = min(errors) if errors else (None, -1)


class _Search:
    """Heights are logarithms of errors, 0 where they are no more than the noise. Layer -1 is before the first one."""

    def __init__(self, errors: _Errors, noise: float) -> None:
        self.errors, self.noise = errors, noise
        self.last = len(errors.reference) - 1
        self.passed_over: set[int] = set()

    def found(self) -> Found | None:
        end = self.errors.of_output()
        if end is None or end <= self.noise:
            return None
        for _ in range(TRIES):
            low, high = self._largest_step()
            if not self._recovers(low, high):
                break
            self.passed_over.add(high)
        step = self._growth(low, high)
        if step < JUMP:
            return self._told(low, high, even=True)
        first = self._on_another_branch(low, high)
        if first != high:
            low, high = next(self._beside(first, -1), -1), first
        high = self._beyond_likeness(low, high)
        others = (self._height(self.last) - step) / max(self.last, 1)
        return self._told(low, high, even=step < STEEPER * others)

    def _largest_step(self) -> tuple[int, int]:
        """The stretch over which the error grows most, between two layers with none between them that has a
        counterpart: or a longer one, over which it does not grow by a jump."""
        order = itertools.count()  # of stretches that grow alike, the one that was cut off first
        marks = [-1, *sorted({m for m in map(self._near, self._spread()) if m is not None} - {self.last}), self.last]
        stretches = [(-self._growth(a, b), next(order), a, b) for a, b in itertools.pairwise(marks)]
        heapq.heapify(stretches)
        while True:
            growth, _, low, high = heapq.heappop(stretches)
            middle = None if -growth < JUMP else self._near((low + high) // 2, low, high)
            if middle is None:
                return low, high
            for a, b in ((low, middle), (middle, high)):
                heapq.heappush(stretches, (-self._growth(a, b), next(order), a, b))

    def _spread(self) -> list[int]:
        """Where to look first: an error may rise and sink again before the end."""
        return [self.last * part // PARTS for part in range(1, PARTS)] if self.last >= 2 * PARTS else []

    def _near(self, middle: int, low: int = -1, high: int | None = None) -> int | None:
        """The layer with a counterpart that is nearest to the middle."""
        places = range(low + 1, self.last + 1 if high is None else high)
        nearest = sorted(places, key=lambda one: (abs(one - middle), one))
        return next((one for one in nearest if self._error(one) is not None), None)

    def _recovers(self, low: int, high: int) -> bool:
        """Whether the layers behind are as if this one were right: then it was held against a stranger."""
        behind = [self._height(one) for one in self._beside(high, 1)]
        return bool(behind) and max(behind) < self._height(low) + self._growth(low, high) / 4

    def _on_another_branch(self, low: int, high: int) -> int:
        """What was computed between the faulty layer and where its branch meets another one is right: the fault is the
        first layer near by that is as wrong."""
        half = self._height(high) - self._growth(low, high) / 2
        return min([high, *(one for one in self._beside(high, -1) if self._height(one) >= half)])

    def _beyond_likeness(self, low: int, high: int) -> int:
        """A layer may be so wrong that it is like nothing. Then the artifact has a tensor, between the counterparts of
        the layers around it, that is nobody's: it is what became of the first layer there of its size."""
        begin = self.errors.counterparts[low] if low >= 0 else -1
        for one in range(begin + 1, self.errors.counterparts[high]):
            layer = next((it for it in range(low + 1, high) if one in self.errors.of_its_size(it)), None)
            copied = low >= 0 and one in self.errors.of_its_size(low) and self.errors.sample(low, one) < UNLIKE
            if layer is not None and not copied:
                self.errors.keep(layer, [one])
                self.passed_over.discard(layer)
                return layer
        return high

    def _beside(self, layer: int, way: int) -> Iterator[int]:
        near = range(layer + way, max(-1, min(self.last + 1, layer + way * (NEAR + 1))), way)
        return (one for one in near if self._error(one) is not None)

    def _error(self, layer: int) -> float | None:
        return None if layer in self.passed_over else self.errors.of(layer)

    def _height(self, layer: int) -> float:
        error = 0.0 if layer < 0 else self._error(layer)
        return math.log(min(max(error or 0.0, self.noise), WORST) / self.noise)

    def _growth(self, low: int, high: int) -> float:
        return self._height(high) - self._height(low)

    def _told(self, low: int, high: int, *, even: bool) -> Found:
        behind = next(self._beside(high, 1), None)
        between = [] if even or low < 0 else [name for name, _ in self.errors.reference[low + 1 : high]]
        return Found(
            *self._named(high),
            before=self._named(low) if low >= 0 else None,
            after=None if behind is None else self._named(behind),
            looked_at=len(self.errors.known),
            even=even,
            between=tuple(between),
        )

    def _named(self, layer: int) -> tuple[str, float]:
        error = self._error(layer)
        return self.errors.reference[layer][0], math.inf if error is None else error


def _tied(error: float) -> float:
    return error * TIED + EQUAL


def _distance(reference: Array, artifact: Array) -> float:
    """|a - r| / |r| in the nearest order of axes."""
    a = _flat(artifact, None)
    return min(_relative(_ordered(reference, axes, None), a) for axes in _orders(reference.shape, artifact.shape))


def _flat(artifact: Array, at: Places | None) -> Floats:
    flat = artifact.reshape(-1)
    return np.asarray(flat if at is None else flat[at], np.float64)


def _ordered(reference: Array, axes: tuple[int, ...], at: Places | None) -> Floats:
    """All numbers in that order of axes, or those at some places of it."""
    turned = reference.transpose(axes)
    found = turned if at is None else turned[np.unravel_index(at, turned.shape)]
    return np.asarray(found, np.float64).reshape(-1)


def _relative(reference: Floats, artifact: Floats) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        apart = artifact - reference
        distance, length = _length(apart), _length(reference)
        if not math.isfinite(distance):  # what is infinite on both sides, as masks are, is equal
            same = (reference == artifact) | (np.isnan(reference) & np.isnan(artifact))
            distance, length = _length(np.where(same, 0.0, apart)), _length(reference[np.isfinite(reference)])
    if not math.isfinite(distance):
        return math.inf
    return distance / length if length else (math.inf if distance else 0.0)


def _length(value: Floats) -> float:
    return math.sqrt(value @ value)


@cache
def _orders(reference: tuple[int, ...], artifact: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Orders of the reference's axes, the first one (the rows) in its place, in which it may lie in the artifact."""
    axes = tuple(range(len(reference)))
    wide = tuple(axis for axis in axes[1:] if reference[axis] != 1)
    if len(wide) < 2:
        return (axes,)
    orders = {wide, (*wide[1:], wide[0]), (wide[-1], *wide[:-1])}  # as it is, channels last, channels first
    if len(wide) <= MOST_AXES:
        goal = [length for length in artifact[1:] if length != 1]
        orders |= {order for order in itertools.permutations(wide) if [reference[axis] for axis in order] == goal}
    narrow = tuple(axis for axis in axes[1:] if reference[axis] == 1)
    return tuple((0, *narrow, *order) for order in sorted(orders))


@cache
def _places(size: int) -> Places:
    if size <= LOOKED_AT:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).integers(0, size, LOOKED_AT))


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _words(layer: str, error: float) -> str:
    return f"{layer} (error {error:.2g})" if math.isfinite(error) else f"{layer} (numbers that are not finite)"
