"""A profile of a tiny model, and what Perfetto's own trace processor finds in its trace."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from trace_processor import TraceProcessor, opened

from edgewise.bench.profile import profile
from edgewise.bench.runs import Time
from edgewise.bench.runs_onnx import graph_runs
from edgewise.bench.watch import Log, WatchedModel, WatchedTokenizer
from edgewise.engines.base import Row
from edgewise.engines.load import local_model
from edgewise.engines.native_lm import probe
from edgewise.errors import MissingExtra, UsageError
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from edgewise.types import Message
from tiny import save_gguf, tiny

LAYERS = 3
BLOCKS = 2  # two layers in the first, one in the second
BLOCKS = {"block-00", "block-01"}
AT_ONCE = {"native": {*BLOCKS, "head"}, "onnxruntime": {"embed", "head"}}  # for all rows of a forward
ATTENTION = {"native": "attend", "onnxruntime": "GroupQueryAttention"}
TOKENS = 5
REQUESTS = 3
MESSAGES = (Message("user", "bad cab"),)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    home = tmp_path_factory.mktemp("home")
    source = save_gguf(tiny("llama"), home / "tiny.gguf", gguf.GGMLQuantizationType.Q4_0)
    return pull(str(source), home=home, layers_per_block=2)


@pytest.fixture(scope="module", params=["native", "onnxruntime"])
def runtime(request: pytest.FixtureRequest) -> Any:
    if request.param == "native" and probe() is None:
        pytest.skip("the native kernels were not built for this machine")
    return request.param


class Slow:
    """A tiny model is done with a request before the next one comes; this one is not."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    async def forward(self, rows: Any) -> Any:
        time.sleep(0.01)  # noqa: ASYNC251 - as a local model blocks its step thread
        return await self._model.forward(rows)


@pytest.fixture(scope="module")
def requests_meet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgewise.bench.profile.local_model", lambda *a, **k: Slow(local_model(*a, **k)))
        yield


@pytest.fixture(scope="module")
def facts(bundle: Bundle, runtime: Any, requests_meet: None) -> dict[str, Any]:
    """Three requests for two slots: one waits."""
    return profile(bundle, MESSAGES, max_tokens=TOKENS, requests=REQUESTS, runtime=runtime, slots=2)


def rows(facts: dict[str, Any], table: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in facts[table]}


def test_it_counts_what_was_computed(facts: dict[str, Any], runtime: str) -> None:
    assert facts["runtime"].startswith(runtime)
    assert facts["completion_tokens"] == [TOKENS] * REQUESTS
    assert len(facts["queue_wait_ms"]) == REQUESTS
    phases, operators, graphs = (rows(facts, table) for table in ("phases", "operators", "graphs"))
    assert phases["sampling"]["count"] == phases["detokenize"]["count"] == TOKENS * REQUESTS
    assert phases["decode"]["count"] == (TOKENS - 1) * REQUESTS
    assert phases["prefill"]["count"] == REQUESTS
    (forwards,) = {graphs[name]["count"] for name in AT_ONCE[runtime]}
    assert 2 * TOKENS <= forwards < TOKENS * REQUESTS  # the third request comes after one of the two
    (runs,) = {graphs[name]["count"] for name in BLOCKS}
    assert runs == (forwards if runtime == "native" else TOKENS * REQUESTS)
    assert operators[ATTENTION[runtime]]["count"] == LAYERS * runs


def test_it_adds_up(facts: dict[str, Any]) -> None:
    for table in ("phases", "graphs", "operators"):
        parts = [row for row in facts[table] if row["name"] != "in graphs, between operators"]
        assert sum(row["share"] for row in parts) == pytest.approx(1)
        assert all(row["ms"] >= 0 for row in facts[table]), table
    assert facts["kv"]["peak_bytes"] == facts["kv"]["peak_rows"] * facts["kv"]["bytes_per_row"]
    prompt = facts["prompt_tokens"]
    assert prompt + TOKENS - 1 <= facts["kv"]["peak_rows"] <= 2 * (prompt + TOKENS - 1)
    json.dumps(facts, allow_nan=False)


def test_a_forward_is_counted_once_however_many_it_serves(facts: dict[str, Any], runtime: str) -> None:
    phases, graphs, operators = (rows(facts, table) for table in ("phases", "graphs", "operators"))
    forwards = sum(row["ms"] for row in facts["graphs"] if row["name"] != "in graphs, between operators")
    assert phases["prefill"]["ms"] + phases["decode"]["ms"] == pytest.approx(forwards)
    assert phases["others in the same forward"]["ms"] > 0
    computed = sum(facts["prompt_tokens"] - cached for cached in facts["cached_tokens"])
    decoded = (TOKENS - 1) * REQUESTS
    for name in (ATTENTION[runtime], "head" if runtime == "native" else "MatMulNBits"):
        row = operators[name]
        by_kind = row["prefill_us_per_token"] * computed + row["decode_us_per_token"] * decoded
        assert by_kind / 1000 == pytest.approx(row["ms"]), name
    assert (
        sum(row["ms"] for row in facts["operators"])
        <= sum(graphs[name]["ms"] for name in BLOCKS | AT_ONCE[runtime]) * 1.001
    )


def test_everything_noted_is_somebodys(facts: dict[str, Any]) -> None:
    assert facts["unclaimed"] == {}
    assert facts["stray_runs"] == {"count": 0, "ms": 0}
    assert 0 <= facts["clock_skew_us"] < 10_000


@pytest.fixture(scope="module")
def processor(
    bundle: Bundle, runtime: Any, requests_meet: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TraceProcessor]:
    path = tmp_path_factory.mktemp("trace") / "out.pftrace"
    pytest.importorskip("perfetto", reason="the extra edgewise[profile] is not installed")
    profile(bundle, MESSAGES, max_tokens=TOKENS, requests=REQUESTS, runtime=runtime, slots=2, trace=path)
    with opened(path.read_bytes()) as processor:
        yield processor


def test_the_trace_processor_reads_all_of_it(processor: TraceProcessor) -> None:
    assert processor.query("select name, value from stats where severity = 'error' and value > 0") == []
    assert processor.query("select count(*) from slice where dur < 0") == [(0,)]
    assert processor.query("select name from process where pid > 0") == [("edgewise tiny",)]
    assert (
        processor.query(
            "select child.name from slice child join slice parent on child.parent_id = parent.id "
            "where child.ts < parent.ts or child.ts + child.dur > parent.ts + parent.dur"
        )
        == []
    )


def test_requests_have_their_phases_and_tokens(processor: TraceProcessor) -> None:
    found = processor.query(
        "select parent.name as within, slice.name as name, count(*) as n "
        "from slice left join slice parent on slice.parent_id = parent.id "
        "join track on slice.track_id = track.id where track.name = 'request 2' group by 1, 2"
    )
    assert set(found) == {
        (None, "request 2", 1),
        ("request 2", "template + tokenize", 1),
        ("request 2", "queue wait", 1),
        ("request 2", "prefill", 1),
        ("request 2", "decode", 1),
        ("prefill", "prefill chunk", 1),
        ("prefill", "sampling", 1),
        ("prefill", "detokenize", 1),
        ("decode", "decode step", TOKENS - 1),
        ("decode", "sampling", TOKENS - 1),
        ("decode", "detokenize", TOKENS - 1),
    }


def test_operators_lie_in_graphs_and_graphs_in_forwards(processor: TraceProcessor, runtime: str) -> None:
    model = "join track on slice.track_id = track.id where track.name = 'model'"
    depths = dict(processor.query(f"select slice.name, min(depth) from slice {model} group by 1"))
    assert depths["forward"] == 0
    assert {name for name, depth in depths.items() if depth == 1} == BLOCKS | AT_ONCE[runtime]
    attention = processor.query(
        "select parent.name, count(*) from slice join slice parent on slice.parent_id = parent.id "
        f"where slice.name = '{ATTENTION[runtime]}' group by 1 order by 1"
    )
    steps = processor.query(
        f"select extract_arg(arg_set_id, 'debug.rows') from slice {model} and slice.name = 'forward'"
    )
    assert sum(rows for (rows,) in steps) == TOKENS * REQUESTS
    runs = len(steps) if runtime == "native" else TOKENS * REQUESTS
    assert attention == [("block-00", 2 * runs), ("block-01", runs)]


def test_counters_rise_and_fall_back(processor: TraceProcessor) -> None:
    found = processor.query(
        "select track.name, max(value), min(value) from counter join track on counter.track_id = track.id group by 1"
    )
    peaks = {name: (most, least) for name, most, least in found}
    assert set(peaks) == {"KV rows", "KV bytes", "active slots", "waiting requests"}
    assert peaks["active slots"] == (2, 0)
    assert peaks["waiting requests"][0] >= 1
    assert all(least == 0 for _, least in peaks.values())


@pytest.fixture
def nothing_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgewise.bench.profile._serve", pytest.fail)
    monkeypatch.setattr("edgewise.bench.profile.recording", pytest.fail)


@pytest.mark.usefixtures("nothing_may_run")
def test_a_trace_without_the_perfetto_package_is_refused_before_any_work(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(MissingExtra):
        profile(bundle, MESSAGES, max_tokens=1, trace=tmp_path / "out.pftrace")


@pytest.mark.usefixtures("nothing_may_run")
@pytest.mark.parametrize("place", ["", "nowhere/out.pftrace", "file/out.pftrace", "x" * 254])
def test_a_trace_that_cannot_be_written_is_refused_before_any_work(bundle: Bundle, tmp_path: Path, place: str) -> None:
    pytest.importorskip("perfetto", reason="the extra edgewise[profile] is not installed")
    (tmp_path / "file").touch()
    with pytest.raises((UsageError, OSError)) as refused:
        profile(bundle, MESSAGES, max_tokens=1, trace=tmp_path / place)
    assert str(tmp_path / place) in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


NATIVE = """
import sys
from pathlib import Path
from edgewise.bench.profile import profile
from edgewise.models.bundle import Bundle
from edgewise.types import Message
bundle = Bundle.open(Path(sys.argv[1]))
facts = profile(bundle, (Message("user", "bad"),), max_tokens=2, runtime="native")
assert facts["runtime"].startswith("native") and facts["graphs"][0]["count"] > 0, facts
print(*sorted(sys.modules))
"""


def test_a_profile_of_the_native_kernels_loads_no_onnxruntime(bundle: Bundle) -> None:
    if probe() is None:
        pytest.skip("the native kernels were not built for this machine")
    command = [sys.executable, "-c", NATIVE, str(bundle.path)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "edgewise.engines.native_lm" in loaded
    assert {"onnxruntime", "edgewise.engines.onnx_lm"}.isdisjoint(loaded)


def test_a_profile_cut_by_onnxruntime_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "graph.json"
    path.write_text('[{"cat": "Session", "name": "model_run", "ts": 1, "dur": 2}]')
    (run,) = graph_runs("graph", 0, path)
    assert run.time.end - run.time.start == 2000
    monkeypatch.setattr("edgewise.bench.importers.onnxruntime.EVENT_LIMIT", 1)
    with pytest.raises(UsageError, match="dropped the rest"):
        list(graph_runs("graph", 0, path))


async def test_the_watchers_change_nothing() -> None:
    """Every call of the seams arrives, with its arguments, and its answer comes back."""
    calls: list[tuple[Any, ...]] = []

    class Engine:
        name, vocab, context, slots, stop_ids = "engine", 7, 8, 9, frozenset({1})

        def __getattr__(self, method: str) -> Any:
            async def later(*arguments: Any) -> list[Any]:
                calls.append((method, *arguments))
                return [method]

            def at_once(*arguments: Any) -> tuple[Any, ...]:
                return (method, *arguments)

            return at_once if method in ("encode", "chat", "token_bytes") else later

    log = Log()
    model, tokenizer = WatchedModel(Engine(), log), WatchedTokenizer(Engine(), log)
    assert (model.name, model.vocab, model.context, model.slots, tokenizer.stop_ids) == ("engine", 7, 8, 9, {1})
    row = Row("s", 4, [5, 6], 1)  # type: ignore[arg-type]
    await model.open("s", 3)
    assert await model.forward([row]) == ["forward"]
    await model.rewind("s", 2)
    await model.close("s")
    await model.shutdown()
    assert calls == [("open", "s", 3), ("forward", [row]), ("rewind", "s", 2), ("close", "s"), ("shutdown",)]
    assert [step.rows for step in log.steps] == [(("s", 4, 2, 1),)]
    assert tokenizer.encode("a") == ("encode", "a")
    assert tokenizer.chat([]) == ("chat", [])
    assert tokenizer.token_bytes(3) == ("token_bytes", 3)
    assert len(log.texts) == len(log.prompts) == 1
    assert Time(1_000_000, 3_000_000).ms == 2


def test_a_recording_that_ran_out_of_room_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    if probe() is None:
        pytest.skip("the native kernels were not built for this machine")
    monkeypatch.setattr("edgewise.engines.native_lm.MOST_SPANS", 50)
    with pytest.raises(UsageError, match="50 steps"):
        profile(bundle, MESSAGES, max_tokens=TOKENS, runtime="native")
