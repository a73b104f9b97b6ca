"""Every fault in every target, through the command as a user has it: an artifact with the fault is handed to
`edgewise export --check`, or made by a source that has it, and the step that should catch it does.

The network normalises its images itself, so that a wrong mean is a fault of the file. Artifacts without a fault pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

HERE: Final = Path(__file__).parent
TARGETS: Final = ("onnx", "litert", "coreml", "tensorrt", "qnn")
FLOAT: Final = {"onnx": "fp32", "litert": "fp32", "coreml": "fp32", "tensorrt": "fp32", "qnn": "fp16"}
WHOLE: Final = {"onnx": "int8", "litert": "int8", "coreml": "int8", "tensorrt": "int8", "qnn": "int8"}
HALF: Final = {"onnx": "fp16", "litert": "fp16", "coreml": "fp16", "tensorrt": "fp16", "qnn": "fp16"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def command(*given: str) -> tuple[int, Mapping[str, Any]]:
    """Exit code and JSON of `edgewise export`, from the directory that has nets.py."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("edgewise")), "export", *given, "--json"],
        cwd=HERE,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.stdout, done.stderr[-2000:]
    found: Mapping[str, Any] = json.loads(done.stdout)
    return done.returncode, found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    random = np.random.default_rng(2)
    smooth = np.kron(random.random((264, 3, 4, 4)), np.ones((8, 8)))  # as photos are: near pixels are alike
    np.savez(path, image=(smooth * 0.8 + random.random(smooth.shape) * 0.2).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "x.npz"
    np.savez(path, x=np.random.default_rng(3).random((264, 24)).astype(np.float32) * 4)
    return path


def made(net: str, precision: Mapping[str, str], data: Path, output: Path) -> Mapping[str, Any]:
    to = ",".join(f"{target}:{precision[target]}" for target in TARGETS)
    found = command(f"nets:{net}", "--to", to, "--inputs", str(data), "-o", str(output))[1]["targets"]
    return {key.partition(":")[0]: one for key, one in found.items()}


@pytest.fixture(scope="module")
def sound(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Mapping[str, Any]]:
    output = tmp_path_factory.mktemp("sound")
    return {
        "float": made("normalised", FLOAT, images, output / "float"),
        "whole": made("normalised", WHOLE, images, output / "whole"),
    }


def test_artifacts_without_a_fault_pass(sound: dict[str, Mapping[str, Any]]) -> None:
    for kind, found in sound.items():
        for target in TARGETS:
            one = found[target]
            assert one["status"] == "ok", (kind, target, one["error"], [c for c in one["checks"] or () if not c["ok"]])


@pytest.mark.parametrize("fault", ["wrong_mean", "swapped"])
def test_a_wrong_mean_and_swapped_channels(fault: str, images: Path, tmp_path: Path) -> None:
    faulty = made(fault, FLOAT, images, tmp_path / "faulty")
    for target in TARGETS:
        path = faulty[target]["path"]
        code, report = command(
            *("nets:normalised", "--to", f"{target}:{FLOAT[target]}", "--check", path),
            *("--inputs", str(images), "-o", str(tmp_path / target)),
        )
        (one,) = report["targets"].values()
        refused = {check["name"] for check in one["checks"] or () if not check["ok"]}
        assert (code, one["status"]) == (1, "refused"), (target, one)
        assert refused & {"numbers", "weights"}, (target, refused)


def test_skipped_quantization(sound: dict[str, Mapping[str, Any]], images: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        path = sound["float"][target]["path"]
        code, report = command(
            *("nets:normalised", "--to", f"{target}:{WHOLE[target]}", "--check", path),
            *("--inputs", str(images), "-o", str(tmp_path / target)),
        )
        (one,) = report["targets"].values()
        refused = {check["name"] for check in one["checks"] or () if not check["ok"]}
        assert (code, one["status"]) == (1, "refused"), (target, one)
        assert "precision" in refused, (target, refused)


def test_an_overflow_of_half_precision(vectors: Path, tmp_path: Path) -> None:
    """Either the converter keeps what overflows in float32, and the proof shows that, or it is refused for it."""
    found = made("overflowing", HALF, vectors, tmp_path / "half")
    for target in TARGETS:
        one = found[target]
        refused = {check["name"] for check in one["checks"] or () if not check["ok"]}
        if one["status"] == "ok":
            assert target in ("onnx", "tensorrt"), target
            assert one["parity"]["rel_l2"] < 2e-2
        else:
            by = {"qnn": {"numbers"}}.get(target, {"finite", "range"})  # Hexagon saturates, and its answers are wrong
            assert refused & by, (target, one["error"], refused)


def test_a_truncated_file(sound: dict[str, Mapping[str, Any]], images: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        one = sound["whole"][target]
        victim = Path(max(one["files"], key=lambda file: size(Path(file))))
        if victim.is_dir():
            victim = max((part for part in victim.rglob("*") if part.is_file()), key=size)
        whole = victim.read_bytes()
        victim.write_bytes(whole[: len(whole) // 2])
        try:
            code, report = command(
                *("nets:normalised", "--to", f"{target}:{WHOLE[target]}", "--check", one["path"]),
                *("--inputs", str(images), "-o", str(tmp_path / target)),
            )
        finally:
            victim.write_bytes(whole)
        (found,) = report["targets"].values()
        assert (code, found["status"]) == (3, "failed"), (target, found)
        assert found["error"]["kind"] == "SourceError", (target, found["error"])


def size(path: Path) -> int:
    return path.stat().st_size
