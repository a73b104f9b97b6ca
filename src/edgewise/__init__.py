"""Edgewise: run a model on the device, ask the cloud when it pays, go on when the cloud is gone."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgewise.compress.distil.trainer import DistillationTrainer
    from edgewise.devices.views import EdgeGPUSpecs, benchmarks, edge_chips
    from edgewise.export.deploy import EdgeDeployer
    from edgewise.joint.inference import JointInference
    from edgewise.split.inference import LayerSplitInference
    from edgewise.toolchain import EdgeToolchain

__all__ = [
    "DistillationTrainer",
    "EdgeDeployer",
    "EdgeGPUSpecs",
    "EdgeToolchain",
    "JointInference",
    "LayerSplitInference",
    "__version__",
    "benchmarks",
    "edge_chips",
]
__version__ = "0.1.0"

# Loaded when first used, so that `import edgewise` stays light.
_DOORS = {
    "DistillationTrainer": "edgewise.compress.distil.trainer",
    "EdgeDeployer": "edgewise.export.deploy",
    "EdgeGPUSpecs": "edgewise.devices.views",
    "EdgeToolchain": "edgewise.toolchain",
    "JointInference": "edgewise.joint.inference",
    "LayerSplitInference": "edgewise.split.inference",
    "benchmarks": "edgewise.devices.views",
    "edge_chips": "edgewise.devices.views",
}


def __getattr__(name: str) -> object:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    door: object = getattr(import_module(_DOORS[name]), name)
    globals()[name] = door
    return door


def __dir__() -> list[str]:
    return sorted({*globals(), *_DOORS})
