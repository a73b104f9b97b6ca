"""Exports real models to every target and keeps what the reports say.

    edgewise doctor --install litert     and tensorrt, qnn: the environments of the targets
    python benchmarks/export.py --photos PHOTOS --intents clinc150.json.gz [MODEL …]

PHOTOS holds JPEGs and labels.json, the intents are CLINC150: every ninth sentence of its test. Each model is one
call of `edgewise export`, all its targets in it; its wall time is kept. Models are all of them by default; those that
are not named keep what the file says of them. Writes benchmarks/results/export.json."""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewise.bench.measure import Measurement, typed

RESULTS = Path(__file__).parent / "results"
NINTH = 9  # sentences of the test part: 500 of 4,500
NETS = ("onnx", "onnx:fp16", "onnx:int8", "litert:fp32", "litert:fp16", "litert:int8", "coreml:fp32", "coreml:fp16")
NPUS = ("tensorrt:fp16", "tensorrt:int8", "qnn:int8")
KEPT = (
    *("status", "precision", "level", "by", "bytes", "parity", "interpreted", "drop", "coverage", "latency_ms"),
    "seconds",
)
COMMAND = (str(Path(sys.executable).with_name("edgewise")),)


@dataclass(frozen=True)
class Case:
    """One model: its targets in one command, and which of the inputs it is given."""

    model: str
    inputs: str | None
    targets: tuple[str, ...]
    max_drop: float | None = 0.01
    max_tokens: int | None = None


CASES = (
    Case("efficientnet-lite0", "photos", (*NETS, *NPUS)),
    Case("efficientnet-lite2", "photos", (*NETS, *NPUS)),
    Case("all-minilm-l6-v2", "intents", (*NETS, *NPUS), max_tokens=64),  # the longest sentence has half of that
    Case("smollm2-135m", None, ("onnx", "litert", "coreml"), max_drop=None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(case.model for case in CASES)}")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--intents", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, help="keep the artifacts there")
    given = parser.parse_args()
    path = RESULTS / "export.json"
    models = json.loads(path.read_text())["results"]["models"] if path.is_file() else {}
    with tempfile.TemporaryDirectory() as work:
        inputs = {"photos": given.photos, "intents": sentences(given.intents, Path(work) / "intents.jsonl")}
        for case in CASES:
            if not given.models or case.model in given.models:
                output = given.output or Path(work)
                models[case.model] = exported(case, inputs, output / case.model)
                measurement(models).save(RESULTS)


def measurement(models: dict[str, Any]) -> Measurement:
    return Measurement.taken(
        "export",
        command=typed(__file__),
        results={"models": models},
        settings={
            "max_drop": {case.model: case.max_drop for case in CASES},
            "max_tokens": {case.model: case.max_tokens for case in CASES},
        },
        libraries=["onnxruntime", "numpy"],
    )


def sentences(intents: Path, path: Path) -> Path:
    with gzip.open(intents) as file:
        rows = json.load(file)["test"][::NINTH]
    path.write_text("".join(json.dumps({"text": text, "label": intent}) + "\n" for text, intent in rows))
    return path


def exported(case: Case, inputs: dict[str, Path], output: Path) -> dict[str, Any]:
    """What is kept of the report, and how long the command took."""
    flags = ["--to", ",".join(case.targets), "-o", str(output), "--json"]
    if case.inputs is not None:
        flags += ["--inputs", str(inputs[case.inputs])]
    if case.max_drop is not None:
        flags += ["--max-drop", str(case.max_drop)]
    if case.max_tokens is not None:
        flags += ["--max-tokens", str(case.max_tokens)]
    started = time.monotonic()
    done = subprocess.run([*COMMAND, "export", case.model, *flags], stdout=subprocess.PIPE, text=True)
    seconds = time.monotonic() - started
    report = json.loads(done.stdout)
    targets = {}
    for key, one in report["targets"].items():
        targets[key] = {name: one[name] for name in KEPT} | {"error": one["error"], "where": one["where"]}
        targets[key]["versions"] = one["versions"]
    return {"exit_code": done.returncode, "seconds": seconds, "data": report["data"], "targets": targets}


if __name__ == "__main__":
    main()
