"""The parent's side of a job: one process, bounded in time and memory, whose answer is read or whose end is
explained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from edgewise import errors
from edgewise.errors import EdgewiseError, ExportError
from edgewise.export.limits import Bounds
from edgewise.export.work.job import ANSWER, JOB, Job, job_text

START: Final = Path(__file__).with_name("start.py")
LOOK_S: Final = 0.05  # between looks at a running process
PAGE: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
QUIET: Final = {  # libraries that talk, count, ask home or spin
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GLOG_minloglevel": "3",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the cores from whoever else has work
    "TRANSFORMERS_VERBOSITY": "error",
}


def run(job: Job, python: Path, bounds: Bounds) -> Mapping[str, Any]:
    """The answer of a job, as JSON; its words are in `log.txt` beside it. What the worker raises of our errors is
    raised again; ExportError for anything else that ended it."""
    directory = Path(job.work)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / JOB).write_text(job_text(job), encoding="utf-8")
    answer = directory / ANSWER
    answer.unlink(missing_ok=True)
    what = f"{job.step} {job.target or job.source.name}"
    started = time.monotonic()
    with (directory / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [str(python), "-P", str(START), str(directory), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(job),
            start_new_session=True,  # so that what it starts ends with it
        )
        try:
            over = _watched(process, bounds, started)
        finally:
            _ended(process)
    if over is not None:
        raise ExportError(f"{what} was ended: it {over}", hint="raise --time-limit or --memory-limit")
    if not answer.is_file():
        raise ExportError(_crashed(what, process.returncode, directory / "log.txt"), hint="run it again with --debug")
    found = json.loads(answer.read_bytes())
    if not found["ok"]:
        raise _raised(what, found["error"])
    value: Mapping[str, Any] = found["answer"]
    return value


def versions(job: Job) -> Mapping[str, str]:
    """Of the libraries that took part in a job that is done."""
    found: Mapping[str, str] = json.loads((Path(job.work) / ANSWER).read_bytes())["versions"]
    return found


def _environment(job: Job) -> dict[str, str]:
    threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, **QUIET, **threads}


def _watched(process: subprocess.Popen[bytes], bounds: Bounds, started: float) -> str | None:
    """Waits for the end; says what was too much if that came first."""
    while process.poll() is None:
        if time.monotonic() - started > bounds.seconds:
            return f"took more than {bounds.seconds:g} s"
        if (used := memory_bytes(process.pid)) > bounds.memory_bytes:
            return f"took {used / 1e9:.1f} GB of memory, {bounds.memory_bytes / 1e9:.1f} are allowed"
        time.sleep(LOOK_S)
    return None


def memory_bytes(pid: int) -> int:
    """Resident memory of a process and what it started, in bytes; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    total = 0
    todo = [pid]
    while todo:
        one = todo.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * PAGE
            for task in Path(f"/proc/{one}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except (OSError, IndexError, ValueError):  # it is gone, or the kernel lists no children
            continue
    return total


def _ended(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None or sys.platform != "win32":
        with suppress(ProcessLookupError, PermissionError):
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _crashed(what: str, code: int, log: Path) -> str:
    words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    by = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{what} ended with {by} and no answer{': ' + words[0][:300] if words else ''}"


def _raised(what: str, error: Mapping[str, Any]) -> EdgewiseError:
    kind: type[EdgewiseError] | None = getattr(errors, error["kind"], None)
    if kind is not None and kind.__init__ is EdgewiseError.__init__:
        return kind(error["message"], hint=error["hint"])
    return ExportError(f"{what} failed with {error['kind']}: {error['message']}", hint=error["hint"])
