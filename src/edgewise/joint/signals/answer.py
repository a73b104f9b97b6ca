"""Signals of a generation: its tokens' log-probabilities, how it ended, what it reads like."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Final

from edgewise.types import FinishReason, Token

LOGPROB_SIGNALS: Final = (
    "sum_logprob",
    "mean_logprob",
    "min_logprob",
    "q10_logprob",
    "q25_logprob",
    "median_logprob",
    "low_decile_logprob",
)
TOP_SIGNALS: Final = ("mean_margin", "min_margin", "mean_entropy", "max_entropy")
ENDED_SIGNALS: Final = ("truncated", "parse_ok", "refusal", "repetition")
GATES: Final = ("parse_ok",)  # those that are 1 or 0

LOOP_UNIT = 100  # characters: the longest piece whose repetition counts as a loop
LOOP_TIMES = 4
LOOP_LENGTH = 60  # characters: a shorter tail is no loop, whatever it repeats
LOOP_PROBE = 8

REFUSAL_CHARS = 200  # a refusal comes first
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|afraid|not able)|i (?:can(?:'|no)t|do(?:n't| not) (?:know|have))"
    r"|as an? (?:ai|language model)|i(?:'m| am) not sure|unfortunately)\b"
)


def of_logprobs(logprobs: Sequence[float | None]) -> Mapping[str, float | None]:
    """Of the tokens' natural log-probabilities. A mean over those that happen to have one would say nothing of the
    others, so it is all or none. Quantiles are linear between neighbours; `low_decile_logprob` is the mean of the worst
    tenth (Gupta et al. 2024 for quantiles as signals of a cascade)."""
    known = sorted(p for p in logprobs if p is not None and p <= 0.0)  # NaN compares false
    if not known or len(known) < len(logprobs):
        return dict.fromkeys(LOGPROB_SIGNALS)
    total, worst = math.fsum(known), known[: math.ceil(len(known) / 10)]
    return {
        "sum_logprob": total,
        "mean_logprob": total / len(known),
        "min_logprob": known[0],
        "q10_logprob": _quantile(known, 0.1),
        "q25_logprob": _quantile(known, 0.25),
        "median_logprob": _quantile(known, 0.5),
        "low_decile_logprob": math.fsum(worst) / len(worst),
    }


def of_alternatives(tokens: Sequence[Token]) -> Mapping[str, float | None]:
    """Of the alternatives beside each token: distance of the best two log-probabilities, and entropy in nats, for which
    all that is not listed counts as one more alternative. None unless each token has two or more."""
    if not tokens or any(len(token.top) < 2 for token in tokens):
        return dict.fromkeys(TOP_SIGNALS)
    lists = [sorted((candidate.logprob for candidate in token.top), reverse=True) for token in tokens]
    margins = [best[0] - best[1] for best in lists]
    entropies = [_entropy(logprobs) for logprobs in lists]
    return {
        "mean_margin": math.fsum(margins) / len(margins),
        "min_margin": min(margins),
        "mean_entropy": math.fsum(entropies) / len(entropies),
        "max_entropy": max(entropies),
    }


def of_ending(text: str, words: Sequence[bytes], finish_reason: FinishReason) -> Mapping[str, float | None]:
    """How a whole answer reads: yes/no signals, and the share of its runs of four `words` that were said before."""
    return {
        "truncated": float(finish_reason == "length"),
        "parse_ok": float(reads_well(text)),
        "refusal": float(_REFUSAL.search(text[:REFUSAL_CHARS].lower().replace("’", "'")) is not None),
        "repetition": _repetition(words),
    }


def reads_well(text: str) -> bool:
    """Not blank, no broken characters, and no loop at its end."""
    return bool(text.strip()) and "\ufffd" not in text and not _ends_in_loop(text.rstrip())


def _quantile(ascending: Sequence[float], share: float) -> float:
    place = share * (len(ascending) - 1)
    below, above = ascending[math.floor(place)], ascending[math.ceil(place)]
    if below == above or math.isinf(below):  # -inf between neighbours would make NaN
        return below
    return below + (above - below) * (place - math.floor(place))


def _entropy(logprobs: Sequence[float]) -> float:
    shares = [math.exp(min(logprob, 0.0)) for logprob in logprobs]
    shares.append(max(1.0 - math.fsum(shares), 0.0))
    return -math.fsum(share * math.log(share) for share in shares if share > 0)


def _repetition(words: Sequence[bytes]) -> float:
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _ends_in_loop(text: str) -> bool:
    """Whether the end of the text is one piece, over and over: how a small model fails when it loses its thread. Where
    it is, its last characters stand before, one piece earlier."""
    end, base = text[-LOOP_PROBE:], len(text) - LOOP_PROBE
    place = base
    while (place := text.rfind(end, max(base - LOOP_UNIT, 0), place + LOOP_PROBE - 1)) >= 0:
        unit = base - place
        length = max(LOOP_TIMES * unit, LOOP_LENGTH)
        tail = text[-length:]
        if len(text) >= length and tail[unit:] == tail[:-unit]:
            return True
    return False
