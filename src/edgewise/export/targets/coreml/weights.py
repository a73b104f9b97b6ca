"""Reads a Core ML package (.mlpackage) from the disk: the program's operators, and every weight, decompressed.

The files are read as their formats are documented, not by the code that wrote them: of coremltools only the schema of
the protobuf is used. `weight.bin` is a row of blobs, each behind 64 bytes of metadata (coremltools' MILBlob), and what
the `constexpr_` operators do with them stands in coremltools' reference of MIL."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgewise.errors import SourceError

Array = npt.NDArray[Any]

BITS: Final = {"uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "int4": 4, "uint6": 6}  # packed, lowest bits first
SENTINEL: Final = 0xDEADBEEF
METADATA: Final = struct.Struct("<IIQQQ")  # sentinel, type, bytes, offset, bits of padding
HEADER_BYTES: Final = 64
BLOB_VERSION: Final = 2
BLOB_TYPES: Final = {
    1: "float16",
    2: "float32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}
FEATURE_TYPES: Final = {65552: "float16", 65568: "float32", 65600: "float64", 131104: "int32", 131080: "int8"}
DAMAGED: Final = "the package is damaged: convert it anew, or copy it again"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value is: a free axis is None. `state` if it is one's content that is described."""

    dtype: str  # numpy's name, "string", or one of BITS
    shape: tuple[int | None, ...]
    state: bool = False


@dataclass(frozen=True, slots=True)
class Const:
    """A value that stands in the program or in `weight.bin`. Numbers of fewer than eight bits are unpacked."""

    name: str
    kind: Kind
    value: Any  # an array, a string, or a list of strings
    bytes: int = 0  # on the disk, if it is in weight.bin


@dataclass(frozen=True, slots=True)
class Op:
    """`inputs` are names of values; those written in place have names too, as constants of the function."""

    type: str
    name: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: tuple[tuple[str, Kind], ...]
    blocks: int = 0


@dataclass(frozen=True)
class Function:
    """`ops` in the order of computing, without constants and what decompresses them: those are `consts` and `made`."""

    name: str
    opset: str
    inputs: Mapping[str, Kind]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]
    consts: Mapping[str, Const]
    made: Mapping[str, Op]
    output_kinds: Mapping[str, Kind] = field(default_factory=dict)

    @property
    def states(self) -> dict[str, Kind]:
        return {name: kind for name, kind in self.inputs.items() if kind.state}

    def is_const(self, name: str) -> bool:
        return name in self.consts or name in self.made

    def kind(self, name: str) -> Kind:
        """Of a constant."""
        return self.consts[name].kind if name in self.consts else dict(self.made[name].outputs)[name]

    def weight(self, name: str) -> Weight:
        """Decompressed, and how it was stored."""
        if name in self.consts:
            one = self.consts[name]
            return Weight(one.value, one.kind.dtype, "plain", one.bytes)
        return _decompressed(self, self.made[name])


@dataclass(frozen=True, slots=True)
class Weight:
    """`value` as the operators see it. `stored` is the number type of its elements on the disk.

    `how`: "plain"; "linear", whose neighbours differ by `step`, an array that broadcasts over `value`; "palette", whose
    values are all from `palette` [groups, values], `groups` naming the table of each element; "sparse"."""

    value: Any
    stored: str
    how: str
    bytes: int
    step: Array | None = None
    palette: Array | None = None
    groups: Array | None = None


@dataclass(frozen=True, slots=True)
class Feature:
    """An input or output as the package describes it to an application; `shape` is empty where it does not say."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Package:
    path: Path
    spec_version: int
    functions: Mapping[str, Function]
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]

    @property
    def main(self) -> Function:
        """The function that runs if none is named."""
        return self.functions["main"] if "main" in self.functions else next(iter(self.functions.values()))


def read_package(path: Path) -> Package:
    """SourceError for what is no package, or a damaged one."""
    spec_file = _spec_file(path)
    spec = _spec(spec_file)
    if spec.WhichOneof("Type") != "mlProgram":
        raise SourceError(
            f"{path.name} holds a {spec.WhichOneof('Type') or 'model of no kind'}, not an ML program",
            hint="convert with convert_to='mlprogram'",
        )
    blobs = _Blobs(spec_file.parent)
    try:
        functions = {name: _function(name, one, blobs) for name, one in sorted(spec.mlProgram.functions.items())}
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as e:  # a spec that contradicts itself
        raise SourceError(f"{path.name} has a program that cannot be read: {e}", hint=DAMAGED) from e
    described = _description(spec)
    if not functions:
        raise SourceError(f"{path.name} has no function", hint=DAMAGED)
    return Package(
        path,
        spec.specificationVersion,
        functions,
        tuple(_feature(one) for one in described.input),
        tuple(_feature(one) for one in described.output),
        tuple(_feature(one) for one in described.state),
    )


def weights_of(function: Function) -> Iterator[tuple[Op, str, str]]:
    """Constants of floating numbers that operators take: the operator, the parameter, the constant's name."""
    for op in function.ops:
        for parameter, names in op.inputs.items():
            for name in names:
                if function.is_const(name) and function.kind(name).dtype.startswith("float"):
                    yield op, parameter, name


# The specification


def _spec_file(path: Path) -> Path:
    manifest = path / "Manifest.json"
    try:
        found = json.loads(manifest.read_bytes())
        root = found["itemInfoEntries"][found["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SourceError(f"{path} is no .mlpackage: {e}", hint="a directory with Manifest.json is needed") from e
    return path / "Data" / str(root)


def _spec(file: Path) -> Any:
    from coremltools.proto import Model_pb2
    from google.protobuf.message import DecodeError

    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as e:
        raise SourceError(f"{file.name} cannot be read: {e}", hint=DAMAGED) from e
    return spec


def _description(spec: Any) -> Any:
    """Of a package with several functions, the first one's."""
    functions = spec.description.functions
    default = spec.description.defaultFunctionName
    return next((one for one in functions if one.name == default), functions[0]) if functions else spec.description


def _feature(one: Any) -> Feature:
    kind = one.type.stateType.arrayType if one.type.HasField("stateType") else one.type.multiArrayType
    shape: tuple[int | None, ...] = tuple(kind.shape)
    if kind.HasField("shapeRange"):
        ranges = kind.shapeRange.sizeRanges
        shape = tuple(one.lowerBound if one.lowerBound == one.upperBound else None for one in ranges)
    dtype = "image" if one.type.HasField("imageType") else FEATURE_TYPES.get(kind.dataType, str(kind.dataType))
    return Feature(one.name, dtype, shape)


def _function(name: str, spec: Any, blobs: _Blobs) -> Function:
    block = spec.block_specializations[spec.opset]
    consts: dict[str, Const] = {}
    made: dict[str, Op] = {}
    ops = []
    kinds: dict[str, Any] = {}
    for n, one in enumerate(block.operations):
        if one.type == "const":
            out = one.outputs[0]
            consts[out.name] = _const(out.name, one.attributes["val"], blobs)
            continue
        op = _op(one, n, consts, blobs)
        kinds.update(op.outputs)
        if one.type.startswith("constexpr_"):
            made.update({out: op for out, _ in op.outputs})
        else:
            ops.append(op)
    inputs = {one.name: _kind(one.type) for one in spec.inputs}
    outputs = tuple(block.outputs)
    known = {**inputs, **kinds, **{key: one.kind for key, one in consts.items()}}
    return Function(name, spec.opset, inputs, outputs, tuple(ops), consts, made, {one: known[one] for one in outputs})


def _op(spec: Any, number: int, consts: dict[str, Const], blobs: _Blobs) -> Op:
    inputs = {}
    for parameter, argument in sorted(spec.inputs.items()):
        names = []
        for at, binding in enumerate(argument.arguments):
            if binding.WhichOneof("binding") == "name":
                names.append(binding.name)
            else:
                inline = f"{number} {parameter} {at}"
                consts[inline] = _const(inline, binding.value, blobs)
                names.append(inline)
        inputs[parameter] = tuple(names)
    named = spec.attributes["name"].immediateValue.tensor.strings.values if "name" in spec.attributes else ()
    outputs = tuple((one.name, _kind(one.type)) for one in spec.outputs)
    if spec.type.startswith("constexpr_"):  # before iOS 18 what they take are attributes
        for parameter, value in sorted(spec.attributes.items()):
            if parameter != "name":
                inline = f"{number} {parameter}"
                consts[inline] = _const(inline, value, blobs)
                inputs[parameter] = (inline,)
    return Op(spec.type, str(named[0]) if named else str(number), inputs, outputs, len(spec.blocks))


def _kind(spec: Any) -> Kind:
    if spec.WhichOneof("type") == "stateType":
        wrapped = _kind(spec.stateType.wrappedType)
        return Kind(wrapped.dtype, wrapped.shape, state=True)
    if spec.WhichOneof("type") != "tensorType":
        return Kind(str(spec.WhichOneof("type")), ())
    from coremltools.proto import MIL_pb2

    axes = spec.tensorType.dimensions
    shape = tuple(int(axis.constant.size) if axis.HasField("constant") else None for axis in axes)
    return Kind(MIL_pb2.DataType.Name(spec.tensorType.dataType).lower(), shape)


def _const(name: str, spec: Any, blobs: _Blobs) -> Const:
    kind = _kind(spec.type)
    if spec.WhichOneof("value") == "blobFileValue":
        value, size = blobs.read(spec.blobFileValue.fileName, spec.blobFileValue.offset, kind)
        return Const(name, kind, value, size)
    if spec.immediateValue.WhichOneof("value") != "tensor":
        return Const(name, kind, None)
    tensor = spec.immediateValue.tensor
    field_name = tensor.WhichOneof("value")
    found: Any = getattr(tensor, field_name).values if field_name else ()
    if kind.dtype == "string":
        return Const(name, kind, list(found) if kind.shape else str(found[0]))
    if field_name == "bytes":
        return Const(name, kind, _unpacked(np.frombuffer(found, np.uint8), kind))
    dtype = np.dtype("bool" if kind.dtype == "bool" else kind.dtype)
    return Const(name, kind, np.array(found, dtype=dtype).reshape(_fixed(kind)))


class _Blobs:
    """The weight files of a package, mapped into memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Array] = {}

    def read(self, name: str, offset: int, kind: Kind) -> tuple[Array, int]:
        """SourceError where the file ends too early or does not hold what the program says."""
        data = self._file(name)
        head = bytes(data[offset : offset + METADATA.size])
        if len(head) < METADATA.size:
            raise self._cut(name, offset + HEADER_BYTES, len(data))
        sentinel, number, size, start, _ = METADATA.unpack(head)
        expected = -(-int(np.prod(_fixed(kind), dtype=np.int64)) * _bits(kind.dtype) // 8)
        if sentinel != SENTINEL or BLOB_TYPES.get(number) != kind.dtype or size < expected:
            raise SourceError(
                f"weight.bin has no {kind.dtype} of shape {list(_fixed(kind))} at byte {offset}", hint=DAMAGED
            )
        if start + size > len(data):
            raise self._cut(name, start + size, len(data))
        return _unpacked(data[start : start + expected], kind), expected

    def _file(self, name: str) -> Array:
        if name not in self._files:
            file = self._directory / name.removeprefix("@model_path/")
            try:
                data: Array = np.memmap(file, np.uint8, "r")
            except (OSError, ValueError) as e:  # ValueError: it is empty
                raise SourceError(f"{file.name} cannot be read: {e}", hint=DAMAGED) from e
            if len(data) < HEADER_BYTES or struct.unpack("<II", bytes(data[:8]))[1] != BLOB_VERSION:
                raise SourceError(f"{file.name} is no file of weights", hint=DAMAGED)
            self._files[name] = data
        return self._files[name]

    def _cut(self, name: str, needed: int, found: int) -> SourceError:
        return SourceError(
            f"{name.rsplit('/', 1)[-1]} ends after {found} bytes, and a weight lies up to byte {needed}", hint=DAMAGED
        )


def _bits(dtype: str) -> int:
    return BITS[dtype] if dtype in BITS else np.dtype(dtype).itemsize * 8


def _fixed(kind: Kind) -> tuple[int, ...]:
    if None in kind.shape:
        raise ValueError("a constant has a free axis")
    return tuple(axis for axis in kind.shape if axis is not None)


def _unpacked(data: Array, kind: Kind) -> Array:
    shape = _fixed(kind)
    if kind.dtype not in BITS:
        return data.view(kind.dtype).reshape(shape)
    found = unpacked(data, BITS[kind.dtype], int(np.prod(shape, dtype=np.int64))).reshape(shape)
    if kind.dtype != "int4":
        return found
    signed = found.astype(np.int8)
    return np.where(signed > 7, signed - 16, signed).astype(np.int8)


def unpacked(data: Array, bits: int, count: int) -> Array:
    """uint8 numbers of `bits` bits each, packed from the lowest bit of the first byte on."""
    if bits == 8:
        return data[:count]
    if bits == 4:  # by far the commonest
        return np.stack([data & 15, data >> 4], axis=1).reshape(-1)[:count]
    flat = np.unpackbits(np.ascontiguousarray(data), bitorder="little")[: bits * count].reshape(count, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    found: Array = (flat * weights).sum(axis=1, dtype=np.uint8)
    return found


# Decompression


def _decompressed(function: Function, op: Op) -> Weight:
    given = {name: _given(function, names[0]) for name, names in op.inputs.items()}
    sizes = sum(function.consts[names[0]].bytes for names in op.inputs.values() if names[0] in function.consts)
    make = _MAKE.get(op.type)
    if make is None:
        raise SourceError(
            f"the package compresses weights by {op.type}, which Edgewise cannot read",
            hint="convert with linear quantization or palettes",
        )
    made = make(given, op, function)
    return Weight(made.value, made.stored, made.how, sizes, made.step, made.palette, made.groups)


def _given(function: Function, name: str) -> Any:
    """A parameter of a `constexpr_`: some take what another one gives."""
    return function.weight(name).value


def _dtype(function: Function, op: Op, parameter: str) -> str:
    return function.kind(op.inputs[parameter][0]).dtype


def _affine(given: Mapping[str, Any], op: Op, function: Function) -> Weight:
    data, scale = given["quantized_data"], given["scale"]
    shape = [1] * data.ndim
    if scale.ndim:
        shape[int(given["axis"])] = -1
    offset = given["zero_point"]
    step = scale.astype(np.float32).reshape(shape)
    zero = offset.astype(np.float32).reshape(shape if offset.ndim else [1] * data.ndim)
    value = (step * (data.astype(np.float32) - zero)).astype(scale.dtype)
    return Weight(value, data.dtype.name, "linear", 0, step=step)


def _blockwise(given: Mapping[str, Any], op: Op, function: Function) -> Weight:
    data, scale = given["data"], given["scale"]
    step = _spread(scale.astype(np.float32), data.shape)
    moved = data.astype(np.float32)
    if given.get("offset") is not None:
        moved = moved - _spread(given["offset"].astype(np.float32), data.shape)
    return Weight((step * moved).astype(scale.dtype), _dtype(function, op, "data"), "linear", 0, step=step)


def _spread(values: Array, shape: tuple[int, ...]) -> Array:
    """Each value over the block it belongs to."""
    for axis, (have, want) in enumerate(zip(values.shape, shape, strict=True)):
        if have != 1 and have != want:
            values = np.repeat(values, want // have, axis)
    return values


def _palette(given: Mapping[str, Any], op: Op, function: Function) -> Weight:
    if "shape" in given:  # before iOS 18: one table, the indices packed
        table = given["lut"].reshape(1, -1)
        count = int(np.prod(given["shape"]))
        bits = int(table.shape[1]).bit_length() - 1
        indices = unpacked(given["indices"], bits, count).reshape([int(axis) for axis in given["shape"]])
        groups = np.zeros((1,) * indices.ndim, np.int64)
        return Weight(table[0][indices], f"uint{bits}", "palette", 0, palette=table, groups=groups)
    return _of_table(given["indices"], given["lut"], given.get("vector_axis"), _dtype(function, op, "indices"))


def _of_table(indices: Array, lut: Array, vector_axis: Any, stored: str) -> Weight:
    *blocks, values, width = lut.shape
    tables = lut.reshape(-1, values, width)
    groups = _spread(np.arange(len(tables)).reshape(blocks), indices.shape)
    if width == 1:
        found = tables[..., 0][groups, indices]
        return Weight(found, stored, "palette", 0, palette=tables[..., 0], groups=groups)
    axis = int(vector_axis)
    found = np.moveaxis(tables[np.broadcast_to(groups, indices.shape), indices], -1, axis % indices.ndim + 1)
    shape = list(indices.shape)
    shape[axis] *= width
    return Weight(found.reshape(shape), stored, "vectors", 0)


def _sparse(given: Mapping[str, Any], op: Op, function: Function) -> Weight:
    data, mask = given["nonzero_data"], given["mask"]
    if "shape" in given:
        shape = [int(axis) for axis in given["shape"]]
        mask = unpacked(mask, 1, int(np.prod(shape))).reshape(shape)
    value = np.zeros(mask.shape, data.dtype)
    value[mask != 0] = data
    return Weight(value, _dtype(function, op, "nonzero_data"), "sparse", 0)


def _cast(given: Mapping[str, Any], op: Op, function: Function) -> Weight:
    return Weight(given["source_val"].astype(np.float32), _dtype(function, op, "source_val"), "plain", 0)


_MAKE: Final = {
    "constexpr_affine_dequantize": _affine,
    "constexpr_blockwise_shift_scale": _blockwise,
    "constexpr_lut_to_dense": _palette,
    "constexpr_sparse_to_dense": _sparse,
    "constexpr_cast": _cast,
}
