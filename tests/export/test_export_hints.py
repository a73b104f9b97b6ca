"""Hints: each pitfall has its way out, where it belongs and nowhere else."""

from __future__ import annotations

import pytest

from edgewise.export.options import OPTIONS
from edgewise.export.proof.hints import LINTS, WAYS, Seen, for_artifact, with_hints
from edgewise.export.wanted import PRECISIONS_OF
from edgewise.export.work.job import Coverage, Fallback, Precision, Tensor

IMAGE = Tensor("image", (1, 3, 32, 32), "float32")
IDS = Tensor("input_ids", (1, 64), "int64")
FREE = Tensor("input_ids", (1, None), "int32")


def hint(target: str, precision: Precision, op: str, own: str | None = None) -> str | None:
    coverage = Coverage(9, 8, "something", (Fallback(op, 1, "it was so", own),))
    return with_hints(target, precision, coverage).fallback[0].hint


@pytest.mark.parametrize(
    ("target", "precision", "op", "words"),
    [
        ("litert", "int8-dynamic", "DEPTHWISE_CONV_2D", "give --calibration and take int8"),
        ("litert", "int4", "CONV_2D", "take int8"),
        ("litert", "int8", "SOFTMAX", "logits"),
        ("litert", "fp16", "TRANSPOSE", "layout=nhwc"),
        ("litert", "fp32", "CAST", "int32"),
        ("coreml", "int4", "ios18.constexpr_blockwise_shift_scale", "palettize"),
        ("tensorrt", "fp16", "LayerNormalization", "float32"),
        ("tensorrt", "fp16", "NonZero", "mask"),
        ("qnn", "int8", "Shrink", "Clip"),
    ],
)
def test_an_operator_that_falls_back_has_a_way_out(target: str, precision: Precision, op: str, words: str) -> None:
    assert words in str(hint(target, precision, op))


@pytest.mark.parametrize(
    ("target", "precision", "op"),
    [
        ("litert", "int8", "DEPTHWISE_CONV_2D"),  # XNNPACK has that
        ("litert", "fp32", "SOFTMAX"),
        ("coreml", "fp16", "constexpr_blockwise_shift_scale"),
        ("tensorrt", "fp32", "LayerNormalization"),
        ("qnn", "int8", "MyOwn"),
        ("onnx", "fp32", "Softmax"),
    ],
)
def test_a_hint_stays_where_it_belongs(target: str, precision: Precision, op: str) -> None:
    assert hint(target, precision, op) is None


def test_a_targets_own_hint_is_better() -> None:
    assert hint("litert", "int8", "SOFTMAX", "as I said") == "as I said"


def test_nothing_else_of_a_coverage_changes() -> None:
    left = (Fallback("A", 2, "why"), Fallback("SIGN", 1, "why", None))
    found = with_hints("litert", "fp32", Coverage(5, 2, "XNNPACK", left))
    assert (found.nodes, found.accelerated, found.accelerator) == (5, 2, "XNNPACK")
    assert [(one.op, one.count, one.why) for one in found.fallback] == [("A", 2, "why"), ("SIGN", 1, "why")]
    assert found.fallback[0].hint is None


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (Seen("litert", "fp16", (IDS,)), ["int64 inputs"]),
        (Seen("litert", "fp16", (FREE,)), ["free length"]),
        (Seen("litert", "fp32", (IMAGE,), ("CONV_2D", "TRANSPOSE")), ["layout=nhwc"]),
        (Seen("litert", "fp32", (IMAGE,), ("CONV_2D",)), []),
        (Seen("litert", "fp32", (FREE,), ("TRANSPOSE",)), ["free length"]),
        (Seen("coreml", "fp16", (IMAGE,)), [":fp32"]),
        (Seen("coreml", "int8", (IDS,)), ["saves memory", "become int32"]),
        (Seen("coreml", "fp32", (Tensor("x", (1,) * 6, "float32"),)), ["five axes"]),
        (Seen("tensorrt", "fp16", (IMAGE,), ("Conv", "Softmax")), ["overflow"]),
        (Seen("tensorrt", "fp16", (IMAGE,), ("Conv",)), []),
        (Seen("tensorrt", "fp32", (IMAGE,), ("Softmax",)), []),
        (Seen("qnn", "int8", (FREE,)), ["no free lengths"]),
        (Seen("onnx", "fp32", (IDS, FREE)), []),
    ],
)
def test_an_artifact_is_told_what_its_target_is_known_for(seen: Seen, words: list[str]) -> None:
    found = for_artifact(seen)
    assert len(found) == len(words)
    for line, word in zip(found, words, strict=True):
        assert word in line


def test_the_tables_name_only_what_there_is() -> None:
    for one in (*WAYS, *LINTS):
        assert one.target in PRECISIONS_OF
        own = [precision for precision in one.precisions if precision in PRECISIONS_OF[one.target]]
        assert own, one
        for option in (*OPTIONS["litert"], *OPTIONS["coreml"]):
            if f"{option}=" in one.hint:
                assert option in OPTIONS[one.target], one


def test_every_way_can_be_told() -> None:
    """None is hidden by one before it."""
    for way in WAYS:
        told = [
            hint(way.target, precision, op) == way.hint
            for op in way.ops.split()
            for precision in way.precisions
            if precision in PRECISIONS_OF[way.target]
        ]
        assert any(told), way
