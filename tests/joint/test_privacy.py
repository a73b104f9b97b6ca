"""What a rule forbids stays here: by every path, in every reading, and if nothing can be decided."""

import asyncio
import json
import logging
import random
import re
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from clock import run
from tiers import CLOUD_TEXT, SURE, UNSURE, cloud, edge, see, tier

from edgewise.engines.fake import FakeGenerator, Script
from edgewise.engines.openai import OpenAI
from edgewise.errors import ConfigError, EngineError, Forbidden, Overloaded, RemoteBroken, Unreachable
from edgewise.joint.breaker import Breaker
from edgewise.joint.cascade import Cascade
from edgewise.joint.privacy import Rules
from edgewise.joint.replay_log import ReplayLog
from edgewise.types import Message, Request
from served import Served

DOCUMENT = (Path(__file__).parents[2] / "docs/formats/privacy.md").read_text()
SECRET = "DE44 5001 0517 5407 3249 31"
ACCOUNTS = r"""
format = 1
[[rule]]
name = "accounts"
pattern = '\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}'
"""


def rules(tmp_path: Path, text: str = ACCOUNTS) -> Rules:
    path = tmp_path / "privacy.toml"
    path.write_text(text, encoding="utf-8")
    return Rules.open(path)


def says(text: str, **more: object) -> Request:
    return Request((Message("user", text),), **more)


def test_the_document_shows_rules(tmp_path):
    example = re.search(r"```toml\n(.*?)```", DOCUMENT, re.S).group(1)
    found = rules(tmp_path, example)
    assert len(tomllib.loads(example)["rule"]) == 4
    assert found.of_request(says(f"My account is {SECRET}.")) == "account numbers"
    assert found.of_call("/v1/chat/completions", "auto", {"x-tenant": "CLINIC-7"}) == "patients"
    assert found.of_call("/v1/chat/completions", "auto", {"x-tenant": "my clinic-7"}) is None
    assert found.of_call("/v1/completions", "auto", {}) == "old interface"
    assert found.of_call("/v1/chat/completions", "edge", {}) == "this name means here"
    assert found.of_request(says("nothing")) is None
    assert found.of_call("/v1/chat/completions", "auto", {}) is None


@pytest.mark.parametrize(
    "request_",
    [
        says(SECRET),
        says(SECRET.lower()),
        says("a" * 2_000 + " " + SECRET),
        says(SECRET.replace(" ", "\u200b")),  # zero-width spaces
        says("ＤＥ４４ ５００１ ０５１７ ５４０７ ３２４９ ３１"),
        says(SECRET.replace("4", "4\u00ad")),  # soft hyphens
        Request((Message("system", SECRET), Message("user", "hello"))),
        Request((Message("user", "hello"), Message("assistant", SECRET), Message("user", "and?"))),
        Request(prompt=SECRET),
        says("hello", stop=(SECRET,)),
        Request(prompt_ids=(1, 2, 3)),  # nobody knows what they say
        says("hello", stay="some header"),
    ],
)
def test_every_place_and_every_reading(tmp_path, request_):
    near, far = edge(), cloud()
    cascade = Cascade(near, far, breaker=Breaker(clock=lambda: 0.0), rules=rules(tmp_path))
    seen = run(see(cascade, request_ if request_.prompt_ids is None else says("x", stay="ids")))
    assert seen.way == ("edge_fallback", "private")
    assert far.requests == []
    assert request_.stay or rules(tmp_path).of_request(request_) == "accounts"


def test_a_rule_over_two_messages_is_met_by_both_together(tmp_path):
    both = rules(
        tmp_path,
        "format = 1\n[[rule]]\nname = 'm'\npattern = '(?s)alpha.*omega'\n",
    )
    split = Request((Message("user", "alpha"), Message("user", "omega")))
    assert both.of_request(split) == "m"


def test_one_who_asks_for_the_cloud_is_refused_and_not_told_what_was_found(tmp_path):
    near, far = edge(), cloud()
    seen = run(see(Cascade(near, far, rules=rules(tmp_path)), says(f"Send {SECRET}", route="cloud")))
    assert isinstance(seen.error, Forbidden)
    assert SECRET not in str(seen.error)
    assert "accounts" in str(seen.error)
    assert near.requests == far.requests == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [EngineError("broken"), Overloaded("full")])
def test_a_failed_edge_is_an_error_and_never_the_clouds_business(tmp_path, fault, stream):
    near, far = tier("x", name="edge", error=fault), cloud()
    seen = run(see(Cascade(near, far, rules=rules(tmp_path)), says(SECRET, stream=stream)))
    assert seen.error is fault
    assert far.requests == []


def test_an_open_breaker_is_not_probed_with_it(tmp_path):
    now = [0.0]
    far = cloud(error=Unreachable("gone"))
    cascade = Cascade(edge(), far, breaker=Breaker(clock=lambda: now[0]), rules=rules(tmp_path))

    async def one_after_the_other():
        ways = []
        for text in ("hello", SECRET, "again"):
            ways.append((await see(cascade, says(text))).way)
            now[0] += 1000.0
            await asyncio.sleep(1)
        return ways

    ways = run(one_after_the_other())
    assert ways[1] == ("edge_fallback", "private")
    assert {route for route, _ in ways} == {"edge_fallback"}
    assert [request.messages[0].content for request in far.requests] == ["hello", "again"]  # the latter may probe


def test_an_edge_with_a_cloud_of_its_own_is_told(tmp_path):
    inner_cloud = cloud()
    inner = Cascade(edge(), inner_cloud, name="inner")
    seen = run(see(Cascade(inner, cloud(), rules=rules(tmp_path)), says(SECRET)))
    assert seen.text
    assert inner_cloud.requests == []


def test_what_cannot_be_looked_at_counts_as_met(tmp_path, caplog):
    """A pattern that goes back and forth for ages, and one that fails."""
    slow = rules(tmp_path, "format = 1\n[[rule]]\nname = 'slow'\npattern = '(a|aa)+$'\n")
    text = "a" * 5000 + "b"
    assert slow.of_request(says(text)) == "slow"
    assert "slow" in caplog.text
    assert "aaa" not in caplog.text

    class Broken:
        def search(self, *_: object, **__: object) -> None:
            raise RuntimeError(SECRET)

    broken = Rules({"broken": Broken()}, {}, {}, {})
    assert broken.of_request(says("x")) == "broken"
    assert SECRET not in caplog.text
    headers = Rules({}, {"odd": ("x-a", Broken())}, {}, {})
    assert headers.of_call("/", "m", {"x-a": "1"}) == "odd"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "format"),
        ("format = 1", "rule"),
        ("format = 2\nrule = []", "has format 2"),
        ("format = 1\nrule = []", "holds no rule"),
        ("format = 1\n[[rule]]\nname = 'a'", "exactly one"),
        ("format = 1\n[[rule]]\nname = 'a'\npattern = 'x'\nmodel = 'y'", "pattern and model"),
        ("format = 1\n[[rule]]\nname = 'a'\npattern = ''", "not empty"),
        ("format = 1\n[[rule]]\nname = 'a'\npattern = '('", "not a regular expression"),
        ("format = 1\n[[rule]]\nname = 'a'\nmodel = 'x'\nvalue = 'y'", "beside `header`"),
        ("format = 1\n[[rule]]\nname = ''\nmodel = 'x'", "names are"),
        ("format = 1\n[[rule]]\nname = 'a'\nmodel = 'x'\n[[rule]]\nname = 'a'\nmodel = 'y'", "each once"),
        ("format = 1\n[[rule]]\nname = 'a'\npatern = 'x'", "patern"),
        ("format = 1\n[[rules]]\nname = 'a'", "rules"),
        ("not toml", "holds no rules"),
    ],
)
def test_a_file_that_holds_no_rules_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        rules(tmp_path, text)
    assert "privacy.toml" in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            Rules.open(path)


# Nothing gets out


class Far(FakeGenerator):
    """A cloud that keeps everything that it was sent, and fails in one way or another."""

    def __init__(self, random: random.Random) -> None:
        super().__init__(Script.of(CLOUD_TEXT, -0.1), name="cloud")
        self.heard: list[str] = []
        self._random = random

    async def generate(self, request):
        self.heard.append(repr(request))
        match self._random.randrange(4):
            case 0:
                raise Unreachable("no connection")
            case 1:
                raise RemoteBroken(f"nonsense about {request.messages[-1].content}")
        async for chunk in super().generate(request):
            yield chunk


def account(draw: random.Random) -> str:
    letters, digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
    body = "".join(draw.choice(digits) for _ in range(4 * draw.randint(3, 7)))
    number = "".join(draw.sample(letters, 2)) + body[:2] + "".join(draw.choice(letters + digits) for _ in body)
    joint = draw.choice(["", " "])
    number = number[:4] + joint + joint.join(number[place : place + 4] for place in range(4, len(number), 4))
    match draw.randrange(4):
        case 0:
            return number.lower()
        case 1:
            return "\u200b".join(number) if not joint else number
        case 2:
            return "".join(chr(ord(char) + 0xFEE0) if char != " " else char for char in number)
        case _:
            return number


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_nothing_forbidden_reaches_the_wire_or_the_log(tmp_path, caplog, count):
    """Random prompts, a part of them with an account number somewhere, through sure and unsure and broken edges, open
    and closed breakers, streams, deadlines and wishes. All errors that callers see are looked at as well."""
    caplog.set_level(logging.DEBUG)
    draw = random.Random(count)
    far, found = Far(draw), rules(tmp_path)
    nears = [
        tier("fine ", SURE, name="edge"),
        tier("so so ", UNSURE, name="edge"),
        tier("broken", name="edge", error=EngineError("the edge broke")),
    ]
    now = [0.0]
    disk = tmp_path / "replay.jsonl"
    cascades = [
        Cascade(
            near,
            far,
            breaker=Breaker(clock=lambda: now[0]),
            rules=found,
            log=ReplayLog(disk, texts=True, share=share, lot=draw.random),
        )
        for near in nears
        for share in (0.0, 0.3, 1.0)
    ]
    secrets, routes, harmless = [], set(), 0
    words = ["the", "a", "when", "please", "tell", "me", "about", "accounts", "and", "DE44", "12", "5001", "in", "2024"]

    async def all_of_them():
        nonlocal harmless
        for number in range(count):
            text = [draw.choice(words) for _ in range(draw.randint(1, 12))]
            if number % 2:
                secrets.append(account(draw))
                text.insert(draw.randint(0, len(text)), secrets[-1])
            else:
                harmless += 1
            messages = (Message("system", "be kind"), Message("user", " ".join(text)))
            request = Request(
                messages
                if draw.random() < 0.8
                else (messages[1], Message("assistant", "yes"), Message("user", "go on")),
                stream=draw.random() < 0.5,
                route=draw.choice(["auto", "auto", "auto", "cloud", "edge"]),
                deadline_ms=draw.choice([None, None, 5000.0]),
                max_tokens=4,
            )
            now[0] += draw.choice([0.0, 1.0, 60.0])  # so that breakers open, and close again
            seen = await see(draw.choice(cascades), request)
            if seen.error is None:
                routes.add(seen.decision.route)
            if number % 2:
                said = f"{seen.error!r} {seen.error} {seen.text}"
                assert secrets[-1] not in said
                assert seen.error is not None or seen.decision.route != "cloud"
        await asyncio.sleep(60)  # probes of the cloud end, and what is followed
        for cascade in cascades:
            await cascade.close()

    run(all_of_them())
    wire = "\n".join(far.heard)
    assert routes == {"edge", "cloud", "edge_fallback"}
    assert len(far.heard) > harmless / 10  # the others do go there
    written = disk.read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    assert len(rows) > harmless / 10
    assert any("quality" in row["edge"] for row in rows)
    plain = "\n".join(row["prompt"] for row in rows)
    everywhere = "\n".join((wire, caplog.text, written, plain))
    assert not [secret for secret in secrets if secret in everywhere]


class Recorder(BaseHTTPRequestHandler):
    """An OpenAI server of which every byte that it got is known; each third request fails."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.heard += str(self.path).encode() + bytes(self.headers) + body
        self.server.count += 1
        good = self.server.count % 3
        answer = COMPLETION if good else {"error": {"message": "it is broken", "type": "server_error"}}
        data = json.dumps(answer).encode()
        self.send_response(200 if good else 500)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *what):
        pass


COMPLETION = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "far",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "from far away"}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
}


def test_nothing_forbidden_passes_a_real_socket_or_stands_on_the_disk(tmp_path, caplog):
    """The whole node over HTTP, its log on the disk, in shadow mode, and a cloud that is another server."""
    caplog.set_level(logging.DEBUG)
    draw, disk = random.Random(3), tmp_path / "replay.jsonl"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    server.heard, server.count = bytearray(), 0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    found = rules(tmp_path, ACCOUNTS + '[[rule]]\nname = "clinic"\nheader = "x-tenant"\nvalue = "clinic"\n')
    far = OpenAI(f"http://127.0.0.1:{server.server_port}", model="far")
    near = tier("so so ", SURE, name="edge")
    log = ReplayLog(disk, texts=True, share=1.0)
    now, secrets = [0.0], []
    cascade = Cascade(near, far, breaker=Breaker(clock=lambda: now[0]), rules=found, log=log)
    try:
        with Served(cascade, rules=found, log=log) as node, httpx2.Client(base_url=node.url, timeout=30) as client:
            for number in range(240):
                now[0] += 60.0  # a breaker that opened is ready again
                near.answer = Script.of("so so ", draw.choice([SURE, UNSURE]))
                secrets.append(account(draw) if number % 3 else f"harmless{number}")
                tenant = {"x-tenant": "clinic"} if number % 12 == 0 else {}
                if tenant:
                    secrets[-1] = f"patient{number}"
                body = {
                    "model": draw.choice(["auto", "auto", "cloud", "edge"]),
                    "messages": [{"role": "user", "content": f"about {secrets[-1]} please"}],
                    "max_tokens": 4,
                }
                answer = client.post("/v1/chat/completions", json=body, headers=tenant)
                if number % 3 or tenant:
                    assert answer.status_code == (403 if body["model"] == "cloud" else 200)
                    assert secrets[-1] not in answer.text
            metrics = client.get("/metrics").text
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    harmless = [secret for secret in secrets if secret.startswith("harmless")]
    kept = [secret for secret in secrets if not secret.startswith("harmless")]
    spelt = [re.escape(json.dumps(secret)[1:-1]) for secret in kept]  # as JSON may write them
    wire, written = server.heard.decode(), disk.read_text()
    assert len([secret for secret in harmless if secret in wire]) > 30
    assert len([secret for secret in harmless if secret in written]) > 10
    everywhere = "\n".join((wire, written, metrics, caplog.text))
    assert not [secret for secret in kept if secret in everywhere]
    assert not re.search("|".join(spelt), everywhere)
