"""doctor and config: what is there, and why."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from calling import Cli

from edgewise.export.work.environments import Environment, Installed


def checks(outcome: object) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in outcome.json["checks"]}


def test_a_healthy_machine(in_stock: Cli) -> None:
    outcome = in_stock("doctor", "--json")
    assert outcome.code == 0
    assert outcome.json["ok"] is True
    found = checks(outcome)
    assert found["python"]["detail"].startswith(".".join(map(str, sys.version_info[:3])))
    assert "CPUExecutionProvider" in found["onnxruntime"]["detail"]
    assert found["bundle"]["detail"].startswith("tiny: ")
    assert found.keys() >= {"platform", "cores", "simd", "disk", "port", "llamacpp"}
    assert in_stock("doctor").out.count("\n") == len(outcome.json["checks"])


def test_no_bundle_is_a_hint_and_no_fault(cli: Cli) -> None:
    outcome = cli("doctor", "--json")
    assert outcome.code == 0
    assert checks(outcome)["bundles"] == {
        "name": "bundles",
        "status": "absent",
        "detail": checks(outcome)["bundles"]["detail"],
        "hint": "edgewise pull",
    }


def test_a_taken_port_and_a_dead_cloud_are_faults(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("EDGEWISE_SERVE_PORT", str(port))
        outcome = cli("doctor", "--json")
    assert outcome.code == 1
    assert checks(outcome)["port"]["status"] == "failed"
    dead = cli("doctor", "--cloud", f"http://127.0.0.1:{port}", "--json")
    assert dead.code == 1
    assert checks(dead)["cloud"]["status"] == "failed"


def test_an_extra_that_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["numpy>=2", 'no-such-library>=1; extra == "llamacpp"']
    monkeypatch.setattr("edgewise.cli.doctor.metadata.requires", lambda name: needs)
    found = checks(cli("doctor", "--json"))["llamacpp"]
    assert found["status"] == "absent"
    assert found["hint"] == "edgewise doctor --install llamacpp"


@pytest.mark.parametrize(("code", "exit_code"), [(0, 0), (1, 3)])
def test_install_hands_the_extras_own_requirements_to_pip(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, code: int, exit_code: int
) -> None:
    calls: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr("edgewise.cli.doctor.subprocess.run", pip)
    outcome = cli("doctor", "--install", "llamacpp", "--json")
    assert outcome.code == exit_code
    assert outcome.json["installed"] is (code == 0)
    assert outcome.json["command"] == calls[0]
    assert calls[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert [need.partition(">")[0] for need in calls[0][4:]] == ["xllamacpp"]
    assert "pip install" in outcome.err


def test_the_environments_of_export_are_named(cli: Cli) -> None:
    found = checks(cli("doctor", "--json"))
    assert found["environment torch"]["status"] == "absent"
    assert found["environment torch"]["hint"] == "edgewise doctor --install torch"
    assert "litert" in found["environment torch"]["detail"]
    assert found["environment qnn"]["status"] == "ok"
    assert "onnxruntime-qnn" in found["environment qnn"]["detail"]


def test_install_makes_the_environment_of_a_target(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = home / "environments" / "torch" / "bin" / "python"
    wanted = []

    def install(environment: Environment, where: Path, say: Callable[[str], None]) -> Installed:
        wanted.append((environment.name, where))
        say("pip is at work")
        return Installed(environment.name, python, True, 90.0, 2_400_000_000, {"litert-torch": "0.10.0"})

    monkeypatch.setattr("edgewise.export.work.environments.install", install)
    outcome = cli("doctor", "--install", "litert", "--json")
    assert outcome.code == 0
    assert wanted == [("torch", home)]
    assert outcome.json == {
        "target": "litert",
        "installed": True,
        "environment": "torch",
        "python": str(python),
        "made": True,
        "seconds": 90.0,
        "bytes": 2_400_000_000,
        "versions": {"litert-torch": "0.10.0"},
    }
    assert "pip is at work" in outcome.err
    assert "2400 MB" in cli("doctor", "--install", "coreml").out


def test_an_environment_that_cannot_be_made_is_a_fault_outside(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewise.export.work.environments.platform.machine", lambda: "riscv64")
    outcome = cli("doctor", "--install", "coreml", "--json")
    assert outcome.code == 3
    assert "no wheel of litert-converter and coremltools for Linux riscv64" in outcome.err
    assert "not on this machine" in checks(cli("doctor", "--json"))["environment torch"]["detail"]


def test_an_unknown_part_is_refused_with_the_known_ones(cli: Cli) -> None:
    outcome = cli("doctor", "--install", "tensrt")
    assert outcome.code == 2
    for name in ("llamacpp", "litert", "tensorrt", "tensorflow"):
        assert name in outcome.err


def test_config_show_names_the_source_of_every_value(cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "edgewise.toml").write_text("[serve]\nport = 8000\n")
    monkeypatch.setenv("EDGEWISE_THREADS", "2")
    monkeypatch.setenv("EDGEWISE_CLOUD_KEY_ENV", "SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "abc-secret")
    monkeypatch.setenv("EDGEWISE_TRHEADS", "2")
    outcome = cli("config", "show", "--json")
    shown = outcome.json
    assert shown["file"] == str(home / "edgewise.toml")
    settings = shown["settings"]
    assert settings["serve.port"] == {
        "value": 8000,
        "source": f"file {home / 'edgewise.toml'}",
        "variable": "EDGEWISE_SERVE_PORT",
    }
    assert (settings["threads"]["value"], settings["threads"]["source"]) == (2, "environment EDGEWISE_THREADS")
    assert settings["model.name"]["source"] == "default"
    assert settings["cloud.key_env"]["value"] == "SOME_KEY"
    assert settings["cloud.key_env"]["set"] is True
    assert "abc-secret" not in outcome.out + outcome.err
    assert "EDGEWISE_TRHEADS" in outcome.err
    assert "serve.port" in cli("config", "show").out
