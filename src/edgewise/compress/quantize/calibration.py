"""Windows of token ids that matrices are rounded for: of a text, or written by the model itself."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import numpy as np

from edgewise.compress.judge.bundles import windows as cut
from edgewise.compress.quantize.mixed import Show
from edgewise.engines.base import Row
from edgewise.engines.local import LocalModel
from edgewise.errors import UsageError
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import FloatArray, IdArray

AT_ONCE: Final = 16  # windows that are written side by side
JUDGED: Final = 32  # windows, at most, that what came of it is judged on
SEED: Final = 0


def of_text(tokenizer: Tokenizer, text: str, windows: int, length: int) -> tuple[IdArray, IdArray]:
    """int64 [n, length] each: at most so many windows, and at most JUDGED of the others, both spread evenly over the
    text; each begins with the token that the model's texts begin with, if there is one. UsageError if the text has not
    two windows."""
    there = cut(tokenizer, text, length=length)
    if len(there) < 2:
        raise UsageError(
            f"the text has one window of {length} tokens; two are needed at least",
            hint="take a longer text, or a smaller length in a recipe's [calibration]",
        )
    return spread(there[0::2], windows), spread(there[1::2], JUDGED)


def spread(windows: IdArray, count: int) -> IdArray:
    """At most so many of the windows [n, length], at even distances from the first to the last."""
    if len(windows) <= count:
        return windows
    return np.asarray(windows[np.linspace(0, len(windows) - 1, count).round().astype(int)])


def written(model: LocalModel[Any], tokenizer: Tokenizer, windows: int, length: int, show: Show) -> IdArray:
    """int64 [windows, length]: drawn from the model's own distribution at temperature 1, each beginning with the token
    that its texts begin with, and another of its vocabulary. The model must have AT_ONCE slots and a context of
    `length`."""
    return asyncio.run(_written(model, tokenizer, windows, length, show))


async def _written(model: LocalModel[Any], tokenizer: Tokenizer, windows: int, length: int, show: Show) -> IdArray:
    drawn = np.random.default_rng(SEED)
    begin = tokenizer.start_ids
    ids = np.empty((windows, length), np.int64)
    ids[:, : len(begin)] = begin
    ids[:, len(begin)] = drawn.integers(model.vocab, size=windows)
    for first in range(0, windows, AT_ONCE):
        show("the model writes its calibration text", first, windows)
        await _write(model, ids[first : first + AT_ONCE], len(begin) + 1, drawn)
    show("the model writes its calibration text", windows, windows)
    await model.shutdown()
    return ids


async def _write(model: LocalModel[Any], ids: IdArray, first: int, drawn: np.random.Generator) -> None:
    """Fill rows of ids [n, length] from the column `first` on."""
    for n in range(len(ids)):
        await model.open(str(n), ids.shape[1])
    start = 0
    for at in range(first, ids.shape[1]):
        found = await model.forward([Row(str(n), start, row[start:at]) for n, row in enumerate(ids)])
        ids[:, at] = _draw(np.concatenate(found), drawn)
        start = at
    for n in range(len(ids)):
        await model.close(str(n))


def _draw(logits: FloatArray, drawn: np.random.Generator) -> IdArray:
    """One id per row, by its probability (the Gumbel trick)."""
    noise = drawn.random(logits.shape, np.float32)
    np.log(np.maximum(noise, np.finfo(np.float32).tiny), out=noise)
    np.negative(noise, out=noise)
    np.log(np.maximum(noise, np.finfo(np.float32).tiny), out=noise)
    return np.asarray((logits - noise).argmax(axis=1), np.int64)
