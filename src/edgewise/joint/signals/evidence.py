"""What a decision may look at: one request and the edge's answer to it, and nothing of the truth.

A signal that cannot be read is None: no evidence, which is not 0. Each kind of signal is read when the first of its
names is asked for, so a policy pays for what it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from edgewise.joint.signals.answer import (
    ENDED_SIGNALS,
    LOGPROB_SIGNALS,
    TOP_SIGNALS,
    of_alternatives,
    of_ending,
    of_logprobs,
)
from edgewise.joint.signals.logits import LOGITS_SIGNALS, agreement, class_logprobs, of_logits, top_class
from edgewise.joint.signals.sums import SUMS, of_sums
from edgewise.joint.signals.text import LOOK, Reading
from edgewise.types import FinishReason, Token

Signals = Mapping[str, float | None]

PROMPT_SIGNALS: Final = tuple(f"prompt_{name}" for name in LOOK)
NOT_ALWAYS: Final = frozenset({"last_fraction", "last_known", "unused_numbers", "third_softmax"})  # some have none
ANSWER_SIGNALS: Final = tuple(f"answer_{name}" for name in LOOK) + SUMS


@dataclass(frozen=True)
class Evidence:
    """`logprobs` are natural logs, one a token; `logits` are [..., classes]; `finish_reason` is None for an answer that
    has not ended; `runs` are the logits of several runs of the edge; `given` holds signals that came from elsewhere,
    under names of their own or instead of ours."""

    prompt: str | None = None
    group: str | None = None
    text: str | None = None
    logprobs: Sequence[float | None] = ()
    tokens: Sequence[Token] = ()
    finish_reason: FinishReason | None = None
    logits: npt.NDArray[np.float64] | None = None
    runs: Sequence[npt.NDArray[np.float64]] = ()
    given: Signals = field(default_factory=dict)

    def get(self, name: str) -> float | None:
        """The signal of that name; None if it cannot be read, or if there is no such signal here."""
        return self.all((name,))[0]

    def all(self, names: Sequence[str]) -> list[float | None]:
        """Of each name, as `get` says."""
        known = self._known
        for name in names:
            if name not in known:
                self._read(name)
        return list(map(known.get, names))

    def _read(self, name: str) -> None:
        """That signal and all others that are read with it."""
        family = _FAMILIES.get(name) or (_class_logprobs if name.startswith("class_") else None)
        known, found = self._known, {} if family is None else family(self)
        known.update(found if not self.given else {key: found[key] for key in found if key not in known})
        known.setdefault(name, None)

    @cached_property
    def _known(self) -> dict[str, float | None]:
        """What was read so far; what is given stands for ours."""
        return dict(self.given)

    def answered(
        self,
        text: str | None = None,
        logprobs: Sequence[float | None] = (),
        tokens: Sequence[Token] = (),
        finish_reason: FinishReason | None = None,
    ) -> Evidence:
        """The same request with that answer, or that beginning of one; its prompt is not read again."""
        given = {name: value for name, value in self.given.items() if name in PROMPT_SIGNALS}
        found = Evidence(self.prompt, self.group, text, logprobs, tokens, finish_reason, given=given)
        if self.prompt is not None:
            vars(found).update(asked=self.asked, _prompt=self._prompt)
        return found

    def label(self, name: str) -> str | None:
        """What is a word and not a number: `group`, or `class`, the class that the edge chose."""
        match name:
            case "group":
                return self.group
            case "class":
                return None if self.logits is None else top_class(self.logits)
            case _:
                return None

    @property
    def class_names(self) -> Sequence[str]:
        """The names class_0, class_1, … that can be read here."""
        return tuple(self._classes)

    @cached_property
    def asked(self) -> Reading | None:
        return None if self.prompt is None else Reading(self.prompt)

    @cached_property
    def said(self) -> Reading | None:
        """The whole answer; its beginning is judged by log-probabilities alone."""
        return None if self.text is None or self.finish_reason is None else Reading(self.text)

    @cached_property
    def _logprobs(self) -> Signals:
        return {**of_logprobs(self.logprobs), "tokens": float(len(self.logprobs)) if self.logprobs else None}

    @cached_property
    def _alternatives(self) -> Signals:
        return of_alternatives(self.tokens)

    @cached_property
    def _ending(self) -> Signals:
        if self.text is None or self.finish_reason is None or self.said is None:
            return {}
        return of_ending(self.text, self.said.words, self.finish_reason)

    @cached_property
    def _prompt(self) -> Signals:
        return {} if self.asked is None else dict(zip(PROMPT_SIGNALS, self.asked.look.values(), strict=True))

    @cached_property
    def _answer(self) -> Signals:
        if self.said is None:
            return {}
        look = dict(zip(ANSWER_SIGNALS, self.said.look.values(), strict=False))
        return {**look, **of_sums(_NOTHING if self.asked is None else self.asked, self.said)}

    @cached_property
    def _logits(self) -> Signals:
        return {} if self.logits is None else {**of_logits(self.logits), "agreement": agreement(self.runs)}

    @cached_property
    def _classes(self) -> Signals:
        return {} if self.logits is None else class_logprobs(self.logits)


_NOTHING: Final = Reading("")


def _class_logprobs(evidence: Evidence) -> Signals:
    return evidence._classes


_KINDS: Final[Sequence[tuple[Sequence[str], Callable[[Evidence], Signals]]]] = (
    ((*LOGPROB_SIGNALS, "tokens"), lambda evidence: evidence._logprobs),
    (TOP_SIGNALS, lambda evidence: evidence._alternatives),
    (ENDED_SIGNALS, lambda evidence: evidence._ending),
    (PROMPT_SIGNALS, lambda evidence: evidence._prompt),
    (ANSWER_SIGNALS, lambda evidence: evidence._answer),
    ((*LOGITS_SIGNALS, "agreement"), lambda evidence: evidence._logits),
)
_FAMILIES: Final = {name: read for names, read in _KINDS for name in names}
NAMES: Final = tuple(_FAMILIES)  # all but class_0, class_1, … and those that are given
