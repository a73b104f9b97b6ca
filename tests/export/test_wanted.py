"""What --to and --precision mean, and presets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgewise.devices.catalogue import shipped
from edgewise.errors import UsageError
from edgewise.export import preset
from edgewise.export.options import OPTIONS, taken
from edgewise.export.wanted import parsed


def test_each_target_has_a_default_precision() -> None:
    found = parsed("onnx,litert,coreml,tensorrt,qnn", None)
    assert [(one.key, one.precision) for one in found] == [
        ("onnx", "fp32"),
        ("litert", "fp16"),
        ("coreml", "fp16"),
        ("tensorrt", "int8"),
        ("qnn", "int8"),
    ]


def test_several_precisions_make_several_artifacts() -> None:
    found = parsed("litert,onnx:int4", "fp16,int8")
    assert [(one.key, one.target, one.precision) for one in found] == [
        ("litert:fp16", "litert", "fp16"),
        ("litert:int8", "litert", "int8"),
        ("onnx:int4", "onnx", "int4"),
    ]


@pytest.mark.parametrize(
    ("to", "precision", "said"),
    [
        ("tflite", None, "known are onnx, litert"),
        ("onnx,onnx", None, "twice"),
        ("", None, "no target"),
        ("qnn:fp32", None, "qnn has int8, fp16"),
        ("onnx", "int3", "onnx has fp32"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(to: str, precision: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parsed(to, precision)


def test_language_models_have_their_own_targets() -> None:
    assert [one.precision for one in parsed("onnx,litert,coreml", None, language=True)] == [
        "int4",
        "int8-dynamic",
        "fp16",
    ]
    with pytest.raises(UsageError, match="for a language model"):
        parsed("qnn", None, language=True)


def options(to: str, of_target: str, **given: Any) -> dict[str, Mapping[str, Any]]:
    """What each artifact of `to` is made with."""
    return {one.key: one.options for one in taken(parsed(to, None), {of_target: given}, OPTIONS)}


def test_options_go_to_the_precisions_that_have_a_use_for_them() -> None:
    found = options("coreml:fp16,coreml:int4,onnx", "coreml", palettize=4, target="iOS18")
    assert found == {"coreml:fp16": {"target": "iOS18"}, "coreml:int4": {"palettize": 4, "target": "iOS18"}, "onnx": {}}


@pytest.mark.parametrize(
    ("to", "target", "given", "said"),
    [
        ("onnx", "litert", {"layout": "nchw"}, "given for litert, and only onnx"),
        ("onnx", "onnx", {"colour": "red"}, "onnx has no option colour"),
        ("litert", "litert", {"layout": "chwn"}, "litert.layout is 'chwn'"),
        ("coreml:int4", "coreml", {"palettize": 5}, "coreml.palettize is 5"),
        ("coreml:int4", "coreml", {"palettize": True}, "coreml.palettize is True"),
        ("coreml", "coreml", {"target": "iOS3"}, "coreml.target is 'iOS3'"),
        ("qnn", "qnn", {"activations": 4}, "qnn.activations is 4"),
        ("tensorrt", "tensorrt", {"batches": [4, 2, 8]}, "tensorrt.batches is"),
        ("tensorrt", "tensorrt", {"batches": [1, 2]}, "tensorrt.batches is"),
        ("tensorrt", "tensorrt", {"batches": [0, 1, 1]}, "tensorrt.batches is"),
        ("onnx,onnx:fp16", "onnx", {"reduce_range": True}, "of int8 and int8-dynamic, not of fp32, fp16"),
        ("coreml:int8", "coreml", {"block": 16}, "of int4, not of int8"),
        ("qnn:fp16", "qnn", {"activations": 16}, "of int8, not of fp16"),
    ],
)
def test_options_that_mean_nothing_are_refused(to: str, target: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        options(to, target, **given)


def test_options_of_making_are_not_for_what_is_made_already() -> None:
    wanted = parsed("onnx", None)
    assert taken(wanted, {"onnx": {"optimize": False}}, OPTIONS, made=False)[0].options == {"optimize": False}
    with pytest.raises(UsageError, match=r"onnx\.batch_name is for what is made here"):
        taken(wanted, {"onnx": {"batch_name": "n"}}, OPTIONS, made=False)


@pytest.mark.parametrize("name", preset.names())
def test_our_presets_can_be_read(name: str) -> None:
    found = preset.read(name)
    choice = preset.chosen(found, shipped(), None, None)
    assert choice.wanted


@pytest.mark.parametrize(
    ("platform", "backend", "precision"),
    [("android", "litert", "fp16"), ("ios", "coreml", "fp16"), ("embedded", "xnnpack", "int8")],
)
def test_the_guides_platforms(platform: str, backend: str, precision: str) -> None:
    choice = preset.chosen(preset.read(platform), shipped(), None, None)
    first = next(one for one in choice.wanted if choice.backends[one.key] == backend)
    assert first.precision == precision


def test_a_device_adds_what_it_alone_can_run() -> None:
    android = preset.read("android")
    assert [one.target for one in preset.chosen(android, shipped(), None, None).wanted] == ["litert"]
    with_hexagon = preset.chosen(android, shipped(), "Snapdragon 8 Gen 3", None).wanted
    assert [(one.target, one.options.get("socs")) for one in with_hexagon] == [("litert", None), ("qnn", ["sm8650"])]
    board = preset.chosen(preset.read("embedded"), shipped(), "jetson-orin-nano-8gb", None)
    assert [board.backends[one.key] for one in board.wanted] == ["tensorrt", "xnnpack"]


def test_nnapi_is_had_with_a_warning() -> None:
    choice = preset.chosen(preset.read("android"), shipped(), None, "nnapi")
    assert [choice.backends[one.key] for one in choice.wanted] == ["nnapi"]
    assert ["deprecated" in one for one in choice.warnings] == [True]
    with pytest.raises(UsageError, match="it has litert, nnapi"):
        preset.chosen(preset.read("android"), shipped(), None, "vulkan")


def test_what_a_language_model_does_not_have_of_a_preset_is_said() -> None:
    choice = preset.chosen(preset.read("ios-palettized"), shipped(), None, None, language=True)
    assert [dict(one.options) for one in choice.wanted] == [{}]
    assert any("palettize" in one and "not for this kind" in one for one in choice.warnings)
    choice = preset.chosen(preset.read("android"), shipped(), None, None, language=True)
    assert choice.warnings == ("litert has no fp16 of a language model: it is int8-dynamic",)
    assert preset.chosen(preset.read("ios-palettized"), shipped(), None, None).warnings == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("format = 1", "format = 2"), "format 2"),
        (('precision = "fp16"', 'precision = "fp8"'), "fp8"),
        (('target = "litert"', 'target = "tflite"'), "tflite"),
        (("about =", "abuot ="), "abuot"),
        (('backend = "litert"', 'backend = "litert"\noptions = { layuot = "nhwc" }'), "layuot"),
        (('socs = ["sm8650"]', "activations = 7"), "activations"),
    ],
)
def test_a_copied_preset_with_a_mistake_in_it_is_refused(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    text = (preset.PRESETS / "android.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text)
    preset.read(str(path))
    path.write_text(text.replace(*change, 1))
    with pytest.raises(UsageError, match=said):
        preset.read(str(path))
