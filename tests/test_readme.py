"""README and the other pages: what they name exists, and what they show runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from edgewise.models.source import pull
from tiny import save_gguf, tiny

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()
HELP = (ROOT / "docs" / "cli.md").read_text()


def console_lines() -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_the_two_commands_come_first() -> None:
    assert [line.split("#")[0].strip() for line in console_lines()[:2]] == ["make demo", "make test"]


@pytest.mark.parametrize("line", console_lines())
def test_every_command_of_the_readme_exists(line: str) -> None:
    words = shlex.split(line, comments=True)
    match words[0]:
        case "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets
        case "edgewise":
            verb = next(v for n in (3, 2) if f"## `{(v := ' '.join(words[:n]))}`\n" in HELP)
            section = HELP.split(f"## `{verb}`\n")[1].split("\n## ")[0]
            assert all(re.search(rf"{flag}\b", section) for flag in words[2:] if flag.startswith("--"))
        case "python":
            assert (ROOT / words[1]).is_file()
        case "pip":
            assert words[1:] == ["install", "-e", "."]
        case _:
            pytest.fail(f"unknown command {line!r}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_settings_that_pages_name_exist() -> None:
    """`--flag` in any page is a flag of the command line."""
    for page in PAGES:
        for flag in re.findall(r"`(--[a-z][a-z-]+)", page.read_text()):
            assert re.search(rf"{flag}\b", HELP), f"{page.name}: {flag}"


@pytest.mark.parametrize("code", re.findall(r"^<!-- run against a node -->\n```python\n(.*?)^```", README, re.M | re.S))
def test_the_python_block_runs_against_a_node(code: str, tmp_path: Path) -> None:
    source = save_gguf(tiny("llama"), tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0)
    pull(str(source), home=tmp_path)
    env = os.environ | {"EDGEWISE_HOME": str(tmp_path)}
    serve = [sys.executable, "-m", "edgewise.cli.main", "serve", "--edge", "tiny"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=env) as node:
        try:
            assert node.stdout is not None
            url = json.loads(node.stdout.readline())["url"]
            assert "http://127.0.0.1:8000" in code
            client = [sys.executable, "-c", code.replace("http://127.0.0.1:8000", url)]
            done = subprocess.run(client, capture_output=True, text=True, check=False, timeout=120)
        finally:
            node.kill()
    assert done.returncode == 0, done.stderr
    assert re.search(r"^edge(_fallback)? 0\.\d+ \w+$", done.stdout, re.MULTILINE), done.stdout


def test_the_size_is_the_measured_one() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "footprint.json").read_text())["results"]["install_bytes"]
    said = re.search(r"run-time install takes (\d+) MB", README)
    assert said is not None
    assert int(said[1]) == pytest.approx(measured / 1e6, rel=0.02)


def test_there_is_a_python_block_to_run() -> None:
    assert "<!-- run against a node -->\n```python\n" in README
