"""From the bytes of a text to n-grams, inside an ONNX graph, so that a classifier's file needs no tokenizer beside it.

A text is UTF-8, one row of bytes filled up with zeros. Letters (of either case), digits, apostrophes and all bytes
above 127 make words, whatever else parts them. Of each word it looks at the runs of three, four and five of its letters
(its two ends are letters too), at the word itself, at the word before it, and at the one before that. Each of these
n-grams is a number modulo the prime 2^31 - 1 (Karp and Rabin's polynomial of its letters), which picks one of SLOTS,
and a slot has a row of the classifier's table, or none. No step leaves 63 bits, so every runtime counts the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgewise.errors import UsageError
from edgewise.types import FloatArray

Ints = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32]

TEXT: Final = "text"
LOGITS: Final = "logits"
OPSET: Final = 21
IR_VERSION: Final = 10
PRIME: Final = (1 << 31) - 1
BASE: Final = 1_103_515_245
SLOTS: Final = 1 << 17
MOST_BYTES: Final = 512  # of a text; what is beyond them counts for nothing
MOST_WORDS: Final = 64
LENGTHS: Final = (3, 4, 5)
PAIR, SKIP = 718_281_828, 577_215_664
SPREAD: Final = (*(314_159_265, 161_803_398, 141_421_356), 271_828_182, 173_205_080, 223_606_797)  # a kind's own
TOGETHER: Final = 256  # texts at once: what a word is costs memory of words times bytes
LEAST: Final = 2  # texts that must hold an n-gram before it gets a row


def as_bytes(texts: Sequence[str]) -> npt.NDArray[np.uint8]:
    """What a classifier's file takes as `text`: uint8 [texts, bytes], zeros behind the shorter ones. A character that
    lies across the last of MOST_BYTES loses its end, as it does in the graph."""
    raw = [text.encode("utf-8", "replace")[:MOST_BYTES] for text in texts]
    found = np.zeros((len(raw), max(1, *map(len, raw)) if raw else 1), np.uint8)
    for row, data in zip(found, raw, strict=True):
        row[: len(data)] = np.frombuffer(data, np.uint8)
    return found


@dataclass(frozen=True)
class NGrams:
    """Which n-grams have a row of the table: `rows` int16 [SLOTS + 1], 0 for those that have none (the last slot is
    that of no n-gram at all)."""

    rows: npt.NDArray[np.int16]

    @property
    def count(self) -> int:
        """Rows of the table, the empty one included."""
        return int(self.rows.max()) + 1

    @staticmethod
    def chosen(texts: Sequence[str], labels: npt.ArrayLike, count: int) -> NGrams:
        """The `count` n-grams that say most of the labels, int [texts], from 0 on: those with the greatest number of
        texts times the divergence of their labels from all labels. UsageError for no texts, labels that do not fit
        them, or a count that no table can have."""
        wanted = np.asarray(labels)
        if not len(texts) or wanted.shape != (len(texts),) or wanted.min() < 0 or not 1 <= count < 1 << 15:
            raise UsageError(
                f"{len(texts)} texts, labels of the shape {list(wanted.shape)} and {count} n-grams were given; allowed "
                f"are 1 text or more, one label from 0 on for each, and 1 to {(1 << 15) - 1} n-grams"
            )
        held = np.zeros((SLOTS + 1, int(wanted.max()) + 1), np.float32)
        for found, label in zip(_slots(texts), wanted, strict=True):
            held[np.unique(found), label] += 1
        held[SLOTS] = 0
        says = _says(held, np.bincount(wanted, minlength=held.shape[1]))
        best = np.sort(np.argsort(-says, kind="stable")[: min(count, int((says > 0).sum()))])
        rows = np.zeros(SLOTS + 1, np.int16)
        rows[best] = np.arange(1, len(best) + 1)
        return NGrams(rows)

    def of(self, texts: Sequence[str]) -> Rows:
        """The rows of each text's n-grams, int32 [texts, most], zeros behind them."""
        found = [row[row > 0] for row in (self.rows[slots] for slots in _slots(texts))]
        made = np.zeros((len(found), max(1, *map(len, found)) if found else 1), np.int32)
        for row, values in zip(made, found, strict=True):
            row[: len(values)] = values
        return made


def _says(held: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Of each slot, held by so many texts of each label [slots, labels]: nats that it says of them all."""
    total = held.sum(axis=1)
    expected = np.outer(total, labels / labels.sum())
    ratio = np.divide(held, expected, out=np.ones_like(expected), where=held > 0)
    says: npt.NDArray[np.float64] = (held * np.log(ratio)).sum(axis=1)
    return np.where(total >= LEAST, says, 0.0)


def _slots(texts: Sequence[str]) -> list[Ints]:
    """The slots of each text's n-grams, SLOTS among them for nothing."""
    nodes = Nodes()
    made = _model(nodes, nodes.named("slots", slots(nodes)), TensorProto.INT64, ["batch", "n-grams"])
    counted = ReferenceEvaluator(made)
    found: list[Ints] = []
    for start in range(0, len(texts), TOGETHER):
        (rows,) = cast(list[Ints], counted.run(None, {TEXT: as_bytes(texts[start : start + TOGETHER])}))
        found += list(rows)
    return found


# The graph


class Nodes:
    """Nodes and constants of a graph in the making; each node has one output, named by its operator."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[bytes, onnx.TensorProto] = {}

    def __call__(self, operator: str, *inputs: str | npt.ArrayLike, **attributes: Any) -> str:
        """Add a node. What is no name is a constant; lists of whole numbers are int64."""
        names = [one if isinstance(one, str) else self._constant(np.asarray(one)) for one in inputs]
        made = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, names, [made], **attributes))
        return made

    def named(self, name: str, value: str) -> str:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        return name

    def _constant(self, value: npt.NDArray[Any]) -> str:
        key = repr((value.dtype.str, value.shape)).encode() + value.tobytes()
        if key not in self.stored:
            self.stored[key] = numpy_helper.from_array(value, f"constant_{len(self.stored)}")
        return str(self.stored[key].name)


def slots(do: Nodes) -> str:
    """From TEXT to the slots of all n-grams, int64 [batch, n-grams]; SLOTS where there is none."""
    letters = do("Gather", _letters(), do("Cast", do("Slice", TEXT, [0], [MOST_BYTES], [1]), to=TensorProto.INT32))
    padded = do("Pad", letters, [0, 1, 0, LENGTHS[-1] - 1])
    words = _words(do, letters, padded)
    before = do("Slice", do("Pad", words, [0, 1, 0, 0], np.int64(1)), [0], [-1], [1])
    second = do("Slice", words, [2], [MOST_WORDS], [1])
    kinds = [
        *_runs(do, padded),
        (words, words),
        (_add(do, do("Mul", before, [PAIR]), words), words),
        (_add(do, do("Mul", do("Slice", words, [0], [-2], [1]), [SKIP]), second), second),
    ]
    found = []
    for (number, there), spread in zip(kinds, SPREAD, strict=True):
        slot = do("Mod", do("Mod", do("Mul", number, [spread]), [PRIME]), [SLOTS])
        found.append(do("Where", do("Equal", there, [0]), [SLOTS], slot))
    return do("Concat", *found, axis=1)


def _letters() -> Ints:
    """The number of each byte's letter, 0 for what parts words."""
    found = np.zeros(256, np.int64)
    for number, letter in enumerate(b"abcdefghijklmnopqrstuvwxyz0123456789'", 1):
        found[letter] = found[ord(chr(letter).upper())] = number
    found[128:] = np.arange(128) + 38
    return found


def _powers(base: int, count: int) -> Ints:
    return np.array([pow(base, exponent, PRIME) for exponent in range(count)], np.int64)


def _runs(do: Nodes, padded: str) -> list[tuple[str, str]]:
    """For each of LENGTHS the numbers of all runs of letters, and what is 0 where there is none: where something else
    than a letter stands between its ends."""
    widest = LENGTHS[-1]
    ends = [[place - widest + 1] if place < widest - 1 else [PRIME] for place in range(widest)]
    columns = [do("Slice", padded, [place], end, [1]) for place, end in enumerate(ends)]
    found = []
    number, inside = do("Add", columns[0], do("Mul", columns[1], [BASE])), columns[1]
    for length in LENGTHS:
        power = int(_powers(BASE, length)[-1])
        number = do("Add", number, do("Mul", columns[length - 1], [power]))
        found.append((do("Mod", number, [PRIME]), inside))
        inside = do("Mul", inside, do("Min", columns[length - 1], [1]))
    return found


def _words(do: Nodes, letters: str, padded: str) -> str:
    """The numbers of the first MOST_WORDS words, int64 [batch, MOST_WORDS], 0 behind the last."""
    count = do("Slice", do("Shape", letters), [1], [2])
    powers = do("Slice", _powers(BASE, MOST_BYTES), [0], count)
    places = do("Slice", np.arange(MOST_BYTES), [0], count)
    earlier = do("Slice", padded, [0], [-LENGTHS[-1]], [1])
    starts = do("Mul", do("Min", letters, [1]), do("Sub", [1], do("Min", earlier, [1])))
    number = do("Unsqueeze", do("CumSum", starts, np.int64(1)), [1])
    mine = do("Cast", do("Equal", number, np.arange(1, MOST_WORDS + 1)[None, :, None]), to=TensorProto.INT64)
    sums = do("ReduceSum", do("Mul", mine, do("Unsqueeze", do("Mul", letters, powers), [1])), [2], keepdims=0)
    first = do("ReduceSum", do("Mul", mine, do("Unsqueeze", do("Mul", starts, places), [1])), [2], keepdims=0)
    back = do("Gather", _powers(pow(BASE, -1, PRIME), MOST_BYTES), first)  # a word counts the same wherever it stands
    return do("Mod", do("Mul", do("Mod", sums, [PRIME]), back), [PRIME])


def _add(do: Nodes, left: str, right: str) -> str:
    return do("Mod", do("Add", left, right), [PRIME])


# The file


@dataclass(frozen=True)
class Weights:
    """Of a classifier: table [rows, width], of which row 0 counts as zeros, then layers of [inputs, outputs] and
    [outputs], a ReLU between them. All float32."""

    table: FloatArray
    layers: Sequence[tuple[FloatArray, FloatArray]]


def write(path: Path, ngrams: NGrams, weights: Weights) -> int:
    """A classifier's file: TEXT uint8 [batch, bytes] to LOGITS float32 [batch, classes]. The table is int8 with a scale
    for each row, the layers are float16. Returns its bytes. OSError if it cannot be written."""
    do = Nodes()
    vectors = np.concatenate([np.zeros_like(weights.table[:1]), weights.table[1:]])
    scales = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), 1e-12) / 127
    rows = do("Cast", do("Gather", ngrams.rows, slots(do)), to=TensorProto.INT32)
    table = do("Gather", np.round(vectors / scales).astype(np.int8), rows)
    scale = do("Gather", scales.astype(np.float32), rows)
    summed = do("ReduceSum", do("Mul", do("Cast", table, to=TensorProto.FLOAT), scale), [1], keepdims=0)
    there = do("Cast", do("Min", rows, np.array([1], np.int32)), to=TensorProto.FLOAT)
    count = do("Max", do("ReduceSum", there, [1]), np.array([1], np.float32))
    value = do("Div", summed, do("Sqrt", count))
    for place, (matrix, bias) in enumerate(weights.layers):
        value = do("Relu", value) if place else value
        value = do("MatMul", value, do("Cast", matrix.astype(np.float16), to=TensorProto.FLOAT))
        value = do("Add", value, bias.astype(np.float32))
    classes = len(weights.layers[-1][1])
    model = _model(do, do.named(LOGITS, value), TensorProto.FLOAT, ["batch", classes])
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    path.write_bytes(data)
    return len(data)


def _model(do: Nodes, output: str, kind: int, axes: Sequence[str | int]) -> onnx.ModelProto:
    graph = helper.make_graph(
        do.nodes,
        "text classifier",
        [helper.make_tensor_value_info(TEXT, TensorProto.UINT8, ["batch", "bytes"])],
        [helper.make_tensor_value_info(output, kind, axes)],
        list(do.stored.values()),
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="edgewise"
    )
