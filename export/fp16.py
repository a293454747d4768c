"""Precision in the graph: float32 to float16, with what must stay float32 kept.

Strongly typed TensorRT takes the types from the graph, so this is where `--precision fp16` happens.
The spatial softmax and every global mean stay float32: sums over up to
327,680 pixels overflow or vanish in float16, and a log-density near -12 has only steps of 1/128
(docs/graphs.md#float32-islands).

Written here rather than taken from onnxruntime.transformers.float16, which rounds kept outputs to
float16 on their way to a float32 output (Cast to 16, Cast to 32), and so loses what was kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cxrgaze.errors import ParityError

KEEP = frozenset({"LogSoftmax", "Softmax", "GlobalAveragePool", "ReduceMean"})
"""Operators that stay float32 in every precision."""

_MOVES_DATA = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose"})
_NOT_DATA = {"Resize": (1, 2)}  # roi and scales: float32 whatever the data is
HALF_MAX = float(np.finfo(np.float16).max)
"""Largest number of float16."""
_TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def to_fp16(
    model: onnx.ModelProto, keep: Collection[str] = KEEP, nodes_kept: Collection[str] = ()
) -> onnx.ModelProto:
    """The float16 graph of a float32 one; inputs and outputs stay float32.

    Operators in `keep` compute in float32; operators that only move data follow their input; all
    others compute in float16. One Cast stands wherever the type changes, none elsewhere.

    Args:
        nodes_kept: names of further nodes that compute in float32.

    Raises:
        ParityError: a weight that float16 cannot hold, or an operator with a sub-graph.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    _tame_batch_norms(model.graph)
    constants_to_initializers(model.graph)
    graph = model.graph
    weights = {w.name: w for w in graph.initializer}
    dtype = {value.name: TensorProto.FLOAT for value in graph.input if _is_float(value)}
    floating = float_tensors(model)
    in_types: dict[
        tuple[str, int], str
    ] = {}  # (tensor, type) to the name that holds it in that type
    nodes: list[onnx.NodeProto] = []
    new_weights: dict[str, onnx.TensorProto] = {}

    def in_type(name: str, wanted: int) -> str:
        if name in weights:
            return _weight(weights[name], wanted, new_weights)
        if dtype[name] == wanted:
            return name
        if (name, wanted) not in in_types:
            in_types[name, wanted] = (
                f"{name}/{'half' if wanted == TensorProto.FLOAT16 else 'float'}"
            )
            nodes.append(_cast(name, in_types[name, wanted], wanted))
        return in_types[name, wanted]

    for node in graph.node:
        if any(
            a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
            for a in node.attribute
        ):
            raise ParityError(f"node {node.name} ({node.op_type}) has a sub-graph; not supported")
        if node.op_type in keep or node.name in nodes_kept:
            wanted = TensorProto.FLOAT
        elif node.op_type in _MOVES_DATA and node.input[0] in dtype:
            wanted = dtype[node.input[0]]
        else:
            wanted = TensorProto.FLOAT16
        for position, name in enumerate(node.input):
            if name in floating and position not in _NOT_DATA.get(node.op_type, ()):
                node.input[position] = in_type(name, wanted)
        nodes.append(node)
        dtype.update({name: wanted for name in node.output if name in floating})

    for output in graph.output:
        if dtype[output.name] == TensorProto.FLOAT16:
            inner = f"{output.name}/half"
            _rename(nodes, output.name, inner)
            nodes.append(_cast(inner, output.name, TensorProto.FLOAT))
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    graph.initializer.extend(w for name, w in {**weights, **new_weights}.items() if name in used)
    return model


def check_kept(model: onnx.ModelProto, keep: Collection[str] = KEEP) -> int:
    """Count the kept operators after proving that each is float32 from input to use.

    Proved: every float input and output of a kept operator is float32, and no kept output reaches
    a graph output through float16.

    Raises:
        ParityError: naming the operator that is not.
    """
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    types = _tensor_types(inferred.graph)
    producer = {name: node for node in inferred.graph.node for name in node.output}
    kept = [node for node in inferred.graph.node if node.op_type in keep]
    for node in kept:
        low = [n for n in (*node.input, *node.output) if types.get(n) == TensorProto.FLOAT16]
        if low:
            raise ParityError(
                f"{node.op_type} {node.name} must be float32, but {low[0]} is float16"
            )
    for output in inferred.graph.output:
        name, rounded = output.name, False
        while name in producer and producer[name].op_type in (_MOVES_DATA | {"Cast"}):
            name = producer[name].input[0]
            rounded = rounded or types.get(name) == TensorProto.FLOAT16
        if rounded and name in producer and producer[name].op_type in keep:
            raise ParityError(f"output {output.name} was kept float32 and then rounded to float16")
    return len(kept)


def _tame_batch_norms(graph: onnx.GraphProto) -> None:
    """Give every BatchNormalization mean 0 and variance 1 by moving them into scale and shift.

    The same function in float64, but a variance below 6e-5 would lose its bits in float16 and one
    above 65504 would overflow; scale and shift are of the size of the activations.
    """
    weights = {w.name: w for w in graph.initializer}
    for node in graph.node:
        if node.op_type != "BatchNormalization":
            continue
        scale, shift, mean, variance = (
            numpy_helper.to_array(weights[name]).astype(np.float64) for name in node.input[1:5]
        )
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        tamed = (
            factor * np.sqrt(1 + epsilon),
            shift - factor * mean,
            np.zeros_like(mean),
            np.ones_like(variance),
        )
        for position, values in enumerate(tamed, start=1):
            name = f"{node.name}/tamed_{position}"
            graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
            node.input[position] = name


def constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Store what Constant nodes give beside the weights."""
    for node in [n for n in graph.node if n.op_type == "Constant"]:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if value is None:
            raise ParityError(f"constant {node.name} is not a tensor; simplify the graph first")
        value.name = node.output[0]
        graph.initializer.append(value)
        graph.node.remove(node)


def _weight(weight: onnx.TensorProto, wanted: int, stored: dict[str, onnx.TensorProto]) -> str:
    """Name of the float weight in the wanted type; made once."""
    if weight.data_type == wanted:
        return weight.name
    name = f"{weight.name}/half"
    if name not in stored:
        values = numpy_helper.to_array(weight)
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= HALF_MAX:
            raise ParityError(
                f"weight {weight.name} reaches {largest:.4g}; float16 ends at {HALF_MAX:.0f}; "
                "export with --precision fp32"
            )
        stored[name] = numpy_helper.from_array(values.astype(np.float16), name)
    return name


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the float32 tensors and weights of a graph."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    types = _tensor_types(inferred.graph)
    return {name for name, kind in types.items() if kind == TensorProto.FLOAT}


def _tensor_types(graph: onnx.GraphProto) -> dict[str, int]:
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update({w.name: w.data_type for w in graph.initializer})
    return types


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast:{target}", to=to)


def _rename(nodes: Sequence[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for position, name in enumerate(names):
                if name == old:
                    names[position] = new
