"""`edgewise record`, and that its file is what `calibrate` and `replay` take."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import gguf
import pytest
from calling import Cli

from edgewise.models.source import pull
from tiny import save_gguf, tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the bundles `near` and `far`."""
    home = tmp_path_factory.mktemp("pair")
    for name, layers in (("near", 1), ("far", 3)):
        path = home / f"{name}.gguf"
        pull(str(save_gguf(tiny("llama", num_hidden_layers=layers), path, gguf.GGMLQuantizationType.Q4_0)), home=home)
    return home


def test_a_policy_comes_of_it(cli: Cli, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWISE_HOME", str(pair))
    prompts, log, policy = (tmp_path / name for name in ("p.jsonl", "log.jsonl.gz", "policy.json"))
    models = ("--edge", "near", "--cloud", "far", "--max-tokens", "6")
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(60)))
    told = cli("record", prompts, *models, "-o", tmp_path / "first.jsonl", "--limit", "50", "--json")
    assert told.code == 0
    assert (told.json["n"], told.json["new"], told.json["judges"]) == (50, 50, {"teacher": 50})
    assert told.json["cloud_accuracy"] == 1.0

    # Now with answers that one of the two is known to give, so that there is something to learn.
    first = [json.loads(line) for line in (tmp_path / "first.jsonl").read_text().splitlines()]
    gold = [row["edge" if n % 3 else "cloud"]["text"] for n, row in enumerate(first)]
    lines = [{"prompt": row["prompt"], "gold": right} for row, right in zip(first, gold, strict=True)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = cli("record", prompts, *models, "-o", log, "--json")
    assert told.json["judges"] == {"gold": 50}
    assert told.json["edge_accuracy"] >= 33 / 50
    assert told.json["cloud_accuracy"] >= 17 / 50
    assert len(gzip.decompress(log.read_bytes()).splitlines()) == 50

    again = cli("record", prompts, *models, "-o", log, "--resume", "--json").json
    assert (again["new"], again["before"], again["prompts_per_s"]) == (0, 50, None)

    fitted = cli("calibrate", log, "-o", policy, "--budget", "0.3", "--json")
    assert fitted.code == 0
    assert fitted.json["rows"] == 50
    assert json.loads(policy.read_text())["pair"]["cloud"]["name"] == "far"
    judged = cli("replay", log, "--policy", policy, "--json").json
    assert (judged["n"], judged["in_sample"]) == (50, True)
    assert judged["no_evidence"] == 0.0


def test_wrong_use(cli: Cli, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEWISE_HOME", str(pair))
    prompts, log = tmp_path / "p.jsonl", tmp_path / "log.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    log.write_text("")
    told = cli("record", prompts, "--edge", "near", "--cloud", "far", "-o", log)
    assert told.code == 2
    assert "--resume" in told.err
    assert cli("record", prompts, "--edge", "near", "--cloud", "nobody", "-o", tmp_path / "x.jsonl").code == 3
    assert not (tmp_path / "x.jsonl").exists()
    told = cli("record", tmp_path / "none.jsonl", "--edge", "near", "--cloud", "far", "-o", tmp_path / "x.jsonl")
    assert told.code == 2
    assert "none.jsonl" in told.err
