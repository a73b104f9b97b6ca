"""Waiting for what another process does, on Linux."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def ended(process: int) -> bool:
    def gone() -> bool:
        try:
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    return until(gone)


def until(happened: Callable[[], bool]) -> bool:
    """Within half a minute."""
    for _ in range(300):
        if happened():
            return True
        time.sleep(0.1)
    return False
