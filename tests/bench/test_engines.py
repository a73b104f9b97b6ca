"""`bench engines`: the arithmetic on made-up samples, the turns with faults in them, and a real run on a tiny model."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from edgewise.bench import turns
from edgewise.bench.chart import chart
from edgewise.bench.engines import (
    KL_MARGIN,
    UNITS,
    Comparison,
    Standing,
    as_results,
    divergence,
    left_out,
    peers_that_ran,
    ratios,
    ratios_to_best,
    row,
    shares,
)
from edgewise.bench.limits import ceilings, machine_limits, read_bytes_per_token
from edgewise.bench.peers.base import FAST, OURS, PEERS, STABLE, Answer, Contestant
from edgewise.bench.turns import Taken, TurnFailed, in_fresh_process, take_turns
from edgewise.bench.worker import speeds
from edgewise.errors import UsageError
from edgewise.evaluate.divergence import kl
from edgewise.models.bundle import Bundle


def line(decode: list[float], rss: float = 100.0, out: str | None = None) -> dict[str, Any]:
    samples = {key: [rss] * len(decode) for key in UNITS} | {"decode_tok_s": decode, "prefill_tok_s": decode}
    return {"version": "1", "kl": 0.001, **samples, "failed": None, "left_out": out, "greedy_agreement": 5}


def report(**engines: dict[str, Any]) -> dict[str, Any]:
    named = {FAST: line([30.0, 40.0, 20.0]), STABLE: line([20.0, 20.0, 20.0]), **engines}
    return {"model": "m <&>", "limits": {}, "cells": [{"prompt_tokens": 8, "streams": 1, "engines": named}]}


def test_a_ratio_compares_figures_of_the_same_round() -> None:
    found = ratios(line([30.0, 40.0, 20.0]), line([10.0, 40.0, 10.0]))["decode_tok_s"]
    assert found["samples"] == [3.0, 1.0, 2.0]
    assert found["median"] == 2.0
    assert found["low"] <= 2.0 <= found["high"]


def test_the_best_peer_is_that_of_each_figure_and_none_that_is_left_out() -> None:
    engines = report(
        quick=line([10.0, 10.0, 10.0], rss=400.0),
        small=line([5.0, 5.0, 5.0], rss=50.0),
        unlike=line([999.0, 999.0, 999.0], rss=1.0, out="its KL"),
    )["cells"][0]["engines"]
    best = ratios_to_best(engines, FAST)
    assert best["decode_tok_s"]["best"] == "quick"
    assert best["decode_tok_s"]["median"] == 3.0
    assert best["peak_rss_bytes"]["best"] == "small"
    assert best["peak_rss_bytes"]["median"] == 2.0


def test_without_a_peer_there_is_no_ratio() -> None:
    assert ratios_to_best(report()["cells"][0]["engines"], FAST) == {}


@pytest.mark.parametrize(
    ("peer", "failed", "reason"),
    [
        (0.004 + KL_MARGIN, None, None),
        (0.0, None, None),
        (0.0041 + KL_MARGIN, None, "KL of 0.0141 exceeds ours, 0.004"),
        (None, None, "no distributions"),
        (0.004, "it crashed", "it crashed"),
    ],
)
def test_fidelity_decides_about_the_ratio(peer: float | None, failed: str | None, reason: str | None) -> None:
    said = left_out(peer, 0.004, failed)
    assert said is None if reason is None else reason in str(said)


def test_a_failed_contestant_keeps_its_samples_and_says_why() -> None:
    ours = Standing(OURS[0], "1", kl=0.0, greedy=(1, 2, 3))
    peer = Standing(Contestant("p", "m", "l"), "2", kl=0.0, greedy=(1, 2, 4))
    found = row(peer, Taken([dict.fromkeys(UNITS, 1.0)], "it hung"), ours)
    assert found["decode_tok_s"] == [1.0]
    assert found["failed"] == found["left_out"] == "it hung"
    assert found["greedy_agreement"] == 2


def test_speeds_of_streams_together() -> None:
    found = speeds([Answer(5, 1.0, 3.0), Answer(5, 2.0, 5.0)], prompt=10, new=5)
    assert found == {"ttft_ms": 1500.0, "prefill_tok_s": 10.0, "decode_tok_s": 2.0}


def test_another_count_than_asked_for_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match=r"5 new tokens were asked for, \[5, 4\] came"):
        speeds([Answer(5, 1.0, 3.0), Answer(4, 1.0, 3.0)], prompt=10, new=5)


def test_what_an_engine_does_not_tell_is_filled_as_in_the_reference() -> None:
    random = np.random.default_rng(0)
    p, q = random.normal(size=(2, 6, 40)).astype(np.float32)
    log_q = q - np.logaddexp.reduce(q, axis=1, keepdims=True)
    whole = float(kl(p, q).mean())
    assert divergence(p, q) == pytest.approx(whole)
    assert divergence(p, np.pad(q, ((0, 0), (0, 8)))) == pytest.approx(whole)
    log_q[:, 30:] = np.nan
    assert 0.5 * whole < divergence(p, log_q) < whole


def test_turns_go_round_and_a_failure_ends_one_part_only() -> None:
    asked = []

    def turn(name: str, number: int) -> dict[str, Any]:
        asked.append((name, number))
        if (name, number) == ("b", 1):
            raise TurnFailed("it broke")
        return {"n": number}

    taken = take_turns(["a", "b", "c"], 3, turn, pause_s=0)
    assert asked == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("c", 1), ("a", 2), ("c", 2)]
    assert taken["b"] == Taken([{"n": 0}], "it broke")
    assert [result["n"] for result in taken["c"].results] == [0, 1, 2]


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A contestant of this test's own in the worker's place: it does what `model` says when it is loaded."""
    (tmp_path / "faulty_worker.py").write_text(
        "import json, os, subprocess, sys, time\n"
        "job = json.load(sys.stdin)\n"
        "print('some noise'); print('the last word', file=sys.stderr, flush=True)\n"
        "if job['do'] == 'abort': os.abort()\n"
        "if job['do'] == 'leave': sys.exit(7)\n"
        "if job['do'] == 'hang':\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    open(job['pids'], 'w').write(f'{os.getpid()} {child.pid}')\n"
        "    time.sleep(600)\n"
        "open(sys.argv[1], 'w').write(json.dumps({'failed': 'no'} if job['do'] == 'refuse' else {'took': job['do']}))\n"
    )
    monkeypatch.setattr(turns, "WORKER", "faulty_worker")
    return {"environment": {"PYTHONPATH": str(tmp_path)}, "timeout_s": 60.0}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("abort", r"died of SIGABRT: … some noise.*the last word"),
        ("leave", r"ended with code 7"),
        ("refuse", r"^no$"),
    ],
)
def test_a_turn_that_crashes_says_how(faulty: dict[str, Any], fault: str, reason: str) -> None:
    with pytest.raises(TurnFailed, match=reason):
        in_fresh_process({"do": fault}, **faulty)
    assert in_fresh_process({"do": "well"}, **faulty) == {"took": "well"}


def test_a_turn_that_hangs_is_killed_with_its_children(faulty: dict[str, Any], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(TurnFailed, match="no answer within 2 s"):
        in_fresh_process({"do": "hang", "pids": str(pids)}, **{**faulty, "timeout_s": 2.0})
    left = [int(pid) for pid in pids.read_text().split()]
    for _ in range(500):  # the kernel takes its time with a process that nobody waits for
        if all(map(_gone, left)):
            return
        time.sleep(0.02)
    pytest.fail(f"of {left} some still run")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_turn_does_not_outlive_the_bench() -> None:
    turn = "import time, edgewise.bench.worker as w; w._end_with_parent(); print(1, flush=True); time.sleep(600)"
    start = f"p = subprocess.Popen([sys.executable, '-c', {turn!r}])"
    bench = f"import subprocess, sys; {start}; print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", bench], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    left = max(said)
    for _ in range(500):
        if _gone(left):
            return
        time.sleep(0.02)
    pytest.fail(f"{left} still runs")


def _gone(pid: int) -> bool:
    """Not there, or dead and only waiting for its parent to look."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"against": ("nobody",)}, "there is no peer 'nobody'"),
        ({"against": ()}, "at least one peer"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"prompts": (64, 0)}, "--prompts is 0"),
        ({"new": 1}, "--new is 1; 2 to"),
        ({"threads": 999999}, r"--threads is 999999; 1 to \d+ are allowed"),
        ({"timeout_s": float("nan")}, "--timeout-s is nan"),
        ({"timeout_s": -1.0}, "--timeout-s is -1"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Comparison(**wrong)


def test_the_chart_is_xml_and_shows_every_engine_that_ran() -> None:
    drawn = chart(report(peer=line([1.0, 2.0]), absent=line([]), unlike=line([3.0], out="its KL")))
    words = [node.text for node in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]
    assert {FAST, STABLE, "peer", "unlike"} <= set(words)
    assert "absent" not in words
    assert words[0] == "m <&>, 8 prompt tokens, 1 at once"
    assert words.count("KL 0.001") == 4
    assert "prefers-color-scheme: dark" in drawn


def test_samples_become_figures() -> None:
    engines = as_results(report(absent=line([])))["cells"][0]["engines"]
    assert engines[FAST]["decode_tok_s"]["samples"] == [30.0, 40.0, 20.0]
    assert engines[FAST]["peak_rss_bytes"]["unit"] == "B"
    assert engines["absent"]["decode_tok_s"] == []


def test_the_limits_of_this_machine(tiny_bundle: Bundle) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # where no model has fixed onnxruntime's threads
        limits, reached_by = fresh.submit(machine_limits, 1).result()
    assert limits.keys() == reached_by.keys() == {"read_bytes_per_s", "int8_mac_per_s", "fp32_mac_per_s"}
    assert all(limit > 1e8 for limit in limits.values())
    card = tiny_bundle.card
    matrices = card.layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + card.vocab * 64
    read = read_bytes_per_token(tiny_bundle)
    assert read["weight_bytes_per_token"] >= matrices * 18 // 32  # Q4_0: 4 bits and a share of a scale
    assert read["kv_bytes_per_position"] in (2 * card.kv_values_per_token, 4 * card.kv_values_per_token)
    probed = {
        "weight_bytes_per_token": 100,
        "kv_bytes_per_position": 3,
        "read_bytes_per_s": 1e6,
        "int8_mac_per_s": 2e9,
        "fp32_mac_per_s": 1e9,
    }
    found = ceilings(card, probed, prompt=16, new=8)
    assert found["bytes_per_token"] == 100 + 20 * 3
    assert found["macs_per_token"] == matrices + card.layers * 2 * 64 * 20
    assert found["decode_read_tok_s"] == 1e6 / found["bytes_per_token"]
    assert found["decode_int8_tok_s"] == 2 * found["decode_fp32_tok_s"]
    assert shares(line([found["decode_read_tok_s"] / 2]), found)["decode_read"] == pytest.approx(0.5)


def test_every_contestant_has_a_file_and_a_name_of_its_own() -> None:
    everybody = [*OURS, *(c for group in PEERS.values() for c in group)]
    folder = Path(turns.__file__).parent / "peers"
    assert all((folder / f"{contestant.module}.py").is_file() for contestant in everybody)
    assert len({contestant.name for contestant in everybody}) == len(everybody)
    assert all(contestant.install for contestant in everybody if not contestant.ours)


def test_versions_come_from_those_that_ran() -> None:
    assert peers_that_ran(report(peer=line([1.0]), absent=line([]))) == {"peer": "1"}


def test_the_worker_loads_no_runtime_before_its_turn() -> None:
    code = "import edgewise.bench.worker, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"onnxruntime", "onnx", "torch", "xllamacpp", "httpx2"}.isdisjoint(loaded)
