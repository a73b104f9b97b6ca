"""Mixed precision: which few products of a network are kept from int8, because rounding those costs most.

Errors of products that are rounded one at a time add up in squares, nearly: of all-MiniLM-L6-v2's 36, the square root
of that sum is 0.167 where all of them together are off by 0.155. So each one's own error tells in which order they are
worth keeping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from edgewise.export.work.job import Task

MAY_LOSE: Final[Mapping[Task, float]] = {  # relative L2 of the outputs; a neighbour changes sooner than a class
    "embed": 0.05,
    "classify": 0.15,
    "numbers": 0.05,
}
MOST: Final = 0.5  # of the products: with more of them kept, a file would not be int8

Product = TypeVar("Product")


def fewest(products: Sequence[Product], off: Callable[[Sequence[Product]], float], most: float) -> list[Product]:
    """The fewest of the dearest products with which all others fit: half of them where that does not do.

    `off` gives the error of the outputs with all products in int8 but those; `most` is what it may be. It is called
    once for each product, and then to find how many."""
    costs = [off([*products[:place], *products[place + 1 :]]) for place in range(len(products))]
    order = sorted(range(len(products)), key=lambda place: -costs[place])
    dearest = [products[place] for place in order[: int(len(products) * MOST)]]
    least, enough = 0, len(dearest)
    while enough - least > 1:
        middle = (least + enough) // 2
        least, enough = (least, middle) if off(dearest[:middle]) <= most else (middle, enough)
    return dearest[:enough]
