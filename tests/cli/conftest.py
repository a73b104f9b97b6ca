"""The command line, called in this process: arguments in; exit code, stdout and stderr out."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from calling import Cli, Outcome

from edgewise.cli.main import run
from edgewise.models.source import pull
from tiny import save_gguf, tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama as a GGUF file."""
    return save_gguf(tiny("llama"), tmp_path_factory.mktemp("model") / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0)


@pytest.fixture(scope="session")
def stocked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that holds the bundle `tiny`. Tests only read it."""
    home = tmp_path_factory.mktemp("home")
    pull(str(model), home=home)
    return home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of the test's own, in force."""
    monkeypatch.setenv("EDGEWISE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def cli(home: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def in_stock(cli: Cli, stocked: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line with the bundle `tiny` at hand."""
    monkeypatch.setenv("EDGEWISE_HOME", str(stocked))
    return cli
