"""What is llama.cpp's own; what it has in common with other engines is in tests/contract."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgewise.engines.llamacpp import LlamaCpp
from edgewise.errors import (
    ContextFull,
    DeadlineExceeded,
    EngineClosed,
    MissingExtra,
    RequestError,
    SourceError,
    UsageError,
)
from edgewise.types import Chunk, Message, Request, Sampling


@pytest.fixture
async def llama(smollm2_gguf: Path) -> AsyncIterator[LlamaCpp]:
    made = LlamaCpp(smollm2_gguf, context=512, threads=1)
    yield made
    await made.close()


async def read(llama: LlamaCpp, request: Request) -> list[Chunk]:
    return [chunk async for chunk in llama.generate(request)]


def ask(*prompt: int, **wishes: Any) -> Request:
    return Request(prompt_ids=prompt, **({"max_tokens": 8, "ignore_eos": True} | wishes))


async def test_a_real_model_answers_a_question(llama: LlamaCpp) -> None:
    chunks = await read(llama, Request((Message("user", "What is 2+2? Answer with a number."),), max_tokens=30))
    assert "4" in "".join(chunk.text for chunk in chunks)


@pytest.fixture
def base_model(smollm2_gguf: Path, tmp_path: Path) -> Path:
    """Without its chat template."""
    path = tmp_path / "base.gguf"
    path.write_bytes(smollm2_gguf.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.lost_template", 1))
    return path


async def test_a_base_model_takes_texts_but_no_messages(base_model: Path) -> None:
    """llama.cpp itself would fall back on a template that the model was never taught."""
    llama = LlamaCpp(base_model, context=256, threads=1)
    try:
        with pytest.raises(RequestError, match="base has no chat template") as caught:
            await read(llama, Request((Message("user", "Hello"),), max_tokens=1))
        assert caught.value.param == "messages"
        assert len(await read(llama, Request(prompt="Hello", max_tokens=2, ignore_eos=True))) >= 2
    finally:
        await llama.close()


async def test_an_answer_ends_where_the_context_ends(llama: LlamaCpp) -> None:
    chunks = await read(llama, ask(*[40] * 505, max_tokens=1000))
    assert chunks[-1].finish_reason == "length"
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens + usage.completion_tokens == 512 == llama.can.context


async def test_a_long_prompt_names_its_need_and_the_limit(llama: LlamaCpp) -> None:
    with pytest.raises(ContextFull) as caught:
        await read(llama, ask(*[40] * 600))
    assert (caught.value.needed, caught.value.limit) == (601, 512)


async def test_ids_outside_the_vocabulary_are_refused(llama: LlamaCpp) -> None:
    with pytest.raises(RequestError, match="invalid tokens") as caught:
        await read(llama, ask(1, 99_999_999))
    assert caught.value.param == "prompt_ids"
    assert llama.can.vocab == 49_152
    with pytest.raises(RequestError, match="token id 49152"):
        await read(llama, ask(1, sampling=Sampling(logit_bias=((49_152, 1.0),))))


async def ids(llama: LlamaCpp, request: Request) -> list[int]:
    chunks = await read(llama, replace(request, logprobs=True))
    return [token.id for chunk in chunks for token in chunk.tokens]


async def test_bias_and_narrow_sets_are_kept(llama: LlamaCpp) -> None:
    prompt = (19556, 28, 905, 359, 346, 19556, 28, 905)
    greedy = await ids(llama, ask(*prompt))
    banned = await ids(llama, ask(*prompt, sampling=Sampling(logit_bias=((greedy[0], -100.0),))))
    assert greedy[0] not in banned
    for narrow in (Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, min_p=1.0)):
        assert await ids(llama, ask(*prompt, sampling=narrow)) == greedy


async def test_repetition_counts_the_whole_prompt(llama: LlamaCpp) -> None:
    prompt = (19556, 28, 905, 359, 346, 19556, 28, 905, *range(1000, 1080))
    free = await ids(llama, ask(*prompt, sampling=Sampling(logit_bias=((359, 90.0),)), max_tokens=1))
    held = await ids(
        llama, ask(*prompt, sampling=Sampling(logit_bias=((359, 90.0),), repetition_penalty=100.0), max_tokens=1)
    )
    assert free == [359] != held  # it stands more than 64 tokens back, which is where llama.cpp stops to look


async def test_penalties_that_llamacpp_counts_otherwise_are_refused(llama: LlamaCpp) -> None:
    for sampling in (Sampling(presence_penalty=1.0), Sampling(frequency_penalty=-1.0)):
        with pytest.raises(RequestError, match=r"_penalty is -?1\.0, allowed is 0 alone"):
            await read(llama, ask(1, sampling=sampling))


async def test_the_prompt_of_before_is_reused(llama: LlamaCpp) -> None:
    cached = [(await read(llama, ask(*range(100, 150))))[-1].usage for _ in range(2)]
    assert [usage.cached_tokens for usage in cached if usage] == [0, 49]


async def test_greedy_and_top_p_take_no_other_sampler_on_the_way(llama: LlamaCpp) -> None:
    """With a tiny top_p and a high temperature only the best token is left, whatever its probability."""
    greedy = await read(llama, ask(1, 2, 3))
    narrow = await read(llama, ask(1, 2, 3, sampling=Sampling(temperature=0.9, top_p=1e-6, seed=2**63 - 1)))
    assert [chunk.text for chunk in narrow] == [chunk.text for chunk in greedy]


async def test_the_deadline_ends_the_answer_and_the_next_one_comes(llama: LlamaCpp) -> None:
    with pytest.raises(DeadlineExceeded):
        await read(llama, ask(1, max_tokens=400, deadline_ms=40.0))
    assert len(await read(llama, ask(1))) > 1


async def test_a_request_that_waits_is_ended_by_close(smollm2_gguf: Path) -> None:
    llama = LlamaCpp(smollm2_gguf, context=512, slots=1, threads=1)
    tasks = [asyncio.ensure_future(read(llama, ask(1, max_tokens=400))) for _ in range(3)]
    await asyncio.sleep(0.05)
    await llama.close()
    for task in tasks:
        with pytest.raises(EngineClosed):
            await task


async def test_the_port_that_llamacpp_opens_is_shut_for_others(llama: LlamaCpp) -> None:
    def knock() -> None:
        body = b'{"prompt": "hi", "max_tokens": 1}'
        address = f"{llama._server.listening_address}/v1/completions"
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, body, 10)

    with pytest.raises(urllib.error.HTTPError, match="401"):
        await asyncio.to_thread(knock)


async def test_nothing_is_printed(smollm2_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    llama = LlamaCpp(smollm2_gguf, context=256, threads=1)
    await read(llama, ask(1, 2))
    with pytest.raises(RequestError):
        await read(llama, ask(99_999_999))
    await llama.close()
    assert capfd.readouterr() == ("", "")


def test_the_context_is_the_models_own_up_to_a_limit_and_never_more(smollm2_gguf: Path) -> None:
    assert LlamaCpp(smollm2_gguf, context=300, threads=1).can.context == 512  # llama.cpp's own steps
    for wrong in (0, 8193, 10**9):
        with pytest.raises(UsageError, match="8192"):
            LlamaCpp(smollm2_gguf, context=wrong)


def test_damaged_files_are_source_errors(smollm2_gguf: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    for content in (b"", b"GGUF", b"no model at all" * 100, smollm2_gguf.read_bytes()[:5_000_000]):
        damaged.write_bytes(content)
        with pytest.raises(SourceError, match="damaged"):
            LlamaCpp(damaged)


def test_a_sound_file_that_llamacpp_cannot_run_is_one_too(smollm2_gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(smollm2_gguf.read_bytes().replace(b"llama", b"lllll", 1))
    with pytest.raises(SourceError, match="cannot load"):
        LlamaCpp(other)


def test_without_xllamacpp_the_error_names_the_extra(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingExtra, match=r"edgewise\[llamacpp\]"):
        LlamaCpp(smollm2_gguf)


def test_what_is_closed_as_soon_as_it_is_open_does_not_wait_for_ever(smollm2_gguf: Path) -> None:
    """In a process of its own: one that waits in llama.cpp's destructor hears no signal that Python would handle."""
    code = """
import asyncio, sys
from pathlib import Path
from edgewise.engines.llamacpp import LlamaCpp
for _ in range(8):
    asyncio.run(LlamaCpp(Path(sys.argv[1]), context=256, threads=1).close())
"""
    subprocess.run([sys.executable, "-c", code, str(smollm2_gguf)], check=True, timeout=120)
