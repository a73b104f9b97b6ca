"""The Python of an environment with every exporter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgewise.errors import MissingEnvironment
from edgewise.export.work.environments import target_python

CACHE = Path(__file__).parents[2] / ".cache"


@pytest.fixture(scope="session")
def export_python() -> Path:
    """Of the environment that `make test` has made, or the file named by EDGEWISE_TEST_EXPORT_PYTHON."""
    if given := os.environ.get("EDGEWISE_TEST_EXPORT_PYTHON"):
        return Path(given)
    try:
        return target_python("litert", CACHE)
    except MissingEnvironment as e:
        if os.environ.get("CI"):
            raise  # a run that proves nothing must not be green
        pytest.skip(f"{e.message}; `make test` makes it")
