import gzip
import json
import re
from pathlib import Path

import pytest

import replays
from edgewise.errors import UsageError
from edgewise.joint.replay import Replay

DOCUMENT = (Path(__file__).parents[2] / "docs/formats/replay.md").read_text()
GOOD = {"id": "a", "prompt": "Why?", "edge": {"correct": True}, "cloud": {"correct": False}}


def line(**keys: object) -> bytes:
    return json.dumps(GOOD | keys).encode() + b"\n"


def opened(tmp_path: Path, data: bytes, name: str = "r.jsonl") -> Replay:
    path = tmp_path / name
    path.write_bytes(data)
    return Replay.open(path)


def test_the_document_shows_a_row(tmp_path):
    example = re.search(r"```json\n(.*?)```", DOCUMENT, re.S).group(1)
    replay = opened(tmp_path, json.dumps(json.loads(example)).encode())
    evidence = replay[0].evidence()
    assert evidence.get("mean_logprob") == pytest.approx(-0.4)
    assert evidence.label("group") == "maths"


def test_rows_come_in_order_plain_or_compressed(tmp_path):
    rows = replays.written(30)
    for name in ("r.jsonl", "r.jsonl.gz"):
        replay = Replay.open(replays.saved(rows, tmp_path / name))
        assert [row.id for row in replay] == [row["id"] for row in rows]
        assert replay.edge_right.tolist() == [row["edge"]["correct"] for row in rows]
        assert replay.cloud_right.tolist() == [row["cloud"]["correct"] for row in rows]
    assert len(replay.sha256) == 64


def test_unknown_keys_and_empty_lines_are_no_fault(tmp_path):
    assert len(opened(tmp_path, b"\n" + line(surprise=1, edge={"correct": True, "mood": "good"}) + b"\n\n")) == 1


def test_rows_that_nobody_judged_are_counted(tmp_path):
    replay = opened(tmp_path, line() + line(id="b", edge={}) + line(id="c", cloud={"quality": 1}))
    assert (len(replay), replay.left_out) == (1, {"not judged": 2})


def test_quality_stands_for_correct(tmp_path):
    rows = [line(id=str(edge), edge={"quality": edge}, cloud={"quality": 0.5}) for edge in (0.4, 0.5, 0.6)]
    replay = opened(tmp_path, b"".join(rows))
    assert replay.edge_right.tolist() == [False, True, True]
    assert replay.cloud_right.tolist() == [True, True, False]


def test_evidence_holds_nothing_of_the_truth(tmp_path):
    """All that a decision can see is the same when every outcome is turned round."""
    rows = replays.classified(5) + replays.written(5)
    turned = json.loads(json.dumps(rows))
    for row in turned:
        row["gold"] = "turned"
        for tier in ("edge", "cloud"):
            row[tier]["correct"] = not row[tier]["correct"]
            row[tier]["quality"] = 0.1
            row[tier]["cost"] = 5
    before = Replay.open(replays.saved(rows, tmp_path / "a.jsonl"))
    after = Replay.open(replays.saved(turned, tmp_path / "b.jsonl"))
    for one, other in zip(before, after, strict=True):
        seen, again = vars(one.evidence()), vars(other.evidence())
        assert repr(seen) == repr(again)


def test_a_beginning_shows_the_first_tokens_alone(tmp_path):
    row = Replay.open(replays.saved(replays.written(1), tmp_path / "r.jsonl"))[0]
    beginning = row.evidence().answered(logprobs=row.evidence().logprobs[:3])
    assert list(beginning.logprobs) == list(row.edge.token_logprobs[:3])
    assert (beginning.text, beginning.finish_reason, beginning.given) == (None, None, {})
    assert beginning.prompt == row.prompt


def test_fingerprints_tell_rows_apart(tmp_path):
    replay = opened(tmp_path, line() + line(id="b") + line(id="c", prompt=None))
    prints = [row.fingerprint for row in replay]
    assert len(set(prints)) == 3
    assert opened(tmp_path, line(edge={"correct": False}))[0].fingerprint == prints[0]
    assert opened(tmp_path, line(prompt="How?"))[0].fingerprint != prints[0]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "holds no request"),
        (line(edge={}), "1 not judged"),
        (b"not json\n", "line 1"),
        (line() + b"[]\n", "line 2"),
        (line() + line(), "a second time"),
        (b'{"id": "a"}\n', "edge"),
        (b'{"prompt": "x", "edge": {}, "cloud": {}}\n', "id"),
        (line(prompt=5), "$.prompt"),
        (line(edge={"correct": "yes"}), "$.edge.correct"),
        (line(edge={"correct": True, "logits": ["a"]}), "$.edge.logits"),
        (line(edge={"correct": True, "finish_reason": "tired"}), "finish_reason"),
        (line(edge={"correct": True, "signals": {"a": "b"}}), "signals"),
        (b'{"id": "a", "prompt": "\xff", "edge": {}, "cloud": {}}\n', "line 1"),
        (line(edge={"quality": 1e400}, cloud={"quality": 1}).replace(b"Infinity", b"1e400"), "line 1"),
    ],
)
def test_what_is_no_replay_is_refused_with_line_and_key(tmp_path, data, says):
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        opened(tmp_path, data)
    assert "r.jsonl" in str(caught.value)
    assert caught.value.hint


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        Replay.open(tmp_path / "none.jsonl")
    for data in (b"no gzip", gzip.compress(line())[:-4], gzip.compress(line())[:20] + b"\0" * 40):
        with pytest.raises(UsageError, match=r"cannot be read|line"):
            opened(tmp_path, data, "r.jsonl.gz")
