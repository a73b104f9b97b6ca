"""`edgewise devices`: lists, pages, verdicts, this machine and the way to another."""

from __future__ import annotations

from pathlib import Path

import pytest
from calling import Cli

from edgewise.engines.fake import FakeGenerator
from served import Served


def ids(told: str) -> list[str]:
    return [line.split()[0] for line in told.splitlines()[1:]]


def test_a_list_can_be_filtered_and_sorted_with_the_unknown_last(cli: Cli) -> None:
    everything = ids(cli("devices").out)
    assert {"apple-m2", "jetson-agx-thor-t5000", "hailo-10h", "h200-sxm"} <= set(everything)
    edge = cli("devices", "--kind", "edge gpu", "--sort", "tops/w")
    assert ids(edge.out)[-1] == "jetson-agx-thor-t5000"  # nobody published its int8 TOPS
    assert set(ids(edge.out)) < set(everything)
    widest = ids(cli("devices", "--vendor", "nvidia", "--sort", "GB/s").out)
    assert widest[0] == "h200-sxm"
    assert "raspberry-pi-5-8gb" in ids(cli("devices", "--runtime", "llama.cpp").out)


def test_devices_are_compared_and_one_has_a_page(cli: Cli) -> None:
    both = cli("devices", "apple-m4", "Snapdragon X Elite", "--json").json["devices"]
    assert [device["id"] for device in both] == ["apple-m4", "snapdragon-x-elite"]
    page = cli("devices", "jetson-orin-nano-8gb").out
    assert "int8_tops_dense: 20" in page
    assert "int8_tops_sparse: 40" in page
    one = cli("devices", "jetson-orin-nano-8gb", "--json").json
    assert one["bandwidth_gb_s"]["source"]["title"]


def test_what_nobody_published_is_a_question_mark_and_null(cli: Cli) -> None:
    line = next(line for line in cli("devices").out.splitlines() if line.startswith("snapdragon-8-elite "))
    assert " ? " in line
    (npu,) = (unit for unit in cli("devices", "snapdragon-8-elite", "--json").json["units"] if unit["unit"] == "npu")
    assert npu["int8_tops_dense"] is None


def test_the_verdicts_on_the_guides_figures(cli: Cli) -> None:
    claims = cli("devices", "--verdicts", "--json").json["claims"]
    assert {claim["verdict"] for claim in claims} == {"right", "wrong", "unsourced"}
    hexagon = next(claim for claim in claims if claim["value"] == 73)
    assert hexagon["verdict"] == "unsourced"
    assert "Orin Xavier" in cli("devices", "--verdicts").out


def test_this_machine_says_what_it_reaches(in_stock: Cli) -> None:
    told = in_stock("devices", "host", "--json").json
    assert told["machine"]["usable_cores"] >= 1
    assert all(reading["median"] > 0 for by in told["figures"].values() for reading in by.values())
    assert "read_bytes_per_s" in in_stock("devices", "host").out


def test_the_way_to_a_node_is_measured(cli: Cli) -> None:
    with Served(FakeGenerator()) as served:
        told = cli("devices", "--link", served.url, "--json").json
    assert told["rtt_ms"]["median"] > 0
    assert told["up_bytes_per_s"]["median"] > 0
    assert told["down_bytes_per_s"]["median"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("no-such",), 2, "no device 'no-such'"),
        (("--sort", "price"), 2, "--sort is 'price'"),
        (("--kind", "toaster"), 2, "no device is like that"),
        (("--link", "nonsense"), 2, "is not an address"),
        (("--link", "http://127.0.0.1:9"), 3, "no connection"),
        (("--catalogue", "no.toml"), 2, "no.toml"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(cli: Cli, arguments: tuple[str, ...], code: int, words: str) -> None:
    told = cli("devices", *arguments)
    assert told.code == code
    assert words in told.err
    assert told.err.count("\n") == 1


def test_another_catalogue_is_read_and_a_bad_row_is_named(cli: Cli, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'format = 1\n[sources.me]\ntitle = "T"\npublisher = "P"\ndate = "2026"\n'
        '[devices.box]\nname = "Box"\nvendor = "V"\nkind = "desktop"\n'
        'memory_gib = { value = 8, source = "me", status = "vendor" }\n'
    )
    assert ids(cli("devices", "--catalogue", own).out) == ["box"]
    own.write_text(own.read_text().replace("value = 8", "value = -8"))
    told = cli("devices", "--catalogue", own)
    assert told.code == 2
    assert "own.toml, line 10" in told.err
    assert "memory_gib" in told.err
