from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params

from edgewise.errors import RequestError, UnsupportedField
from edgewise.types import Request, Sampling, Token
from edgewise.wire.answers import LEAST_LOGPROB, TextChoice, TextCompletion, decode_text_chunk
from edgewise.wire.openai import (
    CHAT_TREATMENT,
    HONOURED,
    IGNORED,
    NEUTRAL,
    REFUSED,
    TEXT_MAX_TOKENS,
    TEXT_TREATMENT,
    decode_text,
    encode_request,
)

OPENAI_FIELDS = set(get_type_hints(completion_create_params.CompletionCreateParamsBase)) | {"stream"}
PLAIN = Request(prompt="x", max_tokens=TEXT_MAX_TOKENS)
OWN = {  # of the fields that a chat does not have, or has in another form: a value and what it makes of the request
    "prompt": ([5, 6], {"prompt": None, "prompt_ids": (5, 6)}),
    "echo": (True, {}),
    "logprobs": (3, {"logprobs": True, "top_logprobs": 3}),
    "max_tokens": (7, {"max_tokens": 7}),
}


def read(**fields: Any) -> Request:
    return decode_text(json.dumps({"model": "m", "prompt": "x"} | fields).encode()).requests()[0]


def named(treatment: str) -> set[str]:
    return {name for name, found in TEXT_TREATMENT.items() if found == treatment}


def test_the_table_knows_every_field_of_openai_and_the_extensions() -> None:
    extensions = {"ignore_eos", "top_k", "min_p", "repetition_penalty", "repeat_penalty"}
    assert set(TEXT_TREATMENT) == OPENAI_FIELDS | extensions
    assert (named(NEUTRAL), named(IGNORED), named(REFUSED)) == ({"best_of"}, {"user"}, {"suffix"})
    of_a_chat = {name for name, treatment in CHAT_TREATMENT.items() if treatment == HONOURED}
    assert named(HONOURED) - of_a_chat == {"prompt", "echo"}  # the others are tested there


@pytest.mark.parametrize("name", sorted(OWN))
def test_honoured_fields_reach_the_request(name: str) -> None:
    value, changes = OWN[name]
    expected = {field: getattr(PLAIN, field) for field in Request.__slots__} | changes
    assert read(**{name: value}) == Request(**expected)


@pytest.mark.parametrize("name", sorted(set(TEXT_TREATMENT) - {"prompt", "model"}))
def test_null_counts_as_absent(name: str) -> None:
    assert read(**{name: None}) == PLAIN


def test_the_rest() -> None:
    assert read(best_of=1) == read(user="u1") == PLAIN
    with pytest.raises(UnsupportedField, match="best_of"):
        read(best_of=2)
    with pytest.raises(UnsupportedField, match="suffix is not supported"):
        read(suffix="")
    for missing in (b'{"model": "m"}', b'{"model": "m", "prompt": null}'):
        with pytest.raises(RequestError, match="prompt"):
            decode_text(missing)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(
    prompt=texts | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple),
    top=st.none() | st.integers(0, 5),
    seed=st.none() | st.integers(0, 2**63 - 1),
)
def test_a_request_arrives_as_it_was_sent(prompt: str | tuple[int, ...], top: int | None, seed: int | None) -> None:
    request = Request(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_ids=None if isinstance(prompt, str) else prompt,
        logprobs=top is not None,
        top_logprobs=top or 0,
        sampling=Sampling(seed=seed),
        stream=True,
    )
    assert decode_text(encode_request(request, "m")).requests() == (request,)


@given(st.integers(1, 6), st.integers(0, 2**63 - 1))
def test_seeds_of_several_choices_do_not_depend_on_their_number(n: int, seed: int) -> None:
    some = decode_text(json.dumps({"model": "m", "prompt": "x", "n": n, "seed": seed}).encode()).requests()
    seeds = [request.sampling.seed for request in some]
    assert seeds[0] == seed
    assert len(set(seeds)) == n
    more = decode_text(json.dumps({"model": "m", "prompt": "x", "n": n + 1, "seed": seed}).encode()).requests()
    assert [request.sampling.seed for request in more][:n] == seeds


@pytest.mark.parametrize(
    ("data", "tokens"),
    [
        ('{"choices":[{"text":"a","logprobs":null}]}', [Token(-1, b"a", None)]),
        ('{"choices":[{"text":"a","index":0}],"usage":null,"unknown":1}', [Token(-1, b"a", None)]),
        ('{"choices":[{"text":"","logprobs":{"tokens":["b"],"token_logprobs":null}}]}', [Token(-1, b"b", None)]),
        ('{"choices":[{"logprobs":{"tokens":["bytes:\\\\xff","bytes:x"],"token_logprobs":[-1,-9999.0]}}]}',
         [Token(-1, b"\xff", -1.0), Token(-1, b"bytes:x", LEAST_LOGPROB)]),
        ('{"choices":[]}', []),
    ],
)  # fmt: skip
def test_pieces_of_other_servers(data: str, tokens: list[Token]) -> None:
    piece: TextCompletion = decode_text_chunk(data.encode())
    choices: list[TextChoice] = piece.choices or []
    assert [token for choice in choices for token in choice.tokens()] == tokens
