"""Which nodes of an ONNX graph stay together when it is cut, and which both sides have (models/graph.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from onnx import AttributeProto, GraphProto, NodeProto

from edgewise.errors import SourceError

FUSED: Final = frozenset(  # of one input that is no constant: computed in place by every runtime, or views of it
    (
        *("Add", "BatchNormalization", "Clip", "Div", "Dropout", "Elu", "Flatten", "Gelu", "HardSigmoid", "HardSwish"),
        *("Identity", "LeakyRelu", "Mish", "Mul", "PRelu", "Relu", "Reshape", "Selu", "Sigmoid", "Softplus", "Squeeze"),
        *("Sub", "Tanh", "ThresholdedRelu", "Unsqueeze"),
    )
)
RANDOM: Final = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)


@dataclass(frozen=True)
class Parts:
    """What each node of the file is: `members` are the units' nodes, `shared` those that both sides of a cut may have
    (constant, or copied to each reader), `source` leads from a copied tensor to the one that is sent."""

    inputs: tuple[str, ...]
    constant: frozenset[str]
    members: tuple[tuple[int, ...], ...]
    shared: Mapping[str, int]  # node by what it makes
    source: Mapping[str, str]

    @staticmethod
    def of(graph: GraphProto) -> Parts:
        stored = _stored(graph)
        inputs = tuple(value.name for value in graph.input if value.name not in stored)
        building = _Building(graph, set(inputs), stored)
        for number in _used(graph):
            building.add(number, graph.node[number])
        members = tuple(tuple(member) for member in building.members)
        return Parts(inputs, frozenset(building.constant), members, building.shared, building.source)

    def live(self, node: NodeProto) -> list[str]:
        """What a node reads that is no constant, copies followed to what is sent."""
        names = (self.source.get(name, name) for name in reads(node))
        return list(dict.fromkeys(name for name in names if name not in self.constant))

    def needed(
        self, graph: GraphProto, units: Set[int], outputs: Sequence[str]
    ) -> tuple[list[NodeProto], frozenset[str]]:
        """The nodes of these units with the shared ones that they or the outputs need, in the file's order, and the
        names that somebody else must give."""
        numbers = {number for unit in units for number in self.members[unit]}
        made = {name for number in numbers for name in graph.node[number].output}
        wanted = [*outputs, *(name for number in numbers for name in reads(graph.node[number]))]
        free = set()
        while wanted:
            name = wanted.pop()
            if name in made:
                continue
            made.add(name)
            if name in self.shared:
                numbers.add(self.shared[name])
                wanted += reads(graph.node[self.shared[name]])
            elif name not in self.constant:
                free.add(name)
        return [graph.node[number] for number in sorted(numbers)], frozenset(free)


@dataclass
class _Building:
    graph: GraphProto
    known: set[str]  # made so far, or given
    constant: set[str]
    members: list[list[int]] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    unit: dict[str, int] = field(default_factory=dict)  # by what it makes

    @cached_property
    def outputs(self) -> frozenset[str]:
        return frozenset(value.name for value in self.graph.output)

    @cached_property
    def readers(self) -> Mapping[str, int]:
        """How many nodes read each name."""
        counts: dict[str, int] = {}
        for node in self.graph.node:
            for name in set(reads(node)):
                counts[name] = counts.get(name, 0) + 1
        return counts

    def add(self, number: int, node: NodeProto) -> None:
        self.known |= self.constant
        for name in reads(node):
            if name not in self.known:
                raise SourceError(
                    f"node {number} ({node.op_type} {node.name}) reads {name!r}, which no node before it makes",
                    hint="export the file again; `onnx.checker` tells what is wrong with it",
                )
        makes = [name for name in node.output if name]
        self.known.update(makes)
        live = [name for name in reads(node) if name not in self.constant]
        if not live and (node.input or node.op_type == "Constant" or _bodies(node)) and node.op_type not in RANDOM:
            self.constant.update(makes)
            self.shared.update(dict.fromkeys(makes, number))
        elif node.op_type == "DequantizeLinear" and len(live) == 1 and self.outputs.isdisjoint(makes):
            self.shared[makes[0]] = number
            self.source[makes[0]] = self.source.get(live[0], live[0])
        else:
            self._join(number, node, live, makes)

    def _join(self, number: int, node: NodeProto, live: Sequence[str], makes: Sequence[str]) -> None:
        place = self._host(node, live)
        if place is None:
            place = len(self.members)
            self.members.append([])
        self.members[place].append(number)
        self.unit.update(dict.fromkeys(makes, place))

    def _host(self, node: NodeProto, live: Sequence[str]) -> int | None:
        """The unit that a node belongs to; None if it starts one."""
        if len(live) != 1 or live[0] not in self.unit:
            return None
        alone = self.readers[live[0]] == 1 and live[0] not in self.outputs
        fused = node.op_type == "QuantizeLinear" or (node.op_type in FUSED and alone)
        return self.unit[live[0]] if fused else None


def _used(graph: GraphProto) -> list[int]:
    """The nodes that the outputs depend on, in the file's order."""
    wanted = {value.name for value in graph.output}
    found = []
    for number in reversed(range(len(graph.node))):
        if not wanted.isdisjoint(graph.node[number].output):
            found.append(number)
            wanted.update(reads(graph.node[number]))
    return found[::-1]


def _bodies(node: NodeProto) -> list[GraphProto]:
    single = [one.g for one in node.attribute if one.type == AttributeProto.GRAPH]
    return single + [body for one in node.attribute if one.type == AttributeProto.GRAPHS for body in one.graphs]


def reads(node: NodeProto) -> list[str]:
    """The names that a node reads, those that its bodies take from around them included."""
    return [name for name in node.input if name] + [name for body in _bodies(node) for name in _captured(body)]


def _stored(graph: GraphProto) -> set[str]:
    """The names of the weights."""
    return {one.name for one in graph.initializer} | {one.values.name for one in graph.sparse_initializer}


def _captured(body: GraphProto) -> list[str]:
    own = {value.name for value in body.input} | _stored(body)
    own |= {name for node in body.node for name in node.output}
    read = [name for node in body.node for name in reads(node)] + [value.name for value in body.output]
    return list(dict.fromkeys(name for name in read if name not in own))
