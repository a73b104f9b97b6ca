"""Splits of decoders: the arithmetic of a cut, limits that are kept, advice that works."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.devices.catalogue import shipped as catalogue
from edgewise.devices.links import LINKS, LinkProfile
from edgewise.errors import UsageError
from edgewise.models.known import of_words
from edgewise.models.outline import Outline, Stored
from edgewise.plan.codec_table import CodecTable, Row
from edgewise.plan.cuts import ANSWER, FRAME_BYTES, Split, Wish
from edgewise.plan.partition import SplitPlan, make
from edgewise.plan.precision import PRECISIONS
from edgewise.plan.sides import Side, side
from edgewise.plan.sites import Catalogued
from edgewise.plan.speeds import shipped as speeds

quick = settings(deadline=None, max_examples=25)
Q4 = PRECISIONS["q4_1"]
SMOL = of_words("SmolLM2-135M")
NOTHING = CodecTable(())
SLOW, QUICK = "raspberry-pi-5-8gb", "desktop-ddr5-5600"


def site(name: str) -> Catalogued:
    return Catalogued(*catalogue().find(name))


def plan(
    outline: Outline = SMOL,
    *,
    edge: str = SLOW,
    cloud: str = QUICK,
    link: LinkProfile = LINKS["5g"],
    codecs: CodecTable = NOTHING,
    **wishes: Any,
) -> SplitPlan:
    return make(outline, site(edge), site(cloud), link, speeds(), codecs, Wish(**wishes))


def split(
    outline: Outline = SMOL, *, link: LinkProfile = LINKS["5g"], codecs: CodecTable = NOTHING, **wishes: Any
) -> Split:
    wish = Wish(**wishes)
    precision = Q4 if outline.stored is None else None

    def on(name: str) -> Side:
        return side(outline, site(name), speeds(), precision, context=wish.context, prompt=wish.prompt)

    return Split(outline, on(SLOW), on(QUICK), link, codecs, wish, precision=precision)


def row(cut: int, name: str, size: int, high: float) -> Row:
    return Row(
        model="smollm2-135m",
        weights=None,
        layers=30,
        width=576,
        cut=cut,
        codec=name,
        bytes=size,
        ppl_rise=high / 2,
        interval=(0.0, high),
        tokens=50_000,
        refused=None,
    )


MEASURED = CodecTable(
    tuple(r for cut in range(1, 30) for r in (row(cut, "int4", 300, 0.008), row(cut, "int8", 600, 0.001)))
)


@pytest.mark.parametrize("head", ["cloud", "edge"])
def test_a_tokens_time_is_a_straight_line_over_the_cut(head: str) -> None:
    arithmetic = split(head=head)
    ms = [cut.ms for cut in arithmetic.cuts()]
    assert len(ms) == 29
    steps = [b - a for a, b in pairwise(ms)]
    assert steps == pytest.approx([arithmetic.layer_gain_ms()] * 28)
    first = [cut.first_ms for cut in arithmetic.cuts()]
    gain = 512 * (arithmetic.edge.prompt_layer_ms - arithmetic.cloud.prompt_layer_ms)
    assert [b - a for a, b in pairwise(first)] == pytest.approx([gain] * 28)


def test_a_tokens_time_is_that_of_both_sides_and_the_link() -> None:
    slow = LinkProfile("made", up_bytes_per_s=10_000, down_bytes_per_s=5_000, rtt_ms=80)
    at_cloud, at_edge = split(link=slow).cut(10), split(link=slow, head="edge").cut(10)
    there, back = 1e3 * (2304 + FRAME_BYTES) / 10_000, 1e3 * (8 + FRAME_BYTES) / 5_000
    assert at_cloud.token.link == pytest.approx(80 + there + back)
    assert at_edge.token.link == pytest.approx(80 + there + 1e3 * (2304 + FRAME_BYTES) / 5_000)
    edge, cloud = split().edge, split().cloud
    assert at_cloud.token.edge == at_edge.token.edge == pytest.approx(10 * edge.layer_ms)
    assert at_cloud.token.cloud == at_edge.token.cloud == pytest.approx(20 * cloud.layer_ms)
    assert (at_cloud.token.head, at_edge.token.head) == (cloud.head_ms, edge.head_ms)
    t = at_cloud.token
    assert at_cloud.ms == pytest.approx(t.edge + t.link + t.cloud + t.head + t.besides)


def test_layers_and_head_add_up_to_what_the_model_takes_alone() -> None:
    alone = split().baselines()
    edge = split().edge
    assert 0 < edge.head_ms < alone.edge_only_ms
    assert alone.edge_only_ms == pytest.approx(30 * edge.layer_ms + edge.head_ms)
    whole = edge.head_ms + 30 * edge.layer_ms
    share = edge.head_ms / whole
    assert 0.05 < share < 0.4  # the head is 21 % of the multiplications of this model, and takes no launches


def test_the_cloud_alone_pays_one_round_trip_for_an_answer() -> None:
    near, far = (split(link=LinkProfile("made", 1e6, 1e6, rtt)).baselines() for rtt in (0.0, 256.0))
    assert far.cloud_only_ms - near.cloud_only_ms == pytest.approx(256 / ANSWER)
    assert far.cloud_only_first_token_ms - near.cloud_only_first_token_ms == pytest.approx(256)
    assert far.edge_only_ms == near.edge_only_ms


def test_the_edge_holds_table_layers_keys_and_values_log_and_activations() -> None:
    outline = replace(SMOL, stored=Stored(body=60_000_000, head=30_000_000, embedding=0))
    memory = split(outline, context=1000).cut(10).memory
    assert memory.table == 30_000_000  # tied: one table
    assert memory.layers == 20_000_000
    assert memory.head == 0
    assert memory.kv == 10 * 2 * 3 * 64 * 1000 * 2
    assert memory.log == 1000 * (2304 + 4)
    assert memory.total == 50_000_000 + memory.kv + memory.log + memory.activations
    assert memory.process == 120 << 20


def test_an_untied_head_counts_where_it_is() -> None:
    outline = replace(SMOL, tied=False, stored=Stored(body=60_000_000, head=30_000_000, embedding=20_000_000))
    there, here = split(outline).cut(10).memory, split(outline, head="edge").cut(10).memory
    assert (there.table, there.head) == (20_000_000, 0)
    assert (here.table, here.head) == (20_000_000, 30_000_000)
    assert here.activations - there.activations == 4 * outline.vocab


def test_windows_keep_less() -> None:
    full, windowed = of_words("SmolLM2-135M"), replace(SMOL, windows=(256,) * 10 + (0,) * 20)
    assert split(windowed).cut(10).memory.kv * 8 == split(full).cut(10).memory.kv


def test_codecs_come_from_the_table_and_shorten_the_way() -> None:
    exact, coded = (plan(link=LINKS["2g"], privacy_depth=4, codecs=table) for table in (NOTHING, MEASURED))
    assert (exact.codec, exact.bytes_per_token_up, exact.ppl_rise) == ("exact", 2304, 0)
    assert (coded.codec, coded.bytes_per_token_up, coded.ppl_rise) == ("int4", 300, 0.004)
    assert exact.predicted_ms is not None
    assert coded.predicted_ms is not None
    assert exact.predicted_ms - coded.predicted_ms == pytest.approx(1e3 * 2004 / 6250)
    assert plan(privacy_depth=4, codecs=MEASURED, max_rise=0.002).codec == "int8"
    assert plan(privacy_depth=4, codecs=MEASURED, max_rise=0.0).codec == "exact"


def test_down_come_tokens_or_states() -> None:
    assert plan(codecs=MEASURED).bytes_per_token_down == 8
    assert plan(codecs=MEASURED, head="edge").bytes_per_token_down == 300


@quick
@given(st.integers(50, 160), st.booleans(), st.integers(256, 4096))
def test_memory_takes_as_many_layers_as_fit(megabytes: int, keep_tail: bool, context: int) -> None:
    limit = megabytes * 10**6
    found = plan(edge_memory_bytes=limit, context=context, keep_tail=keep_tail)
    whole = split(context=context).whole_bytes(2304)
    if not found.feasible:
        assert (whole if keep_tail else split(context=context).cut(1).memory.total) > limit
        return
    assert found.cut is not None
    assert found.edge_bytes == split(context=context).cut(found.cut).memory.total <= limit
    assert found.edge_bytes_with_tail == whole
    if keep_tail:
        assert whole <= limit
    elif found.decided_by == "memory":
        assert split(context=context).cut(found.cut + 1).memory.total > limit


@quick
@given(
    st.integers(1, 29),
    st.sampled_from(["5g", "lan", "3g"]),
    st.sampled_from([None, 60.0, 400.0]),
    st.sampled_from([None, 90_000_000]),
    st.sampled_from([None, 1e-6]),
)
def test_a_plan_keeps_to_every_limit_and_is_the_best_that_does(
    depth: int, link: str, max_ms: float | None, memory: int | None, price: float | None
) -> None:
    found = plan(link=LINKS[link], privacy_depth=depth, max_ms=max_ms, edge_memory_bytes=memory, price=price)
    allowed = [
        cut
        for cut in split(link=LINKS[link]).cuts()
        if cut.layers >= depth
        and (max_ms is None or cut.ms <= max_ms)
        and (memory is None or cut.memory.total <= memory)
    ]
    assert found.feasible is bool(allowed)
    if found.cut is not None:
        deepest, fastest = max(cut.layers for cut in allowed), min(allowed, key=lambda cut: cut.ms).layers
        assert found.cut == (deepest if memory or price else fastest)
        if price:
            assert found.price_per_token == pytest.approx(price * (30 - found.cut))
    else:
        assert [found.edge_bytes, found.codec, found.predicted_ms, found.decided_by] == [None] * 4
        assert any(reason.startswith(("memory:", "time:")) for reason in found.reasons)


@pytest.mark.parametrize(
    ("wishes", "decided_by"),
    [
        ({"edge_memory_bytes": 64_000_000}, "memory"),
        ({"privacy_depth": 7}, "privacy"),
        ({"price": 1e-6, "max_ms": 34.0}, "time"),
        ({"price": 1e-6}, "price"),
        ({}, "speed"),
    ],
)
def test_the_plan_says_what_decided(wishes: dict[str, Any], decided_by: str) -> None:
    found = plan(**wishes)
    assert found.decided_by == decided_by
    assert found.reasons[1].startswith(f"{found.cut} of 30 layers on the edge: ")


def flags(reasons: tuple[str, ...]) -> list[tuple[str, str]]:
    """What reasons say would do."""
    return [match for reason in reasons for match in re.findall(r"(--[a-z-]+) (\d+)(?:MB)? would do", reason)]


@pytest.mark.parametrize(
    "wishes",
    [
        {"edge_memory_bytes": 20_000_000},
        {"edge_memory_bytes": 42_000_000},
        {"edge_memory_bytes": 64_000_000, "privacy_depth": 20},
        {"edge_memory_bytes": 100_000_000, "keep_tail": True},
        {"privacy_depth": 30},
        {"max_ms": 3.0},
        {"max_ms": 3.0, "privacy_depth": 12},
        {"edge_memory_bytes": 64_000_000, "head": "edge", "max_ms": 10},
    ],
)
def test_what_an_infeasible_plan_advises_is_feasible(wishes: dict[str, Any]) -> None:
    found = plan(**wishes)
    assert not found.feasible
    advised = flags(found.reasons)
    assert advised
    for flag, number in advised:
        name = {"--edge-memory": "edge_memory_bytes"}.get(flag, flag[2:].replace("-", "_"))
        value = int(number) * (10**6 if flag == "--edge-memory" else 1)
        assert plan(**wishes | {name: value}).feasible, (flag, number)
    if "without --keep-tail it would fit" in found.reasons:
        assert plan(**wishes | {"keep_tail": False}).feasible


def test_a_nearer_cloud_is_advised_where_it_would_do() -> None:
    found = plan(link=LINKS["lte"], max_ms=30.0)
    (rtt_ms,) = re.findall(r"a round trip of ([\d.]+) ms would do", " ".join(found.reasons))
    assert plan(link=replace(LINKS["lte"], rtt_ms=float(rtt_ms) - 0.05), max_ms=30.0).feasible
    assert not plan(link=replace(LINKS["lte"], rtt_ms=float(rtt_ms) + 0.05), max_ms=30.0).feasible


def test_the_better_side_is_told() -> None:
    free = plan()
    assert free.better == "cloud"
    assert free.predicted_ms is not None
    assert free.predicted_ms > free.baselines["cloud_only_ms"]
    private = plan(privacy_depth=2)
    assert private.better == "edge"  # which fits, and pays no round trip
    assert any("no split is needed" in reason for reason in private.reasons)
    assert plan(privacy_depth=2, edge_memory_bytes=64_000_000).better is None
    assert plan(head="edge", edge_memory_bytes=64_000_000).better is None
    assert plan(price=1e-6, edge_memory_bytes=64_000_000).better is None
    quick_link = plan(privacy_depth=2, link=LINKS["lan"])
    assert quick_link.predicted_ms is not None
    assert quick_link.predicted_ms < quick_link.baselines["edge_only_ms"]
    assert quick_link.better is None


def test_an_interval_holds_the_figure_and_not_the_link() -> None:
    found = plan()
    assert found.predicted_interval_ms is not None
    assert found.predicted_ms is not None
    assert found.token_ms is not None
    low, high = found.predicted_interval_ms
    assert found.token_ms["link"] < low < found.predicted_ms < high


def test_equal_machines_make_every_cut_as_fast() -> None:
    found = plan(cloud=SLOW)
    assert (found.cut, found.decided_by) == (29, "speed")


def test_what_was_assumed_is_told() -> None:
    assert any("q4_1" in assumption for assumption in plan().assumed)
    stored = replace(SMOL, stored=Stored(60_000_000, 30_000_000, 0))
    assert plan(stored).precision == "as stored"
    assert not any("precision" in assumption for assumption in plan(stored).assumed)
    assert any("was made for 8192" in assumption for assumption in plan(context=10_000).assumed)
    assert any("our own workers run on CPUs" in assumption for assumption in plan(cloud="a100-80gb-sxm").assumed)
    assert any("proportions" in assumption for assumption in plan(of_words("3B")).assumed)


def test_models_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(UsageError, match="has one layer"):
        plan(replace(SMOL, layers=1))
    with pytest.raises(UsageError, match="keys and values of layers before"):
        plan(of_words("Gemma-3n-E2B"))


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"edge_memory_bytes": 0}, "--edge-memory is 0"),
        ({"privacy_depth": -1}, "--privacy-depth is -1"),
        ({"max_ms": 0.0}, "--max-ms is 0"),
        ({"price": -1.0}, "--price is -1"),
        ({"max_rise": float("nan")}, "--max-rise is nan"),
        ({"context": 0}, "--context is 0"),
    ],
)
def test_wishes_outside_of_reason_are_refused(wishes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Wish(**wishes)
