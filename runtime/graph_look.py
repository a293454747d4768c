"""A look at an ONNX graph before any library loads it: operators, and where its data lie.

A graph from foreign hands may read files of its choice (external data), loop for ever, or fold
constants into gigabytes. This reads the protobuf's own fields, without the onnx package, which does
not ship to a device. Field numbers: onnx/onnx.proto (ModelProto, GraphProto, NodeProto,
AttributeProto, TensorProto); wire format: protobuf, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cxrgaze.errors import IntegrityError

OPERATORS = frozenset(
    "Add AveragePool BatchNormalization Cast Clip Concat Constant Conv ConvTranspose "
    "DequantizeLinear Div Dropout Elu Erf Exp Flatten Gelu Gemm GlobalAveragePool GlobalMaxPool "
    "GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization "
    "LeakyRelu Log LogSoftmax MatMul Max MaxPool Min Mish Mul Neg PRelu Pad Pow QuantizeLinear "
    "Reciprocal ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape "
    "Resize Selu Sigmoid Slice Softmax Softplus Split Sqrt Squeeze Sub Sum Tanh Transpose "
    "Unsqueeze Upsample".split()
)
"""Operators of ONNX's own domain that a bundle may use: those of networks that see images, without
control flow and without those that make large things of small ones."""

_OF_CONSTANTS = frozenset(
    "Cast Constant DequantizeLinear Flatten Identity QuantizeLinear Reshape Squeeze Transpose "
    "Unsqueeze".split()
)
"""Operators that may have nothing but constants: what they make of them is no larger."""

_DEPTH = 4  # graphs within graphs that are looked into


class _Node(NamedTuple):
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    has_graph: bool


def require_own_data(model: bytes) -> None:
    """Refuse a graph that keeps data in other files.

    ONNX Runtime reads them from below the working folder, and older versions from anywhere.

    Raises:
        IntegrityError: not a graph, or one with external data.
    """
    for tensor in _tensors(_graph_of(model), 0):
        for number, value in _fields(tensor):
            if number == 13 or (number == 14 and value == 1):
                raise IntegrityError(
                    "it keeps data outside of itself (external data), which nobody verified; "
                    "export it in one file"
                )


def require_known(model: bytes) -> None:
    """Refuse a graph with operators that no bundle needs, or that computes with constants alone.

    Raises:
        IntegrityError: saying which; not a graph.
    """
    for number, _ in _fields(memoryview(model)):
        if number in (20, 25):
            raise IntegrityError("it defines functions or training of its own")
    graph = _graph_of(model)
    constants = {""}  # an input that is left out
    nodes = []
    for number, value in _fields(graph):
        if number == 1:
            nodes.append(_node(_message(value)))
        elif number == 5:
            constants |= {_text(v) for n, v in _fields(_message(value)) if n == 8}
        elif number == 15:
            raise IntegrityError("it has sparse tensors")
    for node in nodes:  # which are in the order that they are computed in
        if node.domain not in ("", "ai.onnx") or node.operator not in OPERATORS or node.has_graph:
            name = f"{node.domain}.{node.operator}" if node.domain else node.operator
            raise IntegrityError(
                f"its operator {name} is not one that bundles may use "
                "(cxrgaze.runtime.graph_look.OPERATORS)"
            )
        if constants.issuperset(node.inputs):
            if node.operator not in _OF_CONSTANTS:
                raise IntegrityError(
                    f"its operator {node.operator} computes with constants alone; fold them"
                )
            constants.update(node.outputs)


def _graph_of(model: bytes) -> memoryview:
    for number, value in _fields(memoryview(model)):
        if number == 7:
            return _message(value)
    raise IntegrityError("not an ONNX graph")


def _tensors(graph: memoryview, depth: int) -> Iterator[memoryview]:
    """Every tensor of a graph: initializers, and those in attributes and in graphs within."""
    if depth > _DEPTH:
        raise IntegrityError("its graphs are nested too deeply")
    for number, value in _fields(graph):
        if number == 5:
            yield _message(value)
        elif number == 15:  # sparse: its values and indices
            yield from (_message(v) for n, v in _fields(_message(value)) if n in (1, 2))
        elif number == 1:
            for field, attribute in _fields(_message(value)):
                if field != 5:
                    continue
                for kind, content in _fields(_message(attribute)):
                    if kind in (5, 10):
                        yield _message(content)
                    elif kind in (6, 11):
                        yield from _tensors(_message(content), depth + 1)


def _node(message: memoryview) -> _Node:
    inputs, outputs, texts, has_graph = [], [], {4: "", 7: ""}, False
    for number, value in _fields(message):
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number in texts:
            texts[number] = _text(value)
        elif number == 5:
            has_graph |= any(kind in (6, 11) for kind, _ in _fields(_message(value)))
    return _Node(texts[4], texts[7], tuple(inputs), tuple(outputs), has_graph)


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of a message's fields; nothing is copied."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise IntegrityError("not an ONNX graph: its protobuf is malformed")
        if at + size > end:
            raise IntegrityError("not an ONNX graph: its protobuf is cut")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise IntegrityError("not an ONNX graph: its protobuf is cut")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise IntegrityError("not an ONNX graph: its protobuf is malformed")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode("utf-8", "replace")
