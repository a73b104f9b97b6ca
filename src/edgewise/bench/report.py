"""A comparison of engines as people read it: tables, reasons, and the command that repeats it."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from edgewise.bench.engines import Comparison, Row
from edgewise.bench.peers.base import FAST

Report = Mapping[str, Any]  # of `compare`

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "prefill tok/s": ("prefill_tok_s", lambda v: f"{v:.0f}"),
    "decode tok/s": ("decode_tok_s", lambda v: f"{v:.1f}"),
    "first token ms": ("ttft_ms", lambda v: f"{v:.0f}"),
    "cold start s": ("cold_start_s", lambda v: f"{v:.2f}"),
    "peak MB": ("peak_rss_bytes", lambda v: f"{v / 1e6:.0f}"),
}
LIMITS = {
    "decode_read_tok_s": "decode by memory reads",
    "decode_int8_tok_s": "decode by int8 products",
    "prefill_int8_tok_s": "prefill by int8 products",
    "prefill_fp32_tok_s": "prefill by fp32 products",
}


def table(report: Report) -> str:
    """Medians, cell by cell; the last column says what ours is to a peer. Below, the machine's limits and how much of
    them ours reaches, and why some have no ratio."""
    console = Console(file=io.StringIO(), width=150)
    for cell in report["cells"]:
        rows = Table(title=f"{cell['prompt_tokens']} prompt tokens, {cell['streams']} at once", title_justify="left")
        for heading in ("engine", "KL", *COLUMNS, "edgewise fast is"):
            rows.add_column(heading, justify="left" if heading.startswith("e") else "right")
        for name, row in cell["engines"].items():
            rows.add_row(name, "" if row["kl"] is None else f"{row['kl']:.2g}", *_medians(row), _verdict(cell, name))
        console.print(rows)
        for line in (_limits(cell["limits"]), *_predicted(cell)):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        for name, row in cell["engines"].items():
            if row["left_out"]:
                console.print(f"{name} is left out: {row['left_out']}", soft_wrap=True, markup=False, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()


def _limits(limits: Mapping[str, Any]) -> str:
    """What the machine would allow one stream, tokens per second, and ours as a share of it."""
    reached = limits["share"].get(FAST, {})
    shown = (f"{what} {limits[key]:.0f}{_share(reached.get(key[: -len('_tok_s')]))}" for key, what in LIMITS.items())
    return f"limits here, tok/s: {', '.join(shown)}"


def _predicted(cell: Mapping[str, Any]) -> list[str]:
    """What a plan would have said of ours, beside what was measured."""
    if cell["predicted"] is None:
        return []
    row, found = cell["engines"][FAST], cell["predicted"].items()
    pairs = (f"{key.split('_')[0]} {p['value']:.0f} (measured {median(row[key]):.0f})" for key, p in found if row[key])
    return [f"edgewise plan --device host predicts, tok/s: {', '.join(pairs)}"]


def _share(reached: float | None) -> str:
    return "" if reached is None else f" ({reached:.0%} reached)"


def _medians(row: Row) -> list[str]:
    return [show(median(row[key])) if row[key] else "" for key, show in COLUMNS.values()]


def _verdict(cell: Mapping[str, Any], name: str) -> str:
    ratio = cell["ratio_to"].get(name)
    if ratio is None:
        return "left out" if cell["engines"][name]["left_out"] else ""
    decode, prefill = ratio["decode_tok_s"], ratio["prefill_tok_s"]
    return f"{prefill['median']:.2f}x in prefill, {decode['median']:.2f}x in decode"


def reasons(report: Report) -> list[str]:
    rows = [pair for cell in report["cells"] for pair in cell["engines"].items()]
    return sorted({f"{name}: {row['failed']}" for name, row in rows if row["failed"]})


def command(plan: Comparison, name: str, output: Path | None) -> str:
    """The call that repeats the run. Of files elsewhere only their names: a Measurement says nothing of the disk."""
    words: list[object] = ["edgewise", "bench", "engines", "--model", plan.model_name]
    words += ["--against", ",".join(plan.against), "--rounds", plan.rounds]
    words += ["--prompts", _list(plan.prompts), "--new", plan.new, "--threads", plan.threads]
    words += ["--streams", _list(plan.streams)] if plan.streams != (1,) else []
    words += [word for peer, path in plan.models.items() for word in ("--peer-model", f"{peer}={path.name}")]
    words += ["--name", name] if name != "engines" else []
    words += ["-o", output] if output is not None and not output.is_absolute() else []
    return shlex.join(map(str, words))


def _list(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
