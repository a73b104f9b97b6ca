"""`edgewise profile` and `edgewise bench import` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import Cli

from edgewise.bench.measure import Measurement

PROFILE = ("profile", "bad cab", "--model", "tiny", "--max-tokens", "4")


def test_one_object_with_every_field(in_stock: Cli, tmp_path: Path) -> None:
    done = in_stock(*PROFILE, "--requests", "2", "--json")
    assert done.code == 0
    facts = done.json
    assert facts["completion_tokens"] == [4, 4]
    assert {"unwatched", "watched", "phases", "graphs", "operators", "kv", "queue_wait_ms", "trace"} <= facts.keys()
    assert facts["trace"] is None


def test_the_page_says_what_and_how(in_stock: Cli) -> None:
    page = in_stock(*PROFILE, "--runtime", "onnxruntime").out
    for word in (
        "tiny",
        "profiling off",
        "queue wait",
        "sampling",
        "block-00",
        "MatMulNBits",
        "rows of",
        "microseconds",
    ):
        assert word in page, word
    assert len(page.splitlines()) <= 60
    assert max(map(len, page.splitlines())) <= 120


def test_a_trace_is_written(in_stock: Cli, tmp_path: Path) -> None:
    pytest.importorskip("perfetto", reason="the extra edgewise[profile] is not installed")
    done = in_stock(*PROFILE, "--trace", tmp_path / "out.pftrace", "--json")
    assert done.json["trace"] == str(tmp_path / "out.pftrace")
    assert (tmp_path / "out.pftrace").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("profile", "x", "--model", "nobody"), 3, "nobody"),
        (("profile", "x", "--model", "x.gguf"), 2, "not a bundle"),
        (("profile", " ", "--model", "tiny"), 2, "empty"),
        (("profile", "x", "--requests", "0"), 2, "requests"),
        (("bench", "import", "nowhere.json"), 3, "nowhere.json"),
        (("bench", "import", "nowhere.json", "-o", "out.txt"), 2, "out.txt"),
    ],
)
def test_a_refusal_is_one_line(in_stock: Cli, arguments: tuple[str, ...], code: int, why: str) -> None:
    done = in_stock(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert why in done.err


def test_results_of_another_tool_become_a_measurement(cli: Cli, tmp_path: Path) -> None:
    source, kept = tmp_path / "bench.json", tmp_path / "phone.json"
    source.write_text(json.dumps([{"n_prompt": 8, "n_gen": 0, "avg_ts": 2.0, "samples_ts": [1.0, 2.0, 3.0]}]))
    done = cli("bench", "import", source, "-o", kept, "--json")
    assert (done.code, done.json["name"]) == (0, "phone")
    assert Measurement.read(kept).results["pp8"]["median"] == 2.0
    assert cli("bench", "import", source).out.split() == ["pp8", "2", "tok/s", "median"]
    assert cli("bench", "import", source, "--from", "litert").code == 2
