"""Rows of measured speeds, and what each says of the situation it was measured in.

`read` takes a CSV whose first line names its columns (docs/planner.md). An empty field is unknown; a wrong one is a
UsageError that names file, line and field.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal

import msgspec

from edgewise.devices.catalogue import Catalogue, Device
from edgewise.errors import SourceError, UsageError
from edgewise.models.known import of_size, of_words
from edgewise.models.outline import Outline
from edgewise.plan.fit import Observation, Target
from edgewise.plan.precision import UNSAID, Precision, published, streamed
from edgewise.plan.speed import (
    CONTEXT,
    Kind,
    Machine,
    Part,
    Runtime,
    Situation,
    completed,
    machine_of,
    runtime_of,
    situation,
    unit_of,
    weights,
)

Basis = Literal["published", "estimated", ""]
COLUMNS: Final = (
    "device",
    "unit",
    "model",
    "params_b",
    "quantization",
    "streamed_weights_gb",
    "runtime",
    "prefill_tok_s",
    "decode_tok_s",
    "weights_basis",
    "peak_bw_gb_s",
)
SIZE_LIMIT: Final = 16 << 20  # bytes
NUMBER_LIMIT: Final = 1e7  # and as far below 1
FIELD_LIMIT: Final = 10_000  # characters
UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")  # what no SVG may hold
DISTRUST: Final = "do not fit"  # a note that says so keeps its row from teaching anything


class Row(msgspec.Struct, frozen=True):
    """A published speed. Numbers are None where the row does not say; bytes and rates are decimal."""

    device: str
    unit: str
    model: str
    runtime: str
    quantization: str = ""
    params_b: float | None = None
    streamed_weights_gb: float | None = None
    basis: Basis = ""
    bandwidth_gb_s: float | None = None
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    note: str = ""
    context: int = CONTEXT
    prompt: int = CONTEXT

    @property
    def trusted(self) -> bool:
        return DISTRUST not in self.note.lower()

    @property
    def part(self) -> Part:
        text = self.unit.lower()
        if re.search(r"npu|\bane\b|hexagon|\bhtp\b|\btpu\b|neural", text):
            return "npu"
        return "cpu" if text.startswith("cpu") else "gpu"


def read(path: Path) -> list[Row]:
    """All rows of a CSV. UsageError."""
    reader = csv.reader(io.StringIO(_text(path)), strict=True)
    rows = []
    try:
        header = next(reader, [])
        _check_header(path, header)
        for fields in reader:
            if fields:
                rows.append(_Line(path, reader.line_num, header, fields).row())
    except csv.Error as e:
        raise UsageError(f"{path}, line {reader.line_num}: this is not CSV: {e}") from e
    if not rows:
        raise UsageError(f"{path} has no rows", hint="the first line names the columns, each other is a measurement")
    return rows


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise UsageError(f"{path} has {path.stat().st_size} bytes, at most {SIZE_LIMIT} are read")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"{path} is not UTF-8 at byte {e.start}") from e


def _check_header(path: Path, header: list[str]) -> None:
    for column in COLUMNS:
        if column not in header:
            raise UsageError(f"{path}, line 1: {column}: the column is missing", hint=f"needed: {', '.join(COLUMNS)}")
    twice = {column for column in header if header.count(column) > 1}
    if twice:
        raise UsageError(f"{path}, line 1: {min(twice)}: the column stands there twice")


class _Line:
    """One line of the CSV, by the names of its columns."""

    def __init__(self, path: Path, number: int, header: list[str], fields: list[str]) -> None:
        self._place = f"{path}, line {number}"
        if len(fields) != len(header):
            raise UsageError(f"{self._place}: it has {len(fields)} fields, the first line names {len(header)}")
        self._fields = dict(zip(header, fields, strict=True))
        for column, text in self._fields.items():
            if len(text) > FIELD_LIMIT:
                raise self._wrong(column, f"has {len(text)} characters, at most {FIELD_LIMIT} are read")
            if found := UNPRINTABLE.search(text):
                raise self._wrong(column, f"holds the character {found[0]!r}")

    def row(self) -> Row:
        made = Row(
            device=self._word("device"),
            unit=self._word("unit"),
            model=self._word("model"),
            runtime=self._word("runtime"),
            quantization=self._fields["quantization"].strip(),
            params_b=self._number("params_b"),
            streamed_weights_gb=self._number("streamed_weights_gb"),
            basis=self._basis(),
            bandwidth_gb_s=self._number("peak_bw_gb_s"),
            prefill_tok_s=self._number("prefill_tok_s"),
            decode_tok_s=self._number("decode_tok_s"),
            note=self._fields.get("note", ""),
        )
        if made.decode_tok_s is None and made.prefill_tok_s is None:
            raise self._wrong("decode_tok_s", "is empty, and prefill_tok_s too; a row needs one of them")
        if made.basis == "published" and made.streamed_weights_gb is None:
            raise self._wrong("streamed_weights_gb", "is empty, but weights_basis says that it is published")
        try:
            outline_of(made)
        except (UsageError, SourceError) as e:
            raise self._wrong("model", f"is {made.model!r}: {e.message}") from e
        return made

    def _word(self, column: str) -> str:
        text = self._fields[column].strip()
        if not text:
            raise self._wrong(column, "is empty")
        return text

    def _basis(self) -> Basis:
        text = self._fields["weights_basis"].strip()
        for allowed in ("published", "estimated", ""):
            if text == allowed:
                return allowed
        raise self._wrong("weights_basis", f"is {text[:40]!r}; published, estimated or nothing is allowed")

    def _number(self, column: str) -> float | None:
        text = self._fields[column].strip()
        if not text:
            return None
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 1 / NUMBER_LIMIT < number < NUMBER_LIMIT:
            allowed = f"a number between {1 / NUMBER_LIMIT:g} and {NUMBER_LIMIT:g}"
            raise self._wrong(column, f"is {text[:40]!r}; nothing, or {allowed} is needed")
        return number

    def _wrong(self, column: str, what: str) -> UsageError:
        return UsageError(f"{self._place}: {column}: {what}", hint="docs/planner.md")


def outline_of(row: Row) -> Outline:
    """The public model of that name, unless the row gives it quite another size; else a shape of the row's size."""
    try:
        named = of_words(row.model)
    except UsageError:
        if row.params_b is None:
            raise
        named = of_size(row.model, row.params_b * 1e9)
    if row.params_b is None or (not named.guessed and _is_about(row.params_b * 1e9, named)):
        return named
    return of_size(row.model, row.params_b * 1e9)


SAME_SIZE: Final = 1.33  # a factor; some count tables that are only looked up, and some do not


def _is_about(parameters: float, outline: Outline) -> bool:
    counts = outline.total, outline.total - outline.looked_up
    return any(1 / SAME_SIZE < parameters / count < SAME_SIZE for count in counts)


Machines = Callable[[Row], Machine]


def situation_of(row: Row, machine: Machine) -> Situation:
    """What the row's speed depended on."""
    outline, ways = outline_of(row), runtime_of(row.runtime, machine.unit)
    precision = published(row.quantization) or UNSAID
    return situation(
        outline,
        precision,
        machine,
        row.runtime,
        context=row.context,
        prompt=row.prompt,
        weight_bytes=_streamed(row, outline, precision, ways),
        api="webgpu" if "webgpu" in row.unit.lower() else "",
    )


def observations(rows: Iterable[Row], machines: Machines, target: Target) -> list[Observation]:
    """Of the rows that have that speed."""
    return [
        Observation(situation_of(row, machines(row)), row.device, speed, row.trusted)
        for row in rows
        if (speed := speed_of(row, target)) is not None
    ]


def speed_of(row: Row, target: Target) -> float | None:
    return row.decode_tok_s if target == "decode" else row.prefill_tok_s


def _streamed(row: Row, outline: Outline, precision: Precision, ways: Runtime) -> float:
    """Bytes of weights that a token reads. Published sizes are of what is read, or of a whole file, in which the table
    for looking up lies too: our own count tells which. Estimated ones are worth no more than ours, which knows the
    model, if it does."""
    kept = weights(outline, precision, ways)
    ours = streamed(outline, kept)
    if row.streamed_weights_gb is None:
        return ours
    theirs = row.streamed_weights_gb * 1e9
    if row.basis == "published":
        whole = ours + kept.embedding
        nearer_the_file = abs(math.log(theirs / whole)) < abs(math.log(theirs / ours))
        return theirs - kept.embedding if nearer_the_file else theirs
    return min(max(ours, theirs / SAME_SIZE), theirs * SAME_SIZE) if outline.guessed else ours


def by(catalogue: Catalogue) -> Machines:
    """Finds a row's machine in the catalogue. The row's own bandwidth counts before the catalogue's: it may be that of
    another power mode. What the catalogue does not have is a typical machine of what the name sounds like."""
    return lambda row: _machine(row, catalogue)


def _machine(row: Row, catalogue: Catalogue) -> Machine:
    found = find(catalogue, row.device, row.bandwidth_gb_s)
    if found is not None:
        return machine_of(*found, row.part, row.runtime, bandwidth_gb_s=row.bandwidth_gb_s)
    text = row.device.lower()
    unit = unit_of(row.part, nvidia=re.search(NVIDIA, text) is not None, apple=re.search(APPLE, text) is not None)
    matrix = runtime_of(row.runtime, unit).matrix_units
    return completed(row.device, _kind(text), unit, bandwidth_gb_s=row.bandwidth_gb_s, matrix_units=matrix)


def _kind(text: str) -> Kind:
    """What the name of a device says of it."""
    return next((kind for kind, words in KIND_WORDS.items() if re.search(words, text)), "phone")


SERVER_GPU: Final = r"\b(a10|a30|a40|a100|b200|h20|h100|h200|l4|l40s?|t4|v100)\b|tesla"
NVIDIA: Final = rf"nvidia|rtx|geforce|jetson|\bdgx|orin|xavier|thor|{SERVER_GPU}"
APPLE: Final = r"apple|iphone|ipad|\bmac|\bm[1-9]\b"
KIND_WORDS: Final[dict[Kind, str]] = {  # the first that has a word of the name counts
    "edge gpu": "jetson|orin|xavier|thor",
    "desktop": r"dgx spark|rtx|geforce|radeon|desktop|workstation|\barc\b",
    "server": rf"{SERVER_GPU}|\bdgx|server|epyc|xeon",
    "phone": "iphone|ipad|phone|galaxy|pixel|oneplus|xiaomi|redmi|oppo|vivo|honor|exynos|dimensity|snapdragon [678]",
    "mac": r"\bmac|\bm[1-9]\b",
    "board": r"raspberry|\bpi\b|\brk3|rock|orange pi|radxa|khadas|banana|i\.mx|dragonwing|qcs|\biq-?\d",
    "accelerator": "hailo|coral|accelerator",
    "laptop": "lake|ryzen|core ultra|intel|amd|x2? elite|laptop|surface|thinkpad",
}
SAME_BANDWIDTH: Final = 1.5  # a factor; a name with another bandwidth than the catalogue's is another device
VARIANTS: Final = {"pro", "max", "ultra", "plus", "super", "elite", "gen", "ti", "nx", "mini", "se", "xl", "extreme"}


def find(catalogue: Catalogue, name: str, bandwidth_gb_s: float | None = None) -> tuple[str, Device] | None:
    """The catalogued device that a name in free words means: one of its names stands in those words, and no variant
    of it behind ("M4" is not in "M4 Max")."""
    words = _words(name)
    best: tuple[int, str] | None = None
    for id, device in catalogue.devices.items():
        for called in (id, device.name, *device.aliases):
            known = _words(called)
            exact = known == words
            if (exact or any(character.isdigit() for character in called)) and _stands_in(known, words):
                best = max(best or (0, ""), (len(known) + exact, id))
    if best is None:
        return None
    device = catalogue.devices[best[1]]
    figure = device.bandwidth_gb_s
    if bandwidth_gb_s and figure and not 1 / SAME_BANDWIDTH < bandwidth_gb_s / figure.least < SAME_BANDWIDTH:
        return None
    return best[1], device


def _words(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+|\+", name.lower()))


def _stands_in(known: tuple[str, ...], words: tuple[str, ...]) -> bool:
    for at in range(len(words) - len(known) + 1):
        behind = words[at + len(known) :][:1]
        if words[at : at + len(known)] == known and not VARIANTS.intersection(behind):
            return True
    return False
