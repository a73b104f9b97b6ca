"""`edgewise split serve` and `edgewise ask --split` as programs, `edgewise cloud` with a split beside its chat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from calling import Cli

from edgewise.models.graph import Graph
from edgewise.split.halves import Halves, read_answer
from edgewise.wire.feature import encode
from split.nets import images, residual

QUESTION = ("ask", "abc", "--max-tokens", "12")


@contextmanager
def served(home: Path, *arguments: str) -> Iterator[str]:
    """A node as a process of its own; its address from its first line."""
    command = [sys.executable, "-m", "edgewise.cli.main", *arguments]
    env = os.environ | {"EDGEWISE_HOME": str(home)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            process.communicate(timeout=20)
        assert process.returncode == 0


@pytest.mark.parametrize("verb", [("split", "serve", "--model", "tiny"), ("cloud", "--model", "tiny")], ids=" ".join)
def test_an_answer_over_two_processes_is_that_of_one(in_stock: Cli, stocked: Path, verb: tuple[str, ...]) -> None:
    alone = in_stock(*QUESTION, "--edge", "tiny", "--json").json
    with served(stocked, *verb) as url:
        both = in_stock(*QUESTION, "--edge", "tiny", "--split", url, "--json").json
        shown = in_stock(*QUESTION, "--edge", "tiny", "--split", url, "--cut", "2", "--head", "edge")
        assert httpx2.get(f"{url}/livez").status_code == 200
    assert both["text"] == alone["text"] == shown.out.rstrip("\n")
    assert both["route"] == "cloud"
    assert both["reason"] == f"split at 1, exact: {both['usage']['completion_tokens']} tokens by the worker"
    assert "route cloud" in shown.err
    assert "split at 2" in shown.err


def test_a_cloud_answers_chats_and_splits_at_once(in_stock: Cli, stocked: Path) -> None:
    with served(stocked, "cloud", "--model", "tiny") as url:
        body = {"model": "auto", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 12}
        chat = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        split = in_stock(*QUESTION, "--edge", "tiny", "--split", url, "--json").json
    assert chat["choices"][0]["message"]["content"] == split["text"]


def test_an_edge_without_a_worker_answers_alone_and_says_so(in_stock: Cli) -> None:
    told = in_stock(*QUESTION, "--edge", "tiny", "--split", "http://127.0.0.1:9", "--json").json
    assert told["route"] == "edge_fallback"
    assert "0 tokens by the worker" in told["reason"]


def test_the_layers_of_a_worker_bound_the_cut(in_stock: Cli, stocked: Path) -> None:
    with served(stocked, "split", "serve", "--model", "tiny", "--layers", "2:3") as url:
        fits = in_stock(*QUESTION, "--edge", "tiny", "--split", url, "--json").json
        early = in_stock(*QUESTION, "--edge", "tiny", "--split", url, "--cut", "1", "--json").json
    assert fits["reason"].startswith("split at 2")
    assert fits["route"] == "cloud"
    assert early["route"] == "edge_fallback"  # the worker refuses these layers
    assert early["text"] == fits["text"]


def test_a_file_of_settings_names_the_worker(in_stock: Cli, stocked: Path, tmp_path: Path) -> None:
    with served(stocked, "split", "serve", "--model", "tiny") as url:
        (tmp_path / "edgewise.toml").write_text(
            f'[model]\nname = "tiny"\n[split]\nurl = "{url}"\ncut = 2\ncodec = "int8"\n'
        )
        told = in_stock(*QUESTION, "--config", tmp_path / "edgewise.toml", "--json").json
    assert told["reason"].startswith("split at 2, int8")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("split", "serve", "--layers", "five"), "--layers is 'five'"),
        (("split", "serve", "--model", "tiny", "--layers", "0:2"), "a worker holds the last ones"),
        (("split", "serve", "--model", "tiny", "--layers", "1:9"), "a worker holds the last ones"),
        (("split", "serve", "--model", "tiny", "--tls-cert", "x.pem"), "one of --tls-cert and --tls-key is missing"),
        (("split", "serve", "--model", "tiny", "--tls-cert", "x", "--tls-key", "y"), "no certificate and its key"),
        (("split", "serve", "--model", "tiny", "--key-file", "nowhere"), "cannot read the key file nowhere"),
        (("split", "serve", "--key-file", "a", "--key-env", "B"), "exclude each other"),
        (("ask", "hi", "--split", "http://x", "--cloud", "http://y"), "exclude each other"),
        (("ask", "hi", "--split", "pigeon"), "an address like http://host:8000 is needed"),
        (("ask", "hi", "--split", "http://127.0.0.1:9", "--edge", "tiny", "--cut", "3"), "cannot be cut at 3"),
        (("ask", "hi", "--split", "http://127.0.0.1:9", "--codec", "zip"), "one of auto, exact"),
        (("ask", "hi", "--split", "http://127.0.0.1:9", "--edge", "x.gguf"), "is not a bundle"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_wrong_use_is_one_line(in_stock: Cli, flags: tuple[str, ...], said: str) -> None:
    told = in_stock(*flags)
    assert told.code == 2
    assert said in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "holds 0 keys"), ("# only words\n", "holds 0 keys"), ("two words\n", "holds 1 keys"), ("ü\n", "cannot")],
)
def test_a_key_file_without_keys(in_stock: Cli, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "keys").write_text(text)
    told = in_stock("split", "serve", "--model", "tiny", "--key-file", tmp_path / "keys")
    assert told.code == 2
    assert said in told.err
    assert "two words" not in told.err


def test_privacy_rules_refuse_a_split(in_stock: Cli, tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text('[[rule]]\nname = "names"\npattern = "Anna"\n')
    flags = ("--edge", "tiny", "--split", "http://127.0.0.1:9", "--privacy", tmp_path / "rules.toml")
    told = in_stock("ask", "hi", *flags)
    assert told.code == 2
    assert "hidden states" in told.err


def test_a_refused_key_ends_with_the_reason(in_stock: Cli, stocked: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("right\n")
    (tmp_path / "mine").write_text("wrong\n")
    with served(stocked, "split", "serve", "--model", "tiny", "--key-file", str(tmp_path / "keys")) as url:
        told = in_stock(*QUESTION, "--edge", "tiny", "--split", url, "--split-key-file", tmp_path / "mine")
        assert httpx2.get(f"{url}/edgewise/bytes").status_code == 401
    assert told.code == 3
    assert "refuses the key" in told.err
    assert told.out == ""


def test_a_worker_of_a_file_answers_features_of_any_cut(home: Path, tmp_path: Path) -> None:
    file = residual(tmp_path / "net.onnx")
    graph = Graph.open(file)
    expected = Halves(graph, frozenset()).back({"image": images()})["logits"]
    with served(home, "split", "serve", "--model", str(file), "--shape", "image=1,3,16,16") as url:
        for name in ("p1", "s3"):
            halves = Halves(graph, graph.before([name]))
            crossing, _ = halves.front({"image": images()})
            body = encode(crossing, "exact", label=halves.label)
            answer = httpx2.post(f"{url}/edgewise/half", content=body, timeout=60)
            assert answer.status_code == 200
            outputs, _, _ = read_answer(answer.content)
            assert np.abs(outputs["logits"] - expected).max() < 1e-4
        assert httpx2.post(f"{url}/edgewise/half", content=b"nothing", timeout=60).status_code == 400


@pytest.mark.parametrize(
    ("flags", "what"),
    [(("--layers", "1:2"), "--layers is for language models"), (("--shape", "image=1"), "takes"), ((), "net2.onnx")],
    ids=["layers", "shape", "no file"],
)
def test_a_file_is_not_served_with_what_it_does_not_take(
    in_stock: Cli, tmp_path: Path, flags: tuple[str, ...], what: str
) -> None:
    file = residual(tmp_path / "net.onnx") if flags else tmp_path / "net2.onnx"
    told = in_stock("split", "serve", "--model", str(file), *flags)
    assert told.code != 0
    assert what in told.err


def test_a_shape_is_for_files(in_stock: Cli) -> None:
    told = in_stock("split", "serve", "--model", "tiny", "--shape", "image=1,3,4,4")
    assert told.code == 2
    assert "--shape is for .onnx files" in told.err
