"""The gate's statistics against slow forms, scipy, and truths that are known exactly.

Drawn sets, unless said otherwise: patients with 1 to 4 films (1.85 on average) whose scores share
half of their variance; classes of 60, 25 and 15 %; binormal scores, so that the AUC of either
network is known: Phi(shift / sqrt 2), also of their sigmoids, which are the probabilities. The
largest is the label, and the flag. Findings come with those frequencies too, and a third of their
cells is unknown.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import optimize, stats
from scipy.special import expit, logit, xlogy
from sklearn.metrics import brier_score_loss, roc_auc_score

from cxrgaze.bundles import verdicts
from cxrgaze.bundles.served import Served
from cxrgaze.bundles.verdicts import Limits
from cxrgaze.evidence import bounds, intervals, power
from cxrgaze.evidence import compare as compare_module
from cxrgaze.evidence.compare import Diagnoses, Maps, Paired, Says, compare, judge_flips
from cxrgaze.evidence.truth import HAS, HAS_NOT, UNKNOWN, any_known, class_index, one_of
from cxrgaze.spec import DiseaseClass, ModelSpec
from cxrgaze.train.decision import fit_decision

PREVALENCE = (0.6, 0.25, 0.15)
AUC = 0.9
LIMITS = Limits()
NAMES = ("class 0", "class 1", "class 2")
BY_CLASS = [f"{kind} of {name}" for kind in ("sensitivity", "specificity") for name in NAMES]
OF_DIAGNOSES = ["macro AUC", "flips", *BY_CLASS, "Brier"]
ENOUGH = 598
"""Patients of whom an identical candidate passes: `unseen` in 0.005 of the macro AUC."""


def _films(rng, patients):
    """Patient and label of each film; four films in five have their patient's label."""
    patient = np.repeat(
        np.arange(patients), rng.choice([1, 2, 3, 4], patients, p=[0.5, 0.25, 0.15, 0.1])
    )
    n = len(patient)
    label = rng.choice(3, patients, p=PREVALENCE)[patient]
    return patient, np.where(rng.random(n) < 0.2, rng.choice(3, n, p=PREVALENCE), label)


def _alike(patient, draw):
    """Noise of variance 1, half of it the patient's; `draw(n)` has variance 1 and mean 0."""
    return np.sqrt(0.5) * (draw(patient.max() + 1)[patient] + draw(len(patient)))


def _scores(rng, patient, one, loss, correlation):
    """Logits of both networks; every class loses exactly `loss` of its AUC of 0.9."""
    old, new = (np.sqrt(2) * NormalDist().inv_cdf(AUC - part) for part in (0, loss))
    first, second = (_alike(patient, lambda n: rng.normal(size=(n, 3))) for _ in range(2))
    blurred = correlation * first + np.sqrt(1 - correlation**2) * second
    return old * one + first, new * one + blurred


def _few_broken(rng, patient, one, loss):
    """Logits of both networks; a share of the patients gets scores that say nothing.

    That share loses AUC - 0.5 where the film is a positive, and nothing where it is not.
    """
    reference, _ = _scores(rng, patient, one, 0, 0)
    noise = _alike(patient, lambda n: rng.normal(size=(n, 3)))
    broken = (rng.random(patient.max() + 1) < loss / (AUC - 0.5))[patient]
    return reference, np.where(broken[:, None], noise, reference)


def _skewed_cc(rng, patient, loss, deviation=0.05):
    """CC of both networks, gaze for two patients in three; most lose little, some lose much."""
    n = len(patient)

    def draw(size):
        return (rng.gamma(0.5, size=size) - 0.5) / np.sqrt(0.5)

    reference = 0.6 + 0.1 * rng.normal(size=n)
    reference[(rng.random(patient.max() + 1) > 2 / 3)[patient]] = np.nan
    return reference, reference - loss - deviation * _alike(patient, draw)


def _paired(seed=0, patients=200, macro=0.0, cc=0.0, correlation=0.99, few=False):
    """A drawn set whose true losses are known."""
    rng = np.random.default_rng([seed, 17])
    patient, label = _films(rng, patients)
    draw = _few_broken if few else lambda *args: _scores(*args, correlation)
    truth = one_of(label, 3)
    probabilities = expit(draw(rng, patient, truth == HAS, macro))
    ccs = _skewed_cc(rng, patient, cc)
    diagnoses = _diagnoses(truth, *probabilities)
    return Paired([f"p{i:04d}" for i in patient], diagnoses, Maps(*ccs))


def _says(probabilities, points=None):
    """Of exclusive classes; with `points` of findings."""
    columns = np.arange(probabilities.shape[1])
    labels = probabilities.argmax(axis=1)[:, None] == columns
    if points is None:
        return Says(probabilities, labels, labels)
    return Says(probabilities, np.zeros_like(labels), probabilities >= points)


def _diagnoses(truth, reference, candidate, points=None):
    """Of probabilities; NaN is the point of a finding without one."""
    decides = np.isfinite(points) if points is not None else np.ones(truth.shape[1], dtype=bool)
    says = _says(reference, points), _says(candidate, points)
    return Diagnoses(truth, *says, decides, exclusive=points is None)


def _with(paired, diagnoses=(), maps=()):
    """With other arrays of an output, by name; of the networks' probabilities alone too."""
    return replace(
        paired,
        diagnoses=paired.diagnoses and replace(paired.diagnoses, **dict(diagnoses)),
        maps=paired.maps and replace(paired.maps, **dict(maps)),
    )


def _same(paired):
    """The candidate is the reference."""
    both = ({"candidate": each.reference} for each in (paired.diagnoses, paired.maps))
    return _with(paired, *both)


def _of(paired, name, **options):
    options = {"resamples": 400, **options}
    return _named(compare(paired, **options), name)


def _named(found, name):
    return next(q for q in found.quantities if q.name == name)


def _verdicts(found):
    return {q.name: q.verdict for q in found.quantities}


def _some(says, films, classes=slice(None)):
    """What is said of some films, and some classes."""
    parts = (says.probabilities, says.labels, says.flags)
    return Says(*(part[films][:, classes] for part in parts))


def _chosen(paired, index):
    diagnoses, maps = paired.diagnoses, paired.maps
    return Paired(
        [paired.patients[i] for i in index],
        diagnoses
        and replace(
            diagnoses,
            truth=diagnoses.truth[index],
            reference=_some(diagnoses.reference, index),
            candidate=_some(diagnoses.candidate, index),
        ),
        maps and Maps(maps.reference[index], maps.candidate[index]),
    )


# Figures against independent forms


def _slow_macro(paired):
    changes = []
    for truth, before, after in zip(
        paired.diagnoses.truth.T,
        paired.diagnoses.reference.probabilities.T,
        paired.diagnoses.candidate.probabilities.T,
        strict=True,
    ):
        known = truth >= 0
        old, new = (roc_auc_score(truth[known] == 1, s[known]) for s in (before, after))
        changes.append(new - old)
    return np.mean(changes)


def _slow_cc(paired):
    changes = [
        b - a
        for a, b in zip(paired.maps.reference, paired.maps.candidate, strict=True)
        if not np.isnan(a)
    ]
    return sum(changes) / len(changes)


def _slow_brier(paired):
    """Film by film: the sum over exclusive classes, the mean over findings that are known."""
    findings = not paired.diagnoses.reference.labels.any()
    rises = []
    for truth, before, after in zip(
        paired.diagnoses.truth.tolist(),
        paired.diagnoses.reference.probabilities.tolist(),
        paired.diagnoses.candidate.probabilities.tolist(),
        strict=True,
    ):
        cells = [
            (b - y) ** 2 - (a - y) ** 2
            for y, a, b in zip(truth, before, after, strict=True)
            if y >= 0
        ]
        if cells:
            rises.append(sum(cells) / (len(cells) if findings else 1))
    return sum(rises) / len(rises)


SLOW = {"macro AUC": _slow_macro, "CC": _slow_cc, "Brier": _slow_brier}


def _unlabelled():
    """A set in which some films have no label."""
    paired = _paired(seed=5, patients=100, macro=0.01, cc=0.02, correlation=0.9)
    truth = paired.diagnoses.truth.copy()
    truth[::7] = UNKNOWN
    return _with(paired, {"truth": truth})


POINTS = tuple(expit([1.5, 1.0, 2.0]).tolist())


def _findings(patients=100):
    """Three findings of which a film may have any; some cells are unknown, and some whole rows."""
    rng = np.random.default_rng(13)
    patient, _ = _films(rng, patients)
    has = rng.random((patients, 3))[patient] < PREVALENCE
    has ^= rng.random(has.shape) < 0.1
    scores = _scores(rng, patient, has, 0.01, 0.5)
    truth = np.where(rng.random(has.shape) < 1 / 3, UNKNOWN, has).astype(np.int8)
    truth[::11] = UNKNOWN
    diagnoses = _diagnoses(truth, *expit(scores), points=POINTS)
    return Paired([f"p{i:04d}" for i in patient], diagnoses)


MEASURED = [
    (_unlabelled, 0, "macro AUC"),
    (_unlabelled, 1, "Brier"),
    (_unlabelled, 2, "CC"),
    (_findings, 0, "macro AUC"),
    (_findings, 1, "Brier"),
]


@pytest.fixture
def unlabelled():
    return _unlabelled()


@pytest.fixture
def asked(monkeypatch):
    """What `studentised` was asked for, by the estimate."""
    calls = []
    real = bounds.studentised

    def spy(patients, value, influence, statistic, **options):
        calls.append((patients, value, influence, statistic))
        return real(patients, value, influence, statistic, **options)

    for module in (compare_module, bounds):  # macro AUC from one, means through the other
        monkeypatch.setattr(module, "studentised", spy)
    return calls


@pytest.mark.parametrize("drawn,_,name", MEASURED)
def test_a_difference_is_that_of_the_slow_form(drawn, _, name):
    paired = drawn()
    found = _of(paired, name)
    assert found.difference == pytest.approx(SLOW[name](paired), abs=1e-12)
    assert found.difference == pytest.approx(found.candidate - found.reference, abs=1e-12)
    assert found.loss == (found.difference if name == "Brier" else -found.difference)


@pytest.mark.long
@pytest.mark.parametrize("drawn,place,name", MEASURED)
def test_its_standard_error_is_that_of_the_jackknife_over_patients(drawn, place, name, asked):
    paired = drawn()
    compare(paired, resamples=50)
    patients, _, influence, _ = asked[place]
    parts = Counter()
    for patient, part in zip(patients, influence, strict=True):
        parts[patient] += part
    who = sorted(parts)
    variance = sum(parts[p] ** 2 for p in who) * len(who) / (len(who) - 1)
    everyone = np.array(paired.patients)
    without = [SLOW[name](_chosen(paired, np.flatnonzero(everyone != p))) for p in who]
    jackknife = (len(who) - 1) / len(who) * ((without - np.mean(without)) ** 2).sum()
    assert np.sqrt(variance) == pytest.approx(np.sqrt(jackknife), rel=0.08)


@pytest.mark.parametrize("drawn,place,name", MEASURED)
def test_the_bootstrap_is_brute_force_resampling(drawn, place, name, asked):
    """Films repeated as drawn, slow forms, and quantiles by sorting."""
    paired = drawn()
    found = _of(paired, name, resamples=39, seed=3)
    patients, value, influence, _ = asked[place]
    weights = intervals.bootstrap(patients, lambda w: w, resamples=39, seed=3).astype(int)
    who = np.array(patients)
    names = sorted(set(patients))
    parts = np.array([influence[who == p].sum() for p in names])
    labelled = (paired.diagnoses.truth >= 0).any(axis=1)
    used = np.flatnonzero(paired.maps.has_gaze if name == "CC" else labelled)
    sign = -1 if name == "Brier" else 1  # which was asked for as a fall, a loss as all others
    pivots = []
    for drawn_films in weights:
        resampled = _chosen(paired, np.repeat(used, drawn_films))
        again = np.repeat(parts, [drawn_films[who == p][0] for p in names])
        error = again.std(ddof=1) * np.sqrt(len(again))
        pivots.append((sign * SLOW[name](resampled) - value) / error)
    assert 1 / np.sum((parts**2 / (parts**2).sum()) ** 2) > 10, "the bootstrap was not used"
    error = parts.std(ddof=1) * np.sqrt(len(parts))
    pivots.sort()
    low, high = (found.low, found.high)[::sign]
    for level, place in ((found.bound, 38), (low, 39), (high, 1)):  # of 40
        assert sign * level == pytest.approx(value - error * pivots[place - 1])
    assert found.low <= found.difference <= found.high


@pytest.mark.parametrize("count,total", [(0, 1), (1, 1), (0, 149), (3, 120), (60, 120), (9, 5000)])
def test_clopper_pearson_is_scipys(count, total):
    low, high, bound = bounds.clopper_pearson(count, total)
    exact = stats.binomtest(count, total).proportion_ci(0.95, "exact")
    assert (low, high) == pytest.approx((exact.low, exact.high), rel=1e-9)
    expected = stats.beta.ppf(0.95, count + 1, total - count) if count < total else 1
    assert bound == pytest.approx(expected, rel=1e-9)


def test_the_distributions_are_scipys():
    for freedom in (1.0, 1.7, 4.25, 8.99, 300):
        for level in (0.025, 0.95, 0.975):
            expected = stats.t.ppf(level, freedom)
            assert bounds._t_quantile(level, freedom) == pytest.approx(expected, rel=1e-8)
    rng = np.random.default_rng(0)
    for a, b, x in zip(*rng.uniform(0.3, 2000, (2, 200)), rng.random(200), strict=True):
        expected = stats.beta.cdf(x, a, b)
        assert bounds._beta_cdf(x, a, b) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_a_count_must_be_of_a_total():
    for count, total in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="expected a count"):
            bounds.clopper_pearson(count, total)


def test_149_patients_without_a_flip_exclude_two_percent():
    assert power.patients_to_show(0.02) == 149
    for limit in (1.0, 0.5, 0.05, 0.01, 0.001):
        needed = power.patients_to_show(limit)
        assert bounds.clopper_pearson(0, needed).bound < limit
        assert needed == 1 or bounds.clopper_pearson(0, needed - 1).bound >= limit
    with pytest.raises(ValueError, match="no number"):
        power.patients_to_show(0)


def test_flips_are_counted_in_patients_and_take_unlabelled_films(unlabelled):
    found = compare(unlabelled, resamples=50)
    changed = [
        patient
        for patient, a, b in zip(
            unlabelled.patients,
            unlabelled.diagnoses.reference.probabilities.tolist(),
            unlabelled.diagnoses.candidate.probabilities.tolist(),
            strict=True,
        )
        if a.index(max(a)) != b.index(max(b))
    ]
    assert (found.flipped_films, found.flipped_patients) == (len(changed), len(set(changed)))
    assert len(changed) > len(set(changed)) > 0
    flips = found.quantities[2]
    assert flips.difference == flips.loss == len(set(changed)) / found.patients
    assert compare(_without(unlabelled, "labels")).flipped_films == len(changed)


def test_a_film_flips_where_any_of_its_flags_does():
    """Not where the largest score is another, nor for each flag once more."""
    paired = _findings()
    sides = [p.tolist() for p in _arrays(paired)[1:]]
    flags = [[[a >= p for a, p in zip(film, POINTS, strict=True)] for film in s] for s in sides]
    changed = [
        (patient, sum(a != b for a, b in zip(before, after, strict=True)))
        for patient, before, after in zip(paired.patients, *flags, strict=True)
        if before != after
    ]
    assert {count for _, count in changed} > {1}, "no film flips several flags"
    found = compare(paired, resamples=50)
    who = {patient for patient, _ in changed}
    assert (found.flipped_films, found.flipped_patients) == (len(changed), len(who))
    assert found.quantities[1].difference == len(who) / found.patients
    largest = compare(replace(paired, diagnoses=_diagnoses(*_arrays(paired))), resamples=50)
    assert largest.flipped_films != found.flipped_films


def test_findings_without_an_operating_point_decide_nothing_and_must_not_pass():
    paired = _findings(800)
    truth, reference, _ = _arrays(paired)
    undecided = _diagnoses(truth, reference, reference, [np.nan] * 3)
    found = compare(replace(paired, diagnoses=undecided), resamples=50)
    none = dict.fromkeys(OF_DIAGNOSES, "not_measured")
    assert _verdicts(found) == {**none, "macro AUC": "pass", "Brier": "pass"}
    assert found.verdict == "inconclusive" and "no finding has an operating point" in found.reason
    assert found.decisions == () and found.flipped_films == 0


def test_a_finding_without_an_operating_point_is_named_and_must_not_pass():
    """Those beside it are judged; what its flags say is served to nobody."""
    paired = _findings(800)
    truth, reference, _ = _arrays(paired)
    diagnoses = _diagnoses(truth, reference, reference, (POINTS[0], np.nan, POINTS[2]))
    raised = replace(diagnoses.candidate, flags=diagnoses.candidate.flags | [False, True, False])
    diagnoses = replace(diagnoses, candidate=raised)
    found = compare(replace(paired, diagnoses=diagnoses), classes=("a", "b", "c"), resamples=50)
    of_b = {"sensitivity of b", "specificity of b"}
    assert {name for name, v in _verdicts(found).items() if v != "pass"} == of_b
    assert {_named(found, name).verdict for name in of_b} == {"not_measured"}
    assert found.verdict == "inconclusive" and "b has no operating point" in found.reason
    assert [d.name for d in found.decisions] == ["a", "c"] and found.flipped_films == 0


def test_a_label_or_a_flag_alone_is_a_flip():
    paired = _same(_paired())
    diagnoses = paired.diagnoses
    for part in ("labels", "flags"):
        other = getattr(diagnoses.reference, part).copy()
        other[7] = np.roll(other[7], 1)
        says = replace(diagnoses.reference, **{part: other})
        found = compare(_with(paired, {"candidate": says}), resamples=50)
        assert (found.flipped_films, found.flipped_patients) == (1, 1)
        assert sum(d.raised + d.dropped for d in found.decisions) == 2 * (part == "flags")


def test_sensitivity_and_specificity_are_of_the_patients_of_a_class():
    """Found where any film that has it is flagged, spared where none that has it not is."""
    both_ways = 0
    for paired in (_unlabelled(), _findings()):
        diagnoses, found = paired.diagnoses, compare(paired, resamples=50)
        for c, name in enumerate(NAMES):
            shares, changes = {}, {}
            for kind, side in (("sensitivity", HAS), ("specificity", HAS_NOT)):
                right = []
                for says in (diagnoses.reference, diagnoses.candidate):
                    by_patient = {}
                    rows = zip(
                        paired.patients, diagnoses.truth[:, c], says.flags[:, c], strict=True
                    )
                    for patient, truth, flag in rows:
                        if truth == side:
                            by_patient.setdefault(patient, []).append(bool(flag))
                    good = any if side == HAS else (lambda flags: not any(flags))
                    right.append({patient: good(flags) for patient, flags in by_patient.items()})
                shares[kind] = [sum(r.values()) / len(r) for r in right]
                pairs = Counter((right[0][p], right[1][p]) for p in right[0])
                changes[kind] = (pairs[True, False], pairs[False, True], len(right[0]))
            both_ways += sum(lost > 0 and gained > 0 for lost, gained, _ in changes.values())
            for kind in shares:
                quantity = _named(found, f"{kind} of {name}")
                assert quantity.kind == kind and quantity.of == name
                assert [quantity.reference, quantity.candidate] == pytest.approx(shares[kind])
                low, high, bound = bounds.paired_shares(*changes[kind])
                assert (quantity.low, quantity.high, quantity.bound) == (-high, -low, -bound)
                assert f"in {changes[kind][2]} patients" in quantity.reason
    assert both_ways > 3


def test_what_changed_is_counted_by_direction_by_hand():
    """Five patients, the first and the last with two films."""
    patients = ["a", "a", "b", "c", "d", "e", "e"]
    before = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 0], [1, 0]], dtype=bool)
    after = np.array([[0, 0], [0, 1], [0, 0], [1, 1], [1, 0], [1, 0], [0, 0]], dtype=bool)
    # Of x: a is dropped twice, c is raised, e is raised in one film and dropped in the other.
    # Of y: a is raised, b is dropped.
    p, none = np.full((7, 2), 0.5), np.zeros((7, 2), dtype=bool)
    truth = np.zeros((7, 2), dtype=np.int8)
    decides = np.array([True, True])
    diagnoses = Diagnoses(truth, Says(p, none, before), Says(p, none, after), decides)
    found = compare(Paired(patients, diagnoses), classes=("x", "y"), resamples=50)
    assert [(d.name, d.raised, d.dropped) for d in found.decisions] == [("x", 2, 2), ("y", 1, 1)]
    assert (found.flipped_films, found.flipped_patients) == (6, 4)
    rows = {row[0]: row[3] for row in found.rows()}
    assert (rows["patients: x"], rows["patients: y"]) == ("+2 -2", "+1 -1")
    of_y = replace(diagnoses, decides=np.array([False, True]))
    found = compare(Paired(patients, of_y), classes=("x", "y"), resamples=50)
    assert [(d.name, d.raised, d.dropped) for d in found.decisions] == [("y", 1, 1)]
    assert (found.flipped_films, found.flipped_patients) == (2, 2)


def test_a_finding_that_nobody_has_or_that_nobody_lacks_has_no_auc():
    paired = _findings()
    truth, *scores = _arrays(paired)
    for alike in (0, 1):
        part = truth.copy()
        part[part[:, 1] >= 0, 1] = alike
        found = compare(_with(paired, {"truth": part}), classes=("a", "b", "c"), resamples=50)
        assert [change.name for change in found.classes] == ["a", "c"]
        rest = _diagnoses(part[:, [0, 2]], *(s[:, [0, 2]] for s in scores))
        assert found.quantities[0].difference == pytest.approx(
            compare(replace(paired, diagnoses=rest), resamples=50).quantities[0].difference
        )


def test_what_is_not_gated_is_reported(unlabelled):
    found = compare(unlabelled, classes=("normal", "failure", "pneumonia"), resamples=50)
    assert [k.name for k in found.classes] == ["normal", "failure", "pneumonia"]
    label = class_index(unlabelled.diagnoses.truth)
    known = label >= 0
    for index, change in enumerate(found.classes):
        positive = label[known] == index
        scores = unlabelled.diagnoses.candidate.probabilities[known, index]
        expected = roc_auc_score(positive, scores)
        assert change.candidate == pytest.approx(expected) and change.films == positive.sum()
    assert np.mean([k.difference for k in found.classes]) == pytest.approx(
        found.quantities[0].difference
    )
    loss = unlabelled.maps.reference - unlabelled.maps.candidate
    assert found.worst_cc_loss == np.nanmax(loss) == loss[found.worst_film]
    rows = found.rows()
    assert {len(row) for row in rows} == {len(found.header())}
    assert "AUC of failure" in str(rows) and f"index {found.worst_film}" in str(rows)


def test_each_findings_auc_is_of_the_films_where_it_is_known():
    paired = _findings()
    found = compare(paired, classes=("a", "b", "c"), resamples=50)
    truth, reference, candidate = _arrays(paired)
    assert len({int((column >= 0).sum()) for column in truth.T}) == 3
    for change, has, before, after in zip(
        found.classes, truth.T, reference.T, candidate.T, strict=True
    ):
        known = has != -1
        assert change.reference == pytest.approx(roc_auc_score(has[known], before[known]))
        assert change.candidate == pytest.approx(roc_auc_score(has[known], after[known]))
        assert change.films == has[known].sum()


# Paired shares


def _slow_score(lost, gained, total, difference):
    """The score statistic at the maximum of the likelihood of pairs with this difference."""

    def against(gaining):
        losing = max(gaining + difference, 0)
        rest = max(1 - losing - gaining, 0)
        counts = ((lost, losing), (gained, gaining), (total - lost - gained, rest))
        return -sum(xlogy(count, max(share, 1e-300)) for count, share in counts)

    ends = max(0.0, -difference), (1 - difference) / 2
    inside = optimize.minimize_scalar(
        against, bounds=ends, method="bounded", options={"xatol": 1e-13, "maxiter": 500}
    )
    gaining = min((inside.x, *ends), key=against)
    variance = total * (2 * gaining + difference - difference**2)
    return (lost - gained - total * difference) / np.sqrt(variance)


PAIRS = [(0, 0, 52), (1, 0, 60), (0, 3, 60), (5, 2, 60), (9, 9, 150), (40, 3, 150), (60, 0, 60)]


@pytest.mark.parametrize("lost,gained,total", [*PAIRS, (1, 1, 4000), (30, 30, 60), (0, 60, 60)])
def test_paired_shares_are_where_the_score_statistic_is_at_its_quantiles(lost, gained, total):
    """Where changes go one way only, or there are none, the exact interval where it is wider."""
    found = bounds.paired_shares(lost, gained, total)
    assert found.low <= (lost - gained) / total <= found.high and found.bound <= found.high
    exact = {"low": -np.inf, "high": -np.inf, "bound": -np.inf}  # how far it goes at least
    if not gained:
        interval = stats.binomtest(lost, total).proportion_ci(0.95, "exact")
        exact["high"] = interval.high
        exact["bound"] = stats.beta.ppf(0.95, lost + 1, total - lost) if lost < total else 1
    if not lost:
        exact["low"] = stats.binomtest(gained, total).proportion_ci(0.95, "exact").high
    for name, level, sign in (("low", 0.975, -1), ("high", 0.025, 1), ("bound", 0.05, 1)):
        end = getattr(found, name)
        by_exact = sign * end == pytest.approx(exact[name], rel=1e-9)
        assert by_exact or sign * end > exact[name]
        if abs(end) < 1 - 1e-9:  # all lost or all gained: the interval goes to the end
            excess = _slow_score(lost, gained, total, end) - stats.norm.ppf(level)
            assert sign * excess < 2e-4, f"{name} is nearer than the score's"
            assert by_exact or abs(excess) < 2e-4
    other = bounds.paired_shares(gained, lost, total)
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


def test_paired_shares_have_a_width_where_nothing_changes():
    for total in (1, 10, 52, 209, 333):
        wide = [
            max(z**2 / (total + z**2), 1 - tail ** (1 / total))
            for tail in (0.05, 0.025)
            for z in [stats.norm.ppf(tail)]
        ]
        low, high, bound = bounds.paired_shares(0, 0, total)
        assert (bound, high, -low) == pytest.approx((*wide, wide[1]), rel=1e-9)


def test_counts_of_pairs_must_be_of_a_total():
    for counts in ((0, 0, 0), (-1, 0, 5), (0, -1, 5), (3, 3, 5)):
        with pytest.raises(ValueError, match="expected counts in a total"):
            bounds.paired_shares(*counts)


@pytest.mark.parametrize("total", [60, 150])
@pytest.mark.parametrize("gaining", [0.0, 0.005, 0.02, 0.05, 0.1, 0.2])
def test_a_true_loss_of_the_limit_seldom_passes_exactly_enumerated(total, gaining):
    """Every pair of counts that passes; a share `gaining` of the patients is found anew."""
    limit = LIMITS.sensitivity
    size = 0.0
    for gained in range(total + 1):
        if stats.binom.pmf(gained, total, gaining) < 1e-9:
            continue
        passing = -1  # the largest count of losses that does; fewer do too
        while passing + gained < total:
            if bounds.paired_shares(passing + 1, gained, total).bound >= limit:
                break
            passing += 1
        if passing >= 0:
            losing = (gaining + limit) / (1 - gaining)
            size += stats.binom.pmf(gained, total, gaining) * stats.binom.cdf(
                passing, total - gained, losing
            )
    assert 0 < size <= 0.06


# What must and must not matter


def test_the_order_of_the_films_does_not_matter():
    paired = _paired(seed=1, macro=0.004, cc=0.01)
    order = np.random.default_rng(0).permutation(len(paired.patients))
    one, other = (compare(p, resamples=200) for p in (paired, _chosen(paired, order)))
    assert one.verdict == other.verdict and one.can_show == other.can_show
    for a, b in zip(one.quantities, other.quantities, strict=True):
        figures = [(q.difference, q.low, q.high, q.bound) for q in (a, b)]
        assert figures[0] == pytest.approx(figures[1], abs=1e-12)
    assert order[other.worst_film] == one.worst_film


def test_a_film_twice_is_no_new_patient():
    paired = _paired(seed=2, macro=0.004, cc=0.01)
    twice = _chosen(paired, np.repeat(np.arange(len(paired.patients)), 2))
    as_new = replace(twice, patients=[f"{p}-{i % 2}" for i, p in enumerate(twice.patients)])
    for name in ("macro AUC", "CC"):
        width = [q.high - q.low for q in (_of(p, name) for p in (paired, twice, as_new))]
        assert width[1] == pytest.approx(width[0], rel=0.02)
        assert width[2] == pytest.approx(width[0] / np.sqrt(2), rel=0.15)
    flips = [_of(p, "flips").bound for p in (paired, twice, as_new)]
    assert flips[0] == flips[1] > flips[2]


def test_films_without_a_label_or_gaze_do_not_matter_to_accuracy(unlabelled):
    for paired in (unlabelled, _findings()):
        known = np.flatnonzero(any_known(paired.diagnoses.truth))
        assert 0 < len(known) < len(paired.patients)
        one, other = (compare(p, resamples=400) for p in (paired, _chosen(paired, known)))
        for name in ("macro AUC", *BY_CLASS, "Brier"):
            assert _named(one, name) == _named(other, name)
    gaze = np.flatnonzero(unlabelled.maps.has_gaze)
    assert _of(unlabelled, "CC") == _of(_chosen(unlabelled, gaze), "CC")


def test_a_score_of_a_finding_that_is_not_known_does_not_matter_to_accuracy():
    paired = _findings()
    truth, *scores = _arrays(paired)
    noise = np.random.default_rng(0).normal(size=truth.shape)
    other = [
        np.where(truth == UNKNOWN, expit(side * noise), s)
        for side, s in zip((3, -3), scores, strict=True)
    ]
    changed = replace(paired, diagnoses=_diagnoses(truth, *other, points=POINTS))
    one, other = (compare(p, resamples=400) for p in (changed, paired))
    for name in ("macro AUC", *BY_CLASS, "Brier"):
        assert _named(one, name) == _named(other, name)
    assert _named(one, "flips").difference > _named(other, "flips").difference


def test_the_same_seed_gives_the_same():
    paired = _paired(seed=3, macro=0.002)
    assert compare(paired, resamples=100) == compare(paired, resamples=100)
    assert compare(paired, resamples=100) != compare(paired, resamples=100, seed=1)


# Verdicts


def test_an_identical_candidate_passes_with_enough_patients_and_only_then():
    enough, few = (compare(_same(_paired(patients=n))) for n in (ENOUGH, ENOUGH - 1))
    assert enough.verdict == "pass" and few.verdict == "inconclusive"
    assert _verdicts(enough) == dict.fromkeys(["macro AUC", "CC", *OF_DIAGNOSES[1:]], "pass")
    unseen = 1 - 0.025 ** (1 / ENOUGH)
    auc = enough.quantities[0]
    assert (auc.low, auc.high) == pytest.approx((-unseen, unseen))
    assert auc.bound == pytest.approx(-(1 - 0.05 ** (1 / ENOUGH)))
    assert {name for name, verdict in _verdicts(few).items() if verdict != "pass"} == {"macro AUC"}
    assert few.reason == (
        "macro AUC +0.0000 in 597 patients, 95 % bound -0.0050, limit -0.0050: take about 600 "
        "patients"
    )
    nine = compare(_same(_paired(patients=9)))
    assert nine.verdict == "inconclusive"
    assert set(_verdicts(nine).values()) == {"inconclusive", "not_measured"}
    assert {n for n, v in _verdicts(nine).items() if v == "not_measured"} == set(BY_CLASS)


ALONE = {"macro AUC": 598, "CC": 299, "flips": 149, "sensitivity": 59, "specificity": 59}


@pytest.mark.parametrize("kind", [*ALONE, "Brier"])
def test_where_no_patient_changes_as_many_patients_as_the_rule_of_three_must_be_there(kind):
    """One film a patient, of which half have each of two classes."""
    needed = ALONE.get(kind, 299)
    for patients, verdict in ((needed, "pass"), (needed - 1, "inconclusive")):
        films = 2 * patients if kind in ("sensitivity", "specificity") else patients
        truth = one_of(np.arange(films) % 2, 2)
        p = np.where(truth == HAS, 0.8, 0.2)
        maps = Maps(*np.full((2, films), 0.5))
        names = [str(i) for i in range(films)]
        found = compare(Paired(names, _diagnoses(truth, p, p), maps), resamples=50)
        of_kind = [q for q in found.quantities if q.kind == kind]
        assert {q.verdict for q in of_kind} == {verdict}, of_kind
        named = {q.reason.split(": take about ")[1] for q in of_kind if verdict != "pass"}
        who = " who have class 0" if kind == "sensitivity" else ""
        step = 10 if needed > 99 and kind != "flips" else 1
        about = -(-needed // step) * step
        assert verdict == "pass" or f"{about} patients{who}" in named


def test_the_default_limits_are_the_designs():
    assert (LIMITS.macro_auc, LIMITS.cc, LIMITS.flips) == (0.005, 0.01, 0.02)
    assert (LIMITS.sensitivity, LIMITS.specificity, LIMITS.brier) == (0.05, 0.05, 0.01)
    kinds = ("macro AUC", "CC", "flips", "sensitivity", "specificity", "Brier")
    assert [LIMITS.of(kind) for kind in kinds] == [0.005, 0.01, 0.02, 0.05, 0.05, 0.01]
    for limit in ("cc", "sensitivity", "specificity", "brier"):
        with pytest.raises(ValidationError):
            Limits(**{limit: -0.1})


@pytest.mark.parametrize(
    "kind", ["macro AUC", "CC", "flips", "sensitivity", "specificity", "Brier"]
)
def test_each_quantity_is_judged_by_its_own_limit(kind):
    """Any limit but its own at 0; the worst film and each class lose something."""
    paired = _paired(seed=6, patients=ENOUGH, macro=0.002, cc=0.002, correlation=0.999)
    wide = dict.fromkeys(("macro_auc", "cc", "flips", "sensitivity", "specificity", "brier"), 1)
    field = kind.lower().replace(" ", "_")
    assert compare(paired, Limits(**wide), resamples=100).verdict == "pass"
    found = compare(paired, Limits(**{**wide, field: 0}), resamples=100)
    assert {q.kind for q in found.quantities if q.verdict != "pass"} == {kind}


def test_a_rounding_in_the_last_digits_passes():
    """As float16 does: a few films change their ranks."""
    paired = _paired(patients=ENOUGH)
    rng = np.random.default_rng(0)
    truth, reference, _ = _arrays(paired)
    scores = logit(reference) + 1e-4 * rng.normal(size=reference.shape)
    cc = paired.maps.reference + 1e-4 * rng.normal(size=paired.maps.reference.shape)
    diagnoses = _diagnoses(truth, reference, expit(scores))
    found = compare(replace(paired, diagnoses=diagnoses, maps=Maps(paired.maps.reference, cc)))
    assert found.verdict == "pass" and found.quantities[0].low < found.quantities[0].high
    nearest = max(found.quantities, key=lambda q: abs(q.bound) / q.limit)
    assert nearest.of == "class 2" and nearest.kind == "sensitivity"  # of the fewest patients
    assert found.reason.startswith(f"nearest to its limit: {nearest.name} ")


def test_swapped_classes_fail():
    paired = _same(_paired(patients=ENOUGH))
    says = _some(paired.diagnoses.reference, slice(None), [1, 0, 2])
    swapped = compare(_with(paired, {"candidate": says}))
    assert swapped.verdict == "fail"
    unharmed = {"CC", "sensitivity of class 2", "specificity of class 2"}
    assert {name for name, v in _verdicts(swapped).items() if v != "fail"} == unharmed
    assert {name for name, v in _verdicts(swapped).items() if v == "pass"} == unharmed


def test_a_shift_of_all_maps_fails_without_any_spread():
    paired = _same(_paired(patients=ENOUGH))
    found = compare(_with(paired, maps={"candidate": paired.maps.reference - 0.02}))
    assert found.verdict == "fail"
    with_gaze = len(set(np.array(paired.patients)[paired.maps.has_gaze]))
    cc = found.quantities[1]  # unless others, whom no patient here shows, gain
    assert cc.high == pytest.approx(-0.02 + 1 - 0.025 ** (1 / with_gaze))
    few = compare(
        _chosen(_with(paired, maps={"candidate": paired.maps.reference - 0.02}), range(50))
    )
    assert few.quantities[1].verdict == "inconclusive" and few.verdict == "inconclusive"
    assert "CC -0.0200" in found.reason and "limit -0.0100" in found.reason
    assert "higher precision" in found.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "output,side",
    [("diagnoses", "candidate"), ("diagnoses", "reference"), ("maps", "candidate")],
)
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_not_finite_never_passes(output, side, bad, alone):
    """Alone: the other output is not served."""
    paired = _same(_paired())
    whole = getattr(getattr(paired, output), side)
    values = (whole if output == "maps" else whole.probabilities).copy()
    values[np.flatnonzero(paired.maps.has_gaze)[0]] = bad
    broken = values if output == "maps" else replace(whole, probabilities=values)
    broken = _with(paired, **{output: {side: broken}})
    if alone:
        broken = Paired(paired.patients, **{output: getattr(broken, output)})
    found = compare(broken)
    assert found.verdict == "fail" and "not finite in 1 of" in found.reason
    kinds = ["macro AUC", "flips", "sensitivity", "specificity", "Brier"]
    of_it = {"diagnoses": kinds, "maps": ["CC"]}[output]
    assert [q.name for q in found.quantities if q.verdict == "fail"] == of_it
    others = {"diagnoses": ["CC"], "maps": OF_DIAGNOSES}[output]
    assert len(found.quantities) == len(of_it) + (0 if alone else len(others))
    if output == "diagnoses":
        assert found.flipped_films == 1
    verdicts.Comparison.model_validate_json(found.model_dump_json())


def test_a_candidate_that_is_nan_where_there_is_no_gaze_is_no_failure():
    paired = _same(_paired(patients=ENOUGH))
    assert np.isnan(paired.maps.candidate).any()
    assert compare(paired).verdict == "pass"


def _without(paired, what):
    n = len(paired.patients)
    nothing = np.full(n, np.nan)
    return _with(
        paired,
        **{
            "gaze": {"maps": {"reference": nothing, "candidate": nothing}},
            "labels": {"diagnoses": {"truth": one_of(np.full(n, UNKNOWN), 3)}},
            "other classes": {"diagnoses": {"truth": one_of(np.zeros(n, dtype=int), 3)}},
        }[what],
    )


def _arrays(paired):
    """Truth, and what is probable by the reference and by the candidate."""
    diagnoses = paired.diagnoses
    says = (diagnoses.reference, diagnoses.candidate)
    return diagnoses.truth, *(each.probabilities for each in says)


@pytest.mark.parametrize(
    "what,output,missing,reason",
    [
        ("gaze", "maps", ["CC"], "CC not measured: no film has gaze"),
        (
            "labels",
            "diagnoses",
            ["macro AUC", *BY_CLASS, "Brier"],
            "macro AUC not measured: no film has a label",
        ),
        (
            "other classes",
            "diagnoses",
            ["macro AUC", *BY_CLASS[1:3], BY_CLASS[3]],
            "labelled films are alike in every class",
        ),
    ],
)
def test_what_cannot_be_measured_cannot_pass_unless_it_is_not_served(what, output, missing, reason):
    paired = _without(_same(_paired(patients=ENOUGH)), what)
    found = compare(paired)
    assert found.verdict == "inconclusive" and reason in found.reason
    assert [q.name for q in found.quantities if q.verdict == "not_measured"] == missing
    assert {q.verdict for q in found.quantities if q.name not in missing} == {"pass"}
    excused = compare(replace(paired, **{output: None}))
    assert excused.verdict == "pass"
    measured = {"maps": OF_DIAGNOSES, "diagnoses": ["CC"]}[output]
    assert [q.name for q in excused.quantities] == measured
    shown = {"maps": ["macro AUC", "flips"], "diagnoses": ["CC"]}[output]
    assert [line.split(":")[0] for line in excused.can_show] == shown
    assert {len(row) for row in excused.rows()} == {len(excused.header())}


def test_where_nothing_is_served_nothing_passes():
    found = compare(Paired(["a", "b"]))
    assert found.verdict == "inconclusive" and found.reason.startswith("nothing measured")
    assert found.quantities == found.classes == found.can_show == found.decisions == ()
    assert found.flipped_films is found.flipped_patients is found.worst_film is None
    assert found.rows() == []


def test_a_failure_outweighs_what_was_not_measured():
    paired = _without(_same(_paired()), "labels")
    worse = _with(paired, maps={"candidate": paired.maps.reference - 0.1})
    assert compare(worse).verdict == "fail"
    assert compare(replace(worse, maps=None)).verdict == "inconclusive"


def test_a_class_of_few_patients_gives_no_interval():
    paired = _same(_paired(patients=300))
    label = class_index(paired.diagnoses.truth)
    who = np.array(paired.patients)
    label[(label == 2) & ~np.isin(who, np.unique(who[label == 2])[:4])] = 0
    found = compare(_with(paired, {"truth": one_of(label, 3)}), classes=("a", "b", "rare"))
    auc = found.quantities[0]
    assert auc.verdict == "inconclusive" and auc.low is None and auc.difference == 0
    assert "rare against the rest has films of 4" in auc.reason
    rare = _named(found, "sensitivity of rare")
    assert rare.verdict == "not_measured" and rare.low is rare.difference is None
    assert found.verdict == "inconclusive" and found.reason.endswith(rare.reason)
    assert found.reason.startswith("sensitivity of rare not measured: of rare 4 patients have it")


@pytest.mark.parametrize("patients,verdict", [(9, "not_measured"), (10, "inconclusive")])
def test_ten_patients_must_have_a_class_or_be_without_it(patients, verdict):
    """Two classes of which the second has so few patients, with two films each."""
    index = np.where(np.arange(300) < patients, 1, 0).repeat(2)
    truth = one_of(index, 2)
    p = np.where(truth == HAS, 0.8, 0.2)
    names = [f"{i // 2}" for i in range(600)]
    found = compare(Paired(names, _diagnoses(truth, p, p)), classes=("many", "few"), resamples=50)
    for name in ("sensitivity of few", "specificity of many"):
        assert _named(found, name).verdict == verdict
    for name in ("sensitivity of many", "specificity of few"):
        assert _named(found, name).verdict == "pass"


def test_a_limit_of_zero_never_passes():
    names = ("macro_auc", "cc", "flips", "sensitivity", "specificity", "brier")
    found = compare(_same(_paired(patients=ENOUGH)), Limits(**dict.fromkeys(names, 0)))
    assert len(found.quantities) == 10
    assert {q.verdict for q in found.quantities} == {"inconclusive"}
    assert "limit of 0" in found.reason


def test_flips_fail_pass_and_stay_open():
    verdicts = [judge_flips(k, 400, 0.02).verdict for k in (0, 3, 4, 8, 14, 15, 400)]
    assert verdicts == ["pass"] * 2 + ["inconclusive"] * 3 + ["fail"] * 2
    assert stats.beta.ppf(0.95, 4, 397) < 0.02 < stats.beta.ppf(0.95, 5, 396)
    assert stats.beta.ppf(0.025, 14, 387) < 0.02 < stats.beta.ppf(0.025, 15, 386)


def test_reasons_say_how_many_patients_it_takes():
    """Half of the limit lost in 60 patients: take the number that is named, and it passes."""
    found = _of(_paired(seed=4, patients=60, macro=0.0025), "macro AUC")
    assert found.verdict == "inconclusive" and "take about " in found.reason
    flips = judge_flips(3, 300, 0.02)
    named = int(flips.reason.split("about ")[1].split()[0])
    assert judge_flips(round(named / 100), named, 0.02).verdict == "pass"
    outside = judge_flips(4, 120, 0.02)
    assert outside.verdict == "inconclusive" and "estimate is outside" in outside.reason


def test_what_a_set_can_show():
    def lines(paired, **options):
        truth, has_gaze = paired.diagnoses.truth, paired.maps.has_gaze
        return power.can_show(paired.patients, truth, has_gaze, **options)

    small = lines(_paired(patients=120))
    assert small[2] == "flips: with 120 patients even zero flips cannot exclude 2 %: 149 can"
    assert "120 patients, fewer than the 1500 recommended" in small[0]
    rare = [line for line in small if line.startswith("sensitivity of class 2: ")]
    assert len(rare) == 1 and rare[0].endswith("patients cannot exclude 5 %: 59 can")
    large = lines(_paired(patients=400))
    assert large[2] == "flips: up to 3 of 400 patients may flip and exclude 2 % still"
    assert "limit of 0" in lines(_paired(patients=30), limits=Limits(flips=0))[2]
    paired = _paired(patients=120)
    assert power.can_show(paired.patients, None, paired.maps.has_gaze) == small[1:2]
    labels_alone = power.can_show(paired.patients, paired.diagnoses.truth, None)
    assert labels_alone == (small[0], *small[2:])
    assert power.can_show(paired.patients, None, None) == ()
    blind = _without(_without(_paired(), "gaze"), "labels")
    assert "no film has a label" in lines(blind)[0] and "no film has gaze" in lines(blind)[1]
    assert compare(_paired(patients=120), resamples=50).can_show == small


def test_a_comparison_goes_into_a_manifest_and_back(unlabelled):
    without = (_without(unlabelled, what) for what in ("gaze", "labels"))
    not_served = (replace(unlabelled, **{output: None}) for output in ("maps", "diagnoses"))
    for paired in (*not_served, _findings(), unlabelled, *without):
        found = compare(paired, resamples=50)
        assert verdicts.Comparison.model_validate_json(found.model_dump_json()) == found
    broken = {"quantities": [], "nonsense": 1}
    with pytest.raises(ValidationError):
        verdicts.Comparison.model_validate({**found.model_dump(), **broken})


def test_a_pair_must_be_of_the_same_films():
    paired = _paired(patients=20)
    truth, reference, candidate = _arrays(paired)
    n = len(paired.patients)
    says = paired.diagnoses.reference
    for change in (
        {"probabilities": reference[1:]},
        {"probabilities": reference[:, :2]},
        {"labels": says.labels[:, :2]},
        {"flags": says.flags[1:]},
        {"flags": says.flags[:, 0]},
        dict.fromkeys(("probabilities", "labels", "flags"), np.zeros(n)),
        dict.fromkeys(("probabilities", "labels", "flags"), np.zeros((n, 0))),
        dict.fromkeys(("probabilities", "labels", "flags"), np.zeros((n, 3, 1))),
    ):
        with pytest.raises(ValueError, match=r"expected arrays of one shape \(n, K\)"):
            replace(says, **change)
    two, fewer = _some(says, slice(None), [0, 1]), _some(says, slice(1, None))
    for change in (
        {"diagnoses": {"truth": truth[1:]}},
        {"diagnoses": {"truth": class_index(truth)}},
        {"diagnoses": {"candidate": two}},
        {"diagnoses": {"candidate": fewer}},
        {"diagnoses": {"reference": fewer, "candidate": fewer}},
        {"diagnoses": {"truth": truth[:, :1], "reference": two}},
        {"diagnoses": {"reference": two, "candidate": two}},
        {"diagnoses": {"decides": np.ones(2, dtype=bool)}},
        {"diagnoses": {"decides": np.ones((n, 3), dtype=bool)}},
        {"diagnoses": {"truth": np.full((n, 3), 2)}},
        {"diagnoses": {"truth": np.full((n, 3), -2)}},
        {"maps": {"candidate": paired.maps.candidate[1:]}},
        {"maps": dict.fromkeys(("reference", "candidate"), np.zeros((n, 1)))},
    ):
        with pytest.raises(ValueError, match="expected"):
            _with(paired, **change)
    for change in (
        {"patients": paired.patients[1:]},
        {"maps": Maps(*np.zeros((2, n - 1)))},
        {"diagnoses": _diagnoses(truth[1:], reference[1:], candidate[1:])},
        {"patients": [], "maps": None, "diagnoses": None},
    ):
        with pytest.raises(ValueError, match="expected outputs of the same n > 0 films"):
            replace(paired, **change)
    with pytest.raises(ValueError, match="expected a name for each column"):
        compare(paired, classes=("a", "b"))


# Faults that are planted, each in a set that is large enough


def _network(kind="exclusive"):
    classes = tuple(DiseaseClass(name=n, display=n) for n in ("a", "b", "c"))
    return Served(
        ModelSpec(
            variant="tiny",
            model_version="1",
            heads=("logits",),
            classes=classes,
            class_kind=kind,
            height=32,
            width=32,
            pixel_source="image-8bit",
            domain="none",
        )
    )


def _served_films(kind, patients=1000):
    """Patients, truth and logits of films to judge by; and the network with its decision fitted."""
    drawn = []
    for seed in (1, 2):
        rng = np.random.default_rng([seed, 99])
        patient, label = _films(rng, patients)
        truth = one_of(label, 3)
        if kind == "findings":
            has = rng.random((patients, 3))[patient] < PREVALENCE
            truth = (has ^ (rng.random(has.shape) < 0.1)).astype(np.int8)
        drawn.append((patient, truth, _scores(rng, patient, truth == HAS, 0, 1)[0]))
    (_, *validation), (patient, truth, logits) = drawn
    served = _network(kind)
    served = replace(served, decision=fit_decision(validation[1], validation[0], served))
    return [f"p{i:04d}" for i in patient], truth, logits, served, validation


def _judged(patients, truth, reference, candidate, served, own=None):
    own = own or served
    says = Says.of(served, reference), Says.of(own, candidate)
    exclusive = served.spec.class_kind == "exclusive"
    diagnoses = Diagnoses(truth, *says, served.decides | own.decides, exclusive)
    return compare(Paired(patients, diagnoses), classes=served.classes, resamples=400)


KINDS = ("exclusive", "findings")


@pytest.mark.parametrize("kind", KINDS)
def test_halved_logits_must_be_refitted_to_pass(kind):
    """An AUC of a sigmoid does not see them: flags do, and probabilities are another."""
    patients, truth, logits, served, (of_validation, before) = _served_films(kind)
    assert _judged(patients, truth, logits, logits, served).verdict == "pass"
    found = _judged(patients, truth, logits, logits / 2, served)
    assert found.verdict == "fail"
    assert _named(found, "flips").verdict == "fail"
    assert _named(found, "Brier").loss > 0
    if kind == "findings":
        assert _named(found, "macro AUC").difference == 0
    else:
        assert _named(found, "Brier").verdict == "fail"
    own = replace(served, decision=fit_decision(before / 2, of_validation, served))
    assert own.decision != served.decision
    refitted = _judged(patients, truth, logits, logits / 2, served, own)
    assert refitted.verdict == "pass", refitted.reason
    assert _judged(patients, truth, logits, logits, served, own).verdict == "fail"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_class_upside_down_fails(kind, column):
    patients, truth, logits, served, _ = _served_films(kind)
    turned = logits.copy()
    turned[:, column] *= -1
    found = _judged(patients, truth, logits, turned, served)
    name = served.classes[column]
    assert found.verdict == "fail"
    for of_it in ("macro AUC", "flips", f"sensitivity of {name}", "Brier"):
        assert _named(found, of_it).verdict == "fail", of_it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_class_that_nobody_has_is_named_and_must_not_pass(kind, column):
    patients, truth, logits, served, _ = _served_films(kind)
    kept = truth[:, column] != HAS
    patients = [p for p, keep in zip(patients, kept, strict=True) if keep]
    truth, logits = truth[kept], logits[kept]
    name = served.classes[column]
    for candidate in (logits, logits * np.where(np.arange(3) == column, -1, 1)):
        found = _judged(patients, truth, logits, candidate, served)
        assert found.verdict == ("inconclusive" if candidate is logits else "fail")
        lacking = _named(found, f"sensitivity of {name}")
        assert lacking.verdict == "not_measured" and name in lacking.reason
        assert f"of {name} 0 patients have it" in lacking.reason
        assert any(row[0] == lacking.name and row[-1] == "not measured" for row in found.rows())
    same = _judged(patients, truth, logits, logits, served)
    assert f"sensitivity of {name} not measured" in same.reason
    others = {q.name for q in same.quantities if q.verdict == "not_measured"}
    assert others == {f"sensitivity of {name}"}


def test_flips_that_all_go_one_way_must_not_pass():
    """Twenty of a class's patients are lost, all else is the same: few enough as flips."""
    paired = _same(_paired(patients=1800))
    diagnoses, who = paired.diagnoses, np.array(paired.patients)
    reference = diagnoses.reference
    has = diagnoses.truth[:, 2] == HAS
    found_ones = np.unique(who[has & reference.flags[:, 2]])
    of_class = len(set(who[has]))
    flags = reference.flags.copy()
    flags[np.isin(who, found_ones[:20]), 2] = False
    candidate = replace(reference, flags=flags)
    found = compare(_with(paired, {"candidate": candidate}), classes=("a", "b", "c"))
    lost = _named(found, "sensitivity of c")
    assert lost.difference == pytest.approx(-20 / of_class)
    assert lost.verdict != "pass" and found.verdict != "pass"
    assert {q.name for q in found.quantities if q.verdict != "pass"} == {lost.name}
    assert [(d.name, d.raised, d.dropped) for d in found.decisions] == [
        ("a", 0, 0),
        ("b", 0, 0),
        ("c", 0, 20),
    ]


def test_flags_that_are_raised_must_not_pass():
    """The other way: a tenth of the patients are called ill who were not, and are not."""
    paired = _same(_paired(patients=ENOUGH))
    diagnoses, who = paired.diagnoses, np.array(paired.patients)
    flags = diagnoses.reference.flags.copy()
    flags[np.isin(who, np.unique(who)[::10]) & (diagnoses.truth[:, 2] != HAS), 2] = True
    found = compare(_with(paired, {"candidate": replace(diagnoses.reference, flags=flags)}))
    assert found.verdict == "fail"
    assert {n for n, v in _verdicts(found).items() if v == "fail"} == {"flips", BY_CLASS[5]}
    assert [(d.raised > 0, d.dropped) for d in found.decisions] == [(False, 0)] * 2 + [(True, 0)]


@pytest.mark.parametrize("classes", [2, 3])
def test_an_auc_of_one_on_twenty_patients_must_not_pass(classes):
    """Nothing is lost on them, whether the candidate is the reference or another without a flaw."""
    index = np.arange(20) % classes
    truth = one_of(index, classes)
    names = [str(i) for i in range(20)]
    rng = np.random.default_rng(0)
    sure, other = (
        np.where(truth == HAS, 0.9, 0.1) + rng.uniform(0, 0.05, truth.shape) for _ in "ab"
    )
    for candidate in (sure, other):
        found = compare(Paired(names, _diagnoses(truth, sure, candidate)))
        auc = found.quantities[0]
        assert auc.reference == auc.candidate == 1 and found.flipped_films == 0
        assert auc.verdict == "inconclusive" and found.verdict == "inconclusive"
        assert not any(q.verdict == "pass" for q in found.quantities if q.kind != "Brier")


def test_probabilities_that_are_too_sure_must_not_pass():
    """Ranks, labels and flags are the same: the Brier score alone is another."""
    paired = _same(_paired(patients=ENOUGH))
    diagnoses = paired.diagnoses
    sharp = replace(
        diagnoses.reference, probabilities=expit(4 * logit(diagnoses.reference.probabilities))
    )
    found = compare(_with(paired, {"candidate": sharp}))
    assert {n for n, v in _verdicts(found).items() if v != "pass"} == {"Brier"}
    assert found.verdict == "fail" and "Brier +0." in found.reason
    label = class_index(diagnoses.truth)
    known = label != UNKNOWN
    rise = [
        sum(brier_score_loss(label[known] == c, p[known, c]) for c in range(3))
        for p in (diagnoses.reference.probabilities, sharp.probabilities)
    ]
    brier = _named(found, "Brier")
    assert [brier.reference, brier.candidate] == pytest.approx(rise)
    assert _named(compare(_with(paired, {"reference": sharp})), "Brier").verdict == "pass"


# The statistics: coverage, size and power


@pytest.mark.parametrize("losing", range(1, 10))
def test_few_patients_who_lose_bound_the_loss_as_poisson_does(losing):
    """k of 400 patients lose 0.3 each, the others nothing: Garwood's exact bound of a count."""
    changes = np.where(np.arange(400) < losing, -0.3, 0.0)
    patients = [f"{i:03d}" for i in range(400)]
    value = changes.mean()
    parts = (changes - value) / 400

    def mean(weights):
        return intervals.weighted_mean(changes, weights)

    bound = bounds.studentised(patients, value, parts, mean).bound
    exact = -0.3 / 400 * stats.chi2.ppf(0.95, 2 * (losing + 1)) / 2
    assert bound < 0.985 * exact
    percentile = np.quantile(intervals.bootstrap(patients, mean, resamples=500, seed=0), 0.05)
    assert percentile > 0.95 * exact, "percentiles would have done"


def _shares(seeds, resamples, patients, macro, cc=None, few=False):
    """Shares of the seeds that cover the truth, and that pass; no CC where none is given."""
    truth = {"macro AUC": -macro} if cc is None else {"macro AUC": -macro, "CC": -cc}
    covered, passed = Counter(), Counter()
    for seed in range(seeds):
        paired = _paired(seed, patients, macro, cc or 0, few=few)
        served = paired if cc is not None else replace(paired, maps=None)
        compared = compare(served, resamples=resamples, seed=seed)
        for found in compared.quantities[: len(truth)]:
            covered[found.name] += found.low <= truth[found.name] <= found.high
            passed[found.name] += found.verdict == "pass"
    return [{name: shares[name] / seeds for name in truth} for shares in (covered, passed)]


def test_intervals_cover_and_a_loss_at_the_limit_seldom_passes():
    """Of 100 seeds a true 0.95 gives 88 or more, and a true 0.05 11 or fewer, with 0.996 each."""
    covered, passed = _shares(100, 300, 150, LIMITS.macro_auc, LIMITS.cc)
    assert min(covered.values()) >= 0.88, covered
    assert max(passed.values()) <= 0.11, passed


def test_a_loss_by_few_patients_seldom_passes():
    """1.25 % of 600 patients get scores that say nothing; bounds as above."""
    covered, passed = _shares(100, 400, 600, LIMITS.macro_auc, few=True)
    assert covered["macro AUC"] >= 0.88 and passed["macro AUC"] <= 0.11, (covered, passed)


@pytest.mark.parametrize("patients", [149, 150, 248, 400, 849, 1450, power.RECOMMENDED_PATIENTS])
def test_flips_at_the_limit_pass_in_one_of_twenty_at_most(patients):
    """Exact: the probability of every count that passes."""
    passing = [k for k in range(80) if judge_flips(k, patients, LIMITS.flips).verdict == "pass"]
    assert stats.binom.pmf(passing, patients, LIMITS.flips).sum() <= 0.05


def test_half_of_the_limit_of_flips_passes_at_the_recommended_size():
    n = power.RECOMMENDED_PATIENTS
    passing = [k for k in range(80) if judge_flips(k, n, LIMITS.flips).verdict == "pass"]
    assert stats.binom.pmf(passing, n, LIMITS.flips / 2).sum() >= 0.90


@pytest.mark.slow
def test_a_thousand_sets_at_the_limit():
    covered, passed = _shares(1000, 400, 300, LIMITS.macro_auc, LIMITS.cc)
    assert all(0.935 <= share <= 0.965 for share in covered.values()), covered
    assert max(passed.values()) <= 0.065, passed


@pytest.mark.slow
def test_a_thousand_sets_of_the_recommended_size_at_half_the_limit():
    _, passed = _shares(1000, 200, power.RECOMMENDED_PATIENTS, LIMITS.macro_auc / 2, LIMITS.cc / 2)
    assert min(passed.values()) >= 0.90, passed


@pytest.mark.slow
def test_a_thousand_sets_where_few_patients_lose():
    """Percentiles cover 0.86 of these and let 0.16 pass."""
    covered, passed = _shares(1000, 400, 800, LIMITS.macro_auc, few=True)
    assert covered["macro AUC"] >= 0.935 and passed["macro AUC"] <= 0.065, (covered, passed)
