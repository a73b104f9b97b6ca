"""Core ML (.mlpackage) for networks.

No Linux machine runs Core ML, so nothing here passes a parity test of its own: an artifact's level is "spec-checked".
What is checked of the file on the disk: the version and the operators for the system it is meant for, its inputs and
outputs, and each weight, decompressed, against the source's (compare.py). Beside that mil.py computes what the
program says, so that outputs can be compared; which operators an iPhone's Neural Engine takes is predicted by rules.

Options: `target`, "iOS17" or "iOS18"; `dynamic_batch`, true for a free first axis; `palettize`, 4, 6 or 8: bits of an
index into a table of values (k-means), which Neural Engines take, in place of linear int8 or int4; `group`, the output
channels that share such a table, from iOS 18 on and 32 if not given (0: a table for each matrix, which is all that
iOS 17 has); `block`, the weights that share a scale in int4, 32 if not given (blocks run on the GPU, not on the Neural
Engine)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from edgewise.errors import EdgewiseError, SourceError, UnsupportedModel
from edgewise.export.sources.loaded import Loaded
from edgewise.export.sources.torch_source import load
from edgewise.export.targets.coreml import compare, from_torch, palettes
from edgewise.export.targets.coreml.from_torch import COMPRESSED, TARGETS
from edgewise.export.targets.coreml.mil import Interpreter, unknown_ops
from edgewise.export.targets.coreml.weights import Feature, Function, Op, Package, read_package
from edgewise.export.work.job import (
    Check,
    Converted,
    Coverage,
    Fallback,
    Job,
    Layers,
    Proved,
    Tensor,
    read_array,
    read_arrays,
    write_arrays,
)

Array = npt.NDArray[Any]

BY: Final = "our own reading of the program, not Core ML"
ACCELERATOR: Final = "Neural Engine (predicted by rules, not planned by Core ML)"
COMPARED: Final = 4  # rows through the float32 program before anything is made smaller
CLOSE: Final = 1e-3  # of the largest output: other kernels add in another order
MOST_AXES: Final = 5
STORED: Final = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}
MOVES: Final = frozenset({"cast", "shape", "reshape", "squeeze", "expand_dims", "transpose", "identity", "fill"})
LAYERS_OF_SOURCE: Final = ("conv", "linear", "addmm", "matmul", "mm", "bmm", "embedding")
VIEWS: Final = ("permute", "transpose", "t", "view", "_unsafe_view", "expand", "reshape", "unsqueeze", "clone")
OF_THE_CPU: Final = {
    "non_zero": "its result has no fixed shape",
    "non_maximum_suppression": "it decides by values",
    "lstm": "recurrent layers run on the CPU",
    "gru": "recurrent layers run on the CPU",
    "rnn": "recurrent layers run on the CPU",
    "while_loop": "loops run on the CPU",
    "cond": "branches run on the CPU",
    "scatter_nd": "it writes to places known only while it runs",
    "scatter": "it writes to places known only while it runs",
    "scatter_along_axis": "it writes to places known only while it runs",
    "gather_nd": "it reads from places known only while it runs",
    "argsort": "sorting runs on the CPU",
    "topk": "sorting runs on the CPU",
    "cumsum": "running sums run on the CPU or GPU",
}


# convert


def convert(job: Job) -> Converted:
    """The float32 program is computed on a few rows before anything is made smaller: the check `conversion`."""
    from_torch.checked(job)
    torch.set_num_threads(job.threads)
    loaded = load(job.source, job.inputs)
    program = from_torch.exported(loaded, dynamic_batch=bool(job.options.get("dynamic_batch")))
    plain = _made(job, program, loaded, half=False)
    artifact = Path(f"{job.artifact}.mlpackage")
    first = artifact if job.precision == "fp32" else Path(job.work) / "float32.mlpackage"
    files = from_torch.saved(plain, first)
    checks = _conversion(job, read_package(first).main)
    notes: tuple[str, ...] = ()
    if job.precision != "fp32":
        model = _made(job, program, loaded, half=True)
        model, notes = from_torch.compressed(model, job)
        files = from_torch.saved(model, artifact)
    return Converted(str(artifact), files, checks, notes)


def _made(job: Job, program: Any, loaded: Loaded, *, half: bool) -> Any:
    target = from_torch.target_of(job)
    return from_torch.converted(program, loaded, job.outputs, half=half, target=target)


def _conversion(job: Job, function: Function) -> tuple[Check, ...]:
    if not job.rows or not job.reference or unknown_ops(function):
        return ()
    rows = {name: value[:COMPARED] for name, value in read_arrays(job.rows, job.inputs).items()}
    found = _outputs(job, Interpreter(function), rows)
    furthest = 0.0
    for n, value in enumerate(found):
        expected = np.asarray(read_array(job.reference, str(n))[:COMPARED], np.float32)
        if value.shape != expected.shape:
            return (
                Check("conversion", False, f"output {n} is {list(value.shape)}, the source's {list(expected.shape)}"),
            )
        furthest = max(furthest, _relative(value, expected))
    ok = furthest < CLOSE
    return (Check("conversion", ok, f"float32 program within {furthest:.1e} of the largest output, {BY}"),)


def _relative(value: Array, expected: Array) -> float:
    away = float(np.abs(value - expected).max(initial=0.0)) / max(float(np.abs(expected).max(initial=0.0)), 1e-12)
    return away if np.isfinite(away) else float("inf")


# prove


def prove(job: Job) -> Proved:
    torch.set_num_threads(job.threads)
    package = read_package(Path(job.artifact))
    function = package.main
    checks = [_target(job, package), _signature(job, package, function), *_weights(job, function)]
    skipped = _skipped(job, function)
    checks.append(_precision(job, function, skipped))
    ran, found, notes = _ran(job, function)
    return Proved(
        "spec-checked",
        ran,
        BY,
        coverage(function),
        _bytes(function),
        skipped,
        (*checks, *found),
        notes=(*notes, "Core ML itself runs on Apple's systems alone: run the package there before you ship it"),
    )


def _target(job: Job, package: Package) -> Check:
    wanted = from_torch.target_of(job)
    version = TARGETS[wanted]
    ok = package.spec_version <= version
    states = ", ".join(package.main.states)
    detail = f"specification {package.spec_version}, {package.main.opset}, for {wanted} ({version})"
    return Check("target", ok, detail + (f"; states {states}" if states else ""))


def _signature(job: Job, package: Package, function: Function) -> Check:
    wrong = [
        *_unlike("input", job.inputs, [one for one in package.inputs if one.name not in function.states]),
        *_unlike("output", job.outputs, package.outputs),
    ]
    for name, kind in function.inputs.items():
        described = {one.name: one.shape for one in (*package.inputs, *package.states)}
        if described.get(name) != kind.shape:
            wrong.append(f"the program takes {name} {list(kind.shape)}, the description says {described.get(name)}")
    if wrong:
        return Check("signature", False, "; ".join(wrong))
    said = ", ".join(f"{one.name} {one.dtype} {list(one.shape)}" for one in (*package.inputs, *package.outputs))
    return Check("signature", True, said)


def _unlike(what: str, wanted: Sequence[Tensor], found: Sequence[Feature]) -> Iterator[str]:
    """Names may differ: what was converted elsewhere has its own, in the same order."""
    if len(wanted) != len(found):
        names = [", ".join(one.name for one in side) or "none" for side in (found, wanted)]
        yield f"{what}s are {names[0]}, the source's {names[1]}"
        return
    if {one.name for one in wanted} == {one.name for one in found}:
        found = [next(one for one in found if one.name == tensor.name) for tensor in wanted]
    for tensor, feature in zip(wanted, found, strict=True):
        shape = feature.shape
        if shape and not _fits(shape, tensor.shape):
            yield f"{what} {tensor.name} is {list(shape)}, the source's {list(tensor.shape)}"
        if feature.dtype.startswith("float") != tensor.dtype.startswith("float"):
            yield f"{what} {tensor.name} is {feature.dtype}, the source's {tensor.dtype}"


def _fits(found: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(
        a is None or b is None or a == b for a, b in zip(found, wanted, strict=True)
    )


def _weights(job: Job, function: Function) -> list[Check]:
    """Two checks, of which each needs the source as torch has it."""
    try:
        loaded = load(job.source, job.inputs)
        dynamic = function.inputs and next(iter(function.inputs.values())).shape[:1] == (None,)
        program = from_torch.exported(loaded, dynamic_batch=bool(dynamic))
    except EdgewiseError as e:
        return [Check("weights", False, f"there is no source to compare with: {e.message}")]
    given = _parameters(program)
    try:
        wanted = {9: "iOS18"}.get(_version(function), "iOS17")
        model = from_torch.converted(program, loaded, job.outputs, half=False, target=wanted)
        fresh = Path(job.work) / "fresh.mlpackage"
        from_torch.saved(model, fresh)
    except UnsupportedModel as e:
        failed = Check("weights", False, f"the source cannot be converted to compare with: {e.message}")
        return [failed, compare.as_given(function, given)]
    theirs = read_package(fresh).main
    weights = compare.as_converted(function, theirs)
    return [weights, compare.as_given(theirs if weights.ok else function, given)]


def _version(function: Function) -> int:
    return int(function.opset.removeprefix("CoreML")) + 1


def _parameters(program: Any) -> dict[str, Array]:
    """Matrices and filters that a layer of the source multiplies its input by, as they are."""
    named = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    follows: set[Any] = set()  # what depends on the inputs: the converter computes the rest beforehand
    for node in program.graph.nodes:
        if node.name in program.graph_signature.user_inputs or follows & set(node.all_input_nodes):
            follows.add(node)
    found = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in named and _multiplies(node, follows):
            value = program.state_dict.get(named[node.name], program.constants.get(named[node.name]))
            if value is not None and value.ndim > 1 and value.is_floating_point():
                found[named[node.name]] = value.detach().float().numpy()
    return found


def _multiplies(node: Any, follows: set[Any]) -> bool:
    """Whether a layer takes it, perhaps with its axes in another order."""
    for user in node.users:
        name = str(user.target).removeprefix("aten.").partition(".")[0]
        if name.startswith(LAYERS_OF_SOURCE) and user in follows:
            return True
        if name in VIEWS and _multiplies(user, follows):
            return True
    return False


def _matrices(function: Function) -> dict[str, Op]:
    """Weights of two axes or more, by name, and an operator that takes them."""
    found: dict[str, Op] = {}
    for op in function.ops:
        for names in op.inputs.values():
            for name in names:
                if function.is_const(name) and len(function.kind(name).shape) > 1:
                    found.setdefault(name, op)
    return {name: op for name, op in found.items() if function.kind(name).dtype.startswith("float")}


def _bytes(function: Function) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name in _matrices(function):
        weight = function.weight(name)
        found[weight.stored] += weight.bytes or weight.value.nbytes
    return dict(found)


def _skipped(job: Job, function: Function) -> tuple[str, ...]:
    """Weights that are not in the precision that was asked for, and could be."""
    bits = job.options.get("palettize")
    wanted = f"uint{bits}" if bits else STORED[job.precision]
    matrices = _matrices(function)
    if job.precision not in ("fp32", "fp16"):
        matrices = {name: op for name, op in matrices.items() if op.type in COMPRESSED and _worth(function, name)}
    spared = palettes.spared([_size(function, name) for name in matrices])
    found = []
    for name, op in matrices.items():
        stored = function.weight(name).stored
        if bits and spared.takes(_size(function, name), stored):
            continue
        blocks = job.precision == "int4" and not bits
        if stored != wanted and not (blocks and stored == "int8" and not _divides(job, function, name, op)):
            found.append(f"{name} ({stored})")
    return tuple(found)


def _worth(function: Function, name: str) -> bool:
    """coremltools leaves the smallest in the program itself."""
    return _size(function, name) >= 10


def _size(function: Function, name: str) -> int:
    return int(np.prod([axis or 1 for axis in function.kind(name).shape]))


def _divides(job: Job, function: Function, name: str, op: Op) -> bool:
    """Whether the input channels fall into whole blocks."""
    shape = function.kind(name).shape
    axis = 0 if op.type == "conv_transpose" else -2 if op.type == "matmul" else 1
    if op.type == "matmul" and "transpose_y" in op.inputs and function.weight(op.inputs["transpose_y"][0]).value:
        axis = -1
    return (shape[axis] or 0) % int(job.options.get("block", from_torch.BLOCK)) == 0


def _precision(job: Job, function: Function, skipped: Sequence[str]) -> Check:
    dtypes = Counter(kind.dtype for op in function.ops if op.type not in MOVES for _, kind in op.outputs[:1])
    computed = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(dtypes.items()))
    wanted = "float32" if job.precision == "fp32" else "float16"
    floats = {dtype: count for dtype, count in dtypes.items() if dtype.startswith("float")}
    ok = not skipped and (not floats or max(floats, key=lambda one: floats[one]) == wanted)
    left = f"; not {job.precision}: {', '.join(skipped[:3])}" if skipped else ""
    return Check("precision", ok, f"operators compute {computed}{left}")


# Running


def _ran(job: Job, function: Function) -> tuple[bool, list[Check], list[str]]:
    unknown = unknown_ops(function)
    if unknown:
        return False, [], [f"Edgewise cannot compute {', '.join(sorted(unknown))}, so there are no outputs to compare"]
    if not job.rows:
        return False, [], ["there are no rows to run"]
    try:
        machine = Interpreter(function)
        rows = read_arrays(job.rows, job.inputs)
        found = _outputs(job, machine, rows)
        checks = [*_finite(job, machine, rows, found), *_batch(job, machine, rows, found)]
    except (SourceError, UnsupportedModel) as e:
        return False, [Check("runs", False, e.message)], []
    write_arrays(Path(job.work) / "outputs", {str(n): value for n, value in enumerate(found)})
    return True, [Check("runs", True, f"{len(found[0])} rows by {BY}"), *checks], []


def _outputs(job: Job, machine: Interpreter, rows: Mapping[str, Array]) -> list[Array]:
    """Row by row, as most programs take one: float32, in the order of the source's outputs."""
    count = len(next(iter(rows.values())))
    names = _inputs(machine.function, job.inputs)
    made = []
    for row in range(count):
        feed = {names[name]: np.asarray(value[row : row + 1]) for name, value in rows.items()}
        made.append(machine.run(feed))
    order = _order(machine.function, job.outputs)
    return [np.concatenate([one[at] for one in made]).astype(np.float32) for at in order]


def _inputs(function: Function, tensors: Sequence[Tensor]) -> dict[str, str]:
    """The program's own name of each input: the same one, else that at the same place."""
    have = [name for name, kind in function.inputs.items() if not kind.state]
    if len(have) != len(tensors):
        raise SourceError(f"the program takes {', '.join(have)}, the source {', '.join(one.name for one in tensors)}")
    if set(have) == {one.name for one in tensors}:
        return {name: name for name in have}
    return {one.name: name for one, name in zip(tensors, have, strict=True)}


def _order(function: Function, tensors: Sequence[Tensor]) -> list[int]:
    names = [one.name for one in tensors]
    if set(names) == set(function.outputs):
        return [function.outputs.index(name) for name in names]
    return list(range(len(function.outputs)))


def _finite(job: Job, machine: Interpreter, rows: Mapping[str, Array], found: Sequence[Array]) -> Iterator[Check]:
    """Names the operator with which it began, if a row of the outputs is not finite."""
    bad = sorted({int(row) for value in found for row in np.flatnonzero(~_finite_rows(value))})
    if not bad:
        yield Check("finite", True, "all outputs are finite")
        return
    names = _inputs(machine.function, job.inputs)
    begun: list[str] = []
    largest: dict[str, float] = {}

    def watch(op: Op, name: str, value: torch.Tensor) -> None:
        if value.is_floating_point() and value.numel():
            finite = bool(value.isfinite().all())
            largest[name] = float(value.abs().max()) if finite else float("inf")
            if not finite and not begun:
                before = max((largest.get(one, 0.0) for names in op.inputs.values() for one in names), default=0.0)
                kind = dict(op.outputs)[name].dtype
                begun.append(f"{op.type} {op.name} in {kind}, of inputs up to {before:.4g}")

    machine.run({names[name]: np.asarray(value[bad[0] : bad[0] + 1]) for name, value in rows.items()}, watch=watch)
    yield Check(
        "finite", False, f"{len(bad)} rows are not finite; it begins with {begun[0] if begun else 'the inputs'}"
    )


def _finite_rows(value: Array) -> npt.NDArray[np.bool_]:
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(value.reshape(len(value), -1)).all(1))
    return finite


def _batch(job: Job, machine: Interpreter, rows: Mapping[str, Array], found: Sequence[Array]) -> Iterator[Check]:
    """Where the first axis is free, several rows at once must give what each gave."""
    if any(kind.shape[:1] != (None,) for kind in machine.function.inputs.values() if not kind.state):
        return
    count = min(7, len(found[0]))
    names = _inputs(machine.function, job.inputs)
    made = machine.run({names[name]: np.asarray(value[:count]) for name, value in rows.items()})
    order = _order(machine.function, job.outputs)
    away = max(_relative(made[at], one[:count]) for at, one in zip(order, found, strict=True))
    yield Check("batch", away < CLOSE, f"{count} rows at once are within {away:.1e} of the same ones apart")


# Coverage


def coverage(function: Function) -> Coverage:
    """Operators that a Neural Engine is known not to take, by the first rule that says so."""
    found: Counter[tuple[str, str, str]] = Counter()
    counted = [op for op in function.ops if op.type not in ("read_state", "write_state")]
    for op in counted:
        why = _refusal(function, op)
        if why:
            found[(op.type, *why)] += 1
    fallback = tuple(Fallback(op, count, why, hint) for (op, why, hint), count in found.most_common())
    return Coverage(len(counted), len(counted) - found.total(), ACCELERATOR, fallback)


def _refusal(function: Function, op: Op) -> tuple[str, str] | None:
    """Why, and a way out."""
    kinds = [kind for _, kind in op.outputs]
    if op.blocks or op.type in OF_THE_CPU:
        return OF_THE_CPU.get(op.type, "its way depends on values"), "do it in the application, before or after"
    if any(_blockwise(function, name) for names in op.inputs.values() for name in names):
        return "its weights share scales in blocks, which only GPUs take", "palettize=4, or int8"
    if any(len(kind.shape) > MOST_AXES for kind in kinds):
        return f"more than {MOST_AXES} axes", "reshape to fewer axes in the model"
    if op.type not in MOVES and any(kind.dtype == "float32" for kind in kinds):
        return "it computes in float32, and Neural Engines in float16", "convert with fp16"
    if any(None in kind.shape for kind in kinds):
        return "its shape is known only while it runs", "fix the shapes: leave dynamic_batch out"
    if op.type not in MOVES and any(kind.dtype.startswith(("int32", "int64", "uint32")) for kind in kinds):
        return "it computes in whole numbers of 32 bits", "do it in the application, before or after"
    return None


def _blockwise(function: Function, name: str) -> bool:
    op = function.made.get(name)
    if op is None or op.type != "constexpr_blockwise_shift_scale":
        return False
    scale = function.kind(op.inputs["scale"][0]).shape
    return sum(axis != 1 for axis in scale) > 1


# layers


def layers(job: Job) -> Layers:
    """Every floating value of the program for the rows `job.only`, in its order."""
    torch.set_num_threads(job.threads)
    machine = Interpreter(read_package(Path(job.artifact)).main)
    names = _inputs(machine.function, job.inputs)
    rows = read_arrays(job.rows, job.inputs)
    runs: list[dict[str, Array]] = []
    for row in job.only:
        seen: dict[str, Array] = {}

        def watch(op: Op, name: str, value: torch.Tensor, seen: dict[str, Array] = seen) -> None:
            if value.is_floating_point() and op.type != "cast":
                seen[name] = value.numpy().copy()

        machine.run({names[name]: np.asarray(value[row : row + 1]) for name, value in rows.items()}, watch=watch)
        runs.append(seen)
    order = tuple(runs[0])
    stacked = {str(n): np.concatenate([run[name] for run in runs]) for n, name in enumerate(order)}
    write_arrays(Path(job.work) / "layers", stacked)
    return Layers(order)
