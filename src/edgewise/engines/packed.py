"""A bundle's weights as the native kernels read them, kept beside the bundle so that they are packed once.

`.packed.bin` in a bundle's directory holds them and `.packed.json` says where each is (docs/formats/packed.md). Both
are a cache: they are written when a model is first loaded, made anew when they do not fit the manifest, and done
without where the directory cannot be written.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
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


@dataclass(frozen=True)
class Packed:
    """`memory` holds what the index says; views of it keep it alive."""

    matrices: Mapping[str, Place]
    vectors: Mapping[str, Vector]
    memory: Bytes

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


def opened(bundle: Bundle, checksum: Checksum) -> Packed | None:
    """What was packed before; None if it is not there, of another bundle, or damaged."""
    index = indexed(bundle)
    if index is None:
        return None
    try:
        with (bundle.path / DATA).open("rb") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), index.bytes, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError):
        return None
    packed = Packed(index.matrices, index.vectors, memory)
    return packed if checksum(packed.address, index.bytes) == index.checksum else None


def made(
    bundle: Bundle,
    matrices: Mapping[str, Quantized],
    vectors: Mapping[str, FloatArray],
    *,
    fits_half: Callable[[Quantized], bool],
    pack: Callable[[Quantized, Place, int], None],
    checksum: Checksum,
) -> Packed:
    """Everything packed, into the bundle's directory if that can be written, else into memory. `fits_half` says whether
    float16 holds a matrix's scales and minima exactly; `pack` writes one to its place after an address."""
    plan = _Plan()
    places = {name: plan.matrix(matrix, 2 if fits_half(matrix) else 4) for name, matrix in matrices.items()}
    rows = {name: Vector(values.size, plan.take(4 * values.size)) for name, values in vectors.items()}
    with _room(bundle, plan.bytes) as (memory, keep):
        packed = Packed(places, rows, memory)
        for name, values in vectors.items():
            packed.memory[rows[name].at :][: 4 * values.size].view(np.float32)[:] = values.ravel()
        for name, matrix in matrices.items():
            pack(matrix, places[name], packed.address)
        if keep is not None:
            total = checksum(packed.address, plan.bytes)
            keep(Index(LAYOUT, sha256(bundle.path / MANIFEST), plan.bytes, total, places, rows))
    return packed


class _Plan:
    """Hands out places one after the other."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, size: int) -> int:
        at = self.bytes
        self.bytes += -(-size // ALIGNMENT) * ALIGNMENT
        return at

    def matrix(self, matrix: Quantized, factor_bytes: int) -> Place:
        outputs, inputs = matrix.shape
        padded = -(-outputs // COLUMNS) * COLUMNS
        factors = padded * (inputs // matrix.block) * factor_bytes
        codes, scales = self.take(padded * inputs * matrix.bits // 8), self.take(factors)
        minima = None if matrix.minima is None else self.take(factors)
        return Place(outputs, inputs, matrix.bits, matrix.block, factor_bytes, codes, scales, minima)


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
        os.posix_fallocate(number, 0, size)
        return Path(name), np.frombuffer(mmap.mmap(number, size), np.uint8)
    except OSError:
        Path(name).unlink()
        raise
    finally:
        os.close(number)


def _keep(bundle: Bundle, part: Path, index: Index) -> None:
    """An index never stands beside another's data."""
    notes = part.with_name(f"{part.name}.json")
    try:
        notes.write_bytes(msgspec.json.encode(index))
        (bundle.path / INDEX).unlink(missing_ok=True)
        part.replace(bundle.path / DATA)
        notes.replace(bundle.path / INDEX)
    except OSError:  # then it is packed again next time
        notes.unlink(missing_ok=True)
