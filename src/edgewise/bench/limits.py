"""What this machine could do at most: memory read and multiply-adds, each by the fastest kernel at hand.

Reading: float32 dot products over arrays far larger than the caches, one numpy kernel per thread. Multiplying:
onnxruntime's MatMul (float32) and MatMulInteger (uint8 by int8) of square-ish matrices that stay in the caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edgewise import registry
from edgewise.engines.load import chosen_runtime, kv_bytes_per_token
from edgewise.models.bundle import Bundle
from edgewise.models.card import Card

READ_BYTES = 512 << 20  # in all threads together
ROWS, SIDE = 512, 1024  # of the matrix products
REPEATS = 7  # the best one counts: a limit is what was reached once
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # one kernel per thread of ours
KERNELS = {
    "read_bytes_per_s": "numpy dot, float32",
    "int8_mac_per_s": "onnxruntime MatMulInteger",
    "fp32_mac_per_s": "onnxruntime MatMul",
}


def probe(bundle: Path, threads: int) -> dict[str, Any]:
    """The machine's limits with so many threads, and the bytes of weights that one token of the bundle reads."""
    return {
        "read_bytes_per_s": read_bytes_per_s(threads),
        "int8_mac_per_s": mac_per_s(threads, np.uint8, np.int8, "MatMulInteger"),
        "fp32_mac_per_s": mac_per_s(threads, np.float32, np.float32, "MatMul"),
        "kernels": KERNELS,
        **read_bytes_per_token(Bundle.open(bundle, check=False)),
    }


def read_bytes_per_s(threads: int, total: int = READ_BYTES) -> float:
    parts = [np.ones(total // threads // 4, np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return total / _best(lambda: list(pool.map(lambda part: np.dot(part, part), parts)))


def mac_per_s(threads: int, left: type, right: type, operator: str) -> float:
    """Multiply-adds of the operator on [ROWS, SIDE] by a constant [SIDE, SIDE]."""
    import onnx
    import onnxruntime as ort

    random = np.random.default_rng(0)
    a: np.ndarray[Any, Any] = random.integers(0, 100, (ROWS, SIDE)).astype(left)
    b = onnx.numpy_helper.from_array(random.integers(0, 100, (SIDE, SIDE)).astype(right), "b")
    kind = onnx.helper.np_dtype_to_tensor_dtype(a.dtype)
    out = onnx.TensorProto.INT32 if operator == "MatMulInteger" else onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["a", "b"], ["c"])],
        "probe",
        [onnx.helper.make_tensor_value_info("a", kind, a.shape)],
        [onnx.helper.make_tensor_value_info("c", out, a.shape)],
        [b],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return ROWS * SIDE * SIDE / _best(lambda: session.run(None, {"a": a}))


def read_bytes_per_token(bundle: Bundle) -> dict[str, int]:
    """What decoding a token reads: all weights of blocks and head once, and the keys and values of each position."""
    if chosen_runtime(bundle) == "native":
        weights: int = registry.engine("native")(bundle, slots=1).weight_bytes
    else:
        weights = _stored_weights(bundle)
    return {"weight_bytes_per_token": weights, "kv_bytes_per_position": kv_bytes_per_token(bundle)}


def _stored_weights(bundle: Bundle) -> int:
    import onnx

    stored: dict[tuple[str, int], int] = {}
    for file in bundle.manifest.graphs.layers_and_head:
        for weight in onnx.load_model(bundle.file(file), load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in weight.external_data}
            if place:
                stored[place["location"], int(place["offset"])] = int(place["length"])
    return sum(stored.values())


def ceilings(card: Card, probed: Mapping[str, Any], prompt: int, new: int) -> dict[str, float]:
    """Tokens per second that the limits allow, one stream: decoding at the middle of the answer, and the prompt."""
    middle = prompt + new // 2
    read = probed["weight_bytes_per_token"] + probed["kv_bytes_per_position"] * middle
    decode, prefill = _macs(card, middle) + card.vocab * card.hidden, _macs(card, prompt // 2)
    return {
        "bytes_per_token": read,
        "macs_per_token": decode,
        "decode_read_tok_s": probed["read_bytes_per_s"] / read,
        "decode_int8_tok_s": probed["int8_mac_per_s"] / decode,
        "decode_fp32_tok_s": probed["fp32_mac_per_s"] / decode,
        "prefill_int8_tok_s": probed["int8_mac_per_s"] / prefill,
        "prefill_fp32_tok_s": probed["fp32_mac_per_s"] / prefill,
    }


def _macs(card: Card, length: int) -> int:
    """Multiply-adds of all layers for one token that sees `length` positions, the head not among them."""
    queries, keys = card.heads * card.head_dim, card.kv_heads * card.head_dim
    matrices = card.hidden * (2 * queries + 2 * keys + 3 * card.ffn)
    seen = sum(min(length, card.window(layer) or length) for layer in range(card.layers))
    return card.layers * matrices + 2 * queries * seen


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call, the first one not counted."""
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
