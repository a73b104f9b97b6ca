"""`edgewise plan`: its answers on paper devices and on this machine, what it refuses, and its own error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from calling import Cli

from edgewise.bench.measure import Measurement, figure
from edgewise.plan.rows import COLUMNS

HEADER = ",".join(COLUMNS)
ROWS = (
    "Raspberry Pi 5,CPU,Qwen2.5-1.5B,1.54,Q4_K_M,0.99,llama.cpp,30,9.5,published,17.1",
    "Apple M4,GPU,Llama-3.1-8B,8.03,Q4_K_M,4.6,llama.cpp,,21,published,120",
    "A board that nobody knows,CPU,3B,3,int4,,llama.cpp,,8,estimated,34",
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("\n".join((HEADER, *ROWS)) + "\n")
    return path


def test_a_plan_has_the_documented_fields(cli: Cli) -> None:
    plan = cli("plan", "Qwen2.5-7B", "--device", "jetson-orin-nano-super", "--json").json
    page = (Path(__file__).parents[2] / "docs" / "planner.md").read_text().partition("## The answer")[2]
    assert all(f"`{key}" in page for key in plan)
    assert plan["fits"] is True
    assert plan["device"] == "NVIDIA Jetson Orin Nano Super 8GB"
    for speed in ("decode_tok_s", "prefill_tok_s", "first_token_ms", "joules_per_token"):
        assert plan[speed]["low"] < plan[speed]["value"] < plan[speed]["high"], speed
    memory = plan["memory_bytes"]
    assert memory["need"] == sum(memory[part] for part in ("weights", "kv", "activations", "runtime"))
    assert memory["need"] <= memory["available"]


def test_what_does_not_fit_says_what_would_have_to_change(cli: Cli) -> None:
    told = cli("plan", "Llama-3.1-70B", "--device", "apple-m4")
    assert told.code == 0
    assert "it does not fit" in told.out
    for words in ("more memory for it", "split: the first", "cascade: Llama-3", "largest that fits"):
        assert words in told.out
    assert cli("plan", "Llama-3.1-70B", "--device", "apple-m4", "--memory", "128", "--json").json["fits"] is True


def test_a_device_of_unknown_memory_is_not_guessed_at(cli: Cli) -> None:
    plan = cli("plan", "1B", "--device", "snapdragon-8-gen-1", "--json").json
    assert plan["fits"] is None
    assert plan["memory_bytes"]["available"] is None
    assert plan["largest"] is None


def test_wishes_are_honoured(cli: Cli) -> None:
    asked = ("plan", "Llama-3.2-3B", "--device", "apple-m4", "--unit", "cpu", "--runtime", "llama.cpp")
    plan = cli(*asked, "--precision", "q6_k", "--context", "4096", "--json").json
    assert (plan["unit"], plan["runtime"], plan["precision"], plan["context"]) == ("cpu", "llama.cpp", "q6_k", 4096)
    longer = cli(*asked, "--precision", "q6_k", "--context", "8192", "--json").json
    assert longer["memory_bytes"]["kv"] == 2 * plan["memory_bytes"]["kv"]
    quick = cli(*asked, "--want", "1000", "--json").json
    assert any("times the speed" in change for change in quick["changes"])
    wide = cli(*asked, "--precision", "q6_k", "--bandwidth", "240", "--json").json
    assert wide["decode_tok_s"]["value"] > cli(*asked, "--precision", "q6_k", "--json").json["decode_tok_s"]["value"]


def test_this_machine_is_measured_once_and_then_planned_for(in_stock: Cli, stocked: Path) -> None:
    first = in_stock("plan", "tiny", "--device", "host", "--context", "64", "--prompt", "32", "--json")
    assert first.code == 0, first.err
    plan = first.json
    assert (plan["device"], plan["precision"], plan["fits"]) == ("host", "as stored", True)
    kept = (stocked / "host.json").stat().st_mtime_ns
    assert in_stock("plan", "tiny", "--device", "host", "--context", "64", "--prompt", "32", "--json").json == plan
    assert (stocked / "host.json").stat().st_mtime_ns == kept


def test_measurements_of_the_device_refine_its_plan(cli: Cli, tmp_path: Path) -> None:
    asked = (
        "plan",
        "Llama-3.2-3B",
        "--device",
        "apple-m4",
        "--unit",
        "gpu",
        "--precision",
        "q4_k_m",
        "--context",
        "64",
    )
    before = cli(*asked, "--json").json["decode_tok_s"]
    results = {
        "tg128": {
            **figure([0.7 * before["value"]], "tok/s"),
            "model_filename": "Llama-3.2-3B.gguf",
            "model_type": "llama 3B Q4_K - Medium",
            "model_n_params": 3.21e9,
            "model_size": 2.0e9,
            "n_gpu_layers": 99,
            "backends": "Metal",
        }
    }
    taken = Measurement.taken("mine", command="llama-bench", results=results, libraries=[], settings={})
    after = cli(*asked, "--measured", taken.save(tmp_path), "--json").json["decode_tok_s"]
    assert abs(after["value"] / before["value"] - 0.7) < 0.2
    assert after["high"] / after["low"] < before["high"] / before["low"]


def test_it_publishes_its_own_error(cli: Cli, rows: Path, tmp_path: Path) -> None:
    chart = tmp_path / "errors.svg"
    for flags in ((), ("--leave-one-device-out",)):
        report = cli("plan", "--evaluate", rows, *flags, "--plot", chart, "--json").json
        assert {group: report["decode"][group]["n"] for group in report["decode"]} == {
            "all": 3,
            "published": 2,
            "estimated": 1,
        }
        assert set(report["decode"]["all"]) == {"n", "median_ape", "mean_ape", "p90_ape", "coverage80"}
        assert report["prefill"]["estimated"] == dict.fromkeys(report["decode"]["all"]) | {"n": 0}
        assert 0 < report["decode"]["all"]["median_ape"] < 1
    assert len(ElementTree.parse(chart).getroot().findall(".//{*}circle")) == 4
    assert "decode, weights published" in cli("plan", "--evaluate", rows).out


def test_the_guides_table_is_judged_figure_by_figure(cli: Cli) -> None:
    rows = cli("plan", "--mission-table", "--json").json["rows"]
    assert len(rows) == 12
    a100 = next(row for row in rows if (row["model"], row["figure"]) == ("7B", "throughput"))
    assert a100["claimed"] > a100["ceiling"]["int4"] > a100["predicted"]["value"]
    assert (a100["measured"], a100["verdict"]) == (200.9, "wrong")
    assert "verdict" in cli("plan", "--mission-table").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("7B", "--device", "no-such"), "no device 'no-such'"),
        (("no model at all", "--device", "apple-m4"), "names no size"),
        (("7B", "--device", "apple-m4", "--precision", "q9"), "no precision 'q9'"),
        (("7B", "--device", "apple-m4", "--context", "0"), "--context is 0"),
        (("7B", "--device", "apple-m4", "--prompt", "-1"), "--prompt is -1"),
        (("7B", "--device", "apple-m4", "--want", "nan"), "--want is nan"),
        (("7B", "--device", "apple-m4", "--memory", "-8"), "--memory is -8"),
        (("7B", "--device", "apple-m4", "--bandwidth", "inf"), "--bandwidth is inf"),
        (("7B", "--device", "a100-80gb-sxm", "--unit", "npu"), "offers nothing for the npu"),
        (("7B", "--leave-one-device-out"), "go with --evaluate"),
        (("7B", "--plot", "x.svg"), "go with --evaluate"),
        (("--evaluate", "no.csv"), "no.csv"),
        (("7B", "--device", "apple-m4", "--catalogue", "no.toml"), "no.toml"),
        (("7B", "--device", "apple-m4", "--measured", "no.json"), "no.json"),
    ],
)
def test_wrong_use_is_refused_in_one_line(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    told = cli("plan", *arguments)
    assert told.code == 2
    assert words in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_a_malformed_row_names_file_line_and_field(cli: Cli, rows: Path) -> None:
    rows.write_text(rows.read_text().replace(",9.5,", ",fast,"))
    told = cli("plan", "--evaluate", rows)
    assert told.code == 2
    assert "rows.csv, line 2: decode_tok_s" in told.err


def test_a_plan_imports_no_runtime_and_opens_no_socket() -> None:
    code = (
        "import socket, sys\n"
        "class none(socket.socket):\n"
        "    def __init__(self, *_, **__): raise AssertionError('a socket')\n"
        "socket.socket = none\n"
        "from edgewise.cli.main import run\n"
        "code = run(['plan', 'Qwen2.5-7B', '--device', 'apple-m4', '--json'])\n"
        "heavy = {'onnxruntime', 'xllamacpp', 'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "print(code, sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 []"
    assert json.loads(done.stdout)["fits"] is True
