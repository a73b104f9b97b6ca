"""A worker that ends well, badly, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ends import ended, until

from edgewise.errors import ExportError, SourceError
from edgewise.export.limits import Bounds
from edgewise.export.work.job import Job, Source, job_of, job_text
from edgewise.export.work.process import memory_bytes, run

HERE = Path(sys.executable)

MODULE = """
import os, time
def net(): {body}
"""


def job(tmp_path: Path, body: str) -> Job:
    (tmp_path / "users.py").write_text(MODULE.format(body=body))
    source = Source("torch", "users:net", "net", "classify", shapes={"x": (1, 3)}, search=(str(tmp_path),))
    return Job("begin", source, str(tmp_path / "work"))


def test_a_job_is_the_same_after_its_json(tmp_path: Path) -> None:
    one = job(tmp_path, "pass")
    assert job_of(job_text(one)) == one


def test_what_the_users_code_raises_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"users:net cannot be loaded: KeyError: 'weights'"):
        run(job(tmp_path, "raise KeyError('weights')"), HERE, Bounds())


def test_a_process_that_dies_is_told_by_its_signal(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="signal SIGSEGV"):
        run(job(tmp_path, "os.kill(os.getpid(), 11)"), HERE, Bounds())


def test_a_process_without_an_answer_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exit code 7 and no answer: goodbye"):
        run(job(tmp_path, "print('goodbye', flush=True); os._exit(7)"), HERE, Bounds())


def test_time_is_bounded_for_a_process_and_its_children(tmp_path: Path) -> None:
    body = f"(open({str(tmp_path / 'child')!r}, 'w').write(str(os.fork() or time.sleep(60))), time.sleep(60))"
    started = time.monotonic()
    with pytest.raises(ExportError, match=r"took more than 6 s.*--time-limit"):
        run(job(tmp_path, body), HERE, Bounds(seconds=6))
    assert time.monotonic() - started < 30
    if (tmp_path / "child").is_file() and (text := (tmp_path / "child").read_text()).isdigit():
        assert ended(int(text)), "a child outlived its worker"


PARENT = """
import sys
from pathlib import Path
from edgewise.export.limits import Bounds
from edgewise.export.work.job import job_of
from edgewise.export.work.process import run
run(job_of(Path(sys.argv[1]).read_text()), Path(sys.executable), Bounds(seconds=60))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems leave it to run on")
def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "worker"
    one = job(tmp_path, f"(open({str(told)!r}, 'w').write(str(os.getpid())), time.sleep(60))")
    (tmp_path / "job.json").write_text(job_text(one))
    parent = subprocess.Popen([HERE, "-c", PARENT, tmp_path / "job.json"], stderr=subprocess.DEVNULL)
    try:
        until(lambda: told.is_file() and told.read_text().isdigit())
    finally:
        parent.kill()
        parent.wait()
    assert ended(int(told.read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="memory of another process is read from /proc")
def test_memory_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"GB of memory, 0\.9 are allowed.*--memory-limit"):
        run(job(tmp_path, "(bytearray(os.urandom(1 << 20) * 1500), time.sleep(60))"), HERE, Bounds(60, 0.9))
    assert memory_bytes(os.getpid()) > 1 << 20
