import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgewise.engines.answer import LEAST_SPAN_S, Inbox, Stopwatch, TextStream, check_request
from edgewise.engines.base import ALL_SAMPLING, Capabilities
from edgewise.errors import DeadlineExceeded, RequestError
from edgewise.types import Message, Request, Sampling

ALL = Capabilities(logprobs=True, top_logprobs=20, seed=True, sampling=ALL_SAMPLING, prompt_ids=True, vocab=1000)
HI = (Message("user", "hi"),)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted(c % (len(data) + 1) for c in cuts)
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


def streamed(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    stream = TextStream(stop)
    text = "".join(stream.push(piece) for piece in pieces)
    return text + stream.finish(), stream.stopped


def stopped_at(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The promise, character by character."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(st.binary(max_size=40), st.lists(st.integers(0, 99), max_size=12))
def test_bytes_become_the_same_text_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    assert streamed(cut(data, cuts)) == (data.decode(errors="replace"), False)


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=20))
def test_a_character_is_never_split(text: str) -> None:
    stream = TextStream()
    pieces = [stream.push(bytes([byte])) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)


@given(
    st.text("abé", max_size=25),
    st.lists(st.text("abé", min_size=1, max_size=5), max_size=3).map(tuple),
    st.lists(st.integers(0, 99), max_size=25),
)
def test_stop_strings_end_the_text_where_the_definition_says(text: str, stop: tuple[str, ...], cuts: list[int]) -> None:
    assert streamed(cut(text.encode(), cuts), stop) == stopped_at(text, stop)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(("END",))
    assert [stream.push(piece) for piece in (b"a", b"E", b"N", b"x", b"EN", b"D", b"more")] == [
        "a",
        "",
        "",
        "ENx",
        "",
        "",
        "",
    ]
    assert stream.stopped
    assert stream.finish() == ""


def test_a_stop_string_that_did_not_come_is_given_in_the_end() -> None:
    assert streamed([b"the E", b"N"], ("END",)) == ("the EN", False)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        (Request(), "messages"),
        (Request(HI, prompt_ids=(1,)), "messages"),
        (Request(prompt_ids=()), "prompt_ids"),
        (Request(HI, sampling=Sampling(temperature=-1.0)), "temperature"),
        (Request(HI, sampling=Sampling(temperature=float("nan"))), "temperature"),
        (Request(HI, sampling=Sampling(temperature=float("inf"))), "temperature"),
        (Request(HI, sampling=Sampling(top_p=0.0)), "top_p"),
        (Request(HI, sampling=Sampling(top_p=1.1)), "top_p"),
        (Request(HI, sampling=Sampling(top_p=float("nan"))), "top_p"),
        (Request(HI, sampling=Sampling(seed=-1)), "seed"),
        (Request(HI, sampling=Sampling(seed=2**63)), "seed"),
        (Request(HI, prompt="x"), "messages"),
        (Request(prompt="x", prompt_ids=(1,)), "messages"),
        (Request(prompt=""), "prompt"),
        (Request(HI, sampling=Sampling(top_k=-1)), "top_k"),
        (Request(HI, sampling=Sampling(min_p=1.1)), "min_p"),
        (Request(HI, sampling=Sampling(min_p=float("nan"))), "min_p"),
        (Request(HI, sampling=Sampling(presence_penalty=2.1)), "presence_penalty"),
        (Request(HI, sampling=Sampling(frequency_penalty=-2.1)), "frequency_penalty"),
        (Request(HI, sampling=Sampling(repetition_penalty=0.0)), "repetition_penalty"),
        (Request(HI, sampling=Sampling(repetition_penalty=float("inf"))), "repetition_penalty"),
        (Request(HI, sampling=Sampling(logit_bias=((1000, 1.0),))), "logit_bias"),
        (Request(HI, sampling=Sampling(logit_bias=((-1, 1.0),))), "logit_bias"),
        (Request(HI, sampling=Sampling(logit_bias=((1, 100.5),))), "logit_bias"),
        (Request(HI, sampling=Sampling(logit_bias=((1, float("nan")),))), "logit_bias"),
        (Request(HI, sampling=Sampling(logit_bias=((1, 1.0), (1, 2.0)))), "logit_bias"),
        (Request(HI, max_tokens=0), "max_tokens"),
        (Request(HI, stop=("a", "")), "stop"),
        (Request(HI, top_logprobs=21), "top_logprobs"),
        (Request(HI, top_logprobs=-1), "top_logprobs"),
        (Request(HI, deadline_ms=0.0), "deadline_ms"),
        (Request(HI, deadline_ms=float("nan")), "deadline_ms"),
    ],
)
def test_a_wrong_field_is_named(wrong: Request, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_request(wrong, ALL)
    assert caught.value.param == param
    assert "allowed" in str(caught.value)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        (Request(prompt_ids=(1,)), "prompt_ids"),
        (Request(HI, logprobs=True), "logprobs"),
        (Request(HI, top_logprobs=1), "top_logprobs"),
        (Request(HI, sampling=Sampling(seed=1)), "seed"),
        (Request(HI, sampling=Sampling(top_k=1)), "top_k"),
        (Request(HI, sampling=Sampling(min_p=0.1)), "min_p"),
        (Request(HI, sampling=Sampling(presence_penalty=0.1)), "presence_penalty"),
        (Request(HI, sampling=Sampling(frequency_penalty=0.1)), "frequency_penalty"),
        (Request(HI, sampling=Sampling(repetition_penalty=1.1)), "repetition_penalty"),
        (Request(HI, sampling=Sampling(logit_bias=((1, 1.0),))), "logit_bias"),
    ],
)
def test_what_this_engine_cannot_do_is_refused_and_others_do_it(wish: Request, param: str) -> None:
    check_request(wish, ALL)
    with pytest.raises(RequestError) as caught:
        check_request(wish, Capabilities())
    assert caught.value.param == param


def test_the_clock_of_an_answer_without_tokens() -> None:
    timings = Stopwatch().timings()
    assert timings.first_token_ms == timings.total_ms
    assert timings.decode_tok_s is None


def test_one_token_has_no_speed_and_two_have() -> None:
    watch = Stopwatch()
    watch.token()
    assert watch.timings().decode_tok_s is None
    time.sleep(2 * LEAST_SPAN_S)
    watch.token()
    speed = watch.timings().decode_tok_s
    assert speed is not None
    assert 0 < speed < 1 / LEAST_SPAN_S
    assert 0 <= watch.timings().first_token_ms <= watch.timings().total_ms


async def test_the_deadline_ends_a_reading_that_nobody_feeds() -> None:
    inbox: Inbox[str] = Inbox(Stopwatch(deadline_ms=5))
    with pytest.raises(DeadlineExceeded, match="5 ms"):
        await inbox.next()


async def test_items_come_in_order_and_an_exception_is_raised() -> None:
    inbox: Inbox[str] = Inbox(Stopwatch())
    for item in ("a", "b", ValueError("c")):
        await asyncio.to_thread(inbox.loop.call_soon_threadsafe, inbox.put, item)
    assert [await inbox.next(), await inbox.next()] == ["a", "b"]
    with pytest.raises(ValueError, match="c"):
        await inbox.next()
