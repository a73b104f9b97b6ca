"""/v1/completions and several choices, as the real client of OpenAI sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest

from edgewise.engines.decode import Decoder
from edgewise.engines.fake import FakeGenerator, FakeTokenizer, FakeTokenModel, Script
from edgewise.engines.openai import OpenAI
from edgewise.errors import DeadlineExceeded, RemoteBroken
from edgewise.joint.cascade import Cascade
from edgewise.serve.exchange import Limits
from edgewise.types import Request, Token
from served import Served, eventually

Serve = Callable[..., Served]
HELLO: Any = [{"role": "user", "content": "Hello"}]


@contextmanager
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as it:
        yield it


def parrot(request: Request) -> str:
    """Tells what it was asked, and with which seed."""
    said = request.prompt or request.prompt_ids or request.messages[-1].content
    return f"{said} seed {request.sampling.seed}"


def test_a_whole_text(serve: Serve) -> None:
    engine = FakeGenerator(" upon a time")
    with client(serve(engine)) as api:
        answer = api.completions.create(model="auto", prompt="Once", echo=True, temperature=0.5, stop="never")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Once upon a time", "stop")
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (4, 8)
    request = engine.requests[0]
    assert (request.prompt, request.messages, request.max_tokens) == ("Once", (), 16)


def test_a_streamed_text(serve: Serve) -> None:
    with client(serve(FakeGenerator(" upon a time"))) as api:
        stream = api.completions.create(
            model="auto", prompt="Once", echo=True, stream=True, stream_options={"include_usage": True}
        )
        *pieces, last, usage = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == "Once upon a time"
    assert all(piece.choices[0].finish_reason is None for piece in pieces)
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_text(serve: Serve, stream: bool) -> None:
    half = Script((Token(1, b"\xe2\x82", -0.5), Token(2, b"\xac", -1.5), Token(3, b"!", -2.0)))
    asked: Any = {"model": "auto", "prompt": "x", "logprobs": 2, "stream": stream}
    with client(serve(FakeGenerator(half))) as api:
        answer = api.completions.create(**asked)
        pieces = list(answer) if stream else [answer]
    told = [piece.choices[0].logprobs for piece in pieces if piece.choices[0].logprobs]
    assert [token for some in told for token in some.tokens or []] == ["bytes:\\xe2\\x82", "bytes:\\xac", "!"]
    assert [p for some in told for p in some.token_logprobs or []] == [-0.5, -1.5, -2.0]
    assert [len(top) for some in told for top in some.top_logprobs or []] == [2, 2, 1]  # by their text: both are "?"
    assert [at for some in told for at in some.text_offset or []] == [0, 1, 2]


def test_a_text_goes_to_the_engine_as_it_is_and_ids_too(serve: Serve) -> None:
    model = FakeTokenModel()
    with client(serve(Decoder(model, FakeTokenizer()))) as api:
        text = api.completions.create(model="auto", prompt="ab", max_tokens=5)
        ids = api.completions.create(model="auto", prompt=[97, 98], max_tokens=5)
        with pytest.raises(openai.BadRequestError) as caught:
            api.completions.create(model="auto", prompt=[10**6])
    assert text.choices[0].text == ids.choices[0].text
    assert text.usage is not None
    assert text.usage.prompt_tokens == 2
    assert caught.value.param == "prompt"


def test_a_text_goes_through_a_cascade_to_another_node(serve: Serve) -> None:
    far = FakeGenerator("far away")
    near = Cascade(FakeGenerator(Script.of("near", logprob=-5.0)), OpenAI(serve(far).url))
    with client(serve(near)) as api:
        assert api.completions.create(model="auto", prompt="Once", seed=3).choices[0].text == "far away"
    assert (far.requests[0].prompt, far.requests[0].sampling.seed) == ("Once", 3)


def test_several_prompts_with_several_choices(serve: Serve) -> None:
    engine = FakeGenerator(parrot)
    with client(serve(engine)) as api:
        answer = api.completions.create(model="auto", prompt=["a", "bcd"], n=2, best_of=2, seed=7)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [text.split()[0] for text in texts] == ["a", "a", "bcd", "bcd"]
    assert texts[0] == "a seed 7"  # the first choice is what n=1 would have given
    assert len({request.sampling.seed for request in engine.requests}) == 2
    assert texts[1].split()[1:] == texts[3].split()[1:]  # seeds follow from the seed and the choice alone
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 1 + 3
    assert answer.usage.completion_tokens == 4 * 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a"] * 9}, "prompt"),
        ({"n": 9}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1, 2]}, "echo"),
        ({"messages": HELLO}, "messages"),
        ({"top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_what_is_not_served_is_named(shared: Served, fields: dict[str, Any], param: str) -> None:
    response = httpx2.post(f"{shared.url}/v1/completions", json={"model": "auto", "prompt": "x"} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with Served(FakeGenerator()) as served:
        yield served


# --- n ----------------------------------------------------------------------------------------------------------------


def test_choices_of_a_stream_are_interleaved(serve: Serve) -> None:
    engine = FakeGenerator(lambda request: replace(Script.of(parrot(request)), delay_s=0.005))
    with client(serve(engine)) as api:
        stream = api.chat.completions.create(
            model="auto", messages=HELLO, n=3, seed=1, stream=True, stream_options={"include_usage": True}
        )
        *pieces, usage = list(stream)
    indexes = [piece.choices[0].index for piece in pieces]
    assert indexes != sorted(indexes)
    for index in range(3):
        mine = [piece.choices[0] for piece in pieces if piece.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine).startswith("Hello seed ")
        assert [choice.finish_reason for choice in mine][-1] == "stop"
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 9
    assert usage.usage.prompt_tokens == len("user: Hello\nassistant: ")


def test_each_choice_has_its_own_seed_and_repeats(serve: Serve) -> None:
    def texts(n: int) -> list[str]:
        served = serve(Decoder(FakeTokenModel(), FakeTokenizer()))
        with client(served) as api:
            answer = api.chat.completions.create(
                model="auto", messages=HELLO, n=n, seed=5, temperature=1.5, max_tokens=12, extra_body={"top_k": 50}
            )
        return [choice.message.content or "" for choice in answer.choices]

    assert texts(4) == texts(4)
    assert len(set(texts(4))) == 4
    assert texts(4)[0] == texts(1)[0]


def test_each_choice_decides_for_itself_and_the_headers_tell_the_first(serve: Serve) -> None:
    sure = iter([-0.01, -5.0])
    edge = FakeGenerator(lambda request: Script.of("edge", logprob=next(sure)))
    served = serve(Cascade(edge, FakeGenerator("cloud")))
    body = {"model": "auto", "messages": HELLO, "n": 2}
    response = httpx2.post(f"{served.url}/v1/chat/completions", json=body)
    choices = response.json()["choices"]
    assert [choice["x_edgewise"]["route"] for choice in choices] == ["edge", "cloud"]
    assert [choice["message"]["content"] for choice in choices] == ["edge", "cloud"]
    assert response.headers["x-edgewise-route"] == response.json()["x_edgewise"]["route"] == "edge"


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_one_choice_ends_all(serve: Serve, stream: bool) -> None:
    broken = iter([True, False, False])
    engine = FakeGenerator(
        lambda _: replace(Script.of("a b c"), hangs=not next(broken), breaks_at=1, error=RemoteBroken("it broke"))
    )
    asked: Any = {"model": "auto", "messages": HELLO, "n": 3, "stream": stream}
    with client(serve(engine)) as api, pytest.raises(openai.APIError, match="it broke"):
        list(api.chat.completions.create(**asked))
    eventually(lambda: engine.active == 0)


def test_the_cap_on_choices_is_a_setting(serve: Serve) -> None:
    with client(serve(FakeGenerator(), limits=Limits(choices=2))) as api:
        assert len(api.chat.completions.create(model="auto", messages=HELLO, n=2).choices) == 2
        with pytest.raises(openai.BadRequestError, match=r"serve\.choices"):
            api.chat.completions.create(model="auto", messages=HELLO, n=3)


# --- the deadline in the middle of a whole answer ---------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_what_there_is_at_the_deadline_is_the_answer(serve: Serve, wrapped: bool, path: str) -> None:
    slow = FakeGenerator(replace(Script.of("one two three"), hangs=True, breaks_at=2))
    stuck = FakeGenerator(replace(Script.of("one two three"), breaks_at=2, error=DeadlineExceeded("late")))
    served = serve(Cascade(slow) if wrapped else stuck)
    body = {"model": "auto"} | ({"prompt": "x"} if path == "completions" else {"messages": HELLO})
    response = httpx2.post(f"{served.url}/v1/{path}", json=body, headers={"x-request-deadline-ms": "150"})
    answer = response.json()
    choice = answer["choices"][0]
    assert response.status_code == 200
    assert (choice.get("text") or choice["message"]["content"], choice["finish_reason"]) == ("one two ", "length")
    assert answer["usage"] is None
    assert answer["x_edgewise"]["cut"] == "deadline"
    assert answer["x_edgewise"]["timings"] is None


def test_a_deadline_before_the_first_token_is_an_error(serve: Serve) -> None:
    served = serve(Cascade(FakeGenerator(replace(Script.of("one"), hangs=True))))
    body = {"model": "auto", "messages": HELLO}
    response = httpx2.post(f"{served.url}/v1/chat/completions", json=body, headers={"x-request-deadline-ms": "50"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
