"""ONNX files cut in two: what belongs together, what crosses, and that nothing changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgewise.engines.onnx_part import OnnxPart
from edgewise.errors import SourceError, UnsupportedModel, UsageError
from edgewise.models.graph import Graph, Halves

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RANDOM = np.random.default_rng(0)

node = helper.make_node
info = helper.make_tensor_value_info


def model(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], **weights: np.ndarray) -> Any:
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "net", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def weights(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def residual() -> Any:
    """`image` [batch, 3, 8, 8]: a convolution, and another with a skip around it; then a mean and five classes."""
    nodes = [
        node("Conv", ["image", "k1"], ["c1"], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "k2"], ["c2"], pads=[1, 1, 1, 1]),
        node("Add", ["c2", "r1"], ["sum"]),
        node("GlobalAveragePool", ["sum"], ["mean"]),
        node("Flatten", ["mean"], ["flat"]),
        node("MatMul", ["flat", "head"], ["line"]),
        node("Add", ["line", "bias"], ["logits"]),
    ]
    batch = info("image", FLOAT, ["batch", 3, 8, 8])
    stored = {"k1": weights(4, 3, 3, 3), "k2": weights(4, 4, 3, 3), "head": weights(4, 5), "bias": weights(5)}
    return model(nodes, [batch], [info("logits", FLOAT, ["batch", 5])], **stored)


def answers(halves: Halves, inputs: dict[str, np.ndarray], *, plain: bool = True) -> dict[str, np.ndarray]:
    """What the halves make of the inputs, one after the other."""
    known = dict(inputs)
    for half in (halves.front, halves.back):
        if half is not None:
            onnx.checker.check_model(half, full_check=True)
            known |= OnnxPart(half, plain=plain).run(known)
    return {name: known[name] for name in (*halves.early, *halves.late)}


def whole(graph: Graph, inputs: dict[str, np.ndarray], *, plain: bool = True) -> dict[str, np.ndarray]:
    return answers(graph.halves(frozenset()), inputs, plain=plain)


def same_everywhere(graph: Graph, inputs: dict[str, np.ndarray]) -> int:
    """Every cut gives the bits of the uncut file; how many cuts there are."""
    expected = whole(graph, inputs)
    cuts = list(graph.chain(widest=99))
    for edge, _ in cuts:
        found = answers(graph.halves(edge), inputs)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].tobytes() == value.tobytes(), (edge, name)
    return len(cuts)


IMAGES = weights(2, 3, 8, 8)


# Units and tensors


def test_what_is_fused_stays_together() -> None:
    graph = Graph.of(residual(), name="net")
    assert [unit.operators for unit in graph.units] == [
        ("Conv", "Relu"),
        ("Conv",),
        ("Add",),
        ("GlobalAveragePool", "Flatten"),
        ("MatMul", "Add"),
    ]
    assert [unit.reads for unit in graph.units] == [("image",), ("r1",), ("c2", "r1"), ("sum",), ("flat",)]


def test_tensors_know_who_reads_them_and_what_they_weigh() -> None:
    tensors = Graph.of(residual(), name="net").tensors
    skipped = tensors["r1"]
    assert (skipped.producer, skipped.readers, skipped.shape, skipped.raw_bytes) == (0, (1, 2), (1, 4, 8, 8), 1024)
    assert tensors["image"].producer is None
    assert tensors["logits"].readers == ()


def test_shapes_may_be_given() -> None:
    assert Graph.of(residual(), name="net", shapes={"image": [7, 3, 8, 8]}).tensors["sum"].shape == (7, 4, 8, 8)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"picture": [1]}, "net has no input 'picture'; it takes image"),
        ({"image": [1, 3]}, r"the shape \[1, 3\] of 'image' has 2 axes; net takes 4"),
        ({"image": [1, 4, 8, 8]}, "axis 1 of 'image' has 3 places; 4 was given"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, list[int]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Graph.of(residual(), name="net", shapes=shapes)


def test_other_free_axes_must_be_given() -> None:
    free = model(
        [node("Relu", ["x"], ["y"])], [info("x", FLOAT, ["batch", "time"])], [info("y", FLOAT, ["batch", "time"])]
    )
    with pytest.raises(UnsupportedModel, match=r"axis 1 of the input 'x' of net is dynamic \(say how long it is"):
        Graph.of(free, name="net")
    assert Graph.of(free, name="net", shapes={"x": [1, 9]}).tensors["y"].shape == (1, 9)


# Cuts


def test_a_skip_crosses_beside_the_main_path() -> None:
    graph = Graph.of(residual(), name="net")
    assert [(len(edge), crossing) for edge, crossing in graph.chain()] == [
        (0, ("image",)),
        (1, ("r1",)),
        (2, ("r1", "c2")),
        (3, ("sum",)),
        (4, ("flat",)),
        (5, ()),
    ]
    assert [crossing for _, crossing in graph.chain(widest=1)] == [("image",), ("r1",), ("sum",), ("flat",), ()]
    assert graph.before(["sum"]) == {0, 1, 2}
    assert graph.before(["image"]) == frozenset()


def test_all_cuts_of_a_net_with_a_skip_change_no_bit() -> None:
    assert same_everywhere(Graph.of(residual(), name="net"), {"image": IMAGES}) == 6


def test_optimised_halves_differ_by_rounding_alone() -> None:
    graph = Graph.of(residual(), name="net")
    expected = whole(graph, {"image": IMAGES}, plain=False)["logits"]
    for edge, _ in graph.chain():
        found = answers(graph.halves(edge), {"image": IMAGES}, plain=False)["logits"]
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_halves_take_any_number_of_rows() -> None:
    graph = Graph.of(residual(), name="net")
    found = answers(graph.halves(frozenset({0, 1})), {"image": weights(5, 3, 8, 8)})
    assert found["logits"].shape == (5, 5)


def test_a_cut_goes_one_way() -> None:
    graph = Graph.of(residual(), name="net")
    with pytest.raises(UsageError, match=r"unit 2 \(sum\) reads 'c2' of unit 1, which is not on the edge"):
        graph.halves(frozenset({0, 2}))
    with pytest.raises(UsageError, match="there is no unit 9; net has 0 to 4"):
        graph.crossing({9})
    with pytest.raises(UsageError, match="net has no tensor 'nothing' to cut at"):
        graph.before(["nothing"])


def test_each_half_carries_its_own_weights_alone() -> None:
    halves = Graph.of(residual(), name="net").halves(frozenset({0}))
    assert halves.front is not None
    assert halves.back is not None
    assert [one.name for one in halves.front.graph.initializer] == ["k1"]
    assert sorted(one.name for one in halves.back.graph.initializer) == ["bias", "head", "k2"]


def test_tensors_inside_can_be_looked_at() -> None:
    graph = Graph.of(residual(), name="net")
    found = OnnxPart(graph.exposed(["sum", "logits", "image"]), plain=True).run({"image": IMAGES})
    assert list(found) == ["logits", "sum"]
    assert found["sum"].shape == (2, 4, 8, 8)
    assert found["logits"].tobytes() == whole(graph, {"image": IMAGES})["logits"].tobytes()


def test_outputs_in_the_middle_come_early() -> None:
    made = residual()
    made.graph.output.append(info("r1", FLOAT, ["batch", 4, 8, 8]))
    graph = Graph.of(made, name="net")
    halves = graph.halves(frozenset({0, 1}))
    assert (halves.early, halves.late, halves.crossing) == (("r1",), ("logits",), ("r1", "c2"))
    assert same_everywhere(graph, {"image": IMAGES}) == 6


def test_an_input_that_both_sides_read_crosses() -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Tanh", ["y"], ["z"]), node("Add", ["z", "x"], ["s"])]
    made = model(nodes, [info("x", FLOAT, ["n", 4])], [info("s", FLOAT, ["n", 4])], w=weights(4, 4))
    graph = Graph.of(made, name="net")
    assert graph.crossing({0}) == ("x", "z")
    assert same_everywhere(graph, {"x": weights(3, 4)}) == 3


# What is odd about a graph


def test_constants_belong_to_both_sides() -> None:
    """A weight that two nodes read, one that is computed from weights, a Constant node, and an output that is one."""
    nodes = [
        node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32(2))),
        node("Mul", ["w", "two"], ["double"]),
        node("MatMul", ["x", "double"], ["a"]),
        node("MatMul", ["a", "double"], ["b"]),
        node("MatMul", ["b", "w"], ["c"]),
        node("Identity", ["double"], ["shown"]),
    ]
    outputs = [info("c", FLOAT, ["n", 4]), info("shown", FLOAT, [4, 4])]
    graph = Graph.of(model(nodes, [info("x", FLOAT, ["n", 4])], outputs, w=weights(4, 4)), name="net")
    assert [unit.operators for unit in graph.units] == [("MatMul",)] * 3
    assert same_everywhere(graph, {"x": weights(3, 4)}) == 4
    assert graph.halves(frozenset({0})).late == ("c", "shown")


def test_nodes_that_no_output_needs_are_left_out() -> None:
    made = residual()
    made.graph.node.append(node("Tanh", ["sum"], ["nobody"]))
    assert same_everywhere(Graph.of(made, name="net"), {"image": IMAGES}) == 6


def test_random_numbers_are_drawn_once() -> None:
    nodes = [
        node("RandomNormal", [], ["noise"], shape=[1, 4]),
        node("Add", ["x", "noise"], ["a"]),
        node("Add", ["a", "noise"], ["b"]),
    ]
    graph = Graph.of(model(nodes, [info("x", FLOAT, [1, 4])], [info("b", FLOAT, [1, 4])]), name="net")
    assert [unit.operators for unit in graph.units] == [("RandomNormal",), ("Add",), ("Add",)]
    assert graph.crossing({0, 1}) == ("noise", "a")


def test_shapes_computed_on_the_way_cross_exactly() -> None:
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("MatMul", ["x", "w"], ["y"]),
        node("Transpose", ["y"], ["turned"], perm=[1, 0]),
        node("Reshape", ["turned", "shape"], ["z"]),
    ]
    graph = Graph.of(
        model(nodes, [info("x", FLOAT, ["n", 4])], [info("z", FLOAT, ["n", 4])], w=weights(4, 4)), name="net"
    )
    assert graph.crossing({0, 1}) == ("shape", "y")
    assert graph.tensors["shape"].dtype == np.int64
    assert same_everywhere(graph, {"x": weights(3, 4)}) == 5


def quantized() -> Any:
    """Two convolutions between QuantizeLinear and DequantizeLinear, as quantizers write them, with a skip."""
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["k1q", "s", "kz"], ["k1"]),
        node("Conv", ["xd", "k1"], ["c1"], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("QuantizeLinear", ["r1", "s", "z"], ["r1q"]),
        node("DequantizeLinear", ["r1q", "s", "z"], ["r1d"]),
        node("DequantizeLinear", ["k2q", "s", "kz"], ["k2"]),
        node("Conv", ["r1d", "k2"], ["c2"], pads=[1, 1, 1, 1]),
        node("Add", ["c2", "r1d"], ["sum"]),
    ]
    stored = {
        "s": np.float32(0.05),
        "z": np.uint8(128),
        "kz": np.int8(0),
        "k1q": RANDOM.integers(-9, 9, (3, 3, 3, 3), np.int8),
        "k2q": RANDOM.integers(-9, 9, (3, 3, 3, 3), np.int8),
    }
    shape = ["n", 3, 6, 6]
    return model(
        nodes, [info("x", FLOAT, shape)], [info("sum", FLOAT, shape)], **{k: np.asarray(v) for k, v in stored.items()}
    )


def test_cuts_of_a_quantized_net_carry_bytes() -> None:
    graph = Graph.of(quantized(), name="net")
    assert [unit.operators for unit in graph.units] == [
        ("QuantizeLinear",),
        ("Conv", "Relu", "QuantizeLinear"),
        ("Conv",),
        ("Add",),
    ]
    assert [crossing for _, crossing in graph.chain()] == [("x",), ("xq",), ("r1q",), ("r1q", "c2"), ()]
    assert graph.tensors["r1q"].dtype == np.uint8
    assert same_everywhere(graph, {"x": weights(2, 3, 6, 6)}) == 5


def branching() -> Any:
    """An If whose bodies read a tensor from around them, and a weight."""
    bodies = {
        name: helper.make_graph([node(op, ["y", "w"], [name])], name, [], [info(name, FLOAT, ["n", 4])])
        for name, op in (("then", "MatMul"), ("else", "Add"))
    }
    nodes = [
        node("MatMul", ["x", "w"], ["y"]),
        node("ReduceSum", ["y"], ["total"], keepdims=0),
        node("Greater", ["total", "zero"], ["positive"]),
        node("If", ["positive"], ["z"], then_branch=bodies["then"], else_branch=bodies["else"]),
        node("MatMul", ["z", "w"], ["out"]),
    ]
    stored = {"w": weights(4, 4), "zero": np.float32(0)}
    return model(
        nodes,
        [info("x", FLOAT, ["n", 4])],
        [info("out", FLOAT, ["n", 4])],
        **{k: np.asarray(v) for k, v in stored.items()},
    )


def test_bodies_stay_whole_and_what_they_read_crosses() -> None:
    graph = Graph.of(branching(), name="net")
    assert graph.crossing(graph.before(["positive"])) == ("y", "positive")
    for x in (weights(4, 4), -weights(4, 4)):
        assert same_everywhere(graph, {"x": x}) == 6


def test_what_is_no_tensor_of_numbers_does_not_cross() -> None:
    nodes = [
        node("SequenceConstruct", ["x", "x"], ["list"]),
        node("SequenceAt", ["list", "one"], ["y"]),
        node("Tanh", ["y"], ["z"]),
    ]
    stored = {"one": np.asarray(np.int64(1))}
    graph = Graph.of(model(nodes, [info("x", FLOAT, [1, 4])], [info("z", FLOAT, [1, 4])], **stored), name="net")
    assert [crossing for _, crossing in graph.chain()] == [("x",), ()]
    with pytest.raises(UnsupportedModel, match="'list' of net has no known type of numbers and cannot cross"):
        graph.halves(frozenset({0}))


@settings(max_examples=60)
@given(st.data())
def test_any_closed_set_of_any_graph_changes_no_bit(data: st.DataObject) -> None:
    """Random graphs of units with one or two inputs each; random closed sets, not only those of the file's order."""
    count = data.draw(st.integers(1, 9))
    names = ["x"]
    nodes = []
    for number in range(count):
        kind = data.draw(st.sampled_from(["Tanh", "MatMul", "Add", "Sub", "Mul"]))
        first = data.draw(st.sampled_from(names))
        second = "w" if kind == "MatMul" else data.draw(st.sampled_from([*names, "w"]))
        nodes.append(node(kind, [first] if kind == "Tanh" else [first, second], [f"t{number}"]))
        names.append(f"t{number}")
    outputs = data.draw(st.sets(st.sampled_from(names[1:]), min_size=1))
    made = model(
        nodes, [info("x", FLOAT, [4, 4])], [info(n, FLOAT, [4, 4]) for n in sorted(outputs)], w=weights(4, 4) / 4
    )
    graph = Graph.of(made, name="net")
    x = {"x": weights(4, 4)}
    cut = graph.before(data.draw(st.sets(st.sampled_from(sorted(graph.tensors)))))
    expected = whole(graph, x)
    found = answers(graph.halves(cut), x)
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in expected.items()
    }


# Files


def test_a_file_is_read_with_the_weights_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(residual(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    graph = Graph.open(path)
    assert graph.name == "net"
    expected = whole(Graph.of(residual(), name="other"), {"image": IMAGES})
    assert whole(graph, {"image": IMAGES})["logits"].shape == expected["logits"].shape


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x0a", onnx.ModelProto(ir_version=10).SerializeToString()])
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(SourceError):
        Graph.open(path)
    with pytest.raises(SourceError, match="is no file"):
        Graph.open(tmp_path)


def test_a_graph_out_of_order_is_refused() -> None:
    made = residual()
    nodes = list(made.graph.node)
    del made.graph.node[:]
    made.graph.node.extend(reversed(nodes))
    with pytest.raises(SourceError, match=r"node 0 \(Add \) reads 'line', which no node before it makes"):
        Graph.of(made, name="net")
