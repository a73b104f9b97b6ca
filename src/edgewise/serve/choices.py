"""Several answers to one request: each is a request of its own to the generator, and decides its own way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from edgewise.engines.base import Generator
from edgewise.types import Chunk, Request, Usage

T = TypeVar("T")
Indexed = tuple[int, Chunk]

AHEAD = 16  # chunks of each answer that may wait for their reader


async def interleaved(generator: Generator, requests: Sequence[Request]) -> AsyncGenerator[Indexed]:
    """The chunks of all answers as they come, each with the index of its request. The first error ends them all."""
    if len(requests) == 1:
        async with closing(generator.generate(requests[0])) as chunks:
            async for chunk in chunks:
                yield 0, chunk
        return
    queue: asyncio.Queue[Indexed | Exception | None] = asyncio.Queue(AHEAD * len(requests))
    tasks = [asyncio.create_task(_read(generator, *pair, queue)) for pair in enumerate(requests)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _read(
    generator: Generator, index: int, request: Request, queue: asyncio.Queue[Indexed | Exception | None]
) -> None:
    """Put the chunks of one answer into the queue, and at its end None or what went wrong."""
    ending = None
    try:
        async with closing(generator.generate(request)) as chunks:
            async for chunk in chunks:
                await queue.put((index, chunk))
    except Exception as error:  # it is raised where the queue is read
        ending = error
    await queue.put(ending)


def total(usages: Sequence[Usage | None], choices: int) -> Usage | None:
    """The usage of answers to prompts of `choices` answers each: a prompt counts once, with what its first answer says.
    None if one is not known."""
    known = [usage for usage in usages if usage is not None]
    if len(known) < len(usages):
        return None
    firsts = known[::choices]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in firsts),
        completion_tokens=sum(usage.completion_tokens for usage in known),
        cached_tokens=sum(usage.cached_tokens for usage in firsts),
    )


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Leaving early stops the engine's work now, and not when the iterator happens to be collected."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
