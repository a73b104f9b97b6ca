"""Measurement files: what is written is read back, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.bench.measure import FORMAT, Measurement, figure
from edgewise.errors import UsageError

ROOT = Path(__file__).parents[2]


def taken() -> Measurement:
    results = {"speed": figure([3.0, 1.0, 2.0], "tok/s")}
    return Measurement.taken("it", command="do it", results=results, settings={"n": 3}, libraries=["numpy"])


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    measurement = taken()
    path = measurement.save(tmp_path / "new" / "folder")
    assert path.name == "it.json"
    assert Measurement.read(path) == measurement
    assert [file.name for file in path.parent.iterdir()] == ["it.json"]


def test_a_figure_keeps_its_samples_in_order() -> None:
    found = figure([3.0, 1.0, 2.0], "tok/s")
    assert found["samples"] == [3.0, 1.0, 2.0]
    assert (found["low"], found["median"], found["high"]) == (1.0, 2.0, 3.0)
    with pytest.raises(UsageError):
        figure([], "tok/s")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_the_files_of_this_repository_are_readable(path: Path) -> None:
    assert Measurement.read(path).name == path.stem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": FORMAT + 1}, f"has format {FORMAT + 1}; this version reads {FORMAT}"),
        ({"format": None}, "has format None"),
        ({"kind": "guessed"}, "Invalid enum value 'guessed'"),
        ({"stray": 1}, "unknown field `stray`"),
        ({"machine": 7}, "is not a Measurement file"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = taken().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=words):
        Measurement.read(path)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "x.json"
    path.write_bytes(data)
    with pytest.raises(UsageError):
        Measurement.read(path)
