"""torch to a float32 .tflite file by litert-torch, with the source's own names of inputs and outputs."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import nn

from edgewise.errors import EdgewiseError, UnsupportedModel
from edgewise.export.sources.loaded import Loaded
from edgewise.export.sources.torch_source import tensors
from edgewise.export.work.job import Tensor

IMAGE_CHANNELS: Final = (1, 3)
MOST_ROWS: Final = 64  # of a file with a free first axis
ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
NO_LOWERING: Final = re.compile(r"Lowering not found: ([\w.]+)")
PLACE: Final = re.compile(r'File "?([^",:]+?\.py)"?(?:, line |:)(\d+),? in (\w+)')
DECIDES: Final = ("data-dependent", "DataDependent", "GuardOnDataDependentSymNode")


class Named(nn.Module):
    """Takes its inputs and gives its outputs by name; images come with their channels last."""

    def __init__(self, net: nn.Module, inputs: Sequence[str], outputs: Sequence[str], images: Sequence[str]) -> None:
        super().__init__()
        self.net, self.inputs, self.outputs, self.images = net, tuple(inputs), tuple(outputs), frozenset(images)
        self.forward = self._declared()  # torch.export reads the parameters of this

    def _declared(self) -> Callable[..., dict[str, torch.Tensor]]:
        """A function that has the inputs' names as those of its parameters: free axes are given by them."""

        def forward(**given: torch.Tensor) -> dict[str, torch.Tensor]:
            return self.named(**given)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        declared = inspect.Signature([inspect.Parameter(name, kind) for name in self.inputs])
        forward.__signature__ = declared  # type: ignore[attr-defined]
        return forward

    def named(self, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        values = [given[name].permute(0, 3, 1, 2) if name in self.images else given[name] for name in self.inputs]
        return dict(zip(self.outputs, tensors(self.net(*values)), strict=True))


def images(inputs: Sequence[Tensor]) -> tuple[str, ...]:
    """Inputs that are images with their channels first."""
    return tuple(one.name for one in inputs if _is_image(one.shape))


def _is_image(shape: Sequence[int | None]) -> bool:
    return len(shape) == 4 and shape[1] in IMAGE_CHANNELS and len(set(shape[1:])) > 1


def write(loaded: Loaded, outputs: Sequence[str], path: Path, last: Sequence[str], *, free: bool) -> None:
    """`last` are the inputs whose channels come last in the file; `free` leaves the first axis free.

    UnsupportedModel for what litert-torch cannot convert."""
    import litert_torch

    given = loaded.example if free else dict(zip((one.name for one in loaded.inputs), loaded.one_row, strict=True))
    moved = {name: value.permute(0, 2, 3, 1).contiguous() if name in last else value for name, value in given.items()}
    batch = torch.export.Dim("batch", min=1, max=MOST_ROWS)
    shapes = {name: {0: batch} for name in moved} if free else None
    net = Named(loaded.module, list(moved), outputs, last).eval()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it draws a progress of its own
            litert_torch.convert(net, sample_kwargs=moved, dynamic_shapes=shapes).export(str(path))
    except EdgewiseError:
        raise
    except Exception as e:  # torch's, litert-torch's and MLIR's own, of many kinds
        raise _refused(ANSI.sub("", str(e)), free=free) from e


def _refused(why: str, *, free: bool) -> UnsupportedModel:
    where = _where(why)
    missing = NO_LOWERING.search(why)
    if missing:
        op = missing.group(1).removesuffix(".default")
        return UnsupportedModel(
            f"LiteRT has no operator for {op}{where}",
            hint="write that part with other operators, or compute it outside of the network",
        )
    if any(word in why for word in DECIDES):
        return UnsupportedModel(
            f"the network's way depends on the values of its inputs{where}; a .tflite file has one way",
            hint="let it compute both and choose with torch.where",
        )
    if free and ("Constraints violated" in why or "specialized" in why or "dynamic" in why.lower()):
        return UnsupportedModel(
            f"the network cannot leave its number of rows free: {_lines(why)}", hint="export it without dynamic_batch"
        )
    return UnsupportedModel(
        f"litert-torch cannot convert it{where}: {_lines(why)}", hint="export to onnx shows whether torch can"
    )


def _where(why: str) -> str:
    """` (net.py:8 in forward)`, the innermost line that is not torch's own."""
    found = [place for place in PLACE.findall(why) if "/site-packages/" not in place[0]]
    if not found:
        return ""
    path, line, function = found[-1]
    return f" ({Path(path).name}:{line} in {function})"


def _lines(why: str) -> str:
    return " ".join(line.strip() for line in why.strip().splitlines()[:3])[:300]
