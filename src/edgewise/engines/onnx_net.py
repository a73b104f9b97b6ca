"""Any ONNX file on onnxruntime's CPU provider as a `Predictor`: classifiers, detectors, encoders.

What a file cannot take is refused before it runs. A file whose first axis is a fixed number of rows takes any other
number all the same: it runs in pieces of so many, the last one filled up with a row that is already there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edgewise.engines.local import set_threads
from edgewise.engines.onnx_process import failed, shared_options
from edgewise.errors import EngineClosed, EngineError, RequestError, SourceError, UnsupportedModel, UsageError

Array = npt.NDArray[Any]
Tensors = Mapping[str, npt.NDArray[np.generic]]
T = TypeVar("T")

LOGITS: Final = "logits"
DTYPES: Final[Mapping[str, npt.DTypeLike]] = {  # by onnxruntime's names; numpy has no others that it can run on
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}
UNABLE: Final = (  # what onnxruntime says of a sound file that is not for it
    "NOT_IMPLEMENTED",
    "No Op registered",
    "is not a registered function/op",
    "is under development",
    "Unsupported model IR version",
)
ALIKE: Final = 1e-4  # relative difference of a row in two runs of one shape: the same kernels hardly differ at all


@dataclass(frozen=True, slots=True)
class Port:
    """An input or an output of a file. `axes` are a number each, the name of a dynamic axis, or None for one without a
    name; None as a whole where the file declares no shape (onnxruntime shows a scalar the same way)."""

    name: str
    dtype: np.dtype[Any]
    axes: tuple[int | str | None, ...] | None

    @property
    def shape(self) -> tuple[int | None, ...] | None:
        """`axes` with None for every dynamic one."""
        return None if self.axes is None else tuple(axis if isinstance(axis, int) else None for axis in self.axes)

    @property
    def rows(self) -> int | None:
        """The fixed length of the first axis, if there is one."""
        return self.shape[0] if self.shape else None

    def __str__(self) -> str:
        axes = "any shape" if self.axes is None else "[" + ", ".join(str(axis or "?") for axis in self.axes) + "]"
        return f"{self.name} {_kind(self.dtype)} {axes}"


class OnnxNet:
    """A Predictor over an ONNX file, weights beside it included. `slots` calls compute at once, more wait.

    `logits` names the output that is given as `logits`, float32, beside all outputs under their own names. Without it
    that is the output of this name, else the only floating one of two axes or more. `threads` is engines/local.py's
    `set_threads` (one pool serves all models of a process), None leaves it as it is or will be. `inputs` and
    `outputs` say what the file takes and gives (inputs with a default in the file keep it), `batch` how many rows it
    computes at once where any other number is run in pieces of so many, None where its own axes hold.

    SourceError if the file is missing, damaged or no ONNX, UnsupportedModel if onnxruntime cannot run it or it takes or
    gives what is no array, UsageError if `logits`, `threads` or `slots` cannot be, EngineError if the process has
    another number of threads already. May be called from any event loop.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        logits: str | None = None,
        threads: int | None = None,
        slots: int = 1,
        name: str | None = None,
    ) -> None:
        _check_count("slots", slots)
        self.name = Path(path).stem if name is None else name
        if threads is not None:
            _check_count("threads", threads)
            set_threads(threads)
        session = _session(Path(path))
        self.inputs = tuple(_port(path, "takes", arg) for arg in session.get_inputs())
        self.outputs = tuple(_port(path, "gives", arg) for arg in session.get_outputs())
        self.batch = _fixed_batch(self.inputs, self.outputs)
        self._logits = _logits_output(self.name, self.outputs, logits)
        self._session: ort.InferenceSession | None = session
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix=f"onnx {self.name}")
        self._running: set[ort.RunOptions] = set()
        self._closed = False
        self._apart = False  # whether rows were seen not to depend on what fills up their piece

    async def predict(self, inputs: Tensors) -> Tensors:
        """All outputs by name, `logits` float32 [batch, classes] among them.

        Numbers are converted where that loses nothing but digits (a float of another width, whole numbers that fit);
        what is no array becomes one. RequestError for a missing or unknown input, another dtype or shape, or no rows;
        EngineError if onnxruntime fails, EngineClosed after `close`. Cancelling it stops the work."""
        options = ort.RunOptions()
        options.log_severity_level = 4  # what fails is raised
        return await self._aside(lambda: self._predict(inputs, options), options)

    async def close(self) -> None:
        """Stop all work and free the model. Idempotent."""
        self._closed = True
        for options in tuple(self._running):
            options.terminate = True
        await asyncio.to_thread(self._pool.shutdown)
        self._session = None

    async def _aside(self, call: Callable[[], T], options: ort.RunOptions) -> T:
        """The one way in: the runtime blocks, so it is called in a thread of the pool."""
        self._check_open()
        work = asyncio.get_running_loop().run_in_executor(self._pool, call)
        try:
            return await work
        except asyncio.CancelledError:
            options.terminate = True
            raise

    def _predict(self, inputs: Tensors, options: ort.RunOptions) -> Tensors:
        self._running.add(options)  # first, so that either `close` sees it or the next line sees `close`
        try:
            self._check_open()
            found = self._compute(_checked(self.name, self.inputs, self.batch, inputs), options)
        finally:
            self._running.discard(options)
        with np.errstate(over="ignore"):
            return {**found, LOGITS: found[self._logits].astype(np.float32, copy=False)}

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed(f"{self.name} was closed", hint="open the model again")

    def _compute(self, feeds: Mapping[str, Array], options: ort.RunOptions) -> dict[str, Array]:
        batch = self.batch
        if batch is None or _count(feeds) == batch:
            return self._run(feeds, options)
        starts = range(0, _count(feeds), batch)
        parts = [{name: value[start : start + batch] for name, value in feeds.items()} for start in starts]
        pieces = [self._piece(part, batch, options) for part in parts]
        return {port.name: np.concatenate([piece[port.name] for piece in pieces]) for port in self.outputs}

    def _piece(self, part: Mapping[str, Array], batch: int, options: ort.RunOptions) -> dict[str, Array]:
        """The outputs of 1..`batch` rows."""
        found = self._rows(_filled(part, batch, _last), _count(part), options)
        if _count(part) < batch and not self._apart:
            self._check_apart(found, self._rows(_filled(part, batch, _other), _count(part), options))
        return found

    def _check_apart(self, found: Mapping[str, Array], again: Mapping[str, Array]) -> None:
        """Once for a net: a row's answer must not depend on what fills up its piece."""
        for name, value in found.items():
            if not _alike(value, again[name]):
                raise RequestError(
                    f"{self.name} takes {self.batch} rows at once, and its output {name!r} of a row depends on the "
                    "others: they cannot be filled up to that number",
                    hint=f"give a multiple of {self.batch} rows, or export the file with a dynamic first axis",
                )
        self._apart = True

    def _rows(self, feeds: Mapping[str, Array], rows: int, options: ort.RunOptions) -> dict[str, Array]:
        """The first `rows` rows of the outputs for a whole piece."""
        found = self._run(feeds, options)
        for name, value in found.items():
            if value.ndim == 0 or len(value) != self.batch:  # declared dynamic, or not at all
                raise EngineError(
                    f"{self.name} took {self.batch} rows and its output {name!r} has the shape {list(value.shape)}",
                    hint=f"give exactly {self.batch} rows",
                )
        return {name: value[:rows] for name, value in found.items()}

    def _run(self, feeds: Mapping[str, Array], options: ort.RunOptions) -> dict[str, Array]:
        session = self._session
        assert session is not None
        names = [port.name for port in self.outputs]
        try:
            return dict(zip(names, session.run(names, dict(feeds), options), strict=True))
        except Exception as error:
            self._check_open()  # closing is what ended it
            raise failed(error) from error


# The file


def _session(path: Path) -> ort.InferenceSession:
    if not path.is_file():
        raise SourceError(f"{path} is no file", hint="give the path of an ONNX file")
    try:
        return ort.InferenceSession(str(path), shared_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes share no other
        if any(mark in str(error) for mark in UNABLE):
            raise UnsupportedModel(
                f"onnxruntime {ort.__version__} cannot run {path}: {error}",
                hint="export it with the operators and the opset that this version has",
            ) from error
        raise SourceError(
            f"onnxruntime cannot load {path}: {error}",
            hint="give an ONNX file that `onnx.checker` accepts, with its external data beside it",
        ) from error


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} is {value!r}; allowed are whole numbers from 1 on")


def _port(path: Path | str, does: Literal["takes", "gives"], arg: Any) -> Port:
    if arg.type not in DTYPES:
        raise UnsupportedModel(
            f"{path} {does} {arg.name!r} as {arg.type}; allowed are {', '.join(DTYPES)}",
            hint="export it with such inputs and outputs (of a scikit-learn model: with zipmap off)",
        )
    # a length below 1 is what some exporters write for a dynamic axis
    axes = tuple(axis if isinstance(axis, str) or (axis or 0) > 0 else None for axis in arg.shape)
    return Port(arg.name, np.dtype(DTYPES[arg.type]), axes or None)


def _fixed_batch(inputs: Sequence[Port], outputs: Sequence[Port]) -> int | None:
    """The length of every input's first axis where that is one fixed number, and no output has another."""
    lengths = {port.rows for port in inputs}
    if len(lengths) != 1 or None in lengths:
        return None
    (length,) = lengths
    return length if all(port.axes is None or port.rows in (length, None) for port in outputs) else None


def _logits_output(net: str, outputs: Sequence[Port], wanted: str | None) -> str:
    """The name of the output that is given as `logits`."""
    ports = {port.name: port for port in outputs}
    if wanted is None:
        grids = [port.name for port in outputs if port.dtype.kind == "f" and (port.axes is None or len(port.axes) > 1)]
        if LOGITS not in ports and len(grids) != 1:
            raise UsageError(
                f"{net} has no output called {LOGITS!r}, and {len(grids)} that may be it; its outputs are "
                f"{_listed(outputs)}",
                hint=f"name one: OnnxNet(path, logits={(grids or list(ports))[0]!r})",
            )
        wanted = LOGITS if LOGITS in ports else grids[0]
    elif wanted not in ports or (wanted != LOGITS and LOGITS in ports):
        why = "has no such output" if wanted not in ports else f"has another output called {LOGITS!r}"
        raise UsageError(f"logits is {wanted!r}, and {net} {why}; its outputs are {_listed(outputs)}")
    if ports[wanted].dtype.kind != "f":
        raise UsageError(
            f"the output {wanted!r} of {net} is {_kind(ports[wanted].dtype)}; logits are floating-point numbers. Its "
            f"outputs are {_listed(outputs)}",
            hint="name another one: OnnxNet(path, logits=NAME)",
        )
    return wanted


def _listed(ports: Sequence[Port]) -> str:
    return "; ".join(map(str, ports)) or "none"


# A call's inputs


def _checked(net: str, ports: Sequence[Port], batch: int | None, inputs: Tensors) -> dict[str, Array]:
    """The inputs as the file takes them, but for the number of rows where that is free. RequestError for others."""
    takes = f"{net} takes {_listed(ports)}"
    if not isinstance(inputs, Mapping):
        raise RequestError(f"the inputs are a {type(inputs).__name__}", hint=f"give arrays by name: {takes}")
    names = {port.name for port in ports}
    for given in inputs:
        if given not in names:
            raise RequestError(f"there is no input {given!r}: {takes}", param=str(given), hint="leave it out")
    lengths: dict[str | None, tuple[int, str]] = {}  # of each dynamic axis (None: the rows), and who had it first
    feeds = {}
    for port in ports:
        if port.name not in inputs:
            raise RequestError(f"the input {port.name!r} is missing: {takes}", param=port.name, hint="give it too")
        feeds[port.name] = value = _converted(port, _array(port, inputs[port.name]))
        _check_shape(port, value, lengths, free_rows=batch is not None)
    return feeds


def _array(port: Port, value: object) -> Array:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors that need a gradient
        raise RequestError(
            f"the input {port.name!r} is a {type(value).__name__} that is no array: {error}",
            param=port.name,
            hint=f"give a numpy array: {port}",
        ) from error


def _check_shape(port: Port, value: Array, lengths: dict[str | None, tuple[int, str]], *, free_rows: bool) -> None:
    """Against the file, against axes of the same name seen before, and against emptiness."""
    if value.ndim and len(value) == 0:
        raise _wrong(port, f"has no rows: its shape is {list(value.shape)}", "give at least one row")
    if port.axes is None:
        return
    if value.ndim != len(port.axes):
        raise _wrong(port, f"has the shape {list(value.shape)}", f"give an array of {len(port.axes)} axes")
    for place, (axis, length) in enumerate(zip(port.axes, value.shape, strict=True)):
        rows = free_rows and place == 0
        if isinstance(axis, int) and not rows:
            if axis != length:
                raise _wrong(port, f"has the shape {list(value.shape)}", f"give {axis} along axis {place}")
        elif rows or axis is not None:
            first, other = lengths.setdefault(None if rows else str(axis), (length, port.name))
            if first != length:
                seen = f"has the shape {list(value.shape)}, where {other!r} has {first} along what is axis {place} here"
                raise _wrong(port, seen, "give both the same length there")


def _converted(port: Port, value: Array) -> Array:
    """As the port's dtype; RequestError where more than digits would be lost."""
    if value.dtype == port.dtype and port.dtype.kind != "O":
        return value
    if not _fits(value, port.dtype):
        seen = f"is {value.dtype}{_range(value)}"
        raise _wrong(port, seen, f"give {_kind(port.dtype)}, or numbers that can become it without a loss")
    with np.errstate(under="ignore"):
        return value.astype(port.dtype)


def _fits(value: Array, dtype: np.dtype[Any]) -> bool:
    """Whether the values can become that dtype with a loss of digits at most."""
    pair = value.dtype.kind + dtype.kind
    if dtype.kind == "O":
        return value.dtype.kind == "U" or (pair == "OO" and all(isinstance(one, str) for one in value.flat))
    if pair == "ff":
        finite = np.isfinite(value)
        return bool((np.abs(value, where=finite, out=np.zeros_like(value)) <= np.finfo(dtype).max).all())
    if value.dtype.kind not in "biu" or dtype.kind not in "biuf":
        return False
    least, most = _whole_numbers(dtype)
    return value.size == 0 or (least <= int(value.min()) and int(value.max()) <= most)


def _whole_numbers(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The least and the greatest of those that a dtype has without gaps."""
    if dtype.kind == "b":
        return 0, 1
    if dtype.kind == "f":
        most = 2 ** (np.finfo(dtype).nmant + 1)
        return -most, most
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _wrong(port: Port, seen: str, hint: str) -> RequestError:
    return RequestError(f"the input {port.name!r} {seen}; allowed is {port}", param=port.name, hint=hint)


def _kind(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind == "O" else str(dtype)


def _range(value: Array) -> str:
    return f" with values {value.min()}..{value.max()}" if value.size and value.dtype.kind in "biuf" else ""


# Pieces


def _count(feeds: Mapping[str, Array]) -> int:
    return len(next(iter(feeds.values())))


def _filled(part: Mapping[str, Array], rows: int, row: Callable[[Array], Array]) -> dict[str, Array]:
    """With more rows after the last, up to that number, each of which is `row` of the input."""
    missing = rows - _count(part)
    return {name: np.concatenate([value, np.repeat(row(value), missing, axis=0)]) for name, value in part.items()}


def _last(value: Array) -> Array:
    """The last row [1, ...], which no network finds strange."""
    return value[-1:]


def _other(value: Array) -> Array:
    """A row [1, ...] of zeros or of empty strings; of ones or of a word where the last row is that already."""
    nothing, something = ("", "a") if value.dtype.kind == "O" else (0, 1)
    return np.full_like(value[-1:], nothing if value[-1:].any() else something)


def _alike(left: Array, right: Array) -> bool:
    if left.shape != right.shape:
        return False
    if left.dtype.kind != "f":
        return bool(np.array_equal(left, right))
    return bool(np.allclose(left, right, rtol=ALIKE, atol=ALIKE**2, equal_nan=True))
