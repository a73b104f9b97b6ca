"""A tiny model as its source and as a bundle."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from tiny import save_gguf, tiny


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tiny("llama"), tmp_path_factory.mktemp("bench") / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pull(str(tiny_gguf), home=tmp_path_factory.mktemp("home"))
