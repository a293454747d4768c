"""Losses, by the names that a training stage gives them.

A loss over films returns the values of a batch's films and how much of each counts: films without
the label or the gaze that it needs do not, nor findings that are not known. A contrastive loss
looks at all embeddings of a batch at once. Sums and counts are reduced over all processes before
one is divided by the other, so that a loss does not depend on how a batch is dealt out.

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

from cxrgaze.evidence.truth import HAS, UNKNOWN
from cxrgaze.spec import LOG_DENSITY, LOGITS, ClassKind
from cxrgaze.train.layers import HeadTensors

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
    truth: Tensor
    """`(N, C)`, int8 (`cxrgaze.evidence.truth`)."""
    density: Tensor
    """`(N, 1, H, W)`, sum 1; all zero where there is no gaze."""
    teacher_logits: Tensor
    """`(N, C)`; `(N, 0)` without a teacher."""
    teacher_density: Tensor
    """`(N, 1, H, W)`, sum 1; `(N, 0)` without a teacher."""


class PerFilm(NamedTuple):
    """Values of one loss, and how much they count for."""

    value: Tensor
    """`(N,)`; zero where a film does not count."""
    counts: Tensor
    """`(N,)`, in the type of `value`: 1 or 0, or how many findings of the film are known."""


def cross_entropy(out: HeadTensors, batch: Batch) -> PerFilm:
    """Softmax cross-entropy of the labelled films, in nats."""
    has = batch.truth == HAS
    labelled = has.any(1)
    label = torch.where(labelled, has.long().argmax(1), UNKNOWN)
    value = F.cross_entropy(out[LOGITS].float(), label, ignore_index=UNKNOWN, reduction="none")
    return PerFilm(value, labelled.to(value.dtype))


def binary_cross_entropy(out: HeadTensors, batch: Batch) -> PerFilm:
    """Sigmoid cross-entropy of the findings that are known, in nats: a sum over them a film."""
    known = (batch.truth != UNKNOWN).to(out[LOGITS].dtype).float()
    has = (batch.truth == HAS).float()
    value = F.binary_cross_entropy_with_logits(out[LOGITS].float(), has, reduction="none")
    return PerFilm((value * known).sum(1), known.sum(1))


def saliency_kl(out: HeadTensors, batch: Batch) -> PerFilm:
    """KL(gaze || prediction) of the films with gaze, in nats.

    Formula: sum_x G(x) [ln G(x) - ln P(x)], zeros of G give 0 (docs/method.md#saliency-loss). Over
    the whole canvas, where G is zero in the pad: this also drives predicted mass out of the pad.
    """
    return _kl(batch.density, out[LOG_DENSITY])


def saliency_cc(out: HeadTensors, batch: Batch) -> PerFilm:
    """Minus the Pearson correlation of prediction and gaze, over the whole canvas."""
    p, q = (m.flatten(1) for m in (out[LOG_DENSITY].float().exp(), batch.density))
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
    teacher, student = ((x.float() / t).log_softmax(1) for x in (batch.teacher_logits, out[LOGITS]))
    value = (teacher.exp() * (teacher - student)).sum(1) * t**2
    return PerFilm(value, torch.ones_like(value))


def soft_findings(out: HeadTensors, batch: Batch) -> PerFilm:
    """As `soft_labels` for findings: KL of each one's softened sigmoid, summed over them a film."""
    t = DISTILLATION_TEMPERATURE
    teacher, student = (x.float() / t for x in (batch.teacher_logits, out[LOGITS]))
    value = torch.zeros(len(teacher), dtype=teacher.dtype, device=teacher.device)
    for sign in (1, -1):
        there, here = F.logsigmoid(sign * teacher), F.logsigmoid(sign * student)
        value = value + (there.exp() * (there - here)).sum(1) * t**2
    return PerFilm(value, torch.full_like(value, float(teacher.shape[1])))


def soft_saliency(out: HeadTensors, batch: Batch) -> PerFilm:
    """KL(teacher's density || student's) in nats, on every film, gaze or not."""
    return _kl(batch.teacher_density, out[LOG_DENSITY])


def triplet(embeddings: Tensor, truth: Tensor) -> Tensor:
    """Batch-all triplet margin loss, mean over the triplets that violate the margin.

    Formula: mean of d(a, p) - d(a, n) + `MARGIN` where positive, over all anchors a, positives
    p != a of the same class and negatives n of another; d is Euclidean on L2-normalised rows.

    Args:
        embeddings: `(N, features)`.
        truth: `(N, C)`; films are of one class where all of it is the same, and take no part where
            some of it is not known.

    Source: Schroff et al., arXiv 1503.03832; batch-all as in Hermans et al., arXiv 1703.07737.
    """
    violating, _ = _triplets(embeddings, truth)
    return violating.sum() / (violating > 0).sum().clamp(min=1)


def supcon(embeddings: Tensor, truth: Tensor) -> Tensor:
    """Supervised contrastive loss, mean over anchors that have a positive.

    Args: as those of `triplet`.

    Source: Khosla et al., arXiv 2004.11362, equation 2 (L_out).
    """
    total, anchors = supcon_sum(embeddings, truth)
    return total / anchors.clamp(min=1)


def triplet_sum(embeddings: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of `triplet`'s terms, and how many triplets there are: violating or not.

    The criterion by which epochs are compared. The mean over the violating triplets is none: as a
    network learns, the easy ones leave it, and it stays where it was (docs/training.md#criterion).
    """
    violating, valid = _triplets(embeddings, truth)
    return violating.sum(), valid.sum()


def supcon_sum(embeddings: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of `supcon`'s terms, and how many anchors there are."""
    rows, same = _of_known(embeddings, truth)
    positive = same & ~_diagonal(same)
    has_positive = positive.any(1)
    if len(rows) < 2:
        return rows.sum() * 0, has_positive.sum()  # no other film: a logsumexp without a gradient
    logits = (rows @ rows.T / CONTRAST_TEMPERATURE).masked_fill(_diagonal(same), -torch.inf)
    log_share = logits - logits.logsumexp(1, keepdim=True)
    per_anchor = -log_share.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)
    return per_anchor[has_positive].sum(), has_positive.sum()


FilmLoss = Callable[[HeadTensors, Batch], PerFilm]
CONTRASTIVE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"triplet": triplet, "supcon": supcon}
CRITERIA = {"triplet": triplet_sum, "supcon": supcon_sum}
"""What a contrastive loss is validated by: sums and counts that do not depend on the network."""
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
"""Those of exclusive classes; `film_loss` has those of findings."""
_OF_FINDINGS: dict[FilmLoss, FilmLoss] = {
    cross_entropy: binary_cross_entropy,
    soft_labels: soft_findings,
}
TEACH_DIAGNOSIS = {"cross_entropy", "soft_labels"}
"""Losses on the network's logits."""
TEACH_SALIENCY = {"saliency_kl", "saliency_cc", "soft_saliency"}
"""Losses on the network's log-density."""
NEED_LABELS = {"triplet", "supcon", "encoder_cross_entropy", "cross_entropy"}
NEED_GAZE = {"saliency_kl", "saliency_cc"}
NEED_TEACHER = {"soft_labels", "soft_saliency"}


def film_loss(name: str, kind: ClassKind) -> FilmLoss:
    """The loss over films of that name, for classes of that kind."""
    loss = FILM_LOSSES[name]
    return _OF_FINDINGS.get(loss, loss) if kind == "findings" else loss


def _kl(target: Tensor, log_density: Tensor) -> PerFilm:
    entropy = torch.special.xlogy(target, target)
    value = (entropy - target * log_density.float()).flatten(1).sum(1)
    counts = (target.flatten(1).sum(1) > 0).to(value.dtype)
    return PerFilm(value * counts, counts)


def _of_known(embeddings: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """L2-normalised rows of the n films of which all is known, and whether two are of one class."""
    complete = (truth != UNKNOWN).all(1)
    truth = truth[complete]
    same = (truth[:, None] == truth[None, :]).all(2)
    return F.normalize(embeddings[complete].float()), same


def _triplets(embeddings: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """d(a, p) - d(a, n) + `MARGIN`, 0 where negative or no triplet; which triplets there are.

    Returns:
        Two of `(n, n, n)`: anchor, positive, negative.
    """
    rows, same = _of_known(embeddings, truth)
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    excess = distance[:, :, None] - distance[:, None, :] + MARGIN
    valid = (same & ~_diagonal(same))[:, :, None] & ~same[:, None, :]
    return excess.relu() * valid, valid


def _diagonal(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=torch.bool, device=square.device)
