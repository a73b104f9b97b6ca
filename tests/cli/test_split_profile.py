"""What a network's cuts take, and the plan for a link, from the command line's functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from edgewise.cli.main import run
from edgewise.cli.options import Run
from edgewise.cli.split_profile import profile, show_plan
from edgewise.devices.links import link_named
from edgewise.errors import UsageError
from edgewise.split.profile import Profile
from split.nets import images, residual

App = Callable[..., Any]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual(tmp_path_factory.mktemp("net") / "net.onnx")


@pytest.fixture
def call() -> App:
    app = typer.Typer()
    app.command()(profile)
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args], obj=Run(), catch_exceptions=True)


def test_a_profile_is_made_and_planned_with(
    network: Path, call: App, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "inputs.npz", image=images(3))
    out = tmp_path / "net.json"
    done = call(network, "-o", out, "--inputs", tmp_path / "inputs.npz", "--upload-bytes", 700, "--json")
    assert done.exit_code == 0, done.exception
    found = Profile.read(out)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["cuts"] == len(found.cuts)
    assert found.inputs == 3
    assert found.upload["image"].bytes == 700
    capsys.readouterr()
    for link, place in (("2g", "edge"), ("lan", None)):
        show_plan(network, out, link_named(link), edge=1e4 if place is None else 1, home=tmp_path, as_json=True)
        plan = json.loads(capsys.readouterr().out)
        assert plan["feasible"]
        assert place in (None, plan["place"])
        assert plan["predicted_ms"] <= min(plan["baselines"].values())
        assert (plan["place"] == "edge") == (plan["bytes_per_token_up"] == 0)
    show_plan(network, out, link_named("lan"), edge=1e4, home=tmp_path, as_json=False)
    text = capsys.readouterr().out
    assert "edge alone" in text
    assert "why:" in text


def test_without_inputs_some_are_drawn(network: Path, call: App, tmp_path: Path) -> None:
    done = call(network, "-o", tmp_path / "net.json")
    assert done.exit_code == 0, done.exception
    assert Profile.read(tmp_path / "net.json").inputs == 4


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--shape", "image"), "--shape is 'image'"),
        (("--shape", "image=1,x"), "write the input's name and its axes"),
        (("--inputs", "nothing.npz"), "holds no inputs of net"),
    ],
)
def test_wrong_use_is_said(network: Path, call: App, tmp_path: Path, args: tuple[str, ...], said: str) -> None:
    done = call(network, "-o", tmp_path / "net.json", *args)
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)


def test_files_of_inputs_that_are_none(network: Path, call: App, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", picture=images())
    np.savez(tmp_path / "empty.npz", image=images()[:0])
    np.savez(tmp_path / "objects.npz", image=np.array([{}], object))
    for name in ("text", "other", "empty", "objects"):
        done = call(network, "-o", tmp_path / "net.json", "--inputs", tmp_path / f"{name}.npz")
        assert isinstance(done.exception, UsageError), name


def test_a_plan_wants_the_profile_of_its_file(network: Path, call: App, tmp_path: Path) -> None:
    call(network, "-o", tmp_path / "net.json")
    other = residual(tmp_path / "other.onnx", seed=9)
    with pytest.raises(UsageError, match="make one of this file"):
        show_plan(other, tmp_path / "net.json", link_named("5g"), home=tmp_path, as_json=True)


def test_a_file_without_a_profile_is_measured_once(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEWISE_HOME", str(tmp_path))
    for told in ("measured with random inputs", ""):
        assert run(["split", "plan", str(network), "--link", "5g", "--json"]) == 0
        said = capsys.readouterr()
        plan = json.loads(said.out)
        assert told in said.err
        assert (told == "") == (said.err == "")
        assert {"feasible", "cut", "edge_bytes", "codec", "predicted_ms", "baselines", "reasons"} <= plan.keys()
        assert plan["predicted_ms"] <= 1.02 * min(plan["baselines"].values())
