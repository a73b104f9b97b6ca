"""Rows out of Measurement files: `edgewise bench engines` and llama-bench as imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgewise.errors import UsageError
from edgewise.plan.measured import machine, read
from edgewise.plan.rows import Row

CELL = {
    "prompt_tokens": 64,
    "streams": 1,
    "engines": {
        "edgewise": {"decode_tok_s": {"median": 40.0, "low": 38}, "prefill_tok_s": [90.0, 100.0, 300.0]},
        "llama.cpp": {"decode_tok_s": [30.0], "prefill_tok_s": []},
        "broken": {"decode_tok_s": [], "prefill_tok_s": []},
    },
}
LIMITS = {"read_bytes_per_s": 15e9, "int8_mac_per_s": 2e11, "weight_bytes_per_token": 8e7}
ENGINES = {
    "format": 1,
    "kind": "measured",
    "settings": {"new": 32},
    "results": {"model": "smollm2-135m", "cells": [CELL, {**CELL, "streams": 4}], "limits": LIMITS},
}
TEST = {"model_filename": "/m/Llama-3.2-3B.Q4_K_M.gguf", "model_n_params": 3.2e9, "model_size": 2e9, "median": 12.5}
LLAMA = {
    "format": 1,
    "kind": "measured",
    "settings": {"model_type": "llama 3B Q4_K - Medium", "backends": "CUDA", "n_gpu_layers": 99},
    "results": {
        "pp512": {**TEST, "median": 400.0},
        "tg128 @ d1024": {**TEST, "median": None, "mean": 11.0},
        "tg64 cuda": {**TEST, "n_gpu_layers": 0},
        "tg16": {**TEST, "backends": "CPU"},
        "pp512+tg128": TEST,
        "took_s": 4,
        "other": TEST,
    },
}


def save(path: Path, found: Any) -> Path:
    path.write_text(json.dumps(found))
    return path


def test_one_stream_of_each_engine_that_ran_is_a_row(tmp_path: Path) -> None:
    ours, theirs = read(save(tmp_path / "m.json", ENGINES), "mine")
    assert ours == Row(
        "mine",
        "CPU",
        "smollm2-135m",
        "edgewise",
        streamed_weights_gb=0.08,
        basis="published",
        prefill_tok_s=100.0,
        decode_tok_s=40.0,
        context=64 + 16,
        prompt=64,
    )
    assert (theirs.runtime, theirs.decode_tok_s, theirs.prefill_tok_s) == ("llama.cpp", 30.0, None)


def test_bytes_that_were_not_counted_are_not_made_up(tmp_path: Path) -> None:
    bare = {**ENGINES, "settings": {}, "results": {"model": "x", "cells": [CELL]}}
    row = read(save(tmp_path / "m.json", bare), "mine", model="SmolLM2-360M")[0]
    assert (row.model, row.streamed_weights_gb, row.basis, row.context) == ("SmolLM2-360M", None, "", 64)


def test_the_tests_of_llama_bench_are_rows(tmp_path: Path) -> None:
    prompt, deep, on_cpu, also_on_cpu = read(save(tmp_path / "m.json", LLAMA), "mine")
    assert (prompt.prefill_tok_s, prompt.decode_tok_s, prompt.prompt, prompt.unit) == (400.0, None, 512, "GPU")
    assert (deep.prefill_tok_s, deep.decode_tok_s, deep.context) == (None, 11.0, 1024 + 64)
    assert (on_cpu.unit, also_on_cpu.unit, on_cpu.decode_tok_s) == ("CPU", "CPU", 12.5)
    assert {row.model for row in (prompt, deep, on_cpu)} == {"Llama-3.2-3B.Q4_K_M"}
    assert (prompt.params_b, prompt.streamed_weights_gb, prompt.basis) == (3.2, 2.0, "published")
    assert (prompt.runtime, prompt.quantization) == ("llama.cpp", "llama 3B Q4_K - Medium")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([], "is not a Measurement file"),
        ({"format": 1}, "is not a Measurement file"),
        ({**ENGINES, "format": 2}, "has format 2; this version reads 1"),
        ({**ENGINES, "kind": "imported"}, "holds imported figures"),
        ({**ENGINES, "results": {}}, "holds no speeds of tokens"),
        ({**ENGINES, "results": {"model": "x", "cells": []}}, "holds no speeds of tokens"),
        ({**ENGINES, "results": {"model": "x", "cells": [{**CELL, "streams": 2}]}}, "holds no speeds of tokens"),
        ({**ENGINES, "results": {"model": "x", "cells": [{"streams": -1}]}}, "holds no speeds of tokens"),
        ({**ENGINES, "results": {"model": "x", "cells": 3}}, "holds no speeds of tokens"),
        ({**LLAMA, "results": {"pp512": {**TEST, "median": -3.0}}}, "holds no speeds of tokens"),
        ({**LLAMA, "results": {"pp512": {}}}, "holds no speeds of tokens"),
    ],
)
def test_what_teaches_nothing_is_refused(tmp_path: Path, found: Any, says: str) -> None:
    path = save(tmp_path / "m.json", found)
    with pytest.raises(UsageError) as caught:
        read(path, "mine")
    assert str(caught.value).startswith(f"{path} {says}")
    with pytest.raises(UsageError, match="is not a Measurement file"):
        read(tmp_path / "no.json", "mine")


def test_the_machine_of_a_file_is_what_the_same_run_found(tmp_path: Path) -> None:
    found = machine(save(tmp_path / "m.json", ENGINES), "mine", "laptop")
    assert (found.device, found.kind, found.unit, found.assumed) == ("mine", "laptop", "cpu", ())
    assert found.bandwidth_gb_s == pytest.approx(20.0)  # reads reach three quarters of the peak
    assert found.decode_tops == found.prefill_tops == pytest.approx(0.4)
    for limits in ({}, {"read_bytes_per_s": 1e9}, {"read_bytes_per_s": "fast"}, None):
        path = save(tmp_path / "m.json", {**ENGINES, "results": {"limits": limits}})
        with pytest.raises(UsageError, match=r"m\.json"):
            machine(path, "mine", "laptop")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    whole=st.sampled_from([ENGINES, LLAMA]), at=st.integers(0, 700), noise=st.binary(max_size=4), cut=st.integers(0, 4)
)
def test_any_bytes_are_rows_or_a_usage_error(tmp_path: Path, whole: Any, at: int, noise: bytes, cut: int) -> None:
    data, path = json.dumps(whole).encode(), tmp_path / "m.json"
    path.write_bytes(data[:at] + noise + data[at + cut :])
    try:
        rows = read(path, "mine")
    except UsageError:
        return
    assert rows
    assert all(row.decode_tok_s or row.prefill_tok_s for row in rows)
