"""What the shipped speeds say: of the published rows, of a user's own measurements, of devices in free words."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from edgewise.bench.importers.llama_bench import read as read_llama_bench
from edgewise.devices.catalogue import shipped as catalogue
from edgewise.errors import UsageError
from edgewise.models.known import of_words
from edgewise.plan import measured
from edgewise.plan.evaluate import evaluate, report
from edgewise.plan.precision import PRECISIONS, precision, weigh
from edgewise.plan.rows import Row, by, find, read
from edgewise.plan.sites import Catalogued
from edgewise.plan.speed import situation
from edgewise.plan.speeds import shipped

SHARED = Path(os.environ.get("EDGEWISE_SHARED", Path(__file__).parents[3] / "shared"))
DEVICES = ("Raspberry Pi 5", "Apple M4", "Apple M2", "RTX 4090", "Jetson Orin Nano Super", "Snapdragon 8 Elite")
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Llama-3.2-3B", "Llama-3.1-8B")


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


def test_rows_of_a_single_device_are_judged_too() -> None:
    (row,) = [row for row in made_up() if (row.device, row.model) == ("Raspberry Pi 5", "Qwen2.5-1.5B")]
    for rows in ([row], [row, row], [replace(row, device="Never seen")], [replace(row, note="figures do not fit")]):
        (judged, *_) = evaluate(rows, by(catalogue()), shipped(), leave_one_device_out=True)["decode"]
        assert judged.predicted.low < judged.predicted.value < judged.predicted.high


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
