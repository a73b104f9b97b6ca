"""What this machine is and reaches: the system's files read, containers minded, figures measured and kept."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from edgewise.bench.host import measured_host
from edgewise.devices import host as hosts
from edgewise.devices.host import Host, keep, kept, key_of, own_kernels, probe
from edgewise.devices.machine import this_machine, usable_cores
from edgewise.devices.reading import reading
from edgewise.engines import native_probe

MEMINFO = "MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable: 8000000 kB\n"
CPUINFO = "processor: 0\nmodel name: Some CPU\nflags: fpu avx2 fma avx_vnni\n"
MANY = 1 << 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of a system whose process is in the cgroup /outer/inner of version 2."""
    return write(tmp_path, {"proc/cpuinfo": CPUINFO, "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/outer/inner\n"})


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_the_system_tells(root: Path) -> None:
    found = this_machine(root)
    assert (found.cpu, found.simd) == ("Some CPU", ("avx2", "fma", "avx_vnni"))
    assert (found.memory_bytes, found.available_bytes) == (16_000_000 * 1024, 8_000_000 * 1024)
    assert (found.quota_cores, found.memory_limit_bytes) == (None, None)


def test_a_system_that_tells_nothing_is_unknown_and_no_error(tmp_path: Path) -> None:
    found = this_machine(tmp_path)
    assert (found.available_bytes, found.quota_cores, found.cache_bytes, found.physical_cores) == (None,) * 4
    assert found.cores >= found.usable_cores >= 1


@pytest.mark.parametrize(
    ("inner", "outer", "quota", "cores"),
    [
        ("max 100000", "max 100000", None, None),
        ("150000 100000", "max 100000", 1.5, None),
        ("max 100000", "50000 100000", 0.5, 1),
        ("400000 100000", "100000 100000", 1.0, 1),
        ("nonsense", "", None, None),
    ],
)
def test_the_least_quota_of_nested_cgroups_counts(
    root: Path, inner: str, outer: str, quota: float | None, cores: int | None
) -> None:
    write(root, {"sys/fs/cgroup/outer/inner/cpu.max": inner, "sys/fs/cgroup/outer/cpu.max": outer})
    assert this_machine(root).quota_cores == quota
    assert usable_cores(root) == this_machine(root).usable_cores
    assert cores is None or usable_cores(root) == cores


def test_a_cgroup_of_the_first_version(root: Path) -> None:
    write(
        root,
        {
            "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1000000000",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "700000000",
            "sys/fs/cgroup/memory/box/memory.stat": "cache 5\ntotal_inactive_file 100000000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str((1 << 63) - 4096),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "5",
        },
    )
    found = this_machine(root)
    assert (found.quota_cores, found.usable_cores) == (1.0, 1)
    assert (found.memory_limit_bytes, found.available_bytes) == (1_000_000_000, 400_000_000)


def test_the_memory_that_a_container_has_left(root: Path) -> None:
    write(
        root,
        {
            "sys/fs/cgroup/outer/inner/memory.max": "max",
            "sys/fs/cgroup/outer/inner/memory.current": "5",
            "sys/fs/cgroup/outer/memory.max": "2000000000",
            "sys/fs/cgroup/outer/memory.current": "500000000",
        },
    )
    found = this_machine(root)
    assert (found.memory_limit_bytes, found.available_bytes) == (2_000_000_000, 1_500_000_000)


def test_a_reading_is_a_median_with_an_interval() -> None:
    few, many = reading("x_ms", [3, 1, 2]), reading("x_bytes_per_s", range(1, 101))
    assert (few.median, few.low, few.high, few.unit) == (2, 1, 3, "ms")
    assert (many.median, many.unit) == (50.5, "B/s")
    assert 38 <= many.low < 45
    assert 56 < many.high <= 63


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BUDGET_S": 0.2, "READ_BYTES": 1 << 20, "DISK_BYTES": 8 << 20, "ROWS": 16, "SIDE": 64}.items():
        monkeypatch.setattr(hosts, name, value)


@pytest.mark.usefixtures("quick")
def test_a_probe_takes_every_figure_in_turn(tmp_path: Path) -> None:
    order: list[str] = []

    def brought(name: str) -> hosts.Kernel:
        numbers = itertools.count(1)

        def kernel(threads: int) -> float:
            order.append(name)
            return float(next(numbers))

        return kernel

    found = probe({"a_s": brought("a"), "b_s": brought("b")}, tmp_path / "disk")
    assert order == ["a", "b"] * (len(order) // 2)
    samples = found.rate("a_s")
    assert samples is not None
    assert samples.samples == tuple(float(n) for n in range(2, len(order) // 2 + 1))  # the first does not count
    assert set(found.figures) >= {"read_bytes_per_s", "fp32_mac_per_s"}
    assert "disk_read_bytes_per_s" in {**found.figures, **found.unknown}
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_figures_are_kept_for_this_machine_and_these_kernels_alone(tmp_path: Path) -> None:
    machine = this_machine()
    key = key_of(machine, "1")
    assert key == key_of(msgspec.structs.replace(machine, available_bytes=5), "1")  # which changes all the time
    assert key != key_of(machine, "2") != key_of(msgspec.structs.replace(machine, usable_cores=77), "2")
    host = probe({}, tmp_path, key)
    keep(host, tmp_path)
    assert kept(tmp_path, key) == host
    assert kept(tmp_path, "another") is None
    for damage in (b"", b"{}", b"\xff", (tmp_path / "host.json").read_bytes()[:-9]):
        (tmp_path / "host.json").write_bytes(damage)
        assert kept(tmp_path, key) is None


def test_memory_is_read_beyond_the_caches_and_within_what_is_there() -> None:
    machine = msgspec.structs.replace(this_machine(), cache_bytes=1 << 30, available_bytes=MANY)
    assert hosts.beyond_caches(machine) == 4 << 30
    assert hosts.beyond_caches(msgspec.structs.replace(machine, available_bytes=8 << 20)) == 1 << 20
    assert set(own_kernels(msgspec.structs.replace(machine, available_bytes=8 << 20))) == {
        "read_bytes_per_s",
        "fp32_mac_per_s",
    }


def test_our_kernels_show_what_models_will_reach() -> None:
    kernels = native_probe.kernels(4 << 20)
    if native_probe.version() is None:
        assert kernels == {}
        return
    for name, kernel in kernels.items():
        assert kernel(1) > 0, name
    assert {"native_handover_s", "native_q4_decode_bytes_per_s", "native_q8_prefill_mac_per_s"} <= set(kernels)


def test_a_host_is_measured_in_a_process_of_its_own_and_then_read(tmp_path: Path) -> None:
    first = measured_host(tmp_path)
    assert isinstance(first, Host)
    assert first.took_s < 30
    assert measured_host(tmp_path) == first
