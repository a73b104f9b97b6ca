"""Bundles and the store: what is damaged is refused by name, and a failed pull leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgewise.engines.onnx_lm import OnnxLM
from edgewise.errors import (
    BundleError,
    EdgewiseError,
    HashMismatch,
    LicenceError,
    SourceError,
    UnknownModel,
    UsageError,
)
from edgewise.models.bundle import MANIFEST, Bundle
from edgewise.models.download import SHIPPED
from edgewise.models.source import pull
from edgewise.models.store import find, list_bundles, making, remove
from tiny import save_gguf, save_hf, tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tiny("llama"), tmp_path_factory.mktemp("source") / "tiny.gguf", gguf.GGMLQuantizationType.Q4_1)


@pytest.fixture
def bundle(source: Path, tmp_path: Path) -> Bundle:
    return pull(str(source), home=tmp_path)


def edit(bundle: Bundle, **changes: object) -> None:
    file = bundle.path / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_bundle_opens_as_it_was_written(bundle: Bundle) -> None:
    again = Bundle.open(bundle.path)
    assert again == bundle
    on_disk = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()}
    assert on_disk == set(bundle.manifest.files) | {MANIFEST}
    assert "tokenizer.json" in on_disk
    assert bundle.bytes == sum((bundle.path / f).stat().st_size for f in bundle.manifest.files)


def test_every_changed_file_is_caught(bundle: Bundle) -> None:
    for relative in bundle.manifest.files:
        file = bundle.path / relative
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(HashMismatch, match=r"SHA-256.*pull the model again"):
            Bundle.open(bundle.path)
        file.write_bytes(data[:-1])
        with pytest.raises(HashMismatch, match="bytes, the manifest says"):
            Bundle.open(bundle.path, check=False)
        file.unlink()
        with pytest.raises(BundleError, match="missing"):
            Bundle.open(bundle.path)
        file.write_bytes(data)
    Bundle.open(bundle.path)


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "blocks/../../outside", "a\\b", MANIFEST])
def test_paths_stay_inside(bundle: Bundle, path: str) -> None:
    (bundle.path.parent / "outside").write_text("x")
    files = msgspec.to_builtins(bundle.manifest.files)
    edit(bundle, files=files | {path: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(BundleError, match="may not leave"):
        Bundle.open(bundle.path)


def test_links_are_not_followed(bundle: Bundle) -> None:
    file = bundle.path / "tokenizer.json"
    elsewhere = bundle.path.parent / "elsewhere.json"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(BundleError, match="not a plain file"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_formats_are_named(bundle: Bundle, version: object) -> None:
    edit(bundle, format=version, a_key_of_tomorrow=1)
    with pytest.raises(BundleError, match=r"format .*; this version reads 1"):
        Bundle.open(bundle.path)


def test_unknown_keys_are_refused(bundle: Bundle) -> None:
    edit(bundle, shiny=True)
    with pytest.raises(BundleError, match="shiny"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(("key", "by"), [("last", -1), ("last", 1), ("first", -5), ("first", 1)])
def test_gaps_between_blocks_are_refused(bundle: Bundle, key: str, by: int) -> None:
    graphs = msgspec.to_builtins(bundle.manifest.graphs)
    graphs["blocks"][0][key] += by
    edit(bundle, graphs=graphs)
    with pytest.raises(BundleError, match="each once, in order"):
        Bundle.open(bundle.path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_manifest_makes_another_error(bundle: Bundle, data: st.DataObject) -> None:
    """Random damage to the manifest: it is refused as a BundleError, or harmless."""
    original = (bundle.path / MANIFEST).read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    damage = data.draw(st.binary(min_size=0, max_size=6))
    try:
        (bundle.path / MANIFEST).write_bytes(original[:at] + damage + original[at + data.draw(st.integers(0, 6)) :])
        Bundle.open(bundle.path, check=False)
    except BundleError:
        pass
    finally:
        (bundle.path / MANIFEST).write_bytes(original)


async def test_a_graph_that_the_runtime_cannot_load(bundle: Bundle) -> None:
    opened = Bundle.open(bundle.path)
    (bundle.path / bundle.manifest.graphs.head).write_bytes(b"not a graph" * 40)
    with pytest.raises(BundleError, match=r"cannot load blocks/head\.onnx"):
        OnnxLM(opened)  # verified before the damage: its hashes are not looked at again
    with pytest.raises(HashMismatch, match=r"head\.onnx"):
        OnnxLM(Bundle.open(bundle.path, check=False))


def test_store_finds_lists_and_removes(bundle: Bundle, tmp_path: Path) -> None:
    assert list_bundles(tmp_path) == [bundle]
    assert find("tiny", tmp_path) == find(str(bundle.path), tmp_path) == bundle
    with pytest.raises(UnknownModel, match=r"no bundle 'absent'; here: tiny"):
        find("absent", tmp_path)
    remove("tiny", tmp_path)
    assert list_bundles(tmp_path) == []
    assert not list((tmp_path / "bundles").iterdir())
    with pytest.raises(UnknownModel):
        remove("tiny", tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "../bundles/tiny", ".hidden"])
def test_only_names_of_the_store_are_removed(bundle: Bundle, tmp_path: Path, name: str) -> None:
    with pytest.raises(EdgewiseError):
        remove(name, tmp_path)
    assert bundle.path.is_dir()


def test_pull_replaces_a_bundle_of_the_same_name(bundle: Bundle, source: Path, tmp_path: Path) -> None:
    again = pull(str(source), home=tmp_path, name=bundle.name, requantize="int8")
    assert again.path == bundle.path
    assert [b.manifest.quantization["weights"] for b in list_bundles(tmp_path)] == ["int8"]
    assert [p.name for p in (tmp_path / "bundles").iterdir()] == ["tiny"]


def test_a_bundle_is_pulled_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / ".packed.bin").write_bytes(b"what this machine made of it")
    copy = pull(str(bundle.path), home=tmp_path / "other", name="copy")
    assert (copy.name, copy.manifest, copy.weights) == ("copy", bundle.manifest, bundle.weights)
    Bundle.open(copy.path)
    assert not (copy.path / ".packed.bin").exists()
    assert pull(str(bundle.path), home=tmp_path / "other").name == "tiny"


@pytest.mark.parametrize("name", SHIPPED)
def test_what_comes_with_edgewise_is_pulled_by_its_name(name: str, tmp_path: Path) -> None:
    found = pull(name, home=tmp_path)
    assert found.name == found.manifest.name == name
    assert found.bytes <= 30_000_000
    Bundle.open(found.path)


def test_a_bundle_is_not_rounded_by_pull(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a bundle already.*edgewise quantize"):
        pull(str(bundle.path), home=tmp_path / "other", requantize="int4")


def test_a_damaged_bundle_is_not_pulled(bundle: Bundle, tmp_path: Path) -> None:
    file = max(bundle.path.glob("blocks/*.data"), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(HashMismatch, match=file.name):
        pull(str(bundle.path), home=tmp_path / "other")
    assert list((tmp_path / "other" / "bundles").iterdir()) == []


def test_terms_of_a_bundle_are_accepted_too(bundle: Bundle, tmp_path: Path) -> None:
    edit(bundle, licence={"id": "some-terms", "accepted": True})
    with pytest.raises(LicenceError, match="some-terms"):
        pull(str(bundle.path), home=tmp_path / "other")
    assert pull(str(bundle.path), home=tmp_path / "other", accept_licence=True).name == "tiny"


def others(home: Path) -> list[str]:
    """What lies in the store beside its bundles."""
    return [p.name for p in (home / "bundles").iterdir() if p.name.startswith(".")]


def test_a_second_pull_of_one_name_says_so(bundle: Bundle, source: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def meanwhile(what: str, done: int, total: int) -> None:
        for act in (lambda: pull(str(source), home=tmp_path), lambda: remove("tiny", tmp_path)):
            with pytest.raises(BundleError, match=r"another pull or rm is at work on 'tiny' \(wait"):
                act()
        assert find("tiny", tmp_path) == bundle  # the old one stays until the new one is whole
        pull(str(source), home=tmp_path, name="other")
        seen.append(what)

    pull(str(source), home=tmp_path, progress=meanwhile)
    assert seen
    assert [b.name for b in list_bundles(tmp_path)] == ["other", "tiny"]
    assert others(tmp_path) == []


def test_two_threads_pull_one_name(source: Path, tmp_path: Path) -> None:
    def attempt(_: int) -> str:
        try:
            return pull(str(source), home=tmp_path).name
        except BundleError as error:
            return error.message

    with ThreadPoolExecutor(4) as pool:
        said = set(pool.map(attempt, range(8)))
    assert "tiny" in said
    assert said <= {"tiny", "another pull or rm is at work on 'tiny'"}
    Bundle.open(tmp_path / "bundles/tiny")
    assert others(tmp_path) == []


KILLED = """
import os, sys
from pathlib import Path
from edgewise.models import source, store
moment = sys.argv[3]
if moment == "making":
    source.write_manifest = lambda *a, **k: os._exit(9)
if moment == "swapping":
    whole = Path.rename
    Path.rename = lambda self, target: whole(self, target) if target.suffix == ".replaced" else os._exit(9)
if moment == "removing":
    store.shutil.rmtree = lambda path, **k: os._exit(9) if Path(path).exists() else None
    store.remove("tiny", Path(sys.argv[2]))
source.pull(sys.argv[1], home=Path(sys.argv[2]))
"""


@pytest.mark.parametrize("moment", ["making", "swapping", "removing"])
def test_what_a_killed_process_leaves_is_cleared(moment: str, bundle: Bundle, source: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(tmp_path), moment], timeout=60)
    assert done.returncode == 9
    assert others(tmp_path)
    with making("tiny", tmp_path) as work:  # the next to take the name finds the old bundle, unless it was removed
        assert bundle.path.exists() == (moment != "removing")
        work.mkdir()
    assert others(tmp_path) == []
    pull(str(source), home=tmp_path)
    assert others(tmp_path) == []
    Bundle.open(bundle.path)


def test_a_bundle_that_cannot_be_made_leaves_the_old_one(bundle: Bundle, source: Path, tmp_path: Path) -> None:
    def full(what: str, done: int, total: int) -> None:
        if done:
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        pull(str(source), home=tmp_path, progress=full)
    assert Bundle.open(bundle.path) == bundle
    assert others(tmp_path) == []


def test_truncated_gguf(source: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"cut\.gguf"):
        pull(str(cut), home=tmp_path)
    assert not list((tmp_path / "bundles").glob("*"))


@pytest.mark.parametrize("data", [b"", b"GG", b"PK\x03\x04", b"<html>no model here</html>"])
def test_a_file_that_is_no_model(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(data)
    with pytest.raises(SourceError, match=r"no model that we know.*\.gguf file"):
        pull(str(file), home=tmp_path)


@pytest.mark.parametrize("source", ["./absent.gguf", "absent", "a/b/c", ""])
def test_a_source_that_is_nowhere(source: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"smollm2-135m"):
        pull(source, home=tmp_path)


def test_a_bad_name_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle name"):
        pull(str(source), home=tmp_path, name="../up")


def test_terms_must_be_accepted(tmp_path: Path) -> None:
    directory = save_hf(tiny("llama"), tmp_path / "hf")
    (directory / "README.md").write_text("---\nlanguage: en\nlicense: llama3\n---\n")
    (directory / "LICENSE").write_text("terms")
    with pytest.raises(LicenceError, match=r"llama3.*--accept-licence"):
        pull(str(directory), home=tmp_path)
    bundle = pull(str(directory), home=tmp_path, accept_licence=True)
    assert bundle.manifest.licence == {"id": "llama3", "accepted": True}
    assert (bundle.path / "LICENSE").read_text() == "terms"
