"""Where to cut a graph of operators between an edge and a cloud, so that an answer comes soonest.

The form is that of DADS (Hu et al., INFOCOM 2019): the source is the edge, the sink the cloud; a node on one side costs
its time there, a tensor that crosses its codec and its bytes; arcs back without a limit keep what follows a node of the
cloud in the cloud. The smallest cut is the fastest way, the edge alone and the cloud alone among them.

A prediction errs, so a split is only taken for a gain above that error. And where ways were measured as wholes, the
smallest cut proposes, and the fastest measured way is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from edgewise.devices.links import LinkProfile
from edgewise.errors import UsageError
from edgewise.plan.dag import Dag, Sets, Tensor, Way
from edgewise.plan.maxflow import Network

MARGIN: Final = 0.05  # by which share of the better baseline a split must be faster: predictions err so much
PER_S: Final = 10**12  # a cut is weighed in whole picoseconds
NEVER: Final = 1 << 100  # picoseconds; beyond all sums of times
SAME: Final = 1e-9  # relative: costs that are closer are one
ENUMERABLE: Final = 16  # nodes of a graph whose every cut may be listed
PLACES: Final = ("edge", "cloud", "split")  # of equals the first is taken


@dataclass(frozen=True, slots=True)
class Choice:
    """The way to take over a link and its seconds; a baseline is None where a node or the input rules it out."""

    way: Way
    seconds: float
    edge_only_s: float | None
    cloud_only_s: float | None


@dataclass(frozen=True, slots=True)
class Table:
    """Every way that is the fastest at some bandwidth, and the baselines. `unmeasured` were proposed too, but have no
    measured times while others have: measure them, and make the table again."""

    ways: tuple[Way, ...]
    unmeasured: tuple[Way, ...]
    margin: float

    def at(self, link: LinkProfile) -> Choice:
        """Looks at each way, of which there are few: a new bandwidth costs microseconds."""
        way = min(self.ways, key=lambda way: self._rank(way, link))
        alone = {way.place: way.seconds(link) for way in self.ways if way.place != "split"}
        return Choice(way, way.seconds(link), alone.get("edge"), alone.get("cloud"))

    def breaks(self, link: LinkProfile) -> list[tuple[float, Way]]:
        """The ways from the slowest uplink to the fastest, each with the bytes a second above which it is taken (the
        first: 0). The downlink grows with the uplink as in `link`. Exact: a way's time is a line over the seconds that
        a byte takes, and the least time is the lower envelope of these lines."""
        lines = [self._line(way, link) for way in self.ways]
        at = min(range(len(lines)), key=lambda i: lines[i][::-1])
        found = [(0.0, self.ways[at])]
        while True:
            here_s, here_bytes = lines[at]
            sooner = [
                ((here_s - other_s) / (other_bytes - here_bytes), other_bytes, i)
                for i, (other_s, other_bytes) in enumerate(lines)
                if other_bytes > here_bytes and other_s < here_s
            ]
            if not sooner:
                return found
            s_per_byte, _, at = max(sooner)
            found.append((1 / s_per_byte, self.ways[at]))

    def _rank(self, way: Way, link: LinkProfile) -> float:
        return self._weight(way) * way.seconds(link)

    def _weight(self, way: Way) -> float:
        return 1.0 if way.place == "split" else 1.0 - self.margin

    def _line(self, way: Way, link: LinkProfile) -> tuple[float, float]:
        """Its rank: seconds besides the bytes, and bytes at the uplink's speed."""
        if way.place == "edge":
            return self._weight(way) * way.local_s, 0.0
        rest_s, carried = way.local_s + link.rtt_ms / 1e3, way.up_bytes + way.down_bytes * _down_ratio(link)
        return self._weight(way) * rest_s, self._weight(way) * carried


def best(dag: Dag, link: LinkProfile, *, margin: float = MARGIN) -> Choice:
    """The fastest way over that link; a split only if it is predicted faster than both baselines by that share.
    UsageError if no way is allowed."""
    proposed = dag.way_of(cheapest(dag, 1 / link.up_bytes_per_s, 1 / link.down_bytes_per_s))
    return _table(dag, [proposed], margin).at(link)


def sweep(
    dag: Dag,
    link: LinkProfile,
    *,
    slowest_bytes_per_s: float = 1e3,
    fastest_bytes_per_s: float = 1e9,
    margin: float = MARGIN,
) -> Table:
    """All ways that some uplink between these two makes the fastest, the downlink growing with it as in `link`.

    No bandwidth is missed, for none is stepped over: where two uplinks have different ways, the one at which these two
    would be equal is looked at, until no third way is faster there (Eisner and Severance, 1976).
    """
    found: dict[int, Way] = {}
    ratio = _down_ratio(link)

    def fastest(s_per_byte: float) -> Way:
        edge = cheapest(dag, s_per_byte, s_per_byte * ratio)
        return found.setdefault(edge, dag.way_of(edge, by_sums=True))

    _between(fastest, ratio, fastest(1 / slowest_bytes_per_s), fastest(1 / fastest_bytes_per_s))
    return _table(dag, [dag.way_of(edge) for edge in found], margin)


def _between(fastest: Callable[[float], Way], ratio: float, slow: Way, fast: Way) -> None:
    """Ask `fastest` for all ways between two neighbours. The round trip and the overheads are in no cut's weight."""
    slow_bytes, fast_bytes = (way.up_bytes + way.down_bytes * ratio for way in (slow, fast))
    if fast_bytes <= slow_bytes or slow.computing_s <= fast.computing_s:
        return
    s_per_byte = (slow.computing_s - fast.computing_s) / (fast_bytes - slow_bytes)
    middle = fastest(s_per_byte)
    least_s = middle.computing_s + (middle.up_bytes + middle.down_bytes * ratio) * s_per_byte
    if least_s < (slow.computing_s + slow_bytes * s_per_byte) * (1 - SAME):
        _between(fastest, ratio, slow, middle)
        _between(fastest, ratio, middle, fast)


def _down_ratio(link: LinkProfile) -> float:
    return link.up_bytes_per_s / link.down_bytes_per_s


def _table(dag: Dag, proposed: Sequence[Way], margin: float) -> Table:
    """Of what was proposed, or of what was measured where anything was."""
    if not 0 <= margin < 1:
        raise UsageError(f"the margin is {margin:g}; 0 to below 1 is allowed")
    baselines = [dag.way_of(dag.sets.everything), dag.way_of(0)]
    ways = {way.edge: way for way in (*baselines, *proposed) if math.isfinite(way.local_s)}
    unmeasured: tuple[Way, ...] = ()
    if dag.measured:
        unmeasured = tuple(way for edge, way in ways.items() if edge not in dag.measured)
        if missing := [way.place for way in unmeasured if way.place != "split"]:
            raise UsageError(
                f"ways were measured, but not the {' and the '.join(missing)} alone", hint="measure that beside them"
            )
        ways = {edge: dag.way(edge) for edge in dag.measured}
    if not ways:
        raise UsageError("no way to divide this graph is allowed", hint="allow its input or another tensor to cross")
    return Table(tuple(sorted(ways.values(), key=lambda way: PLACES.index(way.place))), unmeasured, margin)


def chain_cuts(dag: Dag) -> list[Way]:
    """The allowed splits over a single tensor, from the input on. Of the nodes beside its way the edge has those alone
    that the tensor needs, or all that can do without it."""
    sets, found = dag.sets, set[int]()
    for number, tensor in enumerate(dag.tensors):
        if tensor.coded_bytes is not None:
            around = {sets.needed(number), sets.without_users(number)} - {0, sets.everything}
            found |= {edge for edge in around if sets.crossing(edge) == [number]}
    return sorted(map(dag.way_of, found), key=lambda way: (len(way.edge), way.crossing))


def all_cuts(dag: Dag) -> Iterator[Way]:
    """Every way, those that are not allowed included: the oracle for small graphs. UsageError above 16 nodes."""
    if len(dag.nodes) > ENUMERABLE:
        raise UsageError(f"{len(dag.nodes)} nodes have too many cuts to list; at most {ENUMERABLE} are allowed")
    return (dag.way_of(edge) for edge in range(dag.sets.everything + 1) if dag.sets.is_closed(edge))


def cheapest(dag: Dag, up_s_per_byte: float, down_s_per_byte: float) -> int:
    """The nodes on the edge of the way that takes least, the round trip and the overheads left out: all splits have the
    same of them, so this is the fastest split, or a baseline that no split is faster than. Of equals it is the one with
    the fewest nodes on the edge. UsageError if no way is allowed."""
    sets = dag.sets
    down_s = [math.fsum(dag.tensors[i].result_bytes for i in made) * down_s_per_byte for made in sets.outputs]
    chains, tensors = _shortened(
        sets,
        [_ps(node.edge_s) for node in dag.nodes],
        [_ps(node.cloud_s + back) for node, back in zip(dag.nodes, down_s, strict=True)],
        [_weight_ps(tensor, up_s_per_byte) for tensor in dag.tensors],
    )
    edge = _smallest(sets, chains, tensors)
    if not sets.is_closed(edge):
        raise UsageError("what only the cloud may do comes before what only the edge may do", hint="allow one of them")
    return edge


def _ps(seconds: float) -> int:
    return NEVER if math.isinf(seconds) else round(seconds * PER_S)


def _weight_ps(tensor: Tensor, up_s_per_byte: float) -> int:
    if tensor.coded_bytes is None:
        return NEVER
    return _ps(tensor.encode_s + tensor.decode_s + tensor.coded_bytes * up_s_per_byte)


@dataclass(frozen=True, slots=True)
class _Chain:
    """Nodes that are on one side together, from the first to the last."""

    nodes: tuple[int, ...]
    edge_ps: int
    cloud_ps: int


def _shortened(
    sets: Sets, edge_ps: list[int], cloud_ps: list[int], weight_ps: list[int]
) -> tuple[list[_Chain], list[tuple[int, int]]]:
    """Chains, and (tensor, its weight) of all but those within them. A run of nodes of which each feeds the next alone
    can only be cut in one place, and the best place does not depend on the rest of the graph."""
    chains: list[_Chain] = []
    inside: set[int] = set()
    for run in _runs(sets):
        links = [sets.outputs[node][0] for node in run[:-1]]
        gains = _running(edge_ps[node] - cloud_ps[node] for node in run)
        cuts = [gain + weight_ps[tensor] for gain, tensor in zip(gains, links, strict=False)]
        at = min(range(len(cuts)), key=cuts.__getitem__) + 1 if cuts else 0
        inside.update(links)
        inside.discard(links[at - 1] if links else -1)
        for part in (run[:at], run[at:]):
            if part:
                chains.append(
                    _Chain(tuple(part), sum(edge_ps[node] for node in part), sum(cloud_ps[node] for node in part))
                )
    return chains, [(tensor, weight) for tensor, weight in enumerate(weight_ps) if tensor not in inside]


def _runs(sets: Sets) -> list[list[int]]:
    """All nodes, in runs of which each node but the last feeds the next one alone, and that one nothing else."""
    runs: list[list[int]] = []
    of_last: dict[int, list[int]] = {}
    for node in sets.order:
        inputs = sets.inputs[node]
        before = sets.producer[inputs[0]] if len(inputs) == 1 else -1
        run = of_last.get(before)
        if run is None or sets.outputs[before] != inputs or sets.consumers[inputs[0]] != [node]:
            run = []
            runs.append(run)
        run.append(node)
        of_last[node] = run
    return runs


def _running(numbers: Iterator[int]) -> list[int]:
    found, total = [], 0
    for number in numbers:
        total += number
        found.append(total)
    return found


def _smallest(sets: Sets, chains: Sequence[_Chain], tensors: Sequence[tuple[int, int]]) -> int:
    """The nodes on the edge. Vertex 0 is the edge, 1 the cloud, then chains, then tensors: a tensor's vertex is cut
    once from what makes it, and goes with its users."""
    rank = {node: i for i, node in enumerate(sets.order)}
    first = {node: i + 2 for i, chain in enumerate(chains) for node in chain.nodes}
    network = Network(2 + len(chains) + len(tensors))
    order = [0, 2 * len(rank) + 3, *(2 * rank[chain.nodes[0]] + 2 for chain in chains)]
    for vertex, chain in enumerate(chains, 2):
        either = min(chain.edge_ps, chain.cloud_ps)
        network.connect(vertex, 1, chain.edge_ps - either)
        network.connect(0, vertex, chain.cloud_ps - either)
    for vertex, (tensor, weight) in enumerate(tensors, 2 + len(chains)):
        producer = sets.producer[tensor]
        source = 0 if producer < 0 else first[producer]
        order.append(1 if producer < 0 else 2 * rank[producer] + 3)
        network.connect(source, vertex, weight)
        for user in sets.consumers[tensor]:
            network.connect(vertex, first[user], NEVER)
            if source:
                network.connect(first[user], source, NEVER)
    side = network.source_side(order)
    return sum(1 << node for node, vertex in first.items() if side[vertex])
