"""A GGUF file's model in 8-bit blocks, for peers whose 8-bit kernels are their faster or their exacter ones."""

from __future__ import annotations

import importlib
from pathlib import Path


def to_int8(source: Path, target: Path) -> None:
    """The same GGUF with every quantized matrix as Q8_0: 8-bit blocks of 32 with a scale."""
    gguf = importlib.import_module("gguf")
    reader, kinds = gguf.GGUFReader(source), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            items = field.types[-1] if len(field.types) > 1 else None  # of an array
            writer.add_key_value(name, field.contents(), field.types[0], items)
    for tensor in reader.tensors:
        plain = tensor.tensor_type in (kinds.F32, kinds.F16, kinds.BF16)
        kind = kinds.F32 if plain else kinds.Q8_0
        values = gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
