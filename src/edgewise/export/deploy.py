"""EdgeDeployer, the guide's own class: one method per format, over the export with proof."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgewise import errors
from edgewise.errors import EdgewiseError, ExportError, OverBudget, UnsupportedModel, UsageError
from edgewise.export.order import Asked, exported
from edgewise.settings import load

if TYPE_CHECKING:
    import torch

IMAGE_SIDE: Final = 224  # guessed for a network that begins with a convolution
GUESSED_TOKENS: Final = 128
GUESSED_SAMPLES: Final = 1024  # of a one-dimensional convolution


class EdgeDeployer:
    """Converts models and proves what comes out. `output` is where artifacts and reports go, `report` that of the last
    call (docs/export.md).

    A model is a torch module, or anything that `edgewise export` takes as MODEL: `module:attribute`, an .onnx, .pt2 or
    .gguf file, the directory of a bundle, of Hugging Face or of a TensorFlow SavedModel, a name. OverBudget if what
    came out was refused; the other errors are those of `edgewise export`. `precision` is a target's default if it is
    not given; `more` are fields of `Asked`."""

    supported_platforms: Final = ["TFLite", "ONNX", "Core ML", "TensorRT"]

    def __init__(self, output: Path | str = "exported") -> None:
        self.output = Path(output)
        self.report: Mapping[str, Any] = {}

    def convert_to_tflite(
        self, model_path: Any, input_shape: tuple[int, ...] | None = None, *, precision: str | None = None, **more: Any
    ) -> Path:
        """A .tflite with half-precision weights (a .litertlm with int8 ones of a language model)."""
        return self._converted(model_path, "litert", precision, input_shape, more)

    def convert_to_onnx(
        self, model: Any, input_shape: tuple[int, ...] | None = None, *, precision: str | None = None, **more: Any
    ) -> Path:
        """An .onnx whose first axis, `batch_size`, is free; the one input of a torch module is called `input`."""
        names = {"batch_name": "batch_size"} | ({"input_name": "input"} if hasattr(model, "forward") else {})
        return self._converted(model, "onnx", precision, input_shape, more, names)

    def convert_to_coreml(
        self, model: Any, input_shape: tuple[int, ...] | None = None, *, precision: str | None = None, **more: Any
    ) -> Path:
        """An .mlpackage; what is known of it without a Mac is in the report."""
        return self._converted(model, "coreml", precision, input_shape, more)

    def convert_to_tensorrt(
        self, model: Any, input_shape: tuple[int, ...] | None = None, *, precision: str = "fp16", **more: Any
    ) -> Path:
        """An engine of TensorRT-RTX, with the typed ONNX and a `trtexec` script beside it."""
        return self._converted(model, "tensorrt", precision, input_shape, more)

    def _converted(
        self,
        model: Any,
        target: str,
        precision: str | None,
        input_shape: tuple[int, ...] | None,
        more: dict[str, Any],
        options: Mapping[str, Any] | None = None,
    ) -> Path:
        with as_model(model, input_shape) as name:
            language = not hasattr(model, "forward") and _is_language(name)
            given = dict(more.pop("options", {}))
            if options and not language and not more.get("checked"):
                given[target] = {**options, **given.get(target, {})}
            asked = Asked(
                model=name,
                to=target,
                output=self.output,
                precision=precision,
                options=given,
                **more,
            )
            self.report = exported(asked, load().settings.home)
        one = self.report["targets"][target]
        if one["status"] == "failed":
            raise _as_raised(one["error"])
        if one["status"] == "refused":
            why = "; ".join(check["detail"] for check in one["checks"] if not check["ok"])
            raise OverBudget(f"the {target} artifact was refused: {why}", hint=f"see {self.output / 'report.html'}")
        return Path(one["path"])


@contextmanager
def as_model(model: Any, input_shape: tuple[int, ...] | None) -> Iterator[str]:
    """MODEL for a torch module, as a program in a file that is gone afterwards; anything else as it is. UsageError for
    a shape of what says its own."""
    if not hasattr(model, "forward"):
        if input_shape is not None:
            raise UsageError(
                f"input_shape is for a torch module, and {model} says the shapes of its inputs itself",
                hint="leave it away: what a file leaves free is taken from your inputs",
            )
        yield str(model)
        return
    with tempfile.TemporaryDirectory(prefix="edgewise-") as work:
        path = Path(work) / f"{type(model).__name__.lower()}.pt2"
        _save(model, input_shape, path)
        yield str(path)


def _save(module: torch.nn.Module, input_shape: tuple[int, ...] | None, path: Path) -> None:
    """Its first axis is left free where the module allows that."""
    import torch

    module = module.eval()
    example = _example(module, input_shape)
    free = (tuple({0: torch.export.Dim("batch", min=1, max=1024)} for _ in (example,)), None)
    problem: Exception | None = None
    for shapes in free:
        try:
            with torch.no_grad():
                torch.export.save(torch.export.export(module, (example,), dynamic_shapes=shapes), path)
            return
        except Exception as e:  # torch's own, of many kinds
            problem = e
    raise UnsupportedModel(
        f"torch.export cannot trace {type(module).__name__}: {str(problem).strip().splitlines()[0][:300]}",
        hint="its way must not depend on its inputs' values; see torch.cond",
    ) from problem


def _example(module: torch.nn.Module, input_shape: tuple[int, ...] | None) -> torch.Tensor:
    """Two rows of an input that the module takes: of the shape given, or of one that its first layer lets us guess."""
    import torch

    ids = isinstance(first := _first(module), torch.nn.Embedding)
    shape = tuple(input_shape) if input_shape is not None else _guessed(first)
    if shape is None:
        raise UsageError("the shape of the model's input is not known", hint="give input_shape=(1, 3, 224, 224)")
    two = (2, *shape[1:])
    example = torch.ones(two, dtype=torch.int64) if ids else torch.rand(two)
    try:
        with torch.no_grad():
            module(example)
    except Exception as e:  # whatever the user's code raises
        given = "given" if input_shape is not None else "guessed from its first layer"
        raise UsageError(
            f"the model fails on an input of the shape {list(two)}, {given}: {str(e)[:300]}",
            hint="give input_shape with the shape of one input, its first axis 1",
        ) from e
    return example


def _first(module: torch.nn.Module) -> torch.nn.Module:
    """The first layer with parameters of its own."""
    return next((one for one in module.modules() if next(one.parameters(recurse=False), None) is not None), module)


def _guessed(first: torch.nn.Module) -> tuple[int, ...] | None:
    import torch

    match first:
        case torch.nn.Conv2d():
            return (1, first.in_channels, IMAGE_SIDE, IMAGE_SIDE)
        case torch.nn.Conv1d():
            return (1, first.in_channels, GUESSED_SAMPLES)
        case torch.nn.Linear():
            return (1, first.in_features)
        case torch.nn.Embedding():
            return (1, GUESSED_TOKENS)
        case _:
            return None


def _as_raised(error: Mapping[str, Any]) -> EdgewiseError:
    """What a target raised, as the report keeps it."""
    kind: type[EdgewiseError] = getattr(errors, error["kind"], ExportError)
    if kind.__init__ is not EdgewiseError.__init__:  # wants more than its words
        kind = ExportError
    return kind(error["message"], hint=error["hint"])


def _is_language(name: str) -> bool:
    from edgewise.export.sources.model import Language, resolved

    return isinstance(resolved(name, load().settings.home, lambda *_: None), Language)
