"""Reading rows: every way a file can be malformed, and what a good row says of its situation."""

from __future__ import annotations

import codecs
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgewise.devices.catalogue import shipped as catalogue
from edgewise.errors import UsageError
from edgewise.models.known import of_words
from edgewise.plan.precision import PRECISIONS, streamed, weigh
from edgewise.plan.rows import COLUMNS, FIELD_LIMIT, SIZE_LIMIT, Row, by, observations, outline_of, read, situation_of
from plan_rows import ROW, save

NUMBERS = ("params_b", "streamed_weights_gb", "prefill_tok_s", "decode_tok_s", "peak_bw_gb_s")
WORDS = ("device", "unit", "model", "runtime")
PI = Row("Raspberry Pi 5", "CPU", "Qwen2.5-1.5B", "llama.cpp", quantization="Q4_K_M", decode_tok_s=9.5)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(name for name in COLUMNS if name != column) + "\n")
    with pytest.raises(UsageError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 1: {column}: ")


@pytest.mark.parametrize("column", NUMBERS)
@pytest.mark.parametrize(
    "value", ["-1", "0", "-0.0", "nan", "inf", "-inf", "1e7", "1e300", "1e999", "5e-324", "9" * 400, "1,5", "1 2", "x"]
)
def test_a_wrong_number_names_file_line_and_field(tmp_path: Path, column: str, value: str) -> None:
    path = save(tmp_path / "rows.csv", ROW, ROW, {**ROW, column: value})
    with pytest.raises(UsageError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 4: {column}: is {value[:40]!r}")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("column", [*WORDS, "quantization"])
@pytest.mark.parametrize("value", ["a\0b", "a\x0bb", "\x1b[2J", "x" * (FIELD_LIMIT + 1)])
def test_a_word_that_nobody_writes_names_file_line_and_field(tmp_path: Path, column: str, value: str) -> None:
    path = save(tmp_path / "rows.csv", {**ROW, column: value})
    with pytest.raises(UsageError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 2: {column}: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("column", WORDS)
@pytest.mark.parametrize("value", ["", "  "])
def test_a_word_that_is_needed_is_not_empty(tmp_path: Path, column: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"line 2: {column}: is empty"):
        read(save(tmp_path / "rows.csv", {**ROW, column: value}))


@pytest.mark.parametrize("fields", [1, len(COLUMNS) - 1, len(COLUMNS) + 1, 500])
def test_too_few_and_too_many_fields(tmp_path: Path, fields: int) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(COLUMNS) + "\n" + ",".join("1" * fields) + "\n")
    with pytest.raises(UsageError, match=f"line 2: it has {fields} fields, the first line names {len(COLUMNS)}"):
        read(path)


def test_a_row_needs_a_speed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 2: decode_tok_s: is empty, and prefill_tok_s too"):
        read(save(tmp_path / "rows.csv", {**ROW, "decode_tok_s": "", "prefill_tok_s": " "}))


@pytest.mark.parametrize(("model", "params"), [("nobody knows", ""), ("nobody knows", "1e-6"), ("0.0001B", "")])
def test_a_model_without_a_size_names_file_line_and_field(tmp_path: Path, model: str, params: str) -> None:
    with pytest.raises(UsageError, match="line 2: model: "):
        read(save(tmp_path / "rows.csv", {**ROW, "model": model, "params_b": params}))


def test_not_utf8_nothing_and_far_too_much(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.csv", ROW)
    good = path.read_bytes()
    path.write_bytes(good + b"\xe9")
    with pytest.raises(UsageError, match=f"not UTF-8 at byte {len(good)}"):
        read(path)
    for nothing in (b"", b"\n\n", b"\r\n"):
        path.write_bytes(nothing)
        with pytest.raises(UsageError, match="line 1: device: the column is missing"):
            read(path)
    path.write_bytes(good.splitlines(keepends=True)[0] + b"\n\n")
    with pytest.raises(UsageError, match=r"rows\.csv has no rows"):
        read(path)
    with path.open("wb") as file:
        file.truncate(SIZE_LIMIT + 1)
    with pytest.raises(UsageError, match=f"at most {SIZE_LIMIT} are read"):
        read(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path)


def test_spreadsheets_write_it_their_own_way(tmp_path: Path) -> None:
    """A byte order mark, Windows' ends of lines, more columns, another order, empty lines, line breaks in quotes."""
    path = tmp_path / "rows.csv"
    names = [*reversed(COLUMNS), "note"]
    row = [ROW[name] for name in reversed(COLUMNS)]
    lines = [",".join(names), "", ",".join([*row, '"two', 'lines"']).replace('"two,', '"two\r\n'), ",".join([*row, ""])]
    path.write_bytes(codecs.BOM_UTF8 + "\r\n".join(lines).encode())
    first, second = read(path)
    assert first.note == "two\r\nlines"
    assert (first.device, second.decode_tok_s) == ("Raspberry Pi 5", 9.5)
    path.write_bytes(path.read_bytes().replace(b"9.5", b"-9.5"))
    with pytest.raises(UsageError, match="line 4: decode_tok_s"):  # where the row ends
        read(path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.integers(0, 400), st.integers(0, 40))
def test_any_bytes_are_rows_or_a_usage_error(tmp_path: Path, noise: bytes, at: int, cut: int) -> None:
    path = save(tmp_path / "rows.csv", ROW, ROW)
    good = path.read_bytes()
    for data in (noise, good[:at] + noise + good[at + cut :]):
        path.write_bytes(data)
        try:
            rows = read(path)
        except UsageError:
            continue
        assert all(math.isfinite(o.situation.bytes_per_token) for o in observations(rows, by(catalogue()), "decode"))


def test_what_units_are_called() -> None:
    parts = {"CPU (4 threads)": "cpu", "GPU": "gpu", "Hexagon NPU": "npu", "ANE": "npu", "Edge TPU": "npu"}
    parts |= {"iGPU (WebGPU)": "gpu", "Neural Engine": "npu", "HTP": "npu", "Adreno": "gpu"}
    for unit, part in parts.items():
        assert Row("x", unit, "7B", "llama.cpp").part == part, unit


def test_a_row_that_doubts_itself_is_not_trusted() -> None:
    doubtful = Row("x", "CPU", "7B", "llama.cpp", decode_tok_s=1, note="the numbers Do not fit each other")
    (seen,) = observations([doubtful], by(catalogue()), "decode")
    assert not seen.trusted
    assert observations([doubtful], by(catalogue()), "prefill") == []


def test_a_size_that_contradicts_the_name_counts_more() -> None:
    assert outline_of(Row("x", "CPU", "Llama-3.1-8B", "", params_b=8.03)).name == "Llama-3.1-8B"
    assert not outline_of(Row("x", "CPU", "Llama-3.1-8B", "", params_b=8.03)).guessed
    pruned = outline_of(Row("x", "CPU", "Llama-3.1-8B pruned", "", params_b=4.0))
    assert pruned.guessed
    assert pruned.total == pytest.approx(4e9, rel=0.05)
    counted_without_tables = Row("x", "CPU", "Gemma-3n-E2B", "", params_b=2.4)
    assert not outline_of(counted_without_tables).guessed


def test_published_bytes_are_of_a_file_or_of_what_is_read() -> None:
    llama = of_words("Llama-3.1-8B")
    stored = weigh(llama, PRECISIONS["q4_0"])
    row = Row("Pi", "CPU", "Llama-3.1-8B", "llama.cpp", quantization="q4_0", decode_tok_s=1, basis="published")
    read_alone = streamed(llama, stored)
    for gigabytes in (read_alone / 1e9, stored.total / 1e9):
        given = Row(**{name: getattr(row, name) for name in row.__struct_fields__} | {"streamed_weights_gb": gigabytes})
        at = situation_of(given, by(catalogue())(given))
        assert at.bytes_per_token == pytest.approx(read_alone + 2 * llama.kv_values_read(512), rel=1e-6)


def test_the_machine_of_a_row() -> None:
    machines = by(catalogue())
    pi = machines(PI)
    assert (pi.device, pi.unit, pi.kind, pi.assumed) == ("raspberry-pi-5-8gb", "cpu", "board", ())
    stranger = machines(Row("Nokia 3310", "NPU", "1B", "genie", decode_tok_s=1, bandwidth_gb_s=40))
    assert (stranger.kind, stranger.unit, stranger.bandwidth_gb_s, stranger.decode_tops) == ("phone", "npu", 40, 0)
    assert stranger.assumed == ("rate of a prompt",)
    kinds = {"GeForce 9999": "desktop", "Jetson Nova": "edge gpu", "MacBook M9": "mac", "Xeon 1": "server"}
    kinds |= {"Rock 99": "board", "Coral X": "accelerator", "Ryzen 9 999": "laptop"}
    for device, kind in kinds.items():
        assert machines(Row(device, "CPU", "1B", "llama.cpp", decode_tok_s=1)).kind == kind, device
    assert machines(Row("GeForce 9999", "GPU", "1B", "llama.cpp")).unit == "cuda"
    assert machines(Row("MacBook M9", "GPU", "1B", "llama.cpp")).unit == "metal"
    assert machines(Row("Ryzen 9 999", "GPU", "1B", "llama.cpp")).unit == "gpu"
