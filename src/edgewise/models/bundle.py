"""The bundle: a model ready to run, as docs/formats/bundle.md describes it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

import msgspec

from edgewise.errors import BundleError, HashMismatch
from edgewise.models.card import Card

FORMAT: Final = 1
MANIFEST: Final = "edgewise.json"
MANIFEST_LIMIT: Final = 8 << 20
HASHERS = 4  # threads
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file must be."""

    bytes: int
    sha256: str


class BlockEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph of decoder layers first..last, both included."""

    file: str
    first: int
    last: int


class Graphs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    embed: str
    blocks: tuple[BlockEntry, ...]
    head: str

    @property
    def layers_and_head(self) -> tuple[str, ...]:
        """The graphs that compute."""
        return (*(block.file for block in self.blocks), self.head)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`edgewise.json`."""

    format: int
    name: str
    card: dict[str, Any]
    graphs: Graphs
    files: dict[str, FileEntry]
    source: dict[str, Any]
    licence: dict[str, Any]
    quantization: dict[str, Any]
    parity: dict[str, Any]
    tools: dict[str, str]


class _Version(msgspec.Struct):
    """The one key that every format has."""

    format: Any = None


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose manifest was read. Files are verified all at once or as they are needed."""

    path: Path
    manifest: Manifest
    card: Card = field(repr=False)
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def name(self) -> str:
        """What it is called here: its directory, which its user may have renamed."""
        return self.path.resolve().name

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def weights(self) -> str:
        """SHA-256 in hex over card, graphs and their tensors. Bundles with the same one compute the same, whoever
        made them and whatever they are called."""
        graphs = self.manifest.graphs
        files = {name: entry.sha256 for name, entry in self.manifest.files.items() if "/" in name}
        activations = self.manifest.quantization.get("activations")
        parts = (self.manifest.card, graphs, sorted(files.items()), activations)
        return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()

    def file(self, relative: str) -> Path:
        """The path of a file that the manifest lists; BundleError if it does not."""
        if relative not in self.manifest.files:
            raise BundleError(f"the manifest of {self.name!r} does not list {relative!r}", hint=_AGAIN)
        return self.path / relative

    def verify(self, files: Iterable[str]) -> None:
        """Compare the SHA-256 of these files with the manifest, of each once. HashMismatch, or BundleError."""
        entries = self.manifest.files
        new = sorted(set(files) - self._verified, key=lambda name: -entries[name].bytes)  # large ones first
        with ThreadPoolExecutor(HASHERS) as pool:  # hashing is what a start would wait for
            list(pool.map(lambda name: _check_hash(self.path, name, entries[name]), new))
        self._verified.update(new)

    @staticmethod
    def open(path: Path, check: bool = True) -> Bundle:
        """Read the manifest and compare every file's size with it; with `check`, verify every file. Without, whoever
        reads a file verifies it. BundleError or HashMismatch, never another error, whatever the bytes are."""
        manifest = _read_manifest(path)
        bundle = Bundle(path, manifest, Card.from_json(manifest.card))
        _check_graphs(bundle)
        for relative, entry in manifest.files.items():
            _check_size(path, relative, entry)
        if check:
            bundle.verify(manifest.files)
        return bundle


_AGAIN = "pull the model again"


def sha256(path: Path) -> str:
    """Lower-case hex SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_manifest(directory: Path, **keys: Any) -> None:
    """List and hash all files of a finished directory and write its manifest; `keys` are those of Manifest that are
    not derived from the directory."""
    files = {
        f.relative_to(directory).as_posix(): FileEntry(f.stat().st_size, sha256(f))
        for f in sorted(directory.rglob("*"))
        if f.is_file()
    }
    manifest = Manifest(format=FORMAT, files=files, **keys)
    (directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}", hint="`edgewise pull` makes bundles")
    try:
        if file.stat().st_size > MANIFEST_LIMIT:
            raise BundleError(
                f"{file} has {file.stat().st_size} bytes; a manifest has at most {MANIFEST_LIMIT}", hint=_AGAIN
            )
        data = file.read_bytes()
        _check_format(file, data)
        manifest = msgspec.json.decode(data, type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BundleError(f"{file} is not a readable manifest: {e}", hint=_AGAIN) from e
    if not NAME.fullmatch(manifest.name):
        raise BundleError(
            f"{file} has the name {manifest.name!r}; letters, digits, '.', '_' and '-' are allowed", hint=_AGAIN
        )
    return manifest


def _check_format(file: Path, data: bytes) -> None:
    """The version first: a later format may have other keys, and the user must hear about the version, not the keys."""
    version = msgspec.json.decode(data, type=_Version).format
    if version != FORMAT:
        raise BundleError(f"{file} has format {version!r}; this version reads {FORMAT}", hint=_AGAIN)


def _check_graphs(bundle: Bundle) -> None:
    graphs = bundle.manifest.graphs
    for file in (graphs.embed, *graphs.layers_and_head):
        bundle.file(file)
    starts = [0, *(block.last + 1 for block in graphs.blocks)]
    follow = all(start == block.first <= block.last for start, block in zip(starts, graphs.blocks, strict=False))
    if not follow or starts[-1] != bundle.card.layers:
        raise BundleError(
            f"the blocks of {bundle.name!r} are not layers 0..{bundle.card.layers - 1}, each once, in order",
            hint=_AGAIN,
        )


def _check_size(path: Path, relative: str, entry: FileEntry) -> None:
    place = PurePosixPath(relative)
    if place.is_absolute() or ".." in place.parts or "\\" in relative or "\0" in relative or relative == MANIFEST:
        raise BundleError(f"the manifest lists the path {relative!r}, which may not leave the bundle", hint=_AGAIN)
    file = path / relative
    if file.is_symlink() or not file.is_file():
        raise BundleError(f"{file} is missing or not a plain file", hint=_AGAIN)
    size = file.stat().st_size
    if size != entry.bytes:
        raise HashMismatch(f"{file} has {size} bytes, the manifest says {entry.bytes}", hint=_AGAIN)


def _check_hash(path: Path, relative: str, entry: FileEntry) -> None:
    try:
        found = sha256(path / relative)
    except OSError as e:
        raise BundleError(f"{path / relative} cannot be read: {e}") from e
    if found != entry.sha256:
        raise HashMismatch(
            f"{path / relative} has SHA-256 {found[:16]}…, the manifest says {entry.sha256[:16]}…",
            hint="the file was changed or damaged; pull the model again",
        )
