"""The other side of process.py: does one job and leaves its answer.

A target's file has `convert(job) -> Converted`, `prove(job) -> Proved` and `layers(job) -> Layers`; a source's file has
`begin(job) -> Begun` and `layers(job) -> Layers`. What they raise of Edgewise's errors is the answer; anything else is
one too, named as what it is.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from edgewise.errors import EdgewiseError
from edgewise.export.work.job import ANSWER, JOB, Job, job_of

SOURCES: Final = {
    "torch": "edgewise.export.sources.torch_source",
    "program": "edgewise.export.sources.torch_source",
    "hf": "edgewise.export.sources.torch_source",
    "efficientnet": "edgewise.export.sources.torch_source",
    "onnx": "edgewise.export.sources.onnx_source",
    "savedmodel": "edgewise.export.sources.saved_model",
    "language": "edgewise.export.language.reference",
}
TARGETS: Final = {
    name: f"edgewise.export.targets.{name}.target" for name in ("onnx", "litert", "coreml", "tensorrt", "qnn")
}
LANGUAGE_TARGETS: Final = {  # of sources of the kind `language`
    "litert": "edgewise.export.language.litertlm",
    "coreml": "edgewise.export.language.coreml_lm",
}

LIBRARIES: Final = {  # by the module that shows that one took part
    "torch": "torch",
    "transformers": "transformers",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime",
    "onnxruntime_qnn": "onnxruntime-qnn",
    "litert_torch": "litert-torch",
    "ai_edge_litert": "ai-edge-litert",
    "ai_edge_quantizer": "ai-edge-quantizer",
    "litert_lm": "litert-lm-api",
    "coremltools": "coremltools",
    "tensorrt_rtx_bindings": "tensorrt-rtx-cu13-bindings",
    "tensorflow": "tensorflow-cpu",
    "numpy": "numpy",
}


def main(directory: Path) -> None:
    job = job_of((directory / JOB).read_text(encoding="utf-8"))
    try:
        answer = {"ok": True, "answer": asdict(_done(job)), "versions": _versions()}
    except EdgewiseError as e:
        answer = {"ok": False, "error": {"kind": type(e).__name__, "message": e.message, "hint": e.hint}}
    except MemoryError as e:
        answer = _unexpected(e, "MemoryError")
    except Exception as e:
        traceback.print_exc()  # the parent keeps it for --debug
        answer = _unexpected(e, f"{type(e).__module__}.{type(e).__name__}")
    part = directory / f".{ANSWER}"
    part.write_text(json.dumps(answer), encoding="utf-8")
    part.replace(directory / ANSWER)


def _unexpected(error: BaseException, kind: str) -> dict[str, Any]:
    return {"ok": False, "error": {"kind": kind, "message": " ".join(str(error).split())[:2000], "hint": None}}


def _versions() -> dict[str, str]:
    """Of the libraries that took part."""
    found = {}
    for module, package in LIBRARIES.items():
        if module in sys.modules:
            with suppress(metadata.PackageNotFoundError):
                found[package] = metadata.version(package)
    return found


def _done(job: Job) -> Any:
    sys.path[:0] = job.source.search
    targets = LANGUAGE_TARGETS if job.source.kind == "language" else TARGETS
    if job.step == "convert" and job.source.kind == "savedmodel":  # TensorFlow's own converter
        return importlib.import_module(SOURCES[job.source.kind]).convert(job)
    place = targets[job.target] if job.target else SOURCES[job.source.kind]
    return getattr(importlib.import_module(place), job.step)(job)
