"""Both tiers as ordinary `edgewise` processes, and their bundles."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

from prompts import DemoError

DEMO = Path(__file__).resolve().parent
HOME = DEMO.parent / ".cache" / "edgewise"  # kept, so that the second run is quick
LOGS = DEMO / "logs"
CLOUD_MODEL, EDGE_MODEL = "smollm2-135m", "edgewise-student"
START_S, STOP_S = 120, 5
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def edgewise(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edgewise.cli.main", *arguments]


def environment() -> dict[str, str]:
    """The caller's, without his Edgewise settings: the demo shows the defaults."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGEWISE_")}
    return kept | {"EDGEWISE_HOME": str(HOME)}


def pull_bundles() -> None:
    """A teacher for the cloud, and for the edge the student that was made of it."""
    listed = subprocess.run(edgewise("list", "--json"), env=environment(), stdout=subprocess.PIPE, check=True)
    here = {bundle["name"] for bundle in json.loads(listed.stdout)["bundles"]}
    for name in (CLOUD_MODEL, EDGE_MODEL):
        if name not in here:
            command = edgewise("pull", name)
            if subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, check=False).returncode:
                raise DemoError(f"the bundle {name} could not be made; the line above says why")


def _die_with_parent() -> None:
    """A node must not outlive the demo, even if that is killed with SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def node(name: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A tier as a process of its own: (process, url) once it is ready. The process ends with the block."""
    log = LOGS / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as stderr:
        process = subprocess.Popen(
            edgewise(*arguments),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        try:
            yield process, _url(name, process, log)
        finally:
            stop(process)


def _url(name: str, process: subprocess.Popen[str], log: Path) -> str:
    """From the node's first line. A node that hangs is killed, which ends the wait."""
    assert process.stdout is not None
    alarm = Timer(START_S, process.kill)
    alarm.start()
    try:
        line = process.stdout.readline()
    finally:
        alarm.cancel()  # its thread would keep the demo alive
    try:
        return str(json.loads(line)["url"])
    except (json.JSONDecodeError, KeyError) as e:
        reason = _last_line(log) or f"its first line is {line!r}"
        raise DemoError(f"the {name} node did not start ({START_S} s are allowed): {reason}") from e


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or [""])[-1]


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
