"""ONNX graphs written anew."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

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
