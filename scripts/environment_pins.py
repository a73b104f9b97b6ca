"""Write the locks of the environments in which exports work: of each NAME.in, whose versions people choose, a NAME.txt
with everything below them, as pip resolves it now.

    python scripts/environment_pins.py [NAME…]            after newer versions were chosen; takes minutes, and gigabytes

Each lock is then installed into a second new environment: what it took is printed, and `pip check` must find no fault.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgewise.export.work.environments import ENVIRONMENTS, Environment, canonical

PIP = ("-I", "-m", "pip", "--disable-pip-version-check")
OWN = ("pip", "setuptools")  # what a new environment has anyway


def made(place: Path, requirements: Path) -> Path:
    subprocess.run([sys.executable, "-I", "-m", "venv", str(place)], check=True)
    python = place / "bin" / "python"
    install = ["install", "--quiet", "--only-binary=:all:", "--requirement", str(requirements)]
    subprocess.run([python, *PIP, *install], check=True)
    subprocess.run([python, *PIP, "check"], check=True)
    return python


def closure(python: Path, needed: set[str]) -> dict[str, str]:
    listed = subprocess.run([python, *PIP, "list", "--format=json"], check=True, capture_output=True).stdout
    there = {canonical(one["name"]): one["version"].partition("+")[0] for one in json.loads(listed)}
    return {name: version for name, version in there.items() if name not in OWN or name in needed}


NEEDED = """
from importlib.metadata import distributions
from pip._vendor.packaging.requirements import Requirement
needs = [Requirement(need) for one in distributions() if one.name != "pip" for need in one.requires or []]
print("\\n".join(need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})))
"""


def write(environment: Environment) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        python = made(Path(scratch, "resolved"), environment.locks / f"{environment.name}.in")
        needed = subprocess.run([python, "-I", "-c", NEEDED], check=True, capture_output=True, text=True).stdout
        pinned = closure(python, set(map(canonical, needed.split())))
        about = f"# {environment.name}.in, and everything below it. Written by scripts/environment_pins.py."
        lines = [about, *(f"{name}=={version}" for name, version in sorted(pinned.items()))]
        environment.lock.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        python = made(Path(scratch, "locked"), environment.lock)
        seconds = time.monotonic() - started
        assert closure(python, set(pinned)) == pinned, "the lock does not hold all of it"
        size = sum(path.lstat().st_size for path in Path(scratch).rglob("*") if not path.is_dir())
    print(f"{environment.name}: {len(pinned)} packages, {seconds:.0f} s, {size / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or ENVIRONMENTS:
        write(ENVIRONMENTS[name])
