"""Losses, by the names that a training stage gives them.

A loss over films returns the values of a batch's films and which of them count: films without the
label or the gaze that it needs do not. A contrastive loss looks at all embeddings of a batch at
once. Sums and counts are reduced over all processes before one is divided by the other, so that a
loss does not depend on how a batch is dealt out.

Differs from the authors' code at 6873ddf: the triplet loss takes pooled, L2-normalised features
and averages over the triplets that violate the margin, where theirs takes unpooled maps, a norm
over the map's width only, and the sum (docs/method.md#contrastive-losses).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cxrgaze.evidence.arrays import UNLABELLED
from cxrgaze.train.model import HeadTensors

MARGIN = 1.0
"""Of the triplet loss (docs/method.md#contrastive-losses)."""
CONTRAST_TEMPERATURE = 0.07
"""Of SupCon (the value of the authors' unused copy, docs/method.md#contrastive-losses)."""
DISTILLATION_TEMPERATURE = 2.0
"""Logits of teacher and student are divided by it."""


class Batch(NamedTuple):
    """Films and targets of one step."""

    film: Tensor
    """`(N,)`, index of each film in its split."""
    image: Tensor
    """`(N, 1, H, W)`, in [0, 1]."""
    label: Tensor
    """`(N,)`, `UNLABELLED` where there is none."""
    density: Tensor
    """`(N, 1, H, W)`, sum 1; all zero where there is no gaze."""
    teacher_logits: Tensor
    """`(N, C)`; `(N, 0)` without a teacher."""
    teacher_density: Tensor
    """`(N, 1, H, W)`, sum 1; `(N, 0)` without a teacher."""


class PerFilm(NamedTuple):
    """Values of one loss, and which films they count for."""

    value: Tensor
    """`(N,)`; zero where a film does not count."""
    counts: Tensor
    """`(N,)`, 1 or 0, in the type of `value`."""


def cross_entropy(out: HeadTensors, batch: Batch) -> PerFilm:
    """Softmax cross-entropy of the labelled films, in nats."""
    value = F.cross_entropy(
        out.logits.float(), batch.label, ignore_index=UNLABELLED, reduction="none"
    )
    return PerFilm(value, (batch.label != UNLABELLED).to(value.dtype))


def saliency_kl(out: HeadTensors, batch: Batch) -> PerFilm:
    """KL(gaze || prediction) of the films with gaze, in nats.

    Formula: sum_x G(x) [ln G(x) - ln P(x)], zeros of G give 0 (docs/method.md#saliency-loss). Over
    the whole canvas, where G is zero in the pad: this also drives predicted mass out of the pad.
    """
    return _kl(batch.density, out.log_density)


def saliency_cc(out: HeadTensors, batch: Batch) -> PerFilm:
    """Minus the Pearson correlation of prediction and gaze, over the whole canvas."""
    p, q = (m.flatten(1) for m in (out.log_density.float().exp(), batch.density))
    p, q = p - p.mean(1, keepdim=True), q - q.mean(1, keepdim=True)
    has_gaze = (q != 0).any(1)
    norm = (p.norm(dim=1) * q.norm(dim=1)).clamp(min=1e-12)
    value = -(p * q).sum(1) / norm
    return PerFilm(value * has_gaze, has_gaze.to(value.dtype))


def soft_labels(out: HeadTensors, batch: Batch) -> PerFilm:
    """KL(teacher || student) of softened probabilities times T squared, on every film.

    Source: Hinton, Vinyals & Dean, arXiv 1503.02531, section 2.
    """
    t = DISTILLATION_TEMPERATURE
    teacher, student = ((x.float() / t).log_softmax(1) for x in (batch.teacher_logits, out.logits))
    value = (teacher.exp() * (teacher - student)).sum(1) * t**2
    return PerFilm(value, torch.ones_like(value))


def soft_saliency(out: HeadTensors, batch: Batch) -> PerFilm:
    """KL(teacher's density || student's) in nats, on every film, gaze or not."""
    return _kl(batch.teacher_density, out.log_density)


def triplet(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Batch-all triplet margin loss, mean over the triplets that violate the margin.

    Formula: mean of d(a, p) - d(a, n) + `MARGIN` where positive, over all anchors a, positives
    p != a of the same class and negatives n of another; d is Euclidean on L2-normalised rows.

    Args:
        embeddings: `(N, features)`. labels: `(N,)`; unlabelled rows take no part.

    Source: Schroff et al., arXiv 1503.03832; batch-all as in Hermans et al., arXiv 1703.07737.
    """
    rows = F.normalize(embeddings[labels != UNLABELLED].float())
    same = _same(labels)
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    excess = distance[:, :, None] - distance[:, None, :] + MARGIN
    valid = (same & ~_diagonal(same))[:, :, None] & ~same[:, None, :]
    violating = excess.relu() * valid
    return violating.sum() / (violating > 0).sum().clamp(min=1)


def supcon(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss, mean over anchors that have a positive.

    Args:
        embeddings: `(N, features)`. labels: `(N,)`; unlabelled rows take no part.

    Source: Khosla et al., arXiv 2004.11362, equation 2 (L_out).
    """
    rows = F.normalize(embeddings[labels != UNLABELLED].float())
    if len(rows) < 2:
        return rows.sum() * 0  # a logsumexp over no other film has no gradient
    same = _same(labels)
    self_pair = _diagonal(same)
    logits = (rows @ rows.T / CONTRAST_TEMPERATURE).masked_fill(self_pair, -torch.inf)
    log_share = logits - logits.logsumexp(1, keepdim=True)
    positive = same & ~self_pair
    per_anchor = -log_share.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)
    has_positive = positive.any(1)
    return per_anchor[has_positive].sum() / has_positive.sum().clamp(min=1)


FilmLoss = Callable[[HeadTensors, Batch], PerFilm]
CONTRASTIVE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"triplet": triplet, "supcon": supcon}
ENCODER: dict[str, FilmLoss] = {"encoder_cross_entropy": cross_entropy}
"""On a linear layer over the dense encoder's embedding, dropped after its stage."""
NETWORK: dict[str, FilmLoss] = {
    "cross_entropy": cross_entropy,
    "saliency_kl": saliency_kl,
    "saliency_cc": saliency_cc,
    "soft_labels": soft_labels,
    "soft_saliency": soft_saliency,
}
FILM_LOSSES = {**ENCODER, **NETWORK}
TEACH_DIAGNOSIS = {"cross_entropy", "soft_labels"}
"""Losses on the network's logits."""
TEACH_SALIENCY = {"saliency_kl", "saliency_cc", "soft_saliency"}
"""Losses on the network's log-density."""
NEED_LABELS = {"triplet", "supcon", "encoder_cross_entropy", "cross_entropy"}
NEED_GAZE = {"saliency_kl", "saliency_cc"}
NEED_TEACHER = {"soft_labels", "soft_saliency"}


def _kl(target: Tensor, log_density: Tensor) -> PerFilm:
    entropy = torch.special.xlogy(target, target)
    value = (entropy - target * log_density.float()).flatten(1).sum(1)
    counts = (target.flatten(1).sum(1) > 0).to(value.dtype)
    return PerFilm(value * counts, counts)


def _same(labels: Tensor) -> Tensor:
    labelled = labels[labels != UNLABELLED]
    return labelled[:, None] == labelled[None, :]


def _diagonal(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=torch.bool, device=square.device)
