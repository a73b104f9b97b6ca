"""A real bundle, real workers in processes of their own, and edges that ask them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import gguf
import pytest

from edgewise.engines.decode import Decoder
from edgewise.engines.load import local_model
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from edgewise.models.tokenizer import Tokenizer
from split.edges import CONTEXT
from tiny import save_gguf, tiny


class WorkerProcess:
    """`edgewise split serve`, on a port of its own that it keeps when it is started again."""

    def __init__(self, model: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self._command = [sys.executable, "-m", "edgewise.cli.main", "split", "serve", "--model", str(model), *flags]
        self._env = os.environ | (env or {})
        self.port = 0
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [*self._command, "--port", str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._env,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            raise AssertionError(self._process.stderr.read())
        self.url: str = json.loads(line)["url"]
        self.port = int(self.url.rsplit(":", 1)[1])

    def kill(self) -> None:
        """As a crash or the kernel would."""
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.communicate(timeout=20)


@pytest.fixture(scope="session")
def bundle(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pull(str(smollm2_gguf), home=tmp_path_factory.mktemp("home"), name="smollm2")


@pytest.fixture(scope="session")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.open(bundle.path)


@pytest.fixture
async def whole(bundle: Bundle, tokenizer: Tokenizer) -> AsyncIterator[Decoder]:
    """The same model in one piece."""
    decoder = Decoder(local_model(bundle, slots=4, context=CONTEXT), tokenizer)
    yield decoder
    await decoder.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random model of six layers, for what would take too long with the other."""
    source = tmp_path_factory.mktemp("small") / "small.gguf"
    save_gguf(tiny("llama", num_hidden_layers=6), source, gguf.GGMLQuantizationType.Q4_0)
    return pull(str(source), home=source.parent / "home", name="small")


@pytest.fixture
def start_worker(bundle: Bundle) -> Iterator[Callable[..., WorkerProcess]]:
    """`start_worker("--layers", "10:30")`: it ends with the test."""
    started: list[WorkerProcess] = []

    def start(*flags: str, model: Path = bundle.path) -> WorkerProcess:
        started.append(WorkerProcess(model, *flags))
        return started[-1]

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture(scope="session")
def worker(bundle: Bundle) -> Iterator[WorkerProcess]:
    """One that no test disturbs."""
    process = WorkerProcess(bundle.path)
    yield process
    process.stop()
