"""The cascade of two Predictors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from edgewise.engines.base import Predictor
from edgewise.errors import RequestError
from edgewise.joint.batch import Batch, evidence_of, joined, rows_of
from edgewise.joint.breaker import Breaker
from edgewise.joint.cascade import Tiers
from edgewise.joint.core import Case, Trail
from edgewise.joint.policies import Policies
from edgewise.joint.policy import CONFIDENCE, Policy
from edgewise.joint.replay_log import ReplayLog, Seen
from edgewise.joint.signals.evidence import Evidence
from edgewise.types import Decision, Wish

Tensors = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is handed on of a tier: `tensors`, its own or put together. `runs` are what the edge gave in each run,
    `heard` what the cloud itself gave, of the rows `rows` (None: of all)."""

    tensors: Tensors
    runs: Sequence[Tensors] = ()
    heard: Tensors | None = None
    rows: Sequence[int] | None = None

    @property
    def evidence(self) -> Sequence[Evidence]:
        return evidence_of(self.tensors.get("logits"), [run["logits"] for run in self.runs if "logits" in run])


class PredictorCascade(Tiers[Predictor]):
    """A Predictor over two. Every row of a batch (axis 0 of all inputs and outputs) is judged by itself, and those that
    the edge is not sure of go to the cloud in one call. With no policy the confidence is the greatest softmax
    probability of `logits`. A batch that one tier answered alone comes back as that tier gave it, else only the tensors
    that both gave. With `edge_runs` above 1 the edge, which must be a network that answers differently each time, is
    asked so often; the first answer counts, and how many runs agree is a signal. The cascade owns its tiers."""

    def __init__(
        self,
        edge: Predictor,
        cloud: Predictor | None = None,
        policy: Policy | Policies | None = None,
        breaker: Breaker | None = None,
        *,
        name: str = "auto",
        log: ReplayLog | None = None,
        edge_runs: int = 1,
    ) -> None:
        super().__init__(edge, cloud, policy or Policy.softmax(CONFIDENCE), breaker, name, log)
        self._edge_runs = edge_runs

    async def predict(self, inputs: Tensors) -> Tensors:
        return (await self.decide(inputs))[0]

    async def decide(
        self, inputs: Tensors, *, wish: Wish = "auto", deadline_ms: float | None = None
    ) -> tuple[Tensors, tuple[Decision, ...]]:
        """`predict`, and by which route each row came. RequestError for a deadline that is not above 0."""
        policy = self.policy
        deadline_ms = policy.deadline_ms if deadline_ms is None else deadline_ms
        if deadline_ms is not None and not deadline_ms > 0:
            raise RequestError(f"deadline_ms is {deadline_ms}, allowed is above 0", param="deadline_ms")
        now = asyncio.get_running_loop().time()
        batch, cloud = Batch(policy.whole.judge, policy.whole.threshold), self._cloud
        follow = None if self.log is None else self.log.follow(partial(_seen, batch))
        near: list[_Answer] = []  # the edge's, if it has one

        async def ask_edge() -> AsyncGenerator[_Answer]:
            outputs = [await self._edge.predict(inputs) for _ in range(self._edge_runs)]
            near.append(_Answer(outputs[0], outputs if self._edge_runs > 1 else ()))
            yield near[0]

        async def ask_cloud(cloud: Predictor) -> AsyncGenerator[_Answer]:
            wanted = batch.asked
            asked = None if follow is not None and follow.drawn else wanted
            found = await cloud.predict(rows_of(inputs, asked))
            if wanted is None:
                yield _Answer(found, heard=found)
            else:
                served = found if asked is not None else rows_of(found, wanted)
                yield _Answer(_joined(near[0].tensors, served, wanted), heard=found, rows=asked)

        answer, made = await self._core.single(
            Case(
                edge=ask_edge,
                cloud=None if cloud is None else lambda _: ask_cloud(cloud),
                judge=lambda answers, _: batch.look(answers[0].evidence),
                enough=bool,
                speaks=lambda _: True,
                ends=lambda _: True,
                stream=False,
                wish=wish,
                deadline=None if deadline_ms is None else now + deadline_ms / 1000,
                follow=follow,
            )
        )
        return answer.tensors, batch.decisions(made, len(answer.evidence), wish)


def _joined(edge: Tensors, cloud: Tensors, rows: Sequence[int]) -> Tensors:
    return {name: joined(value, cloud[name], rows, name) for name, value in edge.items() if name in cloud}


def _seen(batch: Batch, trail: Trail[_Answer]) -> Sequence[Seen]:
    """Of each row; the cloud's answers are as good as compared where it was asked for that row."""
    if trail.edge is None:
        return []
    near = trail.edge[0].evidence
    far: dict[int, Evidence] = {}
    if trail.cloud is not None and trail.cloud[0].heard is not None:
        rows = trail.cloud[0].rows
        found = evidence_of(trail.cloud[0].heard.get("logits"))
        far = dict(zip(range(len(near)) if rows is None else rows, found, strict=False))
    decisions = batch.decisions(trail.decision, len(near))
    return [
        Seen(decision, one, far.get(row), _alike(one, far.get(row)), trail.both and decision.route == "cloud")
        for row, (one, decision) in enumerate(zip(near, decisions, strict=True))
    ]


def _alike(edge: Evidence, cloud: Evidence | None) -> float | None:
    """1 for the same most probable class, else 0; None where there is nothing to compare."""
    near, far = edge.label("class"), None if cloud is None else cloud.label("class")
    return None if near is None or far is None else float(near == far)
