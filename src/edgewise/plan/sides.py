"""One machine's part in a split: how long a layer takes there, and how much of its memory a model may have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from edgewise.models.outline import Outline
from edgewise.plan.fit import Estimate
from edgewise.plan.memory import Room, needed
from edgewise.plan.precision import Precision
from edgewise.plan.sites import Asked, Site
from edgewise.plan.speed import Part, Runtime, situation, weights
from edgewise.plan.speeds import Speeds

OURS: Final = "edgewise"  # what runs a split


@dataclass(frozen=True, slots=True)
class Side:
    """Milliseconds of one token: `layer_ms` of a layer and `head_ms` of the head behind `context` tokens,
    `prompt_layer_ms` of a layer in a prompt. What is predicted may be `fast` times as short and `slow` times as long,
    four times in five."""

    name: str
    unit: Part
    runtime: str
    layer_ms: float
    head_ms: float
    prompt_layer_ms: float
    fast: float
    slow: float
    ways: Runtime
    room: Room
    process_bytes: int
    activation_bytes: int
    assumed: tuple[str, ...]


def side(
    outline: Outline, site: Site, speeds: Speeds, precision: Precision | None, *, context: int, prompt: int
) -> Side:
    """The site's CPU under our runtime, which is what runs a split; of a site without one its usual part."""
    part, runtime = _way(site)
    ways, machine = site.ways(part, runtime), site.machine(part, runtime)
    whole, prefill = _speed(Asked(outline, precision, part, runtime, context, prompt), site, speeds)
    headless = _headless(outline, precision, ways)
    body, _ = _speed(Asked(headless, None, part, runtime, context, prompt), site, speeds)
    memory = needed(outline, precision, ways, machine.unit, context)
    return Side(
        name=site.name,
        unit=part,
        runtime=runtime,
        layer_ms=1e3 / body.value / outline.layers,
        head_ms=max(0.0, 1e3 / whole.value - 1e3 / body.value),
        prompt_layer_ms=1e3 / prefill.value / outline.layers,
        fast=whole.high / whole.value,
        slow=whole.value / whole.low,
        ways=ways,
        room=site.room(part),
        process_bytes=memory.runtime,
        activation_bytes=memory.activations,
        assumed=(
            *(f"{what} of a typical {machine.kind} for {site.name}" for what in machine.assumed),
            *(() if runtime == OURS else (f"{site.name} runs the {part} with {runtime}; our own workers run on CPUs",)),
        ),
    )


def _way(site: Site) -> tuple[Part, str]:
    parts = dict(site.parts())
    return ("cpu", OURS) if "cpu" in parts else next(iter(parts.items()))


def _headless(outline: Outline, precision: Precision | None, ways: Runtime) -> Outline:
    """The same layers under a vocabulary of one token."""
    stored = weights(outline, precision, ways)
    return replace(outline, vocab=1, stored=replace(stored, head=stored.head // outline.vocab, embedding=0))


def _speed(asked: Asked, site: Site, speeds: Speeds) -> tuple[Estimate, Estimate]:
    """tok/s of decoding and of a prompt."""
    if measured := site.measured(asked):
        return measured
    at = situation(
        asked.outline,
        asked.precision,
        site.machine(asked.part, asked.runtime),
        asked.runtime,
        context=asked.context,
        prompt=asked.prompt,
    )
    return speeds.decode.predict([at])[0], speeds.prefill.predict([at])[0]
