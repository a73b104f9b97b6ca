"""How byte-level BPE vocabularies cut text into words before merging, by llama.cpp's name of the rule.

A GGUF file names its rule in `tokenizer.ggml.pre`. Each rule is a list of patterns: every one cuts the pieces that the
one before it left, and what a pattern does not match stays a piece of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """`whole_words`: a word that is a token as it stands is not merged from its bytes. `add_bos`: unless the file says
    otherwise, a prompt begins with BOS."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


# Spelled out: a case-insensitive group would also match the long s (U+017F), which llama.cpp does not.
_ENGLISH: Final = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CAPITALS: Final = (  # a word begins where capitals begin
    r"[^\r\n\p{L}\p{N}]?((?=\p{L})[^a-z])*((?=\p{L})[^A-Z])+@|[^\r\n\p{L}\p{N}]?((?=\p{L})[^a-z])+((?=\p{L})[^A-Z])*@"
)


def _words(digits: str, letters: str = r"\p{L}", *, marks: str = r"\p{L}\p{N}") -> str:
    return rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[{letters}]+|{digits}| ?[^\s{marks}]+[\r\n]*|{_SPACES}"


def _capital_words(digits: str, ending: str) -> str:
    return rf"{_CAPITALS.replace('@', ending)}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_BY_RULE: Final = {
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): "default",
    PreTokenizer((_GPT2,)): "gpt-2 phi-2 olmo mpt jais exaone4 trillion gigachat a.x-4.0 mellum",
    PreTokenizer((r"\p{N}", _GPT2)): "smollm starcoder refact command-r codeshell exaone minerva-7b",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): "falcon",
    PreTokenizer((_words(r"\p{N}{1,3}"),), whole_words=True, add_bos=True): (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2"
    ),
    PreTokenizer((_words(r"\p{N}{1,3}"),)): "dbrx smaug-bpe",
    PreTokenizer((_words(r"\p{N}"),)): "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan",
    PreTokenizer((_words(r"\p{N}", r"\p{L}\p{M}", marks=r"\p{L}\p{M}\p{N}"),)): "qwen35",
    PreTokenizer((_capital_words(r"\p{N}", ""),), whole_words=True, add_bos=True): "tekken",
    PreTokenizer((_capital_words(r"\p{N}{1,3}", _ENGLISH + "?"),)): "gpt-4o llama4",
}

PRE_TOKENIZERS: Final[Mapping[str, PreTokenizer]] = MappingProxyType(
    {name: rule for rule, names in _BY_RULE.items() for name in names.split()}
)
