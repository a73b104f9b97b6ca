"""The cache of packed weights: what it gives is what packing gives, and nothing that happens to it is an error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgewise.engines import native_lm, packed
from edgewise.engines.base import Row
from edgewise.engines.native_lm import NativeLM
from edgewise.errors import HashMismatch
from edgewise.models.bundle import MANIFEST, Bundle
from edgewise.models.source import pull
from tiny import save_gguf, tiny

if native_lm.probe() is None:
    pytest.skip("the native kernels are not built for this machine", allow_module_level=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    source = save_gguf(tiny("qwen2"), tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q4_1)
    return pull(str(source), home=tmp_path)


async def logits(bundle: Bundle) -> np.ndarray:
    model = NativeLM(Bundle.open(bundle.path, check=False), slots=1)
    await model.open("s", 20)
    (found,) = await model.forward([Row("s", 0, np.arange(20), 20)])
    found = found.copy()
    await model.shutdown()
    return found


def opened(bundle: Bundle) -> packed.Packed | None:
    library = native_lm._library()
    assert library is not None
    return packed.opened(bundle, partial(native_lm._shapes, bundle.card), library.ew_checksum)


def rewrite(bundle: Bundle, **changes: object) -> None:
    path = bundle.path / packed.INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


async def test_the_second_start_reads_what_the_first_packed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    first = await logits(bundle)
    monkeypatch.setattr(packed, "made", pytest.fail)
    assert np.array_equal(first, await logits(bundle))
    for block in bundle.manifest.graphs.blocks:  # which are not needed any more
        bundle.file(block.file).write_bytes(b"\0" * bundle.file(block.file).stat().st_size)
    assert np.array_equal(first, await logits(bundle))


DAMAGES: dict[str, Callable[[Bundle], object]] = {
    "a bit of the data": lambda b: flip(b.path / packed.DATA),
    "data cut off": lambda b: os.truncate(b.path / packed.DATA, 1000),
    "no data": lambda b: (b.path / packed.DATA).unlink(),
    "no index": lambda b: (b.path / packed.INDEX).unlink(),
    "not JSON": lambda b: (b.path / packed.INDEX).write_bytes(b"\xff{"),
    "another layout": lambda b: rewrite(b, layout=packed.LAYOUT + 1),
    "another bundle's": lambda b: rewrite(b, manifest="0" * 64),
    "another size": lambda b: rewrite(b, bytes=0),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_does_not_fit_is_made_anew(damage: str, bundle: Bundle) -> None:
    first = await logits(bundle)
    DAMAGES[damage](bundle)
    assert opened(bundle) is None
    assert np.array_equal(first, await logits(bundle))
    assert opened(bundle) is not None
    assert sorted(path.name for path in bundle.path.glob(".packed*")) == [packed.DATA, packed.INDEX]


@pytest.mark.parametrize("error", [PermissionError, OSError(28, "No space left on device")])
async def test_without_room_on_the_disk_it_is_packed_into_memory(
    error: BaseException, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(os, "posix_fallocate", full)
    first = await logits(bundle)
    assert list(bundle.path.glob(".packed*")) == []
    monkeypatch.undo()
    assert np.array_equal(first, await logits(bundle))
    assert opened(bundle) is not None


async def test_an_index_that_cannot_be_written_leaves_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    first = await logits(bundle)
    monkeypatch.undo()
    assert list(bundle.path.glob(".packed*")) == []
    assert np.array_equal(first, await logits(bundle))


async def test_of_two_that_pack_at_once_one_is_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = packed._keep

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(packed, "_keep", keep)
        NativeLM(Bundle.open(bundle.path, check=False), slots=1)  # which clears away what the first one has so far
        keep(*arguments)

    monkeypatch.setattr(packed, "_keep", late)
    first = await logits(bundle)
    assert opened(bundle) is not None
    assert sorted(path.name for path in bundle.path.glob(".packed*")) == [packed.DATA, packed.INDEX]
    assert np.array_equal(first, await logits(bundle))


async def test_of_a_bundle_that_is_replaced_meanwhile_nothing_is_kept(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, read = bundle.path / MANIFEST, native_lm.vectors

    def replaced(bundle: Bundle) -> Any:
        manifest.write_bytes(manifest.read_bytes() + b" ")
        return read(bundle)

    monkeypatch.setattr(native_lm, "vectors", replaced)
    await logits(bundle)
    assert opened(bundle) is None


async def test_who_may_read_the_bundle_may_read_the_cache(bundle: Bundle) -> None:
    await logits(bundle)
    mode = (bundle.path / MANIFEST).stat().st_mode
    assert {(bundle.path / file).stat().st_mode for file in (packed.DATA, packed.INDEX)} == {mode}


async def test_damaged_weights_are_not_packed(bundle: Bundle) -> None:
    flip(bundle.path / "blocks" / "block-00.data")
    with pytest.raises(HashMismatch, match=r"block-00.data"):
        await logits(bundle)
    assert list(bundle.path.glob(".packed*")) == []
