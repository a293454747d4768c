"""A look at a graph before it is loaded: external data, operators, constants."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cxrgaze.errors import IntegrityError
from cxrgaze.runtime import graph_look

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)


def _model(nodes, initializers=(), **more) -> bytes:
    graph = helper.make_graph(nodes, "g", [X], [Y], [*initializers])
    opset = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opset, **more).SerializeToString()


def _weights(name="w", values=(1, 2, 3, 4)):
    return numpy_helper.from_array(np.array(values, np.float32), name)


def _external(tensor):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../secret"
    return tensor


ADD = helper.make_node("Add", ["x", "w"], ["y"])


def test_a_plain_graph_is_accepted():
    model = _model([ADD], [_weights()])
    graph_look.require_own_data(model)
    graph_look.require_known(model)


def _inside(tensor):
    body = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "b", [], [])
    return helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body)


@pytest.mark.parametrize(
    "model",
    [
        _model([ADD], [_external(_weights())]),
        _model([helper.make_node("Constant", [], ["y"], value=_external(_weights()))]),
        _model([_inside(_external(_weights()))]),
    ],
    ids=["initializer", "attribute", "graph within"],
)
def test_external_data_is_refused_wherever_it_is(model):
    """D3: it would be read from beside the working folder, hashed by nobody."""
    with pytest.raises(IntegrityError, match="external data"):
        graph_look.require_own_data(model)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([helper.make_node("Loop", ["", "x", "x"], ["y"])], "Loop"),
        ([_inside(_weights())], "If"),
        ([helper.make_node("ConstantOfShape", ["x"], ["y"])], "ConstantOfShape"),
        ([helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft")], "microsoft.Fused"),
        ([helper.make_node("Add", ["w", "w"], ["y"])], "Add computes with constants alone"),
        (
            [
                helper.make_node("Reshape", ["w", "w"], ["v"]),
                helper.make_node("Mul", ["v", "w"], ["u"]),
                helper.make_node("Add", ["x", "u"], ["y"]),
            ],
            "Mul computes with constants alone",
        ),
    ],
)
def test_what_no_bundle_needs_is_refused(nodes, said):
    """D5: a loop that never ends; constants that fold into gigabytes."""
    with pytest.raises(IntegrityError, match=said):
        graph_look.require_known(_model(nodes, [_weights()]))


def test_functions_and_sparse_tensors_are_refused():
    function = helper.make_function("d", "F", ["a"], ["b"], [], [helper.make_opsetid("", 17)])
    with pytest.raises(IntegrityError, match="functions"):
        graph_look.require_known(_model([ADD], [_weights()], functions=[function]))
    sparse = helper.make_sparse_tensor(_weights("s"), numpy_helper.from_array(np.arange(4)), [9])
    graph = helper.make_graph([ADD], "g", [X], [Y], [_weights()], sparse_initializer=[sparse])
    with pytest.raises(IntegrityError, match="sparse"):
        graph_look.require_known(helper.make_model(graph).SerializeToString())


def test_operators_are_onnx_s_own():
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert graph_look.OPERATORS - {"Upsample"} <= names | {"Mish", "HardSwish", "Gelu"}
    assert graph_look._OF_CONSTANTS <= graph_look.OPERATORS


def test_any_damaged_byte_is_looked_at_or_refused_and_nothing_else():
    model = _model([ADD], [_weights()])
    for position in range(len(model)):
        for damaged in (model[:position], model[:position] + b"\xff" + model[position + 1 :]):
            for look in (graph_look.require_own_data, graph_look.require_known):
                try:
                    look(damaged)
                except IntegrityError:
                    pass


def test_the_shipped_graphs_are_known(bundles):
    for path in bundles.glob("*.cxrgaze/model.onnx"):
        graph_look.require_known(path.read_bytes())
