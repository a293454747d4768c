"""The typed forms of a graph that an export tries, in order: the first that passes ships."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx

from cxrgaze.bundle import Precision, Target
from cxrgaze.errors import ParityError
from cxrgaze.export import fp16, int8

_Q_DQ = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class Form:
    """One typed graph."""

    name: str
    kept: tuple[str, ...]
    """Blocks that went back to higher precision."""
    model: onnx.ModelProto
    float32_nodes: int
    """Nodes of a low-precision graph that stay float32 on purpose."""


def forms(
    model: onnx.ModelProto,
    precision: Precision,
    target: Target,
    ranges: int8.Ranges | None = None,
    kept: Collection[str] = (),
) -> Iterator[Form]:
    """Forms of a float32 graph for a precision and a target.

    fp16 has one. int8 for TensorRT has two, float16 scales first and float32 scales after them;
    for the CPU one.

    Args:
        ranges: of `int8.calibrate`, for int8.
        kept: blocks that go back: to float16 from int8, to float32 from fp16.

    Raises:
        ParityError: a conversion that breaks a rule; a block that the graph does not have.
    """
    blocks = tuple(sorted(kept))
    if precision == "fp32":
        yield Form("fp32", (), model, 0)
    elif precision == "fp16":
        nodes = {node.name for node in model.graph.node if int8.block_of(node) in blocks}
        if blocks and not nodes:
            raise ParityError(f"no node belongs to {blocks}")
        typed = fp16.to_fp16(model, nodes_kept=nodes)
        yield Form("fp16", blocks, typed, fp16.check_kept(typed) + len(nodes))
    else:
        if ranges is None:
            raise ParityError("int8 needs calibrated ranges")
        keep = int8.kept_convolutions(model, blocks)
        if target == "cpu":
            yield Form(
                "int8 for the CPU, float32 else", blocks, int8.for_cpu(model, ranges, keep), 0
            )
            return
        quantized = int8.for_tensorrt(model, ranges, keep)
        for name, also in (("float16 scales", frozenset[str]()), ("float32 scales", _Q_DQ)):
            typed = fp16.to_fp16(quantized, fp16.KEEP | also)
            int8.lint(typed)
            yield Form(f"int8, float16 else, {name}", blocks, typed, fp16.check_kept(typed))


def blocks_of(model: onnx.ModelProto, precision: Precision) -> list[str]:
    """Blocks that can go back, in the graph's order: those with a convolution in low precision."""
    always = int8.kept_convolutions(model) if precision == "int8" else set()
    names = (int8.block_of(n) for n in int8.convolutions(model) if n.name not in always)
    return list(dict.fromkeys(names))
