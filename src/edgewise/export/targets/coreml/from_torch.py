"""Torch networks to Core ML programs, by coremltools: the one file that calls its converters."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from edgewise.errors import UnsupportedModel, UsageError
from edgewise.export.sources.loaded import Loaded
from edgewise.export.targets.coreml import palettes
from edgewise.export.work.job import Job, Tensor

TARGETS: Final = {"iOS17": 8, "iOS18": 9}  # and the version of the specification
BLOCK: Final = 32  # weights of an output channel that share a scale in int4
MOST_ROWS: Final = 64  # of a free first axis
COMPRESSED: Final = ("conv", "conv_transpose", "linear", "matmul", "gather")  # whose weights are worth fewer bits
CHANNELS_AT: Final = {"conv_transpose": 1, "matmul": -1}  # the axis of a weight's outputs, elsewhere the first
DEBUG_MAPPING: Final = "executorch_debug_handle_mapping.json"  # left in the package by the converter
POOLS: Final = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
LOGICAL: Final = {
    **{f"__{name}__": f"logical_{name}" for name in ("and", "or", "xor")},
    **{f"bitwise_{name}": f"logical_{name}" for name in ("and", "or", "xor")},
}
UNKNOWN: Final = re.compile(r"Unsupported fx node (\w+)|convert function for op '([\w:]+)' not implemented")
ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")


def target_of(job: Job) -> str:
    """The oldest system that takes the package: what was asked for, else the oldest that has all that is needed."""
    blocks = job.precision == "int4" and not job.options.get("palettize")
    groups = bool(job.options.get("group"))
    asked = str(job.options.get("target", "iOS18" if blocks or groups else "iOS17"))
    if blocks and asked == "iOS17":
        raise UsageError(
            "int4 weights in blocks need iOS 18",
            hint="target iOS18, or palettize=4: 16 values a matrix, from iOS 16 on",
        )
    if groups and asked == "iOS17":
        raise UsageError("tables of groups of channels need iOS 18", hint="target iOS18, or group=0: one a matrix")
    return asked


def group_of(job: Job) -> int:
    """Channels that share a table of values; 0 where a whole matrix does."""
    return int(job.options.get("group", palettes.GROUP if target_of(job) == "iOS18" else 0))


def checked(job: Job) -> None:
    """UsageError for options that do not go together."""
    tables, group, block = (job.options.get(name) for name in ("palettize", "group", "block"))
    if group is not None and not tables:
        raise UsageError(f"group={group} is of tables, and none are made", hint="give palettize=4, 6 or 8 beside it")
    if block is not None and tables:
        raise UsageError(
            f"block={block} is of scales, and palettize={tables} makes tables",
            hint="give group for the channels that share a table, or leave palettize away",
        )
    target_of(job)


def exported(loaded: Loaded, *, dynamic_batch: bool = False) -> Any:
    """The network as a program of torch.export in its core operators. UnsupportedModel if torch cannot follow it."""
    example = tuple(loaded.example[one.name] for one in loaded.inputs) if dynamic_batch else loaded.one_row
    free: Any = None
    if dynamic_batch:
        rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
        free = tuple({0: rows} for _ in example)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(loaded.module, example, dynamic_shapes=free)
            return _completed(program.run_decompositions(_of_numbers()))
    except Exception as e:  # torch's own, of many kinds
        raise UnsupportedModel(f"torch.export cannot follow the network: {short(e)}", hint=_export_hint(e)) from e


def _export_hint(error: Exception) -> str:
    text = str(error)
    if "data-dependent" in text or "control flow" in text:
        return "its way depends on values of the input: use torch.where or torch.cond in its place"
    if "Constraints violated" in text or "specialized" in text:
        return "it does not take any number of rows: leave dynamic_batch out"
    return "export it by hand with torch.export.export and give the program"


def _completed(program: Any) -> Any:
    """coremltools wants the strides of a pool written out, which torch leaves out where they are the kernel's; and it
    knows `&`, `|` and `^` of booleans by another name."""
    for node in program.graph.nodes:
        name = _name_of(node.target)
        if node.op == "call_function" and name in POOLS and (len(node.args) == 2 or node.args[2] == []):
            node.args = (*node.args[:2], node.args[1], *node.args[3:])
        value = node.meta.get("val")
        if name in LOGICAL and isinstance(value, torch.Tensor) and value.dtype == torch.bool:
            node.target = getattr(torch.ops.aten, LOGICAL[name]).default
    return program


def converted(program: Any, loaded: Loaded, outputs: Sequence[Tensor], *, half: bool, target: str) -> Any:
    """A model of coremltools, its inputs and outputs named as the source's are, its numbers float32 at the border.

    An exported program is tried first, then torch's older tracer. UnsupportedModel if neither gets through."""
    import coremltools as ct

    wanted = {
        "outputs": [ct.TensorType(name=one.name, dtype=_border(one)) for one in outputs] or None,
        "minimum_deployment_target": getattr(ct.target, target),
        "compute_precision": ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
        "convert_to": "mlprogram",
        "skip_model_load": True,
    }
    try:
        made = _of_program(program, wanted)
    except Exception as first:  # coremltools' own, of many kinds
        made = _traced(loaded, wanted, first)
    return _renamed(made, [one.name for one in loaded.inputs])


def _of_program(program: Any, wanted: Mapping[str, Any]) -> Any:
    """An operator that coremltools does not have is taken apart as torch says, if it says."""
    import coremltools as ct

    done: set[Any] = set()
    while True:
        try:
            with quiet():
                return ct.convert(program, **wanted)
        except NotImplementedError as e:
            parts = _parts(e)
            if not parts or parts.keys() <= done:
                raise
            done |= parts.keys()
            with quiet():
                program = _completed(program.run_decompositions(parts))


def _of_numbers() -> dict[Any, Any]:
    """`where` with a number in place of a tensor, which coremltools does not know."""
    where = torch.ops.aten.where

    def full(value: Any, other: Any) -> torch.Tensor:
        kind = torch.result_type(value, other)
        return value if isinstance(value, torch.Tensor) else torch.full((), value, dtype=kind)

    def chosen(condition: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        return torch.where(condition, full(a, b), full(b, a))

    return dict.fromkeys((where.ScalarOther, where.ScalarSelf, where.Scalar), chosen)


def _parts(error: Exception) -> dict[Any, Any]:
    """Torch's own ways to do without the operator that is missing."""
    missing = UNKNOWN.search(str(error))
    table: Mapping[Any, Any] = torch._decomp.decomposition_table
    return {op: made for op, made in table.items() if missing and _name_of(op) == missing[1]}


def _name_of(target: Any) -> str:
    """`max_pool2d` of `aten.max_pool2d.default`."""
    return str(target).removeprefix("aten.").partition(".")[0]


def _border(one: Tensor) -> Any:
    return np.float32 if one.dtype.startswith("float") else np.int32


def _traced(loaded: Loaded, wanted: Mapping[str, Any], first: Exception) -> Any:
    import coremltools as ct

    inputs = [
        ct.TensorType(name=one.name, shape=tuple(axis or 1 for axis in one.shape), dtype=_border(one))
        for one in loaded.inputs
    ]
    traced: Any = torch.jit.trace
    try:
        with quiet(), torch.no_grad():
            return ct.convert(traced(loaded.module, loaded.one_row), inputs=inputs, **wanted)
    except Exception as second:
        raise refused(first, second) from first


def refused(first: Exception, second: Exception | None = None) -> UnsupportedModel:
    """What coremltools could not do, and the way out."""
    texts = [short(one) for one in (first, second) if one is not None]
    for text in texts:
        unknown = UNKNOWN.search(text)
        if unknown:
            return UnsupportedModel(
                f"Core ML has no operator for {unknown[1] or unknown[2]}",
                hint="write it with other operators in the model, or take another target",
            )
        if "State model is supported only" in text:
            return UnsupportedModel("the network keeps state, which Core ML has from iOS 18 on", hint="target iOS18")
    if "TRAINING" in texts[0]:
        return UnsupportedModel(
            "the exported program is in the training dialect", hint="call .run_decompositions({}) on it first"
        )
    message = "; as a traced module: ".join(dict.fromkeys(texts))
    return UnsupportedModel(f"coremltools cannot convert the network: {message}", hint="take another target: onnx")


def _renamed(model: Any, names: Sequence[str]) -> Any:
    """With these inputs: an exported program's are named by its own parameters."""
    import coremltools as ct

    spec = model.get_spec()
    have = [one.name for one in spec.description.input]
    if have == list(names) or len(have) != len(names):
        return model
    for old, new in zip(have, names, strict=True):
        if old != new:
            ct.utils.rename_feature(spec, old, new, rename_inputs=True, rename_outputs=False)
    with quiet():
        return ct.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)


# Fewer bits


def compressed(model: Any, job: Job) -> tuple[Any, tuple[str, ...]]:
    """With weights in the bits that were asked for, and notes. Layers whose channels int4 blocks do not divide get
    int8, and of palettes the smallest matrices are spared."""
    if job.precision in ("fp32", "fp16"):
        return model, ()
    from coremltools.optimize import coreml as opt

    channel = opt.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=0)
    if job.options.get("palettize"):
        return _palettized(model, int(job.options["palettize"]), group_of(job), channel)
    if job.precision == "int8":
        return _applied(opt.linear_quantize_weights, model, channel), ()
    size = int(job.options.get("block", BLOCK))
    how = opt.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=size, weight_threshold=0
    )
    model = _applied(opt.linear_quantize_weights, model, how)
    note = f"int4 in blocks of {size}; layers whose input channels it does not divide are int8, one scale a channel"
    return _applied(opt.linear_quantize_weights, model, channel), (note,)


def _palettized(model: Any, bits: int, group: int, channel: Any) -> tuple[Any, tuple[str, ...]]:
    from coremltools.optimize import coreml as opt

    with quiet():
        found = {name: one for name, one in opt.get_weights_metadata(model, weight_threshold=0).items() if _takes(one)}
    limits = palettes.spared([one.val.size for one in found.values()])
    few = {name: channel for name, one in found.items() if limits.floating < one.val.size <= limits.bytes}
    many = {name: one for name, one in found.items() if one.val.size > limits.bytes}
    make = palettes.tables(bits)
    with quiet():
        if few:
            model = opt.linear_quantize_weights(model, opt.OptimizationConfig(op_name_configs=few))
        how = {name: _table_of(one, make, group) for name, one in many.items()}
        model = opt.palettize_weights(model, opt.OptimizationConfig(op_name_configs=how))
    floating = len(found) - len(few) - len(many)
    share = f"{group} or so channels share a table" if group else "a table a matrix"
    note = f"{len(many)} matrices have {bits}-bit palettes ({share}); of the smallest {len(few)} are int8"
    return model, (f"{note}, {floating} float16",)


def _takes(weight: Any) -> bool:
    """Matrices that an operator multiplies by or looks up."""
    return weight.val.ndim > 1 and any(op.op_type in COMPRESSED for op in weight.child_ops)


def _table_of(weight: Any, make: Any, group: int) -> Any:
    from coremltools.optimize import coreml as opt

    if not group:
        return opt.OpPalettizerConfig(mode="custom", lut_function=make, weight_threshold=0)
    axis = CHANNELS_AT.get(weight.child_ops[0].op_type, 0) % weight.val.ndim
    return opt.OpPalettizerConfig(
        mode="custom",
        lut_function=make,
        granularity="per_grouped_channel",
        group_size=palettes.sharing(weight.val.shape[axis], group),
        channel_axis=axis,
        weight_threshold=0,
    )


def _applied(compress: Any, model: Any, how: Any) -> Any:
    from coremltools.optimize import coreml as opt

    with quiet():
        return compress(model, opt.OptimizationConfig(op_type_configs=dict.fromkeys(COMPRESSED, how)))


def saved(model: Any, path: Path) -> tuple[str, ...]:
    """All files of the package."""
    shutil.rmtree(path, ignore_errors=True)
    with quiet():
        model.save(str(path))
    for stray in path.rglob(DEBUG_MAPPING):
        stray.unlink()
    _forget(path / "Manifest.json")
    return tuple(str(file) for file in sorted(path.rglob("*")) if file.is_file())


def _forget(manifest: Path) -> None:
    """The converter's own file, in the list of the package's items too."""
    import json

    found = json.loads(manifest.read_bytes())
    items = found["itemInfoEntries"]
    found["itemInfoEntries"] = {key: one for key, one in items.items() if DEBUG_MAPPING not in one["path"]}
    manifest.write_text(json.dumps(found, indent=4), encoding="utf-8")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the converter's chatter: warnings about versions, libraries of macOS, bars of progress."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        silent = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def short(error: BaseException) -> str:
    text = ANSI.sub("", str(error)).partition("For more information")[0]
    return " ".join(text.split())[:400] or type(error).__name__
