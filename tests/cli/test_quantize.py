"""`edgewise quantize`."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from calling import Cli
from onnx import TensorProto, helper, numpy_helper

from tiny import save_gguf, tiny

RECIPE = '[calibration]\nwindows = 6\nlength = 40\n[mixed]\nchoices = ["int8", "int4"]\nwindows = 2\nlength = 32\n'
TASKS = "\n".join(f'{{"prompt": "Is it so?", "choices": ["yes", "no"], "gold": {n}}}' for n in (0, 1))
MATRICES = '[matrices]\n"*" = "int4"\n'


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(" ".join(f"fig {n} abe" for n in range(400)))
    return tmp_path / "text.txt"


def recipe(path: Path, more: str) -> Path:
    path.write_text(f'format = 1\nmethod = "gptq"\n{RECIPE}{more}')
    return path


def test_a_bundle_is_quantized_and_shown(cli: Cli, model: Path, home: Path, text: Path) -> None:
    file = recipe(home / "four.toml", MATRICES)
    tasks = home / "tasks.jsonl"
    tasks.write_text(TASKS)
    more = ("--calibration", text, "--tasks", tasks)
    done = cli("quantize", model, "--recipe", file, *more, "-o", "small", "--json")
    assert done.code == 0, done.err
    facts = done.json
    assert facts["bytes_source"] == model.stat().st_size
    assert (facts["tasks"]["n"], facts["tasks"]["accuracy"], facts["tasks"]["accuracy_source"]) == (2, 0.5, 0.5)
    assert facts["bytes"] == sum(f.stat().st_size for f in (home / "bundles" / "small").rglob("[!.]*.*")) - _manifest(
        home
    )
    assert set(facts["matrices"].values()) == {"int4"}
    assert 0 < facts["kl_mean"] < facts["kl_p99"]
    assert 0 < facts["top1_agreement"] <= 1
    assert facts["perplexity"] > 1 < facts["perplexity_source"]
    assert facts["intervals"]["kl_mean"][0] <= facts["kl_mean"] <= facts["intervals"]["kl_mean"][1]
    shown = cli("show", "small", "--json").json
    assert shown["weights"] == "four"
    assert shown["parity"] == {key: facts[key] for key in shown["parity"]}
    assert set(shown["parity"]) >= {"kl_mean", "intervals", "tasks"}
    plain = cli("quantize", "small", "--recipe", "int8", *more, "-o", home / "out")
    assert plain.code == 0, plain.err
    for words in ("13 int8", "50.0% of 2 tasks, the source's 50.0%", f"the source's {facts['bytes'] / 1e6:.1f} MB"):
        assert words in plain.out
    itself = cli("quantize", "small", "--recipe", "int8", "--calibration", text, "-o", "small")
    assert (itself.code, "small is the bundle that is quantized" in itself.err) == (2, True)
    assert cli("show", "small", "--json").json == shown


def _manifest(home: Path) -> int:
    return (home / "bundles" / "small" / "edgewise.json").stat().st_size


def test_a_budget_that_cannot_be_kept_is_a_no(cli: Cli, model: Path, home: Path, text: Path) -> None:
    file = recipe(home / "mixed.toml", "")
    call = ("quantize", model, "--recipe", file, "--calibration", text, "-o", home / "out", "--json")
    refused = cli(*call, "--budget", 1000)
    assert refused.code == 1
    assert "1000 bytes" in refused.err
    assert cli(*call).code == 2
    assert not (home / "out").exists()
    done = cli(*call, "--budget", 400_000)
    assert done.code == 0, done.err
    assert done.json["bytes"] <= 400_000


def test_wrong_use(cli: Cli, model: Path, home: Path, text: Path) -> None:
    for arguments, code, said in (
        ((model, "--recipe", "int3", "-o", "x"), 2, "int4-gptq"),
        ((model, "--recipe", "qdq-int8", "-o", "x.onnx"), 2, "are for .onnx files"),
        (("net.onnx", "--recipe", "int8", "-o", "x.onnx"), 2, "qdq-int8"),
        (("net.onnx", "--recipe", "qdq-int8", "-o", "x.onnx"), 2, "--calibration"),
        (("net.onnx", "--recipe", "qdq-int8", "-o", "x", "--calibration", text), 2, "path of an .onnx"),
        (("net.onnx", "--recipe", "qdq-int8", "-o", "x.onnx", "--budget", "9"), 2, "--budget is not for one"),
        (("net.onnx", "--recipe", "qdq-int8", "-o", "x.onnx", "--tasks", text), 2, "--tasks is not for one"),
        (("net.onnx", "--recipe", "qdq-int8", "-o", "x.onnx", "--accept-licence"), 2, "--accept-licence is not for"),
        (("net.onnx", "--recipe", "qdq-int8", "-o", "x.onnx", "--calibration", text), 3, "no file of arrays"),
        ((model, "--recipe", "int8", "-o", "x", "--tasks", text), 2, "line 1"),
        ((model, "--recipe", "int8", "-o", "x", "--calibration", "none.txt"), 2, "none.txt cannot be read"),
        ((home / "none.gguf", "--recipe", "int8", "-o", "x"), 3, "there is no file"),
        ((model, "--recipe", "int8", "-o", "a name"), 2, "is no bundle name"),
    ):
        done = cli("quantize", *arguments)
        assert (done.code, said in done.err) == (code, True), done.err


def test_a_network_for_an_npu(cli: Cli, home: Path) -> None:
    random = np.random.default_rng(0)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(random.standard_normal((16, 4)).astype(np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), home / "net.onnx")
    np.savez(home / "data.npz", x=random.standard_normal((50, 16)).astype(np.float32))
    call = ("quantize", home / "net.onnx", "--calibration", home / "data.npz", "-o", home / "q.onnx")
    done = cli(*call, "--recipe", "qdq-int16", "--json")
    assert done.code == 0, done.err
    facts = done.json
    assert facts["bytes"] == (home / "q.onnx").stat().st_size
    assert (facts["calibrated_on"], facts["inputs"]) == (40, 10)
    assert facts["cosine"] > 0.999
    assert json.dumps(facts)
    again = cli(*call, "--recipe", "qdq-int8")
    assert (again.code, "q.onnx is there already" in again.err) == (2, True)
    plain = cli(*call[:-1], home / "p.onnx", "--recipe", "qdq-int8")
    assert plain.code == 0
    assert "top1_agreement" in plain.out


def test_a_gguf_of_other_types(cli: Cli, home: Path, text: Path) -> None:
    file = save_gguf(tiny("llama"), home / "f.gguf", gguf.GGMLQuantizationType.F16)
    done = cli("quantize", file, "--recipe", recipe(home / "r.toml", MATRICES), "--calibration", text, "-o", "x")
    assert done.code == 0, done.err
    assert "KL to the source" in done.out
