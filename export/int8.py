"""INT8 in the graph: explicit quantization for three targets that cannot be one file.

`tensorrt`: int8 with zero point 0 on the inputs of convolutions and on their weights, per output
channel; biases and all else float. `openvino`: the same, but uint8 where an input has no negative
value, and narrow weights. `cpu`: ONNX Runtime's own form, asymmetric uint8 on inputs and outputs,
narrow weights, which it fuses into integer convolutions and TensorRT's parser refuses
(docs/graphs.md#qdq-rules, docs/graphs.md#qdq-cpu, docs/graphs.md#saturation).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cxrgaze.errors import ParityError, UsageError
from cxrgaze.export.graph import convolution_work, other_work
from cxrgaze.export.ranges import Method, collect
from cxrgaze.export.source import Layout

PERCENTILE = 99.99
WIDE = 127
"""Levels of int8 weights on each side of zero."""
NARROW = 64
"""Those for CPUs: without VNNI they add two products in 16 bits and saturate, silently, where two
times 255 levels of an input times those of a weight do not fit (docs/graphs.md#saturation)."""
Ranges = Mapping[str, tuple[float, float]]

_CPU_OPS = ["Conv", "Relu", "Add", "Concat", "MaxPool", "AveragePool", "Resize", "Mul"]


def convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The convolutions of a graph, in its order."""
    return [node for node in model.graph.node if node.op_type == "Conv"]


def kept_convolutions(
    model: onnx.ModelProto, layout: Layout, blocks: Collection[str] = ()
) -> set[str]:
    """Names of the convolutions that stay float: those of `layout.kept` and of `blocks`.

    Raises:
        ParityError: a pattern or a block without a convolution, as after a change of the network.
    """
    names = {pattern: set[str]() for pattern in (*layout.kept, *blocks)}
    for node in convolutions(model):
        for pattern in names:
            if is_named(node.name, pattern) or layout.block_of(node.name) == pattern:
                names[pattern].add(node.name)
    if empty := [pattern for pattern, members in names.items() if not members]:
        raise ParityError(f"no convolution belongs to {empty}; its name was changed")
    return set().union(*names.values())


_SHARE_LEFT = 0.5
"""Of the work that may stay float because it is no convolution."""


def require_convolutions(model: onnx.ModelProto) -> None:
    """Refuse a network most of whose work is none that is quantized here.

    Raises:
        UsageError: naming it, and its share.
    """
    other = other_work(model)
    whole = sum(other.values()) + sum(one.macs for one in convolution_work(model))
    share = sum(other.values()) / max(whole, 1)
    if share > _SHARE_LEFT:
        first = ", ".join(sorted(other, key=lambda name: -other[name])[:3])
        raise UsageError(
            f"int8 is for convolutions, and {100 * share:.0f} % of this network's work is done by "
            f"other operators ({len(other)}, the largest {first}), which would stay float: take "
            "--precision fp16"
        )


def is_named(name: str, pattern: str) -> bool:
    """Whether a node is meant by a pattern of `Layout.kept`."""
    return name == pattern or (pattern.endswith("/") and name.startswith(pattern))


def calibrate(
    model: onnx.ModelProto,
    images: Sequence[NDArray[np.float32]],
    names: Collection[str],
    method: Method,
    percentile: float = PERCENTILE,
) -> dict[str, tuple[float, float]]:
    """Range of the tensors called `names`, over calibration films.

    Args:
        images: canvases `(1, H, W)`.

    Raises:
        ParityError: an activation is not finite.
    """
    tallies = collect(model, names, images)
    if broken := [name for name, tally in tallies.items() if not tally.finite]:
        raise ParityError(f"NaN or infinity in {broken[0]} on a calibration film")
    return {name: tally.range(method, percentile) for name, tally in tallies.items()}


def ranged_inputs(model: onnx.ModelProto, layout: Layout) -> set[str]:
    """Names of the tensors that `for_tensorrt` and `for_openvino` need the range of."""
    return _activations(model, {node.input[0] for node in convolutions(model)})


def ranged_for_cpu(model: onnx.ModelProto, layout: Layout) -> set[str]:
    """Names of the tensors that `for_cpu` needs the range of."""
    nodes = _cpu_nodes(model, layout, ())
    return _activations(model, {name for node in nodes for name in (*node.input, *node.output)})


def _activations(model: onnx.ModelProto, names: set[str]) -> set[str]:
    weights = {w.name for w in model.graph.initializer}
    return {name for name in names if name and name not in weights}


class _Grid(NamedTuple):
    """How numbers become integers."""

    weight_levels: int
    unsigned: bool
    """uint8 for the inputs that have no negative value."""
    scales: Callable[[NDArray[np.floating]], NDArray[np.float32]]
    """Scales as they are stored, of those that would be exact."""


def for_tensorrt(
    model: onnx.ModelProto, ranges: Ranges, keep: Collection[str] = ()
) -> onnx.ModelProto:
    """The graph with int8 on the inputs and weights of every convolution but those in `keep`.

    Args:
        keep: names of convolutions.

    Raises:
        ParityError: a convolution whose weight is not stored, or an input without a range.
    """
    return _quantized(model, ranges, keep, _Grid(WIDE, unsigned=False, scales=_as_float16))


def for_openvino(
    model: onnx.ModelProto, ranges: Ranges, keep: Collection[str] = ()
) -> onnx.ModelProto:
    """As `for_tensorrt`, with uint8 where an input has no negative value, and `NARROW` weights.

    Raises:
        ParityError: as `for_tensorrt`.
    """
    return _quantized(model, ranges, keep, _Grid(NARROW, unsigned=True, scales=_as_float32))


def _quantized(
    model: onnx.ModelProto, ranges: Ranges, keep: Collection[str], grid: _Grid
) -> onnx.ModelProto:
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    weights = {w.name: w for w in graph.initializer}
    dequantized: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    zeros = {kind: f"{np.dtype(kind).name}/zero" for kind in (np.int8, np.uint8)}
    for kind, name in zeros.items():
        graph.initializer.append(numpy_helper.from_array(np.zeros((), kind), name))

    def quantized_input(name: str) -> str:
        if name not in dequantized:
            if name not in ranges:
                raise ParityError(f"no calibrated range for {name}")
            low, high = ranges[name]
            is_unsigned = grid.unsigned and low >= 0
            exact = np.asarray(high / 255 if is_unsigned else max(-low, high) / 127)
            scale, zero = f"{name}/scale", zeros[np.uint8 if is_unsigned else np.int8]
            graph.initializer.append(numpy_helper.from_array(grid.scales(exact), scale))
            nodes.append(_node("QuantizeLinear", [name, scale, zero], f"{name}/q"))
            nodes.append(_node("DequantizeLinear", [f"{name}/q", scale, zero], f"{name}/dq"))
            dequantized[name] = f"{name}/dq"
        return dequantized[name]

    for node in graph.node:
        if node.op_type == "Conv" and node.name not in keep:
            if node.input[1] not in weights:
                raise ParityError(f"the weight of {node.name} is not stored in the graph")
            node.input[0] = quantized_input(node.input[0])
            weight = weights[node.input[1]]
            node.input[1] = _quantized_weight(graph, nodes, weight, dequantized, grid)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [w for w in graph.initializer if w.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    return model


def _quantized_weight(
    graph: onnx.GraphProto,
    nodes: list[onnx.NodeProto],
    weight: onnx.TensorProto,
    dequantized: dict[str, str],
    grid: _Grid,
) -> str:
    if weight.name not in dequantized:
        values = numpy_helper.to_array(weight).astype(np.float32)
        most = grid.weight_levels
        scales = grid.scales(np.abs(values).reshape(len(values), -1).max(axis=1) / most)
        levels = np.rint(values / scales.reshape(-1, *[1] * (values.ndim - 1)))
        parts = {
            "int8": np.clip(levels, -most, most).astype(np.int8),
            "scales": scales,
            "zeros": np.zeros(len(values), np.int8),
        }
        for part, array in parts.items():
            graph.initializer.append(numpy_helper.from_array(array, f"{weight.name}/{part}"))
        inputs = [f"{weight.name}/{part}" for part in parts]
        dequantized[weight.name] = f"{weight.name}/dq"
        nodes.append(_node("DequantizeLinear", inputs, dequantized[weight.name], axis=0))
    return dequantized[weight.name]


def for_cpu(
    model: onnx.ModelProto, ranges: Ranges, layout: Layout, keep: Collection[str] = ()
) -> onnx.ModelProto:
    """The graph as ONNX Runtime's quantizer writes it, with our ranges.

    uint8 activations with a zero point, `NARROW` int8 weights per channel, int32 biases.

    Args:
        keep: names of convolutions that stay float.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    tensor_ranges = TensorsData(
        CalibrationMethod.MinMax,
        {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in ranges.items()
        },
    )
    with tempfile.TemporaryDirectory(prefix="cxrgaze-int8-") as folder:
        # Its quantizer looks for what its own preparation leaves behind.
        from onnxruntime.quantization.shape_inference import quant_pre_process

        source, prepared = Path(folder, "source.onnx"), Path(folder, "prepared.onnx")
        onnx.save(model, source)
        quant_pre_process(
            str(source), str(prepared), skip_symbolic_shape=True, skip_optimization=True
        )
        quantizer = QDQQuantizer(
            onnx.load(prepared),
            per_channel=True,
            reduce_range=True,  # of weights: `NARROW`
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=tensor_ranges,
            nodes_to_quantize=[node.name for node in _cpu_nodes(model, layout, keep)],
            nodes_to_exclude=sorted(keep),
            op_types_to_quantize=_CPU_OPS,
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    return result


def _cpu_nodes(
    model: onnx.ModelProto, layout: Layout, keep: Collection[str]
) -> list[onnx.NodeProto]:
    """Nodes to quantize: those of blocks with a quantized convolution, and poolings between them.

    What stands outside of any block, the features of the diagnosis and their classifier, stays
    float: rounding its 1 x 1 maps saves nothing and flips decisions.
    """
    blocks = {layout.block_of(node.name) for node in convolutions(model) if node.name not in keep}
    return [
        node
        for node in model.graph.node
        if node.op_type in _CPU_OPS
        and node.name not in keep
        and (layout.block_of(node.name) in blocks or node.op_type == "MaxPool")
    ]


def lint(model: onnx.ModelProto, *, unsigned: bool = False) -> int:
    """Count the Q/DQ nodes after proving that its target takes each (docs/graphs.md#qdq-rules).

    int8 with zero point 0 everywhere, no int32 (quantized biases), scales that are positive and
    finite; each DequantizeLinear after a QuantizeLinear or a stored weight; weights per output
    channel.

    Args:
        unsigned: uint8 with zero point 0 will do for what is not stored (OpenVINO).

    Raises:
        ParityError: naming the node that breaks a rule.
    """
    weights = {w.name: w for w in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    q_dq = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in q_dq:
        if len(node.input) < 3 or not {node.input[1], node.input[2]} <= set(weights):
            raise ParityError(f"{node.name}: scale and zero point must be stored")
        zero, stored = weights[node.input[2]], weights.get(node.input[0])
        either = (TensorProto.INT8, TensorProto.UINT8)
        kinds = either if unsigned and stored is None else either[:1]
        if zero.data_type not in kinds or numpy_helper.to_array(zero).any():
            wanted = "int8 or uint8" if len(kinds) > 1 else "int8"
            raise ParityError(f"{node.name}: expected an {wanted} zero point of 0")
        scale = weights[node.input[1]]
        values = numpy_helper.to_array(scale).astype(np.float64)
        if not np.isfinite(values).all() or not (values > 0).all():
            raise ParityError(
                f"{node.name}: scales from {values.min():.3g} to {values.max():.3g} are not all "
                "positive and finite"
            )
        if node.op_type == "DequantizeLinear":
            source = producer.get(node.input[0])
            if stored is None and (source is None or source.op_type != "QuantizeLinear"):
                raise ParityError(f"{node.name}: expected a QuantizeLinear or a stored weight")
            axis = next((a.i for a in node.attribute if a.name == "axis"), None)
            if stored is not None and (axis != 0 or values.shape != (stored.dims[0],)):
                raise ParityError(f"{node.name}: expected one scale per output channel, axis 0")
    return len(q_dq)


def require_narrow(model: onnx.ModelProto) -> None:
    """Refuse a graph on whose weights a CPU without VNNI would saturate.

    Raises:
        ParityError: naming the weight.
    """
    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.INT8:
            levels = numpy_helper.to_array(weight).astype(np.int16)
            if (largest := np.abs(levels).max(initial=0)) > NARROW:
                raise ParityError(f"{weight.name} has {largest} levels, expected {NARROW} at most")


def _as_float16(exact: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scales as float16 holds them.

    Rounded before the levels are made, so that both forms of the graph, with float16 and with
    float32 scales, have the same levels and no scale changes its value between them.
    """
    half = np.maximum(exact, _SMALLEST_SCALE).astype(np.float16)
    return np.asarray(half.astype(np.float32))


def _as_float32(exact: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(np.maximum(exact, _SMALLEST_SCALE).astype(np.float32))


_SMALLEST_SCALE = 2.0**-20
"""For a channel of zeros; float16 has sixteen steps below it."""


def _node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"{kind}:{output}", **attributes)
