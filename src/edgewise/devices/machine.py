"""What the system says of this machine: cores, instruction sets, memory, and what the process may use of them.

A container's limits count: a cgroup (version 1 or 2) may grant less time and less memory than the machine has. What the
system does not tell is None.
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

SIMD_X86: Final = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
SIMD_ARM: Final = ("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme")
NO_LIMIT: Final = 1 << 60  # bytes; version 1 says a number above it where there is none


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`usable_cores` is how many threads can compute at once, `quota_cores` how much time the cgroup grants, in cores;
    `available_bytes` is what a program can have now without swapping."""

    cpu: str
    system: str
    cores: int
    physical_cores: int | None
    usable_cores: int
    quota_cores: float | None
    simd: tuple[str, ...]
    cache_bytes: int | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    available_bytes: int | None


def this_machine(root: Path = Path("/")) -> Machine:
    """`root` is where /proc and /sys lie."""
    cpu, memory = _facts(root / "proc/cpuinfo"), _facts(root / "proc/meminfo")
    limits = list(_memory_limits(root))
    free = _kilobytes(memory.get("MemAvailable"))
    return Machine(
        cpu=cpu.get("model name") or cpu.get("Model") or platform.processor() or platform.machine(),
        system=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count() or 1,
        physical_cores=_physical_cores(root),
        usable_cores=usable_cores(root),
        quota_cores=min(_quotas(root), default=None),
        simd=_simd(cpu),
        cache_bytes=_cache_bytes(root),
        memory_bytes=_kilobytes(memory.get("MemTotal")) or _pages_bytes(),
        memory_limit_bytes=min((limit for limit, _ in limits), default=None),
        available_bytes=min((left for left in (free, *(left for _, left in limits)) if left is not None), default=None),
    )


def usable_cores(root: Path = Path("/")) -> int:
    """Threads that can compute at once: the cores that the process may use, and no more than the cgroup's time for."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = min(_quotas(root), default=None)
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _facts(path: Path) -> dict[str, str]:
    """Lines `name: value`; of names that come again the last."""
    pairs = (line.split(":", 1) for line in (_text(path) or "").splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and re.fullmatch(r"-?\d{1,20}", text) else None


def _kilobytes(text: str | None) -> int | None:
    return int(text.split()[0]) * 1024 if text else None


def _pages_bytes() -> int | None:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None  # not Windows


def _physical_cores(root: Path) -> int | None:
    """Two threads of one core have one pair of numbers."""
    there = root.glob("sys/devices/system/cpu/cpu[0-9]*/topology")
    pairs = {(_number(core / "physical_package_id"), _number(core / "core_id")) for core in there}
    return len(pairs) or None


def _simd(cpu: Mapping[str, str]) -> tuple[str, ...]:
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    if flags:
        return tuple(flag for flag in (*SIMD_X86, *SIMD_ARM) if flag in flags)
    import numpy  # which asks the processor itself, where there is no /proc

    found = numpy.show_config(mode="dicts")["SIMD Extensions"]
    return tuple(name.lower() for name in (*found.get("baseline", []), *found.get("found", [])))


def _cache_bytes(root: Path) -> int | None:
    """The largest one that the first core has a part in."""
    sizes = (_text(path) or "" for path in root.glob("sys/devices/system/cpu/cpu0/cache/index*/size"))
    return max(
        (int(size[:-1]) << (20 if size[-1] == "M" else 10) for size in sizes if size[:-1].isdigit()), default=None
    )


# --- cgroups ---------------------------------------------------------------------------------------------------------


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Directories of the process's cgroups that may limit it, and of those around them."""
    base = root / "sys/fs/cgroup"
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        parts = PurePosixPath(path).parts[1:]
        top = base if number == "0" else base / controller if controller in controllers.split(",") else None
        if top is not None and ".." not in parts:
            yield from (top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _quotas(root: Path) -> Iterator[float]:
    for group in _groups(root, "cpu"):
        granted = re.fullmatch(r"(\d+) (\d+)", _text(group / "cpu.max") or "")
        quota, period = map(int, granted.groups()) if granted else _first_version(group)
        if quota > 0 and period > 0:
            yield quota / period


def _first_version(group: Path) -> tuple[int, int]:
    return _number(group / "cpu.cfs_quota_us") or 0, _number(group / "cpu.cfs_period_us") or 0


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """For each limit: it, and what is left of it. Pages of files that nobody uses can be had."""
    for group in _groups(root, "memory"):
        for limit_name, used_name, idle_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(group / limit_name), _number(group / used_name)
            if limit is not None and limit < NO_LIMIT and used is not None:
                idle = re.search(rf"^{idle_name} (\d+)$", _text(group / "memory.stat") or "", re.MULTILINE)
                yield limit, max(0, limit - used + int(idle[1] if idle else 0))
