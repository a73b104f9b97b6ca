"""A network on two sides as a Predictor: cut where an answer comes soonest, answered here when the cloud is silent."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from edgewise.devices.links import LinkProfile
from edgewise.errors import BadFrame, EngineClosed, RemoteError, RemoteTimeout
from edgewise.models.graph import Graph
from edgewise.split.halves import Halves, read_answer
from edgewise.split.profile import Plan
from edgewise.wire.feature import decode, encode

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
There = Callable[[bytes], Awaitable[bytes]]
Route = Literal["edge", "cloud", "split", "edge_fallback"]
T = TypeVar("T")

NEW: Final = 0.4  # the weight of the latest answer in what is believed of the link
LOGITS: Final = "logits"


class Planner(Protocol):
    """Plans of split/profile.py, or another way to choose."""

    def at(self, link: LinkProfile) -> Plan: ...

    def nearest(self, link: LinkProfile) -> Plan | None:
        """The best that asks the cloud, which is asked now and then to hear how the link is; None: never."""
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for the cloud: `times` what the plan expects of it, at least `least_s` and at most `most_s`.
    After a failure it is left alone for `rest_s`, twice as long after each further one, up to `longest_rest_s`. Where
    the plan is to ask nobody, one input in `look_s` is sent all the same, to see whether the link got better."""

    times: float = 3.0
    least_s: float = 0.15
    most_s: float = 10.0
    rest_s: float = 0.5
    longest_rest_s: float = 30.0
    look_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Last:
    """How the last answer came: bytes are of features or of the upload, and of what came back."""

    route: Route
    plan: Plan
    up_bytes: int = 0
    down_bytes: int = 0
    elapsed_s: float = 0.0


class SplitPredictor:
    """`plans` say where the network of `graph` is cut over `link`, which is what is believed of the way until answers
    tell. `there` takes the bytes of features to a BackHalf of the same file and brings back its answer: BackHalf.answer
    itself, or a way over a network; what it raises as RemoteError, and its silence, cost a request nothing but time:
    the second half then runs here, on the same decoded features, so the answer is the one that the cloud would have
    given. `packed` makes of the inputs what the cloud alone is sent (a JPEG's bytes as uint8, say), for the BackHalf's
    `unpacked`; without it the inputs go as they are.

    `predict` may be called concurrently; computing takes turns. `stats` counts routes, `last` is of the last answer."""

    def __init__(
        self,
        graph: Graph,
        plans: Planner,
        there: There,
        link: LinkProfile,
        *,
        packed: Callable[[Tensors], Tensors] | None = None,
        patience: Patience | None = None,
        name: str | None = None,
    ) -> None:
        self.name = graph.name if name is None else name
        self.link = link
        self.stats: Counter[Route] = Counter()
        self.last: Last | None = None
        self._graph, self._plans, self._there, self._packed = graph, plans, there, packed
        self._patience = patience or Patience()
        self._halves: dict[frozenset[int], Halves] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"split {self.name}")
        self._rest_until_s, self._failures, self._looked_s = 0.0, 0, time.monotonic()
        self._looking: asyncio.Task[None] | None = None
        self._closed = False

    async def predict(self, inputs: Tensors) -> Tensors:
        """All outputs by name, `logits` among them if the file has one output. RequestError for inputs that the file
        does not take, EngineError if the runtime fails here, EngineClosed after `close`."""
        if self._closed:
            raise EngineClosed(f"{self.name} was closed", hint="make a new one")
        plan, began_s = self._plans.at(self.link), time.monotonic()
        resting = began_s < self._rest_until_s
        if plan.place == "edge" or resting:
            outputs, last = await self._alone(inputs), Last("edge" if plan.place == "edge" else "edge_fallback", plan)
            self._look(inputs, began_s)
        else:
            outputs, last = await self._together(inputs, plan)
        self.last = replace(last, elapsed_s=time.monotonic() - began_s)
        self.stats[last.route] += 1
        return _with_logits(outputs)

    async def close(self) -> None:
        """Free the network; `there` stays its owner's. Idempotent."""
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking
        await asyncio.to_thread(self._pool.shutdown)
        for halves in self._halves.values():
            halves.close()

    # Here

    async def _alone(self, inputs: Tensors) -> Tensors:
        everything = frozenset(range(len(self._graph.units)))
        _, outputs = await self._aside(lambda: self._cut(everything).front(inputs))
        return outputs

    def _cut(self, edge: frozenset[int]) -> Halves:
        """Loaded when it is first needed; called in the pool's one thread."""
        if edge not in self._halves:
            self._halves[edge] = Halves(self._graph, edge)
        return self._halves[edge]

    async def _aside(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    # There

    async def _together(self, inputs: Tensors, plan: Plan) -> tuple[Tensors, Last]:
        sent = await self._aside(partial(self._sent, inputs, plan))
        try:
            late, down_bytes = await self._asked(sent, plan)
        except RemoteError:
            self._failures += 1
            rest_s = min(self._patience.rest_s * 2 ** (self._failures - 1), self._patience.longest_rest_s)
            self._rest_until_s = time.monotonic() + rest_s
            outputs = await (self._finished(sent) if plan.units else self._alone(inputs))
            return outputs, Last("edge_fallback", plan, len(sent.payload))
        self._failures = 0
        last = Last("split" if plan.units else "cloud", plan, len(sent.payload), down_bytes)
        return self._joined(sent.early, late), last

    def _sent(self, inputs: Tensors, plan: Plan) -> _Sent:
        halves = self._cut(plan.units)
        crossing, early = halves.front(inputs)
        if not plan.units and self._packed is not None:
            return _Sent(halves, encode(self._packed(inputs), "exact", label=halves.label), early)
        return _Sent(halves, encode(crossing, plan.codec or "exact", label=halves.label), early)

    async def _asked(self, sent: _Sent, plan: Plan) -> tuple[Tensors, int]:
        """The cloud's outputs and their bytes; the link is believed to be as it was for them. RemoteError."""
        payload, halves = sent.payload, sent.halves
        limit_s = self._limit_s(len(payload), plan)
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                answer = await self._there(payload)
        except TimeoutError:
            self._learn(len(payload), 0, limit_s)
            raise RemoteTimeout(
                f"the cloud was silent for {limit_s * 1000:.0f} ms", hint="it is answered here"
            ) from None
        elapsed_s = time.monotonic() - began_s
        outputs, label, computed_s = read_answer(answer)
        if label != halves.label or outputs.keys() != set(halves.late):
            raise BadFrame(f"the cloud answered for {label[:100]!r}, it was asked for {halves.label!r}")
        self._learn(len(payload), len(answer), max(elapsed_s - computed_s, 1e-6))
        return outputs, len(answer)

    def _limit_s(self, size: int, plan: Plan) -> float:
        expected_s = self._way_s(size, plan.down_bytes) + plan.cloud_s
        patience = self._patience
        return min(max(patience.times * expected_s, patience.least_s), patience.most_s)

    def _way_s(self, up: int, down: int) -> float:
        return up / self.link.up_bytes_per_s + down / self.link.down_bytes_per_s + self.link.rtt_ms / 1e3

    def _learn(self, up: int, down: int, way_s: float) -> None:
        """An answer spent so long on its way, or a silence lasted so long. The bytes are held to be what took another
        time than expected, unless they were few: then it was the round trip."""
        rtt_s = self.link.rtt_ms / 1e3
        carried_s = self._way_s(up, down) - rtt_s
        if carried_s >= rtt_s / 4:
            slower = 1 + NEW * (max(way_s - rtt_s, carried_s / 10) / carried_s - 1)
            self.link = replace(
                self.link,
                up_bytes_per_s=self.link.up_bytes_per_s / slower,
                down_bytes_per_s=self.link.down_bytes_per_s / slower,
            )
        else:
            rtt_s += NEW * (max(way_s - carried_s, rtt_s / 10) - rtt_s)
        self.link = replace(self.link, rtt_ms=min(rtt_s, way_s) * 1e3)  # which no whole way is shorter than

    async def _finished(self, sent: _Sent) -> Tensors:
        """What the cloud would have made of the same bytes."""
        return self._joined(sent.early, await self._aside(lambda: sent.halves.back(decode(sent.payload))))

    def _joined(self, early: Tensors, late: Tensors) -> Tensors:
        found = {**early, **late}
        return {name: found[name] for name in self._graph.outputs}

    def _look(self, inputs: Tensors, now_s: float) -> None:
        """Send this input too, now and then, to hear how the link is."""
        due = now_s - self._looked_s >= self._patience.look_s and now_s >= self._rest_until_s
        plan = self._plans.nearest(self.link)
        if due and plan is not None and (self._looking is None or self._looking.done()):
            self._looked_s = now_s
            self._looking = asyncio.get_running_loop().create_task(self._looked(inputs, plan))

    async def _looked(self, inputs: Tensors, plan: Plan) -> None:
        with suppress(RemoteError):
            await self._asked(await self._aside(partial(self._sent, inputs, plan)), plan)


@dataclass(frozen=True, slots=True)
class _Sent:
    """What goes to the cloud, and what is here already."""

    halves: Halves
    payload: bytes
    early: Tensors


def _with_logits(outputs: Tensors) -> Tensors:
    if LOGITS in outputs or len(outputs) != 1:
        return outputs
    (only,) = outputs.values()
    return {**outputs, LOGITS: np.asarray(only, np.float32)}
