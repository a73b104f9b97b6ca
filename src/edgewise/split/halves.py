"""The two halves of an ONNX file at a cut, and the side that answers with the second half."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from edgewise.devices.links import LinkProfile, link_named
from edgewise.engines.onnx_part import OnnxPart
from edgewise.errors import BadFrame, EngineClosed, RequestError, UnsupportedModel, UsageError
from edgewise.models.graph import Graph
from edgewise.split.profile import Profile
from edgewise.split.seam import Crossing
from edgewise.wire.feature import LIMIT_BYTES, Container, encode, read

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
Side = Literal["front", "back"]

MOST_CUTS: Final = 4  # whose second halves a side holds ready
DIGEST: Final = 16  # characters that a label has of a model's


class Halves:
    """A cut of `graph` with the units of `edge` in front. Each half is loaded when it is first run.
    Runs may overlap from several threads."""

    def __init__(self, graph: Graph, edge: Set[int]) -> None:
        self.graph, self.edge = graph, frozenset(edge)
        self.label = label_of(graph, self.edge)
        self._cut = graph.halves(self.edge)
        self.crossing, self.late = self._cut.crossing, self._cut.late
        self._parts: dict[str, OnnxPart] = {}
        self._loading = threading.Lock()

    def _part(self, side: Side) -> OnnxPart | None:
        """None for a half without units."""
        model = self._cut.front if side == "front" else self._cut.back
        with self._loading:
            if model is not None and side not in self._parts:
                self._parts[side] = OnnxPart(model)
            return self._parts.get(side)

    def front(self, inputs: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
        """What crosses, and the outputs that the front makes. RequestError for inputs that the file does not take,
        EngineError if onnxruntime fails."""
        given = checked(self.graph, inputs)
        part = self._part("front")
        made = given if part is None else given | part.run(given)
        return {name: made[name] for name in self.crossing}, {name: made[name] for name in self._cut.early}

    def back(self, crossing: Tensors) -> dict[str, Array]:
        """The outputs that the front does not make. BadFrame if what arrived is not what crosses here."""
        for name in self.crossing:
            self._check(name, crossing.get(name))
        part = self._part("back")
        return {} if part is None else part.run(crossing)

    def _check(self, name: str, value: Array | None) -> None:
        if value is None:
            raise BadFrame(f"the features lack {name!r} of the cut {self.label}")
        wanted = self.graph.tensors[name]
        if value.dtype != wanted.dtype or (wanted.shape is not None and value.ndim != len(wanted.shape)):
            came, expected = f"{value.dtype} {list(value.shape)}", f"{wanted.dtype} {list(wanted.shape or ())}"
            raise BadFrame(f"{name!r} came as {came}; at the cut {self.label} it is {expected}")

    def runs(self, inputs: Tensors) -> tuple[Callable[[], object] | None, Callable[[], object] | None]:
        """What runs each half, loaded, on these inputs, as often as it is called: to measure with. None for a half
        without units."""
        front, back = self._part("front"), self._part("back")
        crossing = dict(inputs) if front is None else {**inputs, **front.run(inputs)}
        return (
            None if front is None else partial(front.run, inputs),
            None if back is None else partial(back.run, crossing),
        )

    def close(self) -> None:
        """Free both halves. Idempotent."""
        for part in self._parts.values():
            part.close()


def label_of(graph: Graph, edge: Set[int]) -> str:
    """Which model, and which of its units are on the edge."""
    return f"{graph.digest[:DIGEST]}@{sum(1 << number for number in edge):x}"


def read_answer(payload: bytes) -> tuple[Tensors, str, float]:
    """The outputs of a BackHalf, the label of the features that they are of, and the seconds that they took there.
    BadFrame for anything else."""
    container = read(payload)
    label, _, computed_us = container.label.partition(" ")
    if not re.fullmatch("[0-9]{1,12}", computed_us):
        raise BadFrame(f"{container.label[:100]!r} labels no answer")
    return container.tensors, label, int(computed_us) / 1e6


def checked(graph: Graph, inputs: Tensors) -> dict[str, Array]:
    """The inputs as the file takes them; floats of another width and whole numbers that fit are converted."""
    takes = ", ".join(
        f"{name} {graph.tensors[name].dtype} {list(graph.tensors[name].shape or ())}" for name in graph.inputs
    )
    for name in inputs:
        if name not in graph.inputs:
            raise RequestError(f"there is no input {name!r}: {graph.name} takes {takes}", param=name)
    found = {}
    for name in graph.inputs:
        if name not in inputs:
            raise RequestError(f"the input {name!r} is missing: {graph.name} takes {takes}", param=name)
        array, wanted = np.asarray(inputs[name]), graph.tensors[name]
        if wanted.dtype is not None and array.dtype != wanted.dtype:
            if not np.can_cast(array.dtype, wanted.dtype, "same_kind"):
                raise RequestError(f"the input {name!r} is {array.dtype}; {graph.name} takes {takes}", param=name)
            array = array.astype(wanted.dtype)
        found[name] = array
    return found


class OnnxSplit:
    """A Split (split/inference.py) over an ONNX file."""

    def __init__(self, halves: Halves) -> None:
        self._halves = halves

    @staticmethod
    def at(path: Path | str, cut: str | Sequence[str] | int, shapes: Mapping[str, Sequence[int]] | None) -> OnnxSplit:
        graph = Graph.open(path, shapes)
        if isinstance(cut, int):
            return OnnxSplit(Halves(graph, frozenset(range(cut))))
        return OnnxSplit(Halves(graph, graph.before([cut] if isinstance(cut, str) else cut)))

    @staticmethod
    def planned(
        path: Path | str, link: LinkProfile | str, profile: Path | str, shapes: Mapping[str, Sequence[int]] | None
    ) -> tuple[OnnxSplit, str]:
        """Cut where the profile's plan for that link says, and the codec to use. UsageError for another file's."""
        graph, taken = Graph.open(path, shapes), Profile.read(profile)
        taken.check(graph.digest)
        plan = taken.plans().at(link_named(link) if isinstance(link, str) else link)
        return OnnxSplit(Halves(graph, plan.units)), plan.codec or "exact"

    def front(self, x: Any) -> Crossing:
        inputs = x if isinstance(x, Mapping) else {self._halves.graph.inputs[0]: x}
        arrays = {
            name: np.asarray(one.detach().cpu() if hasattr(one, "detach") else one) for name, one in inputs.items()
        }
        crossing, early = self._halves.front(arrays)
        return Crossing(crossing, self._halves.label, sum(one.nbytes for one in crossing.values()), early)

    def opened(self, received: Container) -> Tensors:
        if received.label != self._halves.label:
            raise BadFrame(f"the features are of {received.label[:100]!r}, this cut is {self._halves.label!r}")
        return received.tensors

    def back(self, x: Any) -> Any:
        return self._alone(self._halves.back(x))

    def joined(self, early: Tensors, late: Any) -> Any:
        outputs = self._halves.graph.outputs
        if len(outputs) == 1 and not early:
            return late
        return self._alone({name: {**early, **late}[name] for name in outputs})

    def close(self) -> None:
        self._halves.close()

    def _alone(self, outputs: Mapping[str, Array]) -> Any:
        """A file of one output gives that."""
        return next(iter(outputs.values())) if len(outputs) == len(self._halves.graph.outputs) == 1 else outputs


class BackHalf:
    """The cloud's side of a file that is cut: features in, answers out, whichever cut the features are of. It holds the
    second halves of the cuts used last. `unpacked` makes the file's inputs of what is sent for the cloud alone, if that
    is not the inputs themselves; what it raises for bytes that it does not know should be a RequestError. May be called
    from several threads."""

    def __init__(
        self,
        graph: Graph,
        *,
        unpacked: Callable[[Tensors], Tensors] | None = None,
        codec: str = "exact",
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self.graph, self._unpacked, self._codec, self._limit_bytes = graph, unpacked, codec, limit_bytes
        self._ready: OrderedDict[str, Halves] | None = OrderedDict()
        self._lock = threading.Lock()

    def answer(self, payload: bytes) -> bytes:
        """The outputs that the front did not make, coded likewise; `read_answer` reads them. BadFrame for what are no
        features of a cut of this file, EngineError if onnxruntime fails, EngineClosed after `close`."""
        began_s = time.perf_counter()
        container = read(payload, limit_bytes=self._limit_bytes)
        halves = self._halves(container.label)
        received = container.tensors
        if not halves.edge and self._unpacked is not None:
            received = self._unpacked(received)
        outputs = halves.back(received)
        computed_us = round((time.perf_counter() - began_s) * 1e6)
        return encode(outputs, self._codec, label=f"{container.label} {computed_us}")

    def _halves(self, label: str) -> Halves:
        with self._lock:
            if self._ready is None:
                raise EngineClosed(f"{self.graph.name} was closed")
            if label not in self._ready:
                self._ready[label] = self._cut(label)
            self._ready.move_to_end(label)
            while len(self._ready) > MOST_CUTS:  # one that is running goes on to its end: closing drops the session
                self._ready.popitem(last=False)
            return self._ready[label]

    def _cut(self, label: str) -> Halves:
        digest, _, mask = label.partition("@")
        if digest != self.graph.digest[:DIGEST]:
            raise BadFrame(
                f"the features are of the model {digest[:DIGEST]!r}, {self.graph.name} is "
                f"{self.graph.digest[:DIGEST]!r}: give both sides the same file",
                code="model",
            )
        try:
            number = int(mask, 16)
        except ValueError:
            raise BadFrame(f"the features' label {label[:100]!r} names no cut") from None
        edge = frozenset(unit for unit in range(len(self.graph.units)) if number >> unit & 1)
        try:
            if label == label_of(self.graph, edge):
                return Halves(self.graph, edge)
        except (UsageError, UnsupportedModel):
            pass  # units that are no edge
        raise BadFrame(f"the features' label {label[:100]!r} names no cut of {self.graph.name}")

    def close(self) -> None:
        """Free all halves. Idempotent."""
        with self._lock:
            ready, self._ready = self._ready, None
        for halves in (ready or {}).values():
            halves.close()
