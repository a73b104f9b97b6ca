"""`edgewise split plan`: the fields that programs read, exit codes, and what it takes for a link, a size, a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calling import Cli

from edgewise.cli.split_plan import size
from edgewise.errors import UsageError
from edgewise.models.bundle import Bundle

FIELDS = {
    "feasible",
    "cut",
    "edge_bytes",
    "codec",
    "bytes_per_token_up",
    "bytes_per_token_down",
    "predicted_ms",
    "baselines",
    "reasons",
}
SMOL = ("split", "plan", "SmolLM2-135M", "--device", "raspberry-pi-5-8gb", "--cloud-device", "desktop-ddr5-5600")


def reading(unit: str, value: float) -> dict[str, Any]:
    return {"unit": unit, "samples": [value], "median": value, "low": value, "high": value}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """What `edgewise devices --link URL --json` prints."""
    path = tmp_path / "link.json"
    link = {
        "url": "http://cloud:8000",
        "date": "2026-11-30T12:00:00+00:00",
        "rtt_ms": reading("ms", 40.0),
        "up_bytes_per_s": reading("B/s", 1e6),
        "down_bytes_per_s": reading("B/s", 4e6),
        "unknown": {},
    }
    path.write_text(json.dumps(link))
    return path


def codec_row(**changes: Any) -> dict[str, Any]:
    row = {
        "model": "SmolLM2-135M",
        "weights": None,
        "layers": 30,
        "width": 576,
        "cut": 4,
        "codec": "int8",
        "bytes": 600,
    }
    return row | {"ppl_rise": 0.0, "interval": [-0.001, 0.001], "tokens": 1000, "refused": None} | changes


def test_a_plan_that_works(cli: Cli) -> None:
    told = cli(*SMOL, "--link", "5g", "--edge-memory", "64MB", "--json")
    plan = told.json
    assert told.code == 0
    assert set(plan) >= FIELDS
    assert plan["feasible"] is True
    assert 0 < plan["cut"] < 30
    assert plan["edge_bytes"] <= 64_000_000 < plan["edge_bytes_with_tail"]
    assert (plan["codec"], plan["bytes_per_token_up"], plan["bytes_per_token_down"]) == ("int4", 300, 8)
    assert plan["predicted_ms"] > 25
    assert 0 < plan["baselines"]["cloud_only_ms"] < plan["baselines"]["edge_only_ms"]
    assert all(isinstance(reason, str) and reason for reason in plan["reasons"])
    assert plan["decided_by"] == "memory"


def test_a_plan_that_does_not(cli: Cli) -> None:
    told = cli(*SMOL, "--link", "5g", "--max-ms", "5", "--json")
    assert told.code == 1
    assert told.json["feasible"] is False
    assert told.json["cut"] is told.json["codec"] is None
    assert any(reason.startswith("time: ") for reason in told.json["reasons"])
    assert set(told.json) >= FIELDS


def test_for_people(cli: Cli) -> None:
    told = cli(*SMOL, "--link", "wifi", "--privacy-depth", "4", "--price", "1e-6", "--edge-memory", "0.06GB")
    assert told.code == 0
    for words in ("edge alone", "cloud alone", "split at ", "why:", "assumed:", "int4 raises perplexity by"):
        assert words in told.out
    refused = cli(*SMOL, "--link", "wifi", "--edge-memory", "1MB")
    assert refused.code == 1
    assert "no cut keeps to all limits" in refused.out


def test_a_measured_link(cli: Cli, measured: Path) -> None:
    plan = cli(*SMOL, "--link", measured, "--json").json
    assert plan["link"] == "http://cloud:8000"
    assert 40 < plan["token_ms"]["link"] < 45
    link = json.loads(measured.read_text())
    measured.write_text(json.dumps(link | {"up_bytes_per_s": None, "unknown": {"up_bytes_per_s": "it said no"}}))
    told = cli(*SMOL, "--link", measured)
    assert told.code == 2
    assert "it said no" in told.err
    measured.write_text("{}")
    assert "no measured link" in cli(*SMOL, "--link", measured).err
    assert cli(*SMOL, "--link", measured.with_name("none.json")).code == 2


def test_codecs_of_a_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "codecs.json"
    path.write_text(json.dumps({"format": 1, "rows": [codec_row()]}))
    asked = (*SMOL, "--link", "3g", "--privacy-depth", "4", "--codecs", path, "--json")
    within = ("--max-rise", "0.0012")  # int4, as it was measured, is not
    assert cli(*asked, *within).json["codec"] == "int8"
    assert cli(*asked, "--max-rise", "0.00001").json["codec"] == "exact"
    assert cli(*asked, *within, "--head", "edge").json["bytes_per_token_down"] == 600
    path.write_text("[]")
    assert cli(*asked).code == 2


def test_codecs_measured_on_other_weights_are_not_taken_for_a_bundle(
    in_stock: Cli, stocked: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(stocked / "bundles" / "tiny", check=False)
    layers, width = bundle.card.layers, bundle.card.hidden
    path = tmp_path / "codecs.json"
    asked = ("split", "plan", "tiny", *SMOL[3:], "--codecs", path, "--json")

    def chosen(weights: str) -> str:
        rows = [
            codec_row(model="other", weights=weights, layers=layers, width=width, cut=cut, bytes=20)
            for cut in range(1, layers)
        ]
        path.write_text(json.dumps({"format": 1, "rows": rows}))
        codec: str = in_stock(*asked).json["codec"]
        return codec

    assert chosen(bundle.weights) == "int8"
    assert chosen("0" * 64) == "exact"


def test_this_machine_is_measured(cli: Cli) -> None:
    plan = cli("split", "plan", "SmolLM2-135M", "--edge-memory", "64MB", "--json").json
    assert (plan["edge"], plan["cloud"], plan["link"]) == ("host", "host", "wifi")
    assert plan["feasible"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("split", "plan", "net.onnx", "--privacy-depth", "3"), "for language models"),
        ((*SMOL, "--edge-slower", "2"), "are for .onnx files"),
        ((*SMOL, "--link", "pigeon"), "no link 'pigeon'"),
        ((*SMOL, "--device", "toaster"), "no device 'toaster'"),
        ((*SMOL, "--edge-memory", "much"), "--edge-memory is 'much'"),
        ((*SMOL, "--edge-memory", "0"), "--edge-memory is 0"),
        ((*SMOL, "--head", "feet"), "feet"),
        ((*SMOL, "--context", "0"), "--context is 0"),
        (("split", "plan", "Gemma-3n-E2B", *SMOL[3:]), "layers before"),
    ],
)
def test_wrong_use(cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    told = cli(*arguments)
    assert told.code == 2
    assert said in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    ("text", "count"),
    [("64MB", 64_000_000), ("1.5GiB", 1_610_612_736), ("4096", 4096), ("10 k", 10_000), ("2mib", 2_097_152), ("7B", 7)],
)
def test_sizes(text: str, count: int) -> None:
    assert size(text, "--edge-memory") == count


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1e6", "1TB", "0x10", "1 2", "1.2.3", "9" * 20])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="no size"):
        size(text, "--edge-memory")
