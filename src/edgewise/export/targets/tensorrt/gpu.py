"""An engine of TensorRT-RTX on a GPU, where there is one, through NVIDIA's driver alone.

Nobody has run this file against a GPU yet: it was written where there is none. So what goes wrong here is said and
takes nothing from the rest of a proof.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import numpy as np
import tensorrt_rtx_bindings as trt

from edgewise.errors import ExportError
from edgewise.export.work.job import Array

DRIVER: Final = "libcuda.so.1"
TIMED: Final = 20  # rows, after the first


class Gpu:
    """The first GPU, while this process lives. OSError or ExportError if there is none."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL(DRIVER)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(100)
        self._call("cuDeviceGetName", name, 100, device)
        self.name = name.value.decode(errors="replace")

    def reserve(self, size: int) -> int:
        place = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(max(size, 1)))
        return place.value

    def free(self, place: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(place))

    def write(self, place: int, value: Array) -> None:
        data = np.ascontiguousarray(value)
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(place), ctypes.c_void_p(data.ctypes.data), _size(data))

    def read(self, place: int, into: Array) -> None:
        self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(into.ctypes.data), ctypes.c_uint64(place), _size(into))

    def wait(self) -> None:
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *given: Any) -> None:
        code = getattr(self._driver, name)(*given)
        if code:
            raise ExportError(f"{name} of NVIDIA's driver gives {code}", hint="is the GPU free, its driver recent?")


def _size(value: Array) -> ctypes.c_size_t:
    return ctypes.c_size_t(value.nbytes)


def gpu() -> Gpu | None:
    with suppress(OSError, ExportError, AttributeError):
        return Gpu()
    return None


def executed(
    device: Gpu, engine: bytes, log: Any, rows: Mapping[str, Array], outputs: int
) -> tuple[list[Array], tuple[float, ...]]:
    """The outputs of each row alone, float32, and milliseconds of some. ExportError if the GPU does not take it."""
    runtime = trt.Runtime(log)
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        raise ExportError(f"{device.name} does not take the engine", hint="build it for its compute capability")
    context = loaded.create_execution_context()
    names = [loaded.get_tensor_name(place) for place in range(loaded.num_io_tensors)]
    given = [name for name in names if loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    made = [name for name in names if name not in given]
    if len(given) != len(rows) or len(made) != outputs:
        raise ExportError("the engine has other inputs and outputs than its graph", hint="export it again")
    found: list[list[Array]] = []
    taken = []
    for place in range(len(next(iter(rows.values())))):
        feed = {name: np.asarray(rows[name][place : place + 1]) for name in given}
        values, ms = _one(device, loaded, context, feed, made)
        found.append(values)
        taken.append(ms)
    kept = tuple(taken[1 : TIMED + 1])
    return [np.concatenate(parts).astype(np.float32) for parts in zip(*found, strict=True)], kept


def _one(
    device: Gpu, loaded: Any, context: Any, feed: Mapping[str, Array], made: list[str]
) -> tuple[list[Array], float]:
    places: list[int] = []

    def bound(name: str, size: int) -> int:
        places.append(device.reserve(size))
        context.set_tensor_address(name, places[-1])
        return places[-1]

    try:
        for name, value in feed.items():
            right = value.astype(trt.nptype(loaded.get_tensor_dtype(name)), copy=False)
            context.set_input_shape(name, right.shape)
            device.write(bound(name, right.nbytes), right)
        outputs = {name: _empty(loaded, context, name) for name in made}
        read_from = {name: bound(name, value.nbytes) for name, value in outputs.items()}
        ms = _timed(lambda: _run(device, context))
        for name, value in outputs.items():
            device.read(read_from[name], value)
        return list(outputs.values()), ms
    finally:
        for place in places:
            device.free(place)


def _empty(loaded: Any, context: Any, name: str) -> Array:
    return np.empty(tuple(context.get_tensor_shape(name)), trt.nptype(loaded.get_tensor_dtype(name)))


def _run(device: Gpu, context: Any) -> None:
    if not context.execute_async_v3(0):
        raise ExportError("the engine stopped", hint="its log says why")
    device.wait()


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000
