"""The catalogue that ships: complete, sourced, honest about what is not known; and what a reader refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgewise import EdgeGPUSpecs, benchmarks, edge_chips
from edgewise.devices.catalogue import load, shipped
from edgewise.errors import UsageError

WANTED = (
    *("Apple M2", "A17 Pro", "Apple M4", "Hexagon 8 Gen 3", "Snapdragon 8 Elite", "X Elite", "X2 Elite"),
    *("Dimensity 9300", "Dimensity 9400", "Orin Nano", "Orin Nano Super", "Orin NX", "jetson-agx-orin-32gb"),
    *("AGX Orin", "Xavier", "Thor", "Raspberry Pi 5", "Hailo-8", "Hailo-10H", "Coral", "Lunar Lake", "XDNA2"),
    *("RK3588", "A100", "H100", "H200", "L4", "desktop-ddr5-5600"),
)
GOOD = """format = 1
[sources.maker]
title = "Data sheet"
publisher = "Maker"
date = "2026-11"
[devices.box]
name = "Box"
vendor = "Maker"
kind = "edge gpu"
memory_gib = { value = 8, source = "maker", status = "vendor" }
[[devices.box.units]]
unit = "gpu"
name = "Unit"
int8_tops_dense = { value = 20, source = "maker", status = "vendor" }
"""


def figures(value: Any) -> Iterator[dict[str, Any]]:
    """All figures anywhere in it."""
    if isinstance(value, dict):
        if "status" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from figures(part)


@pytest.mark.parametrize("name", WANTED)
def test_every_device_that_users_ask_for_is_there(name: str) -> None:
    assert shipped().find(name)


def test_every_figure_has_a_source_and_none_is_zero() -> None:
    known = shipped()
    found = list(figures(msgspec.to_builtins(known.devices)))
    assert len(found) > 500
    for figure in found:
        assert figure["source"] in known.sources
        assert all(figure[end] > 0 for end in ("value", "low", "high") if figure.get(end) is not None)


def test_dense_and_sparse_are_kept_apart() -> None:
    (gpu,) = (unit for unit in shipped().find("Orin Nano")[1].units if unit.unit == "gpu")
    assert gpu.int8_tops_dense is not None
    assert gpu.int8_tops_sparse is not None
    assert (gpu.int8_tops_dense.value, gpu.int8_tops_sparse.value) == (20, 40)


def test_what_nobody_published_is_unknown() -> None:
    assert shipped().find("snapdragon-8-gen-3")[1].best("int8_tops_dense") is None
    assert shipped().described("snapdragon-8-gen-3")["power_w"] is None


@pytest.mark.parametrize("name", ["orin", "no-such-device", "", "M2 Pro Max Ultra"])
def test_a_name_that_means_none_or_several_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="the catalogue has no device"):
        shipped().find(name)


def test_the_guides_figures_are_claims_with_verdicts() -> None:
    claims = {(claim.key, claim.figure): claim for claim in shipped().claims}
    assert claims["qualcomm_hexagon", "tops"].verdict == "unsourced"
    assert claims["orin_xavier", "product"].verdict == "wrong"
    assert (claims["orin_xavier", "cuda_cores"].value, claims["orin_xavier", "cuda_cores"].correct) == (2048, 1792)
    assert claims["apple_neural_engine", "tops"].verdict == "right"
    assert all(claim.why for claim in claims.values())
    assert all(
        claim.correct is not None or claim.verdict != "wrong" or "summed" in claim.why for claim in claims.values()
    )


def test_the_guides_tables_are_views_that_cannot_be_changed() -> None:
    assert edge_chips["qualcomm_hexagon"]["tops"] == 73
    assert edge_chips["qualcomm_hexagon"]["verdict"]["tops"]["verdict"] == "unsourced"
    assert EdgeGPUSpecs.nvidia_jetson["orin_nano"]["cuda_cores"] == 1024
    assert benchmarks["7B_model"]["cloud_a100"]["throughput"] == 1000
    with pytest.raises(TypeError):
        edge_chips["qualcomm_hexagon"]["tops"] = 1
    with pytest.raises(KeyError, match="no_such_chip"):
        edge_chips["no_such_chip"]


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_small_catalogue_is_read(tmp_path: Path) -> None:
    made = load(written(tmp_path / "own.toml", GOOD))
    assert made.find("box")[1].units[0].name == "Unit"


@pytest.mark.parametrize(
    ("old", "new", "line", "field"),
    [
        ("value = 8", "value = 0", 10, "memory_gib"),
        ("value = 8", 'value = "8"', 10, "memory_gib"),
        ("value = 8", "value = nan", 10, "memory_gib"),
        ("value = 8", "low = 8", 10, "memory_gib"),
        ("value = 8", "low = 9, high = 8", 10, "memory_gib"),
        ('value = 8, source = "maker"', 'value = 8, source = "nobody"', 10, "memory_gib"),
        ('value = 8, source = "maker"', "value = 8", 10, "memory_gib"),
        ("memory_gib =", "memory_gb =", 10, "memory_gb"),
        ('kind = "edge gpu"', 'kind = "toaster"', 9, "kind"),
        ('vendor = "Maker"\n', "", 6, "vendor"),
        ('unit = "gpu"', 'unit = "tpu"', 12, "unit"),
        ("value = 20", "value = -20", 14, "int8_tops_dense"),
        ('date = "2026-11"', 'date = "lately"', 5, "date"),
        ("[devices.box]", "[devices.Box]", 6, "Box"),
        ("format = 1", "format = 2", 1, "format"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(tmp_path: Path, old: str, new: str, line: int, field: str) -> None:
    path = written(tmp_path / "own.toml", GOOD.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load(path)
    assert f"{path}, line {line}" in str(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe", b"format = ", b"[" * 5000, b"format = " + b"9" * 5000, b"a = 1\n" * 10, b"format = 1\0"],
)
def test_what_is_no_catalogue_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"own\.toml"):
        load(path)


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(b"#" * (5 << 20))
    with pytest.raises(UsageError, match="longer than"):
        load(path)
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "no.toml")
