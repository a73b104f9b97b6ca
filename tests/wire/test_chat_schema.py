from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk, completion_create_params

from edgewise.errors import RemoteBroken, RequestError, UnsupportedField
from edgewise.types import Candidate, Chunk, Decision, Message, Request, Sampling, Timings, Token, Usage
from edgewise.wire import sse
from edgewise.wire.answers import LEAST_LOGPROB, ChunkBody, decode_chunk, decode_error, decode_models
from edgewise.wire.encoders import Answer, ChatEncoder, Stamp, encode_chat_completion
from edgewise.wire.openai import (
    CHAT_TREATMENT,
    HONOURED,
    IGNORED,
    NEUTRAL,
    REFUSED,
    decode_chat,
    encode_request,
)

OPENAI_FIELDS = set(get_type_hints(completion_create_params.CompletionCreateParamsBase)) | {"stream"}
BASE: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "Hi"}]}
PLAIN = Request(messages=(Message("user", "Hi"),))

# Of each honoured field: a value, what it makes of the request, and what else the body needs for it.
HONOURED_SAMPLES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "messages": ([{"role": "system", "content": "S"}], {"messages": (Message("system", "S"),)}, {}),
    "model": ("edge", {}, {}),
    "max_tokens": (7, {"max_tokens": 7}, {}),
    "max_completion_tokens": (7, {"max_tokens": 7}, {}),
    "temperature": (1.5, {"sampling": Sampling(temperature=1.5)}, {}),
    "top_p": (0.5, {"sampling": Sampling(top_p=0.5)}, {}),
    "stop": (["a", "b"], {"stop": ("a", "b")}, {}),
    "seed": (5, {"sampling": Sampling(seed=5)}, {}),
    "logprobs": (True, {"logprobs": True}, {}),
    "top_logprobs": (20, {"top_logprobs": 20, "logprobs": True}, {"logprobs": True}),
    "stream": (True, {"stream": True}, {}),
    "stream_options": ({"include_usage": True}, {"stream": True}, {"stream": True}),
    "ignore_eos": (True, {"ignore_eos": True}, {}),
    "n": (1, {}, {}),
    "presence_penalty": (-2, {"sampling": Sampling(presence_penalty=-2.0)}, {}),
    "frequency_penalty": (0.5, {"sampling": Sampling(frequency_penalty=0.5)}, {}),
    "logit_bias": ({"50256": -100}, {"sampling": Sampling(logit_bias=((50256, -100.0),))}, {}),
    "top_k": (40, {"sampling": Sampling(top_k=40)}, {}),
    "min_p": (0.05, {"sampling": Sampling(min_p=0.05)}, {}),
    "repetition_penalty": (1.1, {"sampling": Sampling(repetition_penalty=1.1)}, {}),
    "repeat_penalty": (1.1, {"sampling": Sampling(repetition_penalty=1.1)}, {}),
}
NEUTRAL_SAMPLES: dict[str, tuple[Any, Any]] = {  # the value that changes nothing, and one that would
    "response_format": ({"type": "text"}, {"type": "json_object"}),
    "modalities": (["text"], ["text", "audio"]),
    "store": (False, True),
    "service_tier": ("auto", "flex"),
}
IGNORED_SAMPLES = {"user": "u1", "metadata": {"team": "a"}, "parallel_tool_calls": True}


def body(**fields: Any) -> bytes:
    return json.dumps(BASE | fields).encode()


def named(treatment: str) -> list[str]:
    return sorted(name for name, found in CHAT_TREATMENT.items() if found == treatment)


def without(**changes: Any) -> Request:
    values = {name: getattr(PLAIN, name) for name in PLAIN.__slots__} | changes
    return Request(**values)


EXTENSIONS = {"ignore_eos", "top_k", "min_p", "repetition_penalty", "repeat_penalty"}


def test_the_table_knows_every_field_of_openai_and_the_extensions() -> None:
    assert set(CHAT_TREATMENT) - OPENAI_FIELDS == EXTENSIONS
    assert OPENAI_FIELDS - set(CHAT_TREATMENT) == set()
    assert named(HONOURED) == sorted(HONOURED_SAMPLES)
    assert named(NEUTRAL) == sorted(NEUTRAL_SAMPLES)
    assert named(IGNORED) == sorted(IGNORED_SAMPLES)


@pytest.mark.parametrize("name", named(HONOURED))
def test_honoured_fields_reach_the_request(name: str) -> None:
    value, changes, beside = HONOURED_SAMPLES[name]
    assert decode_chat(body(**beside, **{name: value})).requests()[0] == without(**changes)


@pytest.mark.parametrize("name", named(NEUTRAL))
def test_neutral_fields_take_one_value_alone(name: str) -> None:
    same, other = NEUTRAL_SAMPLES[name]
    assert decode_chat(body(**{name: same})).requests()[0] == PLAIN
    with pytest.raises(UnsupportedField, match=name) as caught:
        decode_chat(body(**{name: other}))
    assert str(caught.value.param).startswith(name)


@pytest.mark.parametrize("name", named(IGNORED))
def test_ignored_fields_change_nothing_and_have_a_type(name: str) -> None:
    assert decode_chat(body(**{name: IGNORED_SAMPLES[name]})).requests()[0] == PLAIN
    with pytest.raises(RequestError, match=name):
        decode_chat(body(**{name: 3}))


@pytest.mark.parametrize("name", named(REFUSED))
def test_refused_fields_are_named(name: str) -> None:
    for value in ({}, [], "auto", 1, True):
        with pytest.raises(UnsupportedField, match=rf"^{name} is not supported") as caught:
            decode_chat(body(**{name: value}))
        assert caught.value.param == name


@pytest.mark.parametrize("name", sorted(set(CHAT_TREATMENT) - {"messages", "model"}))
def test_null_counts_as_absent(name: str) -> None:
    assert decode_chat(body(**{name: None})).requests()[0] == PLAIN


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": 2.1}, "temperature", "<= 2"),
        ({"top_p": 0}, "top_p", "> 0"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": 10**30}, "max_tokens", "<= 2147483647"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "must not differ"),
        ({"seed": -1}, "seed", ">= 0"),
        ({"stop": ["a", 3]}, "stop[1]", "string"),
        ({"stop": ["a"] * 5}, "stop", "length <= 4"),
        ({"stop": ""}, "stop", "length >= 1"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "<= 20"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"logprobs": 5}, "logprobs", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", ""),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not a field"),
        ({"model": None}, "model", "string"),
        ({"model": ""}, "model", "length >= 1"),
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": "Hi"}, "messages", "array"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "allowed are system"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", ">= 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "only text",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": "N"}]}, "messages[0].name", "not supported"),
        ({"top_k": -2}, "top_k", ">= -1"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"min_p": 1.01}, "min_p", "<= 1.0; it is 1.01"),
        ({"presence_penalty": 2.1}, "presence_penalty", "<= 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", ">= -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", ">= 0.01"),
        ({"repetition_penalty": 1.1, "repeat_penalty": 1.2}, "repeat_penalty", "must not differ"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]", "<= 100"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", ">= 0"),
        ({"logit_bias": {"hello": 1}}, "logit_bias", "integer"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "integer"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": 129}, "n", "<= 128; it is 129"),
        ({"temperature": "hot"}, "temperature", 'it is "hot"'),
        ({"temperature": "hot" * 50}, "temperature", "expected `number | null`, got `string`"),
        ({"k_top": 40}, "k_top", "not a field"),
        ({"x" * 5000: 1}, None, "not a field"),
    ],
)
def test_wrong_values_are_named(fields: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_chat(body(**fields))
    assert words in str(caught.value)
    assert param is None or caught.value.param == param
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"model": "\xff"}',
        b'{"\xff": 1}',
        b"\xff\xfe{}",
        b'{"model": "\\ud800"}',
        b'{"model": "m", "temperature": NaN}',
        b'{"model": "m", "temperature": 1e999}',
        body() + b" x",
        b"[" * 100_000,
        b'{"tools":' + b"[" * 100_000,
        b'{"model":' + b'{"a":' * 100_000,
        b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError):
        decode_chat(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(CHAT_TREATMENT)) | st.text(max_size=8), JSON, max_size=4))
def test_any_json_is_a_request_or_a_request_error(fields: dict[str, Any]) -> None:
    with suppress(RequestError):
        assert decode_chat(body(**fields)).requests()[0].max_tokens >= 1


def test_text_parts_and_the_newer_word_for_system() -> None:
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        {"role": "assistant", "content": "C", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    assert decode_chat(body(messages=turns)).requests()[0].messages == (
        Message("system", "A\nB"),
        Message("assistant", "C"),
    )


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    messages=st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts), min_size=1),
    sampling=st.builds(
        Sampling,
        st.floats(0, 2),
        st.floats(0, 1, exclude_min=True),
        st.none() | st.integers(0, 2**63 - 1),
        st.integers(0, 2**31 - 1),
        st.floats(0, 1),
        st.floats(-2, 2),
        st.floats(-2, 2),
        st.floats(0.01, 100),
        st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3).map(lambda d: tuple(d.items())),
    ),
    max_tokens=st.integers(1, 2**31 - 1),
    stop=st.lists(texts.filter(bool), max_size=4),
    top=st.integers(0, 20),
    ignore_eos=st.booleans(),
)
def test_a_request_arrives_as_it_was_sent(
    messages: list[Message], sampling: Sampling, max_tokens: int, stop: list[str], top: int, ignore_eos: bool
) -> None:
    request = Request(
        messages=tuple(messages), sampling=sampling, max_tokens=max_tokens, stop=tuple(stop),
        logprobs=top > 0, top_logprobs=top, stream=True, ignore_eos=ignore_eos,
    )  # fmt: skip
    arrived = decode_chat(encode_request(request, "m"))
    assert arrived.requests()[0] == request
    assert arrived.include_usage


# --- answers ----------------------------------------------------------------------------------------------------------

STAMP = Stamp("chatcmpl-1", 1_700_000_000, "fake", "edgewise-1")
DECISION = Decision("cloud", 0.25, "unsure")
TOKENS = (
    Token(3, b"\xf0\x9f", -0.5, (Candidate(3, b"\xf0\x9f", -0.5), Candidate(4, b"a", -math.inf))),
    Token(5, b"\x91\x8d", -0.0),
)
ANSWER = (
    Chunk("", TOKENS[:1], decision=DECISION, model="fake"),
    Chunk("👍", TOKENS[1:]),
    Chunk("!", finish_reason="length", usage=Usage(9, 2, 4), timings=Timings(1.0, 2.0, None), decision=DECISION),
)


def streamed(*, logprobs: bool = True, include_usage: bool = False, answer: tuple[Chunk, ...] = ANSWER) -> list[bytes]:
    encoder = ChatEncoder(STAMP, [""], logprobs=logprobs, include_usage=include_usage)
    content = b"".join(encoder.content(0, chunk) for chunk in answer)
    last = answer[-1]
    end = encoder.closing(0, last, DECISION) + encoder.end(last.usage, last, DECISION)
    stream = encoder.opening(0, DECISION) + content + end
    return [event.data for event in sse.Decoder().feed(stream)]


def whole(chunks: tuple[Chunk, ...]) -> bytes:
    return encode_chat_completion(STAMP, [Answer(chunks, DECISION)], chunks[-1].usage, logprobs=True)


def test_a_whole_answer_is_what_openai_describes() -> None:
    data = whole(ANSWER)
    completion = ChatCompletion.model_validate_json(data)
    raw = json.loads(data)
    assert raw["choices"][0]["message"] == {"role": "assistant", "content": "👍!", "refusal": None}
    assert raw["choices"][0]["finish_reason"] == "length"
    assert raw["system_fingerprint"] == "edgewise-1"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 4
    assert completion.usage.total_tokens == 11
    assert raw["x_edgewise"] == {
        "route": "cloud",
        "confidence": 0.25,
        "reason": "unsure",
        "timings": {"first_token_ms": 1.0, "total_ms": 2.0, "decode_tok_s": None},
    }


def test_logprobs_keep_the_bytes_of_half_characters() -> None:
    completion = ChatCompletion.model_validate_json(whole(ANSWER))
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    first, second = logprobs.content or []
    assert (first.token, first.bytes, first.logprob) == ("�", [0xF0, 0x9F], -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("�", -0.5), ("a", LEAST_LOGPROB)]
    assert bytes((first.bytes or []) + (second.bytes or [])).decode() == "👍"


def test_logprobs_that_the_engine_does_not_know_are_null() -> None:
    unknown = (Chunk("a", (Token(1, b"a", None),)), ANSWER[-1])
    completion = ChatCompletion.model_validate_json(whole(unknown))
    assert completion.choices[0].logprobs is None
    assert json.loads(streamed(answer=unknown)[1])["choices"][0]["logprobs"] is None


def test_a_stream_opens_with_the_role_and_closes_with_the_reason() -> None:
    *events, done = streamed()
    chunks = [json.loads(event) for event in events]
    assert done == b"[DONE]"
    for event in events:
        ChatCompletionChunk.model_validate_json(event)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": ""},
        {"content": "👍"},
        {"content": "!"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
    assert {(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks} == {
        ("chatcmpl-1", 1_700_000_000, "fake", "chat.completion.chunk")
    }
    assert [index for index, chunk in enumerate(chunks) if "x_edgewise" in chunk] == [0, 4]
    assert chunks[0]["x_edgewise"]["timings"] is None
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_last_and_only_if_asked_for() -> None:
    *events, usage, _ = (json.loads(event) if event != b"[DONE]" else None for event in streamed(include_usage=True))
    assert all(event["usage"] is None for event in events)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2
    assert usage["x_edgewise"]["timings"]["total_ms"] == 2.0


def test_pieces_without_anything_to_show_are_not_sent() -> None:
    assert len(streamed(logprobs=False)) == len(streamed()) - 1


def test_tokens_come_back_as_they_were_sent() -> None:
    tokens = [
        token for event in streamed()[1:-2] for choice in decode_chunk(event).choices or () for token in choice.tokens()
    ]
    assert [(token.raw, token.logprob) for token in tokens] == [(token.raw, token.logprob) for token in TOKENS]
    assert tokens[0].top[1].logprob == LEAST_LOGPROB


@pytest.mark.parametrize(
    ("data", "text", "reason"),
    [
        # a first piece with content null and timings beside (llama-server)
        ('{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],"created":1,'
         '"id":"c","model":"m","system_fingerprint":"b1","timings":{"n":1}}', "", None),
        # fields that nobody knows, null logprobs, usage null (vLLM)
        ('{"id":"c","choices":[{"index":0,"delta":{"content":"a","reasoning_content":null},"logprobs":null,'
         '"finish_reason":null,"token_ids":null}],"usage":null}', "a", None),
        # a reason in the piece with the last text (Ollama, older servers)
        ('{"choices":[{"index":0,"delta":{"role":"assistant","content":"b"},"finish_reason":"stop"}]}', "b", "stop"),
        ('{"choices":[{"delta":null,"finish_reason":"length"}]}', "", "length"),
        ('{"choices":[{"delta":{"content":"c"},"logprobs":{"content":null}}],"created":1.5}', "c", None),
    ],
)  # fmt: skip
def test_pieces_of_other_servers_are_understood(data: str, text: str, reason: str | None) -> None:
    choices = decode_chunk(data.encode()).choices
    assert choices is not None
    assert (choices[0].text, choices[0].finish_reason) == (text, reason)
    assert b"".join(token.raw for token in choices[0].tokens()).decode() == text


def test_token_ids_and_missing_bytes_of_other_servers() -> None:
    data = (
        b'{"choices":[{"delta":{"content":"a"},"logprobs":{"content":['
        b'{"id":7,"token":"a","logprob":-0.25,"top_logprobs":[{"token":"b","logprob":null}]}]}}]}'
    )
    choices = decode_chunk(data).choices or []
    assert choices[0].tokens() == (Token(7, b"a", -0.25, (Candidate(-1, b"b", LEAST_LOGPROB),)),)


def test_pieces_without_choices() -> None:
    for data in (b'{"choices":null}', b'{"choices":[]}', b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}', b"{}"):
        assert not decode_chunk(data).choices
    usage = decode_chunk(b'{"usage":{"prompt_tokens":1,"completion_tokens":2,"prompt_tokens_details":null}}').usage
    assert usage
    assert usage.value() == Usage(1, 2, 0)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"[]", b'{"choices":3}', b'{"choices":[{"delta":{"content":5}}]}'])
def test_pieces_that_make_no_sense(data: bytes) -> None:
    with pytest.raises(RemoteBroken):
        decode_chunk(data)


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_reading_never_fails_in_another_way(data: bytes) -> None:
    for read in (decode_chunk, decode_models):
        with suppress(RemoteBroken):
            assert isinstance(read(data), ChunkBody | list)
    decode_error(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"error":{"message":"no","type":"t","param":["a"],"code":404}}', "no"),
        (b'{"error":"model not found"}', "model not found"),
        (b"<html>Bad Gateway</html>", "<html>Bad Gateway</html>"),
        (b"", ""),
    ],
)
def test_errors_in_any_form(data: bytes, message: str) -> None:
    assert decode_error(data).message == message
