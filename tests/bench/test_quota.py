"""Processes with a share of the time: counted by the kernel, not timed by us."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from edgewise.bench.quota import quota
from edgewise.errors import UsageError

BUSY = "import time; input(); end = time.process_time() + 0.1\nwhile time.process_time() < end: pass"


def test_a_group_is_held_back_and_gone_afterwards() -> None:
    try:
        with quota(0.25) as group:
            assert group.throttled == 0
            with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE) as process:
                group.add(process.pid)
                process.communicate(b"\n")
            assert group.throttled >= 10  # 100 ms of work, 2.5 ms a period
            place = group.group
    except UsageError as e:
        pytest.skip(str(e))
    assert not place.exists()


def test_a_whole_core_is_no_hindrance() -> None:
    try:
        with quota(8) as group:
            with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
                group.add(process.pid)
                time.sleep(0.05)
                process.communicate(b"\n")
            assert group.throttled == 0
    except UsageError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("cores", [0, -1, 5000])
def test_impossible_quotas_are_refused(cores: float) -> None:
    with pytest.raises(UsageError, match="allowed"), quota(cores):
        pass
