"""What makes int8 lose less without another operation: channels of a like size, and no shift.

A convolution's input has one scale for all its channels, and one large channel costs the small ones
their levels. Factors between channels can move from what makes the input (a normalization or a
convolution, then a ReLU, which any positive factor passes) into the convolution's weights, which
have a scale for each output channel: the same function. Source: Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.1; the exponent
is the migration strength of Xiao et al., SmoothQuant, ICML 2023, equation 4.

What rounding adds to the mean of the logits is taken off again: the shift is measured on the
calibration films. Corrections of every convolution's bias (Nagel et al., section 4.2) helped one of
the two networks that ship and harmed the other (docs/precision.md#less).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from cxrgaze.spec import LOGITS, ModelSpec

STRENGTHS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)
"""That are tried: how much of a factor follows the input, the rest follows the weights; 0 moves
nothing. None is best for every network and target: calibration films choose."""
_OF_A_LARGE_ONE = (0.0, 0.4)
_LARGE_CANVAS = 512 * 512
"""Pixels above which each strength takes minutes."""

_MOST = 2.0**8
"""A factor at most, and one over it at least."""


def strengths(spec: ModelSpec) -> tuple[float, ...]:
    """The strengths that are tried for a network."""
    return _OF_A_LARGE_ONE if spec.height * spec.width > _LARGE_CANVAS else STRENGTHS


def equalized(
    model: onnx.ModelProto,
    peaks: Mapping[str, NDArray[np.floating]],
    convolutions: Collection[str],
    strength: float,
) -> onnx.ModelProto:
    """The same function with factors moved between the channels of convolutions' inputs.

    What has more than one reader, or does not come from a normalization or a convolution, stays as
    it is.

    Args:
        peaks: largest absolute value of each channel of the inputs (`ranges.channel_peaks`).
        convolutions: names of those whose inputs are equalized.
        strength: 0 returns the model as it is.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    if not strength:
        return model
    graph = model.graph
    stored = {w.name: w for w in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    for node in graph.node:
        if node.name not in convolutions or node.input[0] not in peaks or _groups(node) != 1:
            continue
        maker = makers.get(node.input[0])
        between = [node.input[0]]
        if maker is not None and maker.op_type == "Relu":
            between.append(maker.input[0])
            maker = makers.get(maker.input[0])
        if maker is None or maker.op_type not in ("BatchNormalization", "Conv"):
            continue
        # Of a normalization scale and bias, of a convolution weight and bias.
        scaled = [name for name in maker.input[1:3] if name]
        if not {node.input[1], *scaled} <= set(stored):
            continue
        if any(readers[name] != 1 for name in (*between, node.input[1], *scaled)):
            continue
        weight = numpy_helper.to_array(stored[node.input[1]])
        factors = _factors(peaks[node.input[0]], weight, strength)
        _multiply(stored[node.input[1]], factors[None, :])
        for name in scaled:
            _multiply(stored[name], 1 / factors)
    return model


def _factors(
    peaks: NDArray[np.floating], weight: NDArray[np.floating], strength: float
) -> NDArray[np.float64]:
    """What each channel of an input is divided by; their geometric mean is 1."""
    weights = np.abs(weight).max(axis=(0, *range(2, weight.ndim))).astype(np.float64)
    used = (peaks > 0) & (weights > 0)
    exponents = np.zeros(len(weights))
    exponents[used] = strength * np.log2(peaks[used]) - (1 - strength) * np.log2(weights[used])
    if used.any():
        exponents[used] -= exponents[used].mean()
    most = np.log2(_MOST)
    return np.asarray(2.0 ** exponents.clip(-most, most))


def _multiply(tensor: onnx.TensorProto, factors: NDArray[np.float64]) -> None:
    """Multiply a stored tensor along its first axes."""
    values = numpy_helper.to_array(tensor)
    shape = (*factors.shape, *[1] * (values.ndim - factors.ndim))
    scaled = (values * factors.reshape(shape)).astype(values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))


def _groups(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)


def shifted(model: onnx.ModelProto, shift: NDArray[np.floating]) -> onnx.ModelProto:
    """The graph with `shift` `(K,)` added to its logits, in float32."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    before, name = f"{LOGITS}/before", f"{LOGITS}/shift"
    for node in graph.node:
        node.output[:] = [before if out == LOGITS else out for out in node.output]
        node.input[:] = [before if used == LOGITS else used for used in node.input]
    graph.initializer.append(numpy_helper.from_array(np.asarray(shift, np.float32), name))
    graph.node.append(helper.make_node("Add", [before, name], [LOGITS], name=f"/{name}"))
    return model
