"""Replays that two models here make: what stands in a row, who judged it, and what a crash leaves."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgewise.cli.main import run
from edgewise.engines.base import Row
from edgewise.engines.decode import Decoder
from edgewise.engines.load import local_model
from edgewise.errors import UsageError
from edgewise.evaluate.divergence import log_softmax
from edgewise.joint import record as module
from edgewise.joint.record import PIECE, TOO_LONG, WITHIN, Question, Recording, questions, record
from edgewise.joint.record_file import Plan, RecordFile
from edgewise.joint.replay import Replay
from edgewise.models.bundle import Bundle
from edgewise.models.source import pull
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import Message, Request
from pruned import whole_and_part
from tiny import save_gguf, tiny

Asked = list[tuple[str, Question]]
NEW = 10  # tokens of an answer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def edge(home: Path) -> Bundle:
    model = tiny("llama", num_hidden_layers=1)
    return pull(str(save_gguf(model, home / "e.gguf", gguf.GGMLQuantizationType.Q8_0)), home=home, name="edge")


@pytest.fixture(scope="module")
def cloud(home: Path) -> Bundle:
    return pull(str(save_gguf(tiny("llama"), home / "c.gguf", gguf.GGMLQuantizationType.Q8_0)), home=home, name="cloud")


def ask(count: int, **keys: Any) -> Asked:
    return [(f"q{n}", Question(f"Is {n} a number?", **keys)) for n in range(count)]


def made(
    edge: Bundle, cloud: Bundle, asked: Asked, path: Path, limit: int | None = None, resume: bool = False, **plan: Any
) -> Recording:
    put = Plan(**{"max_tokens": NEW, **plan})
    return asyncio.run(record(edge, cloud, asked, path, put, limit=limit, resume=resume))


def rows(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def said(bundle: Bundle, prompt: str) -> tuple[list[int], bool]:
    """The model's greedy answer, and whether it ended by itself."""

    async def run() -> tuple[list[int], bool]:
        decoder = Decoder(local_model(bundle, slots=1, context=256), Tokenizer.open(bundle.path))
        request = Request((Message("user", prompt),), max_tokens=NEW)
        chunks = [chunk async for chunk in decoder.generate(request)]
        await decoder.close()
        return [token.id for chunk in chunks for token in chunk.tokens], chunks[-1].finish_reason == "stop"

    return asyncio.run(run())


def mean(bundle: Bundle, prompt: str, answer: list[int], ended: bool) -> float:
    """The mean log-probability of an answer, from the logits of the whole text."""
    tokenizer = Tokenizer.open(bundle.path)
    asked = tokenizer.chat((Message("user", prompt),))

    async def run() -> float:
        model = local_model(bundle, slots=1, context=256)
        await model.open("s", 256)
        (logits,) = await model.forward([Row("s", 0, np.array([*asked, *answer]), len(answer) + 1)])
        found = log_softmax(logits)
        await model.shutdown()
        values = [found[n, id] for n, id in enumerate(answer)]
        if ended or not answer:
            values.append(np.logaddexp.reduce(found[-1, sorted(tokenizer.stop_ids)]))
        return float(np.mean(values))

    return asyncio.run(run())


def test_without_gold_the_clouds_model_judges(edge: Bundle, cloud: Bundle, tmp_path: Path) -> None:
    found = made(edge, cloud, ask(8), tmp_path / "r.jsonl")
    assert (found.new, found.before, found.judges) == (8, 0, Counter(teacher=8))
    written = rows(tmp_path / "r.jsonl")
    assert [row["id"] for row in written] == [f"q{n}" for n in range(8)]
    for row in written:
        means = [mean(cloud, row["prompt"], *said(bundle, row["prompt"])) for bundle in (edge, cloud)]
        assert row["edge"]["quality"] == pytest.approx(means[0] - means[1], abs=1e-4)
        assert row["edge"]["correct"] == (row["edge"]["quality"] >= -WITHIN)
        assert (row["cloud"]["correct"], row["cloud"]["quality"], row["judge"]) == (True, 0.0, "teacher")
    assert min(row["edge"]["quality"] for row in written) < -WITHIN


def test_a_row_holds_what_a_policy_looks_at(edge: Bundle, cloud: Bundle, tmp_path: Path) -> None:
    made(edge, cloud, ask(3, group="numbers"), tmp_path / "r.jsonl")
    for row in Replay.open(tmp_path / "r.jsonl"):
        evidence = row.evidence()
        names = ("mean_logprob", "min_logprob", "mean_margin", "mean_entropy", "truncated", "parse_ok", "prompt_words")
        assert None not in evidence.all(names)
        assert evidence.group == "numbers"
        assert len(evidence.logprobs) <= NEW
        assert row.pair is not None
        assert (row.pair.edge.name, row.pair.cloud and row.pair.cloud.name) == ("edge", "cloud")


def test_gold_goes_before_the_clouds_opinion(edge: Bundle, cloud: Bundle, tmp_path: Path) -> None:
    made(edge, cloud, ask(4), tmp_path / "first.jsonl")
    first = rows(tmp_path / "first.jsonl")
    golds = [first[0]["edge"]["text"], first[1]["cloud"]["text"], "a word nobody says", [first[3]["edge"]["text"], "x"]]
    asked = [(name, Question(question.prompt, gold=gold)) for (name, question), gold in zip(ask(4), golds, strict=True)]
    assert made(edge, cloud, asked, tmp_path / "r.jsonl").judges == Counter(gold=4)
    written = rows(tmp_path / "r.jsonl")
    right = [(row["edge"]["correct"], row["cloud"]["correct"]) for row in written]
    assert right == [(True, False), (False, True), (False, False), (True, False)]
    assert [row["gold"] for row in written] == golds
    assert all("quality" not in row["edge"] for row in written)
    assert made(edge, cloud, asked, tmp_path / "t.jsonl", judge="teacher").judges == Counter(teacher=4)


def test_a_model_is_as_good_as_itself(cloud: Bundle, tmp_path: Path) -> None:
    made(cloud, cloud, ask(5), tmp_path / "r.jsonl.gz")
    for row in rows(tmp_path / "r.jsonl.gz"):
        assert (row["edge"]["quality"], row["edge"]["correct"]) == (0.0, True)
        assert row["edge"]["text"] == row["cloud"]["text"]


def test_another_tokenizers_answer_is_judged_as_text(home: Path, tmp_path: Path) -> None:
    whole, part = whole_and_part(tmp_path)
    bundles = [pull(str(path), home=home, name=path.name) for path in (part, whole)]
    made(*bundles, ask(6), tmp_path / "r.jsonl")
    tokenizer = Tokenizer.open(bundles[1].path)
    different = [row for row in rows(tmp_path / "r.jsonl") if row["edge"]["text"] != row["cloud"]["text"]]
    for row in different:
        _, ended = said(bundles[0], row["prompt"])
        near = mean(bundles[1], row["prompt"], tokenizer.continued(row["edge"]["text"]), ended)
        far = mean(bundles[1], row["prompt"], *said(bundles[1], row["prompt"]))
        assert row["edge"]["quality"] == pytest.approx(near - far, abs=1e-4)
    assert different


def test_long_prompts_are_left_out(edge: Bundle, cloud: Bundle, tmp_path: Path) -> None:
    asked = [*ask(2), ("long", Question("word " * 300))]
    found = made(edge, cloud, asked, tmp_path / "r.jsonl", longest=100)
    assert found.left_out == Counter({TOO_LONG: 1})
    assert [row["id"] for row in rows(tmp_path / "r.jsonl")] == ["q0", "q1"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_gone_on_from_wherever_it_was_torn(
    edge: Bundle, cloud: Bundle, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 3)
    made(edge, cloud, ask(9), tmp_path / name)
    data, expected = (tmp_path / name).read_bytes(), rows(tmp_path / name)
    for cut in (0, 1, 20, len(data) // 2, len(data) - 1):
        torn = tmp_path / f"{cut}-{name}"
        torn.write_bytes(data[:cut])
        found = made(edge, cloud, ask(9), torn, resume=True)
        assert found.new + found.before == 9
        assert rows(torn) == expected
        if cut > 20:
            assert found.before
    again = made(edge, cloud, ask(9), tmp_path / name, resume=True)
    assert (again.new, again.before, again.judges) == (0, 9, Counter(teacher=9))
    assert (tmp_path / name).read_bytes() == data


def test_killed_and_gone_on(edge: Bundle, cloud: Bundle, tmp_path: Path) -> None:
    prompts, path = tmp_path / "p.jsonl", tmp_path / "r.jsonl.gz"
    count = 12 * PIECE
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} times {n + 1}?"}) + "\n" for n in range(count)))
    code = f"""
import asyncio
from pathlib import Path
from edgewise.joint.record import questions, record
from edgewise.joint.record_file import Plan
from edgewise.models.bundle import Bundle
models = (Bundle.open(Path(one)) for one in ({str(edge.path)!r}, {str(cloud.path)!r}))
asyncio.run(record(*models, questions(Path({str(prompts)!r})), Path({str(path)!r}), Plan(max_tokens={NEW})))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    asked = questions(prompts)
    found = made(edge, cloud, asked, path, resume=True)
    assert found.before >= PIECE
    assert found.new >= 1
    assert found.before + found.new == count
    made(edge, cloud, asked, tmp_path / "whole.jsonl.gz")
    assert rows(path) == rows(tmp_path / "whole.jsonl.gz")


def test_a_file_of_something_else_is_left_alone(edge: Bundle, cloud: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    made(edge, cloud, ask(2), path)
    data = path.read_bytes()
    with pytest.raises(UsageError, match="is there already"):
        made(edge, cloud, ask(2), path)
    with pytest.raises(UsageError, match="answers of other models"):
        made(cloud, cloud, ask(2), path, resume=True)
    with pytest.raises(UsageError, match="answers to other prompts, 'q1' among them"):
        made(edge, cloud, [("q0", ask(1)[0][1]), ("q1", Question("Something else?"))], path, resume=True)
    with pytest.raises(UsageError, match="answers to other prompts, 'q0' among them"):
        made(edge, cloud, [("x0", Question("Is 0 a number?")), ("x1", Question("Is 7?"))], path, resume=True)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"no JSON"),
        ("a.jsonl", b"no JSON\n"),
        ("a.jsonl", b'{"prompt": "of someone, and no line end"}'),
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.gz", b'{"id":"q0"'),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-5]),
    ],
    ids=["text", "lines", "one line", "text as gzip", "a row as gzip", "others' gzip", "others' gzip, torn"],
)
def test_what_is_no_recording_is_left_alone(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="is no recording"):
        RecordFile(tmp_path / name, resume=True)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize(
    ("changed", "its"),
    [
        ({"max_tokens": 2}, "--max-tokens 2 --longest 512 --judge auto"),
        ({"longest": 99}, f"--max-tokens {NEW} --longest 99 --judge auto"),
        ({"plain": True}, f"--max-tokens {NEW} --longest 512 --judge auto --plain"),
        ({"judge": "teacher"}, f"--max-tokens {NEW} --longest 512 --judge teacher"),
    ],
)
def test_a_file_is_of_one_plan(edge: Bundle, cloud: Bundle, tmp_path: Path, changed: dict[str, Any], its: str) -> None:
    path = tmp_path / "r.jsonl"
    made(edge, cloud, ask(2), path)
    data = path.read_bytes()
    plan = {"max_tokens": NEW, "longest": 512, "plain": False, "judge": "auto"}
    assert [row["plan"] for row in rows(path)] == [plan, plan]
    with pytest.raises(UsageError) as refused:
        made(edge, cloud, ask(4), path, resume=True, **changed)
    assert f"by `--max-tokens {NEW} --longest 512 --judge auto`; these would be by `{its}`" in str(refused.value)
    assert path.read_bytes() == data
    assert made(edge, cloud, ask(4), path, resume=True).new == 2
    assert len(Replay.open(path)) == 4


def test_rows_of_no_plan_are_not_gone_on_from(edge: Bundle, cloud: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    made(edge, cloud, ask(2), path)
    path.write_text("".join(json.dumps({**row, "plan": None}) + "\n" for row in rows(path)))
    with pytest.raises(UsageError, match="by a plan that it does not name; these would be by `--max-tokens 10 "):
        made(edge, cloud, ask(2), path, resume=True)
    assert len(Replay.open(path)) == 2


def test_a_shorter_recording_becomes_a_longer_one(edge: Bundle, cloud: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    counts = [
        (found.before, found.new)
        for limit in (2, 5, 3, None)
        for found in [made(edge, cloud, ask(8), path, limit=limit, resume=True)]
    ]
    assert counts == [(0, 2), (2, 3), (5, 0), (5, 3)]
    assert [row["id"] for row in rows(path)] == [f"q{n}" for n in range(8)]


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_a_torn_piece_stays_until_the_file_is_known_to_fit(
    edge: Bundle, cloud: Bundle, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 3)
    path = tmp_path / name
    made(edge, cloud, ask(3), path)
    whole = path.read_bytes()
    made(edge, cloud, ask(6), path, resume=True)
    torn = path.read_bytes()[: len(whole) + 25]
    path.write_bytes(torn)
    with pytest.raises(UsageError, match="of other models"):
        made(cloud, cloud, ask(6), path, resume=True)
    with pytest.raises(UsageError, match="these would be by"):
        made(edge, cloud, ask(6), path, resume=True, max_tokens=2)
    with pytest.raises(UsageError, match="no room for a prompt"):
        made(edge, cloud, ask(6), path, resume=True, max_tokens=256)
    assert path.read_bytes() == torn
    assert made(edge, cloud, ask(6), path, limit=3, resume=True).new == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize("piece", range(3))
@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
def test_no_whole_piece_behind_a_damaged_one_is_cut_off(
    edge: Bundle, cloud: Bundle, tmp_path: Path, piece: int, place: float
) -> None:
    path, ends = tmp_path / "r.jsonl.gz", [0]
    for count in (2, 4, 6):
        made(edge, cloud, ask(count), path, resume=True)
        ends.append(path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[ends[piece] + int(place * (ends[piece + 1] - ends[piece]))] ^= 0xFF
    path.write_bytes(data)
    if piece == 2:  # nothing tells it from one that was torn
        assert made(edge, cloud, ask(6), path, resume=True).new == 2
        assert [row["id"] for row in rows(path)] == [f"q{n}" for n in range(6)]
        return
    with pytest.raises(UsageError, match=f"is damaged behind its byte {ends[piece]}, and whole rows follow"):
        made(edge, cloud, ask(6), path, resume=True)
    assert path.read_bytes() == data


def test_without_room_for_a_prompt_there_is_no_file(
    edge: Bundle, cloud: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEWISE_HOME", str(tmp_path))
    prompts, path = tmp_path / "p.jsonl", tmp_path / "log" / "r.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": question.prompt}) + "\n" for _, question in ask(3)))
    call = ["record", str(prompts), "--edge", str(edge.path), "--cloud", str(cloud.path), "-o", str(path)]
    for most, says in ((256, "allowed are up to 255"), (255, "all 3 prompts are longer than 512 tokens")):
        assert run([*call, "--max-tokens", str(most)]) == 2
        assert says in capsys.readouterr().err
        assert not path.exists()
    assert run([*call, "--max-tokens", str(NEW)]) == 0
    assert len(rows(path)) == 3


def test_prompts_are_read_once_each_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    lines = [{"prompt": f"number {n}", "completion": "yes", "task": "t", "source": "s"} for n in range(50)]
    lines += [{"prompt": "number 3"}, {"prompt": " "}, {"id": "own", "prompt": "mine", "gold": ["a", "b"]}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    every = dict(questions(path))
    assert len(every) == 51
    assert every["own"].right == ["a", "b"]
    assert every["1"].right == "yes"
    drawn = questions(path)
    assert drawn == questions(path)
    assert [name for name, _ in drawn] != [*map(str, range(1, 51)), "own"]
    assert questions(path, seed=1) != drawn


def test_a_long_completion_is_no_gold() -> None:
    assert Question("?", completion="one two three four five six seven eight").right is not None
    assert Question("?", completion="one two three four five six seven eight nine").right is None
    assert Question("?", completion=" ").right is None
    assert Question("?", completion="yes", gold="no").right == "no"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no prompt"),
        ('{"prompt": ""}', "holds no prompt"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2"),
        ("[]", "line 1"),
        ('{"id": 1, "prompt": "a"}\n{"id": "1", "prompt": "b"}', "a second time"),
        ('{"prompt": "a"}\n{"prompt": "b", "gold": []}', r"line 2: `gold` is \[\], and no answer would be right"),
        ('{"prompt": "a", "gold": ""}', "line 1: `gold` is ''"),
        ('{"prompt": "a", "gold": ["yes", " "]}', r"line 1: `gold` is \['yes', ' '\]"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UsageError, match=says):
        questions(tmp_path / "p.jsonl")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_text("no gzip")
    for name in ("p.jsonl.gz", "nowhere.jsonl"):
        with pytest.raises(UsageError, match="cannot be read"):
            questions(tmp_path / name)
