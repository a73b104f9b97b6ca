"""Cuts of graphs: the same as trying every one, each tensor paid once, and what must hold however the numbers are."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.devices.links import LINKS, LinkProfile
from edgewise.errors import UsageError
from edgewise.plan.dag import Dag, Node, Tensor, Way
from edgewise.plan.mincut import all_cuts, best, chain_cuts, sweep

thorough = settings(deadline=None, max_examples=300)
quick = settings(deadline=None, max_examples=80)
seconds = st.integers(0, 64).map(lambda n: n / 64)  # sums of which are exact
counts = st.one_of(st.integers(0, 500_000), st.none())
links = st.builds(
    LinkProfile,
    name=st.just("drawn"),
    up_bytes_per_s=st.floats(1e3, 1e8),
    down_bytes_per_s=st.floats(1e3, 1e8),
    rtt_ms=st.floats(0, 500),
)


@st.composite
def dags(draw: st.DrawFn, most: int = 9, forbidding: bool = True) -> Dag:
    """Graphs of any shape: several inputs, tensors of many users, results in the middle, nodes tied to a side."""
    count = draw(st.integers(1, most))
    names = [f"n{i}" for i in range(count)]
    users: list[list[str]] = [[] for _ in range(count + 2)]  # of each node's tensor, then of the two inputs'
    for i, name in enumerate(names):
        sources = [*range(i), count, count + 1]
        for source in draw(st.lists(st.sampled_from(sources), min_size=1, max_size=3, unique=True)):
            users[source].append(name)
    tied = st.sampled_from([(1.0, 1.0)] * 8 + [(1.0, math.inf), (math.inf, 1.0)]) if forbidding else st.just((1.0, 1.0))
    nodes = []
    for name in names:
        e, c = draw(tied)
        nodes.append(Node(name, e if e > 1 else draw(seconds), c if c > 1 else draw(seconds)))
    sizes = counts if forbidding else st.integers(0, 500_000)
    tensors = [
        Tensor(
            f"t{i}",
            names[i] if i < count else None,
            tuple(users[i]),
            draw(sizes),
            encode_s=draw(seconds) / 8,
            decode_s=draw(seconds) / 8,
            result_bytes=draw(st.sampled_from([0, 4000])) if i < count else 0,
        )
        for i in range(count + 2)
    ]
    return Dag(tuple(nodes), tuple(tensors), draw(seconds) / 4, draw(seconds) / 4)


def fastest(dag: Dag, link: LinkProfile) -> float:
    return min(way.seconds(link) for way in all_cuts(dag))


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


def chain(count: int = 6, *, slower: float = 4.0, sizes: Mapping[int, int] | None = None) -> Dag:
    """Nodes one after the other; the tensor behind the third is the smallest."""
    coded = [100_000 if i != 2 else 10_000 for i in range(count)] if sizes is None else [sizes[i] for i in range(count)]
    nodes = tuple(Node(f"n{i}", slower * 0.01, 0.01) for i in range(count))
    inner = tuple(
        Tensor(f"t{i}", f"n{i}", (f"n{i + 1}",) if i + 1 < count else (), coded[i], result_bytes=4 * (i + 1 == count))
        for i in range(count)
    )
    return Dag(nodes, (Tensor("in", None, ("n0",), 200_000), *inner))


def link(up: float, rtt_ms: float = 0.0, down: float = math.inf) -> LinkProfile:
    return LinkProfile("made", up, down, rtt_ms)


@thorough
@given(dags(), links)
def test_the_cut_is_as_fast_as_the_fastest_of_all_ways(dag: Dag, link: LinkProfile) -> None:
    least = fastest(dag, link)
    if math.isinf(least):
        with pytest.raises(UsageError, match="allow"):
            best(dag, link, margin=0)
    else:
        assert close(best(dag, link, margin=0).seconds, least)


@quick
@given(dags(most=12), links)
def test_larger_graphs_too(dag: Dag, link: LinkProfile) -> None:
    least = fastest(dag, link)
    if math.isfinite(least):
        assert close(best(dag, link, margin=0).seconds, least)


@quick
@given(dags(forbidding=False), links, st.floats(0, 0.5))
def test_a_split_is_never_slower_than_a_baseline_and_is_taken_only_for_the_margin(
    dag: Dag, link: LinkProfile, margin: float
) -> None:
    found = best(dag, link, margin=margin)
    assert found.edge_only_s is not None
    assert found.cloud_only_s is not None
    baseline = min(found.edge_only_s, found.cloud_only_s)
    assert found.seconds <= baseline
    assert found.edge_only_s == dag.way(frozenset(node.name for node in dag.nodes)).seconds(link)
    assert found.cloud_only_s == dag.way(frozenset()).seconds(link)
    if found.way.place == "split":
        assert found.seconds < baseline * (1 - margin)
    elif fastest(dag, link) < baseline * (1 - margin) * (1 - 1e-9):
        pytest.fail("a split is faster by more than the margin")


@quick
@given(dags(), links, st.floats(1, 100))
def test_more_bandwidth_is_never_slower(dag: Dag, link: LinkProfile, times: float) -> None:
    if math.isinf(fastest(dag, link)):
        return
    faster = replace(link, up_bytes_per_s=link.up_bytes_per_s * times, down_bytes_per_s=link.down_bytes_per_s * times)
    assert best(dag, faster, margin=0).seconds <= best(dag, link, margin=0).seconds * (1 + 1e-9)


@thorough
@given(dags(forbidding=False), links, st.integers(2, 16))
def test_a_slower_edge_never_moves_nodes_to_the_edge(dag: Dag, link: LinkProfile, times: int) -> None:
    slower = replace(dag, nodes=tuple(replace(node, edge_s=node.edge_s * times) for node in dag.nodes))
    assert best(slower, link, margin=0).way.edge <= best(dag, link, margin=0).way.edge


@quick
@given(dags(), links)
def test_a_table_knows_the_fastest_way_at_every_bandwidth(dag: Dag, link: LinkProfile) -> None:
    if math.isinf(fastest(dag, link)):
        return
    table = sweep(dag, link, margin=0)
    for up in (1e3, 7e3, 50e3, 300e3, 4e6, 9e7, 1e9):
        now = replace(link, up_bytes_per_s=up, down_bytes_per_s=up * link.down_bytes_per_s / link.up_bytes_per_s)
        assert close(table.at(now).seconds, fastest(dag, now))


@quick
@given(dags(forbidding=False), links, st.floats(0, 0.3))
def test_breaks_are_where_the_table_changes_its_mind(dag: Dag, link: LinkProfile, margin: float) -> None:
    table = sweep(dag, link, margin=margin)
    breaks = table.breaks(link)
    starts = [start for start, _ in breaks]
    assert starts == sorted(starts)
    for (start, way), end in zip(breaks, [*starts[1:], 1e12], strict=True):
        up = math.sqrt(max(start, 1.0) * end)
        if start < up < end:
            at = replace(link, up_bytes_per_s=up, down_bytes_per_s=up * link.down_bytes_per_s / link.up_bytes_per_s)
            chosen = table.at(at)
            ranked = way.seconds(at) * (1 if way.place == "split" else 1 - margin)
            assert close(ranked, chosen.seconds * (1 if chosen.way.place == "split" else 1 - margin))


def test_a_tensor_of_many_users_is_paid_once() -> None:
    users = tuple(f"user{i}" for i in range(5))
    nodes = (Node("maker", 0.1, 0.1), *(Node(name, 10.0, 0.1) for name in users))
    tensors = (
        Tensor("in", None, ("maker",), 10_000_000),
        Tensor("shared", "maker", users, 1_000, encode_s=0.25, decode_s=0.5),
        *(Tensor(f"out of {name}", name, (), 0, result_bytes=10) for name in users),
    )
    found = best(Dag(nodes, tensors), link(1_000, rtt_ms=100, down=100))
    assert found.way.edge == {"maker"}
    assert found.way.crossing == ("shared",)
    assert (found.way.up_bytes, found.way.down_bytes) == (1_000, 50)
    assert found.seconds == pytest.approx(0.1 + 0.25 + 1.0 + 0.1 + 0.5 + 5 * 0.1 + 0.5)


def test_a_skip_over_the_cut_is_paid_too() -> None:
    nodes = tuple(Node(name, 1.0, 0.01) for name in "abcd")
    skip = Tensor("skip", "a", ("b", "d"), 900)
    tensors = (Tensor("in", None, ("a",), 5000), skip, Tensor("b", "b", ("c",), 500), Tensor("c", "c", ("d",), 10))
    way = Dag(nodes, tensors).way(frozenset("abc"))
    assert way.crossing == ("skip", "c")
    assert way.up_bytes == 910


def test_the_cloud_alone_sends_the_coded_input_and_gets_the_result() -> None:
    found = best(chain(slower=100), link(1e6, rtt_ms=50, down=1.0))
    assert found.way.place == "cloud"
    assert found.cloud_only_s == found.seconds == pytest.approx(0.2 + 0.05 + 6 * 0.01 + 4.0)
    assert found.edge_only_s == pytest.approx(6.0)


def test_the_edge_alone_pays_no_round_trip_and_no_cloud() -> None:
    dag = replace(chain(slower=1.0), cloud_overhead_s=3.0, edge_overhead_s=0.5)
    found = best(dag, LINKS["2g"])
    assert found.way.place == "edge"
    assert found.seconds == pytest.approx(0.56)
    assert dag.way(frozenset({"n0"})).overhead_s == 3.5
    assert dag.way(frozenset()).overhead_s == 3.0


def test_a_chain_is_cut_at_its_smallest_tensor_when_the_link_is_slow() -> None:
    found = best(chain(), link(1e6))
    assert found.way.crossing == ("t2",)
    assert found.seconds == pytest.approx(3 * 0.04 + 0.01 + 3 * 0.01)


def test_an_input_that_must_not_leave_keeps_the_first_node_here() -> None:
    dag = chain(slower=100)
    private = replace(dag, tensors=(replace(dag.tensors[0], coded_bytes=None), *dag.tensors[1:]))
    found = best(private, link(1e9))
    assert found.way.edge == {"n0"}
    assert found.cloud_only_s is None


def test_of_equals_the_edge_alone_is_taken() -> None:
    free = Dag((Node("a", 0.5, 0.5),), (Tensor("in", None, ("a",), 0), Tensor("out", "a", (), 0)))
    assert best(free, link(1e9)).way.place == "edge"


def test_what_was_measured_decides_and_what_was_not_is_named() -> None:
    dag = chain()
    everything, none = frozenset(node.name for node in dag.nodes), frozenset[str]()
    third, fourth = dag.before("t2").edge, dag.before("t3").edge
    assert third == {"n0", "n1", "n2"}
    measured = {everything: (0.24, 0.0), none: (0.0, 0.06), fourth: (0.02, 0.02)}
    table = sweep(replace(dag, measured=measured), link(1e6))
    assert third in [way.edge for way in table.unmeasured]
    assert table.at(link(1e6)).way.edge == fourth  # though its sums are worse
    assert table.at(link(1e6)).seconds == pytest.approx(0.02 + 0.1 + 0.02)
    rest = {way.edge: (0.5, 0.5) for way in table.unmeasured}
    whole = sweep(replace(dag, measured={**measured, **rest}), link(1e6))
    assert not whole.unmeasured
    assert whole.at(link(1e6)).way.edge == fourth
    with pytest.raises(UsageError, match="not the cloud alone"):
        sweep(replace(dag, measured={everything: (0.24, 0.0)}), link(1e6))


@quick
@given(dags(forbidding=False))
def test_chain_cuts_are_the_splits_over_one_tensor(dag: Dag) -> None:
    found = chain_cuts(dag)
    edges = [way.edge for way in found]
    splits = {way.edge: way for way in all_cuts(dag) if way.place == "split" and len(way.crossing) == 1}
    assert set(edges) <= set(splits)
    assert len(set(edges)) == len(edges)
    assert [len(edge) for edge in edges] == sorted(len(edge) for edge in edges)
    assert {edge for edge, way in splits.items() if edge == dag.before(*way.crossing).edge} <= set(edges)


def test_chain_cuts_of_a_residual_network_lie_between_its_blocks() -> None:
    names = "abcdefg"  # b and c are a block that a skip goes around; so are e and f
    users = {"a": ("b", "d"), "b": ("c",), "c": ("d",), "d": ("e", "g"), "e": ("f",), "f": ("g",), "g": ()}
    tensors = tuple(Tensor(name, name, users[name], None if name == "a" else 100) for name in names)
    dag = Dag(tuple(Node(name, 1, 1) for name in names), (Tensor("in", None, ("a",), 100), *tensors))
    assert [way.crossing for way in chain_cuts(dag)] == [("d",)]  # that after a is not allowed
    assert chain_cuts(dag)[0].edge == set("abcd")


def large(count: int, seed: int) -> Dag:
    """A thousand nodes with branches and skips, sizes falling towards the end."""
    draw = random.Random(seed)
    users: list[list[str]] = [[] for _ in range(count)]
    for i in range(1, count):
        for source in {i - 1 if draw.random() < 0.8 else draw.randrange(i), draw.randrange(max(0, i - 25), i)}:
            users[source].append(str(i))
    nodes = tuple(Node(str(i), draw.expovariate(500), draw.expovariate(2000)) for i in range(count))
    inner = (
        Tensor(
            str(i), str(i), tuple(users[i]), round(2e5 * draw.random() * 0.995**i), 1e-5, 1e-5, 0 if users[i] else 400
        )
        for i in range(count)
    )
    return Dag(nodes, (Tensor("in", None, ("0",), 60_000), *inner))


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_nodes(seed: int) -> None:
    dag = large(1000, seed)
    table = sweep(dag, LINKS["lte"], margin=0)
    assert 2 <= len(table.ways) < 40
    splits = chain_cuts(dag)
    for name in ("2g", "3g", "lte", "wifi", "lan"):
        found = best(dag, LINKS[name], margin=0)
        assert found.edge_only_s is not None
        assert found.cloud_only_s is not None
        assert found.seconds <= min(found.edge_only_s, found.cloud_only_s)
        assert all(found.seconds <= way.seconds(LINKS[name]) * (1 + 1e-9) for way in splits)
        assert not _better_neighbour(dag, found.way, LINKS[name])


def _better_neighbour(dag: Dag, way: Way, link: LinkProfile) -> bool:
    """Whether moving one node to the other side is faster."""
    for node in dag.nodes:
        try:
            moved = dag.way(way.edge ^ {node.name})
        except UsageError:
            continue
        if moved.seconds(link) < way.seconds(link) * (1 - 1e-9):
            return True
    return False


@pytest.mark.parametrize(
    ("nodes", "tensors", "said"),
    [
        ((), (), "has no nodes"),
        ((Node("a", 1, 1), Node("a", 1, 1)), (), "the same name"),
        ((Node("a", -1, 1),), (), "takes -1 s"),
        ((Node("a", math.inf, math.inf),), (), "infinite on one of the sides"),
        ((Node("a", math.nan, 1),), (), "takes nan s"),
        ((Node("a", 1, 1),), (Tensor("t", "b", (), 1),), "'b', which is no node"),
        ((Node("a", 1, 1),), (Tensor("t", "a", (), -1),), "-1 bytes"),
        ((Node("a", 1, 1),), (Tensor("t", "a", (), 1, encode_s=math.nan),), "nan s to encode"),
        ((Node("a", 1, 1), Node("b", 1, 1)), (Tensor("t", "a", ("b",), 1), Tensor("u", "b", ("a",), 1)), "waits for"),
    ],
)
def test_what_is_no_graph_is_refused(nodes: tuple[Node, ...], tensors: tuple[Tensor, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Dag(nodes, tensors)


def test_what_cannot_be_asked_of_a_graph() -> None:
    dag = chain()
    with pytest.raises(UsageError, match="needs one in the cloud"):
        dag.way(frozenset({"n3"}))
    with pytest.raises(UsageError, match="no node 'x'"):
        dag.way(frozenset({"x"}))
    with pytest.raises(UsageError, match="no tensor 'x'"):
        dag.before("x")
    with pytest.raises(UsageError, match="margin is 1"):
        best(dag, link(1e6), margin=1)
    with pytest.raises(UsageError, match="too many cuts"):
        all_cuts(chain(17))
    with pytest.raises(UsageError, match="measured with -1 s"):
        replace(dag, measured={frozenset[str](): (-1.0, 0.0)})
    with pytest.raises(UsageError, match="overhead is nan"):
        replace(dag, edge_overhead_s=math.nan)
