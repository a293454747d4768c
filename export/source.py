"""What an export starts from: a network as a graph, its float32 answers, and what is known of it.

`TorchSource` is the source of any torch module that maps a canvas to both heads. What is peculiar
to a network (exact rewrites, convolutions that stay in higher precision, blocks) comes with it; the
export knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from cxrgaze.bundles.served import Decision, Served
from cxrgaze.evidence.seen import Seen
from cxrgaze.export.from_torch import heads_in_order, onnx_from_module
from cxrgaze.export.graph import simplified
from cxrgaze.spec import Head, ModelSpec, Outputs


@dataclass(frozen=True)
class Facts:
    """What is known of a network beside what it computes."""

    name: str
    origin: str
    """File name of the checkpoint, or how random weights were made."""
    sha256: str
    """Of the weights."""
    trained_on: str
    decision: Decision = Decision()
    untrained: tuple[Head, ...] = ()
    """Heads that nothing taught."""
    untaught: tuple[str, ...] = ()
    """Classes that nothing taught."""
    training_split_sha256: str = ""
    operating_sensitivity: float | None = None
    """That its operating points were to reach; None for Youden's J."""
    validated_on_phantoms: bool = False
    """Whether its decision was fitted on `gate.VALIDATION_PHANTOMS`."""
    seen: Seen | None = None
    """What it was trained on, where it is recorded."""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Files that go with it into its bundles, by path: its card."""
    heatmap: str | None = None
    """Preset of the human maps that it was trained with."""
    random_seed: int | None = None
    """Of random weights; None for trained ones."""


def first_module(path: str) -> str:
    """The first module of the path of a node, as "decoder" of "/decoder/up/Conv"."""
    return path.strip("/").split("/")[0]


@dataclass(frozen=True)
class Layout:
    """How low precision goes through a network, by the names of its graph's nodes."""

    kept: tuple[str, ...] = ()
    """Convolutions that stay in higher precision: their names, or their beginnings with a "/"."""
    block_of: Callable[[str], str] = first_module
    """The block that a node belongs to: what goes back to higher precision together."""
    float32: str = ""
    """Nodes that compute in float32 in every precision: the beginning of their names."""

    def float32_nodes(self, model: onnx.ModelProto) -> set[str]:
        """Names of the nodes that compute in float32 in every precision."""
        names = {node.name for node in model.graph.node}
        return {name for name in names if self.float32 and name.startswith(self.float32)}


@dataclass(frozen=True)
class Answers:
    """What a network says of some canvases in float32."""

    images: NDArray[np.float32]
    """`(n, 1, H, W)`."""
    outputs: Outputs
    """Its heads for all of them."""
    peak: float
    """Largest absolute value that any layer takes or gives."""


class Source(Protocol):
    """A network to export."""

    @property
    def spec(self) -> ModelSpec:
        """What it expects and returns."""
        ...

    @property
    def facts(self) -> Facts:
        """What is known of it."""
        ...

    @property
    def layout(self) -> Layout:
        """How low precision goes through it."""
        ...

    @property
    def rewrites(self) -> Collection[str]:
        """Names of its exact rewrites: the same function with fewer operations."""
        ...

    def graph(self, rewrites: Collection[str] = ()) -> onnx.ModelProto:
        """Its float32 graph, simplified: `image` to the heads of the spec, N dynamic.

        Args:
            rewrites: of `self.rewrites`.
        """
        ...

    def answers(self, images: NDArray[np.float32]) -> Answers:
        """What it says of canvases `(n, 1, H, W)`, one at a time, without any rewrite."""
        ...


@dataclass(frozen=True)
class TorchSource:
    """A torch module from `(N, 1, H, W)` to its heads, as a `Source`.

    What it may give is `from_torch.heads_in_order`'s to say.
    """

    module: nn.Module
    spec: ModelSpec
    facts: Facts
    layout: Layout = Layout()
    rewrites: Mapping[str, object] = field(default_factory=dict)
    rewritten: Callable[[nn.Module, Collection[str]], nn.Module] = lambda module, names: module
    """A copy of the module that computes the same with the rewrites of these names."""

    def graph(self, rewrites: Collection[str] = ()) -> onnx.ModelProto:
        """See `Source`."""
        module = self.rewritten(self.module, rewrites)
        return simplified(onnx_from_module(module, self.spec))

    def answers(self, images: NDArray[np.float32]) -> Answers:
        """See `Source`."""
        parts: dict[Head, list[NDArray[np.float32]]] = {head: [] for head in self.spec.heads}
        self.module.eval()
        with _peak_of(self.module) as peak, torch.inference_mode():
            for image in images:
                given = self.module(torch.from_numpy(image[None]))
                for head, tensor in zip(
                    self.spec.heads, heads_in_order(given, self.spec), strict=True
                ):
                    parts[head].append(tensor.numpy())
        return Answers(images, {h: np.concatenate(part) for h, part in parts.items()}, peak[0])


def served_of(source: Source) -> Served:
    """What is served of a network."""
    facts = source.facts
    return Served(source.spec, facts.decision, facts.untrained, facts.untaught)


@contextmanager
def _peak_of(module: nn.Module) -> Iterator[list[float]]:
    """The largest absolute value that any layer takes or gives, in a list of one number."""
    peak = [0.0]

    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        for tensor in (*inputs, output):
            largest = float(tensor.abs().max())
            peak[0] = largest if largest > peak[0] or largest != largest else peak[0]

    leaves = [part for part in module.modules() if not any(part.children())]
    handles = [leaf.register_forward_hook(watch) for leaf in leaves]
    try:
        yield peak
    finally:
        for handle in handles:
            handle.remove()
