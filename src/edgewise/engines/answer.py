"""What every engine does around an answer: check the request, turn bytes into text, keep the time, cross threads."""

from __future__ import annotations

import asyncio
import codecs
import math
import time
from collections.abc import Sequence
from typing import Generic, TypeVar

from edgewise.engines.base import Capabilities
from edgewise.errors import DeadlineExceeded, RequestError
from edgewise.types import Request, Timings

T = TypeVar("T")


def check_request(request: Request, can: Capabilities) -> None:
    """RequestError, naming the field, for what no engine or not this engine can honour."""
    if (request.prompt_ids is None) == (not request.messages):
        raise _refused("messages", "both or neither", "exactly one of messages and prompt_ids")
    if request.prompt_ids is not None:
        _check_prompt_ids(request.prompt_ids, can)
    sampling = request.sampling
    if not 0.0 <= sampling.temperature < math.inf:
        raise _refused("temperature", sampling.temperature, "a finite number >= 0")
    if not 0.0 < sampling.top_p <= 1.0:
        raise _refused("top_p", sampling.top_p, "above 0 and at most 1")
    if sampling.seed is not None and not (can.seed and 0 <= sampling.seed < 2**63):
        raise _refused("seed", sampling.seed, "0 to 2**63 - 1" if can.seed else "no seed with this engine")
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


def _check_prompt_ids(ids: Sequence[int], can: Capabilities) -> None:
    if not can.prompt_ids:
        raise _refused("prompt_ids", f"{len(ids)} ids", "messages only with this engine")
    if not ids:
        raise _refused("prompt_ids", "no ids", "one id or more")


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

    def token(self) -> None:
        """A token is there."""
        self._last = time.monotonic()
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
            decode_tok_s=(self._tokens - 1) / span if span > 0 else None,
        )


class Inbox(Generic[T]):
    """What a worker thread makes, read on the event loop on which this was built. The deadline ends the reading even if
    the worker is stuck."""

    def __init__(self, watch: Stopwatch) -> None:
        self.loop = asyncio.get_running_loop()
        self.left = False  # nobody reads any more; the worker may stop
        self._items: asyncio.Queue[T | Exception] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        if (remaining_s := watch.remaining_s()) < math.inf:
            self._timer = self.loop.call_later(max(0.0, remaining_s), lambda: self.put(watch.exceeded()))

    def put(self, item: T | Exception) -> None:
        """On the loop; another thread sends it there with `loop.call_soon_threadsafe`."""
        self._items.put_nowait(item)

    async def next(self) -> T:
        """The next item; an exception among them is raised."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def leave(self) -> None:
        self.left = True
        if self._timer is not None:
            self._timer.cancel()
