"""Whether a short answer is the right one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Final

_MARKS: Final = re.compile(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)|_")  # but the points and commas inside a number
_ARTICLES: Final = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """Without case, punctuation, articles and spaces more than one (as Rajpurkar et al. 2016 compare answers)."""
    plain = _MARKS.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_ARTICLES.sub(" ", plain).split())


def matches(answer: str, gold: str | Sequence[str]) -> bool:
    """Whether the answer, or the first line of it, is one of the right ones, both normalised. One of marks alone, such
    as "+", is compared as it stands."""
    lines = answer.strip().splitlines()[:1]
    right = [gold] if isinstance(gold, str) else gold
    return any(_same(given, one) for given in (answer, *lines) for one in right)


def _same(given: str, right: str) -> bool:
    wanted = normalised(right)
    return normalised(given) == wanted if wanted else given.strip() == right.strip()
