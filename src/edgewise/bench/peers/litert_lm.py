"""LiteRT-LM on its CPU backend.

Its model has to be made elsewhere (`litert-torch export_hf` needs an environment of its own) and is given with
`--peer-model litert-lm=FILE.litertlm`. Speeds are those of the benchmark in its own library, which fills a prompt of
the length asked for and decodes exactly as many tokens; it takes no token ids from outside. Cold start is that of a
session on a short text. It shows neither token ids nor distributions, so it has no KL.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from edgewise.bench.peers.base import Answer, Room, Source
from edgewise.errors import UnsupportedModel

SHORT = "The ferry left at six"
SHORT_LIMIT = 32  # tokens; up to here a prompt is only there to be the first


def prepare(source: Source, work: Path, variant: str) -> Path:
    raise UnsupportedModel(
        "LiteRT-LM needs a .litertlm file",
        hint="make one with `litert-torch export_hf` and give --peer-model litert-lm=FILE",
    )


def load(model: Path, room: Room, variant: str) -> LiteRTLM:
    if room.streams > 1:
        raise UnsupportedModel(f"LiteRT-LM answers one request at a time, {room.streams} were asked for")
    return LiteRTLM(model, room)


class LiteRTLM:
    def __init__(self, model: Path, room: Room) -> None:
        self._library = importlib.import_module("litert_lm")
        self._library.set_min_log_severity(self._library.LogSeverity.ERROR)
        self._model, self._room = str(model), room

    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        backend = self._library.Backend.CPU(thread_count=self._room.threads)
        if len(prompts[0]) <= SHORT_LIMIT and new == 1:
            return [self._first_token(backend)]
        info = self._library.Benchmark(
            self._model,
            backend=backend,
            prefill_tokens=len(prompts[0]),
            decode_tokens=new,
            max_num_tokens=self._room.context,
        ).run()
        first = info.time_to_first_token_in_second
        decoding = (info.last_decode_token_count - 1) / info.last_decode_tokens_per_second
        return [Answer(info.last_decode_token_count, first, first + decoding)]

    def greedy(self, prompt: Sequence[int], new: int) -> None:
        return None

    def logits(self, ids: Sequence[int]) -> None:
        return None

    def _first_token(self, backend: object) -> Answer:
        with (
            self._library.Engine(self._model, backend=backend, max_num_tokens=self._room.context) as engine,
            engine.create_session(apply_prompt_template=False) as session,
        ):
            session.run_prefill([SHORT])
            next(iter(session.run_decode_async()))
            session.cancel_process()
        return Answer(1, 0.0, 0.0)
