"""Codecs by their measured cost: the page is the format, the upper end of an interval is the promise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.errors import UsageError
from edgewise.models.known import of_words
from edgewise.models.outline import Outline
from edgewise.plan.codec_table import SHIPPED, CodecTable, Row, read, shipped
from edgewise.wire.codec import codec

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "codecs.md"
SMOL = of_words("SmolLM2-135M")


def row(name: str, size: int, rise: float | None, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "model": "smollm2-135m",
        "weights": None,
        "layers": 30,
        "width": 576,
        "cut": 9,
        "codec": name,
        "bytes": size,
        "ppl_rise": rise,
        "interval": None if rise is None else (rise - 0.002, rise + 0.002),
        "tokens": 50_000,
        "refused": None if rise is not None else "overflow",
    }
    return Row(**fields | changes)


TABLE = CodecTable((row("int4", 300, 0.007), row("int8", 600, 0.0005), row("fp16", 1152, None)))


def written(path: Path, rows: list[dict[str, Any]], version: object = 1) -> Path:
    path.write_text(json.dumps({"format": version, "rows": rows}))
    return path


def test_the_example_of_the_page_is_read(tmp_path: Path) -> None:
    example = re.search(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example is not None
    (tmp_path / "codecs.json").write_text(example[1])
    (found,) = read(tmp_path / "codecs.json").rows
    assert (found.model, found.cut, found.codec, found.ppl_rise, found.interval) == (
        "tiny",
        2,
        "int8",
        0.0004,
        (-0.0002, 0.001),
    )
    assert all(f"`{name}`" in PAGE.read_text() for name in found.__struct_fields__)


def test_the_shipped_table_is_one() -> None:
    assert shipped() == read(SHIPPED)


@pytest.mark.parametrize(
    ("budget", "name", "size", "rise"),
    [
        (0.01, "int4", 300, 0.007),
        (0.0089, "int8", 600, 0.0005),
        (0.0026, "int8", 600, 0.0005),
        (0.001, "exact", 2304, 0.0),
    ],
)
def test_the_cheapest_within_the_budget_by_the_upper_end(budget: float, name: str, size: int, rise: float) -> None:
    found = TABLE.cheapest(SMOL, 9, budget)
    assert (found.codec, found.row_bytes, found.ppl_rise) == (name, size, rise)
    assert f"{budget:.2%}" in found.reason


@given(st.floats(0, 0.1), st.floats(0, 0.1))
@settings(deadline=None)
def test_a_larger_budget_never_takes_more_bytes(small: float, large: float) -> None:
    small, large = sorted((small, large))
    assert TABLE.cheapest(SMOL, 9, large).row_bytes <= TABLE.cheapest(SMOL, 9, small).row_bytes


def test_what_nobody_measured_travels_exactly_and_the_reason_names_the_command() -> None:
    for outline, cut in ((SMOL, 10), (of_words("Qwen2.5-0.5B"), 9)):
        found = TABLE.cheapest(outline, cut, 1.0)
        assert (found.codec, found.row_bytes) == ("exact", 4 * outline.hidden)
        assert f"edgewise bench split --model {outline.name}" in found.reason


def test_a_refused_codec_is_never_taken() -> None:
    table = CodecTable((row("fp16", 1152, None),))
    found = table.cheapest(SMOL, 9, 10.0)
    assert found.codec == "exact"
    assert "fp16 overflows" in found.reason


def named(name: str) -> Outline:
    return Outline(name, 30, 576, 9, 3, 64, 1536, 49152, 8192, tied=True)


@pytest.mark.parametrize("name", ["SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2 135M Instruct"])
def test_a_model_goes_by_the_words_of_its_name(name: str) -> None:
    assert TABLE.cheapest(named(name), 9, 0.01).codec == "int4"


def test_another_model_of_the_same_shape_is_another_model() -> None:
    assert TABLE.cheapest(named("SmolLM-135M"), 9, 0.01).codec == "exact"


def test_weights_decide_where_both_sides_know_them() -> None:
    table = CodecTable((row("int4", 300, 0.007, weights="a" * 64),))
    assert table.cheapest(named("renamed"), 9, 0.01, "a" * 64).codec == "int4"
    assert table.cheapest(SMOL, 9, 0.01, "b" * 64).codec == "exact"
    assert table.cheapest(SMOL, 9, 0.01).codec == "int4"


def test_rows_of_another_table_take_the_place_of_ours() -> None:
    worse = CodecTable((row("int4", 300, 0.05),))
    assert (TABLE + worse).cheapest(SMOL, 9, 0.01).codec == "int8"
    assert (worse + TABLE).cheapest(SMOL, 9, 0.01).codec == "int4"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": "jpeg"}, "no codec 'jpeg'"),
        ({"cut": 30}, "cut at 30"),
        ({"cut": 0}, ">= 1"),
        ({"bytes": -3}, ">= 1"),
        ({"ppl_rise": None}, "or it is refused"),
        ({"refused": "overflow"}, "or it is refused"),
        ({"refused": "dislike"}, "Invalid enum"),
        ({"ppl_rise": 0.5}, "outside of its interval"),
        ({"interval": None}, "or it is refused"),
        ({"colour": 1}, "unknown field"),
    ],
)
def test_what_is_no_row_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = written(tmp_path / "codecs.json", [msgspec.to_builtins(TABLE.rows[0]) | changes])
    with pytest.raises(UsageError, match=said):
        read(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "codecs.json"
    with pytest.raises(UsageError, match="no table of codecs"):
        read(path)
    with pytest.raises(UsageError, match="format 2; this version reads 1"):
        read(written(path, [], 2))
    for data in (b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'):
        path.write_bytes(data)
        with pytest.raises(UsageError):
            read(path)
    path.write_bytes(b" " * (4 << 20) + b"{}")
    with pytest.raises(UsageError, match="at most"):
        read(path)


def test_codecs_that_have_rows_exist() -> None:
    assert all(codec(found.codec).row_bytes(found.width) == found.bytes for found in shipped().rows)
