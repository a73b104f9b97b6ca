"""onnxruntime's own quantizer, as a program: SOURCE OUTPUT INPUTS.npz BITS, for qdq.py.

INPUTS holds the arrays of a run under `N NAME`, N from 0. What goes wrong is the last line on stderr.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Reader(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
    """Runs, one after the other."""

    def __init__(self, path: Path) -> None:
        self._file = np.load(path, allow_pickle=False)
        self._next = 0

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        prefix = f"{self._next} "
        self._next += 1
        return {
            name.removeprefix(prefix): self._file[name] for name in self._file.files if name.startswith(prefix)
        } or None


def main(source: Path, output: Path, inputs: Path, activation_bits: int) -> None:
    whole, prepared = output.with_name("whole.onnx"), output.with_name("prepared.onnx")
    onnx.save(onnx.load(source), whole)  # weights that lie beside the source would not be found
    quant_pre_process(whole, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        output,
        Reader(inputs),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8 if activation_bits == 8 else QuantType.QUInt16,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
    )


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # its advice has been followed, and what fails is raised
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    except Exception as error:  # onnxruntime's classes share no other
        sys.exit(" ".join(str(error).split()))
