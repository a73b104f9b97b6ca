"""What becomes of an artifact's directory once it is judged."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgewise.errors import UnsupportedModel
from edgewise.export.report.facts import Result
from edgewise.export.wanted import Wanted


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
