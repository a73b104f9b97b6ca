"""The house rules that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from edgewise.export.work.worker import LIBRARIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "edgewise"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FITTING = PACKAGE / "joint" / "fit"  # imported by nothing but `edgewise calibrate`
EXPORTING = PACKAGE / "export"  # its workers run where the converters are
HEAVY = (
    "onnxruntime",
    "onnx",
    "sklearn",
    "scipy",
    "torch",
    "transformers",
    "starlette",
    "uvicorn",
    "xllamacpp",
    "openai",
    "ray",
    "rich.live",
)


def loaded_by(code: str) -> set[str]:
    """The modules in memory after that code has run in a fresh interpreter."""
    code += "\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines())


@pytest.mark.parametrize("code", ["import edgewise", "from edgewise.cli.main import run; run(['--help'])"])
def test_the_door_is_light(code: str) -> None:
    assert loaded_by(code).isdisjoint(HEAVY)


def imports(file: Path) -> set[str]:
    """The modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SIGNBOARDS = {".".join(("edgewise", *p.parent.relative_to(PACKAGE).parts)) for p in PACKAGE.rglob("__init__.py")}


@pytest.mark.parametrize("file", [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"], ids=str)
def test_nobody_imports_from_a_signboard(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in SIGNBOARDS:
            directory = PACKAGE.joinpath(*node.module.split(".")[1:])
            files = {p.stem for p in directory.iterdir()} | {"__version__"}
            assert {alias.name for alias in node.names} <= files, f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("__init__.py")), ids=str)
def test_signboards_do_no_work(file: Path) -> None:
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.If, ast.FunctionDef)
    assert all(isinstance(node, allowed) for node in ast.parse(file.read_text()).body)
    assert len(file.read_text().splitlines()) <= 60


def test_the_map_names_every_room_and_no_other() -> None:
    there = {f"{p.name}/" for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()}
    there |= {p.name for p in PACKAGE.glob("*.py") if p.name != "__init__.py"}
    named = re.findall(r"^\| `([\w./]+)` \|", (ROOT / "docs" / "rooms.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(there)


def test_the_contract_names_every_room() -> None:
    layers = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    named = {room.strip() for layer in layers for room in layer.split("|")}
    there = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()} - {"__init__"}
    assert named == there


def test_every_declared_dependency_is_imported_and_every_import_declared() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.parent != FITTING and EXPORTING not in file.parents]
    needed = {canonicalize_name(Requirement(need).name) for need in PROJECT["project"]["dependencies"]}
    assert distributions(files) - trainers() == needed


def test_what_exporters_import_is_in_the_lock_of_an_environment() -> None:
    locks = (EXPORTING / "work" / "environments").glob("*.txt")
    locked = {line.partition("==")[0] for lock in locks for line in lock.read_text().splitlines() if "==" in line}
    needed = {canonicalize_name(Requirement(need).name) for need in PROJECT["project"]["dependencies"]}
    own = {"efficientnet-lite-pytorch"}  # comes with the model, see sources/names.py
    assert distributions([*EXPORTING.rglob("*.py")]) - needed - own <= locked


@pytest.mark.parametrize("module", ["edgewise.export.order", "edgewise.export.deploy", "edgewise.toolchain"])
def test_whoever_orders_an_export_loads_no_converter(module: str) -> None:
    assert loaded_by(f"import {module}").isdisjoint({*LIBRARIES, "PIL"} - {"numpy"})


def distributions(files: list[Path]) -> set[str]:
    """What of outside the files import."""
    modules = {name.partition(".")[0] for file in files for name in imports(file)}
    outside = modules - set(sys.stdlib_module_names) - {"edgewise", "__future__"}
    owners = {**{module: [name] for module, name in LIBRARIES.items()}, **packages_distributions()}
    return {canonicalize_name(name) for module in outside for name in owners.get(module, [module])}


def trainers() -> set[str]:
    return {Requirement(need).name for need in PROJECT["project"]["optional-dependencies"]["distil"]}


def test_what_trains_is_in_compress_and_says_so_in_its_first_line() -> None:
    files = {file: imports(file) for file in PACKAGE.rglob("*.py") if EXPORTING not in file.parents}
    training = {file for file, names in files.items() if any(name.partition(".")[0] in trainers() for name in names)}
    assert training
    for file in training:
        assert PACKAGE / "compress" in file.parents, file
        assert "torch" in file.read_text().split("\n\n")[0], file
    assert {name.partition(".")[0] for file in training for name in files[file]} >= trainers()


def test_an_extra_has_one_home() -> None:
    """bench/peers/ runs other engines as their users do; it is not a home. What fits policies has a directory."""
    files = [p for p in PACKAGE.rglob("*.py") if p.parent.name != "peers"]
    extras = PROJECT["project"]["optional-dependencies"]
    owners = packages_distributions()
    used = {name.partition(".")[0] for file in FITTING.glob("*.py") for name in imports(file)}
    outside = {canonicalize_name(owners[name][0]) for name in used if name in owners} - {"edgewise", "numpy", "msgspec"}
    assert outside == {Requirement(need).name for need in extras["calibrate"]}
    for needs in (needs for extra, needs in extras.items() if extra not in ("calibrate", "distil")):
        for need in needs:
            name = Requirement(need).name
            homes = [p for p in files if re.search(rf'import_module\("{name}[".]', p.read_text())]
            assert len(homes) == 1, (name, homes)


def test_every_pin_satisfies_what_the_package_asks_for() -> None:
    pins = {}
    for file in (ROOT / "requirements").glob("*.txt"):
        for line in file.read_text().splitlines():
            if not line.startswith(("#", "-r ")):
                name, version = line.split("==")
                assert name not in pins, f"{name} is pinned twice"
                pins[name] = version
    project, groups = PROJECT["project"], PROJECT["dependency-groups"]
    extras = [need for needs in project["optional-dependencies"].values() for need in needs]
    for text in [*project["dependencies"], *extras, *groups["demo"], *groups["dev"]]:
        need = Requirement(text)
        assert need.specifier.contains(pins[canonicalize_name(need.name)]), text


def test_the_run_time_holds_no_trainer() -> None:
    names = {line.split("==")[0] for line in (ROOT / "requirements" / "run.txt").read_text().splitlines()}
    assert names.isdisjoint({"torch", "transformers", "scipy", "pandas", "openai", "xllamacpp"})


def test_no_index_host_and_no_machine_path_is_written_down() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    for folder in ("src", "docs", "scripts", "demo", "requirements", "tests", "benchmarks"):
        files += [
            p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".md", ".txt", ".toml", ".json", ".jsonl", ""}
        ]
    bad = re.compile(r"files\.pythonhosted|pypi\.org|index-url|/home/|/root/|/work/")
    for file in files:
        if file.is_file() and file != Path(__file__):
            found = bad.search(file.read_text(errors="replace"))
            assert found is None, f"{file}: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "import cli_docs as made; print(made.PAGE.read_text() == made.page())",
        "import figures as made; print(all(page.read_text() == made.filled(page) for page in made.PAGES))",
    ],
)
def test_generated_pages_are_up_to_date(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n", "run `make docs`"


def test_what_pages_import_is_there() -> None:
    lines = set()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Import | ast.ImportFrom) and find_spec(imported(node).partition(".")[0]):
                    lines.add(ast.unparse(node))
    assert len(lines) > 5
    done = subprocess.run([sys.executable, "-c", "\n".join(sorted(lines))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def imported(node: ast.Import | ast.ImportFrom) -> str:
    return node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name


def test_make_has_the_five_habits_and_they_are_short() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets == ["demo", "test", "check", "bench", "docs"]
    for script in (ROOT / "scripts" / "setup", ROOT / "scripts" / "bench", ROOT / ".ci" / "run"):
        assert script.stat().st_mode & 0o111, f"{script} must be executable"
        assert "set -euo pipefail" in script.read_text()


def test_setup_refuses_an_old_python_in_one_clear_line(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run([ROOT / "scripts" / "setup", old, "demo"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.9.2" in done.stderr
