"""What language models are judged on: token ids of which the last ones are foretold one by one, with a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

STEPS: Final = 64  # decoding steps of a passage
LEAST_PROMPT: Final = 8  # tokens before the first step, in a text that is long enough to be its own continuation
MOST_PROMPT: Final = 64
TEXTS: Final = (
    "The three things that every kitchen needs are",
    "Question: What is the capital of France, and which river runs through it?\nAnswer:",
    "def fibonacci(n):\n",
    "Dear Ms. Okafor,\n\nThank you for your letter of 3 May about the bridge.",
    "The ferry left at six, as it did on every day of the year but one, and the man who sold the tickets had gone home "
    "before it was out of sight. On the quay there was nothing left but a crate of apples, a dog, and the smell of "
    "diesel. Anna sat down on the crate. She had meant to be on that boat. For a while she counted the lights on the "
    "other shore, which came on one after the other, first in the harbour, then along the road, then in the houses on "
    "the hill, until there were too many to count. Then she took an apple and went to look for a bed.",
    "Water boils at 100 degrees Celsius at sea level. On a mountain it boils earlier, because the air above it presses "
    "less: at 3000 metres about 90 degrees are enough. That is why potatoes take longer there. A pressure cooker works "
    "the other way round. Its lid holds the steam back, the pressure rises to about twice that of the air, and the "
    "water has to reach 120 degrees before it boils. What is inside is done in a third of the time.",
)


@dataclass(frozen=True, slots=True)
class Passage:
    """`ids` of which those from `start` on are foretold: step `n` reads ids[start - 1 + n] and says what stands at
    start + n. The reference's own words, each the one that it found most probable, if `greedy`; else a text's."""

    ids: tuple[int, ...]
    start: int
    greedy: bool

    @property
    def steps(self) -> int:
        return len(self.ids) - self.start

    def read(self, step: int) -> int:
        """The token that this step reads."""
        return self.ids[self.start - 1 + step]


@dataclass(frozen=True, slots=True)
class Heard:
    """What the reference answers: the passages, whose logits float32 [steps, vocab] lie in `reference/` by number."""

    passages: tuple[Passage, ...]
    vocab: int
    parameters: int
    notes: tuple[str, ...] = ()


def passages_of(values: Sequence[Mapping[str, Any]]) -> tuple[Passage, ...]:
    return tuple(Passage(tuple(one["ids"]), int(one["start"]), bool(one["greedy"])) for one in values)


def heard_of(value: Mapping[str, Any]) -> Heard:
    return Heard(passages_of(value["passages"]), value["vocab"], value["parameters"], tuple(value["notes"]))
