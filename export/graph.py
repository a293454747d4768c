"""ONNX graphs: opset 18, IR at most 10, simplified, checked, and what their convolutions cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from cxrgaze.bundles.manifest import DataType
from cxrgaze.errors import IntegrityError, UsageError
from cxrgaze.runtime import graph_look
from cxrgaze.spec import NOTICE, SPEC_KEY, ModelSpec

OPSET = 18
IR_VERSION = 10  # onnxruntime 1.23, the last for JetPack 6, reads at most 11; onnx writes 13


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with constants folded (onnxsim); parity on films judges the result."""
    import onnxsim  # the peers of a bench need it only where they export

    result: onnx.ModelProto = onnxsim.simplify(model, check_n=0)[0]
    return result


def require_servable(model: onnx.ModelProto) -> None:
    """Refuse a network that no reader would load, before any work is done with it.

    Raises:
        IntegrityError: weights that are no finite numbers, by the name of their tensor.
        UsageError: an operator that bundles may not use (`runtime.graph_look`).
    """
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise IntegrityError(f"the weights {tensor.name} of the network have NaN or infinities")
    try:
        graph_look.require_known(model.SerializeToString())
    except IntegrityError as error:
        raise UsageError(f"the network's graph cannot be served: {error}") from error


def finished(model: onnx.ModelProto, spec: ModelSpec) -> bytes:
    """The graph with its ModelSpec and notice inside, checked, as the bytes that ship.

    Raises:
        onnx.checker.ValidationError: the graph is not valid ONNX.
    """
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.doc_string = NOTICE
    onnx.helper.set_model_props(model, {SPEC_KEY: spec.model_dump_json()})
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def for_one_film(model: onnx.ModelProto) -> onnx.GraphProto:
    """A copy of a graph with the shape of every tensor for a batch of one.

    Raises:
        onnx.shape_inference.InferenceError: shapes that do not fit together.
    """
    single = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*single.graph.input, *single.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del single.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(single, strict_mode=True, data_prop=True).graph


class Work(NamedTuple):
    """What a convolution costs."""

    node: str
    """Its name."""
    kind: DataType
    """Type of its input."""
    macs: int
    """Multiply-accumulates for one film."""


def convolution_macs(model: onnx.ModelProto) -> dict[DataType, int]:
    """Multiply-accumulates of the convolutions for one film, by the type of their input.

    Raises:
        onnx.shape_inference.InferenceError: as `for_one_film`.
    """
    macs: dict[DataType, int] = {}
    for work in convolution_work(model):
        macs[work.kind] = macs.get(work.kind, 0) + work.macs
    return macs


def convolution_work(model: onnx.ModelProto) -> Iterator[Work]:
    """The work of each convolution, in the graph's order.

    Raises:
        onnx.shape_inference.InferenceError: as `for_one_film`.
    """
    graph = for_one_film(model)
    values = {v.name: v.type.tensor_type for v in (*graph.input, *graph.output, *graph.value_info)}
    weights = {w.name: tuple(w.dims) for w in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        made_by = [_maker(name, producer) for name in node.input[:2]]
        is_int8 = made_by == ["DequantizeLinear"] * 2
        kind = "int8" if is_int8 else _DATA_TYPES[values[node.input[0]].elem_type]
        out = [d.dim_value for d in values[node.output[0]].shape.dim]
        kernel = _weight_shape(node.input[1], weights, producer)
        yield Work(node.name, kind, math.prod(out[1:]) * math.prod(kernel[1:]))


def other_work(model: onnx.ModelProto) -> dict[str, int]:
    """Multiply-accumulates of what is no convolution for one film, by name of the node.

    Transposed convolutions and matrix products; no other operator multiplies much.

    Raises:
        onnx.shape_inference.InferenceError: as `for_one_film`.
    """
    graph = for_one_film(model)
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
    } | {weight.name: list(weight.dims) for weight in graph.initializer}
    work = {}
    for node in graph.node:
        if node.op_type == "ConvTranspose":
            work[node.name] = math.prod(shapes[node.input[0]][1:]) * math.prod(
                shapes[node.input[1]][1:]
            )
        elif node.op_type in ("MatMul", "Gemm"):
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            inner = shapes[node.input[0]][0 if transposed else -1]
            work[node.name] = math.prod(shapes[node.output[0]]) * inner
    return work


_DATA_TYPES: dict[int, DataType] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
}


def _maker(name: str, producer: dict[str, onnx.NodeProto]) -> str:
    """Operator that makes a tensor, before any Cast; empty for an input or a stored weight."""
    while name in producer and producer[name].op_type == "Cast":
        name = producer[name].input[0]
    return producer[name].op_type if name in producer else ""


def _weight_shape(
    name: str, weights: dict[str, tuple[int, ...]], producer: dict[str, onnx.NodeProto]
) -> tuple[int, ...]:
    """Shape of a convolution's weight, through the Casts and DequantizeLinears before it."""
    while name not in weights:
        name = producer[name].input[0]
    return weights[name]
