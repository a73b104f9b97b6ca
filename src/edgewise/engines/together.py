"""Many requests at one Generator, as many at once as it has places for, each answer whole."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from edgewise.engines.base import Generator
from edgewise.errors import EngineError
from edgewise.models.tokenizer import Tokenizer
from edgewise.types import FinishReason, Message, Request, Token


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; its tokens do not hold the one that ended it."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason


async def answers(generator: Generator, requests: Sequence[Request], *, at_once: int) -> list[Answer]:
    """In the order of the requests. What one of them raises ends them all."""
    places = asyncio.Semaphore(at_once)

    async def one(request: Request) -> Answer:
        async with places:
            return await answer(generator, request)

    tasks = [asyncio.ensure_future(one(request)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def answer(generator: Generator, request: Request) -> Answer:
    chunks = [chunk async for chunk in generator.generate(request)]
    ended = chunks[-1].finish_reason if chunks else None
    if ended is None:
        raise EngineError(f"{generator.name} broke off its answer")
    tokens = tuple(token for chunk in chunks for token in chunk.tokens)
    return Answer("".join(chunk.text for chunk in chunks), tokens, ended)


def prompt_ids(tokenizer: Tokenizer, text: str, *, plain: bool = False) -> tuple[int, ...]:
    """A user's message as the model's chat template has it, up to where the answer begins; the text to go on from where
    the model has no template, or if `plain`. RequestError if the template refuses it."""
    if plain or not tokenizer.chats:
        return tuple(tokenizer.encode(text))
    return tuple(tokenizer.chat((Message("user", text),)))
