"""The guide's own tables, read-only: its numbers as they stand there, the verdict on each, and what is known instead.

An entry of a table is a mapping: the figures by name, `verdict` (for each figure `verdict`, `why`, `correct`, `source`)
and `sourced` (the catalogue's figures of the device that is meant). Keys are found whatever their case and punctuation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from edgewise.devices.catalogue import Catalogue, Claim, Group, Verdict, plain, shipped

WORST_FIRST: Final[tuple[Verdict, ...]] = ("wrong", "unsourced", "right")


class Table(Mapping[str, Any]):
    """Values by key, found under the key's other names too."""

    def __init__(self, values: Mapping[str, Any], names: Mapping[str, Iterable[str]] = MappingProxyType({})) -> None:
        self._values = {key: value if isinstance(value, list) else _frozen(value) for key, value in values.items()}
        self._keys: dict[str, str] = {plain(key): key for key in values}
        for key in values:
            for name in names.get(key, ()):
                self._keys.setdefault(plain(name), key)

    def __getitem__(self, key: str) -> Any:
        known = self._keys.get(plain(key)) if isinstance(key, str) else None
        if known is None:
            raise KeyError(f"{key!r} is not among {', '.join(self._values)}")
        value = self._values[known]
        return value.copy() if isinstance(value, list) else value  # a list in the guide's table is one here

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Table({', '.join(self._values)})"


def tables(catalogue: Catalogue, group: Group) -> Table:
    """The rows of a group by key; a key with a dot in it is two steps."""
    rows: dict[str, list[Claim]] = {}
    for claim in catalogue.claims:
        if claim.group == group:
            rows.setdefault(claim.key, []).append(claim)
    entries: dict[str, Any] = {}
    names: dict[str, tuple[str, ...]] = {}
    for key, row in rows.items():
        outer, _, inner = key.partition(".")
        entry = _entry(catalogue, row)
        if inner:
            entries.setdefault(outer, {})[inner] = entry
        else:
            entries[outer] = entry
        names[inner or outer] = (
            _device_names(catalogue, row[0]) if inner else (row[0].row, *_device_names(catalogue, row[0]))
        )
    return Table(
        {key: value if isinstance(value, Table) else Table(value, names) for key, value in entries.items()}, names
    )


def _device_names(catalogue: Catalogue, claim: Claim) -> tuple[str, ...]:
    return () if claim.device is None else (claim.device, *catalogue.devices[claim.device].names)


def _entry(catalogue: Catalogue, row: list[Claim]) -> Table:
    figures: dict[str, Any] = {claim.figure: claim.value for claim in row}
    verdicts = {claim.figure: _verdict(catalogue, claim) for claim in row}
    if {"tops", "power"} <= figures.keys():
        figures["efficiency"] = round(figures["tops"] / figures["power"], 2)
        verdicts["efficiency"] = _verdict_on_quotient(verdicts["tops"], verdicts["power"])
    device = row[0].device
    sourced = None if device is None else catalogue.described(device)
    return Table(figures | {"verdict": verdicts, "sourced": sourced})


def _verdict(catalogue: Catalogue, claim: Claim) -> dict[str, Any]:
    source = None if claim.source is None else msgspec.to_builtins(catalogue.sources[claim.source])
    return {"verdict": claim.verdict, "why": claim.why, "correct": claim.correct, "source": source}


def _verdict_on_quotient(tops: dict[str, Any], power: dict[str, Any]) -> dict[str, Any]:
    worse = min(tops, power, key=lambda part: WORST_FIRST.index(part["verdict"]))
    why = f"TOPS by watts, no better known than they are: {worse['why']}"
    return {"verdict": worse["verdict"], "why": why, "correct": None, "source": worse["source"]}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _frozen(part) for key, part in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


class EdgeGPUSpecs:
    """The guide's table of edge GPUs."""

    nvidia_jetson: Final = tables(shipped(), "jetson")


edge_chips: Final = tables(shipped(), "chips")
benchmarks: Final = tables(shipped(), "benchmarks")
