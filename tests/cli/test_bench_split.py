"""`edgewise bench split` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import Cli

from edgewise.bench.measure import Measurement

NOTHING = ("--tokens", "0", "--link-cuts", "0", "--worker-kills", "0", "--prompts", "0", "--rounds", "0")


def test_a_report_and_a_file_for_each_kind_of_figure(in_stock: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    some = (*NOTHING, "--codecs", "exact", "--link-cuts", "1", "--prompts", "1")
    done = in_stock("bench", "split", "--model", "tiny", *some, "-o", out, "--json")
    assert done.code == 0, done.err
    report = done.json
    assert (report["model"], report["rows"], report["speed"]) == ("tiny", [], None)
    assert (report["cuts"]["n"], report["cuts"]["lost"]) == (1, 0)
    assert report["identical"] == {"prompts": 1, "tokens": 64, "different": 0, "cuts": [1]}
    measured, emulated = (Measurement.read(out / f"{name}.json") for name in ("split", "split_cuts"))
    assert (measured.kind, emulated.kind) == ("measured", "emulated")
    assert "cuts" not in measured.results
    assert "identical" not in emulated.results
    assert measured.command.startswith("edgewise bench split --model tiny --codecs exact --tokens 0 --link wifi")
    assert str(tmp_path) not in (out / "split.json").read_text()


def test_tokens_that_differ_are_told_and_end_with_1(in_stock: Cli, tmp_path: Path) -> None:
    """As a run that was interrupted left them."""
    call = ("bench", "split", "--model", "tiny", *NOTHING, "--prompts", "1", "--resume", tmp_path / "j", "-o", tmp_path)
    assert in_stock(*call).code == 0
    kept = (tmp_path / "j").read_text()
    (tmp_path / "j").write_text(kept.replace('"different": 0', '"different": 3'))
    done = in_stock(*call)
    assert done.code == 1
    assert done.out == "exact boundary: 3 of 64 tokens differ from the whole model's\n"
    assert json.loads((tmp_path / "split.json").read_text())["results"]["identical"]["different"] == 3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("--cuts", "1,x"), "--cuts is '1,x'"),
        (("--cuts", "3"), "cannot be cut at 3"),
        (("--codecs", "int2"), "int2"),
        (("--link", "string"), "there is no link 'string'"),
        (("--rounds", "-1"), "--rounds is -1"),
        (("--name", "../x"), "--name is '../x'"),
    ],
)
def test_wrong_use_is_refused_before_anything_runs(
    in_stock: Cli, tmp_path: Path, wrong: tuple[str, str], words: str
) -> None:
    done = in_stock("bench", "split", "--model", "tiny", *NOTHING, *wrong, "-o", tmp_path / "out")
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "out").exists()
