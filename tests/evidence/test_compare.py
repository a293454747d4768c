"""The gate's statistics against slow forms, scipy, and truths that are known exactly.

Drawn sets, unless said otherwise: patients with 1 to 4 films (1.85 on average) whose scores share
half of their variance; classes of 60, 25 and 15 %; binormal scores, so that the AUC of either
network is known: Phi(shift / sqrt 2). Findings come with those frequencies too, and a third of
their cells is unknown.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats
from sklearn.metrics import roc_auc_score

from cxrgaze.bundles import verdicts
from cxrgaze.bundles.verdicts import Limits
from cxrgaze.evidence import bounds, intervals, power
from cxrgaze.evidence import compare as compare_module
from cxrgaze.evidence.compare import Diagnoses, Maps, Paired, compare, judge_flips
from cxrgaze.evidence.truth import HAS, UNKNOWN, any_known, class_index, one_of

PREVALENCE = (0.6, 0.25, 0.15)
AUC = 0.9
LIMITS = Limits()


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
    logits = draw(rng, patient, truth == HAS, macro)
    ccs = _skewed_cc(rng, patient, cc)
    return Paired([f"p{i:04d}" for i in patient], Diagnoses(truth, *logits), Maps(*ccs))


def _with(paired, diagnoses=(), maps=()):
    """With other arrays of an output, by name."""
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
    return next(q for q in compare(paired, **options).quantities if q.name == name)


def _chosen(paired, index):
    def some(output, *names):
        return output and replace(output, **{name: getattr(output, name)[index] for name in names})

    return Paired(
        [paired.patients[i] for i in index],
        some(paired.diagnoses, "truth", "reference", "candidate"),
        some(paired.maps, "reference", "candidate"),
    )


# Figures against independent forms


def _slow_macro(paired):
    changes = []
    for truth, before, after in zip(
        paired.diagnoses.truth.T,
        paired.diagnoses.reference.T,
        paired.diagnoses.candidate.T,
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


SLOW = {"macro AUC": _slow_macro, "CC": _slow_cc}


def _unlabelled():
    """A set in which some films have no label."""
    paired = _paired(seed=5, patients=100, macro=0.01, cc=0.02, correlation=0.9)
    truth = paired.diagnoses.truth.copy()
    truth[::7] = UNKNOWN
    return _with(paired, {"truth": truth})


POINTS = (1.5, 1.0, 2.0)


def _findings():
    """Three findings of which a film may have any; some cells are unknown, and some whole rows."""
    rng = np.random.default_rng(13)
    patient, _ = _films(rng, 100)
    has = rng.random((100, 3))[patient] < PREVALENCE
    has ^= rng.random(has.shape) < 0.1
    scores = _scores(rng, patient, has, 0.01, 0.5)
    truth = np.where(rng.random(has.shape) < 1 / 3, UNKNOWN, has).astype(np.int8)
    truth[::11] = UNKNOWN
    diagnoses = Diagnoses(truth, *scores, decide=lambda scores: scores >= POINTS)
    return Paired([f"p{i:04d}" for i in patient], diagnoses)


MEASURED = [(_unlabelled, 0, "macro AUC"), (_unlabelled, 1, "CC"), (_findings, 0, "macro AUC")]


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

    monkeypatch.setattr(compare_module, "studentised", spy)
    return calls


@pytest.mark.parametrize("drawn,_,name", MEASURED)
def test_a_difference_is_that_of_the_slow_form(drawn, _, name):
    paired = drawn()
    found = _of(paired, name)
    assert found.difference == pytest.approx(SLOW[name](paired), abs=1e-12)
    assert found.difference == pytest.approx(found.candidate - found.reference, abs=1e-12)
    assert found.loss == -found.difference


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
    used = np.flatnonzero(labelled if name == "macro AUC" else paired.maps.has_gaze)
    pivots = []
    for drawn_films in weights:
        resampled = _chosen(paired, np.repeat(used, drawn_films))
        again = np.repeat(parts, [drawn_films[who == p][0] for p in names])
        error = again.std(ddof=1) * np.sqrt(len(again))
        pivots.append((SLOW[name](resampled) - value) / error)
    assert 1 / np.sum((parts**2 / (parts**2).sum()) ** 2) > 10, "the bootstrap was not used"
    error = parts.std(ddof=1) * np.sqrt(len(parts))
    pivots.sort()
    for level, place in ((found.bound, 38), (found.low, 39), (found.high, 1)):  # of 40
        assert level == pytest.approx(value - error * pivots[place - 1])


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
            unlabelled.diagnoses.reference.tolist(),
            unlabelled.diagnoses.candidate.tolist(),
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
    sides = (paired.diagnoses.reference.tolist(), paired.diagnoses.candidate.tolist())
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
    largest = compare(replace(paired, diagnoses=Diagnoses(*_arrays(paired))), resamples=50)
    assert largest.flipped_films != found.flipped_films


def test_findings_without_an_operating_point_decide_nothing_and_must_not_pass():
    paired = _findings()
    truth, reference, _ = _arrays(paired)
    undecided = Diagnoses(truth, reference, reference, decide=lambda scores: scores[:, :0] > 0)
    found = compare(replace(paired, diagnoses=undecided), resamples=50)
    assert [q.verdict for q in found.quantities] == ["pass", "not_measured"]
    assert found.verdict == "inconclusive" and "no finding has an operating point" in found.reason


def test_a_finding_that_nobody_has_or_that_nobody_lacks_has_no_auc():
    paired = _findings()
    truth, *scores = _arrays(paired)
    for alike in (0, 1):
        part = truth.copy()
        part[part[:, 1] >= 0, 1] = alike
        found = compare(_with(paired, {"truth": part}), classes=("a", "b", "c"), resamples=50)
        assert [change.name for change in found.classes] == ["a", "c"]
        rest = Diagnoses(part[:, [0, 2]], *(s[:, [0, 2]] for s in scores))
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
        expected = roc_auc_score(positive, unlabelled.diagnoses.candidate[known, index])
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
        assert _of(paired, "macro AUC") == _of(_chosen(paired, known), "macro AUC")
    gaze = np.flatnonzero(unlabelled.maps.has_gaze)
    assert _of(unlabelled, "CC") == _of(_chosen(unlabelled, gaze), "CC")


def test_a_score_of_a_finding_that_is_not_known_does_not_matter_to_accuracy():
    paired = _findings()
    truth, *scores = _arrays(paired)
    noise = np.random.default_rng(0).normal(size=truth.shape)
    other = [
        np.where(truth == UNKNOWN, side * noise, s) for side, s in zip((3, -3), scores, strict=True)
    ]
    changed = _with(paired, {"reference": other[0], "candidate": other[1]})
    assert _of(changed, "macro AUC") == _of(paired, "macro AUC")


def test_the_same_seed_gives_the_same():
    paired = _paired(seed=3, macro=0.002)
    assert compare(paired, resamples=100) == compare(paired, resamples=100)
    assert compare(paired, resamples=100) != compare(paired, resamples=100, seed=1)


# Verdicts


def test_an_identical_candidate_passes_with_enough_patients_and_only_then():
    enough, few = (compare(_same(_paired(patients=n))) for n in (149, 148))
    assert enough.verdict == "pass" and few.verdict == "inconclusive"
    assert (enough.quantities[0].low, enough.quantities[0].high) == (0, 0)
    assert [q.verdict for q in few.quantities] == ["pass", "pass", "inconclusive"]
    assert few.reason == (
        "flips 0 % in 148 patients, 95 % bound 2.004 %, limit 2 %: take about 149 patients"
    )
    nine = compare(_same(_paired(patients=9)))
    assert {q.verdict for q in nine.quantities} == {"inconclusive"}


def test_the_default_limits_are_the_designs():
    assert (LIMITS.macro_auc, LIMITS.cc, LIMITS.flips) == (0.005, 0.01, 0.02)
    with pytest.raises(ValidationError):
        Limits(cc=-0.1)


def test_a_rounding_in_the_last_digits_passes():
    """As float16 does: a few films change their ranks."""
    paired = _paired(patients=300)
    rng = np.random.default_rng(0)
    rounded = (
        {"candidate": output.reference + 1e-4 * rng.normal(size=output.reference.shape)}
        for output in (paired.diagnoses, paired.maps)
    )
    found = compare(_with(paired, *rounded))
    assert found.verdict == "pass" and found.quantities[0].low < found.quantities[0].high
    assert found.reason.startswith("nearest to its limit: flips ")


def test_swapped_classes_fail():
    paired = _same(_paired())
    swapped = compare(_with(paired, {"candidate": paired.diagnoses.reference[:, [1, 0, 2]]}))
    assert swapped.verdict == "fail"
    assert [q.verdict for q in swapped.quantities] == ["fail", "pass", "fail"]


def test_a_shift_of_all_maps_fails_without_any_spread():
    paired = _same(_paired())
    found = compare(_with(paired, maps={"candidate": paired.maps.reference - 0.02}))
    assert found.verdict == "fail"
    assert found.quantities[1].high == pytest.approx(-0.02)
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
    values = getattr(getattr(paired, output), side).copy()
    values[np.flatnonzero(paired.maps.has_gaze)[0]] = bad
    broken = _with(paired, **{output: {side: values}})
    if alone:
        broken = Paired(paired.patients, **{output: getattr(broken, output)})
    found = compare(broken)
    assert found.verdict == "fail" and "not finite in 1 of" in found.reason
    of_it = {"diagnoses": ["macro AUC", "flips"], "maps": ["CC"]}[output]
    assert [q.name for q in found.quantities if q.verdict == "fail"] == of_it
    assert len(found.quantities) == (len(of_it) if alone else 3)
    verdicts.Comparison.model_validate_json(found.model_dump_json())


def test_a_candidate_that_is_nan_where_there_is_no_gaze_is_no_failure():
    paired = _same(_paired())
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
    return paired.diagnoses.truth, paired.diagnoses.reference, paired.diagnoses.candidate


@pytest.mark.parametrize(
    "what,output,reason",
    [
        ("gaze", "maps", "CC not measured: no film has gaze"),
        ("labels", "diagnoses", "macro AUC not measured: no film has a label"),
        ("other classes", "diagnoses", "labelled films are alike in every class"),
    ],
)
def test_what_cannot_be_measured_cannot_pass_unless_it_is_not_served(what, output, reason):
    paired = _without(_same(_paired()), what)
    found = compare(paired)
    assert found.verdict == "inconclusive" and reason in found.reason
    assert [q.verdict for q in found.quantities].count("not_measured") == 1
    excused = compare(replace(paired, **{output: None}))
    assert excused.verdict == "pass"
    measured = {"maps": ["macro AUC", "flips"], "diagnoses": ["CC"]}[output]
    assert [q.name for q in excused.quantities] == measured
    assert [line.split(":")[0] for line in excused.can_show] == measured
    assert {len(row) for row in excused.rows()} == {len(excused.header())}


def test_where_nothing_is_served_nothing_passes():
    found = compare(Paired(["a", "b"]))
    assert found.verdict == "inconclusive" and found.reason.startswith("nothing measured")
    assert found.quantities == found.classes == found.can_show == ()
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
    assert found.reason == auc.reason and "rare against the rest has films of 4" in auc.reason


def test_a_limit_of_zero_never_passes():
    found = compare(_same(_paired()), Limits(macro_auc=0, cc=0, flips=0))
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
    large = lines(_paired(patients=400))
    assert large[2] == "flips: up to 3 of 400 patients may flip and exclude 2 % still"
    assert "limit of 0" in lines(_paired(patients=30), limits=Limits(flips=0))[2]
    paired = _paired(patients=120)
    assert power.can_show(paired.patients, None, paired.maps.has_gaze) == small[1:2]
    assert power.can_show(paired.patients, paired.diagnoses.truth, None) == (small[0], small[2])
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
    for change in (
        {"diagnoses": {"truth": truth[1:]}},
        {"diagnoses": {"truth": class_index(truth)}},
        {"diagnoses": {"candidate": candidate[:, :2]}},
        {"diagnoses": {"truth": truth[:, :1], "reference": reference[:, :2]}},
        {"diagnoses": {"reference": np.zeros(n), "candidate": np.zeros(n)}},
        {"diagnoses": dict.fromkeys(("truth", "reference", "candidate"), np.zeros(n))},
        {"diagnoses": dict.fromkeys(("truth", "reference", "candidate"), np.zeros((n, 0)))},
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
        {"diagnoses": Diagnoses(truth[1:], reference[1:], candidate[1:])},
        {"patients": [], "maps": None, "diagnoses": None},
    ):
        with pytest.raises(ValueError, match="expected outputs of the same n > 0 films"):
            replace(paired, **change)
    with pytest.raises(ValueError, match="expected a name for each column"):
        compare(paired, classes=("a", "b"))


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
