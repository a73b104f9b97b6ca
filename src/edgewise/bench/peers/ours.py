"""Edgewise itself: as it comes in both numerics modes, and kept to onnxruntime."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bench.peers.base import Answer, Room, Source
from edgewise.engines.base import Row
from edgewise.engines.decode import Decoder
from edgewise.engines.load import loaded
from edgewise.engines.local import set_threads
from edgewise.models.bundle import Bundle
from edgewise.settings import Mode, Runtime
from edgewise.types import Best, Chunk, FloatArray, Request

VARIANTS: dict[str, tuple[Runtime, Mode]] = {
    "fast": ("auto", "fast"),
    "stable": ("auto", "stable"),
    "onnxruntime": ("onnxruntime", "fast"),
}


def prepare(source: Source, work: Path, variant: str) -> Path:
    return source.bundle


def load(model: Path, room: Room, variant: str) -> Ours:
    set_threads(room.threads)
    return Ours(Bundle.open(model, check=False), room, *VARIANTS[variant])


class Ours:
    def __init__(self, bundle: Bundle, room: Room, runtime: Runtime, mode: Mode) -> None:
        self._model, tokenizer = loaded(bundle, runtime=runtime, mode=mode, slots=room.streams, context=room.context)
        self._decoder = Decoder(self._model, tokenizer)
        self._loop = asyncio.new_event_loop()

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        async def all_at_once() -> list[list[Chunk]]:
            return await asyncio.gather(*(self._answer(prompt, new) for prompt in prompts))

        return [_timed(chunks[-1]) for chunks in self._loop.run_until_complete(all_at_once())]

    def greedy(self, prompt: Sequence[int], new: int) -> list[int]:
        chunks = self._loop.run_until_complete(self._answer(prompt, new))
        return [token.id for chunk in chunks for token in chunk.tokens]

    def logits(self, ids: Sequence[int]) -> FloatArray:
        return self._loop.run_until_complete(self._teach(np.asarray(ids, np.int64)))

    async def _answer(self, prompt: Sequence[int], new: int) -> list[Chunk]:
        request = Request(prompt_ids=tuple(prompt), max_tokens=new, ignore_eos=True)
        return [chunk async for chunk in self._decoder.generate(request)]

    async def _teach(self, ids: np.ndarray[Any, np.dtype[np.int64]]) -> FloatArray:
        """Straight through the model: the decoder chooses its own tokens."""
        out = np.empty((len(ids), self._model.vocab), np.float32)
        await self._model.open("teacher", len(ids))
        for n in range(len(ids)):
            (logits,) = await self._model.forward([Row("teacher", n, ids[n : n + 1])])
            assert not isinstance(logits, Best), "this row does not allow it"
            out[n] = logits[0]
        await self._model.close("teacher")
        return out


def _timed(last: Chunk) -> Answer:
    assert last.timings is not None, "the last chunk has the timings"
    assert last.usage is not None, "the last chunk has the usage"
    return Answer(last.usage.completion_tokens, last.timings.first_token_ms / 1e3, last.timings.total_ms / 1e3)
