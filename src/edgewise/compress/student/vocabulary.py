"""A smaller vocabulary out of a byte-level BPE one: the tokens that a student keeps, and the tokenizer of them.

All bytes and all special tokens stay. Of the others the one whose removal costs the fewest tokens goes first: a token
that was counted n times costs n more, because each becomes the two parts that it is merged of, and their counts grow by
as many. A token goes only when no kept one is made of it, so what is left is closed: the parts of every kept token are
kept. Merges keep their order and ids the order of the old ones, so every text still becomes the same bytes.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import msgspec
import numpy as np
from tokenizers import Tokenizer as Core

from edgewise.errors import UnsupportedModel, UsageError
from edgewise.models.tokenizer import BYTES, Config
from edgewise.models.tokenizer_files import TokenizerFiles
from edgewise.types import IdArray

TOGETHER = 1000  # texts encoded at a time
Merge = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`kept` int64 [size]: the teacher's id of each of the student's, ascending. `files`: the student's tokenizer."""

    kept: IdArray
    files: TokenizerFiles


def counted(files: TokenizerFiles, texts: Iterable[str]) -> IdArray:
    """How often each token stands in the texts, int64 [vocabulary]."""
    core = Core.from_str(files.core)
    core.no_padding()
    core.no_truncation()
    counts = np.zeros(files.config.vocabulary, np.int64)
    rest = iter(texts)
    while some := list(islice(rest, TOGETHER)):
        ids = [id for text in core.encode_batch_fast(some, add_special_tokens=False) for id in text.ids]
        counts += np.bincount(np.array(ids, np.int64), minlength=len(counts))
    return counts


def pruned(files: TokenizerFiles, counts: IdArray, size: int) -> Vocabulary:
    """The `size` tokens that serve texts of these `counts` (int64 [vocabulary], see `counted`) with the fewest tokens,
    as far as removing one by one finds them; the whole vocabulary if it has no more. UnsupportedModel if it is no
    byte-level BPE, UsageError if `size` has no room for the bytes and special tokens, or the counts are of another."""
    content = json.loads(files.core)
    vocabulary = _Merged(content, files.config)
    if counts.shape != (files.config.vocabulary,):
        raise UsageError(
            f"counts of the shape {counts.shape} are of another vocabulary", hint=f"({files.config.vocabulary},) is due"
        )
    kept = vocabulary.kept(counts, size)
    new = {old: id for id, old in enumerate(kept.tolist())}
    return Vocabulary(kept, TokenizerFiles(_core(content, vocabulary, new), _config(files.config, new), files.template))


class _Merged:
    """The tokens of a tokenizer.json and what each is made of."""

    def __init__(self, content: dict[str, Any], config: Config) -> None:
        model = content["model"]
        if model["type"] != "BPE" or config.pieces != "byte_level" or model.get("continuing_subword_prefix"):
            raise UnsupportedModel(
                f"a vocabulary of the kind {model['type']} over {config.pieces} pieces cannot be made smaller",
                hint="byte-level BPE can; leave `vocabulary` out for others",
            )
        self.added: dict[str, int] = {token["content"]: token["id"] for token in content["added_tokens"]}
        self.ids: dict[str, int] = model["vocab"] | self.added
        self.merges: list[Merge] = [_pair(merge) for merge in model["merges"]]
        self.parts: dict[int, tuple[int, int]] = {}
        for left, right in self.merges:  # of several ways to make a token the first is the one that texts take
            self.parts.setdefault(self.ids[left + right], (self.ids[left], self.ids[right]))
        named = (config.bos, config.eos, *config.stop, self.ids.get(model.get("unk_token") or ""))
        self.always = {*self.added.values(), *(id for id in named if id is not None)}
        self.always |= {id for text, id in self.ids.items() if text in BYTES}

    def kept(self, counts: IdArray, size: int) -> IdArray:
        if size < len(self.always):
            raise UsageError(
                f"a vocabulary of {size} tokens is wanted; bytes and special tokens alone are {len(self.always)}",
                hint="raise `vocabulary`",
            )
        parts: tuple[int, ...]
        left, worth = set(self.ids.values()), counts.tolist()
        users = np.zeros(len(counts), np.int64)  # kept tokens that are made of it
        for made_of in self.parts.values():
            users[list(set(made_of))] += 1
        leaves = [(worth[id], -id) for id in left if not users[id] and id not in self.always]
        heapq.heapify(leaves)
        while len(left) > size and leaves:
            id = -heapq.heappop(leaves)[1]
            left.remove(id)
            parts = self.parts.get(id) or ()
            for part in parts:
                worth[part] += worth[id]
            for part in set(parts):
                users[part] -= 1
                if not users[part] and part not in self.always:
                    heapq.heappush(leaves, (worth[part], -part))
        return np.array(sorted(left), np.int64)


def _pair(merge: str | list[str]) -> Merge:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _core(content: dict[str, Any], vocabulary: _Merged, new: dict[int, int]) -> str:
    """tokenizer.json with the tokens of `new`, which says what becomes of an id."""
    model = content["model"]
    tokens = sorted((new[id], text) for text, id in vocabulary.ids.items() if id in new)
    there = {text for _, text in tokens}
    merges = [(a, b) for a, b in vocabulary.merges if a in there and b in there and a + b in there]
    plain = not any(" " in part or part.startswith("#version") for merge in merges for part in merge)
    model = model | {
        "vocab": {text: id for id, text in tokens},
        "merges": [" ".join(merge) if plain else list(merge) for merge in merges],
    }
    added = [token | {"id": new[token["id"]]} for token in content["added_tokens"]]
    changed = {
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "post_processor": _post_processor(content.get("post_processor"), new),
        "model": model,
        "padding": None,
        "truncation": None,
    }
    return json.dumps(content | changed, ensure_ascii=False, separators=(",", ":"))


def _post_processor(step: dict[str, Any] | None, new: dict[int, int]) -> dict[str, Any] | None:
    """What puts special tokens around a text, by their new ids."""
    if step is None or step["type"] == "ByteLevel":
        return step
    if step["type"] == "Sequence":
        return step | {"processors": [_post_processor(part, new) for part in step["processors"]]}
    if step["type"] == "TemplateProcessing":
        special = step["special_tokens"].items()
        return step | {"special_tokens": {name: it | {"ids": [new[id] for id in it["ids"]]} for name, it in special}}
    raise UnsupportedModel(
        f"a tokenizer with the post-processor {step['type']} cannot be made smaller",
        hint="leave `vocabulary` out for it",
    )


def _config(config: Config, new: dict[int, int]) -> Config:
    bos, eos = (None if id is None else new[id] for id in (config.bos, config.eos))
    stop = tuple(sorted(new[id] for id in config.stop))
    return msgspec.structs.replace(config, vocabulary=len(new), bos=bos, eos=eos, stop=stop)
