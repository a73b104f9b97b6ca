"""What this machine reaches: memory read, arithmetic, disk, measured in rounds and kept under EDGEWISE_HOME.

Every round takes one sample of each figure in turn, so that a machine that slows down (clock, heat, neighbours) slows
all of them alike; a figure is the median of its samples with an interval. Runtimes are unknown here: what their kernels
reach comes from functions that the caller brings. docs/formats/host.md describes the file.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from edgewise import __version__
from edgewise.devices.machine import Machine, this_machine
from edgewise.devices.reading import Reading, reading

Kernel = Callable[[int], float]  # takes one sample of a rate or a time, computing with so many threads

FORMAT: Final = 1
NAME: Final = "host.json"
ENVIRONMENT: Final = {  # of a process that measures, before it loads numpy: one kernel per thread of ours
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}
ROUNDS, LEAST_ROUNDS = 25, 5
BUDGET_S: Final = 7.0  # for the rounds; fewer are taken on a slow machine
READ_BYTES: Final = 256 << 20  # at least; caches must not hold it
ROWS, SIDE = 512, 1024  # of the float32 product
DISK_BYTES: Final = 32 << 20
DISK_BLOCK: Final = 4 << 20
DISK_SAMPLE_S: Final = 0.05


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`figures` by name and number of threads; `unknown` says why a figure is not there."""

    format: int = FORMAT
    key: str
    date: str
    took_s: float
    machine: Machine
    figures: dict[str, dict[int, Reading]]
    unknown: dict[str, str]

    def rate(self, name: str, threads: int | None = None) -> Reading | None:
        """With so many threads, or with the most that were measured."""
        by_threads = self.figures.get(name, {})
        return by_threads.get(max(by_threads, default=0) if threads is None else threads)


def probe(kernels: Mapping[str, Kernel], disk: Path, key: str = "") -> Host:
    """Measure, in about ten seconds: our own kernels with 1, 2, 4, … threads, those that are brought with all of them,
    and the disk that holds the directory. A brought one is named with its unit, e.g. `native_handover_s`."""
    begun = time.perf_counter()
    machine = this_machine()
    tasks = {(name, threads): kernel for name, kernel in own_kernels(machine).items() for threads in _steps(machine)}
    tasks |= {(name, machine.usable_cores): kernel for name, kernel in kernels.items()}
    unknown: dict[str, str] = {}
    with ExitStack() as stack:
        try:
            tasks["disk_read_bytes_per_s", 1] = stack.enter_context(_disk_kernel(disk))
        except OSError as e:
            unknown["disk_read_bytes_per_s"] = e.strerror or str(e)
        samples = _in_rounds({task: _call(kernel, task[1]) for task, kernel in tasks.items()})
    figures: dict[str, dict[int, Reading]] = {}
    for (name, threads), found in samples.items():
        figures.setdefault(name, {})[threads] = reading(name, found)
    return Host(
        key=key,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        took_s=round(time.perf_counter() - begun, 3),
        machine=machine,
        figures=figures,
        unknown=unknown,
    )


def _steps(machine: Machine) -> list[int]:
    """Numbers of threads to measure with."""
    doubled = [1 << power for power in range(machine.usable_cores.bit_length())]
    return sorted({*doubled, machine.usable_cores})


def _call(kernel: Kernel, threads: int) -> Callable[[], float]:
    return lambda: kernel(threads)


def _in_rounds(tasks: Mapping[Any, Callable[[], float]]) -> dict[Any, list[float]]:
    """Samples of each task, one per round. The first round is not counted: it fills caches and tells what one costs."""
    begun = time.perf_counter()
    for take in tasks.values():
        take()
    rounds = max(LEAST_ROUNDS, min(ROUNDS, int(BUDGET_S / (time.perf_counter() - begun))))
    samples: dict[Any, list[float]] = {task: [] for task in tasks}
    for _ in range(rounds):
        for task, take in tasks.items():
            samples[task].append(take())
    return samples


# --- our own kernels -------------------------------------------------------------------------------------------------


def beyond_caches(machine: Machine) -> int:
    """Bytes that no cache of the machine holds, and that there is room for."""
    wanted = max(READ_BYTES, 4 * (machine.cache_bytes or 0))
    return wanted if machine.available_bytes is None else min(wanted, machine.available_bytes // 8)


def own_kernels(machine: Machine) -> dict[str, Kernel]:
    """Memory read: float32 dot products over an array far larger than the caches, a part of it for each thread.
    float32: a matrix product that stays in the caches, one for each thread. Wants ENVIRONMENT."""
    pool = ThreadPoolExecutor(machine.cores)
    everything = np.ones(beyond_caches(machine) // 4, np.float32)
    left, right = np.ones((ROWS, SIDE), np.float32), np.ones((SIDE, SIDE), np.float32)

    def read_bytes_per_s(threads: int) -> float:
        parts = np.array_split(everything, threads)
        return everything.nbytes / _seconds(lambda: list(pool.map(lambda part: np.dot(part, part), parts)))

    def fp32_mac_per_s(threads: int) -> float:
        times = range(threads)
        return threads * ROWS * SIDE * SIDE / _seconds(lambda: list(pool.map(lambda _: left @ right, times)))

    return {"read_bytes_per_s": read_bytes_per_s, "fp32_mac_per_s": fp32_mac_per_s}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def _disk_kernel(directory: Path) -> Iterator[Kernel]:
    """Reads a file of ours past the system's cache. OSError that says why where that cannot be done."""
    if sys.platform != "linux":
        raise OSError("only Linux lets a program read past its cache")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".probe.{os.getpid()}"
    try:
        _write(path)
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, DISK_BLOCK) as block:
                os.preadv(file, [block], 0)  # some file systems open for it and then refuse
                yield _disk_reader(file, block)
        finally:
            os.close(file)
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path) -> None:
    part = np.random.default_rng(0).bytes(DISK_BLOCK)  # a file of zeros may not be on the disk at all
    with path.open("wb") as file:
        for _ in range(DISK_BYTES // DISK_BLOCK):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _disk_reader(file: int, block: mmap.mmap) -> Kernel:
    """Samples of at least DISK_SAMPLE_S, block after block, over and over."""
    at = 0

    def disk_read_bytes_per_s(threads: int) -> float:
        nonlocal at
        done, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < DISK_SAMPLE_S:
            done += os.preadv(file, [block], at)
            at = (at + DISK_BLOCK) % DISK_BYTES
        return done / passed

    return disk_read_bytes_per_s


# --- kept ------------------------------------------------------------------------------------------------------------


def key_of(machine: Machine, kernels: str | None) -> str:
    """What figures hold for: this machine as the process sees it, this version, and those kernels."""
    lasting = msgspec.structs.replace(machine, available_bytes=None)
    told = msgspec.json.encode([FORMAT, __version__, kernels, lasting])
    return hashlib.sha256(told).hexdigest()[:16]


def kept(home: Path, key: str) -> Host | None:
    """What was measured before under that key; None if there is nothing, or nothing readable."""
    try:
        found = msgspec.json.decode((home / NAME).read_bytes(), type=Host)
    except (OSError, ValueError):
        return None
    return found if (found.format, found.key) == (FORMAT, key) else None


def keep(host: Host, home: Path) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    path = home / NAME
    part = path.with_name(f".{NAME}.{os.getpid()}")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(host), indent=1) + b"\n")
    part.replace(path)  # a reader never meets half a file
    return path
