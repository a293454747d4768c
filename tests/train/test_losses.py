"""Every loss against a slow reference written with loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import log_softmax, softmax

from cxrgaze.evidence.arrays import UNLABELLED
from cxrgaze.train.losses import (
    CONTRAST_TEMPERATURE,
    CONTRASTIVE,
    DISTILLATION_TEMPERATURE,
    MARGIN,
    NETWORK,
    Batch,
    supcon,
    triplet,
)
from cxrgaze.train.model import HeadTensors

N, C, H, W = 5, 3, 6, 4


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    density = rng.random((N, 1, H, W))
    density[:, :, 0] = 0  # zeros of the truth contribute nothing
    density /= density.sum((1, 2, 3), keepdims=True)
    density[2] = 0  # no gaze
    teacher = rng.random((N, 1, H, W))
    teacher /= teacher.sum((1, 2, 3), keepdims=True)
    return Batch(
        torch.arange(N),
        torch.rand(N, 1, H, W),
        torch.tensor([0, 2, UNLABELLED, 1, 1]),
        torch.from_numpy(density).float(),
        torch.from_numpy(rng.normal(size=(N, C))).float(),
        torch.from_numpy(teacher).float(),
    )


@pytest.fixture
def out():
    rng = np.random.default_rng(1)
    raw = torch.from_numpy(rng.normal(size=(N, 1, H, W))).float()
    logits = torch.from_numpy(rng.normal(size=(N, C))).float().requires_grad_()
    log_density = raw.flatten(1).log_softmax(1).reshape(raw.shape).requires_grad_()
    return HeadTensors(logits, log_density)


def _slow(name, out, batch):
    """Values by film; None where the film does not count."""
    logits, labels = out.logits.detach().double().numpy(), batch.label.numpy()
    p = out.log_density.detach().double().exp().numpy()
    q, teacher = batch.density.double().numpy(), batch.teacher_density.double().numpy()
    t = DISTILLATION_TEMPERATURE
    values = []
    for i in range(N):
        gaze = q[i].any()
        soft = batch.teacher_logits[i].double().numpy()
        values.append(
            {
                "cross_entropy": lambda i=i: (
                    None if labels[i] < 0 else -log_softmax(logits[i])[labels[i]]
                ),
                "saliency_kl": lambda i=i, gaze=gaze: (
                    scipy.stats.entropy(q[i].ravel(), p[i].ravel()) if gaze else None
                ),
                "saliency_cc": lambda i=i, gaze=gaze: (
                    -np.corrcoef(p[i].ravel(), q[i].ravel())[0, 1] if gaze else None
                ),
                "soft_labels": lambda i=i, soft=soft: (
                    t**2 * scipy.stats.entropy(softmax(soft / t), softmax(logits[i] / t))
                ),
                "soft_saliency": lambda i=i: scipy.stats.entropy(teacher[i].ravel(), p[i].ravel()),
            }[name]()
        )
    return values


@pytest.mark.parametrize("name", NETWORK)
def test_a_loss_over_films_equals_its_slow_form(name, out, batch):
    found = NETWORK[name](out, batch)
    slow = _slow(name, out, batch)
    assert found.counts.tolist() == [float(v is not None) for v in slow]
    np.testing.assert_allclose(found.value.detach(), [v or 0 for v in slow], rtol=2e-5, atol=1e-6)
    found.value.sum().backward()
    grads = [t.grad for t in out if t.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)
    for index in (i for i, v in enumerate(slow) if v is None):
        assert not any(g[index].any() for g in grads), "a film that does not count has a gradient"


def _rows(embeddings, labels):
    known = [i for i, label in enumerate(labels) if label != UNLABELLED]
    return [(embeddings[i] / np.linalg.norm(embeddings[i]), int(labels[i])) for i in known]


def _slow_triplet(embeddings, labels):
    rows = _rows(embeddings, labels)
    excess = []
    for (i, (a, ya)), (j, (p, yp)), (n, yn) in itertools.product(
        enumerate(rows), enumerate(rows), rows
    ):
        if i != j and ya == yp and yn != ya:
            excess.append(np.linalg.norm(a - p) - np.linalg.norm(a - n) + MARGIN)
    violating = [e for e in excess if e > 0]
    return np.mean(violating) if violating else 0.0


def _slow_supcon(embeddings, labels):
    rows = _rows(embeddings, labels)
    anchors = []
    for i, (a, ya) in enumerate(rows):
        others = [(z, y) for j, (z, y) in enumerate(rows) if j != i]
        total = sum(np.exp(a @ z / CONTRAST_TEMPERATURE) for z, _ in others)
        positives = [
            -np.log(np.exp(a @ z / CONTRAST_TEMPERATURE) / total) for z, y in others if y == ya
        ]
        if positives:
            anchors.append(np.mean(positives))
    return np.mean(anchors) if anchors else 0.0


SLOW = {"triplet": _slow_triplet, "supcon": _slow_supcon}
CASES = {
    "three classes": [0, 1, 2, 0, 1, 1, 2, 0],
    "unlabelled films": [0, -1, 2, 0, -1, 1, 2, 0],
    "one class alone": [1] * 8,
    "every film another": [0, 1, 2, -1, -1, -1, -1, -1],
    "one labelled film": [0] + [-1] * 7,
    "no labelled film": [-1] * 8,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_a_contrastive_loss_equals_its_slow_form(name, case):
    rng = np.random.default_rng(2)
    embeddings = rng.normal(size=(8, 5))
    embeddings[3] = embeddings[0]  # a distance of zero has no gradient of its own
    labels = CASES[case]
    given = torch.from_numpy(embeddings).float().requires_grad_()
    found = CONTRASTIVE[name](given, torch.tensor(labels))
    assert found.item() == pytest.approx(SLOW[name](embeddings, labels), rel=1e-4, abs=1e-6)
    found.backward()
    assert torch.isfinite(given.grad).all()


@pytest.mark.parametrize("loss", [triplet, supcon])
def test_a_contrastive_loss_falls_when_classes_part(loss):
    labels = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0], [1, 0.01], [-1, 0], [-1, 0.01]])
    mixed = torch.tensor([[1.0, 0], [-1, 0.01], [1, 0], [-1, 0.01]])
    assert loss(apart, labels) < loss(mixed, labels)
