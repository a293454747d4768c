"""The paper's network as the source of an export: a checkpoint, or random weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import cast

import torch
from torch import nn

from cxrgaze.bundles.bundle import CARD, PRIOR
from cxrgaze.export.canvases import CALIBRATION_SEED, phantom_canvases
from cxrgaze.export.report import FOLDER
from cxrgaze.export.source import Facts, Layout, TorchSource
from cxrgaze.files import sha256
from cxrgaze.spec import ModelSpec
from cxrgaze.train import card_page, checkpoint
from cxrgaze.train.card import Card
from cxrgaze.train.model import AnyNetwork, Network, block_of, kept_in, random_network, spec_of
from cxrgaze.train.rewrites import rewrites_of, rewritten
from cxrgaze.train.shipped import networks


def source_from_checkpoint(path: Path) -> TorchSource:
    """The network of a checkpoint (`checkpoint.load` says what can be wrong)."""
    network, card = checkpoint.load(path)
    facts = Facts(
        card.name,
        path.name,
        card.weights_sha256,
        card.trained_on,
        decision=card.decision,
        untrained=card.untrained,
        untaught=card.untaught,
        training_split_sha256=card.lineage[-1].split_sha256 if card.lineage else "",
        operating_sensitivity=card.config.get("operating_sensitivity"),
        validated_on_phantoms=path.resolve() in map(Path.resolve, networks().values()),
        seen=checkpoint.seen_by(path, card),
        heatmap=card.config.get("heatmap"),
        beside=_beside(path, card),
    )
    return _source(network, card.spec, facts)


def source_from_random(variant: str, seed: int) -> TorchSource:
    """An untrained network for latency work."""
    spec = spec_of(
        variant, model_version=f"random-{seed}", pixel_source="image-8bit", domain="none"
    )
    images = phantom_canvases(spec, 2, CALIBRATION_SEED)
    network = random_network(spec, torch.from_numpy(images), seed)
    weights = b"".join(v.numpy().tobytes() for v in network.state_dict().values())
    facts = Facts(
        f"{variant}-random",
        f"random weights (seed {seed}, Kaiming, BatchNorm calibrated on two phantoms)",
        sha256(weights),
        "nothing: untrained",
        random_seed=seed,
    )
    return _source(network, spec, facts)


def _beside(path: Path, card: Card) -> dict[str, bytes]:
    """The card as a record and to read, and what an evaluation elsewhere compares with."""
    prior = checkpoint.prior_bytes(path, card)
    pages = card_page.pages(card, f"{FOLDER}/card")
    return {CARD: card.rendered(), **pages, **({PRIOR: prior} if prior else {})}


def _source(network: AnyNetwork, spec: ModelSpec, facts: Facts) -> TorchSource:
    layout = Layout(kept_in(spec), block_of)
    return TorchSource(network, spec, facts, layout, rewrites_of(spec), _rewritten)


def _rewritten(module: nn.Module, names: Collection[str]) -> nn.Module:
    return rewritten(cast(Network, module), names)
