"""`edgewise calibrate` and `edgewise replay`."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from calling import Cli

import replays


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replays.saved(replays.classified(600), tmp_path_factory.mktemp("replay") / "r.jsonl.gz")


def test_a_policy_is_fitted_and_judged(cli: Cli, rows: Path, tmp_path: Path) -> None:
    policy, drawing = tmp_path / "p.json", tmp_path / "p.svg"
    done = cli(
        "calibrate",
        str(rows),
        "-o",
        str(policy),
        "--labels",
        "300",
        "--budget",
        "0.3",
        "--plot",
        str(drawing),
        "--json",
    )
    facts = done.json
    assert done.code == 0
    assert facts["feasible"] is True
    assert {"threshold", "expected_escalation", "bound", "min_escalation", "in_sample", "curve"} <= set(facts)
    assert facts["expected_escalation"]["low"] < 0.3 < facts["expected_escalation"]["high"]
    assert [point["escalated"] for point in facts["curve"]] == pytest.approx([n / 10 for n in range(11)])
    assert all(point["low"] <= point["accuracy"] <= point["high"] for point in facts["curve"])
    assert ElementTree.parse(drawing).getroot().tag.endswith("svg")
    assert json.loads(policy.read_text())["fitted"]["rows"] == 300

    judged = cli("replay", str(rows), "--policy", str(policy), "--plot", str(tmp_path / "j.svg"), "--json").json
    assert (judged["n"], judged["left_out"], judged["in_sample"]) == (300, 300, False)
    named = "apgr cpt50 cpt80 cpt100 auroc ece ece_floor escalated accuracy edge_accuracy cloud_accuracy baselines"
    assert set(named.split()) <= set(judged)
    assert judged["baselines"]["random"]["apgr"] == pytest.approx(0.5)
    assert judged["apgr"] > judged["baselines"]["max_softmax"]["apgr"]
    assert ElementTree.parse(tmp_path / "j.svg").getroot().tag.endswith("svg")


def test_for_a_reader(cli: Cli, rows: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.json"
    told = cli("calibrate", str(rows), "-o", str(policy), "--max-drop", "0.1", "--labels", "500")
    assert told.code == 0
    for words in ("fitted on 500 rows", "proven bound of the risk", "to the cloud", "100%"):
        assert words in told.out
    told = cli("replay", str(rows), "--policy", str(policy))
    for words in ("100 rows, 500 left out", "max_softmax", "oracle", "go to the cloud", "calibration error"):
        assert words in told.out


def test_a_target_that_cannot_be_promised(cli: Cli, rows: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.json"
    told = cli("calibrate", str(rows), "-o", str(policy), "--target-accuracy", "0.95", "--json")
    assert told.code == 1
    assert told.json["feasible"] is False
    assert told.json["threshold"] is None
    assert told.json["bound"] > 0.05
    assert "refused" in told.err
    assert not policy.exists()


def test_in_sample_is_said(cli: Cli, rows: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.json"
    assert cli("calibrate", str(rows), "-o", str(policy)).code == 0
    told = cli("replay", str(rows), "--policy", str(policy), "--json")
    assert told.json["in_sample"] is True
    assert "in-sample" in told.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--budget", "0.3", "--max-drop", "0.1"), "different targets"),
        (("--budget", "2"), "budget is 2"),
        (("--max-drop", "0"), "allowed are numbers between 0 and 1"),
        (("--target-accuracy", "1"), "allowed are numbers between 0 and 1"),
        (("--max-drop", "0.1", "--delta", "0"), "delta 0"),
        (("--cost", "cheap"), "two numbers"),
        (("--cost", "0.1,-1"), "allowed are numbers from 0"),
        (("--labels", "5"), "allowed are 20"),
        (("--cloud", "big"), "--edge"),
    ],
)
def test_wrong_use(cli: Cli, rows: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    told = cli("calibrate", str(rows), "-o", str(tmp_path / "p.json"), *arguments)
    assert told.code == 2
    assert says in told.err
    assert told.err.count("\n") == 1


def test_a_replay_with_missing_fields_names_line_and_field(cli: Cli, tmp_path: Path) -> None:
    broken = tmp_path / "r.jsonl"
    broken.write_text('{"id": "1", "edge": {"correct": true}}\n')
    for verb in (
        ("calibrate", str(broken), "-o", str(tmp_path / "p.json")),
        ("replay", str(broken), "--policy", "none"),
    ):
        told = cli(*verb)
        assert told.code == 2
        assert "line 1" in told.err
        assert "cloud" in told.err


def test_a_corrupt_policy_is_named(cli: Cli, rows: Path, tmp_path: Path) -> None:
    policy = tmp_path / "p.json"
    policy.write_text('{"format": 7}')
    told = cli("replay", str(rows), "--policy", str(policy))
    assert told.code == 2
    assert "has format 7; this version reads 2 and 1" in told.err
