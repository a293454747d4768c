"""The gate's statistics against slow forms, scipy, and truths that are known exactly.

Drawn sets, unless said otherwise: patients with 1 to 4 films (1.85 on average) whose scores share
half of their variance; classes of 60, 25 and 15 %; binormal scores, so that the AUC of either
network is known: Phi(shift / sqrt 2).
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
from cxrgaze.evidence.compare import Paired, compare, judge_flips

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


def _scores(rng, patient, label, loss, correlation):
    """Logits of both networks; every class loses exactly `loss` of its AUC of 0.9."""
    old, new = (np.sqrt(2) * NormalDist().inv_cdf(AUC - part) for part in (0, loss))
    one = label[:, None] == np.arange(3)
    first, second = (_alike(patient, lambda n: rng.normal(size=(n, 3))) for _ in range(2))
    blurred = correlation * first + np.sqrt(1 - correlation**2) * second
    return old * one + first, new * one + blurred


def _few_broken(rng, patient, label, loss):
    """Logits of both networks; a share of the patients gets scores that say nothing.

    That share loses AUC - 0.5 where the film is a positive, and nothing where it is not.
    """
    reference, _ = _scores(rng, patient, label, 0, 0)
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
    logits = draw(rng, patient, label, macro)
    ccs = _skewed_cc(rng, patient, cc)
    return Paired([f"p{i:04d}" for i in patient], label, *logits, *ccs)


def _same(paired):
    """The candidate is the reference."""
    return replace(
        paired, candidate_logits=paired.reference_logits, candidate_cc=paired.reference_cc
    )


def _of(paired, name, **options):
    options = {"resamples": 400, **options}
    return next(q for q in compare(paired, **options).quantities if q.name == name)


def _chosen(paired, index):
    return Paired(
        [paired.patients[i] for i in index],
        *(
            getattr(paired, name)[index]
            for name in (
                "labels",
                "reference_logits",
                "candidate_logits",
                "reference_cc",
                "candidate_cc",
            )
        ),
    )


# Figures against independent forms


def _slow_macro(paired):
    known = paired.labels >= 0
    return np.mean(
        [
            roc_auc_score(paired.labels[known] == k, paired.candidate_logits[known, k])
            - roc_auc_score(paired.labels[known] == k, paired.reference_logits[known, k])
            for k in range(3)
        ]
    )


def _slow_cc(paired):
    changes = [
        b - a
        for a, b in zip(paired.reference_cc, paired.candidate_cc, strict=True)
        if not np.isnan(a)
    ]
    return sum(changes) / len(changes)


SLOW = {"macro AUC": _slow_macro, "CC": _slow_cc}


@pytest.fixture
def unlabelled():
    """A set in which some films have no label."""
    paired = _paired(seed=5, patients=100, macro=0.01, cc=0.02, correlation=0.9)
    labels = paired.labels.copy()
    labels[::7] = -1
    return replace(paired, labels=labels)


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


@pytest.mark.parametrize("name", SLOW)
def test_a_difference_is_that_of_the_slow_form(name, unlabelled):
    found = _of(unlabelled, name)
    assert found.difference == pytest.approx(SLOW[name](unlabelled), abs=1e-12)
    assert found.difference == pytest.approx(found.candidate - found.reference, abs=1e-12)
    assert found.loss == -found.difference


@pytest.mark.parametrize("place,name", list(enumerate(SLOW)))
def test_its_standard_error_is_that_of_the_jackknife_over_patients(place, name, unlabelled, asked):
    compare(unlabelled, resamples=50)
    patients, _, influence, _ = asked[place]
    parts = Counter()
    for patient, part in zip(patients, influence, strict=True):
        parts[patient] += part
    who = sorted(parts)
    variance = sum(parts[p] ** 2 for p in who) * len(who) / (len(who) - 1)
    everyone = np.array(unlabelled.patients)
    without = [SLOW[name](_chosen(unlabelled, np.flatnonzero(everyone != p))) for p in who]
    jackknife = (len(who) - 1) / len(who) * ((without - np.mean(without)) ** 2).sum()
    assert np.sqrt(variance) == pytest.approx(np.sqrt(jackknife), rel=0.08)


@pytest.mark.parametrize("place,name", list(enumerate(SLOW)))
def test_the_bootstrap_is_brute_force_resampling(place, name, unlabelled, asked):
    """Films repeated as drawn, slow forms, and quantiles by sorting."""
    found = _of(unlabelled, name, resamples=39, seed=3)
    patients, value, influence, _ = asked[place]
    weights = intervals.bootstrap(patients, lambda w: w, resamples=39, seed=3).astype(int)
    who = np.array(patients)
    names = sorted(set(patients))
    parts = np.array([influence[who == p].sum() for p in names])
    used = np.flatnonzero(unlabelled.labels >= 0 if name == "macro AUC" else unlabelled.has_gaze)
    pivots = []
    for drawn in weights:
        resampled = _chosen(unlabelled, np.repeat(used, drawn))
        again = np.repeat(parts, [drawn[who == p][0] for p in names])
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
            unlabelled.reference_logits.tolist(),
            unlabelled.candidate_logits.tolist(),
            strict=True,
        )
        if a.index(max(a)) != b.index(max(b))
    ]
    assert (found.flipped_films, found.flipped_patients) == (len(changed), len(set(changed)))
    assert len(changed) > len(set(changed)) > 0
    flips = found.quantities[2]
    assert flips.difference == flips.loss == len(set(changed)) / found.patients
    hidden = compare(replace(unlabelled, labels=np.full(len(unlabelled.patients), -1)))
    assert hidden.flipped_films == len(changed)


def test_what_is_not_gated_is_reported(unlabelled):
    found = compare(unlabelled, classes=("normal", "failure", "pneumonia"), resamples=50)
    assert [k.name for k in found.classes] == ["normal", "failure", "pneumonia"]
    known = unlabelled.labels >= 0
    for index, change in enumerate(found.classes):
        positive = unlabelled.labels[known] == index
        expected = roc_auc_score(positive, unlabelled.candidate_logits[known, index])
        assert change.candidate == pytest.approx(expected) and change.films == positive.sum()
    assert np.mean([k.difference for k in found.classes]) == pytest.approx(
        found.quantities[0].difference
    )
    loss = unlabelled.reference_cc - unlabelled.candidate_cc
    assert found.worst_cc_loss == np.nanmax(loss) == loss[found.worst_film]
    rows = found.rows()
    assert {len(row) for row in rows} == {len(found.header())}
    assert "AUC of failure" in str(rows) and f"index {found.worst_film}" in str(rows)


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
    known = np.flatnonzero(unlabelled.labels >= 0)
    assert _of(unlabelled, "macro AUC") == _of(_chosen(unlabelled, known), "macro AUC")
    gaze = np.flatnonzero(unlabelled.has_gaze)
    assert _of(unlabelled, "CC") == _of(_chosen(unlabelled, gaze), "CC")


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
    rounded = [
        v + 1e-4 * rng.normal(size=v.shape) for v in (paired.reference_logits, paired.reference_cc)
    ]
    found = compare(replace(paired, candidate_logits=rounded[0], candidate_cc=rounded[1]))
    assert found.verdict == "pass" and found.quantities[0].low < found.quantities[0].high
    assert found.reason.startswith("nearest to its limit: flips ")


def test_swapped_classes_fail():
    paired = _same(_paired())
    swapped = compare(replace(paired, candidate_logits=paired.reference_logits[:, [1, 0, 2]]))
    assert swapped.verdict == "fail"
    assert [q.verdict for q in swapped.quantities] == ["fail", "pass", "fail"]


def test_a_shift_of_all_maps_fails_without_any_spread():
    paired = _same(_paired())
    found = compare(replace(paired, candidate_cc=paired.reference_cc - 0.02))
    assert found.verdict == "fail"
    assert found.quantities[1].high == pytest.approx(-0.02)
    assert "CC -0.0200" in found.reason and "limit -0.0100" in found.reason
    assert "higher precision" in found.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["candidate_logits", "reference_logits", "candidate_cc"])
@pytest.mark.parametrize("untrained", [(), ("logits", "log_density")])
def test_what_is_not_finite_never_passes(field, bad, untrained):
    paired = _same(_paired())
    values = getattr(paired, field).copy()
    values[np.flatnonzero(paired.has_gaze)[0]] = bad
    found = compare(replace(paired, **{field: values}), untrained=untrained)
    assert found.verdict == "fail" and "not finite in 1 of" in found.reason
    verdicts.Comparison.model_validate_json(found.model_dump_json())


def test_a_candidate_that_is_nan_where_there_is_no_gaze_is_no_failure():
    paired = _same(_paired())
    assert np.isnan(paired.candidate_cc).any()
    assert compare(paired).verdict == "pass"


def _without(paired, what):
    n = len(paired.patients)
    nothing = np.full(n, np.nan)
    return {
        "gaze": replace(paired, reference_cc=nothing, candidate_cc=nothing),
        "labels": replace(paired, labels=np.full(n, -1)),
        "other classes": replace(paired, labels=np.zeros(n, dtype=int)),
    }[what]


@pytest.mark.parametrize(
    "what,head,reason",
    [
        ("gaze", "log_density", "CC not measured: no film has gaze"),
        ("labels", "logits", "macro AUC not measured: no film has a label"),
        ("other classes", "logits", "labelled films are of one class"),
    ],
)
def test_what_cannot_be_measured_cannot_pass_unless_nothing_taught_it(what, head, reason):
    paired = _without(_same(_paired()), what)
    found = compare(paired)
    assert found.verdict == "inconclusive" and reason in found.reason
    assert [q.verdict for q in found.quantities].count("not_measured") == 1
    excused = compare(paired, untrained=[head])
    assert excused.verdict == "pass"
    assert compare(paired, untrained=["logits", "log_density"]).verdict == "inconclusive"


def test_a_failure_outweighs_what_was_not_measured():
    paired = _without(_same(_paired()), "labels")
    worse = replace(paired, candidate_cc=paired.reference_cc - 0.1)
    assert compare(worse).verdict == "fail"
    assert compare(worse, untrained=["log_density"]).verdict == "inconclusive"


def test_a_class_of_few_patients_gives_no_interval():
    paired = _same(_paired(patients=300))
    labels = paired.labels.copy()
    who = np.array(paired.patients)
    labels[(labels == 2) & ~np.isin(who, np.unique(who[labels == 2])[:4])] = 0
    found = compare(replace(paired, labels=labels), classes=("a", "b", "rare"))
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
        return power.can_show(paired.patients, paired.labels, paired.has_gaze, **options)

    small = lines(_paired(patients=120))
    assert small[2] == "flips: with 120 patients even zero flips cannot exclude 2 %: 149 can"
    assert "120 patients, fewer than the 1500 recommended" in small[0]
    large = lines(_paired(patients=400))
    assert large[2] == "flips: up to 3 of 400 patients may flip and exclude 2 % still"
    assert "limit of 0" in lines(_paired(patients=30), limits=Limits(flips=0))[2]
    assert lines(_paired(), untrained=["logits", "log_density"]) == ()
    blind = _without(_without(_paired(), "gaze"), "labels")
    assert "no film has a label" in lines(blind)[0] and "no film has gaze" in lines(blind)[1]
    assert compare(_paired(patients=120), resamples=50).can_show == small


def test_a_comparison_goes_into_a_manifest_and_back(unlabelled):
    for paired in (unlabelled, _without(unlabelled, "gaze"), _without(unlabelled, "labels")):
        found = compare(paired, resamples=50)
        assert verdicts.Comparison.model_validate_json(found.model_dump_json()) == found
    broken = {"quantities": [], "nonsense": 1}
    with pytest.raises(ValidationError):
        verdicts.Comparison.model_validate({**found.model_dump(), **broken})


def test_a_pair_must_be_of_the_same_films():
    paired = _paired(patients=20)
    n = len(paired.patients)
    for change in (
        {"patients": paired.patients[1:]},
        {"labels": paired.labels[1:]},
        {"candidate_cc": paired.candidate_cc[1:]},
        {"candidate_logits": paired.candidate_logits[:, :2]},
        {"reference_logits": np.zeros(n), "candidate_logits": np.zeros(n)},
        {"labels": np.full(n, 3)},
        {"labels": np.full(n, -2)},
    ):
        with pytest.raises(ValueError, match="expected"):
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
        untrained = ["log_density"] if cc is None else []
        compared = compare(paired, untrained=untrained, resamples=resamples, seed=seed)
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
