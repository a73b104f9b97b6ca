"""A Generator over any TokenModel: sampling, stops, log-probs, interleaving and prefix reuse live here, once.

One thread per loaded model, the step thread, runs an event loop of its own with one scheduler in it. A local model
blocks inside `forward`, a remote one awaits there; the scheduler does not care. Requests come in through a lock; what
a step produced goes back in one call per waiting event loop.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from edgewise.engines.answer import Inbox, Stopwatch, TextStream, check_request, joined
from edgewise.engines.base import ALL_SAMPLING, Capabilities, Row, Tokenizer, TokenModel
from edgewise.engines.sampling import Choice, Sampler
from edgewise.errors import ContextFull, EdgewiseError, EngineClosed, EngineError, Overloaded, RequestError
from edgewise.types import Best, Candidate, Chunk, FinishReason, FloatArray, IdArray, Request, Token, Usage

TOGETHER = 64  # most chunks that become one when their reader is late; it bounds what is sent at once


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How the scheduler divides the model among requests."""

    queue: int = 64  # requests that may wait for a slot; one more is Overloaded
    prefill_chunk: int = 512  # most prompt tokens in one step, all requests together


class Decoder:
    """A Generator over `model`, which it owns from now on: `close()` shuts it down.

    Up to `model.slots` requests run at once, each one token a step; prompts are filled in chunks in between, in turn. A
    finished request leaves its KV behind, and a later one that begins with the same tokens starts from there
    (`usage.cached_tokens`). A prompt that leaves no room for one token is ContextFull; an answer that reaches the
    end of the context before `max_tokens` ends there with finish_reason "length". The stop token is neither in the text
    nor among the tokens; with `ignore_eos` it is a token like any other.

    Any event loop of the process may use it. What goes wrong in the model is an EngineError (or the model's own
    EdgewiseError) of the requests in that step alone.
    """

    def __init__(
        self,
        model: TokenModel,
        tokenizer: Tokenizer,
        *,
        name: str | None = None,
        options: DecodeOptions = DecodeOptions(),
    ) -> None:
        self.name = name or model.name
        self.can = Capabilities(
            logprobs=True,
            top_logprobs=20,
            seed=True,
            sampling=ALL_SAMPLING,
            prompt_ids=True,
            context=model.context,
            vocab=model.vocab,
        )
        self._vocab, self._context, self._tokenizer = model.vocab, model.context, tokenizer
        self._scheduler = _Scheduler(model, tokenizer, self.name, options)
        # Without close() the thread ends with this object, or at exit while the interpreter is still whole.
        weakref.finalize(self, self._scheduler.stop, timeout_s=5.0)

    def generate(self, request: Request) -> AsyncIterator[Chunk]:
        return self._answer(request, Stopwatch(request.deadline_ms))

    async def close(self) -> None:
        await asyncio.to_thread(self._scheduler.stop)

    async def _answer(self, request: Request, watch: Stopwatch) -> AsyncIterator[Chunk]:
        check_request(request, self.can)
        self._scheduler.check_room()
        job = _Job(request, await asyncio.to_thread(self._prompt, request), watch)
        try:
            self._scheduler.submit(job)
            while True:
                chunk = joined(await job.inbox.ready(TOGETHER))
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            job.inbox.leave()

    def _prompt(self, request: Request) -> IdArray:
        param, ids = request.prompt_field, self._ids(request)
        if len(ids) + 1 > self._context:
            raise ContextFull(len(ids) + 1, self._context, param=param)
        wrong = next((i for i in ids if not 0 <= i < self._vocab), None)
        if wrong is not None or not ids:
            seen = "an empty prompt" if wrong is None else f"the token id {wrong}"
            raise RequestError(f"{param} gives {seen}, allowed are ids from 0 to {self._vocab - 1}", param=param)
        return np.array(ids, np.int64)

    def _ids(self, request: Request) -> Sequence[int]:
        if request.prompt_ids is not None:
            return request.prompt_ids
        if request.prompt is not None:
            return self._tokenizer.encode(request.prompt)
        return self._tokenizer.chat(request.messages)


class _Job:
    """A request on its way: made and read on the caller's loop, worked on in the step thread."""

    def __init__(self, request: Request, prompt: IdArray, watch: Stopwatch) -> None:
        self.request, self.prompt, self.watch = request, prompt, watch
        self.inbox: Inbox[Chunk] = Inbox(watch)

    @property
    def left(self) -> bool:
        """Nobody reads it any more: the scheduler drops it before its next step."""
        return self.inbox.left


class _Slot:
    """A session of the model and the ids whose KV it holds."""

    def __init__(self, session: str, context: int) -> None:
        self.session = session
        self._ids = np.empty(context, np.int64)
        self.length = 0

    def append(self, ids: IdArray) -> None:
        self._ids[self.length : self.length + len(ids)] = ids
        self.length += len(ids)

    def common(self, prompt: IdArray) -> int:
        """How many positions can be kept for this prompt. Its last token is always computed, to have its logits."""
        most = min(self.length, len(prompt) - 1)
        differ = self._ids[:most] != prompt[:most]
        return int(differ.argmax()) if differ.any() else most


class _Task:
    """A job that has a slot. It computes what of the prompt the slot does not hold, then a token a step."""

    def __init__(self, job: _Job, slot: _Slot, tokenizer: Tokenizer, name: str, context: int) -> None:
        self.job, self.slot = job, slot
        self._tokenizer, self._name = tokenizer, name
        self._cached = slot.length
        self._todo = job.prompt[slot.length :]  # ids that must be computed before the next token can be chosen
        self._sampler = Sampler(job.request.sampling, job.request.top_logprobs, job.prompt)
        self._text = TextStream(job.request.stop)
        self._count = 0
        self._most = min(job.request.max_tokens, context - len(job.prompt))
        self._stop_ids = frozenset() if job.request.ignore_eos else tokenizer.stop_ids

    @property
    def filling(self) -> bool:
        return self._count == 0

    def row(self, most: int) -> Row:
        ids = self._todo[:most]
        return Row(self.slot.session, self.slot.length, ids, int(len(ids) == len(self._todo)), self._sampler.best)

    def advance(self, row: Row, result: FloatArray | Best) -> Chunk | None:
        """The row was computed; what came of it is None while the prompt is not complete."""
        self.slot.append(row.ids)
        self._todo = self._todo[len(row.ids) :]
        if not row.want:
            return None
        if isinstance(result, Best):
            return self._next(self._sampler.take(result))
        return self._next(self._sampler.choose(result[-1]))

    def _next(self, choice: Choice) -> Chunk:
        if choice.id in self._stop_ids:
            return self._last("", (), "stop")
        self._count += 1
        self.job.watch.token()
        token = self._token(choice)
        self._todo = np.array([choice.id], np.int64)
        text = self._text.push(token.raw)
        if self._text.stopped:
            return self._last(text, (token,), "stop")
        if self._count == self._most:
            return self._last(text, (token,), "length")
        return Chunk(text, (token,), model=self._name)

    def _token(self, choice: Choice) -> Token:
        top = tuple(Candidate(i, self._tokenizer.token_bytes(i), logprob) for i, logprob in choice.top)
        return Token(choice.id, self._tokenizer.token_bytes(choice.id), choice.logprob, top)

    def _last(self, text: str, tokens: tuple[Token, ...], reason: FinishReason) -> Chunk:
        rest = self._text.finish()
        return Chunk(
            text + rest,
            tokens,
            finish_reason="stop" if self._text.stopped else reason,
            usage=Usage(len(self.job.prompt), self._count, self._cached),
            timings=self.job.watch.timings(),
            model=self._name,
        )


class _Scheduler:
    """Owns the model and the step thread. `submit`, `check_room` and `stop` are for other threads; the rest runs in the
    step thread."""

    def __init__(self, model: TokenModel, tokenizer: Tokenizer, name: str, options: DecodeOptions) -> None:
        self._model, self._tokenizer, self._name, self._options = model, tokenizer, name, options
        self._lock = threading.Lock()  # over _waiting and _stopping
        self._waiting: deque[_Job] = deque()
        self._stopping = False
        self._bug: Exception | None = None
        self._active: list[_Task] = []
        self._idle: list[_Slot] = []  # the least recently used first
        self._opened = 0
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[Inbox[Chunk], Chunk | Exception]]] = {}
        self._sleeping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name=f"step {name}", daemon=True)
        self._thread.start()

    def check_room(self) -> None:
        """EngineClosed or Overloaded if a request that came now would be refused."""
        with self._lock:
            self._check_room()

    def _check_room(self) -> None:
        if self._stopping:
            raise self._closed()
        running = sum(not task.job.left for task in self._active)
        waiting = sum(not job.left for job in self._waiting)
        if running + waiting >= self._model.slots + self._options.queue:
            raise Overloaded(
                f"{self._name} runs {running} requests and {waiting} wait; at most {self._options.queue} may wait",
                hint="ask again later",
            )

    def submit(self, job: _Job) -> None:
        with self._lock:
            self._check_room()
            self._waiting.append(job)
        if self._sleeping:
            self._call(self._wake.set)

    def stop(self, timeout_s: float | None = None) -> None:
        """End all requests with EngineClosed, shut the model down, join the thread. Idempotent."""
        with self._lock:
            self._stopping = True
        if self._loop is not None:
            self._call(self._work.cancel)
        if threading.current_thread() is not self._thread:  # the garbage collector may run this in any thread
            self._thread.join(timeout_s)

    def _call(self, function: Callable[[], object]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # its loop is closed: the thread has ended and there is nothing to wake
            self._loop.call_soon_threadsafe(function)

    async def _main(self) -> None:
        self._wake = asyncio.Event()
        self._work = asyncio.ensure_future(self._run())
        self._loop = asyncio.get_running_loop()  # from here on the other threads call
        try:
            await self._work
        except asyncio.CancelledError:
            pass  # by stop(), which does not wait for a remote model's answer
        except Exception as bug:  # our own; no reader may wait for ever because of it
            self._bug = bug
        self._end_all()
        await self._model.shutdown()

    async def _run(self) -> None:
        while not self._stopping:
            self._drop_left()
            await self._admit()
            if self._active:
                await self._step()
            self._post()
            if not self._active:
                await self._sleep()

    async def _sleep(self) -> None:
        """Until `submit` or `stop` wakes us. They act and then look at `_sleeping`; we do it the other way round, so
        nothing slips through between."""
        self._wake.clear()
        self._sleeping = True
        if not self._waiting and not self._stopping:
            await self._wake.wait()
        self._sleeping = False

    def _drop_left(self) -> None:
        for task in [task for task in self._active if task.job.left]:
            self._retire(task)
        with self._lock:
            self._waiting = deque(job for job in self._waiting if not job.left)

    async def _admit(self) -> None:
        while self._waiting and len(self._active) < self._model.slots:
            job = self._waiting[0]
            try:
                self._idle.append(slot := await self._slot_for(job.prompt))  # idle, should the next line fail
                self._active.append(_Task(job, slot, self._tokenizer, self._name, self._model.context))
                self._idle.remove(slot)
            except Exception as error:
                self._end(job, error)
            with self._lock:
                self._waiting.popleft()  # only now, so that it is found and ended if we are stopped while we wait above

    async def _slot_for(self, prompt: IdArray) -> _Slot:
        """A slot that holds some beginning of the prompt and nothing else. An idle one is taken over if that saves half
        of the prompt or if no other can be opened: the one with the most in common, else the least recently used."""
        slot = max(self._idle, key=lambda slot: slot.common(prompt), default=None)
        full = len(self._idle) + len(self._active) >= self._model.slots
        if slot is None or not (full or slot.common(prompt) * 2 >= len(prompt)):
            self._opened += 1
            slot = _Slot(f"{self._name}/{self._opened}", self._model.context)
            await self._model.open(slot.session, self._model.context)
            return slot
        self._idle.remove(slot)
        slot.length = slot.common(prompt)  # the model rewinds with the first row
        return slot

    async def _step(self) -> None:
        tasks = [task for task in self._active if not task.filling]
        filling = next((task for task in self._active if task.filling), None)
        if filling is not None:
            tasks.append(filling)
            self._active.remove(filling)  # to the end: prompts are filled in turn
            self._active.append(filling)
        rows = [task.row(self._options.prefill_chunk) for task in tasks]
        try:
            results = list(zip(tasks, rows, await self._model.forward(rows), strict=True))
        except Exception as error:
            for task in tasks:
                await self._fail(task, error)
            return
        for task, row, result in results:
            await self._advance(task, row, result)

    async def _advance(self, task: _Task, row: Row, result: FloatArray | Best) -> None:
        try:
            chunk = task.advance(row, result)
        except Exception as error:
            await self._fail(task, error)
            return
        if chunk is not None:
            self._give(task.job, chunk)
            if chunk.finish_reason is not None:
                self._retire(task)

    def _retire(self, task: _Task) -> None:
        self._active.remove(task)
        self._idle.append(task.slot)

    async def _fail(self, task: _Task, error: Exception) -> None:
        """End the task with the error. Its KV is not trusted any more, so the session goes too."""
        self._active.remove(task)
        self._end(task.job, error)
        with suppress(Exception):  # the caller gets the error that came first
            await self._model.close(task.slot.session)

    def _closed(self) -> EngineClosed:
        what = "was closed" if self._bug is None else f"stopped working: {self._bug!r}"
        error = EngineClosed(f"{self._name} {what}", hint="open the model again")
        error.__cause__ = self._bug
        return error

    def _end_all(self) -> None:
        with self._lock:
            self._stopping = True
            jobs = [task.job for task in self._active] + list(self._waiting)
            self._active, self._waiting = [], deque()
        for job in jobs:
            self._end(job, self._closed())
        self._post()

    def _end(self, job: _Job, error: Exception) -> None:
        if not isinstance(error, EdgewiseError):
            cause = error
            error = EngineError(f"{self._name} failed: {type(cause).__name__}: {cause}", hint="other requests go on")
            error.__cause__ = cause
        self._give(job, error)

    def _give(self, job: _Job, item: Chunk | Exception) -> None:
        self._outbox.setdefault(job.inbox.loop, []).append((job.inbox, item))

    def _post(self) -> None:
        """Hand over what the step produced: one call per event loop, however many tokens."""
        for loop, items in self._outbox.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:  # that loop was closed, and its readers with it
                for inbox, _ in items:
                    inbox.left = True
        self._outbox.clear()


def _deliver(items: list[tuple[Inbox[Chunk], Chunk | Exception]]) -> None:
    for inbox, item in items:
        inbox.put(item)
