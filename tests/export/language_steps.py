"""Run by test_language.py in the environment that has the converters: all steps that need it, in one process.

`python language_steps.py DIRECTORY` reads `order.json` there and writes `answers.json`: what each gave or raised."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgewise.errors import EdgewiseError
from edgewise.export.language import coreml_lm, litertlm, reference
from edgewise.export.work.job import Job, Source

STEPS = 12
SMALL: dict[str, dict[str, Any]] = {"litert": {"prefill": [16], "cache": 96}, "coreml": {"prefill": 16, "cache": 96}}
ROOMS: dict[str, Any] = {"litert": litertlm, "coreml": coreml_lm}


def main(directory: Path) -> None:
    order = json.loads((directory / "order.json").read_text())
    source = Source("language", order["model"], "tiny", "classify")
    begin = Job("begin", source, str(directory / "begin"), options={"texts": order["texts"], "steps": STEPS}, threads=1)
    heard = asdict(reference.begin(begin))
    about = {"card": order["card"], "start": [], "passages": heard["passages"], "most": 2}
    about["prompts"] = [{"text": text, "ids": ids, "answer": ""} for text, ids in order["prompts"]]
    job = Job("convert", source, "", reference=str(directory / "begin" / "reference"), options=about, threads=1)
    steps = _Steps(directory, job)
    answers: dict[str, Any] = {"heard": heard}
    for target, precision in (("litert", "int8-dynamic"), ("coreml", "fp16"), ("coreml", "int8")):
        key = f"{target}:{precision}"
        answers[key] = {"converted": (made := steps.converted(target, precision)), "proved": steps.proved(key, made)}
    answers |= _faults(directory, steps, answers)
    (directory / "answers.json").write_text(json.dumps(answers))


class _Steps:
    def __init__(self, directory: Path, job: Job) -> None:
        self._directory, self.job = directory, job

    def converted(self, target: str, precision: Any, **options: Any) -> Any:
        work = self._directory / f"convert-{target}-{precision}"
        work.mkdir(exist_ok=True)
        job = replace(
            self.job,
            work=str(work),
            target=target,
            precision=precision,
            artifact=str(self._directory / f"{target}-{precision}"),
            options={**self.job.options, **SMALL[target], **options},
        )
        return _said(ROOMS[target].convert, job)

    def proved(self, key: str, made: Any, name: str = "") -> Any:
        target, precision = key.split(":")
        work = self._directory / f"prove-{(name or key).replace(':', '-')}"
        work.mkdir(exist_ok=True)
        more: Any = {"target": target, "precision": precision, "artifact": made["artifact"]}
        return _said(ROOMS[target].prove, replace(self.job, step="prove", work=str(work), **more))


def _faults(directory: Path, steps: _Steps, answers: dict[str, Any]) -> dict[str, Any]:
    """Each artifact, damaged or taken for what it is not."""
    whole = Path(answers["litert:int8-dynamic"]["converted"]["artifact"])
    short = directory / "short.litertlm"
    short.write_bytes(whole.read_bytes()[:-5000])
    package = Path(answers["coreml:fp16"]["converted"]["artifact"])
    weights = package / "Data/com.apple.CoreML/weights/weight.bin"
    data = weights.read_bytes()
    found = {
        "short": steps.proved("litert:int8-dynamic", {"artifact": str(short)}, "short"),
        "unquantized": steps.proved("coreml:int8", {"artifact": str(package)}, "unquantized"),
        "other": steps.converted("coreml", "fp16", card={**steps.job.options["card"], "norm_eps": 0.5}),
        "static": steps.converted("litert", "int8"),
    }
    weights.write_bytes(data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :])
    found["zeroed"] = steps.proved("coreml:fp16", {"artifact": str(package)}, "zeroed")
    weights.write_bytes(data[: len(data) // 2])
    found["cut"] = steps.proved("coreml:fp16", {"artifact": str(package)}, "cut")
    return found


def _said(step: Callable[[Job], Any], job: Job) -> Any:
    try:
        return asdict(step(job))
    except EdgewiseError as e:
        return {"error": type(e).__name__, "message": str(e)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
