"""Scripted tiers whose texts cannot be mistaken for each other."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from edgewise.engines.fake import FakeGenerator, Script
from edgewise.joint.cascade import Cascade
from edgewise.joint.policy import Policy
from edgewise.types import Chunk, Decision, Message, Request

SURE, UNSURE = -0.01, -3.0
EDGE_TEXT = " ".join(f"edge{n}" for n in range(40)) + " "
CLOUD_TEXT = " ".join(f"cloud{n}" for n in range(12)) + " "


def tier(text: str, logprob: float = -0.1, *, name: str = "fake", **script: Any) -> FakeGenerator:
    return FakeGenerator(replace(Script.of(text, logprob), **script), name=name)


def edge(logprob: float = UNSURE, **script: Any) -> FakeGenerator:
    """40 tokens, one each 10 ms."""
    return tier(EDGE_TEXT, logprob, name="edge", **{"delay_s": 0.01, **script})


def cloud(**script: Any) -> FakeGenerator:
    """12 tokens, one each 10 ms."""
    return tier(CLOUD_TEXT, name="cloud", **{"delay_s": 0.01, **script})


def ask(**wishes: Any) -> Request:
    return Request((Message("user", "hello"),), **wishes)


def policy(**parts: Any) -> Policy:
    """The default policy with some values changed: `policy(early={"threshold": 0.9}, deadline_ms=5.0)`."""
    change, default = msgspec.structs.replace, Policy.default()
    return change(
        default, **{k: change(getattr(default, k), **v) if isinstance(v, dict) else v for k, v in parts.items()}
    )


@dataclass
class Outcome:
    """What the caller of one request saw."""

    chunks: list[Chunk] = field(default_factory=list)
    error: Exception | None = None
    first_s: float | None = None  # until the first chunk
    total_s: float = 0.0

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def decision(self) -> Decision:
        """The one decision, which the first and the last chunk carry, and no other."""
        first, *between = self.chunks
        assert first.decision is not None
        if self.error is None:
            assert self.chunks[-1].finish_reason is not None
            assert self.chunks[-1].decision == first.decision
            between = between[:-1]
        assert all(chunk.decision is None and chunk.finish_reason is None for chunk in between)
        return first.decision

    @property
    def way(self) -> tuple[str, str]:
        return self.decision.route, self.decision.reason


async def see(cascade: Cascade, request: Request) -> Outcome:
    clock = asyncio.get_running_loop().time
    started, outcome = clock(), Outcome()
    try:
        async for chunk in cascade.generate(request):
            if outcome.first_s is None:
                outcome.first_s = clock() - started
            outcome.chunks.append(chunk)
    except Exception as error:
        outcome.error = error
    outcome.total_s = clock() - started
    return outcome
