"""Rows of every kind of file, what is kept back, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgewise.errors import EdgewiseError, SourceError, UsageError
from edgewise.export.sources import data
from edgewise.export.work.job import Job, Source, Tensor, read_array

IMAGE = (Tensor("image", (1, 3, 8, 8), "float32"),)
NORM = {"mean": [0.5, 0.25, 0.0], "std": [0.5, 0.5, 1.0]}


def job(path: Path | str, calibration: Path | str = "") -> Job:
    return Job("begin", Source("torch", "a:b", "b", "classify"), "", data=str(path), calibration_data=str(calibration))


def photos(directory: Path, count: int, colour: tuple[int, int, int] = (255, 128, 0)) -> Path:
    image = pytest.importorskip("PIL.Image")
    directory.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        image.new("RGB", (20, 12), colour).save(directory / f"{n:03}.png")
    return directory


def test_arrays_by_name_with_labels(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((300, 3, 8, 8))
    np.savez(tmp_path / "a.npz", image=x, labels=np.arange(300))
    found = data.rows(job(tmp_path / "a.npz"), IMAGE)
    assert (len(found), found.calibration_rows, found.shared) == (236, 64, False)
    assert found.arrays["image"].dtype == np.float32
    assert found.labels is not None
    kept = np.setdiff1d(np.arange(300), found.labels)
    assert np.array_equal(x[found.labels].astype(np.float32), found.arrays["image"])
    assert np.array_equal(x[kept].astype(np.float32), found.calibration["image"])  # nothing is judged that calibrated


def test_too_few_rows_to_keep_some_back_are_shared(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((220, 3, 8, 8), np.float32))
    found = data.rows(job(tmp_path / "a.npz"), IMAGE)
    assert (len(found), found.calibration_rows, found.shared) == (220, 64, True)


def test_calibration_of_its_own_keeps_nothing_back(tmp_path: Path) -> None:
    for name, rows in (("a", 250), ("b", 9)):
        np.savez(tmp_path / f"{name}.npz", image=np.zeros((rows, 3, 8, 8), np.float32))
    found = data.rows(job(tmp_path / "a.npz", tmp_path / "b.npz"), IMAGE)
    assert (len(found), found.calibration_rows, found.shared) == (250, 9, False)


def test_photos_are_normalised_by_channel_and_labelled_by_file_or_directory(tmp_path: Path) -> None:
    listed = photos(tmp_path / "a", 3)
    (listed / "labels.json").write_text(json.dumps({"000.png": 4, "001.png": {"class": 2}, "002.png": 9}))
    found = data.rows(job(listed), IMAGE, NORM)
    assert found.labels is not None
    assert found.labels.tolist() == [4, 2, 9]
    expected = (np.array([255, 128, 0]) / 255 - NORM["mean"]) / NORM["std"]
    assert np.allclose(found.arrays["image"], expected[None, :, None, None], atol=1e-6)  # red first
    for name in ("1", "7"):
        photos(tmp_path / "b" / name, 2)
    labels = data.rows(job(tmp_path / "b"), IMAGE, NORM).labels
    assert labels is not None
    assert labels.tolist() == [1, 1, 7, 7]


def test_the_middle_of_a_photo_is_taken(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = 255  # a white square in the middle
    (tmp_path / "p").mkdir()
    image.fromarray(pixels).save(tmp_path / "p" / "a.png")
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3}
    assert data.rows(job(tmp_path / "p"), IMAGE, plain).arrays["image"].min() > 0.9


def test_texts_and_their_labels(tmp_path: Path) -> None:
    ids = (Tensor("input_ids", (1, 4), "int64"),)

    def tokenize(texts: Sequence[str]) -> Mapping[str, Any]:
        return {"input_ids": np.array([[len(text)] * 4 for text in texts])}

    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": "x" * n, "label": ["even", "odd"][n % 2]}) + "\n" for n in range(1, 5))
    found = data.rows(job(tmp_path / "a.jsonl.gz"), ids, {}, tokenize)
    assert found.arrays["input_ids"][:, 0].tolist() == [1, 2, 3, 4]
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 1, 0]
    (tmp_path / "a.txt").write_text("one\n\nthree\n")
    assert data.rows(job(tmp_path / "a.txt"), ids, {}, tokenize).arrays["input_ids"][:, 0].tolist() == [3, 5]


def test_noise_is_the_same_each_time() -> None:
    first, second = (data.rows(job(""), IMAGE) for _ in range(2))
    assert first.random
    assert np.array_equal(first.arrays["image"], second.arrays["image"])


def test_what_is_written_can_be_read_back(tmp_path: Path) -> None:
    found = data.rows(job(""), IMAGE)
    found.write(tmp_path)
    assert np.array_equal(read_array(tmp_path / "rows", "image"), found.arrays["image"])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((3, 3, 9, 8))}, r"shape \[3, 3, 9, 8\].*\[rows, 3, 8, 8\]"),
        ({"x": np.zeros((0, 3, 8, 8))}, "rows"),
        ({"x": np.zeros((2, 3, 8, 8)), "y": np.zeros(2)}, "has no image"),
        ({"x": np.zeros((2, 3, 8, 8), "U1")}, "float32"),
        ({"x": np.zeros((2, 3, 8, 8)), "labels": np.zeros(3, int)}, "give 2 whole numbers"),
        ({"x": np.zeros((2, 3, 8, 8)), "labels": np.zeros(2)}, "labels are float64"),
    ],
)
def test_arrays_that_do_not_fit(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=said):
        data.rows(job(tmp_path / "a.npz"), IMAGE)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"\x93NUMPY\x01\x00"])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(SourceError, match="no file of arrays"):
        data.rows(job(tmp_path / "a.npz"), IMAGE)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: d.mkdir(), "no photos"),
        (lambda d: photos(d, 1).joinpath("labels.json").write_text("{}"), "class of every photo"),
        (lambda d: photos(d, 1).joinpath("a.jpg").write_bytes(b"not a photo"), "no photo"),
        (lambda d: d.write_text("one"), "no tokenizer"),
        (lambda d: None, "there is no"),
    ],
)
def test_other_things_that_are_no_inputs(make: Any, said: str, tmp_path: Path) -> None:
    place = tmp_path / "data"
    make(place)
    with pytest.raises(EdgewiseError, match=said):
        data.rows(job(place), IMAGE, NORM)


def test_photos_for_a_network_that_does_not_say_how_it_wants_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--mean"):
        data.rows(job(photos(tmp_path / "p", 1)), IMAGE)
