"""A checkpoint or a bundle behind one function, for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cxrgaze.bundles.bundle import CARD, MANIFEST, PRIOR, Bundle
from cxrgaze.bundles.manifest import Provenance
from cxrgaze.bundles.served import Served
from cxrgaze.errors import IntegrityError, UsageError
from cxrgaze.evidence.gate import read_seen
from cxrgaze.evidence.seen import Seen
from cxrgaze.records import parse_record
from cxrgaze.runtime.ort import OnnxRuntime
from cxrgaze.spec import Infer, ModelSpec, Outputs
from cxrgaze.train import checkpoint
from cxrgaze.train.baseline import Baseline
from cxrgaze.train.card import Card
from cxrgaze.train.evaluation_record import ModelIdentity
from cxrgaze.train.figures import predict
from cxrgaze.train.origin import Origin


@dataclass(frozen=True)
class EvaluatedModel:
    """A network that can be run, and what is known of it."""

    path: Path
    served: Served
    identity: ModelIdentity
    heatmap: str | None
    """Preset that its gaze densities were made with; None where it does not say."""
    origins: tuple[Origin, ...]
    """What it was trained on; of a bundle without a card, the last set alone is known."""
    predict: Infer
    seen: Seen | None = None
    """What it was trained on, where it is recorded."""
    baselines: tuple[Baseline, ...] = ()
    """Fitted on its training films."""
    prior: NDArray[np.float32] | None = None
    """Centre prior of its training films `(H, W)`, for `heatmap`."""

    @property
    def spec(self) -> ModelSpec:
        """Its interface."""
        return self.served.spec


def open_model(path: Path, threads: int | None = None) -> EvaluatedModel:
    """The model of a checkpoint or a bundle.

    Args:
        threads: of the arithmetic; None for all.

    Raises:
        UsageError: neither. IntegrityError: malformed or altered.
    """
    if (path / MANIFEST).is_file():
        return _bundle_model(path, threads)
    if path.suffix == ".safetensors":
        return _checkpoint_model(path, threads)
    raise UsageError(f"{path} is neither a checkpoint (.safetensors) nor a bundle (a folder)")


def _bundle_model(path: Path, threads: int | None) -> EvaluatedModel:
    bundle = Bundle.open(path)
    bundle.verify()
    backend = OnnxRuntime(threads)  # of the graph, whatever its target: nothing is served
    backend.activate(bundle)

    def predict_one_by_one(images: NDArray[np.float32]) -> Outputs:
        films = [backend.infer(image[None]) for image in images]
        return {head: np.concatenate([film[head] for film in films]) for head in films[0]}

    manifest, source = bundle.manifest, bundle.manifest.provenance
    card, prior = None, None
    if CARD in bundle:
        card = parse_record(Card, bundle.read(CARD), str(path / CARD))
        if card.spec != manifest.spec:
            raise IntegrityError(f"{path / CARD}: the card of another network")
    if PRIOR in bundle:
        prior = checkpoint.read_prior(bundle.read(PRIOR), manifest.spec, str(path / PRIOR))
    return EvaluatedModel(
        path=path,
        served=manifest.served,
        identity=ModelIdentity(
            kind="bundle",
            name=manifest.name,
            sha256=bundle.sha256,
            precision=manifest.precision,
            backend=backend.name,
            trained_on=source.trained_on,
        ),
        heatmap=card.config.get("heatmap") if card else None,
        origins=card.lineage if card else (_origin(source),),
        predict=predict_one_by_one,
        seen=read_seen(bundle),
        baselines=card.baselines if card else (),
        prior=prior,
    )


def _origin(source: Provenance) -> Origin:
    return Origin(trained_on=source.trained_on, split_sha256=source.training_split_sha256)


def _checkpoint_model(path: Path, threads: int | None) -> EvaluatedModel:
    if threads:
        torch.set_num_threads(threads)
    network, card = checkpoint.load(path)
    return EvaluatedModel(
        path=path,
        served=card.served,
        identity=ModelIdentity(
            kind="checkpoint",
            name=card.name,
            sha256=card.weights_sha256,
            precision="fp32",
            backend="torch",
            trained_on=card.trained_on,
        ),
        heatmap=card.config.get("heatmap"),
        origins=card.lineage,
        predict=lambda images: predict(network, images),
        seen=checkpoint.seen_by(path, card),
        baselines=card.baselines,
        prior=checkpoint.prior_of(path, card),
    )
