"""A bundle's weights as the native kernels read them, kept beside the bundle so that they are packed once.

`.packed.bin` in a bundle's directory holds them and `.packed.json` says where each is (docs/formats/packed.md). Both
are a cache: they are written when a model is first loaded, made anew when they do not fit the manifest, and done
without where the directory cannot be written.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgewise.models.bundle import MANIFEST, Bundle, sha256
from edgewise.models.weights import Quantized
from edgewise.types import FloatArray

LAYOUT = 1  # of native.h; a change there is a new number here
DATA, INDEX = ".packed.bin", ".packed.json"
COLUMNS = 16  # outputs side by side
ALIGNMENT = 64
Checksum = Callable[[int, int], int]  # of bytes at an address
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Shapes = Mapping[str, tuple[int, ...]]  # of matrices (outputs, inputs), of vectors (count,)


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A matrix: its kind, and where its parts begin. `factor_bytes` are those of each scale and minimum."""

    outputs: int
    inputs: int
    bits: int
    block: int
    factor_bytes: int
    codes: int
    scales: int
    minima: int | None


class Vector(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """float32 numbers: how many, and where they begin."""

    count: int
    at: int


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`.packed.json`."""

    layout: int
    manifest: str  # SHA-256 of the bundle's edgewise.json
    bytes: int
    checksum: int  # `ew_checksum` of native/blocks.c
    matrices: dict[str, Place]
    vectors: dict[str, Vector]

    @property
    def shapes(self) -> Shapes:
        places, vectors = self.matrices.items(), self.vectors.items()
        return {name: (p.outputs, p.inputs) for name, p in places} | {name: (v.count,) for name, v in vectors}


@dataclass(frozen=True)
class Packed:
    """`memory` holds what the index says; views of it keep it alive."""

    matrices: Mapping[str, Place]
    vectors: Mapping[str, Vector]
    memory: Bytes
    file: mmap.mmap | None = None  # that the memory is a mapping of, and nothing else

    def give_back(self) -> None:
        """Pages that were read are no memory of this process any more; those that are used come again."""
        if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED)

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    def vector(self, name: str) -> FloatArray | None:
        place = self.vectors.get(name)
        return None if place is None else self.memory[place.at : place.at + 4 * place.count].view(np.float32)


def indexed(bundle: Bundle) -> Index | None:
    """The index, if there is one that fits the bundle; the data is not looked at."""
    try:
        index = msgspec.json.decode((bundle.path / INDEX).read_bytes(), type=Index)
        fits = index.layout == LAYOUT and index.manifest == sha256(bundle.path / MANIFEST)
        return index if fits and (bundle.path / DATA).stat().st_size == index.bytes else None
    except (OSError, ValueError):
        return None


def opened(bundle: Bundle, wanted: Callable[[Container[str]], Shapes], checksum: Checksum) -> Packed | None:
    """What was packed before; None if it is not there, of another bundle, or damaged. `wanted` gives the shapes of all
    that the model reads, in one of the forms whose names are there."""
    index = indexed(bundle)
    if index is None or index.shapes != wanted(index.shapes) or not _planned(index):
        return None
    try:
        with (bundle.path / DATA).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), index.bytes, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    packed = Packed(index.matrices, index.vectors, np.frombuffer(mapped, np.uint8), mapped)
    return packed if checksum(packed.address, index.bytes) == index.checksum else None


def made(
    bundle: Bundle,
    manifest: str,
    matrices: Mapping[str, Quantized],
    vectors: Mapping[str, FloatArray],
    *,
    fits_half: Callable[[Quantized], bool],
    pack: Callable[[Quantized, Place, int], None],
    checksum: Checksum,
) -> Packed:
    """Everything packed, into the bundle's directory if that can be written, else into memory. `manifest` is the hash
    of the bundle's from before the rest was read: if a pull replaces the bundle meanwhile, the index must not fit the
    new one. `fits_half` says whether float16 holds a matrix's scales and minima exactly; `pack` writes one to its place
    after an address. OSError if memory is out."""
    plan = _Plan()
    places = {
        name: plan.matrix(*m.shape, m.bits, m.block, 2 if fits_half(m) else 4, minima=m.minima is not None)
        for name, m in matrices.items()
    }
    rows = {name: plan.vector(values.size) for name, values in vectors.items()}
    with _room(bundle, plan.bytes) as (memory, keep):
        packed = Packed(places, rows, memory)
        for name, values in vectors.items():
            packed.memory[rows[name].at :][: 4 * values.size].view(np.float32)[:] = values.ravel()
        for name, matrix in matrices.items():
            pack(matrix, places[name], packed.address)
        if keep is not None:
            total = checksum(packed.address, plan.bytes)
            keep(Index(LAYOUT, manifest, plan.bytes, total, places, rows))
    return packed


class _Plan:
    """Hands out places one after the other."""

    def __init__(self) -> None:
        self.bytes = 0

    def matrix(self, outputs: int, inputs: int, bits: int, block: int, factor_bytes: int, *, minima: bool) -> Place:
        padded = -(-outputs // COLUMNS) * COLUMNS
        factors = padded * (inputs // block) * factor_bytes
        codes, scales = self._take(padded * inputs * bits // 8), self._take(factors)
        return Place(outputs, inputs, bits, block, factor_bytes, codes, scales, self._take(factors) if minima else None)

    def vector(self, count: int) -> Vector:
        return Vector(count, self._take(4 * count))

    def _take(self, size: int) -> int:
        at = self.bytes
        self.bytes += -(-size // ALIGNMENT) * ALIGNMENT
        return at


def _planned(index: Index) -> bool:
    """Whether everything is of a kind that the kernels know and stands where it was planned. Its shapes being right, no
    number of the index then leads beyond the data."""
    places = index.matrices.values()
    if not all(p.bits in (4, 8) and p.block in (16, 32) and p.factor_bytes in (2, 4) for p in places):
        return False
    plan = _Plan()
    again = [
        plan.matrix(p.outputs, p.inputs, p.bits, p.block, p.factor_bytes, minima=p.minima is not None) for p in places
    ]
    vectors = [plan.vector(vector.count) for vector in index.vectors.values()]
    return again == [*places] and vectors == [*index.vectors.values()] and plan.bytes == index.bytes


Keep = Callable[[Index], None]


@contextmanager
def _room(bundle: Bundle, size: int) -> Iterator[tuple[Bytes, Keep | None]]:
    """Memory for so many bytes: a new file, which `keep` puts in its place with an index, or none."""
    try:
        for left in bundle.path.glob(f"{DATA}.*"):  # by a process that was killed; one that lives does without its name
            left.unlink(missing_ok=True)
        part, memory = _mapped(bundle.path, size)
    except OSError:
        yield np.frombuffer(mmap.mmap(-1, size), np.uint8), None
        return
    try:
        yield memory, partial(_keep, bundle, part)
    finally:
        part.unlink(missing_ok=True)


def _mapped(directory: Path, size: int) -> tuple[Path, Bytes]:
    """A new file of that size. OSError if the disk has not the room: a page without a block would end the process."""
    if not hasattr(os, "posix_fallocate"):
        raise OSError("no room can be reserved here")
    number, name = tempfile.mkstemp(prefix=f"{DATA}.", dir=directory)
    try:
        os.fchmod(number, (directory / MANIFEST).stat().st_mode & 0o666)  # for whoever may read the bundle
        os.posix_fallocate(number, 0, size)
        return Path(name), np.frombuffer(mmap.mmap(number, size), np.uint8)
    except OSError:
        Path(name).unlink()
        raise
    finally:
        os.close(number)


def _keep(bundle: Bundle, part: Path, index: Index) -> None:
    """The data first; an older index beside it does not have its checksum."""
    notes = part.with_name(f"{part.name}.json")
    try:
        notes.write_bytes(msgspec.json.encode(index))
        part.replace(bundle.path / DATA)
        notes.replace(bundle.path / INDEX)
    except OSError:  # then another process keeps its own, or it is packed again next time
        notes.unlink(missing_ok=True)
