"""Which layers a shallow student begins with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from edgewise.compress.student.depth import needed_layers
from edgewise.errors import UsageError
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from edgewise.types import IdArray
from tiny import VOCAB, save_gguf, save_hf, tiny

LAYERS = 5
QUIET = 2  # the layer that does nothing


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = tiny("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        for matrix in (made.model.layers[QUIET].self_attn.o_proj, made.model.layers[QUIET].mlp.down_proj):
            matrix.weight.zero_()
    return made


@pytest.fixture(scope="module")
def bundle(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    home = tmp_path_factory.mktemp("home")
    path = save_gguf(model, home / "deep.gguf", gguf.GGMLQuantizationType.Q8_0)
    return pull(str(path), home=home, name="deep")


def texts(model: PreTrainedModel) -> list[IdArray]:
    """What the model itself says, so that its layers are of use."""
    torch.manual_seed(1)
    found = []
    for length in (24, 17):
        ids = torch.randint(0, VOCAB, (1, 1))
        for _ in range(length - 1):
            step = torch.softmax(model(ids).logits[0, -1], -1)
            ids = torch.cat([ids, torch.multinomial(step, 1)[None]], 1)
        found.append(ids[0].numpy().astype(np.int64))
    return found


def loss(model: PreTrainedModel, layers: Sequence[int], windows: Sequence[IdArray]) -> float:
    whole = model.model.layers
    model.model.layers = torch.nn.ModuleList(whole[n] for n in layers)
    model.config.num_hidden_layers = len(layers)
    total = 0.0
    with torch.no_grad():
        for ids in windows:
            row = torch.from_numpy(ids)[None]
            logits = model(row, use_cache=False).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
    model.model.layers = whole
    model.config.num_hidden_layers = LAYERS
    return total / sum(len(ids) - 1 for ids in windows)


def test_the_layer_that_does_nothing_goes_first(bundle: Bundle, model: PreTrainedModel) -> None:
    told: list[tuple[str, int, int]] = []
    found = needed_layers(bundle, texts(model), LAYERS - 1, lambda *of: told.append(of))
    assert found == [n for n in range(LAYERS) if n != QUIET]
    assert told == [("choosing layers", 0, 1), ("choosing layers", 1, 1)]


@torch.no_grad()
def test_each_that_goes_is_the_one_that_is_missed_least(bundle: Bundle, model: PreTrainedModel) -> None:
    windows, left = texts(model), list(range(LAYERS))
    while len(left) > 2:
        left = list(min(combinations(left, len(left) - 1), key=lambda some: loss(model, some, windows)))
        assert needed_layers(bundle, windows, len(left), lambda *of: None) == left


def test_layers_that_run_together_are_not_chosen_among(tmp_path: Path, model: PreTrainedModel) -> None:
    floats = pull(str(save_hf(model, tmp_path / "model")), home=tmp_path, name="floats")
    assert needed_layers(floats, texts(model), 2, lambda *of: None) is None


def test_all_are_all(bundle: Bundle) -> None:
    assert needed_layers(bundle, [], LAYERS, lambda *of: None) == list(range(LAYERS))


@pytest.mark.parametrize(("count", "what"), [(0, "0 layers"), (LAYERS + 1, "6 layers"), (2, "0 texts")])
def test_what_cannot_be_is_refused(bundle: Bundle, count: int, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        needed_layers(bundle, [], count, lambda *of: None)
