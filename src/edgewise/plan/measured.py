"""Rows of Measurement files (docs/formats/measurement.md): `edgewise bench engines`, and llama-bench as imported.

They do not name the device as the catalogue does, so whoever reads one says which it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import msgspec

from edgewise.errors import UsageError
from edgewise.plan.rows import Row
from edgewise.plan.speed import READ_SHARE, Kind, Machine, completed

FORMAT: Final = 1
SIZE_LIMIT: Final = 256 << 20  # bytes
CPU_BACKENDS: Final = {"CPU", "BLAS", ""}
HINT: Final = "`edgewise bench engines` and `edgewise bench import` of llama-bench write files that plans learn from"

Speed = Annotated[float, msgspec.Meta(gt=0, le=1e7)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e18)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]


class _Measurement(msgspec.Struct):
    """The keys that plans need."""

    format: int
    kind: str
    settings: dict[str, Any]
    results: dict[str, Any]


class _Figure(msgspec.Struct):
    median: Speed


class _Engine(msgspec.Struct):
    """Lists of samples are empty where an engine failed."""

    decode_tok_s: _Figure | list[Speed] = []
    prefill_tok_s: _Figure | list[Speed] = []


class _Cell(msgspec.Struct):
    prompt_tokens: Count
    streams: Count
    engines: dict[str, _Engine]


class _Limits(msgspec.Struct):
    """What the machine reached in the same run."""

    read_bytes_per_s: Positive | None = None
    int8_mac_per_s: Positive | None = None
    weight_bytes_per_token: Positive | None = None


class _Engines(msgspec.Struct):
    model: str
    cells: list[_Cell]
    limits: _Limits = msgspec.field(default_factory=_Limits)


class _Test(msgspec.Struct):
    """A test of llama-bench, with the setup that all of them share."""

    model_filename: str
    model_n_params: Positive
    model_size: Positive
    model_type: str = ""
    n_gpu_layers: int = 0
    backends: str = ""
    median: Speed | None = None
    mean: Speed | None = None


def read(path: Path, device: str, model: str | None = None) -> list[Row]:
    """The token speeds in the file as rows of `device`; `model` says what it is where the file's name for it does not.
    UsageError if there are none, whatever the bytes are."""
    found = _decoded(path)
    if found.kind != "measured":
        raise UsageError(f"{path} holds {found.kind} figures; only measured ones teach anything")
    try:
        rows = list(_engines(found) if "cells" in found.results else _llama_bench(found))
    except msgspec.ValidationError as e:
        raise UsageError(f"{path} holds no speeds of tokens: {e}", hint=HINT) from e
    if not rows:
        raise UsageError(f"{path} holds no speeds of tokens", hint=HINT)
    return [msgspec.structs.replace(row, device=device, model=model or row.model) for row in rows]


def machine(path: Path, device: str, kind: Kind) -> Machine:
    """The CPU that a file of `bench engines` was measured on, by the limits that the same run found. UsageError if it
    holds none."""
    try:
        limits = msgspec.convert(_decoded(path).results.get("limits", {}), _Limits)
    except msgspec.ValidationError as e:
        raise UsageError(f"{path} holds limits of another form: {e}", hint=HINT) from e
    if limits.read_bytes_per_s is None or limits.int8_mac_per_s is None:
        raise UsageError(f"{path} does not say what its machine reaches", hint=HINT)
    tops = 2 * limits.int8_mac_per_s / 1e12
    bandwidth = limits.read_bytes_per_s / 1e9 / READ_SHARE
    return completed(device, kind, "cpu", bandwidth_gb_s=bandwidth, decode_tops=tops, prefill_tops=tops)


def _decoded(path: Path) -> _Measurement:
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise UsageError(f"{path} has {path.stat().st_size} bytes; a Measurement file has at most {SIZE_LIMIT}")
        found = msgspec.json.decode(path.read_bytes(), type=_Measurement)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise UsageError(f"{path} is not a Measurement file: {e}", hint="docs/formats/measurement.md") from e
    if found.format != FORMAT:
        raise UsageError(f"{path} has format {found.format}; this version reads {FORMAT}", hint="measure again")
    return found


def _engines(found: _Measurement) -> Iterator[Row]:
    """One stream each: more share what a token reads. Decode is timed over the answer, behind the prompt."""
    results = msgspec.convert(found.results, _Engines)
    read_bytes = results.limits.weight_bytes_per_token
    new = found.settings.get("new")
    answer = new if isinstance(new, int) and new > 0 else 0
    for cell in results.cells:
        for name, engine in cell.engines.items() if cell.streams == 1 else ():
            row = Row(
                device="",
                unit="CPU",
                model=results.model,
                runtime=name,
                streamed_weights_gb=None if read_bytes is None else read_bytes / 1e9,
                basis="" if read_bytes is None else "published",
                prefill_tok_s=_middle(engine.prefill_tok_s),
                decode_tok_s=_middle(engine.decode_tok_s),
                context=cell.prompt_tokens + answer // 2,
                prompt=max(cell.prompt_tokens, 1),
            )
            if row.decode_tok_s or row.prefill_tok_s:
                yield row


def _middle(figure: _Figure | list[float]) -> float | None:
    if isinstance(figure, _Figure):
        return figure.median
    return median(figure) if figure else None


TEST: Final = re.compile(r"(?:pp(\d{1,9}))?(?:tg(\d{1,9}))?(?: @ d(\d{1,9}))?(?: .*)?")


def _llama_bench(found: _Measurement) -> Iterator[Row]:
    """Tests of a prompt or of an answer; one of both ("pp512+tg128") tells neither speed."""
    for name, result in found.results.items():
        shape = TEST.fullmatch(name)
        if shape is None or not isinstance(result, Mapping) or (shape[1] is None) == (shape[2] is None):
            continue
        test = msgspec.convert({**found.settings, **result}, _Test)
        prompt, answer, depth = (int(number or 0) for number in shape.groups())
        speed = test.median or test.mean
        if speed is None:
            continue
        on_gpu = test.n_gpu_layers > 0 and test.backends not in CPU_BACKENDS
        yield Row(
            device="",
            unit="GPU" if on_gpu else "CPU",
            model=Path(test.model_filename).stem,
            runtime="llama.cpp",
            quantization=test.model_type,
            params_b=test.model_n_params / 1e9,
            streamed_weights_gb=test.model_size / 1e9,
            basis="published",
            prefill_tok_s=speed if prompt else None,
            decode_tok_s=speed if answer else None,
            context=depth + answer // 2,
            prompt=max(prompt, 1),
        )
