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


@pytest.mark.parametrize(("place", "code"), [("", 2), ("nowhere/out.pftrace", 2), ("x" * 254, 3)])
def test_a_trace_that_cannot_be_written_is_refused_at_once(
    place: str, code: int, in_stock: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("perfetto", reason="the extra edgewise[profile] is not installed")
    monkeypatch.setattr("edgewise.bench.profile._serve", pytest.fail)
    done = in_stock(*PROFILE, "--trace", tmp_path / place)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert str(tmp_path / place) in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("profile", "x", "--model", "nobody"), 3, "nobody"),
        (("profile", "x", "--model", "x.gguf"), 2, "not a bundle"),
        (("profile", " ", "--model", "tiny"), 2, "empty"),
        (("profile", "x", "--requests", "0"), 2, "requests"),
        (("bench", "import", "nowhere.json"), 3, "nowhere.json"),
        (("bench", "import", "nowhere.json", "-o", "out.txt"), 2, "out.txt"),
        (("bench", "import", "/dev/zero"), 2, "/dev/zero is not a regular file"),
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


def test_the_file_that_is_read_is_not_overwritten(cli: Cli, tmp_path: Path) -> None:
    source, link = tmp_path / "bench.json", tmp_path / "link.json"
    source.write_text(json.dumps([{"n_prompt": 8, "n_gen": 0, "avg_ts": 2.0}]))
    link.symlink_to(source)
    before = source.read_bytes()
    for out in (source, link, tmp_path / "." / "bench.json"):
        done = cli("bench", "import", source, "-o", out)
        assert (done.code, done.out) == (2, "")
        assert "is the file that is read" in done.err
    assert source.read_bytes() == before
    (tmp_path / "folder.json").mkdir()
    done = cli("bench", "import", source, "-o", tmp_path / "folder.json")
    assert (done.code, f"{tmp_path / 'folder.json'} is a directory" in done.err) == (2, True)
    done = cli("bench", "import", source, "-o", tmp_path / ("x" * 250 + ".json"))
    assert (done.code, f": {tmp_path}/x" in done.err) == (3, True)


def test_names_in_a_file_do_not_reach_the_terminal_as_they_are(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "bench.json"
    row = {"n_prompt": 8, "n_gen": 0, "avg_ts": 2.0}
    source.write_text(json.dumps([row | {"model": "\x1b[2Ja"}, row | {"model": "b\x9b31m\n"}]))
    done = cli("bench", "import", source)
    assert done.out.splitlines() == [
        "pp8 model=\\x1b[2Ja    2  tok/s  mean",
        "pp8 model=b\\x9b31m\\n  2  tok/s  mean",
    ]
    assert "pp8 model=\x1b[2Ja" in cli("bench", "import", source, "--json").json["results"]


def test_what_is_left_out_is_told(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "export.xml"
    rows = "<row><weight>1000000</weight><backtrace><frame name='f'/></backtrace></row><row/>"
    source.write_text(f"<trace-query-result><node><schema name='time-profile'/>{rows}</node></trace-query-result>")
    done = cli("bench", "import", source)
    assert (done.code, done.err) == (0, "edgewise: left out: 1 samples without a weight\n")
    assert done.out.splitlines()[0].split() == ["cpu", "time", "1", "ms", "total"]
