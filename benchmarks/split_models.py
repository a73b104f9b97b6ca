"""Makes the graphs with skip connections that benchmarks/split_vision.py cuts, beside those of vision_models.py.

    pip install torch==2.13.0 onnx onnxscript onnxruntime==1.32.0 numpy pillow
    pip install --no-deps torchvision==0.28.0
    python benchmarks/split_models.py DIRECTORY

ResNet-18, MobileNetV2, MobileNetV3-Large, DenseNet-121 and ViT (patches of 16, width 192, 12 layers) of torchvision and
a U-Net of our own: `input` float32 [batch, 3, 224, 224] (RGB, (byte - 127) / 128), one output `logits`. The weights are
random: where to cut is a matter of times and bytes. Batch norms are given the statistics of random images first, as a
trained network has those of its own; onnxruntime is compared with torch. Needs nothing of Edgewise.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

OPSET = 20
SIDE = 224
ALLOWED = 1e-3  # greatest difference of an output, relative to the greatest output

_stubs = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):  # the wheel's own operators want another build of torch; no network here has one
    _stubs.define(f"{_name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

from torchvision import models  # noqa: E402  # after the stubs


class UNet(nn.Module):
    """Four levels down and up, each joined to its like by concatenation; a map of 8 classes."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128, 256)) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.first = twice(3, widths[0])
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), twice(narrow, wide)) for narrow, wide in pairs)
        self.widen = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, 2) for narrow, wide in reversed(pairs))
        self.up = nn.ModuleList(twice(2 * narrow, narrow) for narrow, _ in reversed(pairs))
        self.last = nn.Conv2d(widths[0], 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = [self.first(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        found = levels.pop()
        for widen, up in zip(self.widen, self.up, strict=True):
            found = up(torch.cat([levels.pop(), widen(found)], dim=1))
        return self.last(found)


def twice(narrow: int, wide: int) -> nn.Module:
    layers: list[nn.Module] = []
    for into in (narrow, wide):
        layers += [nn.Conv2d(into, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers)


def vit() -> nn.Module:
    made = models.VisionTransformer(SIDE, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
    nn.init.normal_(made.heads.head.weight, std=0.02)  # zeros before it is trained
    return made


NETS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet18": models.resnet18,
    "mobilenet-v2": models.mobilenet_v2,
    "mobilenet-v3": models.mobilenet_v3_large,
    "densenet121": models.densenet121,
    "unet": UNet,
    "vit-tiny": vit,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in NETS.items():
        torch.manual_seed(0)
        module, path = settled(make()), directory / f"{name}.onnx"
        export(module, path)
        off = difference(module, path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, off by at most {off:.2g}")
        if not off <= ALLOWED:
            raise SystemExit(f"{path} differs from torch by {off:.2g}, allowed is {ALLOWED:.2g}")


@torch.no_grad()
def settled(module: nn.Module) -> nn.Module:
    """Ready to infer, with batch norms that saw something."""
    module.train()
    for _ in range(8):
        module(torch.randn(4, 3, SIDE, SIDE))
    return module.eval()


def export(module: nn.Module, path: Path) -> None:
    how: dict[str, Any] = {"opset_version": OPSET, "external_data": False, "dynamo": True, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says of itself
        torch.onnx.export(
            module,
            (torch.randn(2, 3, SIDE, SIDE),),
            path,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            **how,
        )


@torch.no_grad()
def difference(module: nn.Module, path: Path) -> float:
    """The greatest of any output, as a share of the greatest output."""
    images = torch.randn(3, 3, SIDE, SIDE)
    expected = module(images).numpy()
    (found,) = ort.InferenceSession(str(path)).run(None, {"input": images.numpy()})
    return float(np.abs(found - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    main()
