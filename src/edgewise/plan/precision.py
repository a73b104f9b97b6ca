"""Precisions: how many bits a weight takes, scales included, and what a model then weighs.

Recipes seldom store a model evenly: the head stays finer than the layers, because it costs little and errs most.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from edgewise.errors import UsageError
from edgewise.models.outline import Outline, Stored


class Precision(msgspec.Struct, frozen=True):
    """Bits per weight of the layers, of the head, and of a table that is only looked up."""

    name: str
    body: float
    head: float
    table: float

    @property
    def floating(self) -> bool:
        """16 or 32 bits: multiplied as floating point, not as integers."""
        return self.body >= 16


def _table(*rows: tuple[str, float, float, float]) -> dict[str, Precision]:
    return {row[0]: Precision(*row) for row in rows}


# GGUF: a block of 32 or 256 weights has scales of 16 bits or fewer; the mixed K types are as llama.cpp mixes them for
# Llama-3.1-8B, and all below 6 bits keep the head in q6_k. QNN and RKNN: a scale per channel. nvfp4: 16 weights share 8
# bits. 8da4w: groups of 32 with a scale of 16 bits; spinquant: groups of 32 with one of 32.
PRECISIONS: Final = _table(
    ("fp32", 32, 32, 32),
    ("fp16", 16, 16, 16),
    ("bf16", 16, 16, 16),
    ("fp8", 8, 8, 16),
    ("q8_0", 8.5, 8.5, 8.5),
    ("int8", 8, 8, 8),
    ("w8a8", 8, 8, 8),
    ("w8a16", 8, 8, 8),
    ("q6_k", 6.56, 6.56, 6.56),
    ("q5_k_m", 5.66, 6.56, 5.5),
    ("q5_k_s", 5.5, 6.56, 5.5),
    ("q5_1", 6, 6.56, 6),
    ("q5_0", 5.5, 6.56, 5.5),
    ("q4_k_m", 4.81, 6.56, 4.5),
    ("q4_k_s", 4.54, 6.56, 4.5),
    ("q4_1", 5, 6.56, 5),
    ("q4_0", 4.5, 6.56, 4.5),
    ("iq4_nl", 4.5, 6.56, 4.5),
    ("iq4_xs", 4.25, 6.56, 4.25),
    ("q3_k_m", 3.86, 6.56, 3.44),
    ("q2_k", 3, 6.56, 2.63),
    ("int4", 4.5, 8, 8),
    ("int4_g128", 4.25, 8, 8),
    ("spinquant", 5, 8, 8),
    ("8da4w", 4.5, 8, 8),
    ("w4a16", 4.1, 8, 8),
    ("nvfp4", 4.5, 8, 16),
    ("mxfp4", 4.25, 8.5, 8.5),
)

# What published rows call them; the first that is found counts, so the particular stand before the general.
SPELLINGS: Final = (
    (r"spinquant|qat\+lora", "spinquant"),
    (r"g128|awq|gptq", "int4_g128"),
    (r"8da4w|4w8a|w4a8", "8da4w"),
    (r"w4a16|\bw4\b", "w4a16"),
    (r"nvfp4|\bfp4", "nvfp4"),
    (r"mxfp4", "mxfp4"),
    (r"fp8|\be4m3", "fp8"),
    (r"w8a16", "w8a16"),
    (r"w8a8|\bw8\b", "w8a8"),
    (r"bf16", "bf16"),
    (r"fp16|f16\b|float16|half", "fp16"),
    (r"fp32|f32\b", "fp32"),
    (r"int8|8-?bit|\bq8\b", "int8"),
    (r"int4|4-?bit", "int4"),
    (r"\bq4\b", "q4_k_m"),  # what ollama and llama.cpp load where nobody says more
    (r"\bq5\b", "q5_k_m"),
    (r"\bq6\b", "q6_k"),
    (r"\bq3\b", "q3_k_m"),
    (r"\bq2\b", "q2_k"),
)
UNSAID: Final = PRECISIONS["int4"]  # nearly every published row has 4 bits


def precision(name: str) -> Precision:
    """By its name. UsageError if there is none."""
    found = PRECISIONS.get(name.lower().replace("-", "_"))
    if found is None:
        raise UsageError(f"there is no precision {name!r}", hint=f"known: {', '.join(PRECISIONS)}")
    return found


def published(text: str) -> Precision | None:
    """The precision that the free text of a published row means; None if it says nothing that we know."""
    plain = re.sub(r"_k - ([sml])[a-z]+", r"_k_\1", text.lower())  # llama.cpp says "Q4_K - Medium"
    names = [name for name in PRECISIONS if "_" in name and name in plain]
    if names:
        return PRECISIONS[max(names, key=len)]
    if bits := re.search(r"(?<!\d)(\d+(?:\.\d+)?) ?(?:bpw|bits? per weight)", plain):
        width = float(bits[1])
        return Precision(bits[0], width, width, width) if 1 <= width <= 32 else None
    return next((PRECISIONS[name] for pattern, name in SPELLINGS if re.search(pattern, plain)), None)


def weigh(outline: Outline, precision: Precision | None = None, *, table_apart: bool = False) -> Stored:
    """Bytes of the model at that precision, or as its file has them with None (UsageError if there is no file).
    `table_apart`: the runtime keeps a table to look tokens up also where the head is that table."""
    if precision is None:
        if outline.stored is None:
            raise UsageError(f"{outline.name} is known by its sizes alone", hint="name a precision, e.g. q4_k_m")
        return outline.stored
    table = outline.head if table_apart else outline.embedding
    return Stored(
        body=round(outline.body * precision.body / 8),
        head=round(outline.head * precision.head / 8),
        embedding=round(table * precision.table / 8),
        looked_up=round(outline.looked_up * precision.table / 8),
    )


def streamed(outline: Outline, weights: Stored) -> float:
    """Bytes of weights that one token reads: its share of the layers, and the head. Tables are only looked up."""
    return weights.body * outline.active_body / outline.body + weights.head
