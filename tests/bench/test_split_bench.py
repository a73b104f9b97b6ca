"""A tiny campaign on a tiny model: real workers, a real relay, real faults."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from edgewise.bench.journal import Journal
from edgewise.bench.measure import Measurement
from edgewise.bench.split import Campaign, SplitBench, as_printed, as_results
from edgewise.bench.split_faults import compared, drawn
from edgewise.errors import UsageError
from edgewise.models.bundle import Bundle
from edgewise.wire.codec import codec

SMALL = SplitBench(codecs=("exact", "int8"), tokens=200, link_cuts=6, worker_kills=1, prompts=2, rounds=1)


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def report(tiny_bundle: Bundle) -> dict[str, Any]:
    return Campaign(SMALL, tiny_bundle, Journal(None, {}), quiet).report()


def test_faults_cost_no_token(report: dict[str, Any]) -> None:
    cuts = report["cuts"]
    assert (cuts["n"], cuts["kills"]) == (6, 1)
    assert (cuts["lost"], cuts["duplicated"], cuts["different"], cuts["failed"]) == (0, 0, 0, [])
    assert {kind: one["n"] for kind, one in cuts["by_kind"].items()} == {"reset": 2, "cut": 2, "stall": 2, "kill": 1}
    assert cuts["tokens"]["there"] + cuts["tokens"]["here"] == 7 * 128
    assert cuts["felt"] >= 5  # a silence may be too short to be noticed; a connection that breaks is
    assert cuts["tokens"]["here"] > 0


def test_an_exact_boundary_changes_no_token(report: dict[str, Any]) -> None:
    assert report["identical"] == {"prompts": 2, "tokens": 2 * 64, "different": 0, "cuts": [1]}
    for speed in filter(None, (report["speed"], report["speed_apart"])):
        assert speed["different"] == 0
        assert speed["ratio"] == [speed["split_tok_s"][0] / speed["whole_tok_s"][0]]


def test_every_cut_and_codec_has_its_row(report: dict[str, Any]) -> None:
    rows = report["rows"]
    assert [(row["cut"], row["codec"], row["bytes"]) for row in rows] == [
        (1, "exact", 256),
        (1, "int8", codec("int8").row_bytes(64)),
    ]
    assert rows[0]["ppl_rise"] == 0
    assert rows[0]["interval"] == [0, 0]


def test_the_report_as_json_and_as_a_measurement(report: dict[str, Any]) -> None:
    printed = as_printed(report)
    assert set(printed["cuts"]["stall_over_tail_ms"]) == {"median", "p95", "max"}
    assert set(printed["speed"]["ratio"]) == {"median", "low", "high"}
    assert len(printed["speed"]["split_tok_s"]) == 1
    results = as_results(report)
    assert results["speed"]["split_tok_s"]["unit"] == "tok/s"
    assert results["speed"]["whole_first_token_ms"]["unit"] == "ms"
    assert results["cuts"]["stall_ms"]["samples"]


def test_what_a_journal_holds_is_not_done_again(tiny_bundle: Bundle, tmp_path: Path) -> None:
    plan = SplitBench(codecs=("exact",), tokens=0, link_cuts=0, worker_kills=0, prompts=2, rounds=0)
    file = tmp_path / "journal.jsonl"
    first = Campaign(plan, tiny_bundle, Journal(file, plan.facts), quiet).report()
    *whole, last = file.read_text().splitlines()
    assert [line[:20] for line in (*whole, last)][1:] == ['{"piece": "prompt 0"', '{"piece": "prompt 1"']
    file.write_text("\n".join([*whole, last[:25]]))  # as a process leaves it that was ended in the middle of a line
    changed = whole[1].replace('"different": 0', '"different": 7')
    assert changed != whole[1]
    file.write_text("\n".join([whole[0], changed, last[:25]]))
    again = Campaign(plan, tiny_bundle, Journal(file, plan.facts), quiet).report()
    assert again["identical"] == first["identical"] | {"different": 7}
    assert file.read_text().splitlines() == [whole[0], changed, last]
    with pytest.raises(UsageError, match="belongs to another campaign"):
        Journal(file, {"other": True})


def test_a_file_that_is_no_journal_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("buy milk\n")
    with pytest.raises(UsageError, match="no journal of a campaign"):
        Journal(file, {})
    assert file.read_text() == "buy milk\n"


@pytest.mark.parametrize(
    ("came", "lost", "duplicated", "different"),
    [
        ([1, 2, 3, 4, 5, 6], 0, 0, 0),
        ([1, 2, 4, 5, 6], 1, 0, 0),
        ([1, 2, 3, 3, 4, 5, 6], 0, 1, 0),
        ([1, 2, 9, 4, 5, 6], 0, 0, 1),
        ([1, 2], 4, 0, 0),
        ([], 6, 0, 0),
        ([1, 2, 4, 5, 6, 7], 1, 1, 0),
    ],
)
def test_tokens_are_told_apart(came: list[int], lost: int, duplicated: int, different: int) -> None:
    found = compared([1, 2, 3, 4, 5, 6], came)
    assert found == {"lost": lost, "duplicated": duplicated, "different": different}


def test_a_seed_draws_the_same_faults_of_every_kind_way_and_place() -> None:
    codecs: tuple[str, ...] = ("exact", "int8", "int4")
    trials = drawn(60, 20, (10, 15), codecs, 160, seed=3)
    assert trials == drawn(60, 20, (10, 15), codecs, 160, seed=3)
    assert trials != drawn(60, 20, (10, 15), codecs, 160, seed=4)
    assert sorted(trial.number for trial in trials) == list(range(80))
    kinds = ("reset", "cut", "stall", "kill")
    assert {(t.cut, t.codec, t.kind) for t in trials} == set(product((10, 15), codecs, kinds))
    assert sum(trial.token == 0 for trial in trials) == 8
    assert max(trial.token for trial in trials) <= 156


def test_measurements_say_what_went_through_the_relay(report: dict[str, Any], tmp_path: Path) -> None:
    taken = Measurement.taken("x", command="c", results=as_results(report), settings=SMALL.facts)
    again = Measurement.read(taken.save(tmp_path))
    assert again.results["cuts"]["n"] == 6


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rounds": -1}, "--rounds is -1"),
        ({"tokens": 5}, "--tokens is 5; 64 or more"),
        ({"codecs": ("int2",)}, "int2"),
        ({"link": "string"}, "there is no link 'string'"),
        ({"cuts": ()}, "at least one cut"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SplitBench(**wrong)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a"}\n{"text": "b"}', "line 2 of prompts has no `prompt`"),
        (b'{"prompt": "a"}\n[]', "line 2 of prompts has no `prompt`"),
        (b'{"prompt": "a"}\n', "prompts has 1 prompts, 2 are wanted"),
        (b"\xff", "prompts is no UTF-8 text"),
    ],
)
def test_a_file_without_prompts_is_refused(tiny_bundle: Bundle, tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        Campaign(replace(SMALL, prompt_file=file), tiny_bundle, Journal(None, {}), quiet)


def test_prompts_come_from_a_file(tiny_bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('{"prompt": "bad cab"}\n{"prompt": "a bed"}\n{"prompt": "not asked"}\n')
    plan = SplitBench(tokens=0, link_cuts=0, worker_kills=0, prompts=2, prompt_file=file, rounds=0)
    found = Campaign(plan, tiny_bundle, Journal(None, {}), quiet).report()
    assert found["identical"] == {"prompts": 2, "tokens": 128, "different": 0, "cuts": [1]}


def test_a_cut_that_the_model_has_not_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="cannot be cut at 3"):
        Campaign(SplitBench(cuts=(1, 3)), tiny_bundle, Journal(None, {}), quiet)
