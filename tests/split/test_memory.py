"""An edge that cannot hold the whole model does not hold it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgewise.engines import native_lm
from edgewise.engines.packed import DATA
from edgewise.models.bundle import Bundle
from split.conftest import WorkerProcess

EDGE = """
import asyncio, sys
from pathlib import Path
from edgewise.engines.load import local_model
from edgewise.engines.base import Row
from edgewise.models.bundle import Bundle
from edgewise.split.channel import Way
from edgewise.split.model import SplitModel, SplitOptions
import numpy as np

async def main():
    bundle = Bundle.open(Path(sys.argv[1]), check=False)
    engine = local_model(bundle, slots=1, context=256)
    engine.give_back()
    model = SplitModel(engine, bundle.weights, [Way(sys.argv[2])], SplitOptions(5, "exact", tail=False))
    await model.open("s", 256)
    for n in range(20):
        await model.forward([Row("s", n, np.array([n]), best=1)])
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssFile")))
    await model.shutdown()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what memory is a file's")
def test_the_weights_of_the_other_layers_are_not_in_memory(bundle: Bundle, worker: WorkerProcess) -> None:
    if native_lm.probe() is None:
        pytest.skip("the native kernels are not built for this machine")
    packed = bundle.path / DATA  # the worker has made it
    command = [sys.executable, "-c", EDGE, str(bundle.path), worker.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    libraries = sum(p.stat().st_size for p in Path(native_lm.LIBRARY).parent.glob("*.so")) + (24 << 20)
    assert int(done.stdout) * 1024 < 0.35 * packed.stat().st_size + libraries
