"""What the look of a text says: cheap numbers of a prompt or an answer, and its words as buckets of a table.

A decision has some 100 microseconds, so a long text is read at both ends only, and what can be counted is counted by
methods that run in C.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import log1p
from typing import Final
from zlib import crc32

HEAD_CHARS, TAIL_CHARS = 1200, 400  # of a longer text its beginning and its end are read
BUCKETS: Final = 4096  # of the table that words are hashed into
WORDS_KEPT: Final = 1 << 16

WORD: Final = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")
_FRACTION = re.compile(r"\d[./]\d")
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+")

_LOGIC = """if then when unless not no nor except only without but than more less fewer least most same different other
another rest remaining left either neither both all none any some false true"""
_RATES = """each every per times half twice third quarter double triple percent ratio average total altogether rate many
much sum difference product"""
_UNITS = """second minute hour day week month year inch foot feet yard mile meter metre kilometer gram pound ounce ton
gallon liter litre cup dozen dollar cent euro degree"""
_NUMERALS = """one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand
million first"""
_DOUBTS = """however wait actually mistake mistaken assume assuming assumption impossible unclear cannot perhaps maybe
might unless contradiction contradicts error approximately unfortunately sorry unsure"""
_KIND: Final = {
    word: kind
    for kind, words in (
        ("logic", _LOGIC.split()),
        ("rates", _RATES.split()),
        ("units", [form for unit in _UNITS.split() for form in (unit, unit + "s")]),
        ("numerals", _NUMERALS.split()),
        ("doubts", _DOUBTS.split()),
    )
    for word in words
}
_DIGITS, _CAPITALS = b"0123456789", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARKS = bytes(set(range(33, 127)) - set(range(48, 58)) - set(range(65, 91)) - set(range(97, 123)))

_buckets: dict[str, int] = {}  # of words met before: to hash one anew takes ten times as long as to look it up


class Reading:
    """One text, read once."""

    def __init__(self, text: str) -> None:
        self.chars = len(text)
        long = self.chars > HEAD_CHARS + TAIL_CHARS
        self.text = f"{text[:HEAD_CHARS]}\n{text[-TAIL_CHARS:]}" if long else text
        self.words: list[str] = WORD.findall(self.text.lower())

    def look(self) -> Mapping[str, float]:
        """The numbers of LOOK: lengths and counts as log(1 + n), all others as shares or means."""
        text, words = self.text, self.words
        raw = text.encode("utf-8", "replace")
        kinds = [kind for kind in map(_KIND.get, words) if kind]
        lengths = [len(line) for line in text.split("\n")]
        sentences = text.count(". ") + text.count("? ") + text.count("! ") + 1
        count = max(len(words), 1)
        return {
            "chars": log1p(self.chars),
            "words": log1p(len(words)),
            "sentences": log1p(sentences),
            "sentence_words": log1p(len(words) / sentences),
            "lines": log1p(len(lengths) - 1),
            "line_chars": log1p(sum(lengths) / len(lengths)),
            "line_spread": log1p(max(lengths) - min(lengths)),
            "word_length": len("".join(words)) / count,
            "distinct": len(set(words)) / count,
            "digits": _share(raw, _DIGITS),
            "capitals": _share(raw, _CAPITALS),
            "marks": _share(raw, _MARKS),
            "numbers": log1p(sum(map(str.isdigit, words))),
            "fractions": log1p(len(_FRACTION.findall(text))),
            "money": log1p(text.count("$") + text.count("€") + text.count("£")),
            "percents": log1p(text.count("%")),
            "commas": log1p(text.count(",")),
            "questions": log1p(text.count("?")),
            "blanks": log1p(text.count("_")),
            "formulas": log1p(text.count("=") + text.count("^") + text.count("\\")),
            "names": log1p(len(_NAME.findall(text))),
            "logic": log1p(kinds.count("logic")),
            "rates": log1p(kinds.count("rates")),
            "units": log1p(kinds.count("units")),
            "numerals": log1p(kinds.count("numerals")),
            "doubts": log1p(kinds.count("doubts")),
        }

    def buckets(self) -> list[int]:
        """The buckets 0..BUCKETS - 1 of its different words, each once."""
        met = _buckets.get
        return list({bucket_of(word) if (place := met(word)) is None else place for word in set(self.words)})


def bucket_of(word: str) -> int:
    """0..BUCKETS - 1, the same everywhere and always."""
    found = _buckets.get(word)
    if found is None:
        if len(_buckets) >= WORDS_KEPT:
            _buckets.clear()
        found = _buckets[word] = crc32(word.encode("utf-8", "replace")) % BUCKETS
    return found


def _share(raw: bytes, chars: bytes) -> float:
    return 1 - len(raw.translate(None, chars)) / len(raw) if raw else 0.0


LOOK: Final = tuple(Reading("").look())
