"""`edgewise export` and `optimize` from end to end: what they make, what they refuse, what they say of both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from calling import Cli
from onnx import TensorProto, helper

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
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    random = np.random.default_rng(2)
    np.savez(path, image=random.random((264, 3, 32, 32)).astype(np.float32), labels=random.integers(0, 10, 264))
    return path


def test_a_network_and_its_report(export: Cli, images: Path, tmp_path: Path) -> None:
    done = export(
        *("export", "nets:cnn", "--to", "onnx,onnx:int8,qnn,tensorrt", "--inputs", images, "--max-drop", "0.05"),
        *("-o", tmp_path / "out", "--json"),
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


def test_a_foreign_artifact_is_proved_and_refused_with_the_place(export: Cli, images: Path, tmp_path: Path) -> None:
    made = export("export", "nets:swapped", "--to", "onnx", "--inputs", images, "-o", tmp_path / "a", "--json")
    path = made.json["targets"]["onnx"]["path"]
    done = export(
        *("export", "nets:normalised", "--to", "onnx", "--check", path, "--inputs", images, "-o", tmp_path / "b"),
    )
    assert done.code == 1
    assert "numbers: relative L2 distance" in done.out
    assert "wrong from the start" in done.out
    assert Path(path).is_file()  # it is the user's own


def test_what_is_refused_is_set_apart(export: Cli, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(4).standard_normal((264, 24)).astype(np.float32))
    given = ("export", "nets:mlp", "--to", "onnx:int4", "--inputs", tmp_path / "x.npz", "-o", tmp_path / "out")
    done = export(*given, "--max-drop", "0", "--json")
    one = done.json["targets"]["onnx:int4"]
    assert (done.code, one["status"]) == (1, "refused"), one
    assert one["drop"]["point"] > 0
    assert Path(one["path"]).relative_to(tmp_path / "out").parts[0] == "refused"
    assert not (tmp_path / "out" / "onnx-int4").exists()
    assert export(*given, "--max-drop", "1", "--json").code == 0  # and what it was is gone
    assert not (tmp_path / "out" / "refused" / "onnx-int4").exists()


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
    axes = ["rows", 3, "height", "width"]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["y"])],
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, axes)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "free.onnx")
    return str(tmp_path / "free.onnx"), "--to", "qnn"


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (corrupt, 3, "net.onnx"),
        (free_axes, 2, "--shape image=1,3,"),
        (lambda d: ("nets:nothing", "--to", "onnx"), 3, "nets:nothing cannot be loaded: AttributeError"),
        (lambda d: ("nets:cnn", "--to", "onnx"), 2, "--shape image="),
        (lambda d: ("nets:cnn", "--to", "onnx", "--shape", "image=1,5,32,32"), 2, "the source fails on inputs"),
        (lambda d: ("nothing-of-this-name", "--to", "onnx"), 3, "efficientnet-lite0"),
        (lambda d: ("nets:cnn", "--to", "tflite"), 2, "known are onnx, litert"),
        (lambda d: ("nets:cnn", "--to", "onnx", "--strict"), 2, "--max-drop"),
        (lambda d: ("nets:cnn", "--to", "onnx", "--option", "onnx.colour=red"), 2, "onnx has no option colour"),
        (lambda d: ("nets:cnn", "--to", "onnx", "--option", "qnn.socs=x"), 2, "--to does not name"),
        (lambda d: ("nets:cnn", "--to", "onnx", "--mean", "1,1,1"), 2, "--std"),
        (lambda d: ("nets:cnn", "--to", "onnx", "--task", "talk"), 2, "classify, embed"),
        (
            lambda d: ("nets:cnn", "--to", "onnx", "--shape", "image=1,3,32,32", "--max-drop", "0.01"),
            2,
            "real inputs",
        ),
    ],
)
def test_wrong_use_says_what_is_right(given: object, code: int, said: str, export: Cli, tmp_path: Path) -> None:
    assert callable(given)
    done = export("export", *given(tmp_path), "-o", tmp_path / "out")
    assert (done.code, said in done.err) == (code, True), done.err
    assert done.out == ""


def test_an_environment_that_is_not_there_is_named_before_any_work(cli: Cli, home: Path, tmp_path: Path) -> None:
    done = cli("export", "nets:cnn", "--to", "onnx,litert", "--shape", "image=1,3,32,32", "-o", tmp_path / "out")
    assert done.code == 3
    assert "edgewise doctor --install litert" in done.err
    assert not (tmp_path / "out").exists()


def test_a_budget_wants_enough_inputs(export: Cli, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", image=np.zeros((150, 3, 32, 32), np.float32))
    done = export(
        *("export", "nets:cnn", "--to", "onnx", "--inputs", tmp_path / "few.npz", "--max-drop", "0.01"),
        *("-o", tmp_path / "out"),
    )
    assert done.code == 2
    assert "200 inputs or more, and there are 150" in done.err
