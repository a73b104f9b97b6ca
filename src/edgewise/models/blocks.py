"""The block writer: a card and weight matrices in, ONNX graphs out (docs/formats/bundle.md), with numpy and no torch.

A model becomes `embed` (ids to hidden), one or more `block-NN` (hidden to hidden, decoder layers a..b) and `head`
(hidden to logits). A boundary between any two graphs is one float32 tensor [rows, hidden], so it can leave the process.

Weights with a minimum per block (GGUF Q4_1) stay exact as MatMulNBits(q) + blocksum(x) @ minima: MatMulNBits' integer
zero points cannot hold such minima, and its float zero points leave the fast kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgewise.models.card import Activation, Card
from edgewise.models.weights import Dense, Matrix, Quantized, stack
from edgewise.types import FloatArray

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
ALIGNMENT = 4096  # external tensors start on a page, so that the runtime can map them
INLINE_LIMIT = 1024  # bytes; smaller tensors stay inside the graph file

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights. Matrices are [outputs, inputs]; a missing norm or bias is None.

    `qk_norm` are the scales for queries and keys, of one head's size or of all heads' together."""

    attention_norm: FloatArray | None
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    ffn_norm: FloatArray | None
    gate: Matrix
    up: Matrix
    down: Matrix
    qkv_bias: tuple[FloatArray, FloatArray, FloatArray] | None = None
    o_bias: FloatArray | None = None
    gate_up_bias: tuple[FloatArray, FloatArray] | None = None
    down_bias: FloatArray | None = None
    qk_norm: tuple[FloatArray, FloatArray] | None = None
    attention_out_norm: FloatArray | None = None
    ffn_out_norm: FloatArray | None = None


class DataFile:
    """The external data of one or more graphs; a tensor written under the same name twice is stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._places: dict[str, tuple[int, int]] = {}

    def place(self, name: str, values: Array) -> tuple[int, int]:
        """(offset, length) in bytes."""
        if name not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            offset = self._file.tell()
            self._file.write(np.ascontiguousarray(values).view(np.uint8).data)
            self._places[name] = (offset, values.nbytes)
        return self._places[name]

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


class _Graph:
    """An ONNX graph under construction; every method returns the name of the value it adds."""

    def __init__(self, name: str, data: DataFile, *, int8_activations: bool) -> None:
        self.name = name
        self._data = data
        self._int8_activations = int8_activations
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._sums: dict[tuple[str, int], str] = {}

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def tensor(self, name: str, values: Array) -> str:
        if name not in self._initializers:
            if values.nbytes < INLINE_LIMIT:
                self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
            else:
                self._initializers[name] = self._external(name, values)
        return name

    def _external(self, name: str, values: Array) -> onnx.TensorProto:
        offset, length = self._data.place(name, values)
        proto = onnx.TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._data.path.name), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        return proto

    def node(self, op: str, inputs: Sequence[str], out: str, *more: str, domain: str = "", **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, inputs, [out, *more], name=out, domain=domain, **attributes))
        return out

    def linear(self, x: str, matrix: Matrix, bias: FloatArray | None, out: str, *, table: bool = False) -> str:
        """x [rows, inputs] @ matrix^T + bias. A `table` is what `unpacked` reads in another graph of the data file: its
        tensors are named and laid out as there, so that they are stored once."""
        if isinstance(matrix, Dense):
            weight = self.tensor(f"{out}.weight", matrix.values)
            if matrix.values.dtype != np.float32:  # stored as published; the runtime folds the cast when it loads
                weight = self.node("Cast", [weight], f"{out}.weight32", to=TensorProto.FLOAT)
            return self._product(x, weight, bias, out)
        if matrix.bits == 8 and not self._int8_activations:
            # There is no fast kernel for 8-bit blocks and float32 activations: it would unpack them at each call.
            return self._product(x, self.unpacked(matrix, out), bias, out)
        if matrix.minima is None and bias is None:
            return self._blocks(x, matrix, out, out)
        total = self._blocks(x, matrix, out if table else f"{out}.q", f"{out}.q")
        if matrix.minima is not None:
            part, sums = out if bias is None else f"{out}.m", self._block_sums(x, matrix)
            if table:
                total = self.node("Gemm", [sums, self.tensor(f"{out}.minima", matrix.minima), total], part, transB=1)
            else:
                minima = self.tensor(f"{out}.minima_t", np.ascontiguousarray(matrix.minima.T))
                total = self.node("Gemm", [sums, minima, total], part)
        if bias is not None:
            total = self.node("Add", [total, self.tensor(f"{out}.bias", bias)], out)
        return total

    def _product(self, x: str, weight: str, bias: FloatArray | None, out: str) -> str:
        inputs = [x, weight] if bias is None else [x, weight, self.tensor(f"{out}.bias", bias)]
        return self.node("Gemm", inputs, out, transB=1)

    def _blocks(self, x: str, matrix: Quantized, name: str, out: str) -> str:
        """x @ matrix^T without its minima, whose tensors get that name."""
        outputs, inputs = matrix.shape
        return self.node(
            "MatMulNBits",
            [x, self.tensor(f"{name}.weight", matrix.packed), self.tensor(f"{name}.scales", matrix.scales)],
            out,
            domain=CONTRIB,
            K=inputs,
            N=outputs,
            bits=matrix.bits,
            block_size=matrix.block,
            accuracy_level=4 if self._int8_activations else 1,
        )

    def unpacked(self, matrix: Quantized, name: str, rows: str | None = None) -> str:
        """float32 [rows, inputs] = (q - half) * scale + minimum, the exact values of `Quantized.dense`: all rows, which
        the runtime folds when it loads, or those that the value `rows` picks at run time."""

        def part(key: str, values: Array) -> str:
            whole = self.tensor(f"{name}.{key}", values)
            return whole if rows is None else self.node("Gather", [whole, rows], f"{name}.{key}.picked")

        q = self.node("Cast", [part("weight", matrix.packed)], f"{name}.codes", to=TensorProto.FLOAT)
        if matrix.bits == 4:
            q = self._nibbles(q, matrix.block)
        half = self.tensor("half", np.array(1 << (matrix.bits - 1), dtype=np.float32))
        centred = self.node("Sub", [q, half], f"{name}.centred")
        x = self.node("Mul", [centred, self._column(part("scales", matrix.scales))], f"{name}.scaled")
        if matrix.minima is not None:
            x = self.node("Add", [x, self._column(part("minima", matrix.minima))], f"{name}.moved")
        shape = self.tensor(f"rows_of_{matrix.shape[1]}", np.array([-1, matrix.shape[1]], dtype=np.int64))
        return self.node("Reshape", [x, shape], f"{name}.unpacked")

    def _column(self, x: str) -> str:
        return self.node("Unsqueeze", [x, self.tensor("column_axis", np.array([-1], dtype=np.int64))], f"{x}.column")

    def _nibbles(self, codes: str, block: int) -> str:
        """float codes 0..255 [rows, blocks, block / 2] to [rows, blocks, block], the low half of a byte first."""
        sixteen = self.tensor("sixteen", np.array(16, dtype=np.float32))
        high = self.node("Floor", [self.node("Div", [codes, sixteen], f"{codes}.shifted")], f"{codes}.high")
        low = self.node("Sub", [codes, self.node("Mul", [high, sixteen], f"{codes}.high_part")], f"{codes}.low")
        both = self.node("Concat", [self._column(low), self._column(high)], f"{codes}.pairs", axis=-1)
        shape = self.tensor(f"codes_of_{block}", np.array([0, 0, block], dtype=np.int64))
        return self.node("Reshape", [both, shape], f"{codes}.unpacked")

    def _block_sums(self, x: str, matrix: Quantized) -> str:
        """Sums of x over each quantization block, [rows, blocks]; one for all matrices of that block that read x."""
        inputs, block = matrix.shape[1], matrix.block
        key = (x, block)
        if key not in self._sums:
            shape = self.tensor(f"blocks{inputs}x{block}", np.array([-1, inputs // block, block], dtype=np.int64))
            parts = self.node("Reshape", [x, shape], f"{x}.blocks{block}")
            axis = self.tensor("last_axis", np.array([2], dtype=np.int64))
            self._sums[key] = self.node("ReduceSum", [parts, axis], f"{x}.sums{block}", keepdims=0)
        return self._sums[key]

    def norm(self, x: str, scale: FloatArray | None, eps: float, out: str) -> str:
        """The RMS norm over the last axis; x itself if there is none."""
        if scale is None:
            return x
        inputs = [x, self.tensor(f"{out}.scale", scale)]
        return self.node("SimplifiedLayerNormalization", inputs, out, axis=-1, epsilon=eps, stash_type=1)

    def norm_groups(self, x: str, scale: FloatArray, eps: float, out: str) -> str:
        """The RMS norm over each run of `scale`'s length in the last axis; x [rows, n], so is the result."""
        shapes = {"groups": [0, -1, len(scale)], "flat": [0, -1]}
        groups, flat = (
            self.tensor(f"{name}_of_{len(scale)}", np.array(shape, dtype=np.int64)) for name, shape in shapes.items()
        )
        normed = self.norm(self.node("Reshape", [x, groups], f"{out}.groups"), scale, eps, f"{out}.normed")
        return self.node("Reshape", [normed, flat], out)

    def scaled(self, x: str, factor: float, out: str) -> str:
        """x * factor; x itself if the factor is 1."""
        return x if factor == 1 else self.node("Mul", [x, self._scalar(factor)], out)

    def capped(self, x: str, cap: float, out: str) -> str:
        """cap * tanh(x / cap); x itself if the cap is 0."""
        if cap == 0:
            return x
        part = self.node("Div", [x, self._scalar(cap)], f"{out}.part")
        return self.scaled(self.node("Tanh", [part], f"{out}.tanh"), cap, out)

    def _scalar(self, value: float) -> str:
        return self.tensor(f"scalar_{value!r}", np.array(value, dtype=np.float32))

    def gated(self, gate: str, up: str, activation: Activation, out: str) -> str:
        """activation(gate) * up."""
        if activation == "silu":
            active = self.node("QuickGelu", [gate], f"{out}.silu", domain=CONTRIB, alpha=1.0)
        else:
            active = self.node("Gelu", [gate], f"{out}.gelu", approximate="tanh")
        return self.node("Mul", [active, up], out)

    def rename(self, x: str, out: str) -> str:
        """The value x under the name of a graph output."""
        return x if x == out else self.node("Identity", [x], out)

    def save(self, path: Path) -> None:
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgewise")
        path.write_bytes(model.SerializeToString(deterministic=True))


class BlockWriter:
    """Writes the graphs of one model into a directory, so that the weights of one block at a time are in memory.

    `int8_activations` chooses the kernels of quantized matrices: activations rounded to int8 per block of 32, or kept
    float32."""

    def __init__(self, card: Card, directory: Path, *, int8_activations: bool) -> None:
        self.card = card
        self.directory = directory
        self._int8_activations = int8_activations

    def vocabulary(self, embed: Matrix, norm: FloatArray, head: Matrix | None) -> None:
        """`embed.onnx` and `head.onnx`; head None means that they share one table, stored once."""
        with DataFile(self.directory / "vocabulary.data") as data:
            self._embed(embed, data)
            self._head(norm, embed if head is None else head, data, shared=head is None)

    def _graph(self, name: str, data: DataFile) -> _Graph:
        return _Graph(name, data, int8_activations=self._int8_activations)

    def _embed(self, embed: Matrix, data: DataFile) -> None:
        g = self._graph("embed", data)
        ids = g.input("ids", TensorProto.INT64, ["rows"])
        g.output("hidden", TensorProto.FLOAT, ["rows", self.card.hidden])
        if isinstance(embed, Dense):
            picked = g.node("Gather", [g.tensor("embed.weight", embed.values), ids], "picked")
            rows = g.node("Cast", [picked], "rows", to=TensorProto.FLOAT)
        else:
            rows = g.unpacked(embed, "embed", rows=ids)
        g.rename(g.scaled(rows, self.card.embedding_scale, "scaled"), "hidden")
        g.save(self.directory / "embed.onnx")

    def _head(self, norm: FloatArray, head: Matrix, data: DataFile, *, shared: bool) -> None:
        g = self._graph("head", data)
        x = g.input("hidden", TensorProto.FLOAT, ["rows", self.card.hidden])
        g.output("logits", TensorProto.FLOAT, ["rows", self.card.vocab])
        normed = g.norm(x, norm, self.card.norm_eps, "normed")
        product = g.linear(normed, head, None, "embed" if shared else "head", table=shared)
        scaled = g.scaled(product, self.card.logit_scale, "scaled")
        g.rename(g.capped(scaled, self.card.logit_cap, "capped"), "logits")
        g.save(self.directory / "head.onnx")

    def block(self, number: int, first: int, layers: Sequence[Layer]) -> str:
        """Write layers `first`, `first + 1`, … as one graph; returns its file name."""
        name = f"block-{number:02d}"
        with DataFile(self.directory / f"{name}.data") as data:
            g = self._graph(name, data)
            x = g.input("hidden", TensorProto.FLOAT, ["rows", self.card.hidden])
            for common, kind, shape in self._position_inputs():
                g.input(common, kind, shape)
            for n, layer in enumerate(layers, first):
                x = self._layer(g, x, n, layer, last=n == first + len(layers) - 1)
            g.output("hidden_out", TensorProto.FLOAT, ["rows", self.card.hidden])
            g.save(self.directory / f"{name}.onnx")
        return f"{name}.onnx"

    def _position_inputs(self) -> list[tuple[str, int, list[int | str]]]:
        tables: list[tuple[str, int, list[int | str]]] = [
            (f"{prefix}{table}", TensorProto.FLOAT, ["positions", len(rope.inverse_frequencies)])
            for prefix, rope in self.card.ropes.items()
            for table in ("cos", "sin")
        ]
        return [("last_position", TensorProto.INT32, [1]), ("length", TensorProto.INT32, []), *tables]

    def _layer(self, g: _Graph, x: str, n: int, layer: Layer, *, last: bool) -> str:
        card, at = self.card, f"layer{n}"
        eps, scale = card.norm_eps, card.residual_scale
        attended = self._attention(g, g.norm(x, layer.attention_norm, eps, f"{at}.attention_norm"), n, layer)
        attended = g.norm(attended, layer.attention_out_norm, eps, f"{at}.attention_out_norm")
        x = g.node("Add", [x, g.scaled(attended, scale, f"{at}.attention_scaled")], f"{at}.attended")
        fed = self._feed_forward(g, g.norm(x, layer.ffn_norm, eps, f"{at}.ffn_norm"), at, layer)
        fed = g.norm(fed, layer.ffn_out_norm, eps, f"{at}.ffn_out_norm")
        return g.node("Add", [x, g.scaled(fed, scale, f"{at}.ffn_scaled")], "hidden_out" if last else f"{at}.out")

    def _attention(self, g: _Graph, x: str, n: int, layer: Layer) -> str:
        card, at = self.card, f"layer{n}"
        parts = self._qkv(g, x, at, layer)
        if layer.qk_norm is not None:
            parts = self._norm_qk(g, parts, at, layer.qk_norm)
        batch = g.tensor("batch_axis", np.array([0], dtype=np.int64))
        qkv = [g.node("Unsqueeze", [part, batch], f"{part}.batch") if part else "" for part in parts]
        kv_shape: list[int | str] = [1, card.kv_heads, "capacity", card.head_dim]
        past = [g.input(f"past_{which}_{n}", TensorProto.FLOAT, kv_shape) for which in ("key", "value")]
        present = [g.output(f"present_{which}_{n}", TensorProto.FLOAT, kv_shape) for which in ("key", "value")]
        rope = card.rope_of(n)
        turning = [] if rope is None else [f"{rope}cos", f"{rope}sin"]
        mixed = g.node(
            "GroupQueryAttention",
            [*qkv, *past, "last_position", "length", *turning],
            f"{at}.mixed",
            *present,
            domain=CONTRIB,
            **self._attention_attributes(n),
        )
        return g.linear(g.node("Squeeze", [mixed, batch], f"{at}.rows"), layer.o, layer.o_bias, f"{at}.o")

    def _attention_attributes(self, n: int) -> dict[str, Any]:
        card = self.card
        scale = {} if card.attention_scale is None else {"scale": card.attention_scale}
        return {
            "num_heads": card.heads,
            "kv_num_heads": card.kv_heads,
            "do_rotary": int(card.rope_of(n) is not None),
            "rotary_interleaved": 0,
            "local_window_size": card.window(n) or -1,
            "softcap": card.attention_cap,
            **scale,
        }

    def _norm_qk(self, g: _Graph, parts: list[str], at: str, scales: tuple[FloatArray, FloatArray]) -> list[str]:
        """q, k and v, split if they are one product, with q and k normalized (the CPU kernel of the attention node has
        no norm of its own)."""
        if not parts[1]:
            parts = self._split_qkv(g, parts[0], at)
        q, k, v = parts
        eps = self.card.norm_eps
        return [g.norm_groups(q, scales[0], eps, f"{at}.q_norm"), g.norm_groups(k, scales[1], eps, f"{at}.k_norm"), v]

    def _split_qkv(self, g: _Graph, qkv: str, at: str) -> list[str]:
        heads = (self.card.heads, self.card.kv_heads, self.card.kv_heads)
        sizes = g.tensor("qkv_sizes", np.array(heads, dtype=np.int64) * self.card.head_dim)
        names = [f"{at}.{name}" for name in "qkv"]
        g.node("Split", [qkv, sizes], names[0], *names[1:], axis=1)
        return names

    def _qkv(self, g: _Graph, x: str, at: str, layer: Layer) -> list[str]:
        """One fused product where q, k and v are of one kind, else three."""
        fused = stack([layer.q, layer.k, layer.v])
        if fused is not None:
            bias = None if layer.qkv_bias is None else np.concatenate(layer.qkv_bias)
            return [g.linear(x, fused, bias, f"{at}.qkv"), "", ""]
        biases = layer.qkv_bias or (None, None, None)
        return [
            g.linear(x, matrix, bias, f"{at}.{name}")
            for name, matrix, bias in zip("qkv", (layer.q, layer.k, layer.v), biases, strict=True)
        ]

    def _feed_forward(self, g: _Graph, x: str, at: str, layer: Layer) -> str:
        gate, up = self._gate_up(g, x, at, layer)
        gated = g.gated(gate, up, self.card.activation, f"{at}.gated")
        return g.linear(gated, layer.down, layer.down_bias, f"{at}.down")

    def _gate_up(self, g: _Graph, x: str, at: str, layer: Layer) -> tuple[str, str]:
        fused = stack([layer.gate, layer.up])
        if fused is not None:
            bias = None if layer.gate_up_bias is None else np.concatenate(layer.gate_up_bias)
            both = g.linear(x, fused, bias, f"{at}.gate_up")
            g.node("Split", [both], f"{at}.gate", f"{at}.up", axis=1, num_outputs=2)
            return f"{at}.gate", f"{at}.up"
        gate_bias, up_bias = layer.gate_up_bias or (None, None)
        return g.linear(x, layer.gate, gate_bias, f"{at}.gate"), g.linear(x, layer.up, up_bias, f"{at}.up")
