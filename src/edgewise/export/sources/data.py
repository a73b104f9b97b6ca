"""The user's inputs as the rows that a network takes: arrays, photos or texts, and what is kept back to calibrate with.

    .npz             an array [rows, …] for each input by its name, and `labels` [rows] (whole numbers) if there are any
    a directory      photos; their classes in its `labels.json` ({"a.jpg": 3} or {"a.jpg": {"class": 3}}), or in the
                     names of subdirectories that are numbers
    .txt, .jsonl     texts, one a line, or objects {"text", "label"}; both may be .gz

Read in a worker: photos want pillow, texts the source's own tokenizer.
"""

from __future__ import annotations

import gzip
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import SourceError, UsageError
from edgewise.export.work.job import Job, Tensor, write_arrays

Array = npt.NDArray[Any]
Tokenize = Callable[[Sequence[str]], Mapping[str, Array]]

PHOTOS: Final = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
LABELS: Final = "labels"
CALIBRATION_ROWS: Final = 64
GATED_ROWS: Final = 200  # that must be left to judge on before any are kept back
RANDOM_ROWS: Final = 64
SEED: Final = 20


@dataclass(frozen=True, slots=True)
class Rows:
    """`arrays` by input, a row for each to judge on, `labels` beside them; `calibration` likewise. `shared` if the
    calibration rows are among those that are judged."""

    arrays: Mapping[str, Array]
    labels: Array | None
    calibration: Mapping[str, Array]
    shared: bool
    random: bool

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def calibration_rows(self) -> int:
        return len(next(iter(self.calibration.values())))

    def write(self, work: Path) -> None:
        """`rows/`, `calibration/`, `labels.npy`."""
        write_arrays(work / "rows", self.arrays)
        write_arrays(work / "calibration", self.calibration)
        if self.labels is not None:
            np.save(work / "labels.npy", self.labels.astype(np.int64))


def rows(
    job: Job,
    inputs: Sequence[Tensor],
    preprocessing: Mapping[str, Any] | None = None,
    tokenize: Tokenize | None = None,
) -> Rows:
    """The rows of `job.data` for a network of such inputs, or random ones without it. UsageError for data that does not
    fit, SourceError for data that cannot be read."""
    preprocessing = preprocessing or {}
    if not job.data:
        return _random(inputs)
    found, labels = _read(Path(job.data), inputs, preprocessing, tokenize)
    fitted = _fitted(found, inputs, Path(job.data))
    count = _count(fitted)
    if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iu"):
        raise UsageError(
            f"labels are {labels.dtype} of the shape {list(labels.shape)}", hint=f"give {count} whole numbers"
        )
    if job.calibration_data:
        other, _ = _read(Path(job.calibration_data), inputs, preprocessing, tokenize)
        return Rows(fitted, labels, _fitted(other, inputs, Path(job.calibration_data)), shared=False, random=False)
    return _parted(fitted, labels, count)


def _parted(arrays: Mapping[str, Array], labels: Array | None, count: int) -> Rows:
    """Rows spread evenly over the data calibrate, and are judged on only where too few would be left."""
    wanted = np.unique(np.linspace(0, count - 1, min(CALIBRATION_ROWS, count)).round().astype(int))
    calibration = {name: np.ascontiguousarray(value[wanted]) for name, value in arrays.items()}
    shared = count - len(wanted) < GATED_ROWS
    kept = np.arange(count) if shared else np.setdiff1d(np.arange(count), wanted)
    return Rows(
        {name: value if shared else value[kept] for name, value in arrays.items()},
        None if labels is None else labels[kept],
        calibration,
        shared=shared,
        random=False,
    )


def _random(inputs: Sequence[Tensor]) -> Rows:
    """Noise for real numbers; for ids a few small ones, and masks of ones."""
    draw = np.random.default_rng(SEED)
    found: dict[str, Array] = {}
    for one in inputs:
        shape = (RANDOM_ROWS, *_whole(one))
        if np.dtype(one.dtype).kind == "f":
            found[one.name] = draw.standard_normal(shape, np.float32).astype(one.dtype)
        elif "mask" in one.name or np.dtype(one.dtype).kind == "b":
            found[one.name] = np.ones(shape, one.dtype)
        else:
            found[one.name] = draw.integers(0, 2, shape).astype(one.dtype)
    return Rows(found, None, {name: value[:32] for name, value in found.items()}, shared=True, random=True)


def _whole(one: Tensor) -> tuple[int, ...]:
    """The axes of one row; every one must be known."""
    axes = one.shape[1:]
    if any(axis is None for axis in axes):
        raise UsageError(
            f"the input {one.name!r} has the shape {list(one.shape)}, with free axes beside the first",
            hint=f"say them: --shape {one.name}=1,{','.join('?' if axis is None else str(axis) for axis in axes)}",
        )
    return tuple(axis for axis in axes if axis is not None)


# What was read, as the network takes it


def _fitted(found: Mapping[str, Array], inputs: Sequence[Tensor], path: Path) -> dict[str, Array]:
    if len(inputs) == 1 and len(found) == 1:  # one array for one input: its name does not matter
        found = {inputs[0].name: next(iter(found.values()))}
    missing = [one.name for one in inputs if one.name not in found]
    if missing:
        raise UsageError(
            f"{path} has no {', '.join(missing)}: it has {', '.join(found) or 'nothing'}",
            hint=f"the network takes {', '.join(one.name for one in inputs)}",
        )
    arrays = {one.name: _cast(found[one.name], one) for one in inputs}
    counts = {name: len(value) for name, value in arrays.items()}
    if len(set(counts.values())) != 1 or not next(iter(counts.values()), 0):
        raise UsageError(f"{path} has these numbers of rows: {counts}", hint="give one or more of each, as many")
    return arrays


def _cast(value: Array, one: Tensor) -> Array:
    shape = value.shape[1:]
    wanted = one.shape[1:]
    fits = len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))
    if value.ndim == 0 or not fits:
        raise UsageError(
            f"{one.name} has the shape {list(value.shape)}",
            hint=f"the network takes [rows, {', '.join('any' if axis is None else str(axis) for axis in wanted)}]",
        )
    kinds = ("f", "biu") if np.dtype(one.dtype).kind == "f" else ("biu", "")
    if value.dtype.kind not in kinds[0] + kinds[1]:
        raise UsageError(f"{one.name} is {value.dtype}", hint=f"the network takes {one.dtype}")
    return np.ascontiguousarray(value.astype(one.dtype, copy=False))


def _count(arrays: Mapping[str, Array]) -> int:
    return len(next(iter(arrays.values())))


# Files


def _read(
    path: Path, inputs: Sequence[Tensor], preprocessing: Mapping[str, Any], tokenize: Tokenize | None
) -> tuple[Mapping[str, Array], Array | None]:
    if path.is_dir():
        return _photos(path, inputs, preprocessing)
    if not path.is_file():
        raise SourceError(f"there is no {path}", hint="--inputs takes an .npz, a directory of photos, .txt or .jsonl")
    if path.suffix.lower() == ".npz":
        found = dict(npz(path))
        labels = found.pop(LABELS, None)
        return found, labels
    if tokenize is None:
        raise UsageError(
            f"{path} holds texts, and this source has no tokenizer", hint="give an .npz with an array for each input"
        )
    texts, labels = read_texts(path)
    return tokenize(texts), labels


def npz(path: Path) -> Mapping[str, Array]:
    """By name; SourceError if it is no such file."""
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                raise SourceError(f"{path} holds one array, which has no name", hint="numpy.savez writes an .npz")
            return dict(found)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise SourceError(f"{path} is no file of arrays: {e}", hint="numpy.savez writes one") from e


def read_texts(path: Path) -> tuple[list[str], Array | None]:
    """Of a .txt, one a line, or a .jsonl of objects with `text` (or `prompt`) and perhaps `label`; both may be .gz.
    Labels are numbered in the order of the alphabet. SourceError for anything else."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file]
        lines = [line for line in lines if line.strip()]
        if ".jsonl" not in path.suffixes:
            return lines, None
        values = [json.loads(line) for line in lines]
        texts = [value["text"] if "text" in value else value["prompt"] for value in values]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text is no string")
    except (OSError, ValueError, EOFError, KeyError, TypeError, zlib.error) as e:
        raise SourceError(f"{path} cannot be read: {e!r}", hint='one text a line, or {"text": …, "label": …}') from e
    if not all("label" in value for value in values):
        return texts, None
    names = sorted({str(value["label"]) for value in values})
    places = {name: place for place, name in enumerate(names)}
    return texts, np.array([places[str(value["label"])] for value in values])


def _photos(
    directory: Path, inputs: Sequence[Tensor], preprocessing: Mapping[str, Any]
) -> tuple[Mapping[str, Array], Array | None]:
    """All photos, each by `preprocessing`: `mean` and `std` of pixels in 0..1, `side`, `border` (docs/export.md)."""
    paths = sorted(path for path in directory.rglob("*") if path.suffix.lower() in PHOTOS)
    if not paths:
        raise UsageError(f"{directory} holds no photos", hint=f"their names end in {', '.join(PHOTOS)}")
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise UsageError(f"{directory} holds photos, and the network takes no image alone", hint="give an .npz")
    if "mean" not in preprocessing:
        raise UsageError(
            "the source does not say how its images are normalised",
            hint="give --mean and --std, of pixels in 0..1: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
        )
    axes = _whole(inputs[0])
    pixels = np.empty((len(paths), *axes), np.float32)
    mean, std = (np.array(preprocessing[name], np.float32)[:, None, None] for name in ("mean", "std"))
    for at, path in enumerate(paths):
        pixels[at] = (_cropped(path, axes, int(preprocessing.get("border", 0))) - mean) / std
    return {inputs[0].name: pixels}, _classes(directory, paths)


def _cropped(path: Path, axes: tuple[int, ...], border: int) -> npt.NDArray[np.float32]:
    """The middle of a photo as [3, height, width], 0..1: of its shorter side, side / (side + border)."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UsageError("photos are read by pillow, which is not installed", hint="pip install pillow") from None
    height, width = axes[1], axes[2]
    try:
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise SourceError(f"{path} is no photo: {e}", hint="take it out of the directory") from e
    scale = min(photo.width / width, photo.height / height) * height / (height + border)
    kept = (width * scale, height * scale)
    left, top = (photo.width - kept[0]) / 2, (photo.height - kept[1]) / 2
    box = (left, top, left + kept[0], top + kept[1])
    resized = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized, np.float32).transpose(2, 0, 1) / np.float32(255)


def _classes(directory: Path, paths: Sequence[Path]) -> Array | None:
    listed = directory / "labels.json"
    try:
        if listed.is_file():
            known = json.loads(listed.read_bytes())
            values = [known[str(path.relative_to(directory))] for path in paths]
            return np.array([value["class"] if isinstance(value, dict) else value for value in values], np.int64)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as e:
        raise SourceError(f"{listed} does not name the class of every photo: {e!r}", hint='{"a.jpg": 3, …}') from e
    if all(path.parent.name.isdigit() for path in paths):
        return np.array([int(path.parent.name) for path in paths])
    return None
