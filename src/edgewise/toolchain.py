"""One door for a model on its way to a platform: presets, quantization, export and proof behind `optimize_for_edge`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from edgewise.devices.catalogue import shipped
from edgewise.errors import OverBudget
from edgewise.export.deploy import as_model
from edgewise.export.order import Asked, exported_as, found
from edgewise.export.preset import chosen, memory_note, read
from edgewise.export.sources.model import Language
from edgewise.settings import load

Show = Callable[[str, int, int], None]


def optimized(
    asked: Asked, platform: str, home: Path, *, device: str | None, backend: str | None, show: Show
) -> dict[str, Any]:
    """The report of an export (docs/export.md) by a preset, with `platform`, `backend`, and `precision` and `path` of
    the first artifact that was let through."""
    preset = read(platform)
    if device is not None:
        shipped().find(device)
    source = found(asked, home, show)
    choice = chosen(preset, shipped(), device, backend, language=isinstance(source, Language))
    facts = exported_as(source, choice.wanted, asked, home, show)
    best = next((key for key, one in facts["targets"].items() if one["status"] == "ok"), None)
    first = choice.wanted[0].key if best is None else best
    told = list(choice.warnings)
    if device is not None and best is not None:
        note = memory_note(shipped().find(device)[1], facts["targets"][best]["bytes"])
        told += [note] if note else []
    return {
        "platform": choice.preset.platform,
        "device": None if device is None else shipped().find(device)[0],
        "about": choice.preset.about,
        "backend": choice.backends[first],
        "precision": facts["targets"][first]["precision"],
        "accelerators": list(choice.preset.accelerators),
        "path": None if best is None else facts["targets"][best]["path"],
        "warnings": told,
        "advice": list(choice.preset.notes),
        **facts,
    }


class EdgeToolchain:
    """The guide's toolchain. `tools` names what there is for each step, and where."""

    tools: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "quantization": {
            "LiteRT": "edgewise export --to litert --precision int8",
            "ONNX Runtime": "edgewise quantize, edgewise export --to onnx --precision int8",
            "TensorRT": "edgewise export --to tensorrt",
            "Edgewise bundles": "edgewise quantize --recipe int4-gptq",
        },
        "optimization": {
            "XNNPACK": "edgewise optimize --platform embedded",
            "LiteRT CompiledModel": "edgewise optimize --platform android",
            "NNAPI": "edgewise optimize --platform android --backend nnapi (deprecated since Android 15)",
            "Core ML": "edgewise optimize --platform ios",
        },
        "profiling": {
            "Android Profiler": "edgewise profile, edgewise bench import",
            "Xcode Instruments": "edgewise bench import",
            "ONNX Runtime": "edgewise bench import",
        },
        "deployment": {"files": "edgewise export, EdgeDeployer"},
    }

    def __init__(self, output: Path | str = "optimized") -> None:
        self.output = Path(output)

    def optimize_for_edge(
        self,
        model: Any,
        platform: str,
        *,
        inputs: Path | str | None = None,
        input_shape: tuple[int, ...] | None = None,
        device: str | None = None,
        backend: str | None = None,
        max_drop: float | None = None,
        strict: bool = False,
    ) -> dict[str, Any]:
        """A torch module, or MODEL as `edgewise export` takes it, for `android`, `ios`, `embedded`, another preset or a
        preset's file. The answer has `backend`, `precision`, `path` and the report of every artifact.

        OverBudget if nothing was let through; the other errors are those of `edgewise export`."""
        with as_model(model, input_shape) as name:
            asked = Asked(
                model=name,
                to="",
                output=self.output / platform_name(platform),
                data=None if inputs is None else Path(inputs),
                max_drop=max_drop,
                strict=strict,
            )
            home = load().settings.home
            facts = optimized(asked, platform, home, device=device, backend=backend, show=lambda *_: None)
        for one in facts["warnings"]:
            warnings.warn(one, DeprecationWarning if "deprecated" in one else UserWarning, stacklevel=2)
        if facts["path"] is None:
            said = [f"{key}: {_why(one)}" for key, one in facts["targets"].items()]
            raise OverBudget("; ".join(said), hint=f"see {asked.output / 'report.html'}")
        return facts


def platform_name(platform: str) -> str:
    return Path(platform).stem


def _why(one: Mapping[str, Any]) -> str:
    if one["error"] is not None:
        return str(one["error"]["message"])
    return "; ".join(f"{check['name']}: {check['detail']}" for check in one["checks"] if not check["ok"])
