"""Taking turns: contestants one after the other, round after round, each turn a fresh process that is watched.

Drift of the machine (clock, temperature, neighbours) then meets all contestants alike, and ratios are taken within a
round. A turn that crashes, hangs or breaks its promise ends its contestant's part, not the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewise.errors import EngineError

WORKER = "edgewise.bench.worker"
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}  # else the words before a crash are lost
PAUSE_S = 1.0
TAIL = 400  # characters of a failed process's last words


class TurnFailed(EngineError):
    """A turn's process crashed, hung or said no; the message is the reason, for the report."""


@dataclass(frozen=True, slots=True)
class Taken:
    """One contestant's turns: a result for each round; `failed` says why there are fewer."""

    results: list[dict[str, Any]]
    failed: str | None = None


def take_turns(
    names: Sequence[str], rounds: int, turn: Callable[[str, int], dict[str, Any]], pause_s: float = PAUSE_S
) -> dict[str, Taken]:
    """`turn(name, round)` for A, B, C, A, B, C, …, each after a pause: the system is still busy with what a process of
    many threads and much memory left. Whoever raises TurnFailed is not asked again."""
    taken = {name: Taken([]) for name in names}
    for number in range(rounds):
        for name in names:
            if taken[name].failed is None:
                time.sleep(pause_s)
                try:
                    taken[name].results.append(turn(name, number))
                except TurnFailed as e:
                    taken[name] = Taken(taken[name].results, e.message)
    return taken


def in_fresh_process(
    job: Mapping[str, Any], *, timeout_s: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What the worker makes of the job. Libraries print where they like, so the answer comes in a file. TurnFailed if
    the process fails, or is killed with all its children after `timeout_s`."""
    with tempfile.TemporaryDirectory(prefix="edgewise-bench-") as folder:
        answer, words = Path(folder) / "answer.json", Path(folder) / "words"
        with words.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(answer)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env={**os.environ, **UNBUFFERED, **(environment or {})},
                start_new_session=True,
            )
            ended = _watch(process, {**job, "started_s": time.monotonic()}, timeout_s)
        if not ended:
            raise TurnFailed(f"no answer within {timeout_s:g} s; its process was killed")
        if not answer.is_file():
            raise TurnFailed(_last_words(process.returncode, words.read_text(errors="replace")))
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if "failed" in found:
        raise TurnFailed(found["failed"])
    return found


def _watch(process: subprocess.Popen[bytes], job: Mapping[str, Any], timeout_s: float) -> bool:
    """Hand over the job and wait; false if the time ran out. No process of the turn is left in any case."""
    try:
        process.communicate(json.dumps(job).encode(), timeout=timeout_s)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it and its children are gone
            pass
        except PermissionError:  # macOS says so of a group that has only a zombie left
            pass
    else:
        process.kill()
    process.wait()


def _last_words(code: int, words: str) -> str:
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    last = " ".join(words.split())[-TAIL:]
    return f"its process {how}" + (f": … {last}" if last else "")
