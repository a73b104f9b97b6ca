"""What a node writes down of its decisions, and that policies fitted on it decide alike."""

import asyncio
import json
import random
import stat
from pathlib import Path

import numpy as np
import pytest
from clock import run
from tiers import CLOUD_TEXT, EDGE_TEXT, SURE, UNSURE, ask, cloud, edge, see, tier

from edgewise.engines.fake import FakeGenerator, Script
from edgewise.errors import ConfigError, Unreachable, UsageError
from edgewise.joint.breaker import Breaker
from edgewise.joint.cascade import Cascade
from edgewise.joint.fit.calibrate import calibrate
from edgewise.joint.fit.target import Cost
from edgewise.joint.pair import Model, Pair
from edgewise.joint.policies import Policies
from edgewise.joint.policy import Policy
from edgewise.joint.privacy import Rules
from edgewise.joint.replay import Replay
from edgewise.joint.replay_log import ReplayLog, likeness
from edgewise.types import Message, Request

PAIR = Pair(Model("small", "a" * 64), Model("big", None))
SECRET = "swordfish"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "replay.jsonl"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def served(path: Path, requests, *, edge=None, cloud=None, share=0.0, rest_s=60.0, **options):
    """The cascade after it answered these and its log was closed, and what their callers saw."""
    log = ReplayLog(path, PAIR, share=share, **{"lot": lambda: 0.0, **options.pop("log", {})})
    cascade = Cascade(edge or tier(EDGE_TEXT, UNSURE), cloud, log=log, **options)

    async def work():
        seen = [await see(cascade, request) for request in requests]
        await asyncio.sleep(rest_s)
        await cascade.close()
        return seen

    return cascade, run(work())


# What is written


def test_a_row_of_an_answer_that_stayed_holds_numbers_alone(path):
    asked = Request((Message("user", f"Say {SECRET}"),), group="passwords")
    _, (seen,) = served(path, [asked], edge=edge(SURE), cloud=cloud())
    (row,) = rows(path)
    assert (row["route"], row["reason"], row["drawn"]) == ("edge", "confident", 0.0)
    assert row["confidence"] == pytest.approx(seen.decision.confidence, abs=1e-6)
    assert row["pair"] == {"edge": {"name": "small", "sha256": "a" * 64}, "cloud": {"name": "big", "sha256": None}}
    assert (row["group"], row["edge"]["finish_reason"], row["cloud"]) == ("passwords", "stop", {})
    assert len(row["edge"]["token_logprobs"]) == 40
    assert {"mean_margin", "prompt_chars", "refusal", "answer_words"} <= set(row["edge"]["signals"])
    written = path.read_text()
    assert "prompt" not in row
    assert "text" not in row["edge"]
    assert SECRET not in written
    assert "edge0" not in written
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_texts_are_kept_where_somebody_asked(path):
    served(path, [ask()], cloud=cloud(), share=1.0, log={"texts": True})
    (row,) = rows(path)
    assert (row["prompt"], row["edge"]["text"], row["cloud"]["text"]) == ("hello", EDGE_TEXT, CLOUD_TEXT)
    assert "answer_words" not in row["edge"]["signals"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sure", [SURE, UNSURE])
def test_both_tiers_answer_what_is_drawn_and_one_is_served(path, stream, sure):
    beside = cloud()
    cascade, (seen,) = served(path, [ask(stream=stream)], edge=edge(sure), cloud=beside, share=0.5)
    (row,) = rows(path)
    assert seen.way == (("edge", "confident") if sure == SURE else ("cloud", "unsure"))
    assert seen.text == (EDGE_TEXT if sure == SURE else CLOUD_TEXT)
    assert (beside.finished, len(beside.requests)) == (1, 1)
    assert row["cloud"] == {"quality": 1.0}
    assert row["edge"]["quality"] == 0.0
    assert row["drawn"] == (1.0 if sure == UNSURE and not stream else 0.5)
    assert cascade.stats.escalations == (sure == UNSURE)
    assert cascade.log.rows == {"written": 1}


@pytest.mark.parametrize(("stream", "both"), [(False, True), (True, False)])
def test_what_is_not_drawn_is_compared_only_where_both_answered_anyway(path, stream, both):
    near, beside = edge(UNSURE), cloud()
    served(path, [ask(stream=stream)], edge=near, cloud=beside, share=0.5, log={"lot": lambda: 0.9})
    (row,) = rows(path)
    assert ("quality" in row["edge"], row["drawn"]) == (both, 1.0 if both else 0.5)
    assert near.cancelled == (not both)
    _, _ = served(path, [ask(stream=stream)], edge=edge(SURE), cloud=beside, share=0.5, log={"lot": lambda: 0.9})
    assert len(beside.requests) == 1
    assert rows(path)[1]["cloud"] == {}


def test_the_caller_does_not_wait_for_the_other_tier(path):
    _, (seen,) = served(path, [ask()], edge=edge(SURE), cloud=cloud(start_delay_s=7.0), share=1.0)
    assert seen.total_s == pytest.approx(0.4, abs=0.02)
    assert rows(path)[0]["cloud"] == {"quality": 1.0}


def test_a_route_that_was_asked_for_is_not_written_and_not_drawn(path):
    beside, near = cloud(), edge()
    served(path, [ask(route="edge")], edge=near, cloud=beside, share=1.0)
    assert (rows(path), beside.requests) == ([], [])
    served(path, [ask(route="cloud")], edge=near, cloud=beside, share=1.0)
    assert (rows(path), len(near.requests)) == ([], 1)


def test_nothing_of_a_request_that_a_rule_keeps_here(path, tmp_path):
    found = tmp_path / "rules.toml"
    found.write_text(f'format = 1\n[[rule]]\nname = "words"\npattern = "{SECRET}"\n')
    beside = cloud()
    requests = [Request((Message("user", f"it is {SECRET}"),), stream=stream) for stream in (False, True)]
    requests.append(ask(stay="a header"))
    for sure in (SURE, UNSURE):
        served(
            path,
            requests,
            edge=edge(sure),
            cloud=beside,
            share=1.0,
            rules=Rules.open(found),
            log={"texts": True},
        )
    assert path.read_bytes() == b""
    assert beside.requests == []


def test_a_caller_who_left_leaves_no_row(path):
    log = ReplayLog(path, share=1.0)
    near, beside = edge(SURE), cloud()
    cascade = Cascade(near, beside, log=log)

    async def leave():
        chunks = cascade.generate(ask(stream=True))
        await anext(chunks)
        await chunks.aclose()
        await asyncio.sleep(10)
        await cascade.close()

    run(leave())
    assert (rows(path), near.cancelled, beside.requests) == ([], 1, [])


def test_a_cloud_that_fails_unseen_is_the_breakers_business_alone(path):
    breaker = Breaker()
    beside = cloud(error=Unreachable("no route"))
    cascade, seen = served(path, [ask()] * 8, edge=edge(SURE), cloud=beside, share=1.0, breaker=breaker, rest_s=0.0)
    assert all(one.way == ("edge", "confident") and one.error is None for one in seen)
    assert breaker.state == "open"
    assert len(beside.requests) < 8
    assert cascade.stats.errors == 0
    assert all("quality" not in row["edge"] for row in rows(path))


def test_too_many_at_once_are_not_followed(path):
    log = ReplayLog(path, share=1.0)
    beside = cloud(start_delay_s=5.0)
    cascade = Cascade(edge(SURE), beside, log=log)

    async def many():
        await asyncio.gather(*(see(cascade, ask()) for _ in range(40)))
        await asyncio.sleep(60)
        await cascade.close()

    run(many())
    assert len(beside.requests) == len(rows(path)) == 16


def test_closing_ends_what_is_followed(path):
    log = ReplayLog(path, share=1.0)
    beside = cloud(hangs=True)
    cascade = Cascade(edge(SURE), beside, log=log)

    async def work():
        await see(cascade, ask())
        await asyncio.sleep(1)
        await cascade.close()
        await asyncio.sleep(1)

    run(work())
    assert beside.cancelled == 1


def test_alternatives_that_the_log_wants_are_not_shown(path):
    near = tier(EDGE_TEXT, SURE)
    _, (plain, some) = served(path, [ask(), ask(logprobs=True, top_logprobs=2)], edge=near)
    assert [request.top_logprobs for request in near.requests] == [5, 5]
    assert all(token.top == () for chunk in plain.chunks for token in chunk.tokens)
    assert all(len(token.top) == 2 for chunk in some.chunks for token in chunk.tokens)


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("", "", 1.0),
        ("", "a", 0.0),
        ("It is Paris.", "it is paris", 1.0),
        ("a a b", "a b b", 2 / 3),
        ("yes", "no", 0.0),
    ],
)
def test_likeness(one, other, share):
    assert likeness(one, other) == likeness(other, one) == pytest.approx(share)


# The file


def test_a_disk_that_fails_costs_rows_and_no_answer(caplog):
    cascade, seen = served(Path("/dev/full"), [ask()] * 3, edge=edge(SURE))
    assert all(one.error is None for one in seen)
    assert cascade.log.rows == {"failed": 3}
    assert caplog.text.count("are lost") == 1


def test_a_file_that_cannot_be_opened_is_said_at_once(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        ReplayLog(tmp_path)
    assert "--log" in caught.value.hint


@pytest.mark.parametrize("torn", [b'{"id": "x", "edg', b"x" * 200_000])
def test_a_torn_row_is_cut_off(path, torn, caplog):
    served(path, [ask()], cloud=cloud(), share=1.0)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    served(path, [ask()], cloud=cloud(), share=1.0)
    assert f"the last {len(torn)} bytes are cut off" in caplog.text
    assert path.read_bytes().startswith(whole)
    assert len(Replay.open(path)) == 2


def test_a_full_file_becomes_the_old_one(path):
    served(path, [ask()] * 10, cloud=cloud(), share=1.0, log={"size_limit": 4_000})
    old = path.with_name("replay.jsonl.old")
    assert path.stat().st_size <= 4_000
    assert old.stat().st_size <= 4_000
    ids = [row["id"] for file in (old, path) for row in rows(file)]
    assert 2 <= len(set(ids)) == len(ids) <= 10
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# What can be learned from it


def traffic(count: int, stream_share: float = 0.5) -> list[Request]:
    """Questions of which every third is one that the edge is unsure of, and gets wrong."""
    dice = random.Random(5)
    return [
        Request((Message("user", f"{kind} {number}"),), stream=dice.random() < stream_share)
        for number, kind in enumerate(dice.choices(["hard", "easy"], [1, 2], k=count))
    ]


def is_hard(request: Request) -> bool:
    return request.messages[0].content.startswith("hard")


def small() -> FakeGenerator:
    def answer(request: Request) -> Script:
        return Script.of("wrong words here", UNSURE) if is_hard(request) else Script.of("quite right", SURE)

    return FakeGenerator(answer, name="small")


def big() -> FakeGenerator:
    return tier("quite right", SURE, name="big")


def test_a_log_gives_each_kind_of_request_its_share(path):
    requests = traffic(3_000)
    dice = random.Random(7)
    unhurried = {"lot": dice.random, "waiting_limit": len(requests)}  # simulated seconds outrun any disk
    served(path, requests, edge=small(), cloud=big(), share=0.2, rest_s=1.0, log=unhurried)
    written = rows(path)
    compared = [row for row in written if "quality" in row["edge"]]
    hard = np.mean([is_hard(request) for request in requests])
    assert len(written) == 3_000
    assert np.mean([row["route"] == "cloud" for row in compared]) > hard + 0.15
    sample = Replay.open(path)
    share = np.mean([row.route == "cloud" for row in sample])
    # ids, and with them who is left out, are drawn anew each time: three deviations would fail one run in 370, and a
    # sample of all that was compared is off by eight
    assert abs(share - hard) < 5 * np.sqrt(hard * (1 - hard) / len(sample))
    assert sample.left_out["of what was compared more often than the rest"] > 100
    assert sample.edge_right.mean() == pytest.approx(1 - share)
    assert [row.id for row in Replay.open(path)] == [row.id for row in sample]


def test_nothing_is_fitted_on_a_log_without_audits(path):
    requests = traffic(50, stream_share=0.0)
    served(path, requests, edge=small(), cloud=big())
    with pytest.raises(UsageError, match="compared no answers of the edge"):
        Replay.open(path)


def test_rows_of_models_before_do_not_count(path):
    requests = traffic(30)
    for name in ("old", "new"):
        log = ReplayLog(path, Pair(Model(name, None), None), share=1.0)
        cascade = Cascade(small(), big(), log=log)

        async def work(cascade=cascade):
            for request in requests:
                await see(cascade, request)
            await asyncio.sleep(1)
            await cascade.close()

        run(work())
    found = Replay.open(path)
    assert (len(found), found.pair.edge.name) == (30, "new")
    assert found.left_out == {"of other models than the last": 30}


def test_within_what_counts_as_good(path):
    path.parent.mkdir()
    path.write_text(
        "".join(
            json.dumps({"id": str(q), "edge": {"quality": q}, "cloud": {"quality": 1.0}}) + "\n"
            for q in (0.4, 0.6, 1.0)
        )
    )
    assert Replay.open(path).edge_right.tolist() == [False, False, True]
    assert Replay.open(path, within=0.4).edge_right.tolist() == [False, True, True]
    assert Replay.open(path, within=0.4).take([1]).edge_right.tolist() == [True]
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="within is"):
            Replay.open(path, within=bad)


@pytest.mark.parametrize("texts", [False, True])
def test_a_policy_fitted_on_the_log_decides_as_if_it_had_seen_the_request(path, tmp_path, texts):
    """One command, and a running node has it: what it then decides is what the log's rows said."""
    requests = traffic(200)
    served(path, requests, edge=small(), cloud=big(), share=1.0, rest_s=1.0, log={"texts": texts})
    found = calibrate(Replay.open(path, within=0.3), Cost(), pair=Replay.open(path).pair)
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "new.json").write_bytes(found.policy.to_json())
    policies = Policies(tmp_path / "policies", PAIR)
    assert policies.current() == Policy.open(tmp_path / "policies" / "new.json")
    again = tmp_path / "again.jsonl"
    _, seen = served(again, requests[:60], edge=small(), cloud=big(), share=1.0, policy=policies, rest_s=1.0)
    for request, outcome in zip(requests, seen, strict=False):
        assert outcome.decision.route == ("cloud" if is_hard(request) else "edge")
    whole = found.policy.whole.judge
    for row, request, outcome in zip(Replay.open(path), requests, seen, strict=False):
        if not request.stream:
            assert outcome.decision.confidence == pytest.approx(whole.judge(row.evidence()).confidence, abs=1e-4)
