"""`edgewise ask`: one answer, streamed or as JSON, with and without a cloud."""

from __future__ import annotations

import io
import socket
from inspect import signature

import pytest
from calling import Cli

from edgewise.cli.ask import ask
from edgewise.types import Request

EDGE = ("--edge", "tiny", "--max-tokens", "6")


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_json_has_every_field(in_stock: Cli) -> None:
    outcome = in_stock("ask", "abc", *EDGE, "--route", "edge", "--json")
    assert outcome.code == 0, outcome.err
    answer = outcome.json
    assert answer["route"] == "edge"
    assert 0 <= answer["confidence"] <= 1
    assert answer["reason"]
    assert answer["finish_reason"] in {"stop", "length"}
    assert answer["usage"]["completion_tokens"] <= 6
    assert answer["usage"]["prompt_tokens"] > 3
    assert answer["timings"].keys() == {"first_token_ms", "total_ms", "decode_tok_s"}
    assert answer["model"] == "tiny"


def test_the_stream_is_the_same_text(in_stock: Cli) -> None:
    whole = in_stock("ask", "abc", *EDGE, "--json").json
    streamed = in_stock("ask", "abc", *EDGE)
    assert streamed.code == 0
    assert streamed.out == whole["text"] + "\n"
    assert f"route {whole['route']}" in streamed.err


def test_the_system_text_and_the_prompt_from_stdin(in_stock: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = in_stock("ask", "abc", *EDGE, "--json").json
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    assert in_stock("ask", "-", *EDGE, "--json").json["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    longer = in_stock("ask", "abc", *EDGE, "--system", "be brief", "--json").json
    assert longer["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"]


def test_a_cloud_that_is_not_there_leaves_the_edges_answer(in_stock: Cli, nobody: str) -> None:
    outcome = in_stock("ask", "abc", *EDGE, "--cloud", nobody, "--threshold", "1", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["route"] == "edge_fallback"
    assert outcome.json["reason"] == "cloud_unreachable"
    assert outcome.json["text"] == in_stock("ask", "abc", *EDGE, "--route", "edge", "--json").json["text"]


def test_a_prompt_longer_than_the_context_is_wrong_use(in_stock: Cli) -> None:
    outcome = in_stock("ask", "word " * 200_000, *EDGE)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "tokens of context, the model has 256" in outcome.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--max-tokens", "0"), "max_tokens"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "3"), "temperature"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("--deadline-ms", "-5"), "deadline_ms"),
    ],
)
def test_numbers_out_of_range(in_stock: Cli, flags: tuple[str, ...], says: str) -> None:
    outcome = in_stock("ask", "abc", "--edge", "tiny", *flags)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert says in outcome.err


def test_text_that_is_not_utf8(in_stock: Cli) -> None:
    assert "not valid UTF-8" in in_stock("ask", "a\udcff", *EDGE).err


def test_the_default_model_is_pulled_when_it_is_wanted(
    cli: Cli, model: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alias stands for a local file here, so that no network is needed."""
    from edgewise.models import download

    local = lambda source, home, progress: download._local(model)
    monkeypatch.setattr(download, "fetch", local)
    monkeypatch.setattr("edgewise.cli.tiers.DEFAULT_MODEL", "tiny")
    outcome = cli("ask", "abc", "--edge", "tiny", "--max-tokens", "2", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["model"] == "tiny"
    assert "there is no bundle tiny" in outcome.err
    assert "pulling it" not in cli("ask", "abc", "--edge", "tiny", "--max-tokens", "2").err


def test_the_flags_defaults_are_those_of_a_request() -> None:
    """They stand in the help, which must not import what a Request is made of."""
    flags = signature(ask).parameters
    assert flags["max_tokens"].default == Request().max_tokens
    assert flags["temperature"].default == Request().sampling.temperature
    assert flags["route"].default == Request().route
    assert flags["deadline_ms"].default is Request().deadline_ms
