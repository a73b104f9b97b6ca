"""Numbers read off an edge answer. A number that cannot be read is None: no evidence, which is not 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from edgewise.types import FinishReason, Token

Signals = Mapping[str, float | None]

TEXT_SIGNALS: Final = ("mean_logprob", "min_logprob", "q10_logprob", "tokens", "truncated", "parse_ok")
LOGITS_SIGNALS: Final = ("max_softmax", "margin", "entropy")
GATES: Final = ("parse_ok",)  # those that are 1 or 0

LOOP_UNIT = 100  # characters: the longest piece whose repetition counts as a loop
LOOP_TIMES = 4
LOOP_LENGTH = 60  # characters: a shorter tail is no loop, whatever it repeats


def of_text(tokens: Sequence[Token], text: str, finish_reason: FinishReason | None) -> Signals:
    """Signals of an answer, or of its beginning: then `finish_reason` is None."""
    ended = finish_reason is not None
    return {
        **_of_logprobs([token.logprob for token in tokens]),
        "tokens": float(len(tokens)),
        "truncated": float(finish_reason == "length") if ended else None,
        "parse_ok": float(_reads_well(text)) if ended else None,
    }


def of_logits(logits: npt.ArrayLike) -> Signals:
    """Signals of logits [..., classes], each taken from the row that is least confident in it.
    None for fewer than two classes, no rows, NaN or +inf; -inf is a class that cannot be."""
    values = np.asarray(logits, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] < 2 or values.size == 0:
        return dict.fromkeys(LOGITS_SIGNALS)
    rows = values.reshape(-1, values.shape[-1])
    best = rows.max(axis=1, keepdims=True)
    if not np.isfinite(best).all():  # NaN or +inf somewhere in a row, or -inf everywhere
        return dict.fromkeys(LOGITS_SIGNALS)
    powers = np.exp(rows - best)
    shares = powers / powers.sum(axis=1, keepdims=True)
    top = np.partition(shares, -2, axis=1)[:, -2:]
    surprise = -np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return {
        "max_softmax": float(top[:, 1].min()),
        "margin": float((top[:, 1] - top[:, 0]).min()),
        "entropy": float((shares * surprise).sum(axis=1).max()),
    }


def _of_logprobs(logprobs: Sequence[float | None]) -> Signals:
    """A mean over the tokens that happen to have a log-probability would say nothing of the others: all or none."""
    known = sorted(p for p in logprobs if p is not None and p <= 0.0)  # NaN compares false
    if not known or len(known) < len(logprobs):
        return {"mean_logprob": None, "min_logprob": None, "q10_logprob": None}
    return {
        "mean_logprob": math.fsum(known) / len(known),
        "min_logprob": known[0],
        "q10_logprob": _quantile(known, 0.1),
    }


def _quantile(ascending: Sequence[float], share: float) -> float:
    place = share * (len(ascending) - 1)
    below, above = ascending[math.floor(place)], ascending[math.ceil(place)]
    if below == above or math.isinf(below):  # -inf between neighbours would make NaN
        return below
    return below + (above - below) * (place - math.floor(place))


def _reads_well(text: str) -> bool:
    return bool(text.strip()) and "\ufffd" not in text and not _ends_in_loop(text.rstrip())


def _ends_in_loop(text: str) -> bool:
    """Whether the end of the text is one piece, over and over: how a small model fails when it loses its thread."""
    for unit in range(1, LOOP_UNIT + 1):
        length = max(LOOP_TIMES * unit, LOOP_LENGTH)
        if len(text) < length:
            return False
        tail = text[-length:]
        if tail[unit:] == tail[:-unit]:
            return True
    return False
