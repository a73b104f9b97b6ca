from pathlib import Path

import pytest

from edgewise.models.bundle import Bundle
from edgewise.models.source import pull


@pytest.fixture(scope="session")
def bundle(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pull(str(smollm2_gguf), home=tmp_path_factory.mktemp("home"), name="smollm2")
