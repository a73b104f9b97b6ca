"""How far one network of ONNX is from another on the same inputs: classifiers, by their logits."""

from __future__ import annotations

import asyncio
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.engines.onnx_net import OnnxNet
from edgewise.errors import EngineError, SourceError, UsageError
from edgewise.evaluate.divergence import kl
from edgewise.evaluate.interval import Interval, bootstrap
from edgewise.types import FloatArray

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
Show = Callable[[str, int, int], None]

BATCH: Final = 32  # rows
P99: Final = 0.99
P99_RESAMPLES: Final = 400


@dataclass(frozen=True, slots=True)
class NetJudgement:
    """Over `rows` rows of inputs. KL(teacher || student) is of the softmax of their logits, in nats; accuracies are
    None without labels. `intervals` are of 95 %, over the rows."""

    rows: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    accuracy: float | None
    accuracy_source: float | None
    intervals: dict[str, Interval]

    def facts(self) -> dict[str, Any]:
        """As --json prints it."""
        return {
            "rows": self.rows,
            "kl_mean": self.kl_mean,
            "kl_p99": self.kl_p99,
            "top1_agreement": self.top1_agreement,
            "accuracy": self.accuracy,
            "accuracy_source": self.accuracy_source,
            "intervals": {name: [one.low, one.high] for name, one in self.intervals.items()},
        }


def judged_nets(
    student: Path,
    teacher: Path,
    inputs: Mapping[str, Array],
    labels: Array | None = None,
    *,
    show: Show = lambda what, done, total: None,
) -> NetJudgement:
    """`inputs` by the networks' own names, [rows, ...] each; `labels` [rows] are the right classes, counted from 0.
    UsageError for rows that do not fit each other or networks with other classes, RequestError for inputs that a
    network does not take, EngineError where logits are NaN."""
    rows = _rows(inputs, labels)
    mine, its = (asyncio.run(_logits(path, inputs, rows, show)) for path in (student, teacher))
    if mine.shape != its.shape or mine.ndim != 2:
        raise UsageError(
            f"{student.name} gives logits of the shape {list(mine.shape)} and {teacher.name} {list(its.shape)}",
            hint="both must be [rows, classes], of the same classes",
        )
    for path, logits in ((student, mine), (teacher, its)):
        if np.isnan(logits).any():
            raise EngineError(f"{path.name} gives logits that are NaN", hint="its weights are damaged")
    return _judgement(mine, its, labels)


def read_inputs(path: Path) -> dict[str, Array]:
    """The arrays of an .npz by name, without code in it; SourceError if it is none."""
    hint = "numpy.savez writes one, an array for each of the network's inputs"
    try:
        with path.open("rb") as file:  # which numpy would leave open where it is damaged
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                raise SourceError(f"{path} holds one array, which has no name", hint=hint)
            return dict(found)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise SourceError(f"{path} is no file of arrays: {e}", hint=hint) from e


def size(path: Path) -> int:
    """Bytes of the network: the file and what of its weights lies beside it."""
    from onnx import load_model
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    weights = load_model(str(path), load_external_data=False).graph.initializer
    beside = {ExternalDataInfo(one).location for one in weights if uses_external_data(one)}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside)


def _rows(inputs: Mapping[str, Array], labels: Array | None) -> int:
    lengths = {name: len(value) if value.ndim else 0 for name, value in inputs.items()}
    count = next(iter(lengths.values()), 0)
    if not count or any(length != count for length in lengths.values()):
        raise UsageError(f"inputs have these numbers of rows: {lengths}", hint="give one or more of each, as many")
    if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iu"):
        raise UsageError(
            f"labels are {labels.dtype} of the shape {list(labels.shape)}", hint=f"give {count} whole numbers"
        )
    return count


async def _logits(path: Path, inputs: Mapping[str, Array], rows: int, show: Show) -> FloatArray:
    net = OnnxNet(path)
    try:
        found = []
        for at in range(0, rows, BATCH):
            show(path.name, at, rows)
            part = {name: value[at : at + BATCH] for name, value in inputs.items()}
            found.append((await net.predict(part))["logits"])
        show(path.name, rows, rows)
    finally:
        await net.close()
    return np.concatenate(found).astype(np.float32)


def _judgement(mine: FloatArray, its: FloatArray, labels: Array | None) -> NetJudgement:
    distances, said, wanted = kl(its, mine), mine.argmax(axis=1), its.argmax(axis=1)
    intervals = {
        "kl_mean": bootstrap(distances),
        "kl_p99": bootstrap(distances, _p99, resamples=P99_RESAMPLES),
        "top1_agreement": bootstrap(said == wanted),
    }
    if labels is not None:
        intervals["accuracy"], intervals["accuracy_source"] = bootstrap(said == labels), bootstrap(wanted == labels)
    values = {name: one.value for name, one in intervals.items()}
    return NetJudgement(
        rows=len(mine),
        kl_mean=values["kl_mean"],
        kl_p99=values["kl_p99"],
        top1_agreement=values["top1_agreement"],
        accuracy=values.get("accuracy"),
        accuracy_source=values.get("accuracy_source"),
        intervals=intervals,
    )


def _p99(distances: Doubles) -> float:
    return float(np.quantile(distances, P99, method="higher"))
