"""llama.cpp in this process, through xllamacpp: for every GGUF that has no bundle.

xllamacpp runs llama.cpp's server, which always listens on a loopback port too; a random key shuts that door, and the
requests go in through function calls. Each such call blocks for as long as its answer takes, in a thread of a pool that
belongs to the engine.
"""

from __future__ import annotations

import asyncio
import importlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from edgewise.engines.answer import Inbox, Stopwatch, check_request
from edgewise.engines.base import ALL_SAMPLING, Capabilities
from edgewise.engines.decode import DecodeOptions
from edgewise.errors import (
    ContextFull,
    EdgewiseError,
    EngineClosed,
    EngineError,
    MissingExtra,
    Overloaded,
    RequestError,
    SourceError,
    UsageError,
)
from edgewise.models.gguf import GGUF
from edgewise.types import Candidate, Chunk, FinishReason, Request, Token, Usage

Event = Mapping[str, Any]  # one piece of an answer, as llama.cpp's server would send it

TEMPLATE = "tokenizer.chat_template"  # the field of a GGUF file

_DEFAULT_CONTEXT = 8192  # llama.cpp allocates the whole KV at once; models trained for 128k would take gigabytes
_CONTEXT_STEP = 256  # llama.cpp rounds up to it
_SEEDS = 2**32 - 1  # llama.cpp's seeds; the one above means "random"
_COUNTED_DIFFERENTLY = {"presence_penalty", "frequency_penalty"}  # llama.cpp counts the prompt's tokens too
_PREFILL_CHUNK = DecodeOptions().prefill_chunk
_QUEUE = DecodeOptions().queue


class LlamaCpp:
    """A Generator over a GGUF file. `slots` requests run at once, more wait.

    `context` (tokens for each slot) is rounded up to a multiple of 256; None is what the model was trained for, at
    most 8192. A character of several tokens arrives as one Token with the id and the log-prob of its last. SourceError
    if the file is damaged or llama.cpp cannot load it, MissingExtra without xllamacpp. Used from one event loop.
    """

    def __init__(self, path: Path, *, context: int | None = None, slots: int = 1, threads: int | None = None) -> None:
        fields = GGUF.open(path).fields
        per_slot = _context(fields, context)
        self._chats = TEMPLATE in fields
        self.name = path.stem
        self.can = Capabilities(
            logprobs=True,
            top_logprobs=20,
            seed=True,
            sampling=ALL_SAMPLING - _COUNTED_DIFFERENTLY,
            prompt_ids=True,
            context=per_slot,
            vocab=_vocab(fields),
        )
        self._slots = slots
        self._server: Any = _load(path, per_slot, slots, threads)
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix=f"llamacpp {self.name}")
        self._running = 0
        self._closed = False

    def generate(self, request: Request) -> AsyncIterator[Chunk]:
        return self._answer(request, Stopwatch(request.deadline_ms))

    async def close(self) -> None:
        self._closed = True  # each running call sees it at its next token
        await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)
        self._server = None

    async def _answer(self, request: Request, watch: Stopwatch) -> AsyncIterator[Chunk]:
        check_request(request, self.can)
        if request.messages and not self._chats:  # llama.cpp would take ChatML, whatever the model was taught
            raise RequestError(
                f"{self.name} has no chat template, so it cannot take messages",
                param="messages",
                hint="send a prompt, or use an instruction-tuned model",
            )
        self._check_room()
        inbox: Inbox[Event | None] = Inbox(watch)
        work = self._start(request, inbox)
        reply = _Reply(request, watch, self.name)
        self._running += 1
        try:
            while (event := await inbox.next()) is not None:
                chunk = reply.read(event)
                if chunk is not None:
                    yield chunk
            yield reply.last() or self._raise_cut_off(work)
        finally:
            self._running -= 1
            inbox.leave()
            work.cancel()  # has an effect only while it waits for a thread

    def _check_room(self) -> None:
        if self._closed:
            raise EngineClosed(f"{self.name} was closed", hint="open the model again")
        if self._running >= self._slots + _QUEUE:
            raise Overloaded(
                f"{self.name} has {self._running} requests, at most {self._slots + _QUEUE} are taken",
                hint="ask again later",
            )

    def _start(self, request: Request, inbox: Inbox[Event | None]) -> asyncio.Future[object]:
        """The blocking call, in a thread of the pool. The inbox gets its events, and None when it is over."""

        def hear(event: Event) -> bool:
            """Called there for each piece of the prompt and for each token; true stops llama.cpp."""
            if inbox.left or self._closed:
                return True
            inbox.loop.call_soon_threadsafe(inbox.put, event)  # an error here (a closed loop) stops it too
            return False

        handle = self._server.handle_chat_completions if request.messages else self._server.handle_completions
        work = inbox.loop.run_in_executor(self._pool, handle, _body(request, self.can.context), hear)
        work.add_done_callback(lambda _: inbox.put(None))
        return work

    def _raise_cut_off(self, work: asyncio.Future[object]) -> NoReturn:
        """The call ended without a finish reason."""
        if self._closed:
            raise EngineClosed(f"{self.name} was closed", hint="open the model again")
        raise EngineError(f"llama.cpp broke off the answer of {self.name}") from work.exception()


class _Reply:
    """Reads the events of one answer."""

    def __init__(self, request: Request, watch: Stopwatch, name: str) -> None:
        self._request, self._watch, self._name = request, watch, name
        self._reason: FinishReason | None = None
        self._usage = Usage(0, 0)

    def read(self, event: Event) -> Chunk | None:
        """The chunk of this event, if it brings text or tokens. RequestError or EngineError if llama.cpp says no."""
        if "error" in event:
            raise self._refusal(event["error"])
        if "usage" in event:
            self._usage = _usage(event["usage"])
        for choice in event["choices"]:
            reason = choice["finish_reason"]
            if reason is not None:
                self._reason = "length" if reason == "length" else "stop"
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            tokens = tuple(self._token(item) for item in (choice.get("logprobs") or {}).get("content", ()))
            if text or tokens:
                return Chunk(text, tokens, model=self._name)
        return None

    def last(self) -> Chunk | None:
        """What ends the answer, None if it was cut off."""
        if self._reason is None:
            return None
        return Chunk(finish_reason=self._reason, usage=self._usage, timings=self._watch.timings(), model=self._name)

    def _token(self, item: Event) -> Token:
        self._watch.token()
        top = tuple(_candidate(other) for other in item["top_logprobs"][: self._request.top_logprobs])
        best = _candidate(item)
        return Token(best.id, best.raw, best.logprob, top)

    def _refusal(self, error: Event) -> EdgewiseError:
        if error["type"] == "exceed_context_size_error":
            return ContextFull(error["n_prompt_tokens"] + 1, error["n_ctx"], param=self._request.prompt_field)
        if error["type"] == "invalid_request_error":
            message = f"llama.cpp refused the request: {error['message']}"
            return RequestError(message, param=self._request.prompt_field)
        return EngineError(f"llama.cpp failed: {error['message']}")


def _candidate(item: Event) -> Candidate:
    return Candidate(item["id"], bytes(item["bytes"]), min(0.0, item["logprob"]))


def _usage(usage: Event) -> Usage:
    return Usage(usage["prompt_tokens"], usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


def _body(request: Request, context: int | None) -> dict[str, object]:
    """The request as llama.cpp's server takes it, without those of its own defaults that change the answer, and with
    its samplers in the order of engines/sampling.py."""
    sampling = request.sampling
    body: dict[str, object] = {
        "max_tokens": request.max_tokens,
        "stop": list(request.stop),
        "ignore_eos": request.ignore_eos,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": context,  # of all tokens, not of the last 64
        "logit_bias": [[token, bias] for token, bias in sampling.logit_bias],
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,  # calls back while the prompt is filled, so that it can be stopped there
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed % _SEEDS
    if not request.messages:
        prompt = request.prompt if request.prompt_ids is None else list(request.prompt_ids)
        return body | {"prompt": prompt, "n_probs": max(1, request.top_logprobs)}
    messages = [{"role": message.role, "content": message.content} for message in request.messages]
    return body | {"messages": messages, "logprobs": True, "top_logprobs": max(1, request.top_logprobs)}


def _context(fields: Mapping[str, object], wanted: int | None) -> int:
    trained = fields.get(f"{fields.get('general.architecture')}.context_length")
    most = trained if isinstance(trained, int) else _DEFAULT_CONTEXT
    if wanted is not None and not 1 <= wanted <= most:
        raise UsageError(f"a context of {wanted} tokens was asked for, the model has 1 to {most}")
    return -(-(wanted or min(most, _DEFAULT_CONTEXT)) // _CONTEXT_STEP) * _CONTEXT_STEP


def _vocab(fields: Mapping[str, object]) -> int | None:
    tokens = fields.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, Sized) else None


def _load(path: Path, context: int, slots: int, threads: int | None) -> Any:
    try:
        library = importlib.import_module("xllamacpp")
    except ImportError as error:
        raise MissingExtra("xllamacpp", "llamacpp") from error
    params = library.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx, params.kv_unified = slots, slots * context, False
    params.n_batch = _PREFILL_CHUNK
    params.cache_ram_mib = 0  # its store of old prompts, 8 GiB unless told
    params.fit_params = False  # would shrink the context silently to what memory holds
    params.reasoning_format = library.common_reasoning_format.COMMON_REASONING_FORMAT_NONE  # all text is text
    params.api_keys, params.ui, params.endpoint_slots = [secrets.token_urlsafe(32)], False, False
    params.verbosity = 0
    if threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.endpoint_metrics = True
    try:
        server = library.Server(params)
        server.handle_metrics()  # waits for its loop: one that is ended before its loop began waits for it for ever
        return server
    except RuntimeError as error:
        raise SourceError(
            f"llama.cpp cannot load {path} with {slots} x {context} tokens of context",
            hint="its architecture may be newer than the installed xllamacpp, or the memory too small",
        ) from error
