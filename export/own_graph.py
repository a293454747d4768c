"""Somebody's own network as a graph of ours: `image` in [0, 1] to our heads, all in the graph.

What stands before and after the network (channels, grey levels, the way from a heatmap to a
log-density) becomes nodes called `/cxrgaze/...`, which compute in float32 in every precision, so
that runtimes and engines know nothing of it. `by_hand` does the same in numpy, from the file as it
was given: what parity compares with.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cxrgaze.errors import UsageError
from cxrgaze.export import graph as graphs
from cxrgaze.export.own_card import Input, Map, OwnCard
from cxrgaze.export.source import Layout, first_module
from cxrgaze.spec import IMAGE, LOG_DENSITY, LOGITS, Head, ModelSpec, Outputs

OURS = "/cxrgaze/"
"""Beginning of the names of the nodes that are put around a network."""
FAINTEST = 1e-4
"""Smallest share of an activation's or a probability's largest value that has a logarithm of its
own: what is less counts as this much, and no rounding of nothing is worth nats."""
_BLOCKS = range(4, 41)
"""How many blocks are a good number for a search."""
_PARTS = 8
_ACTIVATIONS = ("Softmax", "Sigmoid", "LogSoftmax")
_SUM = 1e-2  # how far from 1 a log-density's sum may be


def spec_of(card: OwnCard, model: onnx.ModelProto) -> ModelSpec:
    """The spec of an opened graph by its card."""
    _, _, height, width = _shape(model.graph.input[0])
    heads = [(LOGITS, card.logits), (LOG_DENSITY, card.map)]
    return ModelSpec.model_validate(
        {
            "variant": card.network.name,
            "model_version": card.network.version,
            "heads": tuple(head for head, given in heads if given),
            "classes": card.logits.classes if card.logits else (),
            "class_kind": card.logits.kind if card.logits else "exclusive",
            "height": height,
            "width": width,
            "canvas": card.input.canvas,
            "pixel_source": card.network.pixel_source,
            "domain": card.network.domain,
        }
    )


def adapted(model: onnx.ModelProto, card: OwnCard, spec: ModelSpec) -> onnx.ModelProto:
    """The opened graph with our input and our heads.

    Raises:
        UsageError: an output, channel, class or activation that the graph does not have so.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    (given,) = graph.input
    if card.input.name not in (None, given.name):
        raise UsageError(f"the graph's input is {given.name}, the card says {card.input.name}")
    _free_our_names(graph)
    channels = _shape(given)[1]
    made = _Nodes()
    made.scaled_image(card.input, channels, given.name)
    before = made.taken()
    outputs = []
    if card.logits:
        tensor = _freed(card.logits.output)
        shape = _output(model, tensor, "logits")
        _require_no_activation(model, tensor, "logits")
        made.flat_logits(tensor, shape, len(spec.classes))
        outputs.append(
            helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ("N", len(spec.classes)))
        )
    if card.map:
        tensor = _freed(card.map.output)
        shape = _output(model, tensor, "map")
        if card.map.kind == "logits":
            _require_no_activation(model, tensor, "map")
        made.log_density(card.map, tensor, shape, spec)
        sides = ("N", 1, spec.height, spec.width)
        outputs.append(helper.make_tensor_value_info(LOG_DENSITY, TensorProto.FLOAT, sides))
    nodes = [*before, *graph.node, *made.taken()]
    image = helper.make_tensor_value_info(
        IMAGE, TensorProto.FLOAT, ["N", 1, spec.height, spec.width]
    )
    graph.initializer.extend(made.weights)
    del graph.input[:], graph.output[:], graph.node[:], graph.value_info[:]
    graph.input.append(image)
    graph.output.extend(outputs)
    graph.node.extend(_needed(nodes, spec.heads))
    used = {name for node in graph.node for name in node.input}
    kept = [weight for weight in graph.initializer if weight.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    return model


CAM = "cam"
"""The output that `with_cam` adds."""
EVERY_CLASS = "all"


def with_cam(model: onnx.ModelProto, logits: str, channel: int | None) -> onnx.ModelProto:
    """An opened classifier with its exact class activation map as one more output, `CAM`.

    The class activation map of a network that ends in a mean over all pixels and a linear layer:
    the layer's own weights as a 1 x 1 convolution before the mean (Zhou et al., Learning deep
    features for discriminative localization, CVPR 2016, eq. 2). Its mean is the logit but for the
    bias.

    Args:
        logits: the output of the linear layer.
        channel: the class; None: at each pixel the one with the most.

    Raises:
        UsageError: it does not end so.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    weights = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    linear, matrix = _linear(logits, producer, weights)
    pool = producer.get(linear.input[0])
    while pool is not None and pool.op_type in ("Flatten", "Reshape", "Squeeze", "Identity"):
        pool = producer.get(pool.input[0])
    if pool is None or not _is_mean_of_pixels(pool, weights):
        raise UsageError(
            f"no class activation map: before its last layer {linear.name} stands "
            f"{pool.op_type if pool else 'the input'}, expected a global average pooling"
        )
    # Not by the prefix of what stays float32: it is a convolution of the network.
    made = _Nodes("/cam/")
    chosen = matrix if channel is None else matrix[channel : channel + 1]
    stored = made.constant(chosen[:, :, None, None])
    if channel is None:
        each = made.add("Conv", [pool.input[0], stored])
        made.add("ReduceMax", [each, made.constant([1], np.int64)], CAM)
    else:
        made.add("Conv", [pool.input[0], stored], CAM)
    graph.initializer.extend(made.weights)
    graph.node.extend(made.taken())
    shape = ("N", 1, None, None)
    graph.output.append(helper.make_tensor_value_info(CAM, TensorProto.FLOAT, shape))
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def _linear(
    logits: str, producer: dict[str, onnx.NodeProto], weights: dict[str, NDArray[np.floating]]
) -> tuple[onnx.NodeProto, NDArray[np.float32]]:
    """The last linear layer and its weights `(K, C)`."""
    node = producer.get(logits)
    if node is not None and node.op_type == "Add":
        node = next((producer[name] for name in node.input if name in producer), None)
    if node is not None and node.op_type in ("Gemm", "MatMul") and node.input[1] in weights:
        matrix = weights[node.input[1]].astype(np.float32)
        if node.op_type == "Gemm":
            flags = {a.name: a.i if a.name.startswith("trans") else a.f for a in node.attribute}
            matrix = matrix * np.float32(flags.get("alpha", 1.0))
            matrix = matrix if flags.get("transB") else matrix.T
        else:
            matrix = matrix.T
        return node, np.ascontiguousarray(matrix)
    raise UsageError(
        f"no class activation map: {logits} comes from {node.op_type if node else 'the input'}, "
        "expected a linear layer with stored weights"
    )


def _is_mean_of_pixels(node: onnx.NodeProto, weights: dict[str, NDArray[np.floating]]) -> bool:
    if node.op_type == "GlobalAveragePool":
        return True
    axes = [list(a.ints) for a in node.attribute if a.name == "axes"]
    axes += [weights[name].ravel().tolist() for name in node.input[1:2] if name in weights]
    reduces = node.op_type == "ReduceMean" and bool(axes)
    return reduces and sorted(n % 4 for n in axes[0]) == [2, 3]


class _Nodes:
    """Nodes of ours, and what they store.

    Args:
        prefix: beginning of all their names.
    """

    def __init__(self, prefix: str = OURS) -> None:
        self._prefix = prefix
        self.weights: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []

    def taken(self) -> list[onnx.NodeProto]:
        """The nodes since the last call."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def add(self, kind: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        number = len(self._nodes) + len(self.weights)
        output = output or f"{self._prefix}{kind.lower()}{number}"
        name = f"{self._prefix}{kind}:{output.removeprefix(self._prefix)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def constant(self, values: object, kind: type = np.float32) -> str:
        name = f"{self._prefix}constant{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype=kind), name))
        return name

    def scaled_image(self, asked: Input, channels: int, output: str) -> None:
        """`image` with the channels and grey levels that the network takes."""
        factor, offset = scale_of(asked, channels)
        shape = (1, channels, 1, 1)
        tensor = IMAGE
        if channels > 1:
            tensor = self.add("Concat", [IMAGE] * channels, axis=1)
        tensor = self.add("Mul", [tensor, self.constant(factor.reshape(shape))])
        self.add("Add", [tensor, self.constant(offset.reshape(shape))], output)

    def flat_logits(self, tensor: str, shape: Sequence[int], classes: int) -> None:
        """One row a film of one number a class."""
        if math.prod(shape[1:]) != classes:
            raise UsageError(
                f"the output {tensor} has shape (N, {', '.join(map(str, shape[1:]))}), the card "
                f"has {classes} classes: expected (N, {classes})"
            )
        self.add("Flatten", [tensor], LOGITS, axis=1)

    def log_density(self, asked: Map, tensor: str, shape: Sequence[int], spec: ModelSpec) -> None:
        """A map of any kind on the canvas as a log-density."""
        _, channels, height, width = shape
        if channels > 1:
            ends = [self.constant([n], np.int64) for n in (asked.channel, asked.channel + 1, 1)]
            tensor = self.add("Slice", [tensor, *ends])
        if (height, width) != (spec.height, spec.width):
            scales = self.constant([1, 1, spec.height / height, spec.width / width])
            tensor = self.add(
                "Resize",
                [tensor, "", scales],
                mode="linear",
                coordinate_transformation_mode="half_pixel",
            )
        flat = self.add("Reshape", [tensor, self.constant([0, -1], np.int64)])
        if asked.kind in ("activation", "probability"):
            # Relative to the largest, so that units do not matter; FAINTEST of it for what is none.
            positive = self.add("Relu", [flat])
            largest = self.add("ReduceMax", [positive, self.constant([1], np.int64)])
            share = self.add("Div", [positive, self.add("Max", [largest, self.constant(1e-30)])])
            floor = self.add("Max", [share, self.constant(FAINTEST)])
            flat = self.add("Log", [floor])
        density = self.add("LogSoftmax", [flat], axis=1)
        sides = self.constant([0, 1, spec.height, spec.width], np.int64)
        self.add("Reshape", [density, sides], LOG_DENSITY)


def scale_of(asked: Input, channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factor and offset `(C,)` of each channel: what the network takes is image * factor + offset.

    Raises:
        UsageError: mean and std of another number of channels.
    """
    if asked.mean is not None and asked.std is not None:
        if len(asked.mean) not in (1, channels):
            raise UsageError(
                f"the graph takes {channels} channels, the card has {len(asked.mean)} means"
            )
        mean, std = np.array(asked.mean), np.array(asked.std)
        factor, offset = 1 / std, -mean / std
    else:
        low, high = asked.range or (0.0, 1.0)
        factor, offset = np.array([high - low]), np.array([low])
    whole = np.ones(channels)
    return (factor * whole).astype(np.float32), (offset * whole).astype(np.float32)


def by_hand(
    infer: Callable[[NDArray[np.float32]], Sequence[NDArray[np.float32]]],
    image: NDArray[np.float32],
    card: OwnCard,
    channels: int,
) -> Outputs:
    """Our heads of one canvas `(1, 1, H, W)`, what stands around the network done in numpy.

    Args:
        infer: what the network gives, the card's outputs in the order logits, map.
    """
    factor, offset = scale_of(card.input, channels)
    given = np.repeat(image, channels, axis=1) * factor[:, None, None] + offset[:, None, None]
    found = list(infer(given.astype(np.float32)))
    heads: dict[Head, NDArray[np.float32]] = {}
    if card.logits:
        heads[LOGITS] = found.pop(0).reshape(1, -1)
    if card.map:
        heads[LOG_DENSITY] = _log_density(found.pop(0)[0], card.map, image.shape[2:])
    return heads


def _log_density(
    given: NDArray[np.float32], asked: Map, size: tuple[int, ...]
) -> NDArray[np.float32]:
    """A map `(C, h, w)` as a log-density `(1, 1, H, W)`."""
    values = given[asked.channel if len(given) > 1 else 0].astype(np.float64)
    if values.shape != size:
        large = cv2.resize(values, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
        values = np.asarray(large, dtype=np.float64)
    if asked.kind in ("activation", "probability"):
        positive = np.maximum(values, 0)
        values = np.log(np.maximum(positive / max(positive.max(), 1e-30), FAINTEST))
    off = values - values.max()
    return np.asarray(off - np.log(np.exp(off).sum()), dtype=np.float32)[None, None]


def require_the_kind(values: NDArray[np.float32], asked: Map) -> None:
    """Refuse a map that is not of the kind that the card says.

    Args:
        values: of one film, `(C, h, w)`.

    Raises:
        UsageError: with the kind that it may be.
    """
    found = values[asked.channel if len(values) > 1 else 0].astype(np.float64)
    low, high = float(found.min()), float(found.max())
    where = f"the map {asked.output} ranges from {low:.3g} to {high:.3g}"
    if asked.kind == "log-density" and (high > 0 or abs(np.exp(found).sum() - 1) > _SUM):
        raise UsageError(
            f"{where} and its exponentials sum to {np.exp(np.minimum(found, 50)).sum():.3g}, so it "
            'is no log-density; kind = "logits" normalises it'
        )
    if asked.kind == "probability" and not 0 <= low <= high <= 1 + 1e-6:
        raise UsageError(f'{where}, so it is no probability; kind = "logits" or "activation"?')


def layout_of(model: onnx.ModelProto, card: OwnCard) -> Layout:
    """How low precision goes through an adapted graph: what stays, and blocks.

    Raises:
        UsageError: nothing is called as the card says.
    """
    asked = card.quantization
    names = [node.name for node in model.graph.node if not node.name.startswith(OURS)]
    kept = kept_by_rule(model) if asked.keep is None else asked.keep
    block_of = _by_expression(asked.blocks, names) if asked.blocks else _by_names(model, names)
    return Layout(kept, block_of, OURS)


def kept_by_rule(model: onnx.ModelProto) -> tuple[str, ...]:
    """Convolutions that stay in higher precision where nobody named any.

    The first, which sees the image's own grey levels, and those whose output reaches the map
    without another one, which make it.
    """
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    kept = set(convolutions[:1])
    producer = {name: node for node in model.graph.node for name in node.output}
    waiting, seen = [LOG_DENSITY], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or (node := producer.get(name)) is None:
            continue
        seen.add(name)
        if node.op_type == "Conv":
            kept.add(node.name)
        elif node.op_type != "ConvTranspose":
            waiting.extend(node.input)
    return tuple(name for name in convolutions if name in kept)


def _by_expression(pattern: str, names: Iterable[str]) -> Callable[[str], str]:
    expression = re.compile(pattern)

    def block_of(name: str) -> str:
        found = expression.search(name)
        return (found[1] if expression.groups else found[0]) if found else "else"

    if {block_of(name) for name in names} <= {"else"}:
        raise UsageError(f"no node has a name with the card's blocks = {pattern!r} in it")
    return block_of


def _by_names(model: onnx.ModelProto, names: Sequence[str]) -> Callable[[str], str]:
    """By the first modules of a path, as many as make a good number of blocks; else by work."""
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    for depth in range(1, 6):

        def block_of(name: str, depth: int = depth) -> str:
            return "/".join(name.strip("/").split("/")[:-1][:depth]) or first_module(name)

        if len({block_of(name) for name in convolutions}) in _BLOCKS and any(
            "/" in n for n in names
        ):
            return block_of
    return _by_work(model)


def _by_work(model: onnx.ModelProto) -> Callable[[str], str]:
    """Parts of about the same work, in the order of the graph."""
    work = {one.node: one.macs for one in graphs.convolution_work(model)}
    whole = sum(work.values()) or 1
    done, part_of, part = 0, dict[str, str](), "part1"
    for node in model.graph.node:
        done += work.get(node.name, 0)
        part_of[node.name] = part
        part = f"part{min(done * _PARTS // whole + 1, _PARTS)}"
    return lambda name: part_of.get(name, part)


def _free_our_names(graph: onnx.GraphProto) -> None:
    """Tensors of the network that are called as our input and heads get other names."""
    for node in graph.node:
        node.input[:] = map(_freed, node.input)
        node.output[:] = map(_freed, node.output)
    for value in itertools.chain(graph.input, graph.output, graph.initializer):
        value.name = _freed(value.name)
    del graph.value_info[:]


_GIVEN = "/given"


def _freed(name: str) -> str:
    """What a tensor of the network is called beside our input and heads."""
    return f"{name}{_GIVEN}" if name in (IMAGE, LOGITS, LOG_DENSITY) else name


def _output(model: onnx.ModelProto, name: str, what: str) -> tuple[int, ...]:
    """Shape of a tensor for one film: an output of the graph or any inside it."""
    single = graphs.for_one_film(model)
    values = {v.name: v for v in (*single.output, *single.value_info)}
    if name not in values:
        outputs = ", ".join(value.name.removesuffix(_GIVEN) for value in model.graph.output)
        raise UsageError(
            f"the graph has no tensor {name.removesuffix(_GIVEN)} for [{what}]; its outputs are "
            f"{outputs}"
        )
    shape = _shape(values[name])
    if what == "map" and len(shape) != 4:
        raise UsageError(f"the map {name} has shape {shape}, expected (N, C, h, w)")
    return shape


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(d.dim_value for d in value.type.tensor_type.shape.dim)


def _require_no_activation(model: onnx.ModelProto, name: str, table: str) -> None:
    """Refuse probabilities where logits are wanted."""
    producer = {output: node for node in model.graph.node for output in node.output}
    node = producer.get(name)
    while node is not None and node.op_type in ("Reshape", "Flatten", "Squeeze", "Identity"):
        node = producer.get(node.input[0])
    if node is not None and node.op_type in _ACTIVATIONS:
        raise UsageError(
            f"the output {name} comes from a {node.op_type}: those are no logits. Write what goes "
            f'into it: [{table}] output = "{node.input[0]}"'
        )


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that something asked for depends on, in their order."""
    wanted, kept = set(outputs), list[onnx.NodeProto]()
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]
