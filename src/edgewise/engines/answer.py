"""What every engine does around an answer: check the request, turn bytes into text, keep the time, cross threads."""

from __future__ import annotations

import asyncio
import codecs
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Generic, TypeVar

from edgewise.engines.base import Capabilities
from edgewise.errors import DeadlineExceeded, RequestError
from edgewise.types import RANGES, Chunk, Request, Sampling, Timings

T = TypeVar("T")

LEAST_SPAN_S: Final = 1e-3  # tokens that come closer together tell how fast buffers are, not how fast the model is
_NEUTRAL = Sampling()
_EVERYWHERE: Final = frozenset({"temperature", "seed"})  # besides top_p; whether there is a seed is asked apart


def check_request(request: Request, can: Capabilities, *, elsewhere: str | None = None) -> None:
    """RequestError, naming the field, for what no engine or not this engine can honour. `elsewhere` is the hint where
    another engine at hand may take token ids."""
    try:
        _check_tokens(request, can)
    except RequestError as e:
        raise RequestError(e.message, param=e.param, hint=elsewhere) from None
    _check_prompt(request)
    _check_sampling(request.sampling, can)
    if request.max_tokens < 1:
        raise _refused("max_tokens", request.max_tokens, "1 or more")
    if "" in request.stop:
        raise _refused("stop", "an empty string", "strings of one character or more")
    if request.logprobs and not can.logprobs:
        raise _refused("logprobs", True, "false with this engine")
    if not 0 <= request.top_logprobs <= can.top_logprobs:
        raise _refused("top_logprobs", request.top_logprobs, f"0 to {can.top_logprobs}")
    if request.deadline_ms is not None and not request.deadline_ms > 0:
        raise _refused("deadline_ms", request.deadline_ms, "above 0")


def _check_tokens(request: Request, can: Capabilities) -> None:
    """A token id means one model's token."""
    if request.prompt_ids is not None and not can.prompt_ids:
        raise _refused("prompt_ids", f"{len(request.prompt_ids)} ids", "text alone here: an id means one model's token")
    if (count := len(request.sampling.logit_bias)) and "logit_bias" not in can.sampling:
        raise _refused("logit_bias", f"given for {count} ids", "none here: an id means one model's token")


def _check_prompt(request: Request) -> None:
    if bool(request.messages) + (request.prompt is not None) + (request.prompt_ids is not None) != 1:
        raise _refused("messages", "several or none", "exactly one of messages, prompt and prompt_ids")
    if request.prompt == "":
        raise _refused("prompt", "empty", "a text of one character or more")
    if request.prompt_ids == ():
        raise _refused("prompt_ids", "no ids", "one id or more")


def _check_sampling(sampling: Sampling, can: Capabilities) -> None:
    if not 0.0 < sampling.top_p <= 1.0:
        raise _refused("top_p", sampling.top_p, "above 0 and at most 1")
    if sampling.seed is not None and not can.seed:
        raise _refused("seed", sampling.seed, "no seed with this engine")
    for name in RANGES.keys() - {"logit_bias"}:
        value, neutral = getattr(sampling, name), getattr(_NEUTRAL, name)
        if value is not None:
            _check_range(name, value)
        if value != neutral and name not in can.sampling | _EVERYWHERE:
            raise _refused(name, value, f"{neutral:g} alone here")
    if sampling.logit_bias:
        _check_bias(sampling.logit_bias, can)


def _check_bias(pairs: Sequence[tuple[int, float]], can: Capabilities) -> None:
    vocab = 2**31 if can.vocab is None else can.vocab
    for token, bias in pairs:
        if not 0 <= token < vocab:
            raise _refused("logit_bias", f"given for the token id {token}", f"0 to {vocab - 1}")
        _check_range("logit_bias", bias, f" for the token id {token}")
    if len({token for token, _ in pairs}) < len(pairs):
        raise _refused("logit_bias", "given twice for one token id", "once for each id")


def _check_range(name: str, value: float, of: str = "") -> None:
    low, high = RANGES[name]
    if not low <= value <= high:
        raise _refused(name, f"{value}{of}", f"{low:.10g} to {high:.10g}" if name != "seed" else f"{low} to {high}")


def _refused(param: str, seen: object, allowed: str) -> RequestError:
    return RequestError(f"{param} is {seen}, allowed is {allowed}", param=param)


class TextStream:
    """Bytes of tokens in, final text out.

    Incomplete UTF-8 is held back until it is complete; bytes that can never become a character are U+FFFD. Any tail
    that could be the start of a stop string is held back too. The text ends where the first stop string to be
    completed begins (the longest, if several end at the same character), so it does not depend on how the bytes
    were cut into tokens.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, raw: bytes) -> str:
        """The text that became final with these bytes."""
        return self._advance(self._decoder.decode(raw))

    def finish(self) -> str:
        """The rest: nothing more will be pushed."""
        if self.stopped:
            return ""
        text = self._advance(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _advance(self, text: str) -> str:
        if not self._stop or self.stopped:
            return "" if self.stopped else text
        self._held += text
        matches = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if matches:
            self.stopped = True
            return self._held[: min(matches)[1]]
        keep = self._possible_start()
        final, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return final

    def _possible_start(self) -> int:
        """Length of the longest tail with which a stop string may begin."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


class Stopwatch:
    """The time of one request, from its start: the deadline, and the Timings of its last chunk."""

    def __init__(self, deadline_ms: float | None = None) -> None:
        self._started = time.monotonic()
        self._deadline_ms = deadline_ms
        self._first = self._last = self._started
        self._tokens = 0

    def token(self, at: float | None = None) -> None:
        """A token is there, since the time `at` of the monotonic clock if it lay in a buffer."""
        self._last = time.monotonic() if at is None else at
        if not self._tokens:
            self._first = self._last
        self._tokens += 1

    def remaining_s(self) -> float:
        """Seconds until the deadline; infinite without one."""
        if self._deadline_ms is None:
            return math.inf
        return self._started + self._deadline_ms / 1000 - time.monotonic()

    def check(self) -> None:
        """DeadlineExceeded if the time is up."""
        if self.remaining_s() <= 0:
            raise self.exceeded()

    def exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"the request's deadline of {self._deadline_ms} ms passed after {self._tokens} tokens",
            hint="allow more time or fewer tokens",
        )

    def timings(self) -> Timings:
        now = time.monotonic()
        first = self._first if self._tokens else now
        span = self._last - self._first
        return Timings(
            first_token_ms=(first - self._started) * 1000,
            total_ms=(now - self._started) * 1000,
            decode_tok_s=(self._tokens - 1) / span if span >= LEAST_SPAN_S else None,
        )


class Inbox(Generic[T]):
    """What a worker thread makes, read on the event loop on which this was built, by one reader. The deadline ends the
    reading even if the worker is stuck. A reader who is late does not slow the worker down: what waits here is at most
    one whole answer."""

    def __init__(self, watch: Stopwatch) -> None:
        self.loop = asyncio.get_running_loop()
        self.left = False  # nobody reads any more; the worker may stop
        self._items: deque[T | Exception] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        if (remaining_s := watch.remaining_s()) < math.inf:
            self._timer = self.loop.call_later(max(0.0, remaining_s), lambda: self.put(watch.exceeded()))

    def put(self, item: T | Exception) -> None:
        """On the loop; another thread sends it there with `loop.call_soon_threadsafe`."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> T:
        """The next item; an exception among them is raised."""
        while not self._items:
            self._waiter = self.loop.create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    async def ready(self, most: int) -> list[T]:
        """Wait for an item; it and those behind it that are there already, `most` in all. An exception among them is
        raised by the call after."""
        items = [await self.next()]
        while len(items) < most and self._items and not isinstance(self._items[0], Exception):
            items.append(await self.next())
        return items

    def leave(self) -> None:
        self.left = True
        if self._timer is not None:
            self._timer.cancel()


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks of one answer that follow each other, as one."""
    if len(chunks) == 1:
        return chunks[0]
    text = "".join(chunk.text for chunk in chunks)
    return replace(chunks[-1], text=text, tokens=tuple(token for chunk in chunks for token in chunk.tokens))
