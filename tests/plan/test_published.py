"""Published rows: read, learned from, and judged; the error that the planner states of itself."""

from __future__ import annotations

import math
import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from msgspec.structs import replace

from edgewise.bench.importers.llama_bench import read as read_llama_bench
from edgewise.devices.catalogue import shipped as catalogue
from edgewise.errors import UsageError
from edgewise.models.known import of_words
from edgewise.plan import measured
from edgewise.plan.evaluate import GROUPS, evaluate, report
from edgewise.plan.fit import BELIEFS
from edgewise.plan.plot import plot
from edgewise.plan.precision import PRECISIONS, precision, published, weigh
from edgewise.plan.rows import COLUMNS, Row, by, find, read
from edgewise.plan.sites import Catalogued
from edgewise.plan.speed import situation
from edgewise.plan.speeds import SHIPPED, Speeds, shipped

SHARED = Path(os.environ.get("EDGEWISE_SHARED", Path(__file__).parents[3] / "shared"))
ROW = {
    "device": "Raspberry Pi 5",
    "unit": "CPU",
    "model": "Qwen2.5-1.5B",
    "params_b": "1.54",
    "quantization": "Q4_K_M",
    "streamed_weights_gb": "0.99",
    "runtime": "llama.cpp",
    "prefill_tok_s": "30",
    "decode_tok_s": "9.5",
    "weights_basis": "published",
    "peak_bw_gb_s": "17.1",
}
DEVICES = ("Raspberry Pi 5", "Apple M4", "Apple M2", "RTX 4090", "Jetson Orin Nano Super", "Snapdragon 8 Elite")
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Llama-3.2-3B", "Llama-3.1-8B")


def csv(path: Path, *rows: dict[str, str]) -> Path:
    lines = [",".join(COLUMNS), *(",".join(row[column] for column in COLUMNS) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def made_up(factor: float = 1.0) -> list[Row]:
    """Rows as the shipped speeds themselves would have them, all times that factor."""
    rows = []
    for device in DEVICES:
        for model in MODELS:
            unit = "GPU" if device.startswith(("Apple", "RTX", "Jetson")) else "CPU"
            row = Row(device, unit, model, "llama.cpp", quantization="q4_k_m", decode_tok_s=1.0)
            machine = by(catalogue())(row)
            asked = situation(of_words(model), precision("q4_k_m"), machine, "llama.cpp")
            (speed,) = shipped().decode.predict([asked])
            rows.append(replace(row, decode_tok_s=factor * speed.value))
    return rows


def test_a_row_is_read_field_by_field(tmp_path: Path) -> None:
    (row,) = read(csv(tmp_path / "rows.csv", ROW))
    assert (row.device, row.part, row.basis, row.decode_tok_s) == ("Raspberry Pi 5", "cpu", "published", 9.5)
    assert read(csv(tmp_path / "rows.csv", ROW | {"prefill_tok_s": ""}))[0].prefill_tok_s is None


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("decode_tok_s", "fast", "is 'fast'"),
        ("decode_tok_s", "-1", "is '-1'"),
        ("decode_tok_s", "nan", "is 'nan'"),
        ("decode_tok_s", "1e300", "is '1e300'"),
        ("peak_bw_gb_s", "0", "is '0'"),
        ("params_b", "7 B", "is '7 B'"),
        ("weights_basis", "guessed", "published, estimated or nothing"),
        ("streamed_weights_gb", "", "says that it is published"),
        ("device", " ", "is empty"),
        ("model", "", "is empty"),
    ],
)
def test_a_malformed_field_names_file_line_and_field(tmp_path: Path, column: str, value: str, words: str) -> None:
    path = csv(tmp_path / "rows.csv", ROW, ROW | {column: value})
    with pytest.raises(UsageError) as caught:
        read(path)
    assert f"{path}, line 3: {column}: " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: device: the column is missing"),
        (",".join(COLUMNS), "has no rows"),
        (",".join(COLUMNS[1:]), "line 1: device"),
        (",".join((*COLUMNS, "device")), "stands there twice"),
        (",".join(COLUMNS) + "\na,b\n", "line 2: it has 2 fields"),
        (",".join(COLUMNS) + '\n"a', "line 2: this is not CSV"),
        (",".join(COLUMNS) + "\n\0", "line 2"),
    ],
)
def test_what_is_no_table_of_rows_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8 at byte 0"):
        read(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "no.csv")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Q4_K_M", "q4_k_m"),
        ("int4 (AWQ)", "int4_g128"),
        ("W4A16", "w4a16"),
        ("SpinQuant INT4", "spinquant"),
        ("fp16", "fp16"),
        ("8-bit", "int8"),
        ("who knows", None),
    ],
)
def test_a_precision_is_understood_as_people_write_it(text: str, name: str | None) -> None:
    found = published(text)
    assert (found and found.name) == name


def test_precisions_weigh_what_their_files_weigh() -> None:
    llama = of_words("Llama-3.1-8B")
    for name, gigabytes in {"q4_k_m": 4.92, "q8_0": 8.54, "q6_k": 6.6, "fp16": 16.07, "q4_0": 4.66}.items():
        assert weigh(llama, PRECISIONS[name]).total / 1e9 == pytest.approx(gigabytes, rel=0.03), name
    with pytest.raises(UsageError, match="no precision 'q9'"):
        precision("q9")


@pytest.mark.parametrize(
    ("name", "bandwidth", "id"),
    [
        ("MacBook Air (Apple M2)", None, "apple-m2"),
        ("Apple M4 Max", None, "apple-m4-max"),
        ("NVIDIA Jetson AGX Orin 64GB", 204.8, "jetson-agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin 64GB", 50.0, None),
        ("Some phone", None, None),
    ],
)
def test_a_device_in_free_words(name: str, bandwidth: float | None, id: str | None) -> None:
    found = find(catalogue(), name, bandwidth)
    assert (found and found[0]) == id


def test_what_all_devices_share_is_learned() -> None:
    """Everything half as fast as believed: fitted afresh, the predictions follow."""
    rows = made_up(0.5)
    fitted = Speeds.fitted(rows, by(catalogue()), BELIEFS)
    judged = evaluate(rows, by(catalogue()), fitted, leave_one_device_out=False)["decode"]
    assert np.median([one.error for one in judged]) < 0.1
    assert np.median([one.predicted.value / (2 * one.measured) for one in judged]) < 0.6


def test_a_device_that_is_left_out_is_not_seen() -> None:
    """Its rows ten times as fast: its own predictions stay, and without leaving out they would not."""
    rows, odd = (
        made_up(),
        [
            replace(row, decode_tok_s=10 * (row.decode_tok_s or 0)) if row.device == "RTX 4090" else row
            for row in made_up()
        ],
    )
    fitted = Speeds.fitted(rows, by(catalogue()), BELIEFS)

    def predicted(given: list[Row]) -> list[float]:
        judged = evaluate(given, by(catalogue()), fitted, leave_one_device_out=True)["decode"]
        return [one.predicted.value for one in judged if one.row.device == "RTX 4090"]

    assert predicted(odd) == pytest.approx(predicted(rows), rel=1e-3)


def test_rows_of_a_single_device_are_judged_too() -> None:
    (row,) = [row for row in made_up() if (row.device, row.model) == ("Raspberry Pi 5", "Qwen2.5-1.5B")]
    for rows in ([row], [row, row], [replace(row, device="Never seen")], [replace(row, note="figures do not fit")]):
        (judged, *_) = evaluate(rows, by(catalogue()), shipped(), leave_one_device_out=True)["decode"]
        assert judged.predicted.low < judged.predicted.value < judged.predicted.high


def test_a_wild_row_moves_the_others_little() -> None:
    rows = made_up()
    wild = [*rows[:-1], replace(rows[-1], decode_tok_s=100 * (rows[-1].decode_tok_s or 0))]
    asked = [situation(of_words("Llama-3.1-8B"), precision("q4_k_m"), by(catalogue())(rows[0]), "llama.cpp")]
    plain, moved = (Speeds.fitted(given, by(catalogue())).decode.predict(asked)[0].value for given in (rows, wild))
    assert moved == pytest.approx(plain, rel=0.1)


def test_a_report_has_every_figure_of_every_group() -> None:
    rows = [replace(row, basis="estimated") for row in made_up()]
    found = report(evaluate(rows, by(catalogue()), shipped(), leave_one_device_out=False))
    assert set(found) == {"decode", "prefill"}
    assert set(found["decode"]) == set(GROUPS)
    assert found["decode"]["all"]["n"] == found["decode"]["estimated"]["n"] == len(rows)
    assert found["decode"]["published"]["n"] == found["prefill"]["all"]["n"] == 0
    assert found["decode"]["published"]["median_ape"] is None
    assert 0 <= (found["decode"]["all"]["coverage80"] or 0) <= 1


def test_a_chart_has_a_point_for_each_row() -> None:
    judged = evaluate(made_up(), by(catalogue()), shipped(), leave_one_device_out=False)
    drawing = ElementTree.fromstring(plot(judged, "<title> & more"))
    assert len(drawing.findall(".//{*}circle")) == len(judged["decode"])


def test_own_measurements_count_for_that_device(tmp_path: Path) -> None:
    test = (
        '[{"n_prompt": %d, "n_gen": %d, "avg_ts": %g, "samples_ts": [%g], "model_filename": "Llama-3.2-3B.gguf",'
        ' "model_type": "llama 3B Q4_K - Medium", "model_size": 2019377152, "model_n_params": 3212749888,'
        ' "n_gpu_layers": 99, "backends": "Metal"}]'
    )
    file = read_llama_bench((test % (0, 128, 30.0, 30.0)).encode()).save(tmp_path)
    rows = measured.read(file, "mine")
    assert [(row.unit, row.decode_tok_s, row.basis) for row in rows] == [("GPU", 30.0, "published")]
    site = Catalogued(*catalogue().find("apple-m4"), own=True)
    asked = [
        situation(of_words(name), precision("q4_k_m"), site.machine("gpu", "llama.cpp"), "llama.cpp")
        for name in ("Llama-3.2-3B", "Llama-3.1-8B")
    ]
    before = shipped().decode.predict(asked)
    after = shipped().refined(rows, lambda row: site.machine(row.part, row.runtime)).decode.predict(asked)
    assert after[0].value == pytest.approx(30, rel=0.15)
    for old, new in zip(before, after, strict=True):
        assert new.high / new.low < old.high / old.low
        assert abs(math.log(new.value / after[0].value) - math.log(old.value / before[0].value)) < 0.15


@pytest.mark.parametrize("data", [b"", b"{}", b'{"format": 1}', b"\xff", b'{"format": 1, "kind": "measured"}'])
def test_a_file_of_no_measurements_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(UsageError, match=r"x\.json"):
        measured.read(tmp_path / "x.json", "mine")


def test_fitted_speeds_survive_their_file(tmp_path: Path) -> None:
    shipped().save(tmp_path / "speeds.json")
    again = Speeds.read(tmp_path / "speeds.json")
    asked = [situation(of_words("7B"), precision("int4"), by(catalogue())(made_up()[0]), "llama.cpp")]
    assert again.decode.predict(asked)[0] == pytest.approx(shipped().decode.predict(asked)[0], rel=1e-4)
    assert again.devices == shipped().devices
    text = SHIPPED.read_text()
    for damage in (
        "",
        "{}",
        text[:-40],
        text.replace('"format":1', '"format":2'),
        text.replace("launch/unit", "lunch/unit"),
    ):
        (tmp_path / "speeds.json").write_text(damage)
        with pytest.raises(UsageError, match=r"speeds\.json"):
            Speeds.read(tmp_path / "speeds.json")


def test_the_stated_error_holds_on_the_published_rows() -> None:
    path = SHARED / "data" / "devices" / "llm_benchmarks.csv"
    if not path.is_file():
        pytest.skip("the published rows are not here; EDGEWISE_SHARED names the directory that holds data/devices")
    judged = evaluate(read(path), by(catalogue()), shipped(), leave_one_device_out=True)
    decode = report(judged)["decode"]
    limits = {("published", "median_ape"): 0.10, ("published", "mean_ape"): 0.20}
    limits |= {("all", "median_ape"): 0.18, ("all", "mean_ape"): 0.35}
    for (group, figure), most in limits.items():
        assert (decode[group][figure] or 1) <= most, (group, figure)
    assert 0.75 <= (decode["all"]["coverage80"] or 0) <= 0.90
