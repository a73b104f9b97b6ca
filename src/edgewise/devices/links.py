"""Links by name: what a planner expects of them and a relay imitates. Typical figures of access networks, not of any
one operator; the mobile ones are those of WebPageTest's connection profiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edgewise.errors import UsageError


@dataclass(frozen=True, slots=True)
class LinkProfile:
    """A way between an edge and a cloud: bytes a second in each direction and the round trip without load.
    Loss is Gilbert's: a packet that follows a delivered one is lost with `loss_enter`, one that follows a lost one
    with `1 - loss_leave`; 0 and 1 lose nothing."""

    name: str
    up_bytes_per_s: float
    down_bytes_per_s: float
    rtt_ms: float
    loss_enter: float = 0.0
    loss_leave: float = 1.0


def _link(name: str, up_mbit: float, down_mbit: float, rtt_ms: float) -> LinkProfile:
    return LinkProfile(name, up_mbit * 125_000, down_mbit * 125_000, rtt_ms)


LINKS: Final[Mapping[str, LinkProfile]] = {
    link.name: link
    for link in (
        _link("2g", 0.05, 0.25, 800),
        _link("3g-slow", 0.4, 0.4, 400),
        _link("3g", 0.75, 1.6, 300),
        _link("satellite", 3, 25, 600),
        _link("dsl", 0.384, 1.5, 50),
        _link("4g", 5, 9, 170),
        _link("lte", 10, 12, 70),
        _link("5g", 20, 100, 25),
        _link("cable", 5, 50, 28),
        _link("fibre", 100, 500, 8),
        _link("wifi", 30, 50, 6),
        _link("lan", 1000, 1000, 1),
    )
}


def link_named(name: str) -> LinkProfile:
    """UsageError if there is none of that name."""
    if name not in LINKS:
        raise UsageError(f"there is no link {name!r}; known are {', '.join(LINKS)}")
    return LINKS[name]
