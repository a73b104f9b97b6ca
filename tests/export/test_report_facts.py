"""What becomes of an artifact's directory once it is judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgewise.errors import UnsupportedModel
from edgewise.export.report.facts import Result
from edgewise.export.wanted import Wanted
from edgewise.export.work.job import Converted, Coverage, Proved


@pytest.mark.parametrize("where", ["onnx", "refused/onnx"])
def test_a_failure_leaves_no_older_artifact_that_would_pass_for_it(where: str, tmp_path: Path) -> None:
    old, other = tmp_path / where / "net.onnx", tmp_path / "litert" / "net.tflite"
    for file in (old, other):
        file.parent.mkdir(parents=True)
        file.write_text("whole")
    wanted = Wanted("onnx", "onnx", "fp32")
    place = tmp_path / "work" / "onnx"
    assert Result.failed(wanted, UnsupportedModel("no")).stored(place, tmp_path).status == "failed"
    assert not old.parent.exists()
    assert other.read_text() == "whole"


def test_weights_beside_a_file_count_and_other_files_do_not(tmp_path: Path) -> None:
    files = [tmp_path / f"net.onnx{end}" for end in ("", ".data", ".card.json")]
    for size, file in zip((10, 200, 3000), files, strict=True):
        file.write_bytes(bytes(size))
    made = Converted(str(files[0]), tuple(map(str, files)))
    proved = Proved("executed", True, "x", Coverage(1, 1, "x"), {"float32": 200})
    found = Result(Wanted("onnx", "onnx", "fp32"), "ok", made, proved).facts()
    assert (found["bytes"], len(found["files_sha256"])) == (210, 3)
    made = Converted(str(tmp_path), tuple(map(str, files)))  # a directory, of which the files inside are named
    assert Result(Wanted("coreml", "coreml", "fp32"), "ok", made, proved).facts()["bytes"] == 3210
