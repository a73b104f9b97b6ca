"""A float32 .tflite file in fewer bits, by ai-edge-quantizer: its weights here, activations too in static.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ai_edge_quantizer import qtyping, recipe_manager

from edgewise.errors import UnsupportedModel
from edgewise.export.targets.litert.file import File
from edgewise.export.targets.litert.recipe import ALL, TABLE, Calibration, constant, has, scope, write
from edgewise.export.targets.litert.static import static
from edgewise.export.work.job import Precision

BLOCK: Final = 32  # weights to a scale, in int4


def quantize(source: Path, output: Path, precision: Precision, calibration: Calibration) -> tuple[str, ...]:
    """Write `output`; notes on what was done. UnsupportedModel for a network that has nothing to quantize so."""
    try:
        if precision == "int8":
            return static(source, output, calibration)
        recipe, notes = _RECIPES[precision](File(source))
        write(source, output, recipe, {}, calibration)
        return notes
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as e:  # the quantizer's own
        why = " ".join(str(e).split())[:300]
        raise UnsupportedModel(
            f"ai-edge-quantizer cannot make it {precision}: {why}", hint="take fp16 or int8-dynamic"
        ) from e


def _fp16(file: File) -> tuple[Any, tuple[str, ...]]:
    config = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    made = recipe_manager.RecipeManager()
    made.add_quantization_config(".*", ALL, config, algorithm_key="float_casting")
    return made, ("weights are float16; a CPU computes in float32, a GPU may take float16 throughout",)


def _dynamic(file: File) -> tuple[Any, tuple[str, ...]]:
    made = recipe_manager.RecipeManager()
    _add_dynamic(made)
    note = "depthwise filters are stored in int8 and computed in float32: XNNPACK has no kernel that takes both"
    return made, (note,) if has(file, "DEPTHWISE_CONV_2D") else ()


def _add_dynamic(made: Any) -> None:
    """Depthwise filters are kept in int8 and computed in float32: LiteRT's own kernel for them is ten times slower than
    XNNPACK's for float32, and XNNPACK has none."""
    made.add_dynamic_config(".*", ALL, 8)
    made.add_weight_only_config(".*", qtyping.TFLOperationName.DEPTHWISE_CONV_2D, 8)


def _int4(file: File) -> tuple[Any, tuple[str, ...]]:
    """Blocks of 32 weights share a scale where rows can be cut so: closer than a scale for a row, and as fast. There
    are no int4 kernels for convolutions, so they get int8."""
    small = [op for op in file.operators if op.name in ("FULLY_CONNECTED", TABLE) and constant(file, op)]
    if not small:
        raise UnsupportedModel(
            "the network has no matrix product or table of embeddings, and LiteRT has int4 kernels for nothing else",
            hint="take int8 or int8-dynamic",
        )
    made = recipe_manager.RecipeManager()
    _add_dynamic(made)
    kinds = qtyping.QuantGranularity
    cut = 0
    for op in small:
        fits = file.tensors[op.inputs[1]].shape[-1] % BLOCK == 0
        cut += fits
        made.add_dynamic_config(
            scope(file, op),
            qtyping.TFLOperationName(op.name),
            4,
            granularity=kinds.BLOCKWISE_32 if fits else kinds.CHANNELWISE,
            algorithm_key="min_max_uniform_quantize" if fits else "OCTAV",
        )
    notes = [f"int4 weights: {cut} matrices in blocks of {BLOCK}, {len(small) - cut} with a scale for each row"]
    if any(has(file, name) for name in ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")):
        notes.append("convolutions have int8 weights: LiteRT has no int4 kernels for them that are worth having")
    return made, tuple(notes)


_RECIPES: Final = {"fp16": _fp16, "int8-dynamic": _dynamic, "int4": _int4}
