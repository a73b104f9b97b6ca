"""Environments of export: made from a lock and no other way, found again, and refused in clear words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edgewise.errors import MissingEnvironment, StorageError
from edgewise.export.work import environments
from edgewise.export.work.environments import (
    ENVIRONMENTS,
    PLATFORMS,
    SOURCES,
    STAMP,
    TARGETS,
    Environment,
    environment_for,
    install,
    missing_here,
    pins,
    source_python,
    stamp,
    target_python,
    unsupported,
)
from edgewise.export.work.worker import SOURCES as LOADED
from edgewise.export.work.worker import TARGETS as WRITTEN
from edgewise.models.store import locked

HERE = tuple(PLATFORMS.values())


def wheel(directory: Path, name: str, version: str, needs: tuple[str, ...] = ()) -> None:
    """A package that holds a version and nothing else, as pip wants it."""
    info = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        file.writestr(f"{info}/METADATA", head + "".join(f"Requires-Dist: {need}\n" for need in needs))
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """An environment of two packages that pip finds in a directory, and no index."""
    for number in ("1.0", "2.0"):
        wheel(tmp_path, "edgewise_tiny", number, (f"edgewise_below>={number}",))
        wheel(tmp_path, "edgewise_below", number)
    (tmp_path / "tiny.in").write_text("edgewise-tiny==1.0\n")
    (tmp_path / "tiny.txt").write_text("edgewise-below==1.0\nedgewise-tiny==1.0  # the one that was asked for\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return Environment("tiny", ("nothing",), HERE, sys.version_info[:2], "edgewise-tiny", 1000, tmp_path)


@pytest.fixture
def said() -> list[str]:
    return []


def version_in(python: Path) -> str:
    code = "import edgewise_tiny; print(edgewise_tiny.VERSION)"
    return subprocess.run([python, "-I", "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_an_environment_is_made_once_and_anew_when_its_lock_changes(
    tiny: Environment, tmp_path: Path, said: list[str]
) -> None:
    home = tmp_path / "home"
    assert stamp(tiny, home) is None
    done = install(tiny, home, said.append)
    assert done.made
    assert version_in(done.python) == "1.0"
    assert done.versions == {"edgewise-tiny": "1.0"}
    assert done.bytes > 1_000_000  # pip is in it
    assert any("--requirement" in line for line in said)

    said.clear()
    again = install(tiny, home, said.append)
    assert (again.made, again.python, said) == (False, done.python, [])

    (home / "environments" / "tiny" / STAMP).unlink()  # as if it had been killed before its end
    (home / "environments" / "tiny" / "left-over").touch()
    assert stamp(tiny, home) is None
    tiny.lock.write_text("edgewise-below==2.0\nedgewise-tiny==2.0\n")
    newer = install(tiny, home, said.append)
    assert newer.made
    assert version_in(newer.python) == "2.0"
    assert not (home / "environments" / "tiny" / "left-over").exists()

    tiny.lock.write_text("edgewise-below==1.0\nedgewise-tiny==1.0\n")
    assert stamp(tiny, home) is None  # it is of another lock

    newer.python.unlink()
    tiny.lock.write_text("edgewise-below==2.0\nedgewise-tiny==2.0\n")
    assert stamp(tiny, home) is None  # the Python that it was made with is gone


def test_what_pip_cannot_install_leaves_no_environment(
    tiny: Environment, tmp_path: Path, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    tiny.lock.write_text("edgewise-tiny==3.0\n")
    with pytest.raises(MissingEnvironment, match="pip could not install"):
        install(tiny, tmp_path / "home", said.append)
    assert stamp(tiny, tmp_path / "home") is None
    out, err = capfd.readouterr()
    assert out == ""
    assert "edgewise-tiny==3.0" in err


def test_a_second_process_is_told_to_wait(tiny: Environment, tmp_path: Path, said: list[str]) -> None:
    with locked(tmp_path, "environment-tiny"), pytest.raises(MissingEnvironment, match="another process"):
        install(tiny, tmp_path, said.append)
    assert said == []


def test_a_full_disk_is_seen_before_anything_is_fetched(tiny: Environment, tmp_path: Path, said: list[str]) -> None:
    large = Environment("tiny", (), HERE, sys.version_info[:2], "it", 1 << 60, tmp_path)
    with pytest.raises(StorageError, match="has"):
        install(large, tmp_path, said.append)
    assert said == []


@pytest.mark.parametrize(
    ("system", "machine", "name", "refused"),
    [
        ("Linux", "x86_64", "torch", False),
        ("Darwin", "arm64", "torch", False),
        ("Linux", "aarch64", "torch", True),
        ("Windows", "AMD64", "torch", True),
        ("Windows", "AMD64", "qnn", False),
        ("Darwin", "arm64", "qnn", True),
        ("Linux", "aarch64", "tensorrt", False),
        ("Darwin", "x86_64", "tensorflow", True),
    ],
)
def test_a_machine_without_wheels_hears_so(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    said: list[str],
    system: str,
    machine: str,
    name: str,
    refused: bool,
) -> None:
    monkeypatch.setattr(environments.platform, "system", lambda: system)
    monkeypatch.setattr(environments.platform, "machine", lambda: machine)
    why = unsupported(ENVIRONMENTS[name])
    assert (why is not None) is refused
    if refused:
        assert ENVIRONMENTS[name].lacks in str(why)
        with pytest.raises(MissingEnvironment, match="there is no wheel of"):
            install(ENVIRONMENTS[name], tmp_path, said.append)


def test_a_python_newer_than_the_wheels_hears_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.platform, "python_version", lambda: "3.99.0")
    monkeypatch.setattr(environments.sys, "version_info", (3, 99, 0))
    assert "for Python 3.99.0, up to 3.13 there is" in str(unsupported(ENVIRONMENTS["torch"]))


@pytest.fixture
def holding(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """As if this Python held exactly these packages."""

    def hold(there: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in there:
                raise environments.metadata.PackageNotFoundError(name)
            return there[name]

        monkeypatch.setattr(environments.metadata, "version", version)

    return hold


def test_this_python_serves_where_it_holds_the_same_versions(
    holding: Callable[[dict[str, str]], None], tmp_path: Path
) -> None:
    wanted = pins(ENVIRONMENTS["torch"].lock)
    holding({**{name: wanted[name] for name in TARGETS["onnx"][1]}, "torch": f"{wanted['torch']}+cpu"})
    assert target_python("onnx", tmp_path) == Path(sys.executable)
    with pytest.raises(MissingEnvironment) as lacking:
        target_python("litert", tmp_path)
    assert f"litert-torch {wanted['litert-torch']}" in lacking.value.message
    assert "torch 2" not in lacking.value.message.replace("litert-torch", "")
    assert lacking.value.hint == "edgewise doctor --install litert"


def test_another_version_does_not_serve(holding: Callable[[dict[str, str]], None], tmp_path: Path) -> None:
    holding({**pins(ENVIRONMENTS["qnn"].lock), "onnxruntime": "1.31.0"})
    with pytest.raises(MissingEnvironment, match=r"onnxruntime 1\.32\.0 \(here: 1\.31\.0\)"):
        target_python("qnn", tmp_path)


def test_a_made_environment_serves_and_a_broken_one_does_not(
    holding: Callable[[dict[str, str]], None], tmp_path: Path
) -> None:
    holding({})
    place = tmp_path / "environments" / "tensorflow"
    python = environments._inside(place)
    python.parent.mkdir(parents=True)
    python.touch()
    mark = {"lock": environments._sha256(ENVIRONMENTS["tensorflow"].lock), "python": "3.11", "versions": {}}
    (place / STAMP).write_text(json.dumps(mark))
    assert source_python("savedmodel", tmp_path) == python
    for broken in ("", "[]", "{}", json.dumps({**mark, "lock": "0"}), json.dumps({**mark, "more": 1})):
        (place / STAMP).write_text(broken)
        with pytest.raises(MissingEnvironment, match="not whole, or of another version") as raised:
            source_python("savedmodel", tmp_path)
        assert raised.value.hint == "edgewise doctor --install tensorflow"


def test_an_onnx_file_needs_nothing_more(holding: Callable[[dict[str, str]], None], tmp_path: Path) -> None:
    holding({})
    assert source_python("onnx", tmp_path) == Path(sys.executable)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_lock_holds_what_was_asked_for_and_all_that_is_imported(name: str) -> None:
    environment = ENVIRONMENTS[name]
    asked, locked_versions = pins(environment.locks / f"{name}.in"), pins(environment.lock)
    assert all(re.fullmatch(r"[\w.]+", version) for version in locked_versions.values())
    assert {one: version for one, version in asked.items() if version} == {
        one: locked_versions[one] for one, version in asked.items() if version
    }
    for where, needs in (*TARGETS.values(), *SOURCES.values()):
        if where == name:
            assert set(needs) <= set(environment.asked)


def test_every_target_and_source_of_the_worker_has_its_environment() -> None:
    assert TARGETS.keys() >= WRITTEN.keys()
    assert SOURCES.keys() | {"onnx"} >= LOADED.keys()
    assert {what for one in ENVIRONMENTS.values() for what in one.serves} >= TARGETS.keys()
    for target, (name, _) in TARGETS.items():
        assert environment_for(target) is ENVIRONMENTS[name]
    assert environment_for("tensorflow") is ENVIRONMENTS["tensorflow"]
    assert environment_for("llamacpp") is None


def test_the_development_environment_holds_what_qnn_and_tensorrt_need() -> None:
    for target in ("onnx", "qnn", "tensorrt"):
        name, needs = TARGETS[target]
        assert missing_here(ENVIRONMENTS[name], needs) == []
