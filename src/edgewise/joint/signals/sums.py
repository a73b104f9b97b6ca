"""Whether the sums that a text writes out are right, and what its last number looks like.

Only plain chains of numbers are checked: `3 + 4 * 2 = 11`. What stands in brackets, letters or fractions of a formula
is left alone, as a wrong reading would accuse a right answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

SUMS: Final = ("sums", "sums_wrong", "last_fraction", "last_known", "unused_numbers")

_NOTES = re.compile(r"<<[^<>]{0,100}>>")  # a calculator's notes between a sum and its result
_TIMES = re.compile(r"\\times|\\cdot|×|·|\\\*|(?<=\d)\s*x\s*(?=\$?\d)")
_NUMBER = r"\d+(?:\.\d+)?%?"
_SUM = re.compile(
    rf"(?<![\w.^)/*+\-])\s*({_NUMBER}(?:\s*[-+*/]\s*{_NUMBER}){{1,8}})\s*=\s*(-?{_NUMBER})(?![\d^(]|\s*[-+*/]\s*[\d(])"
)
_PIECE = re.compile(rf"{_NUMBER}|[-+*/]")
_ANY = re.compile(r"-?\d+(?:\.\d+)?")
_DROPPED = str.maketrans({"$": None, "€": None, "£": None, "÷": "/", "−": "-", ",": None})
_TOLERANCE: Final = 0.006  # what rounding to cents, or to two digits of a percentage, may hide


def of_sums(prompt: str, answer: str) -> Mapping[str, float | None]:
    """`sums` and `sums_wrong`: how many are written out, and how many of them are wrong, as log(1 + n). Of the last
    number: whether it has a fraction, and whether the prompt holds it; None where there is no number.
    `unused_numbers`: the share of the prompt's numbers that the answer leaves out; None where the prompt has none."""
    plain = _plain(answer)
    checks = [_right(left, right) for left, right in _SUM.findall(plain)]
    said, given = _ANY.findall(plain), set(_ANY.findall(_plain(prompt)))
    last = said[-1] if said else None
    return {
        "sums": math.log1p(len(checks)),
        "sums_wrong": math.log1p(checks.count(False)),
        "last_fraction": None if last is None else float(float(last) % 1 != 0),
        "last_known": None if last is None else float(last in given),
        "unused_numbers": len(given - set(said)) / len(given) if given else None,
    }


def _plain(text: str) -> str:
    return _TIMES.sub("*", _NOTES.sub("", text).translate(_DROPPED))


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
