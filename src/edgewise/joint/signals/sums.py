"""Whether the sums that a text writes out are right, and what its last number looks like.

Only plain chains of numbers are checked: `3 + 4 * 2 = 11`. What stands in brackets, letters or fractions of a formula
is left alone, as a wrong reading would accuse a right answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Final

from edgewise.joint.signals.text import DIGITS, Reading, kept

SUMS: Final = ("sums", "sums_wrong", "last_fraction", "last_known", "unused_numbers")

_NOTES = re.compile(r"<<[^<>]{0,100}>>")  # a calculator's notes between a sum and its result
_TIMES = re.compile(r"\\times|\\cdot|×|·|\\\*|(?<=\d)\s*x\s*(?=\$?\d)")
_NUMBER = r"\d+(?:\.\d+)?%?"
_LEFT = re.compile(rf"(?<![\w.^)/*+\-])\s*({_NUMBER}(?:\s*[-+*/]\s*{_NUMBER}){{1,8}})\s*\Z")
_RESULT = re.compile(rf"\s*(-?{_NUMBER})(?![\d^(]|\s*[-+*/]\s*[\d(])")
_PIECE = re.compile(rf"{_NUMBER}|[-+*/]")
_TIMES_SIGNS = ("x", "\\", "×", "·")
_SIGNS = (("$", ""), ("€", ""), ("£", ""), (",", ""), ("÷", "/"), ("−", "-"))
_NUMERIC = kept(DIGITS + b".")
_CURRENCY: Final = b"$,"
_CHAIN: Final = "0123456789.%+-*/ \n\t"
_REACH: Final = 80  # characters that are read on either side of a sign of equality
_ENDS: Final = frozenset("0123456789%")  # of what may be a chain
_TOLERANCE: Final = 0.006  # what rounding to cents, or to two digits of a percentage, may hide


def of_sums(asked: Reading, said: Reading) -> Mapping[str, float | None]:
    """`sums` and `sums_wrong`: how many are written out, and how many of them are wrong, as log(1 + n). Of the last
    number: whether it has a fraction, and whether the prompt holds it; None where there is no number.
    `unused_numbers`: the share of the prompt's numbers that the answer leaves out; None where the prompt has none."""
    checks = _checks(said.text) if b"=" in said.marks else []
    numbers, given = _numbers(said), set(_numbers(asked))
    last = numbers[-1] if numbers else None
    return {
        "sums": math.log1p(len(checks)),
        "sums_wrong": math.log1p(checks.count(False)),
        "last_fraction": None if last is None else float(b"." in last and float(last) % 1 != 0),
        "last_known": None if last is None else float(last in given),
        "unused_numbers": len(given - set(numbers)) / len(given) if given else None,
    }


def _numbers(text: Reading) -> list[bytes]:
    """Without signs; `1,000` is 1000, and what looks like a version is one number with its first fraction."""
    if not text.numbers:
        return []
    pieces = [piece.strip(b".") for piece in text.raw.translate(_NUMERIC, _CURRENCY).split()]
    return [piece if piece.count(b".") < 2 else b".".join(piece.split(b".")[:2]) for piece in pieces if piece]


def _checks(text: str) -> list[bool]:
    """Whether each sum of the text is right."""
    plain = _NOTES.sub("", text) if "<<" in text else text
    found = []
    for before, after in pairwise(plain.split("=")):
        if before.rstrip()[-1:] in _ENDS and (result := _RESULT.match(_plain(after[:_REACH]))):
            left = _plain(before[-_REACH:])
            chain = _LEFT.search(left, max(len(left.rstrip(_CHAIN)) - 1, 0))
            if chain is not None:
                found.append(_right(chain[1], result[1]))
    return found


def _plain(text: str) -> str:
    """For the ordinary text, in which none of this is there, a few looks are all that it costs."""
    for sign, plain in _SIGNS:
        if sign in text:
            text = text.replace(sign, plain)
    return _TIMES.sub("*", text) if any(sign in text for sign in _TIMES_SIGNS) else text


def _right(left: str, right: str) -> bool:
    value, said = _value(left), _number(right)
    return math.isnan(value) or abs(value - said) <= max(_TOLERANCE, _TOLERANCE * abs(value))


def _value(chain: str) -> float:
    """Of numbers joined by + - * /, the latter two first; NaN for a division by 0."""
    pieces = _PIECE.findall(chain)
    total, sign, product = 0.0, 1.0, _number(pieces[0])
    for operator, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        number = _number(piece)
        match operator:
            case "*":
                product *= number
            case "/":
                product = product / number if number else math.nan
            case _:
                total, sign, product = total + sign * product, 1.0 if operator == "+" else -1.0, number
    return total + sign * product


def _number(text: str) -> float:
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)
