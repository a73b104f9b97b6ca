"""Made-up rows and machines for the tests of plans."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from edgewise.plan.rows import COLUMNS
from edgewise.plan.speed import Kind, Machine, Situation, Unit

ROW: Mapping[str, str] = {
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


def save(path: Path, *rows: Mapping[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="raise")
        writer.writeheader()
        writer.writerows(rows)
    return path


def machine(device: str, bandwidth_gb_s: float, tops: float, unit: Unit = "cpu", kind: Kind = "board") -> Machine:
    return Machine(device, kind, unit, bandwidth_gb_s, 0.0 if unit == "npu" else tops, 4 * tops)


def situation(at: Machine, gigabytes: float, runtime: str = "llama.cpp", layers: int = 28) -> Situation:
    """One token of a model of so many bytes, of four bits and a half each weight."""
    macs = gigabytes * 1e9 * 8 / 4.5
    return Situation(at, runtime, layers, gigabytes * 1e9, 2 * macs, 2 * macs, floating=False, wide_heads=False)
