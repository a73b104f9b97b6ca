"""What --to and --precision mean, and presets."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgewise.devices.catalogue import shipped
from edgewise.errors import UsageError
from edgewise.export import preset
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
    assert choice.warning is not None
    assert "deprecated" in choice.warning
    with pytest.raises(UsageError, match="it has litert, nnapi"):
        preset.chosen(preset.read("android"), shipped(), None, "vulkan")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("format = 1", "format = 2"), "format 2"),
        (('precision = "fp16"', 'precision = "fp8"'), "fp8"),
        (('target = "litert"', 'target = "tflite"'), "tflite"),
        (("about =", "abuot ="), "abuot"),
        (('backend = "litert"', 'backend = "litert"\noptions = { layuot = "nhwc" }'), "layuot"),
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
