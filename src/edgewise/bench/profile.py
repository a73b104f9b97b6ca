"""Where the time of a request goes: phases, graphs and operators, KV memory and queue waits.

Three things are noted while requests run, and everything is made of them: the calls of the model and the tokenizer
(watch.py), and the runs of graphs, as the runtime records them (runs.py). shares.py says what of it is whose; view.py
makes the trace and the page's tables.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgewise.bench import view
from edgewise.bench.runs import Time, now, recording
from edgewise.bench.shares import Answer, Watched, placed, shared_out
from edgewise.bench.trace import check_place, library, write
from edgewise.bench.watch import Log, WatchedModel, WatchedTokenizer, number
from edgewise.engines.base import Tokenizer, TokenModel
from edgewise.engines.decode import Decoder
from edgewise.engines.load import chosen_runtime, kv_bytes_per_token, local_model
from edgewise.models.bundle import Bundle
from edgewise.models.tokenizer import Tokenizer as BundleTokenizer
from edgewise.settings import Mode, ModelSettings, Runtime
from edgewise.types import Chunk, Message, Request

DEFAULTS = ModelSettings()


def profile(
    bundle: Bundle,
    messages: Sequence[Message],
    *,
    max_tokens: int,
    requests: int = 1,
    runtime: Runtime = DEFAULTS.runtime,
    mode: Mode = DEFAULTS.mode,
    slots: int = DEFAULTS.slots,
    context: int | None = DEFAULTS.context,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Answer the prompt `requests` times at once, first unwatched and then watched, and say where the time went; with
    `trace`, also as a Perfetto trace in that file. The answers are greedy. If a trace is wanted and cannot be written,
    nothing runs: MissingExtra without the perfetto package, UsageError or OSError for the path."""
    if trace is not None:
        library()
        check_place(trace)
    request = Request(tuple(messages), max_tokens=max_tokens)
    tokenizer = BundleTokenizer.open(bundle.path)

    def load() -> TokenModel:
        return local_model(bundle, runtime=runtime, mode=mode, slots=slots, context=context)

    unwatched = _serve(load(), tokenizer, request, requests, Log())
    log = Log()
    with recording(chosen_runtime(bundle, runtime), bundle) as recorded:
        model = WatchedModel(load(), log)
        answers = _serve(model, WatchedTokenizer(tokenizer, log), request, requests, log)
        graphs = recorded.finish()
    watched = Watched(shared_out(log, answers), placed(graphs, log), kv_bytes_per_token(bundle, runtime))
    if trace is not None:
        write(trace, f"edgewise {bundle.name}", view.tracks(watched), view.counters(watched))
    about = {"model": bundle.name, "runtime": recorded.runtime, "timed": recorded.timed, "mode": mode}
    return about | view.summary(watched, unwatched)


def _serve(model: TokenModel, tokenizer: Tokenizer, request: Request, count: int, log: Log) -> list[Answer]:
    """The requests answered side by side by a model of their own, after a warm-up of the same shape that is not logged
    and leaves no KV that they could use."""
    prompt = tokenizer.chat(request.messages)
    other = (prompt[0] + 1) % model.vocab
    warming = Request(prompt_ids=(other,) * len(prompt), max_tokens=2, ignore_eos=True)

    async def run() -> list[Answer]:
        decoder = Decoder(model, tokenizer)
        try:
            async for _ in decoder.generate(warming):
                pass
            log.begin()
            return await asyncio.gather(*(_answer(decoder, request, n + 1, log) for n in range(count)))
        finally:
            await decoder.close()

    return asyncio.run(run())


async def _answer(decoder: Decoder, request: Request, which: int, log: Log) -> Answer:
    number.set(which)  # each task of gather has a context of its own
    start = now()
    chunks: list[Chunk] = [chunk async for chunk in decoder.generate(request)]
    end, last = now(), chunks[-1]
    assert last.usage is not None
    assert last.timings is not None
    return Answer(which, Time(start, end), log.prompts.get(which, Time(start, start)), last.usage, last.timings)
