"""`edgewise optimize`: what a platform gets, what a preset of one's own changes, what is said of one with a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import Cli

import onnx_files
from edgewise.export.preset import PRESETS

PRESET = """
format = 1
platform = "kiosk"
about = "what this machine runs"
accelerators = ["npu", "cpu"]
notes = ["keep it cool"]
[[artifacts]]
target = "onnx"
precision = "fp16"
backend = "onnxruntime"
[[artifacts]]
target = "tensorrt"
precision = "fp16"
backend = "tensorrt"
devices = { jetson-orin-nano-8gb = { batches = [1, 1, 8] } }
[backends]
nnapi = "NNAPI is deprecated since Android 15"
"""


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    (tmp_path / "kiosk.toml").write_text(PRESET)
    return tmp_path / "kiosk.toml"


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return onnx_files.cnn(tmp_path / "net.onnx")


def test_a_preset_of_ones_own_with_another_name_of_its_backend(
    cli: Cli, net: Path, preset: Path, tmp_path: Path
) -> None:
    data, out = onnx_files.images(tmp_path / "images.npz"), tmp_path / "out"
    given = ("optimize", net, "--platform", preset, "--inputs", data, "-o", out)
    done = cli(*given, "--backend", "nnapi", "--max-drop", "0.05", "--json")
    assert done.code == 0, done.err
    answer = done.json
    assert {key: answer[key] for key in ("platform", "device", "backend", "precision")} == {
        "platform": "kiosk",
        "device": None,
        "backend": "nnapi",
        "precision": "fp16",
    }
    assert answer["accelerators"] == ["npu", "cpu"]
    assert answer["advice"] == ["keep it cool"]
    assert answer["warnings"] == ["NNAPI is deprecated since Android 15"]
    assert "edgewise: NNAPI is deprecated since Android 15" in done.err
    assert list(answer["targets"]) == ["onnx"]
    assert Path(answer["path"]) == out / "onnx" / "net.onnx"
    assert Path(answer["path"]).is_file()
    kept = json.loads((out / "report.json").read_text())
    assert kept["targets"] == answer["targets"]


def test_a_device_adds_its_artifact_and_the_text_says_what_was_chosen(
    cli: Cli, net: Path, preset: Path, tmp_path: Path
) -> None:
    done = cli(
        *("optimize", net, "--platform", preset, "--device", "Jetson Orin Nano 8GB", "-o", tmp_path / "out"),
        *("--shape", "image=1,3,8,8"),
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "kiosk on jetson-orin-nano-8gb: onnxruntime, fp16, accelerators in the order npu, cpu"
    assert lines[1] == str(tmp_path / "out" / "onnx" / "net.onnx")
    assert [line.split()[:4] for line in lines[3:5]] == [
        ["onnx", "fp16", "ok", "executed"],
        ["tensorrt", "fp16", "ok", "built"],
    ]
    assert "noise was compared" in done.out
    assert lines[-1] == "note: keep it cool"


def test_what_is_over_the_budget_leaves_no_path(cli: Cli, net: Path, preset: Path, tmp_path: Path) -> None:
    preset.write_text(PRESET.replace('"fp16"', '"int4"', 1))
    data = onnx_files.images(tmp_path / "images.npz")
    strictly = ("--max-drop", "0", "--strict")
    done = cli(*("optimize", net, "--platform", preset, "--inputs", data, *strictly, "-o", tmp_path / "out", "--json"))
    assert done.code == 1, done.err
    assert done.json["path"] is None
    assert done.json["targets"]["onnx"]["status"] == "refused"
    assert done.json["precision"] == "int4"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("format = 1", "format = 2"), "kiosk.toml has the format 2 (this version reads 1)"),
        (("[[artifacts]]", "[[artifacts]"), "kiosk.toml is no preset"),
        (("notes", "hints"), "unknown field `hints`"),
        (('"onnx"', '"nnapi"'), "asks for nnapi fp16 (there are onnx: fp32"),
        (('"fp16"', '"int7"'), "int7"),
        (('"tensorrt"', '"onnx"'), "no option batches"),
        (("batches =", "batch ="), "tensorrt has no option batch (it has compute, batches)"),
        (("[1, 1, 8]", "[8, 1, 1]"), "tensorrt.batches is [8, 1, 1] (give the least"),
        (("jetson-orin-nano-8gb", "jetson-9"), "for 'jetson-9': the catalogue has no device"),
    ],
)
def test_a_preset_with_a_mistake_is_explained(
    change: tuple[str, str], said: str, cli: Cli, net: Path, preset: Path, tmp_path: Path
) -> None:
    assert change[0] in PRESET
    preset.write_text(PRESET.replace(*change, 1))
    done = cli("optimize", net, "--platform", preset, "-o", tmp_path / "out")
    assert (done.code, said in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--platform", "windows"), "known are android, android-int8"),
        (("--platform", "nothing.toml"), "nothing.toml cannot be read"),
        (("--platform", "android", "--device", "abacus"), "no device 'abacus'"),
        (("--platform", "android", "--backend", "vulkan"), "it has litert, nnapi)"),
        (("--platform", "android", "--backend", "qnn"), "qnn with --device snapdragon-8-elite, snapdragon-8-gen-3"),
        (("--platform", "android", "--strict"), "give --max-drop"),
        (("--platform", "android", "--mean", "1,1,1"), "--std"),
    ],
)
def test_wrong_use_says_what_is_right(given: tuple[str, ...], said: str, cli: Cli, net: Path, tmp_path: Path) -> None:
    done = cli("optimize", net, *given, "-o", tmp_path / "out")
    assert (done.code, said in done.err) == (2, True), done.err


def test_a_preset_for_devices_alone_asks_for_one(cli: Cli, net: Path, preset: Path, tmp_path: Path) -> None:
    text = PRESET.replace('backend = "onnxruntime"', 'backend = "onnxruntime"\ndevices = { raspberry-pi-5-8gb = {} }')
    preset.write_text(text)
    done = cli("optimize", net, "--platform", preset, "-o", tmp_path / "out")
    assert done.code == 2
    assert "give --device: jetson-orin-nano-8gb, raspberry-pi-5-8gb" in done.err


def test_an_environment_that_is_not_there_is_named(cli: Cli, net: Path, tmp_path: Path) -> None:
    done = cli("optimize", net, "--platform", "ios", "-o", tmp_path / "out")
    assert done.code == 3
    assert "edgewise doctor --install coreml" in done.err


def test_every_preset_is_a_choice_in_the_help(cli: Cli) -> None:
    done = cli("optimize", "--help")
    words = done.out.replace(",", " ").split()
    assert {path.stem for path in PRESETS.glob("*.toml")} <= set(words)
