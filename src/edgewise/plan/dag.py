"""A graph of operators that may run on two sides, an edge and a cloud behind a link, and the ways to divide it.

The edge always holds what comes first: what the cloud makes never comes back to it, results apart. An answer takes

    edge + encode + bytes up / bandwidth + round trip + decode + cloud + result bytes / bandwidth + overheads

and the edge alone the first and the last of it. What the cloud alone is sent is the coded input (a JPEG, token ids),
not a raw tensor: it is the input's `coded_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

from edgewise.devices.links import LinkProfile
from edgewise.errors import UsageError

LONGEST_S: Final = 1e6  # of any time: far beyond every model, and sums stay exact
MOST_BYTES: Final = 1 << 40

Place = Literal["edge", "cloud", "split"]


@dataclass(frozen=True, slots=True)
class Node:
    """Seconds on each side; infinite where it must not run."""

    name: str
    edge_s: float
    cloud_s: float


@dataclass(frozen=True, slots=True)
class Tensor:
    """`producer` None: an input of the graph. `coded_bytes` are those that go up, None where it must not cross. Of a
    result of the graph `result_bytes` come back if the cloud makes it."""

    name: str
    producer: str | None
    consumers: tuple[str, ...]
    coded_bytes: int | None
    encode_s: float = 0.0
    decode_s: float = 0.0
    result_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """A graph on two sides: the nodes on the edge, the tensors that cross, each once however many nodes use it."""

    place: Place
    edge: frozenset[str]
    crossing: tuple[str, ...]
    edge_s: float
    codec_s: float
    cloud_s: float
    overhead_s: float
    up_bytes: int
    down_bytes: int

    @property
    def computing_s(self) -> float:
        return self.edge_s + self.codec_s + self.cloud_s

    @property
    def local_s(self) -> float:
        """All that no link changes; infinite for a way that is not allowed."""
        return self.computing_s + self.overhead_s

    def seconds(self, link: LinkProfile) -> float:
        """From the input to the result."""
        if self.place == "edge":
            return self.local_s
        carried_s = self.up_bytes / link.up_bytes_per_s + self.down_bytes / link.down_bytes_per_s
        return self.local_s + carried_s + link.rtt_ms / 1e3


@dataclass(frozen=True, eq=False)
class Dag:
    """A graph without cycles. The overheads are what a side takes besides its nodes, once if it has any: a session's
    start, a request's handling. `measured` are the seconds (edge, cloud) of whole ways, by their nodes on the edge;
    they replace sums of nodes' times, which are too high where a runtime fuses nodes. UsageError for what is no such
    graph."""

    nodes: tuple[Node, ...]
    tensors: tuple[Tensor, ...]
    edge_overhead_s: float = 0.0
    cloud_overhead_s: float = 0.0
    measured: Mapping[frozenset[str], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for overhead_s in (self.edge_overhead_s, self.cloud_overhead_s):
            if not 0 <= overhead_s <= LONGEST_S:
                raise UsageError(f"an overhead is {overhead_s:g} s; 0 to {LONGEST_S:g} are allowed")
        for edge in (frozenset[str](), *self.measured):  # whoever makes a graph hears what is wrong with it
            way = self.way(edge)
            if not (min(way.edge_s, way.cloud_s) >= 0 and max(self.measured.get(edge, (0,))) <= LONGEST_S):
                raise UsageError(
                    f"a way was measured with {way.edge_s:g} s and {way.cloud_s:g} s; 0 to {LONGEST_S:g} are allowed"
                )

    @cached_property
    def sets(self) -> Sets:
        return Sets(self.nodes, self.tensors)

    def way(self, edge: frozenset[str]) -> Way:
        """The way with these nodes on the edge. UsageError if one of them needs a node of the cloud."""
        return self.way_of(self.sets.of_names(edge))

    def before(self, *tensors: str) -> Way:
        """The way whose edge makes these tensors, and nothing that they do not need."""
        return self.way_of(self.sets.before(tensors))

    def way_of(self, edge: int, *, by_sums: bool = False) -> Way:
        """Of a set of nodes; `by_sums`: measured or not."""
        sets = self.sets
        if not sets.is_closed(edge):
            raise UsageError("a node on the edge needs one in the cloud", hint="the edge holds what comes first")
        names = sets.names(edge)
        crossing = [self.tensors[i] for i in sets.crossing(edge)]
        forbidden = any(tensor.coded_bytes is None for tensor in crossing)
        edge_s, cloud_s = self._times(edge)
        if names in self.measured and not by_sums:
            edge_s, cloud_s = self.measured[names]
        has_cloud = edge != sets.everything
        return Way(
            place="split" if edge and has_cloud else "cloud" if has_cloud else "edge",
            edge=names,
            crossing=tuple(tensor.name for tensor in crossing),
            edge_s=edge_s,
            codec_s=math.inf if forbidden else math.fsum(tensor.encode_s + tensor.decode_s for tensor in crossing),
            cloud_s=cloud_s,
            overhead_s=(self.edge_overhead_s if edge else 0.0) + (self.cloud_overhead_s if has_cloud else 0.0),
            up_bytes=sum(tensor.coded_bytes or 0 for tensor in crossing),
            down_bytes=sum(self.tensors[i].result_bytes for i in sets.made_outside(edge)),
        )

    def _times(self, edge: int) -> tuple[float, float]:
        sides: tuple[list[float], list[float]] = ([], [])
        for i, node in enumerate(self.nodes):
            if edge >> i & 1:
                sides[0].append(node.edge_s)
            else:
                sides[1].append(node.cloud_s)
        return math.fsum(sides[0]), math.fsum(sides[1])


class Sets:
    """Sets of a graph's nodes as the bits of numbers, and what a set of nodes on the edge means. Lists go by the number
    of a node or a tensor; the producer -1 makes the inputs."""

    def __init__(self, nodes: Sequence[Node], tensors: Sequence[Tensor]) -> None:
        self._number = {node.name: i for i, node in enumerate(nodes)}
        self._tensor_number = {tensor.name: i for i, tensor in enumerate(tensors)}
        _check(nodes, tensors, self._number, self._tensor_number)
        self._names = [node.name for node in nodes]
        self.everything = (1 << len(nodes)) - 1
        self.producer = [-1 if t.producer is None else self._number[t.producer] for t in tensors]
        self.consumers = [sorted({self._number[name] for name in t.consumers}) for t in tensors]
        self._users = [sum(1 << i for i in consumers) for consumers in self.consumers]
        self.inputs: list[list[int]] = [[] for _ in nodes]
        self.outputs: list[list[int]] = [[] for _ in nodes]
        for tensor, (producer, consumers) in enumerate(zip(self.producer, self.consumers, strict=True)):
            for node in consumers:
                self.inputs[node].append(tensor)
            if producer >= 0:
                self.outputs[producer].append(tensor)
        self.order = self._sorted()

    def _sorted(self) -> list[int]:
        """Nodes, each after those it needs."""
        missing = [sum(self.producer[tensor] >= 0 for tensor in inputs) for inputs in self.inputs]
        order = [node for node, count in enumerate(missing) if not count]
        for node in order:  # which grows on the way
            for tensor in self.outputs[node]:
                for user in self.consumers[tensor]:
                    missing[user] -= 1
                    if not missing[user]:
                        order.append(user)
        if len(order) < len(missing):
            name = self._names[next(i for i, count in enumerate(missing) if count)]
            raise UsageError(f"node {name!r} waits for its own result or for a node that does", hint="remove the cycle")
        return order

    def of_names(self, names: frozenset[str]) -> int:
        unknown = sorted(names - self._number.keys())
        if unknown:
            raise UsageError(f"the graph has no node {unknown[0]!r}")
        return sum(1 << self._number[name] for name in names)

    def names(self, nodes: int) -> frozenset[str]:
        return frozenset(name for i, name in enumerate(self._names) if nodes >> i & 1)

    def is_closed(self, edge: int) -> bool:
        """Whether an edge of these nodes has all that they need."""
        return all(made < 0 or edge >> made & 1 or not edge & users for made, users in self._ends())

    def crossing(self, edge: int) -> list[int]:
        """The tensors that the cloud needs from an edge of these nodes."""
        cloud = self.everything & ~edge
        return [i for i, (made, users) in enumerate(self._ends()) if users & cloud and (made < 0 or edge >> made & 1)]

    def made_outside(self, edge: int) -> list[int]:
        return [i for i, made in enumerate(self.producer) if made >= 0 and not edge >> made & 1]

    def _ends(self) -> Iterator[tuple[int, int]]:
        return zip(self.producer, self._users, strict=True)

    def before(self, tensors: Sequence[str]) -> int:
        """The nodes that making these tensors takes."""
        nodes = 0
        for name in tensors:
            if name not in self._tensor_number:
                raise UsageError(f"the graph has no tensor {name!r}")
            nodes |= self.needed(self._tensor_number[name])
        return nodes

    def needed(self, tensor: int) -> int:
        made = self.producer[tensor]
        return 0 if made < 0 else self._ancestors[made]

    def without_users(self, tensor: int) -> int:
        """All nodes that can run where the tensor is not."""
        rest = self.everything
        for user in self.consumers[tensor]:
            rest &= ~self._descendants[user]
        return rest

    @cached_property
    def _ancestors(self) -> list[int]:
        """Of each node, itself included."""
        found = [0] * len(self.order)
        for node in self.order:
            found[node] = 1 << node
            for tensor in self.inputs[node]:
                found[node] |= 0 if self.producer[tensor] < 0 else found[self.producer[tensor]]
        return found

    @cached_property
    def _descendants(self) -> list[int]:
        """Of each node, itself included."""
        found = [0] * len(self.order)
        for node in reversed(self.order):
            found[node] = 1 << node
            for tensor in self.outputs[node]:
                for user in self.consumers[tensor]:
                    found[node] |= found[user]
        return found


def _check(
    nodes: Sequence[Node], tensors: Sequence[Tensor], number: Mapping[str, int], tensor_number: Mapping[str, int]
) -> None:
    if not nodes:
        raise UsageError("the graph has no nodes", hint="one or more are needed")
    if len(number) < len(nodes) or len(tensor_number) < len(tensors):
        raise UsageError("two nodes or two tensors of the graph have the same name", hint="name each once")
    for node in nodes:
        least, most = sorted((node.edge_s, node.cloud_s))
        if not 0 <= least <= LONGEST_S or math.isnan(most) or LONGEST_S < most < math.inf:
            raise UsageError(
                f"node {node.name!r} takes {node.edge_s:g} s and {node.cloud_s:g} s; 0 to {LONGEST_S:g} are allowed, "
                "and infinite on one of the sides"
            )
    for tensor in tensors:
        missing = {tensor.producer, *tensor.consumers} - {None} - number.keys()
        if missing:
            raise UsageError(f"tensor {tensor.name!r} belongs to {sorted(map(str, missing))[0]!r}, which is no node")
        if not (0 <= (tensor.coded_bytes or 0) <= MOST_BYTES and 0 <= tensor.result_bytes <= MOST_BYTES):
            raise UsageError(
                f"tensor {tensor.name!r} has {tensor.coded_bytes} bytes, as a result {tensor.result_bytes}; "
                f"0 to {MOST_BYTES} are allowed"
            )
        if not (0 <= tensor.encode_s <= LONGEST_S and 0 <= tensor.decode_s <= LONGEST_S):
            raise UsageError(
                f"tensor {tensor.name!r} takes {tensor.encode_s:g} s to encode and {tensor.decode_s:g} s to decode; "
                f"0 to {LONGEST_S:g} are allowed"
            )
