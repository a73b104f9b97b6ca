"""LayerSplitInference over layers of torch and numpy, and over ONNX files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgewise.errors import BadFrame, CodecOverflow, RequestError, SourceError, UsageError
from edgewise.split.inference import Features, LayerSplitInference
from edgewise.wire.feature import decode, encode

RANDOM = np.random.default_rng(0)


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    made = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 5)]
    return [layer.eval() for layer in made]


def images(count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(count, 3, 8, 8)).astype(np.float32))


def whole(x: Any, parts: list[Any]) -> Any:
    for part in parts:
        x = part(x)
    return x


# Torch


@torch.no_grad()
def test_exact_features_change_no_bit() -> None:
    made = layers()
    expected = whole(images(), made)
    for cut in range(len(made) + 1):
        split = LayerSplitInference(made[:cut], made[cut:], codec="exact")
        found = split.full_inference(images())
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, expected), cut


@torch.no_grad()
def test_half_precision_is_the_default() -> None:
    made = layers()
    split = LayerSplitInference(made[:2], made[2:])
    features = split.edge_forward(images())
    sent = torch.from_numpy(decode(features)[""])
    assert torch.equal(sent, whole(images(), made[:2]).half().float())
    assert torch.equal(split.cloud_forward(features), whole(sent, made[2:]))
    assert torch.equal(split.full_inference(images()), split.cloud_forward(features))
    assert torch.allclose(split.full_inference(images()), whole(images(), made), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("codec", "share"), [("exact", 1.0), ("fp16", 0.51), ("int8", 0.26), ("int4", 0.125)])
def test_the_boundary_is_counted(codec: str, share: float) -> None:
    made = layers()
    split = LayerSplitInference(made[:1], made[1:], codec=codec)
    assert (split.boundary_bytes, split.raw_bytes) == (None, None)
    features = split.edge_forward(images(8))
    assert split.raw_bytes == features.raw_bytes == 8 * 8 * 8 * 8 * 4
    assert split.boundary_bytes == len(features) <= share * split.raw_bytes + 200


@torch.no_grad()
def test_features_are_bytes_that_travel() -> None:
    """The cloud is another object that saw no features before, and takes any buffer."""
    made = layers()
    features = LayerSplitInference(made[:2], [], codec="int8").edge_forward(images())
    assert isinstance(features, Features)
    assert features.shapes == {"": (2, 8, 8, 8)}
    cloud = LayerSplitInference([], made[2:])
    for buffer in (bytes(features), bytearray(features), memoryview(features)):
        found = cloud.cloud_forward(buffer)
        assert isinstance(found, torch.Tensor)
        assert torch.allclose(found, whole(images(), made), atol=0.05)


@torch.no_grad()
def test_a_tensor_goes_to_the_cloud_as_it_is() -> None:
    made = layers()
    split = LayerSplitInference(made[:2], made[2:])
    assert torch.equal(split.cloud_forward(whole(images(), made[:2])), whole(images(), made))


@torch.no_grad()
def test_overflow_is_refused_and_int8_holds_it() -> None:
    grow = [lambda x: x * 1e6]
    with pytest.raises(CodecOverflow, match="fp16 holds up to 65504"):
        LayerSplitInference(grow, layers()).edge_forward(images())
    split = LayerSplitInference(grow, [lambda x: x / 1e6], codec="int8")
    assert torch.allclose(split.full_inference(images()), images(), atol=0.02)


@torch.no_grad()
def test_other_dtypes_come_back_as_they_were() -> None:
    made = [layer.to(torch.bfloat16) for layer in layers()]
    x = images().to(torch.bfloat16)
    split = LayerSplitInference(made[:2], made[2:], codec="exact")
    assert torch.equal(split.full_inference(x), whole(x, made))
    identity = LayerSplitInference([nn.Identity()], [nn.Identity()], codec="exact")
    for tensor in (torch.arange(5), torch.ones(3, dtype=torch.bool), x, images().half(), images().double()):
        found = identity.full_inference(tensor)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_integers_stay_integers_before_an_embedding() -> None:
    torch.manual_seed(0)
    embed = nn.Embedding(10, 4)
    split = LayerSplitInference([lambda ids: ids + 1], [embed])
    assert torch.equal(split.full_inference(torch.arange(5)), embed(torch.arange(5) + 1))


def test_features_leave_the_graph_of_gradients() -> None:
    made = layers()
    found = LayerSplitInference(made[:2], made[2:]).full_inference(images().requires_grad_())
    assert found.requires_grad  # the cloud's own layers
    assert not LayerSplitInference(made, []).full_inference(images()).requires_grad


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + 1, x * 2


@torch.no_grad()
@pytest.mark.parametrize("kind", [tuple, list])
def test_tuples_and_lists_of_tensors_cross(kind: type) -> None:
    split = LayerSplitInference([Pair(), kind], [lambda pair: (type(pair), pair[0] - pair[1])], codec="exact")
    found, difference = split.full_inference(images())
    assert found is kind
    assert torch.equal(difference, images() + 1 - images() * 2)


@torch.no_grad()
def test_mappings_of_tensors_cross() -> None:
    split = LayerSplitInference([lambda x: {"a": x, "ids": torch.arange(3)}], [lambda m: m["a"].sum() + m["ids"].sum()])
    assert split.full_inference(torch.ones(4)) == 7


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [nn.Sequential, nn.ModuleList])
def test_containers_of_modules_are_lists(wrapped: Any) -> None:
    made = layers()
    edge, cloud = (wrapped(*half) if wrapped is nn.Sequential else wrapped(half) for half in (made[:2], made[2:]))
    assert torch.equal(LayerSplitInference(edge, cloud, codec="exact").full_inference(images()), whole(images(), made))


# Numpy


def test_functions_of_arrays() -> None:
    weights = RANDOM.normal(size=(6, 4))
    split = LayerSplitInference([np.tanh, lambda x: x @ weights], [np.exp], codec="exact")
    x = RANDOM.normal(size=(3, 6))
    found = split.full_inference(x)
    assert isinstance(found, np.ndarray)
    assert found.tobytes() == np.exp(np.tanh(x) @ weights).tobytes()


def test_a_single_callable_is_a_list_of_one() -> None:
    assert LayerSplitInference(np.tanh, np.exp, codec="exact").full_inference(np.zeros(2)).tolist() == [1, 1]


# What is refused


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: LayerSplitInference([np.tanh], [3]), "cloud layer 0 is a int"),
        (lambda: LayerSplitInference(["tanh"], []), "edge layer 0 is a str"),
        (lambda: LayerSplitInference([], [], codec="zip"), "there is no codec 'zip'"),
        (lambda: LayerSplitInference([lambda x: object()], []).edge_forward(1), "the features hold a object"),
        (lambda: LayerSplitInference([lambda x: [[[1], [2, 3]]]], []).edge_forward(1), "the features hold a"),
        (lambda: LayerSplitInference([lambda x: {"a": "text"}], []).edge_forward(1), "the features hold a str"),
    ],
)
def test_what_cannot_be_is_said(call: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()


@pytest.mark.parametrize("payload", [b"", b"EWFT", encode({"x": np.zeros(2)}, label="other"), encode({}, label="one")])
def test_what_are_no_features_is_refused(payload: bytes) -> None:
    with pytest.raises(BadFrame):
        LayerSplitInference([], [np.tanh]).cloud_forward(payload)


def test_what_a_layer_raises_comes_through() -> None:
    def broken(x: Any) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        LayerSplitInference([broken], []).full_inference(1)


def test_torch_is_never_imported() -> None:
    code = (
        "import sys, numpy; from edgewise.split.inference import LayerSplitInference as L; "
        "print(L([numpy.tanh], [numpy.exp]).full_inference(numpy.zeros(2)));"
        "print({'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1. 1.]\nset()\n"


# ONNX files


def net(path: Path, early: bool = False) -> Path:
    """`x` [n, 6] to `logits` [n, 3]; with `early` its hidden layer is an output too."""
    random = np.random.default_rng(2)
    stored = {"a": random.normal(size=(6, 8)), "b": random.normal(size=(8, 3))}
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["line"]),
        helper.make_node("Tanh", ["line"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "b"], ["logits"]),
    ]
    value = helper.make_tensor_value_info
    outputs = [value("logits", TensorProto.FLOAT, ["n", 3])]
    outputs += [value("hidden", TensorProto.FLOAT, ["n", 8])] if early else []
    weights = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "net", [value("x", TensorProto.FLOAT, ["n", 6])], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


ROWS = np.random.default_rng(3).normal(size=(4, 6)).astype(np.float32)


@pytest.mark.parametrize("cut", ["hidden", ["hidden"], 1, 0, 2, "x"])
def test_a_file_is_cut_at_a_tensor_or_after_units(tmp_path: Path, cut: Any) -> None:
    path = net(tmp_path / "net.onnx")
    split = LayerSplitInference.of_onnx(path, cut=cut, codec="exact")
    expected = LayerSplitInference.of_onnx(path, cut=0, codec="exact").full_inference(ROWS)
    assert np.abs(split.full_inference(ROWS) - expected).max() < 1e-5
    assert np.abs(split.full_inference({"x": torch.from_numpy(ROWS).double()}) - expected).max() < 1e-5
    if cut != 2:
        cloud = LayerSplitInference.of_onnx(path, cut=cut)
        assert np.abs(cloud.cloud_forward(split.edge_forward(ROWS)) - expected).max() < 1e-5


def test_outputs_of_both_halves_come_together(tmp_path: Path) -> None:
    split = LayerSplitInference.of_onnx(net(tmp_path / "net.onnx", early=True), cut="hidden", codec="fp16")
    found = split.full_inference(ROWS)
    assert list(found) == ["logits", "hidden"]
    assert found["hidden"].shape == (4, 8)
    assert list(split.cloud_forward(split.edge_forward(ROWS))) == ["logits"]


def test_features_of_another_file_or_cut_are_refused(tmp_path: Path) -> None:
    path = net(tmp_path / "net.onnx")
    features = LayerSplitInference.of_onnx(path, cut="hidden").edge_forward(ROWS)
    with pytest.raises(BadFrame, match="this cut is"):
        LayerSplitInference.of_onnx(path, cut="x").cloud_forward(features)
    with pytest.raises(BadFrame, match="this cut is"):
        LayerSplitInference.of_onnx(net(tmp_path / "other.onnx", early=True), cut="hidden").cloud_forward(features)


def test_what_an_onnx_split_refuses(tmp_path: Path) -> None:
    path = net(tmp_path / "net.onnx")
    with pytest.raises(UsageError, match="give either where to cut, or the link"):
        LayerSplitInference.of_onnx(path)
    with pytest.raises(UsageError, match="edgewise split profile"):
        LayerSplitInference.of_onnx(path, link="5g")
    with pytest.raises(UsageError, match="net has no tensor 'nothing' to cut at"):
        LayerSplitInference.of_onnx(path, cut="nothing")
    with pytest.raises(SourceError, match="is no file"):
        LayerSplitInference.of_onnx(tmp_path, cut=0)
    split = LayerSplitInference.of_onnx(path, cut="hidden")
    with pytest.raises(RequestError, match=r"there is no input 'y': net takes x float32 \[1, 6\]"):
        split.full_inference({"y": ROWS})
    with pytest.raises(RequestError, match="the input 'x' is missing"):
        split.full_inference({})
    with pytest.raises(RequestError, match="the input 'x' is <U1"):
        split.full_inference(np.array([["a"] * 6]))
