"""The environments that targets and sources work in: what each holds, the Python that has it, and how one is made.

Converters are large and want versions that do not live beside a server's. So each is pinned in a lock of its own,
`environments/NAME.txt`, made from the short `NAME.in` beside it by scripts/environment_pins.py, and installed into
`EDGEWISE_HOME/environments/NAME/` by `edgewise doctor --install TARGET`. The Python that runs Edgewise serves as well,
if it holds the same versions of what is asked for by name.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from edgewise.errors import BundleError, MissingEnvironment, StorageError
from edgewise.models.store import locked

LOCKS: Final = Path(__file__).with_name("environments")
STDERR: Final = 2  # the descriptor: sys.stderr may be something that no other process can write to
STAMP: Final = "edgewise-environment.json"  # written last: without it, an environment is not whole
ROOM: Final = 1.5  # times its own size: wheels are unpacked beside it
PLATFORMS: Final = {
    ("Linux", "x86_64"): "Linux x86-64",
    ("Linux", "aarch64"): "Linux aarch64",
    ("Darwin", "arm64"): "macOS arm64",
    ("Windows", "AMD64"): "Windows x64",
}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Environment:
    """One lock. `platforms` and `newest` are where all of its wheels exist, `lacks` says which one does not elsewhere;
    `size_bytes` is what it took on Linux x86-64, with the CPU's torch."""

    name: str
    serves: tuple[str, ...]
    platforms: tuple[str, ...]
    newest: tuple[int, int]  # Python
    lacks: str
    size_bytes: int
    locks: Path = LOCKS

    @property
    def lock(self) -> Path:
        return self.locks / f"{self.name}.txt"

    @property
    def asked(self) -> tuple[str, ...]:
        """The names of NAME.in: what somebody chose, and not what those need."""
        return tuple(pins(self.locks / f"{self.name}.in"))


ENVIRONMENTS: Final = {
    one.name: one
    for one in (
        Environment(
            "torch",
            ("torch and Hugging Face sources", "onnx", "litert", "litertlm", "coreml"),
            ("Linux x86-64", "macOS arm64"),
            (3, 13),
            "litert-converter and coremltools",
            2_470_000_000,
        ),
        Environment(
            "qnn",
            ("qnn",),
            ("Linux x86-64", "Windows x64"),
            (3, 14),
            "onnxruntime-qnn with Hexagon's compiler and emulator",
            545_000_000,
        ),
        Environment(
            "tensorrt",
            ("tensorrt",),
            ("Linux x86-64", "Linux aarch64", "Windows x64"),
            (3, 14),
            "tensorrt-rtx-cu13-libs",
            450_000_000,
        ),
        Environment(
            "tensorflow",
            ("SavedModel sources",),
            ("Linux x86-64", "Windows x64"),
            (3, 13),
            "tensorflow-cpu",
            1_570_000_000,
        ),
    )
}

# What a target or a source imports itself; a Python with these versions will do, whatever else it lacks.
TORCH: Final = ("torch", "transformers", "safetensors", "pillow", "numpy")
LITERT: Final = (*TORCH, "litert-torch", "ai-edge-litert", "ai-edge-quantizer", "litert-lm-api")
TARGETS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "onnx": ("torch", (*TORCH, "onnx", "onnxscript", "onnxruntime")),
    "litert": ("torch", LITERT),
    "litertlm": ("torch", LITERT),
    "coreml": ("torch", (*TORCH, "coremltools", "scikit-learn")),
    "qnn": ("qnn", ("onnxruntime-qnn", "onnxruntime", "onnx", "numpy")),
    "tensorrt": ("tensorrt", ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings", "onnxruntime", "onnx", "numpy")),
}
SOURCES: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    # where a torch source is loaded, it is also made the ONNX file that some targets begin with
    **dict.fromkeys(("torch", "program", "hf", "efficientnet", "language"), TARGETS["onnx"]),
    "savedmodel": ("tensorflow", ("tensorflow-cpu", "pillow", "numpy")),
}


@dataclass(frozen=True, slots=True)
class Stamp:
    """What an environment says of itself."""

    lock: str  # sha256
    python: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Installed:
    """`python` has all of it; `made` is false if it was there before."""

    environment: str
    python: Path
    made: bool
    seconds: float
    bytes: int
    versions: Mapping[str, str]


def target_python(target: str, home: Path) -> Path:
    """The Python in which `target` is converted and proved; MissingEnvironment if there is none."""
    return _python(target, *TARGETS[target], home)


def source_python(kind: str, home: Path) -> Path:
    """The Python that loads sources of that kind; MissingEnvironment if there is none."""
    if kind not in SOURCES:  # an ONNX file needs only what Edgewise needs itself
        return Path(sys.executable)
    return _python(kind, *SOURCES[kind], home)


def environment_for(name: str) -> Environment | None:
    """By its own name, or by that of a target."""
    return ENVIRONMENTS.get(TARGETS[name][0] if name in TARGETS else name)


def missing_here(environment: Environment, names: Sequence[str]) -> list[str]:
    """What this Python lacks of those packages, or has in another version, in words."""
    wanted = pins(environment.lock)
    found = {name: _version_here(name) for name in names}
    return [
        f"{name} {wanted[name]}" + ("" if there is None else f" (here: {there})")
        for name, there in found.items()
        if there != wanted[name]
    ]


def stamp(environment: Environment, home: Path) -> Stamp | None:
    """The environment's own words, if it is whole, of this lock, and its Python is there."""
    try:
        found = Stamp(**json.loads((_place(environment, home) / STAMP).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    fits = found.lock == _sha256(environment.lock) and _inside(_place(environment, home)).exists()
    return found if fits else None


def unsupported(environment: Environment) -> str | None:
    """Why it cannot be made on this machine."""
    here = PLATFORMS.get((platform.system(), platform.machine()), f"{platform.system()} {platform.machine()}")
    if here not in environment.platforms:
        return f"there is no wheel of {environment.lacks} for {here}; there is for {', '.join(environment.platforms)}"
    if sys.version_info[:2] > environment.newest:
        newest = ".".join(map(str, environment.newest))
        return (
            f"there is no wheel of {environment.lacks} for Python {platform.python_version()}, up to {newest} there is"
        )
    return None


def install(environment: Environment, home: Path, say: Say) -> Installed:
    """Make the environment, unless it is there. MissingEnvironment if it cannot be made, StorageError without room for
    it; what was half made is made anew next time. pip talks on stderr."""
    if why := unsupported(environment):
        hint = f"run Edgewise where there is, with Python 3.11 to {'.'.join(map(str, environment.newest))}"
        raise MissingEnvironment(f"the environment {environment.name!r} cannot be made here: {why}", hint=hint)
    started = time.monotonic()
    with _alone(environment, home):
        made = stamp(environment, home) is None
        if made:
            _make(environment, home, say)
    found = stamp(environment, home)
    if found is None:
        raise MissingEnvironment(f"{_place(environment, home)} was removed while it was made")
    place = _place(environment, home)
    return Installed(
        environment.name, _inside(place), made, time.monotonic() - started, _size_bytes(place), found.versions
    )


def pins(file: Path) -> dict[str, str]:
    """name -> version of a file of `name==version` lines; "" where a line names no version."""
    lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _python(what: str, name: str, needs: Sequence[str], home: Path) -> Path:
    environment = ENVIRONMENTS[name]
    missing = missing_here(environment, needs)
    if not missing:
        return Path(sys.executable)
    place = _place(environment, home)
    if stamp(environment, home) is not None:
        return _inside(place)
    state = "is not whole, or of another version" if place.exists() else "is not there"
    message = f"{what} needs {', '.join(missing)}; this Python has not, and {place} {state}"
    why = unsupported(environment)
    hint = f"edgewise doctor --install {what if what in TARGETS else name}"
    raise MissingEnvironment(
        f"{message}. It cannot be made here: {why}" if why else message, hint=None if why else hint
    )


def _version_here(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]  # torch's +cpu is the same release
    except metadata.PackageNotFoundError:
        return None


def _place(environment: Environment, home: Path) -> Path:
    return home / "environments" / environment.name


def _inside(place: Path) -> Path:
    return place / "Scripts" / "python.exe" if sys.platform == "win32" else place / "bin" / "python"


@contextmanager
def _alone(environment: Environment, home: Path) -> Iterator[None]:
    with ExitStack() as held:
        try:
            held.enter_context(locked(home, f"environment-{environment.name}"))
        except BundleError as e:
            raise MissingEnvironment(
                f"another process is making the environment {environment.name!r}", hint="wait until it is done"
            ) from e
        except OSError as e:
            raise StorageError(f"{home} cannot be written to: {e}", hint="EDGEWISE_HOME chooses the place") from e
        yield


def _make(environment: Environment, home: Path, say: Say) -> None:
    place = _place(environment, home)
    shutil.rmtree(place, ignore_errors=True)
    _has_room(environment, home)
    # -I: neither PYTHONPATH nor the user's own packages count as installed.
    _told(say, "no environment could be begun", [sys.executable, "-I", "-m", "venv", str(place)])
    pip = [str(_inside(place)), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]
    words = f"pip could not install what the environment {environment.name!r} holds"
    _told(say, words, [*pip, "install", "--only-binary=:all:", "--requirement", str(environment.lock)])
    _told(say, "its packages do not fit together", [*pip, "check"])
    versions = {name: version for name, version in pins(environment.lock).items() if name in environment.asked}
    mark = Stamp(_sha256(environment.lock), platform.python_version(), versions)
    part = place / f".{STAMP}"
    part.write_text(json.dumps(asdict(mark)), encoding="utf-8")
    part.replace(place / STAMP)


def _has_room(environment: Environment, home: Path) -> None:
    needed, free = ROOM * environment.size_bytes, shutil.disk_usage(home).free
    if free < needed:
        raise StorageError(
            f"the environment {environment.name!r} needs about {needed / 1e9:.1f} GB, and {home} has {free / 1e9:.1f}",
            hint="EDGEWISE_HOME chooses the place",
        )


def _told(say: Say, failure: str, command: Sequence[str]) -> None:
    say(shlex.join(command))
    code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=STDERR, check=False).returncode
    if code:
        hint = "its own words stand above; a package index is needed, and on Debian the package python3-venv"
        raise MissingEnvironment(f"{failure} (exit code {code})", hint=hint)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _size_bytes(place: Path) -> int:
    return sum(path.lstat().st_size for path in place.rglob("*") if not path.is_dir())
