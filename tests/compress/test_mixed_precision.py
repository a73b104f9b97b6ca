"""Precisions chosen under a budget: the arithmetic against brute force, the measured costs on a tiny model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.compress.quantize import mixed
from edgewise.compress.quantize.mixed import Option, chosen, matrix_bytes, names
from edgewise.compress.quantize.recipe import Mixed, Recipe
from edgewise.compress.quantize.rewrite import rewritten
from edgewise.models.model_source import ModelSource
from edgewise.models.source import open_source
from edgewise.models.weights import Quantized
from tiny import VOCAB, save_hf, tiny

OPTION = st.builds(
    Option, st.just("int4"), st.integers(1, 9).map(lambda pages: pages * mixed.PAGE), st.integers(0, 20).map(float)
)
OPTIONS = st.lists(st.lists(OPTION, min_size=1, max_size=3), min_size=1, max_size=6)


@given(OPTIONS, st.integers(0, 40).map(lambda pages: pages * mixed.PAGE + 17))
def test_the_choice_is_the_best_of_all(options: list[list[Option]], budget: int) -> None:
    fitting = [those for those in itertools.product(*options) if sum(o.bytes for o in those) <= budget]
    found = chosen({str(n): those for n, those in enumerate(options)}, budget)
    if not fitting:
        assert found is None
        return
    assert found is not None
    assert list(found) == [str(n) for n in range(len(options))]
    assert all(found[str(n)] in those for n, those in enumerate(options))
    assert sum(o.bytes for o in found.values()) <= budget
    assert sum(o.cost for o in found.values()) == min(sum(o.cost for o in those) for those in fitting)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_source(save_hf(tiny("llama"), tmp_path_factory.mktemp("hf")))


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(5).integers(0, VOCAB, (4, 64))


@pytest.fixture(scope="module")
def options(model: ModelSource, ids: np.ndarray) -> dict[str, list[Option]]:
    return mixed.options(model, ids, ("exact", "int8", "int4-minima", "int4"), names(model.card), lambda *_: None)


def test_every_matrix_has_its_costs(model: ModelSource, options: dict[str, list[Option]]) -> None:
    assert [*options] == names(model.card)
    assert [*options][:6] == ["embed", "layer0.qkv", "layer0.o", "layer0.gate_up", "layer0.down", "layer1.qkv"]
    for those in options.values():
        exact, eight, _, four = those
        assert exact.cost == 0
        assert 0 < eight.cost < four.cost / 50  # a sixteenth of the step, squared: 1/256
        assert exact.bytes >= eight.bytes >= four.bytes  # whole pages, and these matrices are small
    exact, eight, minima, four = (option.bytes for option in options["embed"])
    assert exact > eight > minima > four


def test_costs_of_other_precisions_follow_from_one(
    model: ModelSource, ids: np.ndarray, options: dict[str, list[Option]]
) -> None:
    """What is foretold for a matrix of 8 bits is what comes of it, and costs of matrices add up."""

    def kl_of(precisions: dict[str, str]) -> float:
        recipe = Recipe(1, matrices={"*": "exact", **precisions})
        wanted = {name: p for name, p in recipe.precisions(names(model.card)).items() if p is not None}
        survey = mixed._Survey(model, ids)
        other = mixed._Survey(rewritten(model, recipe, wanted, None, lambda *_: None), ids)
        expected, found = (one._logits(next(_inputs_of_head(one)), one._head) for one in (survey, other))
        return mixed._mean_kl(expected, found)

    for name in ("layer0.gate_up", "layer2.o"):
        assert kl_of({name: "int8"}) == pytest.approx(options[name][1].cost, rel=0.5)
    together = kl_of({"layer0.*": "int4"})
    foretold = sum(options[f"layer0.{group}"][3].cost for group in ("qkv", "o", "gate_up", "down"))
    assert together == pytest.approx(foretold, rel=0.5)


def _inputs_of_head(survey: mixed._Survey):
    hidden = mixed.embedded(survey._card, survey._table, survey._ids)
    for n in range(survey._card.layers):
        hidden = survey._through(n, hidden)
    yield mixed.head_input(survey._card, survey._norm, hidden)


def test_sizes_are_those_of_the_matrices(model: ModelSource) -> None:
    recipe = Recipe(1, matrices={"*": "int4", "layer1.*": "int8", "layer2.*": "int4-minima"})
    precisions = {name: p for name, p in recipe.precisions(names(model.card)).items() if p is not None}
    made = rewritten(model, recipe, precisions, None, lambda *_: None)
    for name, precision in precisions.items():
        found = mixed.parts(made, name)
        assert all(isinstance(part, Quantized) for part in found)
        arrays = zip(*(part.arrays for part in found if isinstance(part, Quantized)), strict=True)
        size = sum(mixed.pages(sum(a.nbytes for a in same)) for same in arrays)
        shape = (sum(part.shape[0] for part in found), found[0].shape[1])
        assert matrix_bytes(shape, precision) == size


def test_defaults_are_choices_of_a_recipe() -> None:
    assert Mixed().choices == ("int8", "int4-minima", "int4")
