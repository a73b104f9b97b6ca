"""Edges of a split model, and their answers token by token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from edgewise.engines.decode import Decoder
from edgewise.engines.load import loaded
from edgewise.models.bundle import Bundle
from edgewise.split.channel import Way
from edgewise.split.model import SplitModel, SplitOptions
from edgewise.types import Request, Token

CONTEXT = 512
PROMPTS = (
    "The lighthouse keeper wrote in his diary that",
    "Question: name three uses of copper. Answer:",
    "def fibonacci(n):",
    "Once the river had fallen, the farmers of the valley",
)


@dataclass
class Edge:
    """A split model with a decoder over it."""

    model: SplitModel
    decoder: Decoder


@asynccontextmanager
async def edge(bundle: Bundle, *urls: str, key: str | None = None, **options: Any) -> AsyncIterator[Edge]:
    engine, tokenizer = loaded(bundle, slots=4, context=CONTEXT)
    settings = {"cut": 10, "codec": "exact"} | options
    model = SplitModel(engine, bundle.weights, [Way(url, key) for url in urls], SplitOptions(**settings))
    decoder = Decoder(model, tokenizer)
    try:
        yield Edge(model, decoder)
    finally:
        await decoder.close()


async def tokens(
    decoder: Decoder, prompt: str, new: int = 48, at: dict[int, Callable[[], object]] | None = None, **wishes: Any
) -> list[Token]:
    """The tokens of an answer; `at` holds what to do once so many have come."""
    request = Request(prompt=prompt, max_tokens=new, ignore_eos=True, **wishes)
    found: list[Token] = []
    waiting = dict(at or {})
    async for chunk in decoder.generate(request):
        found += chunk.tokens
        for count in [count for count in waiting if len(found) >= count]:
            done = waiting.pop(count)()
            if asyncio.iscoroutine(done):
                await done
    assert len(found) == new, "a token was lost or came twice"
    return found


def ids(found: list[Token]) -> list[int]:
    return [token.id for token in found]


async def ask_until(holds: Callable[[], object], decoder: Decoder, prompt: str, expected: list[int]) -> None:
    """Ask again and again until it holds; each answer is the expected one."""
    for _ in range(100):
        if holds():
            return
        assert ids(await tokens(decoder, prompt, len(expected))) == expected
    raise AssertionError("it never came to hold")
