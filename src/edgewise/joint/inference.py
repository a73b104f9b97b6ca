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
import numpy.typing as npt

from edgewise.engines.base import Capabilities, Generator, Predictor
from edgewise.errors import EngineError, RemoteBroken, UsageError
from edgewise.joint.batch import Batch, evidence_of, joined, rows_of
from edgewise.joint.breaker import Breaker, BreakerSettings
from edgewise.joint.core import Case, Core, Stats, Verdict
from edgewise.joint.policy import CONFIDENCE, Policy
from edgewise.joint.signals.evidence import Evidence
from edgewise.types import Decision, Message, Request, Route

Logits = npt.NDArray[np.generic]
T = TypeVar("T")

MOST_RUNS = 100
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
    read: Callable[[], Sequence[Evidence]]  # one a row


_Answers = AsyncGenerator[_Answer]  # one, or none from a cloud that says that it is not available
_Edge = Callable[[Any], Callable[[], _Answers]]  # the first call is made in the caller's thread
_Cloud = Callable[[Any], _Answers]


class JointInference:
    """The edge model answers; if its confidence is not above `confidence_threshold`, the cloud does; if the cloud does
    not deliver, the edge's answer stands.

    `edge_model` is anything that can be called and gives logits: an array, an object with `.logits`, or a mapping with
    "logits" (torch tensors and numpy arrays alike, [..., classes]). It is called in the caller's thread. The confidence
    is the greatest softmax probability, of a batch that of its least confident row: by `infer` the batch goes one way
    as a whole, by `infer_batch` each row its own. Or it is a Generator: then the input is a prompt, the output a text,
    and the confidence that of the default policy. Or a Predictor. `cloud_client` is a CloudClient, a Generator, a
    Predictor, None, or a JointInference, which makes three tiers of two.

    `policy` decides instead of that rule: one that `edgewise calibrate` made, whose threshold `confidence_threshold`
    then is. With `edge_runs` above 1 an edge model that answers differently each time (as with dropout) is called so
    often; its first answer counts, and how many runs agree is a signal.

    `infer` may be called from any thread, also inside a running event loop, which it blocks. Generators and Predictors
    run on an event loop of ours, in a thread of its own. The models stay their owner's: nothing here closes them.
    """

    def __init__(
        self,
        edge_model: Callable[[Any], Any] | Generator | Predictor,
        cloud_client: CloudClient | Generator | Predictor | JointInference | None = None,
        *,
        confidence_threshold: float | None = None,
        cloud_timeout_s: float = 10.0,
        policy: Policy | None = None,
        edge_runs: int = 1,
    ) -> None:
        if not 0.0 < cloud_timeout_s <= 3600.0:
            raise UsageError(f"cloud_timeout_s is {cloud_timeout_s!r}; allowed are seconds above 0, at most 3600")
        if not 1 <= edge_runs <= MOST_RUNS or (edge_runs > 1 and _is_generator(edge_model)):
            raise UsageError(f"edge_runs is {edge_runs}; allowed are 1 to {MOST_RUNS}, for models that give logits")
        self._edge = _edge_tier(edge_model, edge_runs)
        self._cloud = None if cloud_client is None else _cloud_tier(cloud_client)
        basis = policy or (Policy.default() if _is_generator(edge_model) else Policy.softmax(CONFIDENCE))
        given = basis.whole.threshold if policy is not None else CONFIDENCE
        self.confidence_threshold = given if confidence_threshold is None else confidence_threshold
        basis.with_threshold(self.confidence_threshold)  # says what is allowed
        self._core = Core(_with_timeout(basis, cloud_timeout_s * 1000), Breaker(PLAIN_CLIENT))

    @property
    def stats(self) -> Stats:
        """Counts of routes and reasons."""
        return self._core.stats

    def infer(self, input_data: Any) -> tuple[Any, Route]:
        """The answer, the very object that its tier returned, and its route: "edge", "cloud" or "edge_fallback".

        Raises what the edge raised if the cloud has no answer either, and UsageError if the edge's output holds no
        logits."""
        answer, decision = self._answer(self._batch(), input_data, self._cloud)
        return answer.output, decision.route

    def infer_batch(self, input_data: Any) -> tuple[Logits, tuple[Route, ...]]:
        """The logits [rows, ..., classes] and each row's route. The edge answers the whole batch; the rows that it is
        not sure of go to the cloud in one call, as `input_data[[3, 5]]` (or the same of every tensor in a mapping).

        Raises as `infer` does; a cloud whose logits are not of those rows and classes counts as one without an answer.
        """
        batch, cloud = self._batch(), self._cloud
        near: list[_Answer] = []

        async def rest(x: Any) -> _Answers:
            assert cloud is not None, "there is no cloud to ask"
            rows = batch.asked
            async for answer in cloud(rows_of(x, rows)):
                found = _logits(answer.output)
                yield _Answer(found if rows is None else joined(_logits(near[0].output), found, rows, "logits"), list)

        answer, decision = self._answer(batch, input_data, None if cloud is None else rest, near)
        logits = _logits(answer.output)
        return logits, tuple(one.route for one in batch.decisions(decision, len(logits) if logits.ndim > 1 else 1))

    def _batch(self) -> Batch:
        judge = self._core.policy.whole.judge
        return Batch(judge, self._core.policy.with_threshold(self.confidence_threshold).whole.threshold)

    def _answer(
        self, batch: Batch, x: Any, cloud: _Cloud | None, near: list[_Answer] | None = None
    ) -> tuple[_Answer, Decision]:
        """`near` gets the edge's answer."""

        def judge(answers: Sequence[_Answer], whole: bool) -> Verdict:
            if near is not None:
                near[:] = answers
            return batch.look(answers[0].read())

        case = Case(
            edge=self._edge(x),
            cloud=None if cloud is None else lambda _: cloud(x),
            judge=judge,
            enough=bool,
            speaks=lambda _: True,
            ends=lambda _: True,
            stream=False,
            wish="auto",
            deadline=None,
        )
        return _in_loop_thread(self._core.single(case))


def _with_timeout(policy: Policy, timeout_ms: float) -> Policy:
    """One limit for the whole answer, which is the only piece that a tier gives here."""
    limits = msgspec.structs.replace(policy.cloud, first_token_ms=timeout_ms, total_ms=timeout_ms)
    return msgspec.structs.replace(policy, cloud=limits)


# What a model may be


def _edge_tier(model: Any, runs: int) -> _Edge:
    if _is_generator(model):
        return lambda x: partial(_from_generator, model, x)
    if _is_predictor(model):
        return lambda x: partial(_from_predictor, model, x, runs)
    if callable(model):
        return partial(_call_model, model, runs)
    raise UsageError(
        f"the edge model is a {type(model).__name__}",
        hint="give something that can be called and returns logits, a Generator or a Predictor",
    )


def _cloud_tier(client: Any) -> _Cloud:
    if _is_generator(client):
        return partial(_from_generator, client)
    if _is_predictor(client):
        return partial(_from_predictor, client)
    if isinstance(client, JointInference):
        return partial(_from_joint, client)
    if callable(getattr(client, "is_available", None)) and callable(getattr(client, "infer", None)):
        return partial(_from_client, client)
    raise UsageError(
        f"the cloud client is a {type(client).__name__}",
        hint="give an object with is_available() and infer(x), a Generator, a Predictor, a JointInference or None",
    )


def _is_generator(model: object) -> bool:
    """By its capabilities: many models have a method `generate`."""
    return isinstance(getattr(model, "can", None), Capabilities)


def _is_predictor(model: object) -> bool:
    return inspect.iscoroutinefunction(getattr(model, "predict", None))


# Each kind of model as a tier


def _call_model(model: Callable[[Any], Any], runs: int, x: Any) -> Callable[[], _Answers]:
    """Called here and now, where the caller's gradient mode, device and other thread-local state hold."""
    try:
        outputs = [model(x) for _ in range(runs)]
    except Exception as error:  # whatever the model raises, the cloud may still answer
        return partial(_replay, error)
    return partial(_replay, _Answer(outputs[0], partial(_read, outputs)))


async def _replay(outcome: _Answer | Exception) -> _Answers:
    if isinstance(outcome, Exception):
        raise outcome
    yield outcome


async def _from_client(client: CloudClient, x: Any) -> _Answers:
    async with asyncio.timeout(AVAILABLE_WITHIN_S):
        available = await _in_own_thread(client.is_available)
    if available:
        output = await _in_own_thread(client.infer, x)
        yield _Answer(output, partial(_read, [output]))


async def _from_joint(joint: JointInference, x: Any) -> _Answers:
    output, _ = await _in_own_thread(joint.infer, x)
    yield _Answer(output, partial(_read, [output]))


async def _from_predictor(predictor: Predictor, inputs: Any, runs: int = 1) -> _Answers:
    outputs = [await predictor.predict(inputs) for _ in range(runs)]
    yield _Answer(outputs[0], partial(_read, outputs))


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
    yield _Answer(text, lambda: [Evidence(prompt, None, text, logprobs, tokens, ending)])


def _read(outputs: Sequence[Any]) -> Sequence[Evidence]:
    """The evidence of a model's outputs, the first of which counts, row by row."""
    logits = [_logits(output) for output in outputs]
    return evidence_of(logits[0], logits if len(logits) > 1 else ())


def _logits(output: Any) -> Logits:
    """The logits of a model's output, by what it can do and not by its library, which is never imported."""
    found: Any = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if hasattr(found, "detach"):  # a torch tensor: off its graph and device, and bfloat16 is nothing to numpy
        found = found.detach().cpu().float()
    try:
        logits = np.asarray(found)
        logits = logits if logits.dtype.kind == "f" else logits.astype(np.float64)
    except (TypeError, ValueError):
        logits = None
    if logits is None or logits.ndim == 0:
        raise UsageError(
            f"the edge model returned a {type(output).__name__} without logits",
            hint='return an array [..., classes], an object with `.logits`, or a mapping with "logits"',
        )
    return logits


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
