"""The guide's EdgeDeployer and EdgeToolchain, with torch modules as its readers have them."""

from __future__ import annotations

from pathlib import Path

import nets
import onnx
import pytest
import torch
from torch import nn

import edgewise
import onnx_files
from edgewise.errors import EdgewiseError, OverBudget, SourceError, UsageError
from edgewise.export import preset
from edgewise.export.deploy import EdgeDeployer, as_model

MADE = Path(__file__).parents[2] / ".cache"


@pytest.fixture
def deployer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EdgeDeployer:
    monkeypatch.setenv("EDGEWISE_HOME", str(MADE))
    return EdgeDeployer(tmp_path / "out")


def test_the_platforms_of_the_guide() -> None:
    assert EdgeDeployer().supported_platforms == ["TFLite", "ONNX", "Core ML", "TensorRT"]
    assert set(edgewise.EdgeToolchain.tools) == {"quantization", "optimization", "profiling", "deployment"}


def test_onnx_has_the_guides_names(deployer: EdgeDeployer) -> None:
    path = deployer.convert_to_onnx(nets.mlp())  # its shape is guessed from the first layer
    graph = onnx.load(path).graph
    assert [one.name for one in graph.input] == ["input"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch_size"
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch_size"
    assert deployer.report["targets"]["onnx"]["parity"]["rel_l2"] < 1e-4


def test_options_of_the_user_go_beside_the_guides_and_before_them(deployer: EdgeDeployer) -> None:
    path = deployer.convert_to_onnx(nets.mlp(), options={"onnx": {"batch_name": "rows", "optimize": False}})
    graph = onnx.load(path).graph
    assert (graph.input[0].name, graph.input[0].type.tensor_type.shape.dim[0].dim_param) == ("input", "rows")
    assert "graph as it stands" in deployer.report["targets"]["onnx"]["by"]


def test_core_ml_of_a_file(deployer: EdgeDeployer, export_python: Path, tmp_path: Path) -> None:
    assert deployer.convert_to_coreml(onnx_files.cnn(tmp_path / "net.onnx")).suffix == ".mlpackage"
    assert deployer.report["targets"]["coreml"]["level"] == "spec-checked"


def test_tflite_of_a_file(deployer: EdgeDeployer, export_python: Path, tmp_path: Path) -> None:
    assert deployer.convert_to_tflite(onnx_files.cnn(tmp_path / "net.onnx")).read_bytes()[4:8] == b"TFL3"


def test_tensorrt_of_a_file(deployer: EdgeDeployer, tmp_path: Path) -> None:
    engine = deployer.convert_to_tensorrt(onnx_files.cnn(tmp_path / "net.onnx"))
    assert engine.suffix == ".engine"
    assert engine.with_suffix(".trtexec.sh").is_file()


def test_what_a_target_raises_is_raised(deployer: EdgeDeployer, tmp_path: Path) -> None:
    net = onnx_files.cnn(tmp_path / "net.onnx")
    (tmp_path / "cut.onnx").write_bytes(net.read_bytes()[:300])
    with pytest.raises(SourceError, match="is damaged"):
        deployer.convert_to_onnx(net, checked=tmp_path / "cut.onnx")


def test_a_platform_and_its_deprecated_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a copy of `android` for this machine's runtime: what the targets do, their own tests say."""
    mine = (preset.PRESETS / "android.toml").read_text().replace('"litert"', '"onnx"', 1)
    (tmp_path / "mine.toml").write_text(mine)
    net = onnx_files.cnn(tmp_path / "net.onnx")
    chain = edgewise.EdgeToolchain(tmp_path / "optimized")
    with pytest.warns(DeprecationWarning, match="Android 15"):
        answer = chain.optimize_for_edge(net, str(tmp_path / "mine.toml"), backend="nnapi")
    assert (answer["backend"], answer["precision"]) == ("nnapi", "fp16")
    assert Path(answer["path"]) == tmp_path / "optimized" / "mine" / "onnx" / "net.onnx"
    assert Path(answer["path"]).is_file()
    (tmp_path / "mine.toml").write_text(mine.replace("fp16", "int4", 1))
    data = onnx_files.images(tmp_path / "images.npz")
    with pytest.raises(OverBudget, match="onnx: drop: top-1 accuracy"):
        chain.optimize_for_edge(net, str(tmp_path / "mine.toml"), inputs=data, max_drop=0, strict=True)


def test_a_shape_that_does_not_fit_and_one_that_nobody_knows(deployer: EdgeDeployer) -> None:
    with pytest.raises(UsageError, match="fails on an input of the shape \\[2, 5\\]"):
        deployer.convert_to_onnx(nets.mlp(), (1, 5))
    with pytest.raises(UsageError, match="input_shape="):
        deployer.convert_to_onnx(nets.eigen())
    with pytest.raises(UsageError, match="is for a torch module"):
        deployer.convert_to_onnx("net.onnx", (1, 3, 8, 8))
    with pytest.raises(EdgewiseError, match="no model"):
        deployer.convert_to_tflite("nothing-here")


@pytest.mark.parametrize(
    "net", [nn.Conv1d(2, 3, 3), nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 2)), nn.Linear(3, 2)]
)
def test_shapes_are_guessed_from_the_first_layer(net: nn.Module, tmp_path: Path) -> None:
    with as_model(net, None) as name:
        program = torch.export.load(name)
    assert program is not None
