"""Which operators of a .tflite file XNNPACK takes, and why it does not take the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from edgewise.export.targets.litert.file import File, Operator
from edgewise.export.targets.litert.run import PLAIN, opened
from edgewise.export.work.job import Coverage, Fallback

NAME: Final = "XNNPACK"
WHOLE: Final = ("int32", "int64", "bool", "uint8")
SMALL_WEIGHTS: Final = ("int8", "int4", "int2")
LOOKUPS: Final = ("EMBEDDING_LOOKUP", "GATHER", "GATHER_ND", "SCATTER_ND")
HINTS: Final[Mapping[str, str]] = {
    "RESIZE_NEAREST_NEIGHBOR": "upsample bilinearly, or by a transposed convolution",
    "CUMSUM": "multiply by a triangular matrix of ones",
    "SIGN": "compare with zero and select",
    "ATAN2": "compute it outside of the network",
    "TOPK_V2": "sort outside of the network",
}


def coverage(path: Path, file: File, threads: int) -> Coverage:
    """XNNPACK replaces what it takes by DELEGATE nodes, appended to the operators of the file. Walked back from the
    outputs of such a node to its inputs, all that lies between runs there."""
    plain = opened(path, threads, experimental_op_resolver_type=PLAIN)._get_ops_details()
    ops = opened(path, threads)._get_ops_details()
    own, delegates = ops[: len(plain)], ops[len(plain) :]
    taken = _taken(own, delegates)
    left = [n for n in range(len(own)) if n not in taken]
    reasons = Counter((own[n]["op_name"], _why(file, n, own[n]["op_name"])) for n in left)
    fallback = tuple(Fallback(op, count, why, HINTS.get(op)) for (op, why), count in reasons.most_common())
    return Coverage(len(own), len(own) - len(left), NAME, fallback)


def _taken(own: Sequence[Mapping[str, Any]], delegates: Sequence[Mapping[str, Any]]) -> set[int]:
    made = {int(out): n for n, op in enumerate(own) for out in op["outputs"]}
    taken: set[int] = set()
    for delegate in delegates:
        border = {int(n) for n in delegate["inputs"]}
        todo = [int(n) for n in delegate["outputs"]]
        while todo:
            tensor = todo.pop()
            if tensor in border or tensor not in made or made[tensor] in taken:
                continue
            taken.add(made[tensor])
            todo += [int(n) for n in own[made[tensor]]["inputs"] if n >= 0]
    return taken


def _why(file: File, place: int, name: str) -> str:
    if place >= len(file.operators):
        return f"{NAME} did not take it"
    op = file.operators[place]
    types = [file.tensors[n].dtype for n in (*op.inputs[:1], *op.outputs[:1]) if n >= 0]
    whole = next((dtype for dtype in types if dtype in WHOLE), None)
    if name in LOOKUPS:
        return f"a table is read, which {NAME} does not do"
    if name == "DEQUANTIZE" and file.tensors[op.inputs[0]].constant:
        return "weights are made float32, once, as the file is loaded"
    if whole is not None:
        return f"it computes with whole numbers ({whole}); {NAME} has real ones and int8"
    if "int16" in types:
        return f"{NAME} has no kernels for int16 activations"
    if _mixed(file, op):
        return f"{NAME} has no kernel for {file.tensors[op.inputs[1]].dtype} weights with float32 activations"
    if "int8" in types:
        return f"{NAME} has no int8 kernel for it, or not with these scales"
    return f"{NAME} has no such operator, or not with these shapes"


def _mixed(file: File, op: Operator) -> bool:
    if len(op.inputs) < 2 or op.inputs[1] < 0:
        return False
    weight = file.tensors[op.inputs[1]]
    return weight.constant and weight.dtype in SMALL_WEIGHTS and file.tensors[op.inputs[0]].dtype == "float32"


def fully_accelerated(path: Path) -> str:
    """What LiteRT's newer interface says of the same file, as a second opinion."""
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.hardware_accelerator import HardwareAccelerator

    try:
        with CompiledModel.from_file(str(path), hardware_accel=HardwareAccelerator.CPU) as model:
            whole = bool(model.is_fully_accelerated())
    except (RuntimeError, ValueError) as e:
        return f"CompiledModel cannot load it: {' '.join(str(e).split())[:200]}"
    return f"CompiledModel on the CPU says that it is {'' if whole else 'not '}fully accelerated"
