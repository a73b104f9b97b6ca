"""What the look of a text says: cheap numbers of a prompt or an answer, and its words as buckets of a table.

A decision has some 100 microseconds, so a long text is read at both ends only, and its UTF-8 bytes are sorted into
kinds by tables: one pass in C for each question, and no regular expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import log1p
from typing import Final
from zlib import crc32

HEAD_CHARS, TAIL_CHARS = 600, 300  # of a longer text its beginning and its end are read
BUCKETS: Final = 4096  # of the table that words are hashed into
WORDS_KEPT: Final = 1 << 16

_LOGIC = """if then when unless not no nor except only without but than more less fewer least most same different other
another rest remaining left either neither both all none any some false true"""
_RATES = """each every per times half twice third quarter double triple percent ratio average total altogether rate many
much sum difference product"""
_UNIT = """second minute hour day week month year inch foot feet yard mile meter metre kilometer gram pound ounce ton
gallon liter litre cup dozen dollar cent euro degree"""
_NUMERALS = """one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand
million first"""
_DOUBTS = """however wait actually mistake mistaken assume assuming assumption impossible unclear cannot perhaps maybe
might unless contradiction contradicts error approximately unfortunately sorry unsure"""


def _set(words: str) -> frozenset[bytes]:
    return frozenset(words.encode().split())


_KINDS: Final = (
    ("logic", _set(_LOGIC)),
    ("rates", _set(_RATES)),
    ("units", _set(_UNIT) | _set(" ".join(f"{unit}s" for unit in _UNIT.split()))),
    ("numerals", _set(_NUMERALS)),
    ("doubts", _set(_DOUBTS)),
)
_ALL: Final = bytes(range(256))
DIGITS: Final = b"0123456789"
_CAPITALS: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SMALL: Final = _CAPITALS.lower()
_LETTERS: Final = _CAPITALS + _SMALL + bytes(range(128, 256))  # of other scripts too, byte by byte
_MARKS: Final = bytes(set(range(33, 127)) - set(DIGITS + _LETTERS))


def kept(chars: bytes, others: bytes = b" ") -> bytes:
    """A table that keeps these bytes, small letters for capitals, and makes all others one."""
    return bytes(byte if byte in chars else ord(others) for byte in _ALL).lower()


def _outline() -> bytes:
    """Every byte by its kind: digits 0, small letters and commas a, capitals A."""
    kinds = {**dict.fromkeys(DIGITS, b"0"), **dict.fromkeys(_SMALL + b",", b"a"), **dict.fromkeys(_CAPITALS, b"A")}
    return b"".join(kinds.get(byte, bytes([byte])) for byte in _ALL)


_ONLY_LETTERS, _ONLY_DIGITS, _OUTLINE = kept(_LETTERS), kept(DIGITS), _outline()
_NO_MARKS: Final = bytes(set(_ALL) - set(_MARKS))

_buckets: dict[bytes, int] = {}  # of words met before: to hash one anew takes longer than to look it up


class Reading:
    """One text, read once."""

    def __init__(self, text: str) -> None:
        self.chars = len(text)
        long = self.chars > HEAD_CHARS + TAIL_CHARS
        self.text = f"{text[:HEAD_CHARS]}\n{text[-TAIL_CHARS:]}" if long else text
        self.raw = raw = self.text.encode("utf-8", "replace")
        self.words = raw.translate(_ONLY_LETTERS).split()  # in small letters
        self.numbers = raw.translate(_ONLY_DIGITS).split()  # runs of digits
        self.marks = raw.translate(None, _NO_MARKS)
        self.distinct = set(self.words)

    @cached_property
    def look(self) -> Mapping[str, float]:
        """The numbers of LOOK: lengths and counts as log(1 + n), all others as shares or means."""
        raw, words, distinct, marks = self.raw, self.words, self.distinct, self.marks
        size = len(raw) or 1
        lengths = list(map(len, raw.split(b"\n")))
        sentences = raw.count(b". ") + raw.count(b"? ") + raw.count(b"! ") + 1
        count = len(words) or 1
        outline = raw.translate(_OUTLINE)
        found = {
            "chars": log1p(self.chars),
            "words": log1p(len(words)),
            "sentences": log1p(sentences),
            "sentence_words": log1p(len(words) / sentences),
            "lines": log1p(len(lengths) - 1),
            "line_chars": log1p(len(raw) / len(lengths)),
            "line_spread": log1p(max(lengths) - min(lengths)),
            "word_length": len(b"".join(words)) / count,
            "distinct": len(distinct) / count,
            "digits": len(b"".join(self.numbers)) / size,
            "capitals": outline.count(b"A") / size,
            "marks": len(marks) / size,
            "numbers": log1p(len(self.numbers)),
            "fractions": log1p(outline.count(b"0.0") + outline.count(b"0/0")),
            "money": log1p(marks.count(b"$") + self.text.count("€") + self.text.count("£")),
            "percents": log1p(marks.count(b"%")),
            "commas": log1p(marks.count(b",")),
            "questions": log1p(marks.count(b"?")),
            "blanks": log1p(marks.count(b"_")),
            "formulas": log1p(marks.count(b"=") + marks.count(b"^") + marks.count(b"\\")),
            "names": log1p(outline.count(b"a Aa")),
        }
        for kind, known in _KINDS:
            found[kind] = log1p(len(known & distinct))
        return found

    @cached_property
    def buckets(self) -> Sequence[int]:
        """The buckets 0..BUCKETS - 1 of its different words, numbers and marks, each once."""
        pieces = self.distinct.union(self.numbers, map(_MARK.__getitem__, set(self.marks)))
        found = set(map(_buckets.get, pieces))
        if None in found:
            found = set(map(bucket_of, pieces))
        return [place for place in found if place is not None]


def bucket_of(word: bytes) -> int:
    """0..BUCKETS - 1, the same everywhere and always."""
    found = _buckets.get(word)
    if found is None:
        if len(_buckets) >= WORDS_KEPT:
            _buckets.clear()
        found = _buckets[word] = crc32(word) % BUCKETS
    return found


_MARK: Final = [bytes([byte]) for byte in _ALL]
LOOK: Final = tuple(Reading("").look)
