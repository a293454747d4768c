"""Every loss against a slow reference written with loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import expit, log_expit, log_softmax, softmax

from cxrgaze.evidence.truth import UNKNOWN, one_of
from cxrgaze.train.losses import (
    CONTRAST_TEMPERATURE,
    CONTRASTIVE,
    DISTILLATION_TEMPERATURE,
    FILM_LOSSES,
    MARGIN,
    NETWORK,
    Batch,
    film_loss,
    supcon,
    triplet,
    triplet_sum,
)

N, C, H, W = 5, 3, 6, 4
EXCLUSIVE = one_of([0, 2, UNKNOWN, 1, 1], C)
FINDINGS = np.array([[1, 0, 1], [-1, 1, 0], [-1, -1, -1], [0, 0, 0], [1, -1, -1]], np.int8)


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
        torch.from_numpy(EXCLUSIVE),
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
    return {"logits": logits, "log_density": log_density}


def _slow(name, out, batch):
    """Values by film; None where the film does not count."""
    logits, labels = out["logits"].detach().double().numpy(), batch.truth.numpy()
    p = out["log_density"].detach().double().exp().numpy()
    q, teacher = batch.density.double().numpy(), batch.teacher_density.double().numpy()
    t = DISTILLATION_TEMPERATURE
    values = []
    for i in range(N):
        gaze = q[i].any()
        soft = batch.teacher_logits[i].double().numpy()
        values.append(
            {
                "cross_entropy": lambda i=i: (
                    None if UNKNOWN in labels[i] else -log_softmax(logits[i])[labels[i].argmax()]
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
    found = film_loss(name, "exclusive")(out, batch)
    slow = _slow(name, out, batch)
    assert found.counts.tolist() == [float(v is not None) for v in slow]
    np.testing.assert_allclose(found.value.detach(), [v or 0 for v in slow], rtol=2e-5, atol=1e-6)
    found.value.sum().backward()
    grads = [t.grad for t in out.values() if t.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)
    for index in (i for i, v in enumerate(slow) if v is None):
        assert not any(g[index].any() for g in grads), "a film that does not count has a gradient"


def _slow_findings(name, logit, soft, label):
    """The value of one film's finding; None where it does not count."""
    t = DISTILLATION_TEMPERATURE
    if name == "soft_labels":
        p, q = ([expit(x / t), expit(-x / t)] for x in (logit, soft))
        return t**2 * scipy.stats.entropy(q, p)
    return None if label == UNKNOWN else -log_expit(logit if label else -logit)


@pytest.mark.parametrize("name", ["cross_entropy", "encoder_cross_entropy", "soft_labels"])
def test_a_loss_over_findings_equals_its_slow_form(name, out, batch):
    batch = batch._replace(truth=torch.from_numpy(FINDINGS))
    found = film_loss(name, "findings")(out, batch)
    logits, soft = (x.detach().double().numpy() for x in (out["logits"], batch.teacher_logits))
    slow = [
        [_slow_findings(name, logits[i, c], soft[i, c], FINDINGS[i, c]) for c in range(C)]
        for i in range(N)
    ]
    counts = [sum(v is not None for v in row) for row in slow]
    assert found.counts.tolist() == counts
    assert counts == ([3] * N if name == "soft_labels" else [3, 2, 0, 3, 1])
    values = [sum(v or 0 for v in row) for row in slow]
    np.testing.assert_allclose(found.value.detach(), values, rtol=2e-5, atol=1e-6)
    found.value.sum().backward()
    has_gradient = (out["logits"].grad != 0).tolist()
    assert torch.isfinite(out["logits"].grad).all() and out["log_density"].grad is None
    assert has_gradient == [[v is not None for v in row] for row in slow]


def test_only_losses_on_classes_have_a_form_for_findings():
    changed = {name for name in FILM_LOSSES if film_loss(name, "findings") != FILM_LOSSES[name]}
    assert changed == {"cross_entropy", "encoder_cross_entropy", "soft_labels"}


def _rows(embeddings, truth):
    known = [i for i, row in enumerate(truth) if UNKNOWN not in row]
    return [(embeddings[i] / np.linalg.norm(embeddings[i]), tuple(truth[i])) for i in known]


def _slow_excess(embeddings, truth):
    rows = _rows(embeddings, truth)
    excess = []
    for (i, (a, ya)), (j, (p, yp)), (n, yn) in itertools.product(
        enumerate(rows), enumerate(rows), rows
    ):
        if i != j and ya == yp and yn != ya:
            excess.append(np.linalg.norm(a - p) - np.linalg.norm(a - n) + MARGIN)
    return excess


def _slow_triplet(embeddings, truth):
    violating = [e for e in _slow_excess(embeddings, truth) if e > 0]
    return np.mean(violating) if violating else 0.0


def _slow_supcon(embeddings, truth):
    rows = _rows(embeddings, truth)
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
_SOME = [[1, 0], [0, 0], [1, 1], [1, 0], [0, 0], [0, 1], [1, 1], [1, 0]]
_UNSURE = [[1, 0], [0, -1], [1, 1], [1, 0], [0, -1], [-1, 1], [1, 1], [-1, -1]]
CASES = {
    "three classes": one_of([0, 1, 2, 0, 1, 1, 2, 0], 3),
    "unlabelled films": one_of([0, -1, 2, 0, -1, 1, 2, 0], 3),
    "one class alone": one_of([1] * 8, 3),
    "every film another": one_of([0, 1, 2, -1, -1, -1, -1, -1], 3),
    "one labelled film": one_of([0] + [-1] * 7, 3),
    "no labelled film": one_of([-1] * 8, 3),
    "findings": np.array(_SOME, np.int8),
    "findings, some unknown": np.array(_UNSURE, np.int8),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_a_contrastive_loss_equals_its_slow_form(name, case):
    rng = np.random.default_rng(2)
    embeddings = rng.normal(size=(8, 5))
    embeddings[3] = embeddings[0]  # a distance of zero has no gradient of its own
    truth = CASES[case]
    given = torch.from_numpy(embeddings).float().requires_grad_()
    found = CONTRASTIVE[name](given, torch.from_numpy(truth))
    assert found.item() == pytest.approx(SLOW[name](embeddings, truth), rel=1e-4, abs=1e-6)
    found.backward()
    assert torch.isfinite(given.grad).all()
    assert not given.grad[(truth == UNKNOWN).any(axis=1)].any(), "a film takes part all the same"


@pytest.mark.parametrize("case", CASES)
def test_the_criterion_of_triplets_is_over_all_of_them(case):
    embeddings = np.random.default_rng(2).normal(size=(8, 5))
    excess = _slow_excess(embeddings, CASES[case])
    total, count = triplet_sum(*map(torch.from_numpy, (embeddings, CASES[case])))
    assert int(count) == len(excess)
    assert total.item() == pytest.approx(sum(max(e, 0) for e in excess), rel=1e-4, abs=1e-6)


def test_what_is_learnt_shows_in_the_criterion_and_not_in_the_loss():
    truth = torch.from_numpy(one_of([0] * 12 + [1] * 12, 2))
    turn = torch.linspace(0, 0.1, 24) + torch.pi * truth.argmax(1)
    turn[[0, 12]] = turn[[12, 0]]  # all films but two lie with those of their class
    learnt = torch.stack([turn.cos(), turn.sin()], dim=1)
    random = torch.from_numpy(np.random.default_rng(0).normal(size=(24, 64))).float()
    assert triplet(learnt, truth) > triplet(random, truth), "the loss alone would do"
    (before, triplets), (after, as_many) = (triplet_sum(r, truth) for r in (random, learnt))
    assert triplets == as_many == 24 * 11 * 12
    assert after < 0.5 * before


@pytest.mark.parametrize("loss", [triplet, supcon])
def test_a_contrastive_loss_falls_when_classes_part(loss):
    truth = torch.from_numpy(one_of([0, 0, 1, 1], 2))
    apart = torch.tensor([[1.0, 0], [1, 0.01], [-1, 0], [-1, 0.01]])
    mixed = torch.tensor([[1.0, 0], [-1, 0.01], [1, 0], [-1, 0.01]])
    assert loss(apart, truth) < loss(mixed, truth)
