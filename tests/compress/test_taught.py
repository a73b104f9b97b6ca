"""What a teacher said, from disk, against the logits of its engine."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.compress import storing
from edgewise.compress.lessons import teacher
from edgewise.compress.lessons.teacher import STEPS, Taught, TopK, best_of, teach
from edgewise.engines.base import Row
from edgewise.engines.load import local_model
from edgewise.errors import EngineError, SourceError, StorageError, UsageError
from edgewise.evaluate.divergence import log_softmax
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from edgewise.types import FloatArray
from tiny import VOCAB, save_hf, tiny

LENGTH, K = 32, 8
STEP = 0.5 / STEPS + 1e-6  # what rounding may cost, in nats


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    home = tmp_path_factory.mktemp("home")
    return pull(str(save_hf(tiny("llama"), home / "teacher")), home=home, requantize="int8")


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(4).integers(0, VOCAB, (7, LENGTH)).astype(np.int32)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "SHARD_TOKENS", 3 * LENGTH)


async def said(bundle: Bundle, rows: np.ndarray) -> FloatArray:
    """The engine's own logits, [n, length, vocab]."""
    lm = local_model(bundle, slots=1)
    found = []
    for row in rows.astype(np.int64):
        await lm.open("s", len(row))
        found.append((await lm.forward([Row("s", 0, row, len(row))]))[0].copy())
        await lm.close("s")
    await lm.shutdown()
    return np.stack(found)


def compare(found: TopK, logits: FloatArray) -> None:
    """The k best of these logits, in order, and the mass of the others."""
    k = found.ids.shape[-1]
    for ids, logprobs, rest, row in zip(
        found.ids.reshape(-1, k), found.logprobs.reshape(-1, k), found.rest.ravel(), logits, strict=True
    ):
        expected = log_softmax(row[None])[0]
        best = np.sort(expected)[::-1][:k]
        assert np.abs(expected[ids] - best).max() < STEP, "of equal ones any"
        assert np.abs(logprobs - expected[ids]).max() < STEP
        left = np.delete(np.exp(expected), ids).sum()
        assert rest == -math.inf if not left else abs(rest - math.log(left)) < STEP


async def test_it_is_what_the_engine_says(bundle: Bundle, rows: np.ndarray, tmp_path: Path) -> None:
    logits = await said(bundle, rows)
    found = teach_here(bundle, rows, tmp_path / "t").rows(np.array([6, 0, 3, 3]))
    assert (found.ids.shape, found.rest.shape) == ((4, LENGTH, K), (4, LENGTH))
    assert (found.ids.dtype, found.logprobs.dtype, found.rest.dtype) == (np.int32, np.float32, np.float32)
    compare(found, logits[[6, 0, 3, 3]].reshape(-1, VOCAB))
    assert sorted(file.name for file in (tmp_path / "t").iterdir()) == [
        "00000.taught",
        "00001.taught",
        "00002.taught",
        "taught.json",
    ]


def teach_here(bundle: Bundle, rows: np.ndarray, directory: Path, k: int = K, **options: Any) -> Taught:
    """In a thread of its own: it has an event loop, and so has the test."""
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(teach, bundle, rows, k, directory, **options).result()


async def test_a_part_of_the_vocabulary_has_the_distribution_over_that_part(
    bundle: Bundle, rows: np.ndarray, tmp_path: Path
) -> None:
    kept = np.sort(np.random.default_rng(1).choice(VOCAB, 200, replace=False))
    part = (rows % 200).astype(np.int32)
    found = teach_here(bundle, part, tmp_path, kept=kept).rows(np.arange(7))
    assert found.ids.max() < 200
    compare(found, (await said(bundle, kept[part]))[..., kept].reshape(-1, 200))


async def test_with_the_whole_vocabulary_nothing_is_left(bundle: Bundle, rows: np.ndarray, tmp_path: Path) -> None:
    found = teach_here(bundle, rows[:2], tmp_path, k=VOCAB).rows(np.arange(2))
    assert (found.rest == -np.inf).all()
    assert np.abs(np.exp(found.logprobs).sum(axis=-1) - 1).max() < 1e-3
    assert (np.sort(found.ids, axis=-1) == np.arange(VOCAB)).all()


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 3.0, 30.0]))
def test_the_best_of_any_logits(k: int, seed: int, spread: float) -> None:
    logits = (np.random.default_rng(seed).standard_normal((5, 40)) * spread).astype(np.float32)
    found = best_of(logits, k)
    assert (np.diff(found.logprobs, axis=1) <= 0).all()
    assert all(len(set(ids)) == k for ids in found.ids.tolist())
    expected = log_softmax(logits)
    np.testing.assert_allclose(found.logprobs, np.take_along_axis(expected, found.ids.astype(np.int64), 1), atol=1e-4)
    mass = np.exp(found.logprobs.astype(np.float64)).sum(axis=1) + np.exp(found.rest.astype(np.float64))
    np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_rounding_is_as_small_as_promised() -> None:
    logs = -np.geomspace(1e-6, 31.9, 5000).astype(np.float32)
    assert np.abs(teacher._decoded(teacher._coded(logs)) - logs).max() <= 1 / 4096 + 1e-6
    assert teacher._decoded(teacher._coded(np.array([0.0, -40, -np.inf], np.float32))).tolist() == [0, -np.inf, -np.inf]


def test_damaged_weights_are_not_taught() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(EngineError, match="NaN or infinite"):
            best_of(np.array([[0.0, bad, 1.0]], np.float32), 2)


def test_what_is_there_is_not_asked_again(bundle: Bundle, rows: np.ndarray, tmp_path: Path) -> None:
    teach(bundle, rows, K, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "00001.taught").unlink()
    told: list[tuple[str, int, int]] = []
    teach(bundle, rows, K, tmp_path, lambda *what: told.append(what))
    assert [done for _, done, _ in told] == [3, 7]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    teach(bundle, rows, K, tmp_path, lambda *what: told.append(what))
    assert len(told) == 3, "the teacher is not even loaded"


def test_files_of_another_call_are_refused(bundle: Bundle, rows: np.ndarray, tmp_path: Path) -> None:
    teach(bundle, rows, K, tmp_path / "t")
    other = pull(str(save_hf(tiny("llama", num_hidden_layers=2), tmp_path / "o")), home=tmp_path)
    for arguments, why in (
        ((other, rows, K), "teacher differ"),
        ((bundle, rows[::-1], K), "content differ"),
        ((bundle, rows, K + 1), "k differ"),
        ((bundle, rows[:5], K), "content, rows differ"),
    ):
        with pytest.raises(UsageError, match=why):
            teach(*arguments, tmp_path / "t")
    with pytest.raises(UsageError, match="kept differ"):
        teach(bundle, rows, K, tmp_path / "t", kept=np.arange(VOCAB))


def test_wrong_rows_are_refused(bundle: Bundle, rows: np.ndarray, tmp_path: Path) -> None:
    kept = np.arange(200)
    with pytest.raises(UsageError, match="ids 0 to 199 are needed"):
        teach(bundle, rows, K, tmp_path, kept=kept)
    with pytest.raises(UsageError, match="the student's tokens have ids of the teacher from 1 to 320"):
        teach(bundle, rows, K, tmp_path, kept=np.arange(1, VOCAB + 1))
    with pytest.raises(UsageError, match="the 321 most probable tokens are wanted of 320"):
        teach(bundle, rows, VOCAB + 1, tmp_path)
    with pytest.raises(UsageError, match="longer than the 256"):
        teach(bundle, np.zeros((1, 257), np.int32), K, tmp_path)
    with pytest.raises(UsageError, match=r"rows of the shape \(32,\)"):
        teach(bundle, rows[0], K, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_short_is_found(bundle: Bundle, rows: np.ndarray, tmp_path: Path) -> None:
    found = teach(bundle, rows, K, tmp_path)
    os.truncate(tmp_path / "00000.taught", 100)
    with pytest.raises(SourceError, match="has 100 bytes"):
        found.rows(np.array([0]))
    assert len(found.rows(np.array([3])).ids) == 1
    for row in (-1, 7):
        with pytest.raises(IndexError, match="there are 0 to 6"):
            found.rows(np.array([row]))


def test_more_files_than_a_process_may_hold_open(bundle: Bundle, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, VOCAB, (40, 8), dtype=np.int32)
    found = teach(bundle, rows, K, tmp_path)
    assert len([*tmp_path.glob("*.taught")]) > 3
    before = len(os.listdir("/proc/self/fd"))
    told = found.rows(np.arange(len(rows)))
    assert len(os.listdir("/proc/self/fd")) <= before
    assert told.ids.shape == (40, 8, K)


def test_a_full_disk_leaves_what_is_whole(
    bundle: Bundle, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing.shutil, "disk_usage", lambda place: SimpleNamespace(free=5))
    with pytest.raises(StorageError, match=r"and its disk has 0 MB left \(make room"):
        teach(bundle, rows, K, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(teacher, "SHARD_TOKENS", 3 * LENGTH)
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "00001" in self.name:
            write(self, data[:50])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"00001\.taught could not be written: the disk is full"):
        teach(bundle, rows, K, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.taught", "taught.json"]
    monkeypatch.setattr(Path, "write_bytes", write)
    assert teach(bundle, rows, K, tmp_path).rows(np.arange(7)).ids.shape == (7, LENGTH, K)


KILLED = """
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from edgewise.compress.lessons import teacher
from edgewise.models.bundle import Bundle
teacher.SHARD_TOKENS = 32
rows = np.load(sys.argv[3])
teacher.teach(Bundle.open(Path(sys.argv[1])), rows, 8, Path(sys.argv[2]), print)
"""


def test_killed_at_any_time_it_goes_on(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "SHARD_TOKENS", LENGTH)
    rows = np.random.default_rng(5).integers(0, VOCAB, (400, LENGTH)).astype(np.int32)
    np.save(tmp_path / "rows.npy", rows)
    place = tmp_path / "t"
    arguments = [str(bundle.path), str(place), str(tmp_path / "rows.npy")]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], stdout=subprocess.DEVNULL)
    while not (place / "00003.taught").exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list(place.glob("*.taught")))
    assert 4 <= there < 400
    teach(bundle, rows, K, place)
    teach(bundle, rows, K, tmp_path / "undisturbed")
    names = {file.name for file in (tmp_path / "undisturbed").iterdir()}
    assert names == {file.name for file in place.iterdir() if not file.name.startswith(".")}
    assert all((place / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes() for name in names)
