"""Ranges of a graph's activations over films, collected film by film.

Every value is counted by its sign, its exponent and the first six bits of its mantissa: one pass
over the films, 256 KB a tensor, and from it the extremes, any percentile to 1.6 %, and what float16
would do to the tensor. No activation outlives its film, and of one film no more than `BUDGET` bytes
are held at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from cxrgaze.export.graph import for_one_film
from cxrgaze.runtime.ort import open_session
from cxrgaze.spec import IMAGE

Method = Literal["minmax", "percentile"]

BUDGET = 1 << 29
"""Bytes of activations that are held at once, beside one tensor that may be larger alone."""

_SHIFT = 17  # keeps sign, 8 bits of exponent, 6 of mantissa
_BINS = 1 << (32 - _SHIFT)
_NEGATIVE = _BINS // 2
_INFINITE = 255 << (23 - _SHIFT)  # the first bin of infinity and NaN
_EDGES = np.full(_NEGATIVE + 1, np.inf)
_EDGES[:_INFINITE] = (np.arange(_INFINITE, dtype=np.uint32) << _SHIFT).view(np.float32)
"""Lower edge of each bin of one sign."""

_HALF_NORMAL = float(np.finfo(np.float16).tiny)


@dataclass
class Tally:
    """Counts of one tensor's values."""

    counts: NDArray[np.int64]
    """`(2 * bins,)`, non-negative values first."""
    low: float = np.inf
    high: float = -np.inf
    finite: bool = True

    def add(self, values: NDArray[np.float32]) -> None:
        """Count the values of one film."""
        low, high = float(values.min()), float(values.max())
        self.finite = self.finite and bool(np.isfinite([low, high]).all())
        self.low, self.high = min(self.low, low), max(self.high, high)
        bits = np.ascontiguousarray(values).view(np.uint32).ravel() >> np.uint32(_SHIFT)
        self.counts += np.bincount(bits, minlength=_BINS)

    @property
    def largest(self) -> float:
        """Largest absolute value."""
        return max(abs(self.low), abs(self.high))

    def range(self, method: Method, percentile: float) -> tuple[float, float]:
        """Lowest and highest value to represent.

        Args:
            method: the extremes, or the values that leave `100 - percentile` percent outside, half
                of them on each side of a tensor that has both signs.
        """
        if method == "minmax":
            return self.low, self.high
        outside = self.counts.sum() * (1 - percentile / 100)
        positive, negative = self.counts[:_NEGATIVE], self.counts[_NEGATIVE:]
        both = negative.sum() > outside and positive.sum() > outside
        share = outside / 2 if both else outside
        low = -min(_upper(negative, share), -self.low) if self.low < 0 else self.low
        high = min(_upper(positive, share), self.high) if self.high > 0 else self.high
        return low, high

    @property
    def subnormal_share(self) -> float:
        """Share of the values other than zero that lose bits in float16 for being small."""
        small = (_EDGES[1:] <= _HALF_NORMAL) & (np.arange(_NEGATIVE) > 0)
        return self._magnitudes(small) / self.nonzero if self.nonzero else 0.0

    @property
    def magnitudes(self) -> NDArray[np.int64]:
        """Values other than zero by their exponent as float32 stores it, `(256,)`."""
        both = self.counts[:_NEGATIVE] + self.counts[_NEGATIVE:]
        both[0] = 0
        return np.asarray(both.reshape(256, -1).sum(axis=1))

    @property
    def nonzero(self) -> int:
        """Values other than zero, to the smallest bin."""
        return self._magnitudes(np.arange(_NEGATIVE) > 0)

    def _magnitudes(self, chosen: NDArray[np.bool_]) -> int:
        return int((self.counts[:_NEGATIVE] + self.counts[_NEGATIVE:])[chosen].sum())


def _upper(counts: NDArray[np.int64], outside: float) -> float:
    """Upper edge of the last bin before which at most `outside` values lie beyond."""
    beyond = np.cumsum(counts[::-1])[::-1]
    inside = np.flatnonzero(beyond > outside)
    return float(_EDGES[inside[-1] + 1]) if len(inside) else 0.0


def collect(
    model: onnx.ModelProto, names: Collection[str], images: Sequence[NDArray[np.float32]]
) -> dict[str, Tally]:
    """Counts of the tensors called `names` while the float32 `model` reads films one at a time.

    Args:
        images: canvases `(1, H, W)`.

    Raises:
        KeyError: a name that is no float32 tensor of the graph.
    """
    sizes = _sizes(model)
    groups = list(_groups([name for name in sizes if name in set(names)], sizes))
    if unknown := set(names) - {IMAGE} - set(sizes):
        raise KeyError(f"no float32 tensors of the graph: {sorted(unknown)}")
    tallies = {name: Tally(np.zeros(_BINS, np.int64)) for name in names}
    if IMAGE in tallies:
        for image in images:
            tallies[IMAGE].add(image)
    for name, values in _given(model, groups, images):
        tallies[name].add(values)
    return tallies


def channel_peaks(
    model: onnx.ModelProto, names: Collection[str], images: Sequence[NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """Largest absolute value of each channel of the tensors called `names`, over films.

    Args:
        names: of tensors `(1, C, H, W)`; those that no node gives are left out.
        images: canvases `(1, H, W)`.
    """
    sizes = _sizes(model)
    peaks: dict[str, NDArray[np.float32]] = {}
    groups = _groups([name for name in sizes if name in set(names)], sizes)
    for name, values in _given(model, groups, images):
        largest = np.abs(values).max(axis=(0, *range(2, values.ndim)))
        peaks[name] = np.maximum(largest, peaks.get(name, largest))
    return peaks


def _given(
    model: onnx.ModelProto, groups: Iterable[Sequence[str]], images: Sequence[NDArray[np.float32]]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor of every group, film by film; those of one group and film are held at once."""
    for group in groups:
        session = open_session(_giving(model, group), spinning=False)
        for image in images:
            yield from zip(group, session.run(group, {IMAGE: image[None]}), strict=True)


def _giving(model: onnx.ModelProto, names: Sequence[str]) -> bytes:
    """The graph with these outputs alone, and the nodes that they need.

    ONNX Runtime keeps every output of a graph until the run ends, also those not asked for.
    """
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    needed, nodes = set(names), []
    for node in reversed(watched.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    nodes.reverse()
    stored = [w for w in watched.graph.initializer if w.name in needed]
    del watched.graph.node[:], watched.graph.initializer[:], watched.graph.output[:]
    watched.graph.node.extend(nodes)
    watched.graph.initializer.extend(stored)
    watched.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    data: bytes = watched.SerializeToString()
    return data


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of every float32 tensor that a node gives, for one film, in the graph's order."""
    graph = for_one_film(model)
    types = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.output)}
    sizes = {}
    for name in (name for node in graph.node for name in node.output):
        kind = types[name]
        if kind.elem_type == onnx.TensorProto.FLOAT:
            sizes[name] = 4 * int(np.prod([d.dim_value for d in kind.shape.dim]))
    return sizes


def _groups(names: Sequence[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for name in names:
        if group and held + sizes[name] > BUDGET:
            yield group
            group, held = [], 0
        group.append(name)
        held += sizes[name]
    if group:
        yield group
