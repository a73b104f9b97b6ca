"""What benchmarks/intents.py and benchmarks/intents_teacher.py read: CLINC150, questions that are of none of its
intents, and texts made of its training texts that nobody has labelled."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

OUT_OF_SCOPE = "oos"
UNLABELLED = -100  # what cross-entropy passes over
OUTLIERS = 2500
QUESTION = re.compile(
    r"(?:^|[.?!:\n] ?)((?:what|who|where|when|why|how|which|is|are|do|does|did|can|could)\b[^.?!:\n]{6,70})\?"
)
ODD = re.compile(
    r"[^a-z0-9' ]|\b(?:entity|relation|relationship|passage|sentence|text|article|review|reviewer|question|answer)\b"
)


@dataclass(frozen=True)
class Part:
    """Texts with the number of each one's intent, the last one for out of scope; UNLABELLED for none."""

    texts: Sequence[str]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, other: Part) -> Part:
        return Part([*self.texts, *other.texts], np.concatenate([self.labels, other.labels]))


@dataclass(frozen=True)
class Intents:
    """`parts`: train, val, test (in scope), oos_train, oos_val, oos_test, and the `outliers` and `invented` ones."""

    classes: Sequence[str]
    parts: Mapping[str, Part]

    @property
    def out(self) -> int:
        """The number of the class of what is out of scope."""
        return len(self.classes) - 1


def opened(directory: Path, invent: int, work: Path) -> Intents:
    """From a directory that holds intents/clinc150.json.gz and text/t0-tasks.jsonl.gz. `invent` texts are made of the
    training texts; none of them, and no outlier, is a text of the sets to be judged on. Kept in `work`, as it takes a
    while."""
    path = work / f"texts-{invent}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: Part(texts, np.array(labels)) for name, (texts, labels) in kept["parts"].items()}
        return Intents(kept["classes"], parts)
    intents = made(directory, invent)
    kept = {name: (list(part.texts), part.labels.tolist()) for name, part in intents.parts.items()}
    path.write_text(json.dumps({"classes": intents.classes, "parts": kept}), encoding="utf-8")
    return intents


def made(directory: Path, invent: int) -> Intents:
    """As `opened`."""
    with gzip.open(directory / "intents" / "clinc150.json.gz", "rt", encoding="utf-8") as file:
        splits = json.load(file)
    classes = [*sorted({label for _, label in splits["train"]}), OUT_OF_SCOPE]
    number = {name: place for place, name in enumerate(classes)}
    parts = {
        name: Part([text for text, _ in rows], np.array([number[label] for _, label in rows]))
        for name, rows in splits.items()
    }
    judged = {text for name, part in parts.items() if "train" not in name for text in part.texts}
    with gzip.open(directory / "text" / "t0-tasks.jsonl.gz", "rt", encoding="utf-8") as file:
        strange = questions((json.loads(line)["prompt"] for line in file), judged)
    parts["outliers"] = Part(strange, np.full(len(strange), number[OUT_OF_SCOPE]))
    seeds = [*parts["train"].texts, *parts["oos_train"].texts, *strange]
    more = invented(seeds, invent, judged, random.Random(0))
    parts["invented"] = Part(more, np.full(len(more), UNLABELLED))
    return Intents(classes, parts)


def questions(prompts: Iterable[str], judged: set[str]) -> list[str]:
    """Plain short questions that stand in these prompts, OUTLIERS at most, drawn by chance."""
    found = dict[str, None]()
    for prompt in prompts:
        for text in QUESTION.findall(prompt.lower()):
            text = " ".join(text.split())
            if not ODD.search(text) and 3 <= len(text.split()) <= 14 and text not in judged:
                found[text] = None
    return random.Random(0).sample(list(found), min(OUTLIERS, len(found)))


def invented(seeds: Sequence[str], count: int, judged: set[str], lot: random.Random) -> list[str]:
    """`count` other texts: two of `seeds` joined at a word that both hold, one with words put in that stand elsewhere
    behind the same word, one with words left out."""
    split = [text.split() for text in seeds]
    holders: dict[str, list[int]] = {}
    followers: dict[str, list[str]] = {}
    for place, words in enumerate(split):
        for word in set(words):
            holders.setdefault(word, []).append(place)
        for first, second in pairwise(words):
            followers.setdefault(first, []).append(second)
    known, made = {*seeds, *judged}, list[str]()
    while len(made) < count:
        words = list(lot.choice(split))
        kind = lot.random()
        if kind < 0.4:
            words = joined(words, split, holders, lot)
        elif kind < 0.7:
            for _ in range(lot.randint(1, 3)):
                place = lot.randrange(len(words))
                if place and words[place - 1] in followers:
                    words[place] = lot.choice(followers[words[place - 1]])
        else:
            for _ in range(min(lot.randint(1, 4), len(words) - 1)):
                del words[lot.randrange(len(words))]
        text = " ".join(words)
        if text not in known:
            known.add(text)
            made.append(text)
    return made


def joined(
    words: Sequence[str], split: Sequence[Sequence[str]], holders: Mapping[str, Sequence[int]], lot: random.Random
) -> list[str]:
    """The beginning of one text up to a word, and what follows that word in another."""
    place = lot.randrange(len(words))
    other = split[lot.choice(holders[words[place]])]
    return [*words[: place + 1], *other[other.index(words[place]) + 1 :]]
