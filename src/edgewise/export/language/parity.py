"""How far a language model's artifact is from its source, over steps of decoding: proof/parity.py's figures, and when
the two would first have said something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgewise.evaluate.divergence import Divergence
from edgewise.evaluate.interval import bootstrap
from edgewise.export.language.passages import Passage
from edgewise.export.proof.parity import Choices, Drop, Parity, numbers_of
from edgewise.export.work.job import read_array

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Continued:
    """`divergences` are, of each answer that the source gave greedily, the step at which the artifact would say another
    token first, None for never; `first` is the earliest of them, over `positions` steps in all."""

    positions: int
    first: int | None
    divergences: tuple[int | None, ...]


def run(passages: Sequence[Passage], logits: Path) -> list[int]:
    """The numbers of those passages for which there are logits."""
    return [n for n in range(len(passages)) if (logits / f"{n}.npy").is_file()]


def rows(numbers: Sequence[int], directory: Path) -> Array:
    """Logits float32 [positions, vocab] of these passages, one behind the other."""
    return np.concatenate([read_array(directory, str(n)) for n in numbers])


def compared(found: Array, expected: Array) -> Parity:
    """Of finite logits [positions, vocab]. The drop is the share of positions at which another token is most
    probable."""
    divergence = Divergence()
    divergence.add(expected, found)
    result, drop = divergence.result(), bootstrap(found.argmax(1) != expected.argmax(1))
    return Parity(
        outputs=(numbers_of(found, expected),),
        choices=Choices(result.top1_agreement, result.kl_mean, result.kl_p99),
        drop=Drop(drop.value, drop.low, drop.high, "top-1 disagreement", len(found)),
    )


def continued(passages: Sequence[Passage], found: Array, expected: Array) -> Continued:
    """`passages` are those whose rows these are."""
    divergences: list[int | None] = []
    at = 0
    for passage in passages:
        steps = slice(at, at + passage.steps)
        at += passage.steps
        if passage.greedy:
            same = found[steps].argmax(1) == expected[steps].argmax(1)
            divergences.append(None if same.all() else int(np.argmin(same)))
    first = min((one for one in divergences if one is not None), default=None)
    return Continued(len(found), first, tuple(divergences))
