"""LayerSplitInference: the first layers here, the rest there, coded features between, for people with layers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.devices.links import LinkProfile
from edgewise.errors import BadFrame, UsageError
from edgewise.split.seam import Crossing, Split, Tensors
from edgewise.wire.feature import Container, check_codec, encode, read

if TYPE_CHECKING:
    from edgewise.models.bundle import Bundle

Array = npt.NDArray[Any]

SHAPES: Final[Mapping[str, type]] = {"tuple": tuple, "list": list}  # labels; "one" and "map" are the others


class Features(bytes):
    """What crosses from the edge to the cloud: bytes as docs/formats/features.md has them, to send or to store."""

    @property
    def raw_bytes(self) -> int:
        """What the tensors in it take in memory."""
        return sum(one.raw_bytes for one in read(self).coded)

    @property
    def label(self) -> str:
        """What they are of: "one", "tuple", "list" or "map" for layers, a model and a cut of it for a file."""
        return read(self).label

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors, by name."""
        return {one.name: one.shape for one in read(self).coded}


class LayerSplitInference:
    """The edge runs `edge_layers`, its features are coded, the cloud runs `cloud_layers` on what was decoded.

    Layers are called one after the other, each with what the one before it gave: torch modules, functions of arrays,
    anything that can be called. Between the halves may stand a tensor, or a tuple, list or mapping of tensors. Torch
    tensors become torch tensors again, on the device and with the floating dtype of the cloud layers' parameters (of
    the edge's features, if those have none); no gradient goes through. `codec` is one of wire/feature.py's: "exact",
    "fp16" or "int8" down to "int2", about so many bits a number and fewer where numbers are alike.

    `boundary_bytes` and `raw_bytes` are what the last features took, coded and in memory; None before the first."""

    boundary_bytes: int | None = None
    raw_bytes: int | None = None

    def __init__(self, edge_layers: Any, cloud_layers: Any, *, codec: str = "fp16") -> None:
        check_codec(codec)
        self.codec = codec
        self._split: Split = _Layers(_listed("edge", edge_layers), _listed("cloud", cloud_layers))

    @classmethod
    def of_onnx(
        cls,
        path: Path | str,
        *,
        cut: str | Sequence[str] | int | None = None,
        link: LinkProfile | str | None = None,
        profile: Path | str | None = None,
        codec: str = "fp16",
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> LayerSplitInference:
        """Of an ONNX file, cut at a tensor (or at several), after the first so many units of models/graph.py, or where
        an answer over that link comes soonest by a profile of `edgewise split profile`, which names the codec too.

        Both `edge_forward` and `full_inference` take an array, or arrays by the names of the file's inputs, and the
        answer is the file's output, or its outputs by name. Errors are those of Graph.open."""
        from edgewise.split.halves import OnnxSplit  # loads onnx and its runtime, which layers in hand do not need

        made = cls((), (), codec=codec)
        if (cut is None) == (link is None):
            raise UsageError("give either where to cut, or the link to plan for", hint="cut=TENSOR, or link=NAME")
        if link is None:
            assert cut is not None
            made._split = OnnxSplit.at(path, cut, shapes)
        elif profile is None:
            raise UsageError(
                "a plan for a link needs what the model takes",
                hint="make it with `edgewise split profile`, and give profile=FILE",
            )
        else:
            made._split, made.codec = OnnxSplit.planned(path, link, profile, shapes)
        return made

    @classmethod
    def of_bundle(cls, bundle: Bundle | Path | str, *, cut: int, codec: str = "fp16") -> LayerSplitInference:
        """Of a language model: the embedding and the layers below `cut` are the edge's, the others and the head the
        cloud's. `edge_forward` and `full_inference` take token ids [n] or [1, n], and the answer is the logits of each
        position, float32 [n, vocab]. `bundle` is one, its directory, or its name here. `codec` is one of
        wire/codec.py's. UsageError where it cannot be cut, UnknownModel or BundleError for what is no bundle."""
        from edgewise.models.bundle import Bundle
        from edgewise.models.store import find
        from edgewise.settings import load
        from edgewise.split.layers import BundleSplit

        found = bundle if isinstance(bundle, Bundle) else find(str(bundle), load().settings.home, check=False)
        made = cls((), ())
        made._split, made.codec = BundleSplit(found, cut, codec), codec
        return made

    def edge_forward(self, x: Any) -> Features:
        """What the edge layers make of `x`, coded. CodecOverflow for numbers that the codec cannot hold: above 65,504
        with "fp16", infinite or not a number with all but "exact". UsageError for features that are no tensors."""
        return self._front(x)[0]

    def cloud_forward(self, x: bytes | Any) -> Any:
        """What the cloud layers make of features; of anything but bytes as it is. BadFrame for bytes that are no
        features."""
        coded = isinstance(x, bytes | bytearray | memoryview)
        return self._split.back(self._split.opened(read(x)) if coded else x)

    def full_inference(self, input_data: Any) -> Any:
        """The answer, as if both halves were in place and the features had gone over the wire."""
        features, early = self._front(input_data)
        return self._split.joined(early, self.cloud_forward(features))

    def close(self) -> None:
        """Free what `of_onnx` and `of_bundle` loaded; layers in hand are their owner's. Idempotent."""
        self._split.close()

    def _front(self, x: Any) -> tuple[Features, Tensors]:
        crossing = self._split.front(x)
        features = Features(encode(crossing.tensors, self.codec, label=crossing.label))
        self.boundary_bytes, self.raw_bytes = len(features), crossing.raw_bytes
        return features, crossing.early


# Layers in hand


class _Layers:
    """A Split of callables."""

    def __init__(self, edge: Sequence[Callable[[Any], Any]], cloud: Sequence[Callable[[Any], Any]]) -> None:
        self._edge, self._cloud = edge, cloud
        self._like: Any = None  # a tensor of the library that the features came from

    def front(self, x: Any) -> Crossing:
        for layer in self._edge:
            x = layer(x)
        tensors, label = _parts(x)
        self._like = next((tensor for tensor in tensors.values() if hasattr(tensor, "detach")), None)
        arrays = {name: as_array(tensor) for name, tensor in tensors.items()}
        return Crossing(arrays, label, sum(array.nbytes for array in arrays.values()))

    def opened(self, received: Container) -> Any:
        known = (found for layer in self._cloud if (found := _parameter(layer)) is not None)
        like = next(known, self._like)
        tensors = {name: array if like is None else _alike(array, like) for name, array in received.tensors.items()}
        return _whole(tensors, received.label)

    def back(self, x: Any) -> Any:
        for layer in self._cloud:
            x = layer(x)
        return x

    def joined(self, early: Tensors, late: Any) -> Any:
        return late

    def close(self) -> None:
        pass


def _listed(side: str, layers: Any) -> list[Callable[[Any], Any]]:
    """A module of modules is its parts: some can be called as a whole and some cannot."""
    found = list(layers) if isinstance(layers, Iterable) else [layers]
    for place, layer in enumerate(found):
        if not callable(layer):
            raise UsageError(
                f"{side} layer {place} is a {type(layer).__name__}", hint="give a list of what can be called: layer(x)"
            )
    return found


def _parts(x: Any) -> tuple[dict[str, Any], str]:
    """The tensors of a layer's output by name, and its label."""
    if isinstance(x, Mapping):
        return {str(name): value for name, value in x.items()}, "map"
    if isinstance(x, tuple | list):
        return {str(place): value for place, value in enumerate(x)}, "tuple" if isinstance(x, tuple) else "list"
    return {"": x}, "one"


def _whole(tensors: dict[str, Any], label: str) -> Any:
    if label == "map":
        return tensors
    if label in SHAPES:
        return SHAPES[label](tensors.values())
    if label != "one" or len(tensors) != 1:
        raise BadFrame(
            f"the features are labelled {label[:100]!r} and hold {len(tensors)} tensors; they are of no layer"
        )
    return next(iter(tensors.values()))


def as_array(tensor: Any) -> Array:
    """A tensor of any library as numpy has it, by what it can do: off its graph and device. UsageError for others."""
    found = tensor.detach().cpu() if hasattr(tensor, "detach") else tensor
    try:
        array = np.asarray(found)
    except TypeError:  # a dtype that numpy lacks: bfloat16, which float32 holds
        array = np.asarray(found.float())
    except ValueError:  # a ragged list
        array = np.asarray(None)
    if array.dtype.kind not in "fiub":
        raise UsageError(
            f"the features hold a {type(tensor).__name__}",
            hint="a boundary carries tensors of numbers: one, or a tuple, list or mapping of them",
        )
    return array


def _parameter(layer: Any) -> Any:
    """The first parameter of a module; None of anything else."""
    parameters = getattr(layer, "parameters", None)
    return next(iter(parameters()), None) if callable(parameters) else None


def _alike(array: Array, like: Any) -> Any:
    """A tensor of the library that `like` is of, which its owner has imported: never by us."""
    library = sys.modules[type(like).__module__.partition(".")[0]]
    tensor = library.as_tensor(array).to(like.device)
    both_float = tensor.is_floating_point() and like.is_floating_point()
    return tensor.to(like.dtype) if both_float else tensor
