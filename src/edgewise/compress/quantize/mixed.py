"""A precision for each matrix: what each choice costs in KL is measured one matrix at a time, then the cheapest set
under a budget is found exactly.

Only rounding to 4 bits is run for each matrix. What KL another precision costs follows from it: KL grows with the
square of a small error, and how much larger or smaller the error of the matrix's products is, its Hessian tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgewise.compress.quantize.forward import GROUPS, Layers, dense, embedded, head_input, logits
from edgewise.compress.quantize.gptq import Hessian, loss, nearest
from edgewise.compress.quantize.recipe import BITS, Precision
from edgewise.evaluate.divergence import kl
from edgewise.models.card import Card
from edgewise.models.model_source import ModelSource
from edgewise.models.tensors import EMBED, HEAD
from edgewise.models.weights import BLOCK, Dense, Matrix
from edgewise.types import FloatArray, IdArray

Doubles = npt.NDArray[np.float64]
Show = Callable[[str, int, int], None]
PAGE = 4096  # bytes; a bundle's tensors begin on one
STEP = 8  # every so-many-th position is compared: neighbours tell much the same


@dataclass(frozen=True, slots=True)
class Option:
    """A matrix at a precision: its bytes in the bundle, and the KL in nats that it costs."""

    precision: Precision
    bytes: int
    cost: float


def chosen(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option] | None:
    """One option for each name, of the least total cost among those whose bytes are within the budget together; None if
    there are none. Exact: the sets so far that no other beats in both are carried along (a knapsack with choices; as
    all sizes are whole pages, there are never more of them than the budget has pages)."""
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for those in options.values():
        all_sizes = np.concatenate([sizes + option.bytes for option in those])
        all_costs = np.concatenate([costs + option.cost for option in those])
        order = np.lexsort((all_costs, all_sizes))
        order = order[all_sizes[order] <= budget]
        if not len(order):
            return None
        least = np.minimum.accumulate(all_costs[order])
        order = order[np.r_[True, least[1:] < least[:-1]]]
        steps.append((order // len(sizes), order % len(sizes)))
        sizes, costs = all_sizes[order], all_costs[order]
    at, found = len(sizes) - 1, {}  # the last one is the cheapest
    for (name, those), (which, before) in zip(reversed([*options.items()]), reversed(steps), strict=True):
        found[name], at = those[which[at]], before[at]
    return {name: found[name] for name in options}


def matrix_bytes(shape: tuple[int, int], precision: Precision) -> int:
    """What a matrix [outputs, inputs] of that precision, not exact, takes in a bundle."""
    outputs, inputs = shape
    factors = 4 * outputs * inputs // BLOCK
    count = 2 if precision == "int4-minima" else 1
    return pages(outputs * inputs * BITS[precision] // 8) + count * pages(factors)


def pages(count: int) -> int:
    """Bytes rounded up to whole pages."""
    return -(-count // PAGE) * PAGE


def names(card: Card) -> list[str]:
    """All matrices that have a precision, in the order in which a token meets them."""
    layers = [f"layer{n}.{group}" for n in range(card.layers) for group in GROUPS]
    return [EMBED, *layers, *([] if card.tied else [HEAD])]


def options(
    model: ModelSource, ids: IdArray, choices: Sequence[Precision], wanted: Sequence[str], show: Show
) -> dict[str, list[Option]]:
    """What each of the `choices` costs for each of the matrices `wanted`, measured over windows of token ids
    [windows, length]."""
    survey = _Survey(model, ids)
    found = {}
    for done, (name, matrices, hessian, rerun) in enumerate(survey.matrices(frozenset(wanted))):
        show("measuring what each matrix costs", done, len(wanted))
        weights = np.concatenate([matrix.dense() for matrix in matrices])
        found[name] = _options(weights, matrices, hessian, rerun, choices)
    show("measuring what each matrix costs", len(wanted), len(wanted))
    return found


def _options(
    weights: FloatArray,
    matrices: Sequence[Matrix],
    hessian: Doubles,
    rerun: Callable[[FloatArray], float],
    choices: Sequence[Precision],
) -> list[Option]:
    size = exact_bytes(matrices)
    if weights.shape[1] % BLOCK:
        return [Option("exact", size, 0.0)]
    coarse = nearest(weights, 4)
    kl_of_coarse, error_of_coarse = rerun(coarse.dense()), float(loss(weights, coarse, hessian).sum())
    found = []
    for choice in choices:
        if choice == "exact":
            found.append(Option("exact", size, 0.0))
            continue
        rounded = nearest(weights, BITS[choice], minima=choice == "int4-minima")
        share = float(loss(weights, rounded, hessian).sum()) / error_of_coarse if error_of_coarse else 0.0
        found.append(Option(choice, matrix_bytes((len(weights), weights.shape[1]), choice), kl_of_coarse * share))
    return found


def exact_bytes(matrices: Sequence[Matrix]) -> int:
    """What matrices take in a bundle as they are."""
    return sum(pages(array.nbytes) for matrix in matrices for array in _arrays(matrix))


def parts(model: ModelSource, name: str) -> list[Matrix]:
    """The matrices that have one precision under that name."""
    if name == EMBED:
        return [model.embed()]
    if name == HEAD:
        head = model.head()
        return [] if head is None else [head]
    layer, _, group = name.partition(".")
    return [getattr(model.layer(int(layer.removeprefix("layer"))), part) for part in GROUPS[group]]


def _arrays(matrix: Matrix) -> list[npt.NDArray[np.generic]]:
    return [matrix.values] if isinstance(matrix, Dense) else [*matrix.arrays]


class _Survey:
    """The model as it is, run once over the windows, and from any matrix on once more with another in its place."""

    def __init__(self, model: ModelSource, ids: IdArray) -> None:
        self._model, self._card, self._ids = model, model.card, ids
        self._layers = Layers(model.card, ids.shape[1])
        self._table = model.embed().dense()
        head = model.head()
        self._head = self._table if head is None else head.dense()
        self._own_head = head
        self._norm = model.norm()

    def matrices(
        self, wanted: frozenset[str]
    ) -> Iterator[tuple[str, list[Matrix], Doubles, Callable[[FloatArray], float]]]:
        """Name, matrices, the Hessian of their inputs, and what tells the KL of all that follows, from the model as it
        is, if other weights stand in their place. The states of all layers are in memory."""
        states = [embedded(self._card, self._table, self._ids)]
        for n in range(self._card.layers):
            states.append(self._through(n, states[-1]))
        x = head_input(self._card, self._norm, states[-1])
        expected = self._logits(x, self._head)
        if "embed" in wanted:
            yield (
                "embed",
                [self._model.embed()],
                self._table_hessian(x),
                lambda table: self._with_table(table, expected),
            )
        for n in range(self._card.layers):
            layer, hessians = self._model.layer(n), self._hessians(n, states[n])
            for group, parts in GROUPS.items():
                name = f"layer{n}.{group}"
                if name in wanted:
                    rerun = self._rerun(n, states[n], name, expected)
                    yield name, [getattr(layer, part) for part in parts], hessians[name], rerun
        if "head" in wanted and self._own_head is not None:
            yield "head", [self._own_head], Hessian.of(x).matrix, lambda head: _mean_kl(expected, self._logits(x, head))

    def _hessians(self, n: int, hidden: FloatArray) -> dict[str, Doubles]:
        found: dict[str, Doubles] = {}

        def look(name: str, x: FloatArray) -> None:
            found[name] = Hessian.of(x).matrix

        self._through(n, hidden, look)
        return found

    def _table_hessian(self, x: FloatArray) -> Doubles:
        hessian = Hessian.of(x).matrix if self._card.tied else np.zeros((self._card.hidden, self._card.hidden))
        return table_hessian(hessian)

    def _with_table(self, table: FloatArray, expected: FloatArray) -> float:
        hidden = embedded(self._card, table, self._ids)
        return self._rest(0, hidden, expected, table if self._card.tied else self._head)

    def _rerun(self, n: int, hidden: FloatArray, name: str, expected: FloatArray) -> Callable[[FloatArray], float]:
        def rerun(weights: FloatArray) -> float:
            return self._rest(n + 1, self._through(n, hidden, replaced={name: weights}), expected, self._head)

        return rerun

    def _rest(self, first: int, hidden: FloatArray, expected: FloatArray, head: FloatArray) -> float:
        for n in range(first, self._card.layers):
            hidden = self._through(n, hidden)
        return _mean_kl(expected, self._logits(head_input(self._card, self._norm, hidden), head))

    def _through(
        self,
        n: int,
        hidden: FloatArray,
        look: Callable[[str, FloatArray], object] = lambda name, x: None,
        replaced: Mapping[str, FloatArray] | None = None,
    ) -> FloatArray:
        layer, replaced = self._model.layer(n), replaced or {}

        def weigh(group: str, x: FloatArray) -> FloatArray:
            name = f"layer{n}.{group}"
            look(name, x)
            return replaced[name] if name in replaced else dense(layer, group)

        return self._layers.through(n, layer, hidden, weigh)

    def _logits(self, x: FloatArray, head: FloatArray) -> FloatArray:
        """Of every STEP-th position, [positions, vocab]."""
        return logits(self._card, head, x[:, STEP - 1 :: STEP].reshape(-1, x.shape[-1]))


def table_hessian(hessian: Doubles) -> Doubles:
    """Of a table that is an embedding and perhaps a head too, whose Hessian it is: an error of a row is also one of the
    hidden state that the row becomes, whatever its direction. Both count alike."""
    mean = float(np.diag(hessian).mean()) or 1.0
    return np.asarray(hessian / mean + np.eye(len(hessian)))


def _mean_kl(expected: FloatArray, found: FloatArray) -> float:
    return float(kl(expected, found).mean())
