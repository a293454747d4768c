"""Where a run's first weights come from: random, ImageNet, or a file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import NamedTuple

import torch

from cxrgaze.command import say
from cxrgaze.errors import CxrgazeError, IncompatibleError, IntegrityError, UsageError
from cxrgaze.evidence.seen import Seen
from cxrgaze.files import read_regular, sha256
from cxrgaze.spec import LOG_DENSITY, LOGITS, Head, ModelSpec, same_diagnosis
from cxrgaze.train import checkpoint
from cxrgaze.train.model import VARIANTS, AnyNetwork, Network, Variant, imagenet_to_dense
from cxrgaze.train.origin import Origin

IMAGENET_URL = "https://download.pytorch.org/models/densenet201-c1103571.pth"
"""Torchvision's DenseNet201; the name carries the first digits of its SHA-256."""
_LIMIT = 4 << 30


class Before(NamedTuple):
    """What first weights bring along."""

    origins: tuple[Origin, ...] = ()
    """What they descend from."""
    heads: frozenset[Head] = frozenset()
    """Outputs of the network that were taught before."""
    classes: frozenset[str] = frozenset()
    """Classes of the diagnosis that were taught before."""
    seen: Seen | None = None
    """What they were trained on, where it is recorded."""


def start(network: AnyNetwork, spec: ModelSpec, source: str, origin: str = "") -> Before:
    """Put first weights into `network` and say what they descend from.

    Args:
        source: `random`, `imagenet`, a checkpoint of cxrgaze (the whole network), or a file of
            DenseNet weights under torchvision's names (.safetensors, .pth; the dense encoder).
        origin: what a file without a card was trained on.

    Raises:
        UsageError: no such file. IncompatibleError: a checkpoint of another variant, ImageNet for
            a variant without DenseNet201. IntegrityError: naming every tensor that does not fit.
    """
    if source == "random":
        return Before()
    if source == "imagenet":
        data, origin = _imagenet(spec), "ImageNet (torchvision densenet201-c1103571)"
    else:
        path = Path(source)
        if not path.is_file():
            raise UsageError(f"--init {source}: expected random, imagenet or a file of weights")
        if path.suffix == ".safetensors" and path.with_suffix(".json").is_file():
            return _from_checkpoint(network, spec, path)
        data = read_regular(path, _LIMIT)
    weights = checkpoint.read_tensors(data, source)
    if not isinstance(network, Network):
        raise IncompatibleError(
            f"{source} holds weights of a DenseNet, which {spec.variant!r} has not; give a "
            "checkpoint, or random"
        )
    try:
        checkpoint.load_weights(network.dense, imagenet_to_dense(weights), source)
    except (KeyError, IndexError) as error:
        raise IntegrityError(
            f"{source}: names are not those of torchvision's DenseNet: {error.args[0]}"
        ) from error
    return Before((Origin(trained_on=origin, weights_sha256=sha256(data)),))


def _from_checkpoint(network: AnyNetwork, spec: ModelSpec, path: Path) -> Before:
    loaded, card = checkpoint.load(path)
    if card.spec.variant != spec.variant:
        raise IncompatibleError(
            f"{path} is of variant {card.spec.variant!r}, this run trains {spec.variant!r}; "
            "choose the same variant, or another --init"
        )
    if card.spec.canvas != spec.canvas:
        say(
            f"note: {path.name} was taught with canvases by {card.spec.canvas}, this run's are by "
            f"{spec.canvas}; --set canvas_rule={card.spec.canvas} keeps its own"
        )
    weights, own = loaded.state_dict(), network.state_dict()
    heads = frozenset(card.served.heads) & set(spec.heads)
    gone = {_part(name) for name in weights} - {_part(name) for name in own}
    if spec.heads != card.spec.heads or not same_diagnosis(spec, card.spec):
        # What another head or other classes gave its shape or its meaning begins anew.
        heads -= {LOGITS}
        begun = {n for n in own if n not in weights or own[n].shape != weights[n].shape}
        begun |= {name for name in own if _part(name) == "classifier"}
        if LOG_DENSITY in spec.heads:
            gone -= {"prior"}  # without it the map would be another: refused below
        weights = {n: tensor for n, tensor in weights.items() if _part(n) not in gone}
        weights |= {name: own[name] for name in begun}
        for what, parts in (("begun at random", set(map(_part, begun))), ("left out", gone)):
            if parts:
                listed = ", ".join(sorted(parts))
                say(f"note: {path.name} has other heads or classes; {what}: {listed}")
    checkpoint.load_weights(network, weights, str(path))
    taught = card.served.classes if LOGITS in heads else ()
    seen = checkpoint.seen_by(path, card)
    return Before(card.descent, heads, frozenset(taught), seen)


def _part(name: str) -> str:
    """The part of the network that a tensor is of."""
    return name.split(".")[0]


def _imagenet(spec: ModelSpec) -> bytes:
    sizes = VARIANTS[spec.variant]
    if not isinstance(sizes, Variant) or sizes.dense != (64, 32, (6, 12, 48, 32)):
        raise IncompatibleError(
            f"ImageNet weights are those of DenseNet201; variant {spec.variant!r} has another "
            "encoder: choose --init random or a file"
        )
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        torch.hub.load_state_dict_from_url(
            IMAGENET_URL, str(folder), check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CxrgazeError(
            f"ImageNet weights: {error}; download {IMAGENET_URL} to {folder} by hand"
        ) from error
    path = folder / IMAGENET_URL.rsplit("/", 1)[1]
    data = read_regular(path, _LIMIT)
    if not sha256(data).startswith(path.stem.rsplit("-", 1)[1]):  # torch checks downloads alone
        raise IntegrityError(f"{path} is not torchvision's file: its SHA-256 differs; delete it")
    return data
