"""`edgewise export` and `optimize` from end to end: what they make, what they refuse, what they say of both."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from calling import Cli
from onnx import helper

import onnx_files

ROOT = Path(__file__).parents[2]
NETS = ROOT / "tests" / "export"
MADE = ROOT / ".cache"  # where `make test` puts the environment of the converters


@pytest.fixture
def export(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line where nets.py is and the environments are."""
    monkeypatch.setenv("EDGEWISE_HOME", str(MADE))
    monkeypatch.chdir(NETS)
    return lambda *given: cli(*given)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`net.onnx`, `normalised.onnx`, `swapped.onnx`, and `images.npz` for them."""
    place = tmp_path_factory.mktemp("files")
    onnx_files.cnn(place / "net.onnx")
    onnx_files.cnn(place / "normalised.onnx", normalised=True)
    onnx_files.cnn(place / "swapped.onnx", swapped=True)
    onnx_files.images(place / "images.npz")
    return place


def test_a_network_and_its_report(export: Cli, files: Path, tmp_path: Path) -> None:
    done = export(
        *("export", files / "net.onnx", "--to", "onnx,onnx:int8,qnn,tensorrt", "--inputs", files / "images.npz"),
        *("--option", "qnn.socs=sm8650", "--max-drop", "0.05", "-o", tmp_path / "out", "--json"),
    )
    assert done.code == 0, done.out + done.err
    targets = done.json["targets"]
    assert {key: (one["status"], one["level"]) for key, one in targets.items()} == {
        "onnx": ("ok", "executed"),
        "onnx:int8": ("ok", "executed"),
        "qnn": ("ok", "emulated"),
        "tensorrt": ("ok", "built"),
    }
    assert done.json["data"] == {
        "rows": 200,
        "labelled": True,
        "random": False,
        "calibration_rows": 64,
        "calibration_shared": False,
    }
    for one in targets.values():
        path = Path(one["path"])
        assert path.is_file()
        assert path.stat().st_size == one["bytes"]
        assert len(one["sha256"]) == 64
        assert one["drop"]["low"] <= one["drop"]["point"] <= one["drop"]["high"]
        assert one["drop"]["n"] == 200
        assert one["coverage"]["nodes"] >= one["coverage"]["accelerated"] > 0
        assert one["versions"]["numpy"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == done.json
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(targets[key]["sha256"] in page for key in targets)


def test_a_foreign_artifact_is_proved_and_refused_with_the_place(export: Cli, files: Path, tmp_path: Path) -> None:
    done = export(
        *("export", files / "normalised.onnx", "--to", "onnx", "--check", files / "swapped.onnx"),
        *("--inputs", files / "images.npz", "-o", tmp_path / "out"),
    )
    assert done.code == 1
    assert "numbers: relative L2 distance" in done.out
    assert "wrong from the start" in done.out
    assert (files / "swapped.onnx").is_file()  # it is the user's own


def test_what_is_refused_is_set_apart_and_gives_way(export: Cli, files: Path, tmp_path: Path) -> None:
    data, out = files / "images.npz", tmp_path / "out"
    given = ("export", files / "net.onnx", "--to", "onnx:int4", "--inputs", data, "-o", out)
    done = export(*given, "--max-drop", "0", "--strict", "--json")
    one = done.json["targets"]["onnx:int4"]
    assert (done.code, one["status"]) == (1, "refused"), one
    assert one["drop"]["high"] > 0
    assert Path(one["path"]).relative_to(out).parts[0] == "refused"
    assert not (out / "onnx-int4").exists()
    done = export(*given, "--max-drop", "1")
    assert done.code == 0, done.err  # and what it was is gone
    assert not (out / "refused" / "onnx-int4").exists()
    assert "drop: top-1 accuracy over 200 rows" in done.out
    assert done.out.splitlines()[1].endswith("onnx-int4/net.onnx")


@pytest.mark.parametrize("name", ["onnx/own.txt", "report.html"])
def test_what_no_export_has_made_is_never_replaced(name: str, export: Cli, files: Path, tmp_path: Path) -> None:
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    done = export("export", files / "net.onnx", "--to", "onnx", "-o", tmp_path)
    assert done.code == 2
    assert f"{tmp_path / name.partition('/')[0]} is there, and no export has made it" in done.err
    assert own.read_text() == "mine"


def _worker_of(pid: int) -> Path:
    """In /proc, once it runs its own program."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if b"start.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                time.sleep(0.1)  # until whoever started it knows
                return Path(f"/proc/{child}")
        time.sleep(0.005)
    raise AssertionError("no worker was started")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_leaves_no_process_and_no_half_artifact(
    number: signal.Signals, files: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "edgewise.cli.main", "export", str(files / "net.onnx"), "--to", "onnx"]
    process = subprocess.Popen(
        [*command, "--inputs", str(files / "images.npz"), "-o", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's job in the background ignores it
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "edgewise: reading net\n"
    worker = _worker_of(process.pid)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "edgewise: interrupted\n")
    assert not worker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("net", ["eigen", "deciding"])
def test_a_network_that_a_target_cannot_take(net: str, export: Cli, tmp_path: Path) -> None:
    done = export(
        "export", f"nets:{net}", "--to", "onnx", "--shape", "x=1,4,4", "--task", "numbers", "-o", tmp_path, "--json"
    )
    assert done.code == 3
    error = done.json["targets"]["onnx"]["error"]
    assert error["kind"] == "UnsupportedModel"
    assert error["hint"]
    assert {"eigen": "linalg_eig", "deciding": "nets.py"}[net] in error["message"]


def corrupt(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "net.onnx").write_bytes(b"\x08\x0aonly the beginning of a file")
    return str(tmp_path / "net.onnx"), "--to", "onnx"


def free_axes(tmp_path: Path) -> tuple[str, ...]:
    axes = {"image": ["rows", 3, "height", "width"]}, {"y": ["rows", 3, "height", "width"]}
    onnx_files.save(tmp_path / "free.onnx", [helper.make_node("Relu", ["image"], ["y"])], *axes)
    return str(tmp_path / "free.onnx"), "--to", "qnn"


def foreign(tmp_path: Path) -> tuple[str, ...]:
    node = helper.make_node("Fancy", ["x"], ["y"], domain="my.ops")
    onnx_files.save(tmp_path / "own.onnx", [node], {"x": ["rows", 4]}, {"y": ["rows", 4]}, domain="my.ops")
    return str(tmp_path / "own.onnx"), "--to", "onnx"


def plain(*given: str) -> Callable[[Path], tuple[str, ...]]:
    return lambda d: (str(onnx_files.cnn(d / "net.onnx")), *given)


def a_file_as_output(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "out").write_text("")
    return plain("--to", "onnx")(tmp_path)


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (corrupt, 3, "net.onnx is damaged"),
        (free_axes, 2, "--shape image=1,3,"),
        (foreign, 3, "my.ops:Fancy"),
        (a_file_as_output, 2, "out is a file"),
        (lambda d: ("nets:nothing", "--to", "onnx"), 3, "nets:nothing cannot be loaded: AttributeError"),
        (lambda d: ("nets:cnn", "--to", "onnx"), 2, "--shape image="),
        (lambda d: ("nets:cnn", "--to", "onnx", "--shape", "image=1,5,32,32"), 2, "the source fails on inputs"),
        (lambda d: ("nothing-of-this-name", "--to", "onnx"), 3, "efficientnet-lite0"),
        (plain("--to", "tflite"), 2, "known are onnx, litert"),
        (plain("--to", "onnx", "--strict"), 2, "--max-drop"),
        (plain("--to", "onnx", "--option", "onnx.colour=red"), 2, "onnx has no option colour"),
        (plain("--to", "onnx", "--option", "qnn.socs=x"), 2, "given for qnn, and only onnx"),
        (plain("--to", "onnx", "--mean", "1,1,1"), 2, "--std"),
        (plain("--to", "onnx", "--task", "talk"), 2, "classify, embed"),
        (plain("--to", "onnx", "--option", "onnx.optimize=maybe"), 2, "'maybe' (give true or false)"),
        (plain("--to", "litert:int7"), 2, "litert has fp16, fp32"),
        (plain("--to", "coreml:int8-dynamic"), 2, "coreml has fp16, fp32, int8, int4"),
        (plain("--to", "onnx", "--inputs", "nothing.npz"), 3, "there is no nothing.npz"),
        (plain("--to", "onnx", "--check", "nothing.onnx"), 3, "there is no nothing.onnx"),
        (plain("--to", "onnx", "--max-drop", "0.01"), 2, "real inputs"),
    ],
)
def test_wrong_use_says_what_is_right(
    given: Callable[[Path], tuple[str, ...]], code: int, said: str, export: Cli, tmp_path: Path
) -> None:
    done = export("export", *given(tmp_path), "-o", tmp_path / "out")
    assert (done.code, said in done.err) == (code, True), done.err
    assert done.out == ""


def test_an_environment_that_is_not_there_is_named_before_any_work(cli: Cli, home: Path, tmp_path: Path) -> None:
    done = cli("export", "nets:cnn", "--to", "onnx,litert", "--shape", "image=1,3,32,32", "-o", tmp_path / "out")
    assert done.code == 3
    assert "edgewise doctor --install litert" in done.err
    assert not (tmp_path / "out").exists()


def test_a_budget_wants_enough_inputs(export: Cli, files: Path, tmp_path: Path) -> None:
    few = onnx_files.images(tmp_path / "few.npz", rows=150)
    done = export(
        *("export", files / "net.onnx", "--to", "onnx", "--inputs", few, "--max-drop", "0.01"),
        *("-o", tmp_path / "out"),
    )
    assert done.code == 2
    assert "200 inputs or more, and there are 150" in done.err
    assert not (tmp_path / "out").exists()


def test_other_axes_are_free_if_they_are_asked_for(export: Cli, tmp_path: Path) -> None:
    ids, mask = np.arange(320).reshape(20, 16) % 100, np.ones((20, 16), np.int64)
    np.savez(tmp_path / "ids.npz", input_ids=ids, attention_mask=mask)
    data = ("--inputs", tmp_path / "ids.npz")
    free = 'onnx.dynamic={"input_ids": [1], "attention_mask": [1]}'
    done = export("export", "nets:encoder", "--to", "onnx", *data, "--option", free, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.out + done.err
    for one in onnx.load(done.json["targets"]["onnx"]["path"]).graph.input:
        assert [dim.dim_param for dim in one.type.tensor_type.shape.dim] == ["batch", "axis_1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--to", "onnx,coreml"), "a SavedModel goes to litert alone, not to coreml, onnx"),
        (("--to", "litert:int4"), "cannot go to litert in int4"),
        (("--to", "litert", "--option", "litert.layout=nchw"), "litert.layout is not for a SavedModel"),
    ],
)
def test_what_a_saved_model_cannot_is_said_before_any_work(
    given: tuple[str, ...], said: str, export: Cli, tmp_path: Path
) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"")
    done = export("export", tmp_path, *given, "-o", tmp_path / "out")
    assert (done.code, said in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--task", "embed"), "--task is not for a language model"),
        (("--precision", "fp16"), "onnx has int4, int8, fp32"),
        (("--option", "litert.cache=big"), "litert.cache is 'big' (give a whole number"),
        (("--inputs", "net.npz"), "a language model takes texts"),
        (("--inputs", "empty.txt"), "empty.txt holds no texts"),
    ],
)
def test_what_a_language_model_cannot(
    given: tuple[str, ...], said: str, export: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny.gguf", "net.npz", "empty.txt"):
        (tmp_path / name).write_bytes(b"")
    done = export("export", "tiny.gguf", "--to", "onnx,litert", *given, "-o", tmp_path / "out")
    assert (done.code, said in done.err) == (2, True), done.err
