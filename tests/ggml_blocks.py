"""Blocks of ggml's weight types for tests, also of those that the gguf package can read but not write."""

from __future__ import annotations

import gguf
import numpy as np

from edgewise.models.ggml_types import FORMATS


def random_blocks(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Structured [count]: random bytes, of which all are valid but for a float16 that is not finite and for the
    largest exponents of MXFP4, which stand for 2^121 and more."""
    fields = np.dtype(FORMATS[kind].fields)
    blocks = rng.integers(0, 256, count * fields.itemsize, dtype=np.uint8).view(fields)
    for name in fields.names or ():
        if fields[name] == np.float16:
            bits = rng.integers(0, 1 << 16, count, dtype=np.uint16)
            blocks[name] = np.where((bits & 0x7C00) == 0x7C00, np.uint16(0), bits).view(np.float16)
        if name == "e":
            blocks[name] = np.minimum(blocks[name], 246)
    return blocks


def quantize(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """uint8 [rows, bytes] of a matrix; where gguf cannot round to the type, random weights of the matrix' spread."""
    try:
        return np.asarray(gguf.quantize(values, kind))
    except NotImplementedError:
        return _random_weights(values, kind)


def _random_weights(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    form, elements = FORMATS[kind.name], gguf.GGML_QUANT_SIZES[kind][0]
    blocks = random_blocks(kind.name, values.size // elements, np.random.default_rng(int(values.size)))
    if kind.name == "NVFP4":  # its scales are bytes; these are 2^-7 to 2^-6
        blocks["d"] = (blocks["d"] & 7) + 8
    else:
        blocks["d"] = 1
        if "dmin" in (blocks.dtype.names or ()):
            blocks["dmin"] = form.centre - 0.5  # the mean code: weights around zero
        spread = gguf.dequantize(blocks.view(np.uint8).reshape(len(blocks), -1), kind).std()
        for name in {"d", "dmin"} & set(blocks.dtype.names or ()):
            blocks[name] *= np.float16(values.std() / spread)
    return blocks.view(np.uint8).reshape(len(values), -1)
