"""Precisions: what people write, and what a model then weighs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgewise.errors import UsageError
from edgewise.models.known import known, of_words
from edgewise.models.outline import Outline, Stored
from edgewise.plan.precision import PRECISIONS, precision, published, streamed, weigh
from edgewise.plan.speed import RUNTIMES, weights

OUTLINES = sorted({outline.name: outline for outline in known().values()}.values(), key=lambda one: one.name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Q4_0", "q4_0"),
        ("q4_k_m.gguf", "q4_k_m"),
        ("llama 8B Q4_K - Medium", "q4_k_m"),  # as llama-bench has it
        ("llama 8B Q5_K - Small", "q5_k_s"),
        ("qwen2 1.5B Q6_K", "q6_k"),
        ("llama 3B Q2_K - Medium", "q2_k"),
        ("Q4", "q4_k_m"),
        ("all F32", "fp32"),
        ("bfloat16 weights, BF16 cache", "bf16"),
        ("8da4w + 8w embedding", "8da4w"),
        ("4-bit g128 (8da4w)", "int4_g128"),
        ("QAT+LoRA 4w8a", "spinquant"),
        ("int4 mixed (QAT)", "int4"),
        ("W8A8", "w8a8"),
        ("W8A16", "w8a16"),
        ("NVFP4", "nvfp4"),
        ("MXFP4 MoE", "mxfp4"),
        ("IQ4_XS - 4.25 bpw", "iq4_xs"),
        ("GPTQ 4 bit", "int4_g128"),
    ],
)
def test_spellings(text: str, name: str) -> None:
    found = published(text)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(("text", "bits"), [("3.7 bpw", 3.7), ("2.5 bits per weight", 2.5), ("8bpw", 8)])
def test_bits_per_weight_are_taken_as_said(text: str, bits: float) -> None:
    found = published(text)
    assert found is not None
    assert (found.body, found.head, found.table) == (bits, bits, bits)


@pytest.mark.parametrize("text", ["", "?", "0.5 bpw", "64 bpw", "9" * 400 + " bpw", "0.00001 bits per weight"])
def test_what_says_no_width_is_unknown(text: str) -> None:
    assert published(text) is None


@given(st.text(max_size=60))
def test_any_text_has_a_precision_or_none(text: str) -> None:
    found = published(text)
    assert found is None or 1 <= found.body <= 32


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_goes_by_its_name_in_any_case(name: str) -> None:
    assert precision(name.upper().replace("_", "-")) is PRECISIONS[name]
    assert published(name.upper()) is not None


@pytest.mark.parametrize("name", ["", "q9", "4", "q4_k_m "])
def test_another_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(UsageError, match="q4_k_m"):
        precision(name)


@pytest.mark.parametrize("outline", OUTLINES, ids=lambda one: one.name)
def test_sixteen_bits_are_two_bytes_for_each_parameter(outline: Outline) -> None:
    stored = weigh(outline, PRECISIONS["fp16"])
    assert stored.total == pytest.approx(2 * outline.total, abs=4)
    assert streamed(outline, stored) == pytest.approx(2 * outline.active, rel=1e-6)
    assert streamed(outline, stored) <= stored.body + stored.head


def test_a_table_that_is_only_looked_up_is_not_streamed() -> None:
    gemma, q4 = of_words("Gemma-3n-E2B"), PRECISIONS["int4"]
    assert weigh(gemma, q4).looked_up == round(gemma.looked_up * q4.table / 8)
    assert streamed(gemma, weigh(gemma, q4)) < 0.6 * weigh(gemma, q4).total
    untied = of_words("Llama-3.1-8B")
    assert weigh(untied, q4).embedding == round(untied.embedding * q4.table / 8) > 0


def test_a_runtime_may_keep_a_second_table_beside_a_tied_head() -> None:
    llama, q4 = of_words("Llama-3.2-1B"), PRECISIONS["8da4w"]
    assert weigh(llama, q4).embedding == 0
    assert weigh(llama, q4, table_apart=True).embedding == llama.head
    executorch = next(one for one in RUNTIMES if one.table_apart)
    assert weights(llama, q4, executorch).embedding == llama.head
    assert weights(llama, PRECISIONS["bf16"], executorch).embedding == 0  # only where it quantizes


def test_a_file_weighs_what_it_weighs() -> None:
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128, "vocab": 100}
    stored = Stored(1000, 200, 300, 50)
    assert stored.total == 1550
    assert weigh(Outline("x", **sizes, context=512, tied=True, stored=stored)) is stored
    with pytest.raises(UsageError, match="x is known by its sizes alone"):
        weigh(Outline("x", **sizes, context=512, tied=True))


@settings(deadline=None)
@given(st.sampled_from(OUTLINES), st.sampled_from(sorted(PRECISIONS)), st.booleans())
def test_weights_are_whole_bytes_and_a_token_reads_no_more_than_all(outline: Outline, name: str, apart: bool) -> None:
    stored = weigh(outline, PRECISIONS[name], table_apart=apart)
    assert min(stored.body, stored.head) > 0
    assert min(stored.embedding, stored.looked_up) >= 0
    assert 0 < streamed(outline, stored) <= stored.total
