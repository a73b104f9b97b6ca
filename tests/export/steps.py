"""A process that does steps of exports one after the other, for tests: importing torch and a converter takes seconds,
so all tests of a file share one, in the Python that has what it needs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from edgewise import errors
from edgewise.export.work.job import Job, job_text

HERE: Final = Path(__file__).parent
SERVE: Final = """
import dataclasses, importlib, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries say
from edgewise.errors import EdgewiseError
from edgewise.export.work.job import job_of
OWN
for line in sys.stdin:
    place, call, text = json.loads(line)
    job = job_of(text)
    sys.path[:0] = job.source.search
    os.makedirs(job.work, exist_ok=True)
    try:
        found = (globals().get(call) or getattr(importlib.import_module("edgewise.export." + place), call))(job)
        answer = {"answer": found if isinstance(found, dict) else dataclasses.asdict(found)}
    except EdgewiseError as e:
        answer = {"error": type(e).__name__, "message": e.message, "hint": e.hint}
    print(json.dumps(answer), file=answers, flush=True)
"""


class Worker:
    """`place` is the module of edgewise.export whose functions are called; `own` is code with more of them."""

    def __init__(self, python: Path, place: str = "", own: str = "") -> None:
        self._place = place
        quiet = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        self._process = subprocess.Popen(
            [python, "-W", "ignore", "-c", SERVE.replace("OWN", own)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **quiet, "PYTHONPATH": str(HERE.parents[1] / "src")},
        )

    def __call__(self, call: str, job: Job, place: str = "") -> dict[str, Any]:
        """The answer; what was raised of our errors is raised here."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([place or self._place, call, job_text(job)]) + "\n")
        self._process.stdin.flush()
        found: Mapping[str, Any] = json.loads(self._process.stdout.readline())
        if "error" in found:
            raise getattr(errors, found["error"])(found["message"], hint=found["hint"])
        answer: dict[str, Any] = found["answer"]
        return answer

    def close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
