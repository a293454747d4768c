"""The typed forms of a graph that an export tries, the most precise first."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx

from cxrgaze.bundles.manifest import Precision, Target
from cxrgaze.errors import ParityError
from cxrgaze.export import fp16, graph, int8
from cxrgaze.export.source import Layout
from cxrgaze.export.targets import TARGETS


@dataclass(frozen=True)
class Form:
    """One typed graph."""

    name: str
    kept: tuple[str, ...]
    """Blocks that went back to higher precision."""
    model: onnx.ModelProto
    float32_nodes: int
    """Nodes of a low-precision graph that stay float32 on purpose."""


@dataclass(frozen=True)
class Forms:
    """The forms of a float32 graph for a precision and a target."""

    model: onnx.ModelProto
    precision: Precision
    target: Target
    layout: Layout
    ranges: int8.Ranges | None = None
    """Of `int8.calibrate`, for int8."""

    def with_kept(self, kept: Collection[str] = ()) -> Iterator[Form]:
        """One for fp32, fp16 and int8 on the CPU; for TensorRT two, float32 scales first.

        Args:
            kept: blocks that go back: to float16 from int8, to float32 from fp16.

        Raises:
            ParityError: a conversion that breaks a rule; a block that the graph does not have.
        """
        blocks = tuple(sorted(kept))
        if self.precision == "fp32":
            yield Form("fp32", (), self.model, 0)
        elif self.precision == "fp16":
            nodes = {n.name for n in self.model.graph.node if self._block_of(n) in blocks}
            if blocks and not nodes:
                raise ParityError(f"no node belongs to {blocks}")
            nodes |= self.layout.float32_nodes(self.model)
            typed = fp16.to_fp16(self.model, nodes_kept=nodes)
            yield Form("fp16", blocks, typed, fp16.check_kept(typed) + len(nodes))
        else:
            if self.ranges is None:
                raise ParityError("int8 needs calibrated ranges")
            row = TARGETS[self.target]
            keep = int8.kept_convolutions(self.model, self.layout, blocks)
            model = self.model
            if model.opset_import[0].version != row.int8_opset:
                model = onnx.version_converter.convert_version(model, row.int8_opset)
            for name, typed, float32_nodes in row.int8(model, self.ranges, self.layout, keep):
                yield Form(name, blocks, typed, float32_nodes)

    def blocks(self) -> list[str]:
        """Blocks that can go back, in the graph's order: with a convolution in low precision."""
        is_int8 = self.precision == "int8"
        always = int8.kept_convolutions(self.model, self.layout) if is_int8 else set()
        nodes = (n for n in int8.convolutions(self.model) if n.name not in always)
        return list(dict.fromkeys(map(self._block_of, nodes)))

    def shares(self) -> dict[str, float]:
        """The share of all convolutions' work that each block of `blocks` has, in [0, 1]."""
        work = list(graph.convolution_work(self.model))
        whole = sum(one.macs for one in work) or 1
        shares = dict.fromkeys(self.blocks(), 0.0)
        for one in work:
            if (block := self.layout.block_of(one.node)) in shares:
                shares[block] += one.macs / whole
        return shares

    def _block_of(self, node: onnx.NodeProto) -> str:
        return self.layout.block_of(node.name)
