"""The demo: its prompt files, its processes, and what it concludes. `make demo` itself needs a network once."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

import gguf
import pytest

from edgewise.models.source import pull
from tiny import save_gguf, tiny

DEMO = Path(__file__).parents[1] / "demo"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """demo/run.py with its report in a directory of the test's own."""
    monkeypatch.syspath_prepend(str(DEMO))
    import run

    monkeypatch.setattr(run, "REPORT", tmp_path / "report.json")
    return run


@pytest.fixture
def tiers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo: ModuleType) -> ModuleType:
    """demo/nodes.py with a tiny random model at both ends."""
    import nodes

    source = save_gguf(tiny("llama"), tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0)
    pull(str(source), home=tmp_path)
    monkeypatch.setattr(nodes, "HOME", tmp_path)
    monkeypatch.setattr(nodes, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(demo, "CLOUD_MODEL", "tiny")
    monkeypatch.setattr(demo, "EDGE_MODEL", "tiny")
    monkeypatch.setattr(demo, "MAX_TOKENS", 4)
    return nodes


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_kinds_of_lines(demo: ModuleType, tmp_path: Path) -> None:
    path = write(tmp_path / "p", "Hello?", "", '{"id": "x", "prompt": "Wie geht\'s?"}', '{"prompt": "c"}', "  d  ")
    prompts = [(p.id, p.text) for p in demo.read_prompts(path)]
    assert prompts == [("line-1", "Hello?"), ("x", "Wie geht's?"), ("line-4", "c"), ("line-5", "d")]


def test_the_prompts_that_ship(demo: ModuleType) -> None:
    prompts = demo.read_prompts(DEMO / "prompts.jsonl")
    assert len(prompts) >= 12
    assert len({p.text for p in prompts}) == len(prompts)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["a", "b", "c"], "holds 3 prompts; 4 to 1000 are needed"),
        ([], "holds 0 prompts"),
        (["a"] * 1001, "holds 1001 prompts"),
        (["a", "{", "b", "c"], "line 2: not an object like"),
        (['{"text": "a"}', "b", "c", "d"], "line 1: not an object like"),
        (['{"prompt": 5}', "b", "c", "d"], "line 1: id and prompt must be texts"),
        (['{"prompt": " "}', "b", "c", "d"], "line 1: id and prompt must be texts"),
        (['{"id": "a", "prompt": "b"}'] * 4, "the id 'a' stands on more than one line"),
        (["[" * 9, '{"a":' * 100_000, "b", "c"], "line 2: not an object like"),
        (["x" * (1 << 20)], "at most 1048576 are read"),
    ],
)
def test_bad_files_are_clear_errors(demo: ModuleType, tmp_path: Path, lines: list[str], says: str) -> None:
    with pytest.raises(demo.DemoError, match=says):
        demo.read_prompts(write(tmp_path / "p", *lines))


def test_files_that_are_not_there_or_no_text(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, says in (("none", "cannot read"), ("bytes", "is not UTF-8 text")):
        monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / name)])
        assert demo.main() == 1
        assert says in capsys.readouterr().err


def answer(demo: ModuleType, route: str | None) -> object:
    return demo.Answer("a", "p", route, 0.5, "r", True, 1.0, 2.0, "text")


@pytest.mark.parametrize(
    ("routes", "code", "says"),
    [
        (["edge", "cloud", "edge_fallback"], 0, ""),
        (["edge", "cloud"], 1, "routes not seen: edge_fallback"),
        (["edge", "cloud", "edge_fallback", None], 1, "not answered: a"),
    ],
)
def test_the_conclusion(
    demo: ModuleType, capsys: pytest.CaptureFixture[str], routes: list[str | None], code: int, says: str
) -> None:
    assert demo.conclude([answer(demo, route) for route in routes], 2) == code
    assert says in capsys.readouterr().err
    report = json.loads(demo.REPORT.read_text())
    assert report["cloud_killed_after"] == 2
    assert report["counts"] == {r: routes.count(r) for r in ("edge", "cloud", "edge_fallback")}
    assert report["answers"][0] == {
        "id": "a", "prompt": "p", "route": "edge", "confidence": 0.5, "reason": "r", "stream": True,
        "first_token_ms": 1.0, "decode_tok_s": 2.0, "text": "text",
    }  # fmt: skip


def test_the_cloud_is_killed_half_way_or_once_it_was_seen(demo: ModuleType) -> None:
    edge, cloud = answer(demo, "edge"), answer(demo, "cloud")
    assert not demo.time_to_kill([edge, cloud, edge], 8)
    assert demo.time_to_kill([edge, cloud, edge, edge], 8)
    assert not demo.time_to_kill([edge] * 5, 8)
    assert demo.time_to_kill([edge] * 6, 8)


def test_the_play_with_real_processes_leaves_none(
    demo: ModuleType,
    tiers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pids = watched(tiers, monkeypatch)
    prompts = demo.read_prompts(write(tmp_path / "p", "a", "b [/red]", "c", "d"))
    answers, killed_after = demo.play(prompts)
    assert [a.stream for a in answers] == [True, False, True, False]
    assert all(a.route in {"edge", "cloud", "edge_fallback"} for a in answers)
    assert all(a.first_token_ms > 0 for a in answers)
    assert killed_after in {2, 3}
    assert "the cloud is killed" in capsys.readouterr().out
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def test_a_node_that_does_not_start_and_a_play_that_fails_leave_none(
    demo: ModuleType, tiers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = watched(tiers, monkeypatch)
    with (
        pytest.raises(demo.DemoError, match=r"the edge node did not start.*there is no bundle 'nothing'"),
        tiers.node("cloud", "cloud", "--model", "tiny"),
        tiers.node("edge", "serve", "--edge", "nothing"),
    ):
        pass
    with pytest.raises(KeyboardInterrupt), tiers.node("cloud", "cloud", "--model", "tiny"):
        raise KeyboardInterrupt
    assert len(pids) == 3
    assert not any(alive(pid) for pid in pids)


def watched(tiers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills up with the ids of the processes that the demo starts."""
    pids: list[int] = []
    start = tiers.subprocess.Popen

    def popen(command: list[str], **options: object) -> object:
        process = start(command, **options)
        if "edgewise.cli.main" in command:  # the client library asks `uname` too
            pids.append(process.pid)
        return process

    monkeypatch.setattr(tiers.subprocess, "Popen", popen)
    return pids


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_node_that_says_nothing_is_killed(tiers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "START_S", 0.5)
    monkeypatch.setattr(tiers, "edgewise", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(tiers.DemoError, match="its first line is ''"), tiers.node("cloud", "cloud"):
        pass
    assert [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)] == []


def test_a_sentence_survives_the_cut_of_its_link(
    monkeypatch: pytest.MonkeyPatch, tiers: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """demo/cut.py, over real processes and a real relay."""
    import cut

    monkeypatch.setattr(cut, "CLOUD_MODEL", "tiny")
    monkeypatch.setattr(cut, "CUT_AFTER", 10)
    monkeypatch.setattr(cut, "BACK_AFTER", 30)
    monkeypatch.setattr(cut, "TOKENS", 60)
    monkeypatch.setattr(cut, "pull_bundles", lambda: None)
    monkeypatch.setattr(sys, "argv", ["cut.py"])
    assert cut.main() == 0
    said = capsys.readouterr().out
    assert said.index("[link cut]") < said.index("[link back]")
    assert "by the worker" in said
    assert "the same words as without the cut" in said
