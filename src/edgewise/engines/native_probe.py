"""How fast our own kernels are on this machine, for devices/host.py: the products of decoding and of prefill, and what
it costs to hand work to the threads."""

from __future__ import annotations

import ctypes as c
import weakref
from collections.abc import Callable
from functools import cache
from typing import Final

from edgewise.engines import native_lm
from edgewise.engines.slots import CHUNK
from edgewise.errors import EngineError

Kernel = Callable[[int], float]

OUTPUTS, INPUTS = 2048, 1024  # of the matrix, as layers of small models have them; 1.3 MB with 4 bits
SIXTEENTHS: Final = {4: 10, 8: 17}  # of a byte, per weight: a scale of 16 bits for each 32, with 4 bits a minimum too
HANDOVERS: Final = 2000
ENOUGH_NS: Final = 10_000_000  # that one sample takes at least


def version() -> str | None:
    """Of the kernels as they were built: other ones have other figures. None if there are none. Starts nothing."""
    try:
        built = native_lm.LIBRARY.stat()
    except OSError:
        return None
    return f"{built.st_size}.{built.st_mtime_ns}"


def kernels(beyond_caches: int) -> dict[str, Kernel]:
    """Each call takes one sample of a figure, named with its unit, with all threads of the process whatever number it
    is given; `beyond_caches` are bytes that no cache holds. Empty where the kernels do not run. EngineError without the
    memory for it."""
    if native_lm.probe() is None:
        return {}
    found: dict[str, Kernel] = {"native_handover_s": _handover_s}
    for bits, sixteenths in SIXTEENTHS.items():
        weight_bytes = OUTPUTS * INPUTS * sixteenths // 16
        cached, streamed = _Load(bits, 1, 1), _Load(bits, 1, -(-beyond_caches // weight_bytes))
        prefill = _Load(bits, CHUNK, 1)
        found[f"native_q{bits}_decode_mac_per_s"] = cached.rate(OUTPUTS * INPUTS)
        found[f"native_q{bits}_decode_bytes_per_s"] = streamed.rate(weight_bytes)
        found[f"native_q{bits}_prefill_mac_per_s"] = prefill.rate(OUTPUTS * INPUTS * CHUNK)
    return found


@cache
def _library() -> c.CDLL:
    library = c.CDLL(str(native_lm.LIBRARY))
    p, i = c.c_void_p, c.c_int
    for name, result, arguments in (
        ("ew_load_new", p, (i, i, i, i, i)),
        ("ew_load_free", None, (p,)),
        ("ew_load_run", c.c_int64, (p, i)),
        ("ew_handovers", c.c_int64, (i, i)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Load:
    """A product to repeat: a matrix of so many bits, so many copies of it in turn, times so many rows."""

    def __init__(self, bits: int, rows: int, copies: int) -> None:
        self._library = _library()
        self._load: int | None = self._library.ew_load_new(OUTPUTS, INPUTS, bits, copies, rows)
        if self._load is None:
            raise EngineError("there is not enough memory to measure with", hint="end other programs and try again")
        weakref.finalize(self, self._library.ew_load_free, self._load)
        self._run(copies)  # what is untouched comes into memory
        self._products = max(1, ENOUGH_NS // self._run(1))

    def rate(self, work: int) -> Kernel:
        """Samples of how much of `work`, which is that of one product, is done in a second."""
        return lambda threads: work * self._products / self._run(self._products) * 1e9

    def _run(self, products: int) -> int:
        nanoseconds: int = self._library.ew_load_run(self._load, products)
        return max(1, nanoseconds)


def _handover_s(threads: int) -> float:
    nanoseconds: int = _library().ew_handovers(4 * threads, HANDOVERS)
    return nanoseconds / HANDOVERS / 1e9
