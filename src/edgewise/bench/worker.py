"""One turn, in a process of its own: `python -m edgewise.bench.worker ANSWER < JOB`.

Only what the contestant itself needs is imported: its cold start is the time from this process's start, as seen by the
parent, to the first token of a short prompt.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgewise.bench.peers.base import Engine, Peer, Room, Source

if TYPE_CHECKING:
    from edgewise.bench.peers.base import Answer

Job = dict[str, Any]
PACKAGE = "edgewise.bench.peers."
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main() -> None:
    _end_with_parent()
    job: Job = json.load(sys.stdin)
    try:
        answer = TURNS[job["turn"]](job)
    except Exception as e:  # whatever a stranger's library raises is the report's reason
        answer = {"failed": f"{type(e).__name__}: {e}"}
    Path(sys.argv[1]).write_text(json.dumps(answer), encoding="utf-8")


def prepare(job: Job) -> dict[str, Any]:
    """The model in the contestant's form: `{path}`."""
    work = Path(job["work"])
    work.mkdir(parents=True, exist_ok=True)
    source = Source(Path(job["source"]), Path(job["bundle"]))
    return {"path": str(_peer(job).prepare(source, work, job["variant"]))}


def judge(job: Job) -> dict[str, Any]:
    """Logits of the ids, written to the file `logits`, and a greedy answer: `{logits: bool, greedy: [ids] or null}`."""
    import numpy as np

    engine = _load(job)
    logits = engine.logits(job["ids"])
    if logits is not None:
        np.save(job["logits"], logits)
    return {"logits": logits is not None, "greedy": engine.greedy(job["prompt"], job["new"])}


def measure(job: Job) -> dict[str, Any]:
    """The figures of one turn."""
    engine = _load(job)
    engine.generate(job["short"], 1)
    cold_start_s = time.monotonic() - job["started_s"]
    engine.generate(job["warm_up"], 2)  # other ids, same shapes: what is compiled or grown on first use is there now
    figures = speeds(engine.generate(job["prompts"], job["new"]), len(job["prompts"][0]), job["new"])
    return {**figures, "cold_start_s": cold_start_s, "peak_rss_bytes": peak_rss_bytes()}


def limits(job: Job) -> dict[str, Any]:
    from edgewise.bench.limits import probe

    return probe(Path(job["bundle"]), job["threads"])


def host(job: Job) -> dict[str, Any]:
    from edgewise.bench.host import measure

    return measure(Path(job["home"]), job["key"])


def split(job: Job) -> dict[str, Any]:
    from edgewise.bench.split_edge import timed

    return timed(job)


TURNS = {"prepare": prepare, "judge": judge, "measure": measure, "limits": limits, "host": host, "split": split}


def speeds(answers: Sequence[Answer], prompt: int, new: int) -> dict[str, float]:
    """Over all streams: mean time to the first token, prompt tokens until the last stream has its first one, and the
    tokens after the first ones while any stream decodes."""
    counts = [answer.tokens for answer in answers]
    if counts != [new] * len(counts):
        raise RuntimeError(f"{new} new tokens were asked for, {counts} came")
    firsts = [answer.first_s for answer in answers]
    return {
        "ttft_ms": sum(firsts) / len(firsts) * 1e3,
        "prefill_tok_s": prompt * len(answers) / max(firsts),
        "decode_tok_s": (new - 1) * len(answers) / (max(answer.last_s for answer in answers) - min(firsts)),
    }


def peak_rss_bytes() -> int:
    """High-water mark of this process's resident memory."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its ru_maxrss would begin with the parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _end_with_parent() -> None:
    """A bench that is killed leaves no turn behind. Elsewhere than on Linux the turn goes on to its end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _load(job: Job) -> Engine:
    room = Room(job["threads"], job["streams"], job["context"])
    return _peer(job).load(Path(job["model"]), room, job["variant"])


def _peer(job: Job) -> Peer:
    return cast(Peer, importlib.import_module(PACKAGE + job["module"]))


if __name__ == "__main__":
    main()
