"""Rows through a network that takes any number of them at once, or a fixed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from edgewise.errors import UnsupportedModel
from edgewise.export.work.job import Array, Task

AT_ONCE: Final = 16  # rows, where any number may be


def answers(
    run: Callable[[dict[str, Array]], Sequence[Any]], arrays: Mapping[str, Array], fixed: int, names: Sequence[str]
) -> list[Array]:
    """The outputs `names`, [rows, …] each, of a network that takes `fixed` rows at once, or any number if that is 0.
    UnsupportedModel for outputs that are no arrays of rows."""
    found = []
    for kept, piece in pieces(arrays, fixed):
        given = len(next(iter(piece.values())))
        values = run(piece)
        for name, value in zip(names, values, strict=True):
            _check_rows(name, value, given)
        found.append([value[:kept] for value in values])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def pieces(arrays: Mapping[str, Array], fixed: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """So many rows a time, and how many of them count: a fixed number is filled up with the last row."""
    count, size = len(next(iter(arrays.values()))), fixed or AT_ONCE
    for start in range(0, count, size):
        stop = min(start + size, count)
        places = np.arange(start, start + size if fixed else stop).clip(max=count - 1)
        yield stop - start, {name: np.asarray(value[places]) for name, value in arrays.items()}


def _check_rows(name: str, value: Any, rows: int) -> None:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        raise UnsupportedModel(f"the output {name!r} is no array of numbers", hint="cut it off before the export")
    if value.ndim == 0 or len(value) != rows:
        raise UnsupportedModel(
            f"the network took {rows} rows and gives {name!r} with the shape {list(value.shape)}",
            hint="its outputs need a row for each row of its inputs; cut others off before the export",
        )


def of_one_row(value: Array, at_once: int) -> Array:
    """A tensor between, made of `at_once` copies of a row, as [1, …]; whole where rows are not its first axis."""
    return value[:1] if value.ndim and len(value) == at_once else np.asarray(value)[None]


def task_of(wanted: Task, reference: Sequence[Array]) -> Task:
    """Classes and embeddings are [rows, two or more]; anything else is judged as numbers."""
    first = reference[0]
    classes = first.ndim == 2 and first.shape[1] > 1 and first.dtype.kind == "f"
    return wanted if classes else "numbers"
