"""What a model takes of a device's memory, and how much of that the system leaves to one program.

Weights and keys and values are counted; the rest is small and estimated: activations of one chunk of a prompt, and what
a runtime takes for itself. docs/planner.md says where those come from.
"""

from __future__ import annotations

from typing import Final

import msgspec

from edgewise.devices.catalogue import Device
from edgewise.models.outline import Outline
from edgewise.plan.precision import Precision
from edgewise.plan.speed import Kind, Part, Runtime, Unit, weights

GIB: Final = 1 << 30
CHUNK: Final = 512  # tokens of a prompt at once
RUNTIME_BYTES: Final[dict[Unit, int]] = {  # code, drivers, buffers; our own takes 75 MB on a CPU
    "cpu": 120 << 20,
    "cuda": 600 << 20,
    "metal": 200 << 20,
    "gpu": 300 << 20,
    "npu": 300 << 20,
}
LEFT: Final[dict[Kind, float]] = {  # share for one program where the catalogue names no limit of the system
    "phone": 0.5,
    "laptop": 0.75,
    "mac": 0.75,
    "desktop": 0.92,
    "board": 0.85,
    "edge gpu": 0.85,
    "server": 0.95,
    "accelerator": 0.95,
}


class Memory(msgspec.Struct, frozen=True):
    """Bytes. `tables` are looked up and can stay in the mapped file: they are no part of the need where the runtime
    leaves them there."""

    weights: int
    kv: int
    activations: int
    runtime: int
    tables: int

    @property
    def need(self) -> int:
        return self.weights + self.kv + self.activations + self.runtime


def needed(outline: Outline, precision: Precision | None, ways: Runtime, unit: Unit, context: int) -> Memory:
    """With a context of so many tokens; None is the precision of the model's file."""
    stored = weights(outline, precision, ways)
    tables = stored.embedding + stored.looked_up
    positions = max(context, ways.static_cache)
    widths = 4 * outline.hidden + 2 * outline.heads * outline.head_dim + 2 * (outline.ffn or outline.hidden)
    return Memory(
        weights=stored.body + stored.head + (0 if ways.maps_tables else tables),
        kv=round(outline.kv_values(positions) * ways.kv_bits / 8),
        activations=4 * (min(CHUNK, positions) * widths + outline.vocab),
        runtime=RUNTIME_BYTES[unit],
        tables=tables if ways.maps_tables else 0,
    )


class Room(msgspec.Struct, frozen=True):
    """Bytes that one program may have; None if nobody says how much memory there is. `why` says what was assumed."""

    available: int | None
    why: str


def room_of(device: Device, kind: Kind, part: Part, memory_gib: float | None = None) -> Room:
    """`memory_gib` is that of the very device; the catalogue knows a range, of which the least counts."""
    figure = device.memory_gib
    if memory_gib is None and device.no_memory:
        return Room(0, f"{device.name} has no memory of its own beside SRAM")
    if memory_gib is None and figure is None:
        return Room(None, f"the catalogue does not know the memory of {device.name}")
    whole = memory_gib or (figure.least if figure else 0.0)
    limits = [limit for limit in device.os_limits if limit.share is not None and (part == "gpu" or kind != "mac")]
    tightest = min(limits, key=lambda limit: limit.share or 1.0, default=None)
    share = LEFT[kind] if tightest is None else tightest.share or 1.0
    sold = (
        f", which is sold with up to {figure.most:g}" if figure and memory_gib is None and figure.most > whole else ""
    )
    because = tightest.what if tightest else f"assumed for the kind {kind}"
    return Room(round(whole * GIB * share), f"{share:.0%} of {whole:g} GiB{sold} ({because})")
