"""Write requirements/*.txt: the exact versions of what pyproject.toml asks for, as installed in this environment.

    python scripts/pins.py            after installing newer versions on purpose

run.txt is the run-time closure, demo.txt and dev.txt add the dependency groups of those names.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def closure(requirements: list[str]) -> dict[str, str]:
    """name -> version of the requirements and of all that they need here."""
    found: dict[str, str] = {}
    todo = [Requirement(text) for text in requirements]
    done: set[tuple[str, str]] = set()
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        for extra in ("", *need.extras):
            if (name, extra) not in done:
                done.add((name, extra))
                there = distribution(name)
                found[name] = there.version.partition("+")[0]  # a build's own label is not on every index
                wanted = map(Requirement, there.requires or [])
                todo += [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": extra})]
    return found


def write(name: str, about: str, pins: dict[str, str], include: str | None = None) -> None:
    lines = [f"# {about} Written by scripts/pins.py.", *([f"-r {include}"] if include else [])]
    lines += [f"{package}=={version}" for package, version in sorted(pins.items())]
    (ROOT / "requirements" / name).write_text("\n".join(lines) + "\n")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    run = closure(project["project"]["dependencies"])
    groups = project["dependency-groups"]
    demo = {k: v for k, v in closure(groups["demo"]).items() if k not in run}
    extras = [need for extra in project["project"]["optional-dependencies"].values() for need in extra]
    dev = {k: v for k, v in closure([*groups["dev"], *extras]).items() if k not in run | demo}
    write("run.txt", "What Edgewise needs at run time, with everything below it.", run)
    write("demo.txt", "`make demo` adds the client that it plays prompts with.", demo, "run.txt")
    write(
        "dev.txt", "`make test`, `make check`, `make bench`, `make docs`: tools, oracles, every extra.", dev, "demo.txt"
    )


if __name__ == "__main__":
    main()
