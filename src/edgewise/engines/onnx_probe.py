"""How fast onnxruntime multiplies whole numbers on this machine, for devices/host.py and for bench/limits.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort

ROWS, SIDE = 512, 1024  # uint8 [ROWS, SIDE] by constant int8 [SIDE, SIDE], which stay in the caches


def kernels(*, spinning: bool = False) -> dict[str, Callable[[int], float]]:
    """Each call takes one sample of a figure, named with its unit, with so many threads. With `spinning` they wait for
    each other at full speed, and for a while afterwards too, which what is measured next would feel."""
    return {"onnxruntime_int8_mac_per_s": lambda threads: _int8_mac_per_s(threads, spinning)}


def _int8_mac_per_s(threads: int, spinning: bool) -> float:
    left = np.full((ROWS, SIDE), 100, np.uint8)
    session = _session(threads, spinning)
    start = time.perf_counter()
    session.run(None, {"a": left})
    return ROWS * SIDE * SIDE / (time.perf_counter() - start)


@cache
def _session(threads: int, spinning: bool) -> ort.InferenceSession:
    random = np.random.default_rng(0)
    right = onnx.numpy_helper.from_array(random.integers(-100, 100, (SIDE, SIDE)).astype(np.int8), "b")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
        "probe",
        [onnx.helper.make_tensor_value_info("a", onnx.TensorProto.UINT8, (ROWS, SIDE))],
        [onnx.helper.make_tensor_value_info("c", onnx.TensorProto.INT32, (ROWS, SIDE))],
        [right],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
