"""Exact rewrites before export: the same function with fewer operations.

`stem` feeds the grey image once instead of three times. `upsample` convolves the small map, with
2x2 kernels for each of the four pixels that a small one becomes. `shortcut` reads the input of a
residual block once; it saves no multiply-accumulate.

Time without over time with, the whole graph, one film, contenders in turns (`benchmarks.paired`:
median over rounds, 95 % interval), 2026-11-25. Two idle cores of an Intel Xeon (family 6, model
207, AVX-512 VNNI); ONNX Runtime 1.32.0, torch 2.13.0:

    ONNX Runtime                  stem   stem+upsample        with shortcut too
    tiny,  1 thread,  60 rounds   1.01   1.05 (1.04 to 1.06)  1.02
    tiny,  2 threads, 60 rounds   0.99   0.96 (0.92 to 0.99)  0.91
    edge,  1 thread,  12 rounds   1.00   1.04 (1.04 to 1.04)  0.94
    edge,  2 threads, 18 rounds   0.99   1.00 (1.00 to 1.01)  0.90
    paper, 1 thread,   3 rounds   1.00   1.07 (no interval)   1.01
    paper, 2 threads,  5 rounds   1.00   1.03 (no interval)   0.97
    int8 for the CPU
    edge,  1 thread,  14 rounds   1.01   1.07 (1.07 to 1.08)  not measured
    edge,  2 threads, 20 rounds   1.02   1.07 (1.06 to 1.07)  not measured
    torch, without gradients
    edge,  1 thread,   7 rounds   1.00   1.03 (no interval)   not measured
    edge,  2 threads, 10 rounds   1.01   1.04 (0.93 to 1.06)  not measured

On a busier day torch gained 1.18 on `edge` at one thread (20 blocks). Not measured: torch on
`paper`, any GPU. `upsample` loses on `tiny` at two threads, and pays or costs nothing elsewhere: it
stays on.
The same graph twice differs by up to 0.006. A step of the decoder by itself gains more than in its
graph (docs/graphs.md#rewrites): alone, its baseline pays for a change of layout. The transpositions
run on one thread. `shortcut` loses because its Split leaves ONNX Runtime's blocked layout and takes
the place of an addition that was fused into a convolution.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxrgaze.errors import UsageError
from cxrgaze.spec import LOG_DENSITY, ModelSpec
from cxrgaze.train.layers import UpStep, global_mean
from cxrgaze.train.model import VARIANTS, DenseEncoder, DenseTaps, Network, ResidualSE
from cxrgaze.train.mt_unet import MTUNetVariant


@dataclass(frozen=True)
class Rewrite:
    """One exact change of a network."""

    apply: Callable[[Network], None]
    """Changes a network in evaluation mode, in place."""
    saved_macs: Callable[[Network, int, int], int]
    """Multiply-accumulates of convolutions that it saves for one film on a canvas of H and W."""
    of_the_map: bool = True
    """Whether what it changes is there for the map alone."""


def rewritten(network: Network, names: Iterable[str]) -> Network:
    """A copy of a trained network in evaluation mode that computes the same in another way.

    Weights are summed and BatchNorm is folded in float64, whatever the network's own type is.

    Args:
        network: as `cxrgaze.train` makes it; it stays as it is.
        names: of `REWRITES`.

    Raises:
        UsageError: a name that is no rewrite.
    """
    chosen = _chosen(names)
    network = copy.deepcopy(network).eval()
    for rewrite in chosen:
        rewrite.apply(network)
    return network.eval()


def saved_macs(network: Network, spec: ModelSpec, names: Iterable[str]) -> int:
    """Multiply-accumulates of convolutions that rewrites save for one film on the canvas of `spec`.

    Args:
        network: before it is rewritten.
        names: of `REWRITES`.

    Raises:
        UsageError: a name that is no rewrite.
    """
    return sum(r.saved_macs(network, spec.height, spec.width) for r in _chosen(names))


class GreyEncoder(DenseEncoder):
    """The dense encoder on one channel: conv0's weight is summed over the three equal ones."""

    def __init__(self, encoder: DenseEncoder) -> None:
        nn.Module.__init__(self)  # not DenseEncoder's: that would make a whole new DenseNet
        self.features = encoder.features
        self.out_channels = encoder.out_channels
        conv = _part(self, "features.conv0", nn.Conv2d)
        self.features.conv0 = _convolution(
            conv.weight.double().sum(dim=1, keepdim=True),
            None,
            like=conv,
            stride=conv.stride,
            padding=conv.padding,
        )

    def forward(self, image: Tensor) -> DenseTaps:
        """Taps of `image` `(N, 1, H, W)`."""
        x = bottleneck = image
        for name, stage in self.features.named_children():
            if name == "norm5":
                bottleneck = x
            x = stage(x)
        return DenseTaps(bottleneck, global_mean(F.relu(x)))


class FromPhases(nn.Module):
    """A map from its four phases: depth to space, then one pixel off every border.

    `(N, 4 * channels, h + 1, w + 1)` to `(N, channels, 2 * h, 2 * w)`. Channels are ordered
    (channel, column in the 2x2 block, row in the block). Two transpositions, because ONNX Runtime's
    CPU takes half as long for them as for one DepthToSpace, which moves single values.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        height, width = x.shape[2:]
        x = x.reshape(-1, self.channels, 2, 2 * height * width).transpose(2, 3)
        x = x.reshape(-1, self.channels, 2, height, 2 * width).transpose(2, 3)
        return x.reshape(-1, self.channels, 2 * height, 2 * width)[:, :, 1:-1, 1:-1]


class JoinedResidualSE(nn.Module):
    """A residual block whose two convolutions of its input are one.

    The BatchNorm after the first is folded into it; the other layers keep their names.
    """

    def __init__(self, block: ResidualSE) -> None:
        super().__init__()
        weight, bias = _folded(block, "main.0", "main.1")
        shortcut = block.shortcut
        self.joined = _convolution(
            torch.cat([weight, shortcut.weight.double()]),
            torch.cat([bias, shortcut.get_parameter("bias").double()]),
            like=shortcut,
            padding=1,
        )
        self.main = _named({2: nn.ReLU(), 3: block.main[3], 4: block.main[4]})
        self.relu = block.relu
        self.excite = block.excite

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in, H, W)` to `(N, out, H, W)`."""
        half = self.joined.out_channels // 2
        main, shortcut = torch.split(self.joined(x), [half, half], dim=1)
        x = self.relu(self.main(main) + shortcut)
        weights: Tensor = self.excite(global_mean(x))
        return x * weights[:, :, None, None]


def _stem(network: Network) -> None:
    network.dense = GreyEncoder(network.dense)


def _stem_macs(network: Network, height: int, width: int) -> int:
    conv = _part(network, "dense.features.conv0", nn.Conv2d)
    places = (height // conv.stride[0]) * (width // conv.stride[1])
    return conv.weight[:, 1:].numel() * places


# Rows of a 3x3 kernel that fall on the same row of the small map, summed: output row 2p - 1 (first
# row of block p) sees rows p - 1, p - 1, p of the small map, output row 2p sees p - 1, p, p. The
# same for columns. Row -1 is zero padding in both maps, so the border is exact.
_TAPS = torch.tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], dtype=torch.float64)


def _upsample(network: Network) -> None:
    for level in range(len(network.decoder)):
        step = _part(network, f"decoder.{level}", UpStep)
        weight, bias = _folded(step, "up.1", "up.2")
        taps = _TAPS.to(weight.device)
        phases = torch.einsum("aky,blx,oiyx->obaikl", taps, taps, weight).flatten(0, 2)
        like = _part(step, "up.1", nn.Conv2d)
        small = _convolution(phases, bias.repeat_interleave(4), like=like, padding=1)
        step.up = _named({1: small, 3: step.up[3], 4: FromPhases(like.out_channels)})


def _upsample_macs(network: Network, height: int, width: int) -> int:
    saved = 0
    for level in range(len(network.decoder)):
        conv = _part(network, f"decoder.{level}.up.1", nn.Conv2d)
        h, w = (height >> 5) << level, (width >> 5) << level
        pairs = conv.in_channels * conv.out_channels
        saved += pairs * (9 * (2 * h) * (2 * w) - 16 * (h + 1) * (w + 1))
    return saved


def _shortcut(network: Network) -> None:
    for level in range(len(network.skips)):
        block = _part(network, f"skips.{level}", ResidualSE)
        network.skips[level] = JoinedResidualSE(block)


def _no_macs(network: Network, height: int, width: int) -> int:
    return 0


def rewrites_of(spec: ModelSpec) -> dict[str, Rewrite]:
    """The rewrites that a network of this variant with these heads has something for."""
    if isinstance(VARIANTS[spec.variant], MTUNetVariant):
        return {}  # they were measured on the dual encoder alone
    has_map = LOG_DENSITY in spec.heads
    return {name: one for name, one in REWRITES.items() if has_map or not one.of_the_map}


REWRITES = {
    "stem": Rewrite(_stem, _stem_macs, of_the_map=False),
    "upsample": Rewrite(_upsample, _upsample_macs),
    "shortcut": Rewrite(_shortcut, _no_macs),
}


def _chosen(names: Iterable[str]) -> list[Rewrite]:
    names = set(names)
    if unknown := sorted(names - set(REWRITES)):
        raise UsageError(
            f"no rewrite is called {', '.join(unknown)}; there are {', '.join(REWRITES)}"
        )
    return [rewrite for name, rewrite in REWRITES.items() if name in names]


def _folded(module: nn.Module, conv_path: str, norm_path: str) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of a convolution with the BatchNorm after it."""
    conv, norm = _part(module, conv_path, nn.Conv2d), _part(module, norm_path, nn.BatchNorm2d)
    mean, variance = (norm.get_buffer(f"running_{name}").double() for name in ("mean", "var"))
    factor = norm.weight.double() / torch.sqrt(variance + norm.eps)
    bias = norm.bias.double() + factor * (conv.get_parameter("bias").double() - mean)
    return conv.weight.double() * factor[:, None, None, None], bias


def _convolution(
    weight: Tensor, bias: Tensor | None, *, like: nn.Conv2d, **options: Any
) -> nn.Conv2d:
    """A convolution with these weights, of the type and on the device of `like`."""
    conv: nn.Conv2d = nn.utils.skip_init(  # the constructor would draw global random numbers
        nn.Conv2d,
        weight.shape[1],
        weight.shape[0],
        tuple(weight.shape[2:]),
        bias=bias is not None,
        device=like.weight.device,
        dtype=like.weight.dtype,
        **options,
    )
    conv.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return conv


def _named(layers: dict[int, nn.Module]) -> nn.Sequential:
    """Layers that keep the positions, and so the names, that they had."""
    return nn.Sequential(OrderedDict({str(position): layer for position, layer in layers.items()}))


_Module = TypeVar("_Module", bound=nn.Module)


def _part(module: nn.Module, path: str, kind: type[_Module]) -> _Module:
    part = module.get_submodule(path)
    if not isinstance(part, kind):
        raise TypeError(f"{path} is a {type(part).__name__}, expected a {kind.__name__}")
    return part
