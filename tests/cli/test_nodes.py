"""`edgewise serve` and `edgewise cloud` as real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from calling import Cli

COMMAND = [sys.executable, "-m", "edgewise.cli.main"]
QUESTION = {"model": "auto", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 4}


@contextmanager
def node(home: Path, *arguments: str, **environ: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    env = os.environ | {"EDGEWISE_HOME": str(home)} | environ
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                pytest.fail(process.stderr.read() if process.stderr else "")
            yield json.loads(line)["url"], process
        finally:
            process.kill()


def test_an_edge_and_a_cloud_answer_together_and_the_edge_alone(stocked: Path) -> None:
    with (
        node(stocked, "cloud", "--model", "tiny") as (cloud_url, cloud),
        node(stocked, "serve", "--edge", "tiny", "--cloud", cloud_url, "--threshold", "1") as (url, edge),
    ):
        models = [model["id"] for model in httpx2.get(f"{url}/v1/models").json()["data"]]
        assert models[:3] == ["auto", "edge", "cloud"]
        assert ask(url)["x_edgewise"]["route"] == "cloud"
        assert ask(url, model="edge")["x_edgewise"]["route"] == "edge"
        cloud.kill()
        cloud.wait()
        assert ask(url)["x_edgewise"]["route"] == "edge_fallback"
        edge.terminate()
        assert edge.wait() == 0
        assert edge.stdout is not None
        assert edge.stdout.read() == ""


def ask(url: str, **changes: object) -> dict[str, dict[str, str]]:
    answer = httpx2.post(f"{url}/v1/chat/completions", json=QUESTION | changes, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_node_writes_a_replay_that_makes_its_next_policy(stocked: Path, in_stock: Cli, tmp_path: Path) -> None:
    """Shadow mode, one command, and the new policy is in force without a restart."""
    log, policies = tmp_path / "replay.jsonl", tmp_path / "policies"
    policies.mkdir()
    flags = ["--threshold", "0.5", "--log", str(log), "--audit", "1", "--log-texts"]
    with node(stocked, "cloud", "--model", "tiny") as (cloud_url, _):
        with node(stocked, "serve", "--edge", "tiny", "--cloud", cloud_url, *flags) as (url, edge):
            for number in range(30):
                ask(url, messages=[{"role": "user", "content": f"{'ab' * (number % 7)} {number}"}])
            assert 'edgewise_log_rows{state="failed"} 0.0' in httpx2.get(f"{url}/metrics").text
            edge.terminate()
            assert edge.wait() == 0
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        assert len(rows) >= 29  # the last may still have been compared when the node was told to end
        assert {row["edge"]["quality"] for row in rows} == {1.0}  # the same model on both sides
        assert len(rows[0]["pair"]["edge"]["sha256"]) == 64
        made = in_stock("calibrate", log, "-o", policies / "new.json", "--max-drop", "0.2", "--json")
        assert made.json["feasible"], made.err
        assert in_stock("replay", log, "--policy", policies / "new.json", "--json").json["in_sample"]
        with node(stocked, "serve", "--edge", "tiny", "--cloud", cloud_url, "--policy", str(policies)) as (url, _):
            assert ask(url)["x_edgewise"]["route"] == "edge"


def test_audits_need_a_log(in_stock: Cli) -> None:
    outcome = in_stock("serve", "--edge", "tiny", "--audit", "0.1")
    assert outcome.code == 2
    assert "--log FILE" in outcome.err


def test_a_key_is_wanted_and_ctrl_c_ends_it(stocked: Path) -> None:
    with node(stocked, "serve", "--edge", "tiny", "--key-env", "NODE_KEY", NODE_KEY="abc") as (url, process):
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        assert httpx2.get(f"{url}/v1/models", headers={"authorization": "Bearer abc"}).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1] == "edgewise: interrupted"


def test_a_taken_port_is_wrong_use(in_stock: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = in_stock("serve", "--edge", "tiny", "--port", str(taken.getsockname()[1]))
    assert outcome.code == 2
    assert outcome.out == ""
    assert "choose another --host or --port" in outcome.err


def test_an_open_door_without_a_key_is_mentioned(in_stock: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewise.serve.run.run", lambda app, host, port: None)
    assert "asks for no key" in in_stock("cloud", "--model", "tiny", "--host", "0.0.0.0").err
    assert "asks for no key" not in in_stock("cloud", "--model", "tiny").err
