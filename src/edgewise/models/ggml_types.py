"""ggml's weight types as matrices of ours: codes and scales are moved, no weight is rounded again.

A block of ggml's K types holds 256 weights in groups of 16 or 32, each with a scale of its own: a small integer times
the block's. Here a group becomes a block of `Quantized`, and its scale that product in float32, which is exact, for
both factors have few bits. A type with a minimum means q * scale + minimum; it is kept as
(q - centre) * scale + (minimum + centre * scale), because codes around zero suffer least where the kernels round
activations to int8. That sum is rounded to float32, as ggml's own is; all else is exact.

Codes of up to 4 bits stay 4 bits wide; those of 5 and 6 bits, and the int8 values that code books stand for, take 8.
Groups of 16 stay blocks of 16: the runtime has int8 kernels for them, and no block of 32 holds two scales exactly.
Types whose code books are lattices (IQ1, IQ2, IQ3) are not carried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from edgewise.errors import SourceError
from edgewise.models.gguf import TensorInfo
from edgewise.models.weights import Dense, Matrix, Quantized, pack4
from edgewise.types import FloatArray

Bytes = npt.NDArray[np.uint8]
Blocks = npt.NDArray[Any]  # [n], structured: one element per block of ggml, its fields named as in ggml

CHUNK: Final = 1 << 18  # weights unpacked at once: what lies between file and matrix then stays in the cache
SCALE_LIMIT: Final = 1e36  # float32 ends at 3.4e38, a code at 128


class Groups(NamedTuple):
    """What n blocks of ggml say: codes uint8 [n, weights] (negative ones modulo 256), scales and minima float32
    [n, groups]."""

    codes: Bytes
    scales: FloatArray
    minima: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """How a type's blocks are laid out, and what becomes of them."""

    bits: int  # of a code in the matrix
    group: int  # weights that share a scale
    centre: int  # the code of zero, or the middle code where there is a minimum
    fields: npt.DTypeLike
    read: Callable[[Blocks], Groups]


def unpack(info: TensorInfo, raw: Bytes) -> Matrix:
    """The tensor as [outputs, inputs]; a vector is one output. Dense types stay views of `raw`.
    SourceError if a scale is NaN, infinite or so large that weights could be."""
    outputs, inputs = math.prod(info.shape[:-1]), info.shape[-1]
    if info.type in DENSE:
        return Dense(raw.view(DENSE[info.type]).reshape(outputs, inputs))
    form = FORMATS[info.type]
    blocks = raw.view(form.fields).reshape(outputs, -1)
    step = max(1, CHUNK // inputs)
    matrix = None
    for first in range(0, outputs, step):
        part = _quantized(form, blocks[first : first + step])
        if not all((np.abs(a) < SCALE_LIMIT).all() for a in part.arrays):
            raise SourceError(
                f"the tensor {info.name!r} has a scale or minimum that is not a number below {SCALE_LIMIT:g}",
                hint="the file is damaged: take another conversion of this model",
            )
        matrix = matrix or part.of(np.empty((outputs, *a.shape[1:]), a.dtype) for a in part.arrays)
        for whole, rows in zip(matrix.arrays, part.arrays, strict=True):
            whole[first : first + step] = rows
    assert matrix is not None  # a tensor has at least one row
    return matrix


def _quantized(form: Format, blocks: Blocks) -> Quantized:
    """Rows of ggml's blocks [outputs, n] as a matrix."""
    outputs, half = len(blocks), 1 << (form.bits - 1)
    with np.errstate(invalid="ignore"):  # `unpack` looks for NaN
        groups = form.read(blocks.reshape(-1))
        moved = None if groups.minima is None else groups.minima + np.float32(form.centre) * groups.scales
    codes = (groups.codes + np.uint8(half - form.centre)).reshape(outputs, -1, form.group)
    packed = codes if form.bits == 8 else pack4(codes)
    minima = None if moved is None else moved.reshape(outputs, -1)
    return Quantized(form.bits, packed, groups.scales.reshape(outputs, -1), minima, form.group)


def _spread(packed: Bytes, run: int, bits: int, to: int = 0) -> Bytes:
    """The numbers in `packed` [n, bytes], their lowest bit moved to bit `to`: a run of bytes holds `run` numbers in its
    lowest bits, the next `run` above them, and so on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    numbers = (packed.reshape(len(packed), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)
    return (numbers << np.uint8(to)).reshape(len(packed), -1)


def _scale(blocks: Blocks, field: str = "d") -> FloatArray:
    """float32 [n, 1]"""
    return np.asarray(blocks[field], dtype=np.float32).reshape(len(blocks), 1)


def _q4_0(b: Blocks) -> Groups:
    return Groups(_spread(b["qs"], 16, 4), _scale(b))


def _q4_1(b: Blocks) -> Groups:
    return Groups(_spread(b["qs"], 16, 4), _scale(b), _scale(b, "m"))


def _five_bits(b: Blocks) -> Bytes:
    return _spread(b["qs"], 16, 4) | _spread(b["qh"], 1, 1, to=4)


def _q5_0(b: Blocks) -> Groups:
    return Groups(_five_bits(b), _scale(b))


def _q5_1(b: Blocks) -> Groups:
    return Groups(_five_bits(b), _scale(b), _scale(b, "m"))


def _q8_0(b: Blocks) -> Groups:
    return Groups(b["qs"], _scale(b))


def _q2_k(b: Blocks) -> Groups:
    return Groups(_spread(b["qs"], 32, 2), _scale(b) * (b["scales"] & 15), -_scale(b, "dmin") * (b["scales"] >> 4))


def _q3_k(b: Blocks) -> Groups:
    low, high = _spread(b["scales"][:, :8], 8, 4), _spread(b["scales"][:, 8:], 4, 2, to=4)
    codes = _spread(b["qs"], 32, 2) | _spread(b["hmask"], 32, 1, to=2)
    return Groups(codes, _scale(b) * ((low | high) - np.float32(32)))


def _q4_k(b: Blocks) -> Groups:
    return Groups(_spread(b["qs"], 32, 4), *_scales_and_minima(b))


def _q5_k(b: Blocks) -> Groups:
    return Groups(_spread(b["qs"], 32, 4) | _spread(b["qh"], 32, 1, to=4), *_scales_and_minima(b))


def _scales_and_minima(b: Blocks) -> tuple[FloatArray, FloatArray]:
    """8 scales and 8 minima of 6 bits in 12 bytes: the first four of each in bytes 0-3 and 4-7; of the others the low
    four bits in bytes 8-11 and the high two on top of the first four."""
    first, last = b["scales"][:, :8], b["scales"][:, 8:]
    low, high = first & 63, _spread(last, 4, 4) | (first >> 2 & 48)
    scales = np.concatenate([low[:, :4], high[:, :4]], axis=1)
    minima = np.concatenate([low[:, 4:], high[:, 4:]], axis=1)
    return _scale(b) * scales, -_scale(b, "dmin") * minima


def _q6_k(b: Blocks) -> Groups:
    codes = _spread(b["ql"], 64, 4) | _spread(b["qh"], 32, 2, to=4)
    return Groups(codes, _scale(b) * b["scales"])


def _iq4_nl(b: Blocks) -> Groups:
    return Groups(IQ4_VALUES[_spread(b["qs"], 16, 4)], _scale(b))


def _iq4_xs(b: Blocks) -> Groups:
    scales = _spread(b["scales_l"], 1, 4) | _spread(b["scales_h"], 1, 2, to=4)
    return Groups(IQ4_VALUES[_spread(b["qs"], 16, 4)], _scale(b) * (scales - np.float32(32)))


def _mxfp4(b: Blocks) -> Groups:
    """The scale is 2^(e - 128): half of what the standard says, because the code book has doubled values."""
    return Groups(FP4_VALUES[_spread(b["qs"], 16, 4)], np.ldexp(np.float32(1), b["e"].astype(np.int32) - 128)[:, None])


def _nvfp4(b: Blocks) -> Groups:
    """Scales of 4 exponent and 3 mantissa bits, halved as in `_mxfp4`; ggml reads the pattern 0x7F as 0."""
    exponents, mantissas = (b["d"] >> 3 & 15).astype(np.int32), (b["d"] & 7).astype(np.float32)
    normal = exponents > 0
    scales = np.ldexp(mantissas + np.float32(8) * normal, np.maximum(exponents, 1) - 11)
    return Groups(FP4_VALUES[_spread(b["qs"], 8, 4)], np.where(b["d"] == 0x7F, np.float32(0), scales))


def _tq1_0(b: Blocks) -> Groups:
    digits = [_digits(b["qs"][:, :32], 32, 5), _digits(b["qs"][:, 32:], 16, 5), _digits(b["qh"], 4, 4)]
    return Groups(np.concatenate(digits, axis=1), np.repeat(_scale(b), 8, axis=1))


def _digits(packed: Bytes, run: int, count: int) -> Bytes:
    """The first `count` ternary digits of bytes that hold a fraction: byte / 256 = 0.abcde in base 3."""
    powers = np.array([1, 3, 9, 27, 81][:count], dtype=np.uint8)[:, None]
    left = packed.reshape(len(packed), -1, 1, run) * powers  # modulo 256: the digits before are gone
    return ((left.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(len(packed), -1)


def _tq2_0(b: Blocks) -> Groups:
    return Groups(_spread(b["qs"], 32, 2), np.repeat(_scale(b), 8, axis=1))


def _layout(*fields: tuple[str, str, int] | tuple[str, str]) -> npt.DTypeLike:
    return np.dtype(list(fields))


def _values(*values: int) -> Bytes:
    return np.array(values, dtype=np.int8).view(np.uint8)


IQ4_VALUES: Final = _values(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_VALUES: Final = _values(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled

_D: Final = ("d", "<f2")
_DMIN: Final = ("dmin", "<f2")
_M: Final = ("m", "<f2")

DENSE: Final[dict[str, npt.DTypeLike]] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
FORMATS: Final[dict[str, Format]] = {
    "Q4_0": Format(4, 32, 8, _layout(_D, ("qs", "u1", 16)), _q4_0),
    "Q4_1": Format(4, 32, 8, _layout(_D, _M, ("qs", "u1", 16)), _q4_1),
    "Q5_0": Format(8, 32, 16, _layout(_D, ("qh", "u1", 4), ("qs", "u1", 16)), _q5_0),
    "Q5_1": Format(8, 32, 16, _layout(_D, _M, ("qh", "u1", 4), ("qs", "u1", 16)), _q5_1),
    "Q8_0": Format(8, 32, 0, _layout(_D, ("qs", "u1", 32)), _q8_0),
    "Q2_K": Format(4, 16, 2, _layout(("scales", "u1", 16), ("qs", "u1", 64), _D, _DMIN), _q2_k),
    "Q3_K": Format(4, 16, 4, _layout(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), _D), _q3_k),
    "Q4_K": Format(4, 32, 8, _layout(_D, _DMIN, ("scales", "u1", 12), ("qs", "u1", 128)), _q4_k),
    "Q5_K": Format(8, 32, 16, _layout(_D, _DMIN, ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)), _q5_k),
    "Q6_K": Format(8, 16, 32, _layout(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _D), _q6_k),
    "IQ4_NL": Format(8, 32, 0, _layout(_D, ("qs", "u1", 16)), _iq4_nl),
    "IQ4_XS": Format(8, 32, 0, _layout(_D, ("scales_h", "u1", 2), ("scales_l", "u1", 4), ("qs", "u1", 128)), _iq4_xs),
    "TQ1_0": Format(4, 32, 1, _layout(("qs", "u1", 48), ("qh", "u1", 4), _D), _tq1_0),
    "TQ2_0": Format(4, 32, 1, _layout(("qs", "u1", 64), _D), _tq2_0),
    "MXFP4": Format(8, 32, 0, _layout(("e", "u1"), ("qs", "u1", 16)), _mxfp4),
    "NVFP4": Format(8, 16, 0, _layout(("d", "u1", 4), ("qs", "u1", 32)), _nvfp4),
}
KNOWN: Final = (*DENSE, *FORMATS)
