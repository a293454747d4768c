"""What an export does differently for each target, one row a target."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import onnx

from cxrgaze.bundles.manifest import Target
from cxrgaze.export import fp16, int8
from cxrgaze.export.graph import OPSET
from cxrgaze.export.source import Layout

_Q_DQ = frozenset({"QuantizeLinear", "DequantizeLinear"})


class Typed(NamedTuple):
    """A typed graph and how its types are called."""

    name: str
    model: onnx.ModelProto
    float32_nodes: int
    """Nodes of a low-precision graph that stay float32 on purpose."""


class Row(NamedTuple):
    """One target."""

    rewrites: tuple[str, ...]
    """Exact rewrites that pay there, by the figures in `cxrgaze.train.rewrites`."""
    suffix: str
    """Of the names of its int8 bundles: int8 graphs of two targets are two files."""
    int8_opset: int
    ranged: Callable[[onnx.ModelProto, Layout], set[str]]
    """Tensors that its int8 needs the range of."""
    int8: Callable[[onnx.ModelProto, int8.Ranges, Layout, Collection[str]], Iterator[Typed]]
    """Its int8 forms in the order that they are tried; convolutions of these names stay float."""


def _int8_tensorrt(
    model: onnx.ModelProto, ranges: int8.Ranges, layout: Layout, keep: Collection[str]
) -> Iterator[Typed]:
    quantized = int8.for_tensorrt(model, ranges, keep)
    nodes = layout.float32_nodes(quantized)
    for name, also in (("float32 scales", _Q_DQ), ("float16 scales", frozenset[str]())):
        typed = fp16.to_fp16(quantized, fp16.KEEP | also, nodes)
        int8.lint(typed)
        yield Typed(f"int8, float16 else, {name}", typed, fp16.check_kept(typed) + len(nodes))


def _int8_cpu(
    model: onnx.ModelProto, ranges: int8.Ranges, layout: Layout, keep: Collection[str]
) -> Iterator[Typed]:
    typed = int8.for_cpu(model, ranges, layout, keep)
    int8.require_narrow(typed)
    yield Typed("int8 for the CPU, float32 else", typed, 0)


def _int8_openvino(
    model: onnx.ModelProto, ranges: int8.Ranges, layout: Layout, keep: Collection[str]
) -> Iterator[Typed]:
    typed = int8.for_openvino(model, ranges, keep)
    int8.lint(typed, unsigned=True)
    int8.require_narrow(typed)
    yield Typed("int8 for OpenVINO, float32 else", typed, 0)


TARGETS: Mapping[Target, Row] = {
    # `stem` only saves work; the others wait until a card has shown them to pay. float16 scales of
    # QuantizeLinear and DequantizeLinear need opset 19.
    "tensorrt": Row(("stem",), "", 19, int8.ranged_inputs, _int8_tensorrt),
    "cpu": Row(("stem", "upsample"), "-cpu", OPSET, int8.ranged_for_cpu, _int8_cpu),
    # OpenVINO takes 1.02 to 1.09 of the time with `upsample` (two cores of an AMD EPYC).
    "openvino": Row(("stem",), "-openvino", OPSET, int8.ranged_inputs, _int8_openvino),
}
