"""Slower devices on this one: processes with a share of a core's time, by the kernel's own accounting (cgroup 1, 2).

What runs so is emulated: it has a slow device's arithmetic and this machine's memory and caches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgewise.errors import UsageError

PERIOD_US: Final = 10_000  # short: a process that has used its time waits for the rest of a period
ROOT: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Quota:
    """A group of processes that share so many cores' time."""

    group: Path
    cores: float

    def add(self, pid: int) -> None:
        """This process, all its threads, and the children that it starts from now on."""
        (self.group / "cgroup.procs").write_text(str(pid))

    @property
    def throttled(self) -> int:
        """Periods in which the group had to wait."""
        lines = (line.split() for line in (self.group / "cpu.stat").read_text().splitlines())
        return next(int(count) for name, count in lines if name == "nr_throttled")


@contextmanager
def quota(cores: float) -> Iterator[Quota]:
    """A group that ends with the block; its processes must have ended by then. UsageError where this system gives none
    to us: it needs Linux, and the right to make cgroups."""
    if not 0.01 <= cores <= 1024:
        raise UsageError(f"a quota of {cores:g} cores was asked for", hint="0.01 to 1024 are allowed")
    group = _made(f"edgewise-{os.getpid()}-{time.monotonic_ns()}")
    try:
        _limit(group, cores)
        yield Quota(group, cores)
    finally:
        _remove(group)


def _made(name: str) -> Path:
    for base in (ROOT / "cpu", ROOT / "unified", ROOT):
        if (base / "cgroup.procs").exists():
            with suppress(OSError):
                (base / name).mkdir()
                if (base / name / "cpu.max").exists() or (base / name / "cpu.cfs_quota_us").exists():
                    return base / name
                (base / name).rmdir()
    raise UsageError(f"no cgroup with a quota of time can be made under {ROOT}", hint="run it as root, on Linux")


def _limit(group: Path, cores: float) -> None:
    micros = max(1000, round(cores * PERIOD_US))
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{micros} {PERIOD_US}")
    else:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(micros))


def _remove(group: Path) -> None:
    """A process that has just ended is counted for a moment yet."""
    for _ in range(100):
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.02)
