"""Outlines of names: public models (known.toml), their families, and the usual proportions of a size alone."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from edgewise.errors import UsageError
from edgewise.models.outline import Outline

KNOWN: Final = Path(__file__).with_name("known.toml")
GUESSED_SIZES: Final = (0.1, 0.25, 0.5, 1, 1.5, 3, 7, 13, 34, 70, 120, 250, 500)  # 10⁹ parameters


def of_words(words: str) -> Outline:
    """A public model by its name, else a shape of the usual proportions for the number of parameters that the words
    hold ("7B llama-like", "360m"). UsageError if they hold neither."""
    plain = _words(words)
    found = [name for name in known() if _holds(plain, name)]
    if found:
        return known()[max(found, key=len)]
    sizes = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])\b", words.lower())
    if not sizes:
        raise UsageError(
            f"{words!r} is no file, no known model, and names no size",
            hint="give a bundle, a .gguf, a Hugging Face directory, a public name, or a size such as 3B",
        )
    number, unit = sizes[-1]
    return of_size(words, float(number) * {"m": 1e6, "b": 1e9}[unit])


def of_size(name: str, parameters: float) -> Outline:
    """The usual proportions of a model with so many parameters; only `guessed`."""
    if not 1e6 <= parameters <= 1e13:
        raise UsageError(f"{name!r} names {parameters:g} parameters; 1M to 10000B are allowed")
    billions = parameters / 1e9
    layers = max(28, round(32 * (billions / 7) ** 0.4))  # below 5B models are as deep as there, only narrower
    head_dim = 64 if billions < 2 else 128
    heads = max(2, round(math.sqrt(parameters / 12 / layers) / head_dim))
    hidden = heads * head_dim
    kv_heads = max(1, heads // 4)
    tied = billions < 4  # small models share the table: it would be most of them
    vocab = min(128_000, int(parameters / (4 if tied else 8) / hidden))
    body = parameters - vocab * hidden * (1 if tied else 2)
    attention = 2 * hidden * head_dim * layers * (heads + kv_heads)
    ffn = max(hidden, round((body - attention) / (3 * hidden * layers)))
    return Outline(name, layers, hidden, heads, kv_heads, head_dim, ffn, vocab, context=8192, tied=tied, guessed=True)


def family(outline: Outline) -> list[Outline]:
    """The public models whose names begin alike ("Qwen2.5-7B": all of Qwen2), smallest first; of a shape that is only
    guessed, such shapes of other sizes."""
    if outline.guessed:
        return [of_size(f"{billions:g}B", billions * 1e9) for billions in GUESSED_SIZES]
    begin = _words(outline.name)[:2]
    found = {one.name: one for words, one in known().items() if words[:2] == begin}
    return sorted(found.values(), key=lambda one: one.total)


@cache
def known() -> Mapping[tuple[str, ...], Outline]:
    """The public models by the words of their names and aliases."""
    found: dict[tuple[str, ...], Outline] = {}
    for name, line in tomllib.loads(KNOWN.read_text(encoding="utf-8"))["models"].items():
        outline = _known(name, line)
        found |= dict.fromkeys(map(_words, (name, *line.get("aliases", ()))), outline)
    return found


def _known(name: str, line: Mapping[str, Any]) -> Outline:
    beside = {"params", "aliases", "window", "full_every"}
    sizes = {key: value for key, value in line.items() if key not in beside}
    windows: tuple[int, ...] = ()
    if "window" in line:
        windows = tuple(line["window"] if (layer + 1) % line["full_every"] else 0 for layer in range(line["layers"]))
    return Outline(name=name, windows=windows, **sizes)


_NOISE: Final = {"meta", "ibm", "instruct", "it", "chat", "base", "hf", "gguf", "v"}


def _words(name: str) -> tuple[str, ...]:
    """What tells one name from another: words and numbers, without an owner and the words that all names share."""
    last = re.sub(r"\(.*?\)", " ", name).split("/")[-1].lower()
    parts = re.findall(r"[a-z]+|\d+[a-z]*", last)
    return tuple(part for part in parts if part not in _NOISE)


def _holds(words: Sequence[str], name: Sequence[str]) -> bool:
    """Whether the name stands in those words, as one run."""
    return any(tuple(words[n : n + len(name)]) == tuple(name) for n in range(len(words) - len(name) + 1))
