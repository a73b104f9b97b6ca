"""What each cut of an ONNX file takes, as measured once (docs/formats/profile.md), and the plans made of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from edgewise.devices.links import LinkProfile
from edgewise.errors import UsageError
from edgewise.plan.dag import Dag, Node, Place, Tensor, Way
from edgewise.plan.mincut import Table

FORMAT: Final = 1
SIZE_LIMIT: Final = 64 << 20
MAX_ERROR: Final = 0.01
MARGIN: Final = 0.01  # predictions of measured ways err by about so much

Units = frozenset[str]  # by their numbers, as a Dag names its nodes


@dataclass(frozen=True, slots=True)
class Request:
    """What asking the cloud takes besides coded tensors and computing: a container and HTTP around it, as split/post.py
    has them; the seconds are those of two processes on this machine."""

    up_bytes: int = 260
    down_bytes: int = 190
    seconds: float = 0.0011


class Coding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes of one input's tensor, and the seconds to make and to read them."""

    bytes: float
    encode_s: float = 0.0
    decode_s: float = 0.0


class UnitProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    operators: tuple[str, ...]
    seconds: float


class TensorProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    producer: int | None
    readers: tuple[int, ...]
    dtype: str
    shape: tuple[int, ...]
    raw_bytes: int
    coded: dict[str, Coding]


class CutProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    units: str
    crossing: tuple[str, ...]
    front_s: float
    back_s: float
    front_bytes: int
    error: dict[str, float]

    @property
    def edge(self) -> frozenset[int]:
        """The numbers of the units in front."""
        mask = int(self.units, 16)
        return frozenset(number for number in range(mask.bit_length()) if mask >> number & 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where to cut and what it takes, in seconds; a baseline is None where the limits rule it out. `codec` is None
    where no features cross. `front_bytes` are the weights that the edge holds."""

    place: Place
    units: frozenset[int]
    crossing: tuple[str, ...]
    codec: str | None
    up_bytes: int
    down_bytes: int
    front_bytes: int
    cloud_s: float
    seconds: float
    edge_only_s: float | None
    cloud_only_s: float | None


@dataclass(frozen=True)
class Plans:
    """All that a profile allows, ready to be asked for any link: one costs less than a millisecond."""

    table: Table
    cuts: Mapping[Units, CutProfile]
    codecs: Mapping[Way, str]
    uploaded: frozenset[str] = frozenset()  # inputs that are not coded

    def at(self, link: LinkProfile) -> Plan:
        return self._plan(self.table.at(link).way, link)

    def nearest(self, link: LinkProfile) -> Plan | None:
        """The best that asks the cloud; None if nothing may."""
        asking = [way for way in self.table.ways if way.place != "edge"]
        return self._plan(min(asking, key=lambda way: way.seconds(link)), link) if asking else None

    def _plan(self, way: Way, link: LinkProfile) -> Plan:
        alone = {
            place: min((one.seconds(link) for one in self.table.ways if one.place == place), default=None)
            for place in ("edge", "cloud")
        }
        return Plan(
            place=way.place,
            units=frozenset(map(int, way.edge)),
            crossing=way.crossing,
            codec=None if self.uploaded.issuperset(way.crossing) else self.codecs[way],
            up_bytes=way.up_bytes,
            down_bytes=way.down_bytes,
            front_bytes=self.cuts[way.edge].front_bytes,
            cloud_s=way.cloud_s + way.overhead_s,
            seconds=way.seconds(link),
            edge_only_s=alone["edge"],
            cloud_only_s=alone["cloud"],
        )


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: int = FORMAT
    model: str
    digest: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    inputs: int
    upload: dict[str, Coding]
    units: tuple[UnitProfile, ...]
    tensors: tuple[TensorProfile, ...]
    cuts: tuple[CutProfile, ...]
    results: dict[str, float]

    @staticmethod
    def read(path: Path | str) -> Profile:
        """UsageError, whatever the bytes are, if it is no profile of this format; OSError if it cannot be read."""
        file = Path(path)
        if file.stat().st_size > SIZE_LIMIT:
            raise UsageError(f"{path} has {file.stat().st_size} bytes; a profile has at most {SIZE_LIMIT}")
        try:
            found = msgspec.json.decode(file.read_bytes(), type=Profile)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(
                f"{path} is not a profile: {error}", hint="make one with `edgewise split profile MODEL -o FILE`"
            ) from error
        if found.format != FORMAT:
            raise UsageError(
                f"{path} has format {found.format}; this version reads {FORMAT}",
                hint="make it again with `edgewise split profile MODEL -o FILE`",
            )
        return found

    def save(self, path: Path | str) -> None:
        """Whole or not at all."""
        part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
        part.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        part.replace(path)

    @property
    def codecs(self) -> tuple[str, ...]:
        """Those that were measured."""
        return tuple(self.tensors[0].coded) if self.tensors else ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the inputs that it was measured with."""
        return {tensor.name: tensor.shape for tensor in self.tensors if tensor.producer is None}

    def check(self, digest: str) -> None:
        """UsageError if it is of another file than the one with that digest."""
        if self.digest != digest:
            raise UsageError(
                f"the profile is of {self.model} {self.digest[:16]}, and the file is {digest[:16]}",
                hint="make one of this file with `edgewise split profile`",
            )

    def dag(self, codec: str, *, edge: float = 1.0, cloud: float = 1.0, request_s: float = 0.0) -> Dag:
        """The graph with every tensor under one codec, integers exact. `edge` and `cloud` are how many times longer
        than this machine a side takes; nodes are units by their numbers."""
        nodes = tuple(
            Node(str(number), unit.seconds * edge, unit.seconds * cloud) for number, unit in enumerate(self.units)
        )
        tensors = tuple(self._tensor(one, codec, edge, cloud) for one in self.tensors)
        measured = {_units(cut): (cut.front_s * edge, cut.back_s * cloud) for cut in self.cuts}
        return Dag(nodes, tensors, cloud_overhead_s=request_s, measured=measured)

    def _tensor(self, tensor: TensorProfile, codec: str, edge: float, cloud: float) -> Tensor:
        coding = self.upload.get(tensor.name) or tensor.coded.get(codec)
        return Tensor(
            tensor.name,
            None if tensor.producer is None else str(tensor.producer),
            tuple(map(str, tensor.readers)),
            None if coding is None else round(coding.bytes),
            encode_s=0.0 if coding is None else coding.encode_s * edge,
            decode_s=0.0 if coding is None else coding.decode_s * cloud,
            result_bytes=round(self.results.get(tensor.name, 0)),
        )

    def plans(
        self,
        *,
        edge: float = 1.0,
        cloud: float = 1.0,
        request: Request | None = None,
        max_error: float = MAX_ERROR,
        edge_bytes: int | None = None,
        margin: float = MARGIN,
    ) -> Plans:
        """Of the cuts that were measured, under each codec whose error is at most `max_error`, those with at most
        `edge_bytes` of weights in front. A split must be faster than both baselines by `margin`. UsageError if nothing
        is left."""
        request = request or Request()
        dags = {codec: self.dag(codec, edge=edge, cloud=cloud, request_s=request.seconds) for codec in self.codecs}
        codecs: dict[Way, str] = {}
        for cut in self.cuts:
            if edge_bytes is None or cut.front_bytes <= edge_bytes:
                sent_as_it_is = self.upload.keys() >= set(cut.crossing)
                allowed = [codec for codec, error in cut.error.items() if sent_as_it_is or error <= max_error]
                codecs |= _useful({_asking(dags[codec].way(_units(cut)), request): codec for codec in allowed})
        if not codecs:
            raise UsageError(
                f"no cut of {self.model} has an error of at most {max_error:g} and at most {edge_bytes} bytes of "
                "weights on the edge"
            )
        ways = sorted(codecs, key=lambda way: way.place == "split")  # of equals a baseline
        cuts = {_units(cut): cut for cut in self.cuts}
        return Plans(Table(tuple(ways), (), margin), cuts, codecs, frozenset(self.upload))


def _asking(way: Way, request: Request) -> Way:
    if way.place == "edge":
        return way
    return replace(way, up_bytes=way.up_bytes + request.up_bytes, down_bytes=way.down_bytes + request.down_bytes)


def _useful(codecs: Mapping[Way, str]) -> dict[Way, str]:
    """Of one cut under several codecs those that are not beaten by another in both bytes and seconds."""
    found: dict[Way, str] = {}
    for way in sorted(codecs, key=lambda way: (way.up_bytes, way.local_s)):
        if all(way.local_s < other.local_s for other in found):
            found[way] = codecs[way]
    return found


def _units(cut: CutProfile) -> Units:
    return frozenset(map(str, cut.edge))
