"""A TensorFlow SavedModel: as a source, and on its way to LiteRT by TensorFlow's own converter.

It is its signature `serving_default` (or the only one there is) that counts: inputs and outputs by name, the first axis
the rows. Works in the environment `tensorflow`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgewise.errors import EdgewiseError, SourceError, UnsupportedModel, UsageError
from edgewise.export.sources import data
from edgewise.export.sources.pieces import answers, of_one_row, task_of
from edgewise.export.work.job import (
    Array,
    Begun,
    Check,
    Converted,
    Job,
    Layers,
    Source,
    Tensor,
    read_array,
    read_arrays,
    write_arrays,
)

SIGNATURE: Final = "serving_default"
COMPARED: Final = 8  # rows, of the float32 file with the source
TOLERATED: Final = 1e-3  # relative L2 there
INLINED: Final = re.compile(r"^(?:(?:Stateful)?PartitionedCall/)+")
PLUMBING: Final = {"Identity", "Const", "Placeholder", "NoOp", "ReadVariableOp", "Shape", "StridedSlice", "Pack"}


# The steps


def begin(job: Job) -> Begun:
    """See job.py. SourceError for a directory that cannot be loaded, UnsupportedModel for a signature of other things
    than arrays with rows."""
    net = Net(job.source, job.threads)
    inputs = net.inputs(_shown(job))
    preprocessing = dict(job.options.get("preprocessing", {}))
    rows = _rows(job, inputs, preprocessing)
    work = Path(job.work)
    rows.write(work)
    reference = answers(net.run, rows.arrays, net.fixed, net.outputs)
    write_arrays(work / "reference", {str(n): value for n, value in enumerate(reference)})
    return Begun(
        inputs=inputs,
        outputs=tuple(
            Tensor(name, (1, *value.shape[1:]), str(value.dtype))
            for name, value in zip(net.outputs, reference, strict=True)
        ),
        rows=len(rows),
        calibration_rows=rows.calibration_rows,
        labelled=rows.labels is not None,
        random=rows.random,
        shared=rows.shared,
        parameters=net.parameters,
        task=task_of(job.source.task, reference),
        preprocessing=preprocessing,
    )


def layers(job: Job) -> Layers:
    """Every floating tensor of the frozen graph that follows from the inputs, for the rows `job.only`."""
    net = Net(job.source, job.threads)
    names, run = net.between()
    arrays = read_arrays(job.rows, job.inputs)
    found: list[list[Array]] = [[] for _ in names]
    for row in job.only:
        piece = {name: np.repeat(value[row : row + 1], net.fixed or 1, 0) for name, value in arrays.items()}
        for parts, value in zip(found, run(piece), strict=True):
            parts.append(of_one_row(value, net.fixed or 1))
    write_arrays(
        Path(job.work) / "layers",
        {str(n): np.concatenate(parts).astype(np.float32) for n, parts in enumerate(found)},
    )
    return Layers(names)


def convert(job: Job) -> Converted:
    """`job.artifact`.tflite by tf.lite.TFLiteConverter, one row at a time unless the option `dynamic_batch` is set.

    fp16 is the converter's default optimisation with weights of half precision, int8 has inputs and outputs in float32.
    The float32 file is compared with the source first."""
    net = Net(job.source, job.threads)
    artifact = Path(f"{job.artifact}.tflite")
    artifact.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=artifact.parent, prefix=".tflite-") as scratch:
        fixed = net.saved_with(job.inputs, Path(scratch) / "model", free=bool(job.options.get("dynamic_batch", False)))
        plain = _converted(fixed, "fp32", job)
        check = _compared(job, plain)
        written = plain if job.precision == "fp32" else _converted(fixed, job.precision, job)
        part = Path(scratch) / "out.tflite"
        part.write_bytes(written)
        part.replace(artifact)
    return Converted(str(artifact), (str(artifact),), (check,), _narrowed(job))


def _narrowed(job: Job) -> tuple[str, ...]:
    if job.precision != "int8-dynamic":
        return ()
    return ("the converter leaves weights of fewer than 1024 numbers in float32",)


# The model


class Net:
    """A signature of a SavedModel. `fixed` is the number of rows that it takes at once, 0 if any."""

    def __init__(self, source: Source, threads: int) -> None:
        self._tensorflow = _tensorflow(threads)
        self._source = source
        self._model, self._call = _loaded(self._tensorflow, Path(source.ref))
        self._specs: dict[str, Any] = dict(self._call.structured_input_signature[1])
        self.outputs = tuple(self._call.structured_outputs)
        lengths = {_axes(name, spec)[0] for name, spec in self._specs.items()} - {None}
        if len(lengths) > 1:
            raise UnsupportedModel(
                "the inputs' first axes have other fixed lengths", hint="the first axis of every input must be its rows"
            )
        self.fixed = next(iter(lengths), None) or 0

    @property
    def parameters(self) -> int:
        floats = [one for one in self._call.graph.variables if one.dtype.is_floating]
        return sum(int(np.prod(one.shape)) for one in floats)

    def inputs(self, shown: Mapping[str, tuple[int, ...]]) -> tuple[Tensor, ...]:
        """Free axes are taken from the source's shapes, or else from those of the user's arrays."""
        strange = set(self._source.shapes) - set(self._specs)
        if strange:
            raise UsageError(
                f"the signature has no input {', '.join(sorted(strange))}", hint=f"it takes {', '.join(self._specs)}"
            )
        return tuple(
            _input(name, spec, self._source.shapes.get(name), shown.get(name)) for name, spec in self._specs.items()
        )

    def run(self, piece: Mapping[str, Array]) -> list[Array]:
        """In the order of `outputs`."""
        tf = self._tensorflow
        try:
            found = self._call(**{name: tf.constant(value) for name, value in piece.items()})
        except Exception as e:  # TensorFlow's own, of many kinds
            shapes = {name: list(value.shape) for name, value in piece.items()}
            raise UsageError(
                f"the source fails on inputs {shapes}: {_plain(e)}",
                hint="check the shapes and values of its inputs: --shape NAME=1,224,224,3, --inputs FILE.npz",
            ) from e
        return [np.asarray(found[name].numpy()) for name in self.outputs]

    def saved_with(self, inputs: Sequence[Tensor], place: Path, *, free: bool) -> Path:
        """The model again, every axis of known length but, if `free`, the first."""
        tf, call = self._tensorflow, self._call
        rows = None if free else 1
        specs = {one.name: tf.TensorSpec((rows, *one.shape[1:]), one.dtype, name=one.name) for one in inputs}
        module = tf.Module()
        module.model = self._model
        try:
            with _quiet():
                called = tf.function(lambda **given: call(**given)).get_concrete_function(**specs)
                tf.saved_model.save(module, str(place), signatures={SIGNATURE: called})
        except Exception as e:
            raise UnsupportedModel(
                f"{self._source.name} does not take {'any number of rows' if free else 'one row'} at once: {_plain(e)}",
                hint="save it with a signature whose first axis is free (None)",
            ) from e
        return place

    def between(self) -> tuple[tuple[str, ...], Any]:
        """Names of the tensors between, and what computes them from a row."""
        place = importlib.import_module("tensorflow.python.framework.convert_to_constants")
        frozen = place.convert_variables_to_constants_v2(self._call)
        places = {tensor.op.name: tensor for tensor in frozen.inputs}
        names = self._specs if set(places) == set(self._specs) else dict(zip(self._specs, places, strict=True))
        given = {name: places[name if name in places else names[name]] for name in self._specs}
        wanted = _reached(frozen.graph, {tensor.name for tensor in frozen.inputs})
        pruned = frozen.prune(list(given.values()), list(wanted.values()))
        tf = self._tensorflow

        def run(piece: Mapping[str, Array]) -> list[Array]:
            return [np.asarray(one.numpy()) for one in pruned(*(tf.constant(piece[name]) for name in given))]

        return tuple(wanted), run


def _tensorflow(threads: int) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before it is imported: it chatters from C++
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    try:
        with _quiet():
            tensorflow: Any = importlib.import_module("tensorflow")
    except ImportError as e:
        raise UnsupportedModel(
            "a SavedModel needs TensorFlow, which this environment has not",
            hint="edgewise doctor --install tensorflow",
        ) from e
    with contextlib.suppress(RuntimeError):  # it has begun to compute already, in a process that asks twice
        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(1)
    tensorflow.get_logger().setLevel("ERROR")
    return tensorflow


def _loaded(tensorflow: Any, path: Path) -> tuple[Any, Any]:
    if not (path / "saved_model.pb").is_file():
        raise SourceError(f"{path} has no saved_model.pb", hint="give the directory that tf.saved_model.save wrote")
    try:
        with _quiet():
            model = tensorflow.saved_model.load(str(path))
    except Exception as e:
        raise SourceError(f"{path.name} cannot be loaded by TensorFlow: {_plain(e)}", hint="save it again") from e
    found = dict(model.signatures)
    if SIGNATURE not in found and len(found) != 1:
        raise UnsupportedModel(
            f"{path.name} has the signatures {', '.join(found) or 'none'}",
            hint=f"save it with one of the name {SIGNATURE}: tf.saved_model.save(model, path, signatures=…), "
            "or Keras' model.export(path)",
        )
    return model, found.get(SIGNATURE) or next(iter(found.values()))


def _axes(name: str, spec: Any) -> list[int | None]:
    if getattr(spec, "shape", None) is None or spec.shape.rank in (None, 0):
        raise UnsupportedModel(
            f"the signature takes {name!r} as no array with rows", hint="save it with the shapes of its inputs"
        )
    return list(spec.shape.as_list())


def _input(name: str, spec: Any, wanted: Sequence[int] | None, shown: Sequence[int] | None) -> Tensor:
    axes, dtype = _axes(name, spec), np.dtype(spec.dtype.as_numpy_dtype)
    if dtype.kind not in "fiub":
        raise UnsupportedModel(
            f"the signature takes {name!r} as {spec.dtype.name}", hint="save it with a signature of arrays of numbers"
        )
    fits = wanted is None or (
        len(wanted) == len(axes) and all(own in (None, axis) for own, axis in zip(axes[1:], wanted[1:], strict=True))
    )
    if not fits:
        own_axes = ",".join("?" if axis is None else str(axis) for axis in axes)
        raise UsageError(
            f"the shape {list(wanted or ())} is not one of the input {name!r}",
            hint=f"the signature says {own_axes}, ? for any number",
        )
    said = wanted or (shown if shown is not None and len(shown) == len(axes) else None) or axes
    shape = tuple(own if own is not None else other for own, other in zip(axes[1:], said[1:], strict=True))
    return Tensor(name, (1, *shape), dtype.name)


def _shown(job: Job) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in the user's .npz."""
    path = Path(job.data)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return {}
    return {name: value.shape for name, value in data.npz(path).items() if name != data.LABELS}


def _rows(job: Job, inputs: Sequence[Tensor], preprocessing: Mapping[str, Any]) -> data.Rows:
    """Photos are read with their channels first, and TensorFlow's networks have them last."""
    axes = inputs[0].shape
    if not Path(job.data).is_dir() or not job.data or len(inputs) != 1 or len(axes) != 4 or axes[3] != 3:
        return data.rows(job, inputs, preprocessing)
    first = Tensor(inputs[0].name, (axes[0], axes[3], axes[1], axes[2]), inputs[0].dtype)
    found = data.rows(job, [first] if None not in axes[1:] else inputs, preprocessing)
    return replace(found, arrays=_channels_last(found.arrays), calibration=_channels_last(found.calibration))


def _channels_last(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: np.ascontiguousarray(value.transpose(0, 2, 3, 1)) for name, value in arrays.items()}


def _reached(graph: Any, given: set[str]) -> dict[str, Any]:
    """Floating tensors that follow from the inputs, in the order of computing, by the name of what makes them."""
    found, reached = {}, set(given)
    for operation in graph.get_operations():
        if not reached & {one.name for one in operation.inputs}:
            continue
        reached.update(one.name for one in operation.outputs)
        outputs = [one for one in operation.outputs if one.dtype.is_floating]
        if operation.type not in PLUMBING and len(outputs) == 1:
            found[INLINED.sub("", operation.name)] = outputs[0]
    return found


# Conversion


def _converted(saved: Path, precision: str, job: Job) -> bytes:
    tf = _tensorflow(job.threads)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved), signature_keys=[SIGNATURE])
    if precision != "fp32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "fp16":
        converter.target_spec.supported_types = [tf.float16]
    elif precision == "int8":
        converter.representative_dataset = lambda: _calibration(job)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
    elif precision not in ("fp32", "int8-dynamic"):
        raise UsageError(f"TensorFlow's converter has no {precision}", hint="it has fp32, fp16, int8 and int8-dynamic")
    try:
        with _quiet():
            found: bytes = converter.convert()
    except EdgewiseError:
        raise
    except Exception as e:  # its ConverterError, and those of MLIR
        raise _unable(e) from e
    return found


def _unable(error: Exception) -> UnsupportedModel:
    """Its messages name the operators that need TensorFlow itself, far down in a long text."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    named = re.search(r"(?:Flex|Custom) ops: ([^\n]+)", text)
    place = re.search(r'"?tf\.(\w+)"?[^\n]*(?:failed to legalize|is neither a custom op nor a flex op)', text)
    operators = named.group(1).strip() if named else place.group(1) if place else ""
    what = f"it has no operator for {operators}" if operators else _plain(text)
    return UnsupportedModel(
        f"LiteRT cannot take this model: {what}",
        hint="put other operators in its place, or cut the network before them and compute those in the program",
    )


def _calibration(job: Job) -> Iterator[Any]:
    """Rows, one at a time, as the converter asks for them."""
    arrays = {one.name: read_array(job.calibration, one.name) for one in job.inputs}
    for row in range(len(next(iter(arrays.values())))):
        yield SIGNATURE, {name: np.array(value[row : row + 1]) for name, value in arrays.items()}


def _compared(job: Job, plain: bytes) -> Check:
    tf = _tensorflow(job.threads)
    rows = read_arrays(job.rows, job.inputs)
    with _quiet():
        call = tf.lite.Interpreter(model_content=plain, num_threads=job.threads).get_signature_runner(SIGNATURE)
    count = min(COMPARED, len(next(iter(rows.values()))))
    worst, largest = 0.0, 0.0
    for row in range(count):
        found = call(**{name: np.array(value[row : row + 1]) for name, value in rows.items()})
        for n, one in enumerate(job.outputs):
            expected = np.array(read_array(job.reference, str(n))[row : row + 1], np.float64)
            apart = np.asarray(found[one.name], np.float64) - expected
            worst = max(worst, float(np.linalg.norm(apart) / max(float(np.linalg.norm(expected)), 1e-12)))
            largest = max(largest, float(np.abs(apart).max(initial=0)))
    detail = f"float32 against the source, {count} rows: relative L2 {worst:.2g}, largest difference {largest:.2g}"
    return Check("conversion", bool(worst <= TOLERATED), detail)


# Its chatter


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TensorFlow's converter prints to the file descriptor of stdout from C++ and Python: it goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _plain(error: object, limit: int = 400) -> str:
    """A message of others on one line, without colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:limit]
