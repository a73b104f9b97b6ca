"""JointInference: the cascade for people with two models and no event loop."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import msgspec
import numpy as np

from edgewise.engines.base import Capabilities, Generator, Predictor
from edgewise.errors import EngineError, RemoteBroken, UsageError
from edgewise.joint.breaker import Breaker, BreakerSettings
from edgewise.joint.core import Case, Core, Stats, Verdict, verdict
from edgewise.joint.policy import Policy
from edgewise.joint.signals.evidence import Evidence
from edgewise.types import Message, Request, Route

T = TypeVar("T")

AVAILABLE_WITHIN_S = 1.0  # an is_available() that takes longer is a no

# A client whose calls fail at once costs nothing, and has is_available() to say when it is back: it is left alone after
# silence, or after several failures in a row.
PLAIN_CLIENT = BreakerSettings(unreachable=3, refused=3)


class CloudClient(Protocol):
    """The cloud as a plain object. Both calls may block, hang or raise: each runs in a thread of its own."""

    def is_available(self) -> bool: ...

    def infer(self, x: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a tier returned, untouched, and how to read the evidence off it, which is done for the edge alone."""

    output: Any
    read: Callable[[], Evidence]


_Answers = AsyncGenerator[_Answer]  # one, or none from a cloud that says that it is not available
_Edge = Callable[[Any], Callable[[], _Answers]]  # the first call is made in the caller's thread
_Cloud = Callable[[Any], _Answers]


class JointInference:
    """The edge model answers; if its confidence is not above `confidence_threshold`, the cloud does; if the cloud does
    not deliver, the edge's answer stands.

    `edge_model` is anything that can be called and gives logits: an array, an object with `.logits`, or a mapping with
    "logits" (torch tensors and numpy arrays alike, [..., classes]). It is called in the caller's thread. The confidence
    is the greatest softmax probability, of a batch that of its least confident row: the batch goes one way as a whole.
    Or it is a Generator: then the input is a prompt, the output a text, and the confidence that of the default policy.
    Or a Predictor. `cloud_client` is a CloudClient, a Generator, a Predictor, or None.

    `infer` may be called from any thread, also inside a running event loop, which it blocks. Generators and Predictors
    run on an event loop of ours, in a thread of its own. The models stay their owner's: nothing here closes them.
    """

    def __init__(
        self,
        edge_model: Callable[[Any], Any] | Generator | Predictor,
        cloud_client: CloudClient | Generator | Predictor | None = None,
        *,
        confidence_threshold: float = 0.8,
        cloud_timeout_s: float = 10.0,
    ) -> None:
        if not 0.0 < cloud_timeout_s <= 3600.0:
            raise UsageError(f"cloud_timeout_s is {cloud_timeout_s!r}; allowed are seconds above 0, at most 3600")
        self.confidence_threshold = confidence_threshold
        self._edge = _edge_tier(edge_model)
        self._cloud = None if cloud_client is None else _cloud_tier(cloud_client)
        basis = Policy.default() if _is_generator(edge_model) else Policy.softmax(confidence_threshold)
        self._core = Core(_with_timeout(basis, cloud_timeout_s * 1000), Breaker(PLAIN_CLIENT))

    @property
    def stats(self) -> Stats:
        """Counts of routes and reasons."""
        return self._core.stats

    def infer(self, input_data: Any) -> tuple[Any, Route]:
        """The answer, the very object that its tier returned, and its route: "edge", "cloud" or "edge_fallback".

        Raises what the edge raised if the cloud has no answer either, and UsageError if the edge's output holds no
        logits."""
        policy = self._core.policy.with_threshold(self.confidence_threshold)
        cloud = self._cloud
        case = Case(
            edge=self._edge(input_data),
            cloud=None if cloud is None else lambda _: cloud(input_data),
            judge=partial(_judge, policy),
            enough=bool,
            speaks=lambda _: True,
            ends=lambda _: True,
            stream=False,
            wish="auto",
            deadline=None,
        )
        answer, decision = _in_loop_thread(self._core.single(case))
        return answer.output, decision.route


def _judge(policy: Policy, answers: Sequence[_Answer], whole: bool) -> Verdict:
    return verdict(policy.whole.judge, answers[0].read(), policy.whole.threshold)


def _with_timeout(policy: Policy, timeout_ms: float) -> Policy:
    """One limit for the whole answer, which is the only piece that a tier gives here."""
    limits = msgspec.structs.replace(policy.cloud, first_token_ms=timeout_ms, total_ms=timeout_ms)
    return msgspec.structs.replace(policy, cloud=limits)


# What a model may be


def _edge_tier(model: Any) -> _Edge:
    if _is_generator(model):
        return lambda x: partial(_from_generator, model, x)
    if _is_predictor(model):
        return lambda x: partial(_from_predictor, model, x)
    if callable(model):
        return partial(_call_model, model)
    raise UsageError(
        f"the edge model is a {type(model).__name__}",
        hint="give something that can be called and returns logits, a Generator or a Predictor",
    )


def _cloud_tier(client: Any) -> _Cloud:
    if _is_generator(client):
        return partial(_from_generator, client)
    if _is_predictor(client):
        return partial(_from_predictor, client)
    if callable(getattr(client, "is_available", None)) and callable(getattr(client, "infer", None)):
        return partial(_from_client, client)
    raise UsageError(
        f"the cloud client is a {type(client).__name__}",
        hint="give an object with is_available() and infer(x), a Generator, a Predictor or None",
    )


def _is_generator(model: object) -> bool:
    """By its capabilities: many models have a method `generate`."""
    return isinstance(getattr(model, "can", None), Capabilities)


def _is_predictor(model: object) -> bool:
    return inspect.iscoroutinefunction(getattr(model, "predict", None))


# Each kind of model as a tier


def _call_model(model: Callable[[Any], Any], x: Any) -> Callable[[], _Answers]:
    """Called here and now, where the caller's gradient mode, device and other thread-local state hold."""
    try:
        output = model(x)
    except Exception as error:  # whatever the model raises, the cloud may still answer
        return partial(_replay, error)
    return partial(_replay, _Answer(output, partial(_read_logits, output)))


async def _replay(outcome: _Answer | Exception) -> _Answers:
    if isinstance(outcome, Exception):
        raise outcome
    yield outcome


async def _from_client(client: CloudClient, x: Any) -> _Answers:
    async with asyncio.timeout(AVAILABLE_WITHIN_S):
        available = await _in_own_thread(client.is_available)
    if available:
        output = await _in_own_thread(client.infer, x)
        yield _Answer(output, partial(_read_logits, output))


async def _from_predictor(predictor: Predictor, inputs: Any) -> _Answers:
    outputs = await predictor.predict(inputs)
    yield _Answer(outputs, partial(_read_logits, outputs))


async def _from_generator(generator: Generator, prompt: Any) -> _Answers:
    if not isinstance(prompt, str):
        raise UsageError(f"a Generator answers a prompt of type str, not {type(prompt).__name__}")
    request = Request((Message("user", prompt),), logprobs=generator.can.logprobs)
    chunks = [chunk async for chunk in generator.generate(request)]
    if not chunks or chunks[-1].finish_reason is None:
        raise EngineError(f"{generator.name} broke off its answer")
    text = "".join(chunk.text for chunk in chunks)
    tokens = [token for chunk in chunks for token in chunk.tokens]
    logprobs = [token.logprob for token in tokens]
    ending = chunks[-1].finish_reason
    yield _Answer(text, partial(Evidence, prompt, None, text, logprobs, tokens, ending))


def _read_logits(output: Any) -> Evidence:
    """The evidence of a model's output, by what it can do and not by its library, which is never imported."""
    found: Any = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if hasattr(found, "detach"):  # a torch tensor: off its graph and device, and bfloat16 is nothing to numpy
        found = found.detach().cpu().float()
    try:
        logits = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError):
        logits = None
    if logits is None or logits.ndim == 0:
        raise UsageError(
            f"the edge model returned a {type(output).__name__} without logits",
            hint='return an array [..., classes], an object with `.logits`, or a mapping with "logits"',
        )
    return Evidence(logits=logits)


# Threads


async def _in_own_thread(call: Callable[..., T], *args: Any) -> T:
    """Run a call that may hang for ever. A daemon thread, unlike a pool's, cannot hold up the interpreter's exit."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()
    context = copy_context()

    def settle(result: T | None, error: BaseException | None) -> None:
        if not ended.done():  # done: nobody waits any more
            ended.set_result((result, error))

    def work() -> None:
        try:
            loop.call_soon_threadsafe(settle, context.run(call, *args), None)
        except BaseException as error:  # SystemExit too: in a client's call it ends the call and not our loop
            loop.call_soon_threadsafe(settle, None, error)

    threading.Thread(target=work, name="edgewise-cloud-call", daemon=True).start()
    result, error = await ended
    if error is None:
        return cast(T, result)
    raise error if isinstance(error, Exception) else RemoteBroken(f"the cloud client raised {error!r}")


_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: after a fork there is no thread to run the parent's
_loops_lock = threading.Lock()


def _in_loop_thread(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the process's own loop, from any thread, inside another running loop or not."""
    with _loops_lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="edgewise-joint", daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:  # an interrupt of the caller, which must stop the work too
        future.cancel()
        raise
