"""The smallest classifier: its n-grams beside those of plain Python, its file beside the module that it was."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.compress.classify import text_graph
from edgewise.compress.classify.text_classifier import TextClassifier
from edgewise.compress.classify.text_graph import (
    BASE,
    MOST_BYTES,
    MOST_WORDS,
    PAIR,
    PRIME,
    SKIP,
    SLOTS,
    SPREAD,
    NGrams,
    as_bytes,
)
from edgewise.engines.onnx_net import OnnxNet
from edgewise.errors import UsageError

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789'"
COLOURS = ["paint it red", "a red door", "deep red wine", "blue sky", "so blue a sea", "the blue hour"]
KINDS = [0, 0, 0, 1, 1, 1]


def letter(byte: int) -> int:
    if byte > 127:
        return byte - 128 + 38
    return ALPHABET.find(chr(byte).lower()) + 1


def polynomial(letters: list[int]) -> int:
    return sum(one * pow(BASE, place, PRIME) for place, one in enumerate(letters)) % PRIME


def slots_of(text: str) -> list[int]:
    """What the graph should find, in any order."""
    letters = [letter(byte) for byte in text.encode("utf-8", "replace")[:MOST_BYTES]]
    found: list[tuple[int, int]] = []
    for kind, length in enumerate((3, 4, 5)):
        padded = [0, *letters, 0, 0, 0, 0]
        for start in range(len(letters) + 1):
            run = padded[start : start + length]
            if all(run[1:-1]):
                found.append((kind, polynomial(run)))
    words, word = list[int](), list[int]()
    for one in [*letters, 0]:
        if one:
            word.append(one)
        elif word:
            words.append(polynomial(word))
            word = []
    words = words[:MOST_WORDS]
    found += [(3, word) for word in words]
    found += [(4, (first * PAIR + second) % PRIME) for first, second in zip([1, *words], words, strict=False)]
    found += [(5, (first * SKIP % PRIME + second) % PRIME) for first, second in zip(words, words[2:], strict=False)]
    return sorted(number * SPREAD[kind] % PRIME % SLOTS for kind, number in found)


def seen(text: str, *beside: str) -> list[int]:
    """The slots that the graph finds in a text, whatever longer ones stand beside it."""
    return sorted(slot for slot in text_graph._slots([text, *beside])[0].tolist() if slot < SLOTS)


@pytest.mark.parametrize(
    "text",
    ["", "a", "Can't  stop, won't-stop!", "naïve café 42", "x" * 700, "so many words " * 40, "\x00 \x7f\n", "é" * 300],
)
def test_the_graph_finds_what_plain_python_finds(text: str) -> None:
    assert seen(text) == slots_of(text)
    assert seen(text, "something longer than that, " * 9) == slots_of(text)


@settings(max_examples=40)
@given(st.text(max_size=60))
def test_it_does_for_any_text(text: str) -> None:
    assert seen(text) == slots_of(text)


def test_the_ngrams_that_are_chosen_say_the_label() -> None:
    ngrams = NGrams.chosen(COLOURS, KINDS, 6)
    assert ngrams.count == 7
    assert ngrams.of(["red"]).any()
    assert ngrams.of(["blue"]).any()
    assert not ngrams.of(["door sky wine"]).any()  # each in one text alone
    assert ngrams.of(["", "red"]).shape[0] == 2


def test_of_ngrams_that_say_nothing_none_is_chosen() -> None:
    assert NGrams.chosen(["the same", "the same"], [0, 1], 50).count == 1


@pytest.mark.parametrize(
    ("texts", "labels", "count"),
    [([], [], 5), (["a"], [0, 1], 5), (["a"], [-1], 5), (["a"], [0], 0), (["a"], [0], 1 << 15)],
)
def test_what_cannot_be_chosen_from_is_refused(texts: list[str], labels: list[int], count: int) -> None:
    with pytest.raises(UsageError, match="were given; allowed"):
        NGrams.chosen(texts, np.array(labels, int), count)


@pytest.mark.parametrize("wrong", [{"width": 0}, {"left_out": 1.0}, {"dropout": -0.1}])
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="were given; allowed"):
        TextClassifier(NGrams.chosen(COLOURS, KINDS, 6), 2, **wrong)  # type: ignore[arg-type]  # that is the test


def test_it_learns_and_its_file_answers_the_same(tmp_path: Path) -> None:
    ngrams = NGrams.chosen(COLOURS, KINDS, 40)
    model = TextClassifier(ngrams, 2, width=8, hidden=16, left_out=0.1, dropout=0.0, seed=1)
    steps = torch.optim.Adam(model.parameters(), lr=0.02)
    ids = torch.from_numpy(ngrams.of(COLOURS))
    torch.manual_seed(0)
    for _ in range(60):
        steps.zero_grad()
        torch.nn.functional.cross_entropy(model(ids), torch.tensor(KINDS)).backward()
        steps.step()
    model.eval()
    texts = [*COLOURS, "A RED blue sky", "nothing of it", ""]
    with torch.inference_mode():
        wanted = model(torch.from_numpy(ngrams.of(texts))).numpy()
    assert wanted[:6].argmax(axis=1).tolist() == KINDS
    size = model.save(tmp_path / "colours.onnx")
    assert size == (tmp_path / "colours.onnx").stat().st_size
    found = predicted(tmp_path / "colours.onnx", texts)
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()  # int8 rows, float16 layers
    alone = np.concatenate([predicted(tmp_path / "colours.onnx", [text]) for text in texts])
    assert np.abs(found - alone).max() < 1e-5  # whatever stands beside a text


def predicted(path: Path, texts: list[str]) -> np.ndarray:
    async def ask() -> np.ndarray:
        net = OnnxNet(path)
        try:
            return (await net.predict({"text": as_bytes(texts)}))["logits"]
        finally:
            await net.close()

    return asyncio.run(ask())


def test_one_seed_makes_one_classifier() -> None:
    ngrams = NGrams.chosen(COLOURS, KINDS, 6)
    first, again, other = (TextClassifier(ngrams, 2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.table, again.table)
    assert torch.equal(first.outer.weight, again.outer.weight)
    assert not torch.equal(first.table, other.table)
