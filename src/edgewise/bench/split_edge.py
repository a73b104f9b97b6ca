"""A split model to be measured: an edge in this process, its worker in one of its own, and answers with their times."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgewise.engines.base import Stage, StageRow
from edgewise.engines.decode import Decoder
from edgewise.engines.load import loaded
from edgewise.engines.local import LocalModel, set_threads
from edgewise.errors import EdgewiseError, EngineError
from edgewise.models.bundle import Bundle
from edgewise.split.channel import Way
from edgewise.split.model import SplitModel, SplitOptions
from edgewise.types import Request
from edgewise.wire.codec import codec

END_S: Final = 20.0  # that a worker has to end by itself
TAIL: Final = 400  # characters of a failed worker's last words


class WorkerProcess:
    """`edgewise split serve` of a bundle. It keeps its port when it is started again; EngineError if it does not start.
    The settings of whoever measures do not reach it."""

    def __init__(self, bundle: Path, core: int | None = None) -> None:
        """`core`: the one that it computes on, with one thread; None: all."""
        self._core = core
        self._command = [sys.executable, "-m", "edgewise.cli.main", "split", "serve", "--model", str(bundle)]
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - for the life of this object
        self._process: subprocess.Popen[str] | None = None
        self._port = 0
        self.url = ""

    def __enter__(self) -> WorkerProcess:
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()
        self._words.close()

    def start(self) -> None:
        """Returns once it is ready."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith("EDGEWISE_")}
        self._process = subprocess.Popen(
            [*self._command, "--port", str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env=plain | {"EDGEWISE_CONFIG": os.devnull} | ({} if self._core is None else {"EDGEWISE_THREADS": "1"}),
            preexec_fn=None if self._core is None else partial(os.sched_setaffinity, 0, {self._core}),
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._words.seek(0)
            words = self._words.read().decode(errors="replace").strip()[-TAIL:]
            raise EngineError(f"the worker did not start: {words or self._process.returncode}")
        self.url = str(json.loads(line)["url"])
        self._port = int(self.url.rsplit(":", 1)[1])

    def kill(self) -> None:
        """As the kernel would: nothing is said and nothing is kept."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.communicate(timeout=END_S)
            except subprocess.TimeoutExpired:
                self.kill()


@dataclass(frozen=True, slots=True)
class Answer:
    """`ids` of the tokens that came and when each reached its reader, in seconds from the request. `failed` says why
    there are fewer than were asked for."""

    ids: list[int]
    at_s: list[float]
    failed: str | None = None

    @property
    def tok_s(self) -> float:
        """Tokens a second after the first."""
        return (len(self.ids) - 1) / (self.at_s[-1] - self.at_s[0])


async def answer(
    decoder: Decoder, prompt: Sequence[int], new: int, seen: Callable[[int], None] = lambda count: None
) -> Answer:
    """The greedy answer of `new` tokens. `seen` hears how many there are: 0 when the request is made, then at each."""
    request = Request(prompt_ids=tuple(prompt), max_tokens=new, ignore_eos=True)
    ids: list[int] = []
    at_s: list[float] = []
    began_s = time.perf_counter()
    seen(0)
    try:
        async for chunk in decoder.generate(request):
            for token in chunk.tokens:
                ids.append(token.id)
                at_s.append(time.perf_counter() - began_s)
                seen(len(ids))
    except EdgewiseError as e:
        return Answer(ids, at_s, f"{type(e).__name__}: {e.message}")
    return Answer(ids, at_s)


@dataclass(frozen=True, slots=True)
class Edge:
    """A split model and a decoder over it. One session at a time, so that each prompt begins from nothing but what it
    has in common with the one before."""

    model: SplitModel
    decoder: Decoder
    engine: LocalModel[Any]
    front: Stage  # of the same engine, for `tail_s`
    back: Stage

    async def tail_s(self, ids: Sequence[int], cut: int, codec_name: str) -> float:
        """Seconds that the layers from `cut` on take for the boundary rows of these ids, while nothing else runs."""
        rows, coding = np.array(ids, np.int64), codec(codec_name, self.engine.gains(cut))
        await self.front.open("front", len(ids), range(cut))
        await self.back.open("back", len(ids), range(cut, self.engine.card.layers))
        (hidden,) = await self.front.forward([StageRow("front", 0, self.engine.embed(rows), len(ids))])
        hidden = coding.decode(coding.encode(hidden), self.front.hidden)
        began_s = time.perf_counter()
        await self.back.forward([StageRow("back", 0, hidden, 1)])
        took_s = time.perf_counter() - began_s
        await self.front.close("front")
        await self.back.close("back")
        return took_s


@asynccontextmanager
async def edge(bundle: Bundle, url: str, cut: int, codec_name: str) -> AsyncIterator[Edge]:
    engine, tokenizer = loaded(bundle, slots=1)
    model = SplitModel(engine, bundle.weights, [Way(url)], SplitOptions(cut, codec_name))
    decoder = Decoder(model, tokenizer)
    try:
        yield Edge(model, decoder, engine, engine.stage(), engine.stage())
    finally:
        await decoder.close()


@asynccontextmanager
async def whole(bundle: Bundle) -> AsyncIterator[Decoder]:
    """The same model, undivided."""
    engine, tokenizer = loaded(bundle, slots=1)
    decoder = Decoder(engine, tokenizer)
    try:
        yield decoder
    finally:
        await decoder.close()


def timed(job: dict[str, Any]) -> dict[str, Any]:
    """One turn in a process of its own: the tokens a second of one answer, split at `cut` with the worker at `url`, or
    whole where that is None. With a `core` it computes on that one alone. For the worker of turns."""
    if job["core"] is not None:
        os.sched_setaffinity(0, {job["core"]})
        set_threads(1)
    return asyncio.run(_turn(job))


async def _turn(job: dict[str, Any]) -> dict[str, Any]:
    bundle = Bundle.open(Path(job["bundle"]))
    if job["url"] is None:
        async with whole(bundle) as decoder:
            return await _timed(decoder, job)
    async with edge(bundle, job["url"], job["cut"], job["codec"]) as split:
        found = await _timed(split.decoder, job)
        if split.model.tally.here:
            raise EngineError(f"{split.model.tally.here} tokens were computed here: {split.model.tally.last_loss}")
        return found


async def _timed(decoder: Decoder, job: dict[str, Any]) -> dict[str, Any]:
    await answer(decoder, job["warm_up"], job["new"] // 4 + 2)
    found = await answer(decoder, job["prompt"], job["new"])
    if found.failed is not None:
        raise EngineError(found.failed)
    return {"tok_s": found.tok_s, "first_token_ms": found.at_s[0] * 1e3, "ids": found.ids}
