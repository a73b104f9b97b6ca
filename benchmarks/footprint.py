"""What Edgewise costs before a model is loaded: bytes of the run-time install, and start-up times.

    python benchmarks/footprint.py [--rounds 15]

The bytes are those that pip recorded for every pinned run-time requirement. A start-up is a fresh interpreter, timed
from outside, beside one that does nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path

from edgewise.bench.measure import Measurement, figure, typed

ROOT = Path(__file__).parents[1]

STARTS = {
    "python_ms": ["-c", "pass"],
    "import_edgewise_ms": ["-c", "import edgewise"],
    "edgewise_help_ms": ["-m", "edgewise.cli.main", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    sizes = {name: installed_bytes(name) for name in pinned()}
    samples: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(rounds):
        for name, arguments in STARTS.items():
            samples[name].append(start_ms(arguments))
    results = {name: figure(values, "ms") for name, values in samples.items()}
    total = sum(sizes.values())
    taken = Measurement.taken(
        "footprint",
        command=typed(__file__),
        results={"install_bytes": total, "install_bytes_by_package": sizes, **results},
        libraries=["edgewise", "typer"],
        settings={"rounds": rounds, "requirements": "requirements/run.txt"},
    )
    path = taken.save(ROOT / "benchmarks" / "results")
    print(f"run-time install {total / 1e6:.0f} MB in {len(sizes)} packages")
    for name, timing in results.items():
        print(f"{name:20} {timing['median']:6.0f}  ({timing['low']:.0f} to {timing['high']:.0f})")
    print(path)


def pinned() -> list[str]:
    lines = (ROOT / "requirements" / "run.txt").read_text().splitlines()
    return ["edgewise", *(line.partition("==")[0] for line in lines if not line.startswith("#"))]


def installed_bytes(package: str) -> int:
    """As recorded at installation; our own is an editable one and is counted in the checkout."""
    if package == "edgewise":
        files = (file for file in (ROOT / "src").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        return sum(file.stat().st_size for file in files)
    paths = [Path(str(file.locate())) for file in distribution(package).files or [] if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file())


def start_ms(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    main()
