"""A part of an ONNX graph on onnxruntime's CPU provider: tensors in, tensors out, in the caller's thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgewise.engines.onnx_process import failed, shared_options
from edgewise.errors import EngineClosed, UnsupportedModel

if TYPE_CHECKING:
    from onnx import ModelProto

Tensors = Mapping[str, npt.NDArray[np.generic]]


class OnnxPart:
    """`model` in memory, ready to run. `inputs` and `outputs` are its names. With `plain` the graph is not optimised:
    nodes compute as they stand, so that a cut changes no bit; else onnxruntime fuses what it finds, and what lies at a
    cut cannot be fused across it.

    UnsupportedModel if onnxruntime cannot run it. Runs may overlap from several threads; whoever made it closes it."""

    def __init__(self, model: ModelProto, *, plain: bool = False) -> None:
        options = shared_options()
        if plain:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.name: str = model.graph.name
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's classes share no other
            raise UnsupportedModel(
                f"onnxruntime {ort.__version__} cannot run {self.name}: {error}",
                hint="export it with the operators and the opset that this version has",
            ) from error
        self.inputs: tuple[str, ...] = tuple(one.name for one in session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(one.name for one in session.get_outputs())
        self._session: ort.InferenceSession | None = session

    def run(self, inputs: Tensors) -> dict[str, npt.NDArray[Any]]:
        """All outputs by name; of `inputs` those that the part has. KeyError if one is missing, EngineError if
        onnxruntime fails (a wrong shape or dtype too), EngineClosed after `close`."""
        session = self._session
        if session is None:
            raise EngineClosed(f"{self.name} was closed", hint="open the model again")
        feeds = {name: inputs[name] for name in self.inputs}
        try:
            return dict(zip(self.outputs, session.run(self.outputs, feeds), strict=True))
        except Exception as error:
            raise failed(error) from error

    def close(self) -> None:
        """Free the part. Idempotent."""
        self._session = None
