"""Weights of the authors' own code, under our names.

Their file is a state dict that `torch.save` wrote; each of our tensors has one of theirs
(docs/method.md#names). What our networks have not is dropped by name, what does not fit begins at
random and is recorded as untrained. They go with the preprocessing that they were trained on,
`cxrgazelearn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cxrgaze.errors import IntegrityError, UsageError
from cxrgaze.files import read_regular, sha256
from cxrgaze.spec import LOG_DENSITY, LOGITS, Head
from cxrgaze.train import checkpoint
from cxrgaze.train.card import Card
from cxrgaze.train.model import AnyNetwork, network_of, spec_of
from cxrgaze.train.origin import Origin

_LIMIT = 1 << 30
"""Bytes of a file; theirs are of 267 and 139 MB."""
_HEADS = {
    "saliency.0.": "out_conv_image.conv2d.",
    "saliency.1.": "out_conv_image.BatchNorm2d.",
    "saliency.3.": "out_conv_image.conv_last.",
    "classifier.0.": "out_classification.linear_1.",
    "classifier.3.": "out_classification.linear_2.",
}
_CLASSIFIER = "out_classification."
_RESIDUAL = {
    "main.0.": "0.conv1.",
    "main.1.": "0.bn1.",
    "main.3.": "0.conv2.",
    "main.4.": "0.bn2.",
    "shortcut.": "0.conv_shortcut.",
    "excite.": "1.fc.",
}
_UNUSED = frozenset({"dummy_tensor", "lg_sigma_class", "lg_sigma_image"})


@dataclass(frozen=True)
class Kind:
    """A network of the authors."""

    variant: str
    """What it is with us."""
    prefixes: Mapping[str, str]
    """Beginnings of their names by those of ours."""
    unused: frozenset[str]
    """Tensors that their network carries and its outputs do not need."""

    def theirs(self, name: str) -> str:
        """Their name of our tensor."""
        ours = next(prefix for prefix in self.prefixes if name.startswith(prefix))
        # MONAI's dense layers hold theirs in a module `layers`.
        return self.prefixes[ours] + name[len(ours) :].replace(".layers.", ".")


def _decoder(levels: int) -> dict[str, str]:
    """A decoder whose first step is named by the deepest of so many levels."""
    names = {}
    for step in range(levels):
        names[f"decoder.{step}.up."] = f"Up{5 - step}."
        names[f"decoder.{step}.fuse."] = f"Up_conv{5 - step}."
    return names


KINDS = {
    "cxrgazelearn": Kind(
        "paper",
        {
            "dense.features.": "model.features.",
            **{
                f"skips.{level}.{ours}": f"Conv{level + 1}.{theirs}"
                for level in range(5)
                for ours, theirs in _RESIDUAL.items()
            },
            **_decoder(5),
            **_HEADS,
        },
        _UNUSED | {"conv.weight", "conv.bias", "model.classifier.weight", "model.classifier.bias"},
    ),
    "mt-unet": Kind(
        "mt-unet",
        {
            **{f"encoder.{level}.": f"Conv{level + 1}." for level in range(5)},
            **_decoder(4),
            **_HEADS,
        },
        _UNUSED,
    ),
}
"""By the name of `--from`."""


@dataclass(frozen=True)
class Imported:
    """What came of a file."""

    card: Card
    dropped: tuple[str, ...]
    """Their tensors that are not used."""
    untrained: Mapping[Head, str]
    """Outputs that nothing taught, and why that is said."""


def import_weights(
    source: Path, kind: str, output: Path, *, trained_on: str, command: str
) -> Imported:
    """Make a checkpoint of a file of the authors' code.

    Args:
        source: `NET.pt`, of any stage.
        kind: of `KINDS`.
        output: `NAME.safetensors`, with the card beside it.
        trained_on: the films that it was trained on, in words.
        command: to make this checkpoint again, for the card.

    Raises:
        UsageError: no such file, another suffix, no words.
        IntegrityError: not a state dict that can be read, naming every tensor that is missing or
            foreign, or of another shape outside of the classifier, or with values that are not
            finite.
    """
    if output.suffix != ".safetensors":
        raise UsageError(f"--output {output}: expected NAME.safetensors")
    if not trained_on.strip():
        raise UsageError("--trained-on is empty: say in words what films the weights were made of")
    if not source.is_file():
        raise UsageError(f"{source} does not exist; expected the NET.pt of one of their runs")
    data = read_regular(source, _LIMIT)
    digest = sha256(data)
    theirs = _unwrapped(checkpoint.read_tensors(data, str(source)), source)
    of = KINDS[kind]
    spec = spec_of(
        of.variant,
        model_version=f"{kind}-{digest[:12]}",
        pixel_source="stored-values",
        domain="clinical",
        rule="cxrgazelearn",
    )
    torch.manual_seed(0)  # what the file does not fill begins at random, the same each time
    network = network_of(spec)
    _require_fit(theirs, kind, network, source)
    weights = {name: theirs[of.theirs(name)] for name in network.state_dict()}
    untrained = _fitted(weights, network)
    checkpoint.load_weights(network, weights, str(source))
    dropped = tuple(name for name in theirs if name in of.unused)
    card = checkpoint.save(
        output,
        network.eval(),
        name=output.stem,
        spec=spec,
        trained_on=trained_on,
        lineage=(Origin(trained_on=trained_on, weights_sha256=digest),),
        untrained=tuple(head for head in spec.heads if head in untrained),
        command=command,
        config={
            "imported": kind,
            "file": source.name,
            "file_sha256": digest,
            "heatmap": "paper",
        },
        results={"dropped": list(dropped), "untrained": untrained},
    )
    return Imported(card, dropped, untrained)


def _unwrapped(weights: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Tensors without what `DataParallel` puts before their names: of all, or of the DenseNet."""
    whole, dense = "module.", "model.module."
    is_whole = all(name.startswith(whole) for name in weights)
    names = [name[len(whole) :] if is_whole else name for name in weights]
    names = ["model." + n[len(dense) :] if n.startswith(dense) else n for n in names]
    if len(set(names)) < len(names):
        raise IntegrityError(f"{source} has tensors twice, with and without DataParallel's prefix")
    return dict(zip(names, weights.values(), strict=True))


def _require_fit(
    theirs: Mapping[str, Tensor], kind: str, network: AnyNetwork, source: Path
) -> None:
    """Refuse a file that has not just the tensors of its kind.

    Raises:
        IntegrityError: naming all that are missing, foreign, or of another shape; a classifier may
            have any.
    """
    of = KINDS[kind]
    expected = {of.theirs(name): tensor.shape for name, tensor in network.state_dict().items()}
    wrong = [f"{name} is missing" for name in expected if name not in theirs]
    known = of.unused.union(expected)
    wrong += [f"{name} is not expected" for name in theirs if name not in known]
    wrong += [
        f"{name} has shape {tuple(theirs[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in theirs and theirs[name].shape != shape and not name.startswith(_CLASSIFIER)
    ]
    if wrong:
        raise IntegrityError(
            f"{source} is no state dict of {kind} ({len(theirs)} tensors, expected "
            f"{len(expected)} and up to {len(of.unused)} unused ones); choose another --from, or "
            f"the NET.pt as their code saves it: {'; '.join(wrong)}"
        )


def _fitted(weights: dict[str, Tensor], network: AnyNetwork) -> dict[Head, str]:
    """Put our own first values in the place of a classifier that does not fit.

    Returns:
        The heads that nothing taught, with the reason.
    """
    untrained: dict[Head, str] = {}
    own = {n: t for n, t in network.state_dict().items() if n.startswith("classifier.")}
    unlike = [name for name, tensor in own.items() if weights[name].shape != tensor.shape]
    if unlike:
        found, needed = (tuple(of[unlike[0]].shape) for of in (weights, own))
        untrained[LOGITS] = f"its classifier is of another stage: {found}, expected {needed}"
        weights.update(own)
    scale, shift = (weights[f"saliency.1.{name}"] for name in ("weight", "bias"))
    if bool((scale == 1).all()) and not bool(shift.any()):
        untrained[LOG_DENSITY] = "the BatchNorm of its saliency head is as it begins"
    return untrained
