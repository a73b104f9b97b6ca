"""llama.cpp, through xllamacpp's server object, called in this process: no socket and no JSON of ours in the way.

Its own defaults hold where they are its best on a CPU: batches of 2048 in pieces of 512, float16 KV. Three variants, as
none is its best in everything: `as-is` is all defaults, which turn flash attention on; `plain` is without, which
decodes faster here; `int8` is that with the model rewritten in 8-bit blocks (Q8_0), which prefills faster. Switched
off: the reuse of earlier prompts, the store of old prompts (8 GiB), and the shrinking of the context to what memory
holds. The server warms the model up while it loads, which its cold start pays for.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.bench.peers.base import Answer, Room, Source
from edgewise.bench.peers.gguf_int8 import to_int8
from edgewise.errors import UnsupportedModel
from edgewise.types import FloatArray

TOLD = 4096  # tokens of each distribution: all 49152 of them take half a second of JSON for each position
EVERYTHING = 1 << 20  # more than any vocabulary; the server stops at its own
FORCE = 1000.0  # a bias above the range of any logits


def prepare(source: Source, work: Path, variant: str) -> Path:
    if source.path.suffix != ".gguf":
        raise UnsupportedModel(f"llama.cpp runs GGUF files, {source.path.name} is none")
    if variant != "int8":
        return source.path
    rewritten = work / "int8.gguf"
    if not rewritten.is_file():
        part = work / "part.gguf"
        to_int8(source.path, part)
        part.replace(rewritten)
    return rewritten


def load(model: Path, room: Room, variant: str) -> LlamaCpp:
    library = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path = str(model)
    params.n_parallel, params.n_ctx, params.kv_unified = room.streams, room.streams * room.context, False
    params.cache_ram_mib = 0
    params.fit_params = False
    params.ui, params.endpoint_slots = False, False
    params.verbosity = 0
    if variant != "as-is":
        params.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = room.threads
    return LlamaCpp(library.Server(params), room.streams)


class LlamaCpp:
    def __init__(self, server: Any, streams: int) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(streams)

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        start = time.perf_counter()

        def answer(prompt: Sequence[int]) -> Answer:
            timings = self._ask(prompt, n_predict=new)["timings"]
            last = time.perf_counter() - start
            # Its clock of the answer starts with the first token; the rest of the call lies before that.
            return Answer(timings["predicted_n"], last - timings["predicted_ms"] / 1e3, last)

        return list(self._pool.map(answer, prompts))

    def greedy(self, prompt: Sequence[int], new: int) -> list[int] | None:
        """None where a token ends within a character: the server reports none of its bytes' tokens."""
        answer = self._ask(prompt, n_predict=new, n_probs=1)
        told = (answer["choices"][0]["logprobs"] or {"content": ()})["content"]
        return [token["id"] for token in told] if len(told) == new else None

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """Log-probabilities of the TOLD most probable tokens after each prefix, as the server reports them with one new
        token; the prefix is kept from call to call, so that each call computes one row."""
        vocab = len(self._next(ids[:1], ids[0], EVERYTHING))
        out = np.full((len(ids), vocab), np.nan, np.float32)
        for at, row in enumerate(out):
            top = self._next(ids[: at + 1], ids[0], TOLD)
            row[[token["id"] for token in top]] = [token["logprob"] for token in top]
        return out

    def _next(self, prefix: Sequence[int], forced: int, count: int) -> list[dict[str, Any]]:
        """What could follow. The token that does follow is a whole word of the text, as part of a character would have
        no report; the probabilities are those before the bias."""
        bias = [[forced, FORCE]]
        answer = self._ask(prefix, n_predict=1, n_probs=count, cache_prompt=True, logit_bias=bias)
        top: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return top

    def _ask(self, prompt: Sequence[int], **more: object) -> dict[str, Any]:
        body = {"prompt": list(prompt), "temperature": 0, "ignore_eos": True, "cache_prompt": False} | more
        answer: dict[str, Any] = self._server.handle_completions(body)
        if "error" in answer:
            raise RuntimeError(f"llama.cpp refused: {answer['error']}")
        return answer
