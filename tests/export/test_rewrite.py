"""ONNX graphs written anew."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from edgewise.errors import UsageError
from edgewise.export.targets.onnx import rewrite

MASKED: Final = """
<ir_version: 8, opset_import: ["" : 17]>
masked (float[N, 4] x, bool[N, 4] seen) => (float[N, 4] y, float[N, 4] z)
<float zero = {0.0}>
{
  mask = Where(seen, zero, least)  scores = Add(x, mask)  y = Softmax(scores)  z = Max(x, least)
}
"""


def test_a_mask_is_raised_and_others_keep_what_it_was_made_of() -> None:
    model = onnx.parser.parse_model(MASKED)
    least = np.float32(np.finfo(np.float32).min)
    model.graph.initializer.append(numpy_helper.from_array(np.array(least), "least"))
    before = model.SerializeToString()
    found = rewrite.tamed(model)
    assert model.SerializeToString() == before
    stored = {one.name: float(numpy_helper.to_array(one)) for one in found.graph.initializer}
    where, most = (next(node for node in found.graph.node if node.op_type == op) for op in ("Where", "Max"))
    assert stored[where.input[2]] == rewrite.MASK
    assert stored[most.input[1]] == least
    assert all(node.name for node in found.graph.node)


def test_nodes_keep_their_order_but_where_they_need_one_that_comes_later() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 4] x) => (float[N, 4] y)
        { a = Relu(x)  b = Neg(a)  c = Abs(x)  d = Add(b, late)  late = Exp(c)  y = Add(d, a) }
    """)
    found = rewrite.ordered(model)
    assert [node.output[0] for node in found.graph.node] == ["a", "b", "c", "late", "d", "y"]


@pytest.mark.parametrize("text", ["a = Relu(b)  b = Neg(a)  y = Abs(x)", "a = Relu(x)  a = Neg(a)  y = Abs(a)"])
def test_what_has_no_order_is_no_endless_work(text: str) -> None:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net (float[N, 4] x) => (float[N, 4] y) {{ {text} }}'
    )
    with pytest.raises(AssertionError, match="two nodes make one tensor"):
        rewrite.ordered(model)


def stored(model: onnx.ModelProto) -> set[float]:
    return {float(numpy_helper.to_array(one).min()) for one in model.graph.initializer}


@pytest.mark.parametrize(
    "text",
    [
        "s = Mul(x, low)  y = Softmax(s)",  # a temperature
        "m = Mul(x, low)  z = Exp(m)  s = Add(x, m)  y = Softmax(s)",  # a mask that something else takes
        "z = Mul(x, low)  s = Add(x, z)  y = Softmax(s)",  # and one that is an output
    ],
)
def test_what_is_no_mask_alone_keeps_its_numbers(text: str) -> None:
    second = ", float[N, 4] z" if " z " in f" {text}" else ""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net (float[N, 4] x) => (float[N, 4] y{second}) '
        f"<float low = {{-20000.0}}> {{ {text} }}"
    )
    assert stored(rewrite.tamed(model)) == {-20000.0}
    mask = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[N, 4] x, float[N, 4] k) => (float[N, 4] y) '
        "<float low = {-20000.0}> { m = Mul(k, low)  s = Add(x, m)  y = Softmax(s) }"
    )
    assert stored(rewrite.tamed(mask)) == {rewrite.MASK}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("w = DequantizeLinear(q, one)  y = MatMul(x, w)", "1 DequantizeLinear"),
        ("y = com.microsoft.DynamicQuantizeMatMul(x, q, one)", "1 DynamicQuantizeMatMul"),
        ("p = DequantizeLinear(i, one)  s = Add(x, p)  y = MatMul(s, f)", None),  # pixels that come as integers
    ],
)
def test_a_network_that_rounds_already_is_told_from_one_with_whole_inputs(text: str, said: str | None) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> '
        "net (float[N, 2] x, uint8[N, 2] i) => (float[N, 2] y) "
        f"<float one = {{1.0}}, int8[2, 2] q = {{1, 2, 3, 4}}, float[2, 2] f = {{1, 2, 3, 4}}> {{ {text} }}"
    )
    if said is None:
        rewrite.check_float(model)
        return
    with pytest.raises(UsageError, match=said):
        rewrite.check_float(model)
