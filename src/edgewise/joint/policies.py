"""Policy files of a running node: the one for its pair of models, read again when it changes.

A file that cannot be read, is damaged or was fitted on other models never takes effect. While a good one was in force
it stays; where there never was one, everything goes to the cloud, which breaks no promise about answers of the edge.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgewise.errors import ConfigError
from edgewise.joint.pair import Pair, mismatch
from edgewise.joint.policy import Policy

log = logging.getLogger(__name__)

LOOK_AGAIN_S: Final = 1.0
KEEPS_NOTHING: Final = 1.0  # a threshold that no worth is above
State = tuple[tuple[str, int, int], ...]  # names, times and sizes of the files


@dataclass(frozen=True)
class Fault:
    """Why a file is not in force."""

    path: Path
    reason: str


class Policies:
    """What `path` holds for the models `here`: one policy file, or a directory of which the newest `.json` file that
    was fitted on them counts. `current` may be called for each request: it looks at most once a second. ConfigError if
    `path` is no directory and, now, no policy either."""

    def __init__(self, path: Path, here: Pair | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._here = here
        self._clock = clock
        self._looked = clock()
        self._state = self._seen()
        self._policy = Policy.default().with_threshold(KEEPS_NOTHING)
        self._proper = False  # whether the policy in force came from a file
        check(path)
        self._read()

    def current(self) -> Policy:
        now = self._clock()
        if now - self._looked >= LOOK_AGAIN_S:
            self._looked = now
            state = self._seen()
            if state != self._state:
                self._state = state
                self._read()
        return self._policy

    def _read(self) -> None:
        faults = []
        for path in self._files():
            found = opened(path, self._here)
            if isinstance(found, Policy):
                self._policy, self._proper = found, True
                log.info("policy %s is in force", path.name)
                return
            faults.append(found)
        for fault in faults or [Fault(self._path, "there is no policy file")]:
            log.warning("policy %s does not take effect: %s", fault.path.name, fault.reason)
        log.warning("in force is %s", "the policy before" if self._proper else "that every answer comes from the cloud")

    def _files(self) -> list[Path]:
        """The newest first."""
        if not self._path.is_dir():
            return [self._path]
        return sorted(self._path.glob("*.json"), key=lambda path: (-_stat(path)[1], path.name))

    def _seen(self) -> State:
        return tuple(_stat(path) for path in self._files())


def check(path: Path) -> None:
    """Whoever names one file at the start must hear that it is none: ConfigError."""
    if not path.is_dir():
        Policy.open(path)


def opened(path: Path, here: Pair | None) -> Policy | Fault:
    """The policy in that file, or why it must not decide for these models."""
    try:
        policy = Policy.open(path)
    except ConfigError as error:
        return Fault(path, str(error))
    stranger = None if here is None else mismatch(policy.pair, here)
    return policy if stranger is None else Fault(path, stranger)


def _stat(path: Path) -> tuple[str, int, int]:
    try:
        found = path.stat()
    except OSError:
        return path.name, 0, -1
    return path.name, found.st_mtime_ns, found.st_size
