"""This machine's figures (devices/host.py), measured with the kernels that models run on, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edgewise.bench.turns import in_fresh_process
from edgewise.devices.host import ENVIRONMENT, Host, Kernel, beyond_caches, keep, kept, key_of, probe
from edgewise.devices.machine import Machine, this_machine
from edgewise.engines import native_probe
from edgewise.engines.local import set_threads

PATIENCE_S = 60.0  # ten seconds are usual


def measured_host(home: Path, *, fresh: bool = False) -> Host:
    """What is kept under `home`, or measured now (seconds) and kept: with `fresh`, when nothing is there, and when the
    machine, our version or our kernels are others. EngineError if the process that measures fails."""
    key = key_of(this_machine(), native_probe.version())
    found = None if fresh else kept(home, key)
    if found is None:
        job = {"turn": "host", "home": str(home), "key": key}
        answer = in_fresh_process(job, timeout_s=PATIENCE_S, environment=ENVIRONMENT)
        found = msgspec.convert(answer, Host, strict=False)  # in JSON the numbers of threads are strings
        keep(found, home)
    return found


def measure(home: Path, key: str) -> dict[str, Any]:
    """Take all samples in this process; for the worker."""
    machine = this_machine()
    host: dict[str, Any] = msgspec.to_builtins(probe(kernels(machine, machine.usable_cores), home, key), str_keys=True)
    return host


def kernels(machine: Machine, threads: int) -> dict[str, Kernel]:
    """Those that models run on here, for so many threads: our own, or where there are none onnxruntime's."""
    set_threads(threads)
    return native_probe.kernels(beyond_caches(machine) // 2) or _onnxruntime_kernels()


def _onnxruntime_kernels() -> dict[str, Kernel]:
    from edgewise.engines import onnx_probe  # heavy

    return onnx_probe.kernels()
