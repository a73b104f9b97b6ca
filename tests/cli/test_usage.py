"""What every call keeps to: exit codes, one clear line for a mistake, stdout for results only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from calling import Cli

from edgewise import __version__, errors
from edgewise.cli import main
from edgewise.errors import EdgewiseError

COMMAND = [sys.executable, "-m", "edgewise.cli.main"]

WRONG = [
    (["askk"], "No such command 'askk'. Did you mean 'ask'?"),
    (["ask"], "Missing argument 'PROMPT'"),
    (["ask", "hi", "--port", "1"], "No such option: --port"),
    (["ask", "hi", "--route", "up"], "'up' is not one of 'auto', 'edge', 'cloud'"),
    (["ask", "hi", "--max-tokens", "many"], "'--max-tokens'"),
    (["ask", " "], "the prompt is empty"),
    (["ask", "hi", "--cloud", "host:80"], "--cloud is 'host:80': an address like http://host:8000 is needed"),
    (["ask", "hi", "--cloud-key-env", "sk-secret"], "never the secret itself"),
    (["ask", "hi", "--cloud", "http://h", "--cloud-key-env", "NOT_SET"], "NOT_SET, which is not set"),
    (["ask", "hi", "--threshold", "2"], "--threshold is '2': a number from 0 to 1 is needed"),
    (["ask", "hi", "--policy", "none.json"], "none.json cannot be read"),
    (["ask", "hi", "--mode", "slow"], "--mode is 'slow': one of fast, stable is needed"),
    (["serve", "--port", "x"], "--port is 'x': a whole number from 0 to 65535 is needed"),
    (["serve", "--threshold", "0.5", "--policy", "p.json"], "exclude each other"),
    (["serve", "--config", "none.toml"], "cannot read the settings file none.toml"),
    (["cloud", "--edge", "x"], "No such option: --edge"),
    (["pull", "--requantize", "int2"], "'int2' is not one of 'int4', 'int8'"),
    (["show"], "Missing argument 'NAME'"),
    (["config"], "Missing command"),
    (["doctor", "--install", "nothing"], "there is no optional part 'nothing'"),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=lambda value: " ".join(value) if type(value) is list else "")
def test_wrong_use_is_one_clear_line_and_exit_2(cli: Cli, arguments: list[str], says: str) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("edgewise: ")
    assert says in outcome.err
    assert "sk-secret" not in outcome.err


def test_help_and_version(cli: Cli) -> None:
    assert cli().out == cli("--help").out == cli("-h").out
    assert cli("--help").code == 0
    assert cli("--version").out == f"edgewise {__version__}\n"
    assert "--deadline-ms" in cli("ask", "--help").out


def leaves(kind: type[EdgewiseError]) -> list[type[EdgewiseError]]:
    below = kind.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [kind]


def test_every_error_has_an_exit_code() -> None:
    codes = {
        leaf: next(code for kind, code in main.EXIT_CODES if issubclass(leaf, kind)) for leaf in leaves(EdgewiseError)
    }
    assert codes[errors.ConfigError] == codes[errors.ContextFull] == 2
    assert codes[errors.LicenceError] == 1
    assert codes[errors.GapError] == 70
    assert {codes[e] for e in (errors.UnknownModel, errors.HashMismatch, errors.MissingExtra, errors.Unreachable)} == {
        3
    }


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ZeroDivisionError("a\nb"),
            70,
            "internal error, please report it: ZeroDivisionError: a b (--debug shows where)",
        ),
        (OSError(28, "No space left on device", "x.onnx"), 3, "No space left on device: x.onnx"),
        (OSError("odd"), 3, "odd"),
    ],
)
def test_what_else_can_end_a_call(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, says: str
) -> None:
    def fail(home: Path) -> None:
        raise error

    monkeypatch.setattr("edgewise.models.store.list_bundles", fail)
    outcome = cli("list", "--json")
    assert (outcome.code, outcome.out, outcome.err) == (code, "", f"edgewise: {says}\n")


def test_debug_shows_the_traceback_of_a_fault_of_ours(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewise.models.store.list_bundles", lambda home: 1 / 0)
    assert "Traceback" in cli("list", "--debug").err
    assert "Traceback" not in cli("list").err


def test_a_reader_that_leaves_early_is_no_error(home: Path) -> None:
    """`edgewise config show | head -1`: the pipe is closed before the first byte."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        done = subprocess.run([*COMMAND, "config", "show"], stdout=stdout, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_stdout_that_cannot_show_every_character(home: Path, tmp_path: Path) -> None:
    (home / "edgewise.toml").write_text("[model]\nname = 'modèle-日本'\n", encoding="utf-8")
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for flags, shown in (["--json"], rb"mod\u00e8le-\u65e5\u672c"), ([], b"mod?le-??"):
        done = subprocess.run([*COMMAND, "config", "show", *flags], capture_output=True, env=env, check=True)
        assert shown in done.stdout
