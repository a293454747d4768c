"""The gate's films, what a bundle stores for a device, and verdicts that must be what they are."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from cxrgaze.bundles import npz
from cxrgaze.bundles.bundle import REFERENCE, Bundle
from cxrgaze.bundles.served import Decision, Served
from cxrgaze.bundles.verdicts import Gate, Limits
from cxrgaze.errors import DataError, IntegrityError
from cxrgaze.evidence import gate, metrics, phantom
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.evidence.phantom import write_phantom_set
from cxrgaze.evidence.truth import UNKNOWN
from cxrgaze.runtime.ort import OnnxRuntime

FILMS = 600
OF_DIAGNOSES = [
    "macro AUC",
    "flips",
    *(f"{kind} of {name}" for kind in ("sensitivity", "specificity") for name in phantom.LABELS),
    "Brier",
]


@pytest.fixture(scope="module")
def bundle(bundles):
    return Bundle.open(bundles / "demo-fp16.cxrgaze")


@pytest.fixture(scope="module")
def films(bundle):
    """As many as it takes where nothing is lost."""
    return gate.phantom_set(bundle.manifest.spec, FILMS, 3_000_000)


@pytest.fixture(scope="module")
def reference(bundle, films):
    keys, stored = gate.read_reference(bundle)
    place = {key: index for index, key in enumerate(keys)}
    return gate.some_of(stored, [place[key] for key in films.keys])


@pytest.fixture(scope="module")
def served(bundle):
    assert bundle.manifest.served.heads == ("logits", "log_density")
    return bundle.manifest.served


@pytest.fixture(scope="module")
def judged(films, served):
    """The verdict on a candidate, by what the bundle serves unless said otherwise."""

    def judge(reference, candidate, of=films, by=served, decision=None, **limits):
        return gate.judge(of, reference, candidate, Limits(**limits), "graph", by, decision)

    return judge


def _with(reference, **heads):
    return {**reference, **heads}


def test_phantoms_are_the_same_wherever_they_are_drawn(bundle, films, tmp_path):
    """Against the labelled set that writes the same seeds as PNG."""
    spec = bundle.manifest.spec
    written = write_phantom_set(
        tmp_path / "set", {"test": 3}, difficulty=0.57, first_seed=3_000_000
    )
    arrays = load_arrays(written, spec, PRESETS["phantom"])
    assert np.array_equal(films.arrays.images[:3], arrays.images)
    # Coordinates in a labelled set have three decimals.
    np.testing.assert_allclose(films.arrays.densities[:3], arrays.densities, rtol=1e-2, atol=1e-8)
    assert np.array_equal(films.arrays.truth[:3], arrays.truth)
    assert len(set(films.keys)) == len(set(films.patients)) == FILMS


def test_the_bundle_stores_the_float32_outputs_of_every_film(bundle, bundles, films, reference):
    full = OnnxRuntime()
    full.activate(Bundle.open(bundles / "demo-fp32.cxrgaze"))
    found = gate.predicted(full.infer, films.arrays.images[:8])
    assert list(found) == list(reference) == ["logits", "log_density"]
    np.testing.assert_allclose(found["logits"], reference["logits"][:8], atol=1e-3)
    assert found["log_density"].dtype == reference["log_density"].dtype == np.float16
    assert found["log_density"].shape == reference["log_density"][:8].shape
    difference = found["log_density"].astype(float) - reference["log_density"][:8].astype(float)
    assert np.abs(difference).max() < 0.02


def test_identical_outputs_pass(judged, reference):
    found = judged(reference, reference)
    assert found.verdict == "pass" and found.agreement_cc_min == pytest.approx(1)
    assert found.level == "graph" and found.domain == "phantom" and "synthetic" in found.set_name


def test_swapped_classes_fail(judged, reference):
    found = judged(reference, _with(reference, logits=reference["logits"][:, ::-1]))
    assert found.verdict == "fail"


def _halved(decision):
    """What halved logits are served with to say the same."""
    return decision.model_copy(update={"temperature": decision.temperature / 2})


def test_each_network_is_served_with_its_own_decision(judged, reference, served):
    """Halved logits say the same at half the temperature alone."""
    halves = _with(reference, logits=reference["logits"] / 2)
    own = _halved(served.decision)
    refitted = judged(reference, halves, decision=own)
    assert refitted.verdict == "pass" and refitted.comparison.flipped_films == 0
    for found in (judged(reference, halves), judged(reference, reference, decision=own)):
        assert found.verdict != "pass" and found.comparison.flipped_films > 0
    assert judged(halves, reference, by=replace(served, decision=own)).verdict != "pass"
    other = judged(halves, reference, by=replace(served, decision=own), decision=served.decision)
    assert other.verdict == "pass"


def test_what_is_served_is_what_is_compared(films, judged, reference, served):
    """Labels, flags and probabilities by hand, of a candidate with some noise."""
    noise = np.random.default_rng(3).normal(0, 0.4, reference["logits"].shape)
    other = _with(reference, logits=(reference["logits"] + noise).astype("f4"))
    names = served.spec.class_names
    own = served.decision.model_copy(
        update={"temperature": 1.7, "operating_points": {names[0]: 0.4, names[2]: 0.3}}
    )
    decisions = []
    shares = []
    for logits, decision in ((reference["logits"], served.decision), (other["logits"], own)):
        odds = np.exp(logits.astype(float) / decision.temperature)
        p = odds / odds.sum(axis=1, keepdims=True)
        label = p.argmax(axis=1)
        flags = np.stack(
            [
                p[:, c] >= decision.operating_points[n]
                if n in decision.operating_points
                else label == c
                for c, n in enumerate(names)
            ],
            axis=1,
        )
        shares.append(p)
        decisions.append((label, flags))
    (label, flags), (new_label, new_flags) = decisions
    found = judged(reference, other, decision=own).comparison
    changed = (label != new_label) | (flags != new_flags).any(axis=1)
    assert found.flipped_films == changed.sum() > (label != new_label).sum() > 0
    truth = films.arrays.truth
    for c, name in enumerate(names):
        by_name = {q.name: q for q in found.quantities}
        quantity = by_name[f"sensitivity of {name}"]
        assert quantity.reference == pytest.approx(flags[truth[:, c] == 1, c].mean())
        assert quantity.candidate == pytest.approx(new_flags[truth[:, c] == 1, c].mean())
        quantity = by_name[f"specificity of {name}"]
        assert quantity.reference == pytest.approx(1 - flags[truth[:, c] == 0, c].mean())
        assert quantity.candidate == pytest.approx(1 - new_flags[truth[:, c] == 0, c].mean())
        change = next(d for d in found.decisions if d.name == name)
        assert change.raised == (new_flags & ~flags)[:, c].sum()
        assert change.dropped == (flags & ~new_flags)[:, c].sum()
    brier = found.quantities[-1]
    expected = [((p - truth) ** 2).sum(axis=1).mean() for p in shares]
    assert [brier.reference, brier.candidate] == pytest.approx(expected)


def test_a_map_of_another_film_fails(judged, reference):
    moved = np.roll(reference["log_density"], 1, axis=0)
    assert judged(reference, _with(reference, log_density=moved)).verdict == "fail"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(films, judged, reference, value):
    logits = reference["logits"].copy()
    logits[7, 1] = value
    assert judged(reference, _with(reference, logits=logits)).verdict != "pass"
    maps = reference["log_density"].copy()
    maps[7, 3, 3] = value
    found = judged(reference, _with(reference, log_density=maps))
    assert found.agreement_cc_min == -1 and found.worst_film_sha256 == films.keys[7]


def test_a_set_too_small_says_nothing(films, judged, reference):
    few = range(40)
    some = gate.some_of(reference, few)
    found = judged(some, some, of=films.chosen(few))
    assert found.verdict == "inconclusive" and found.reason


def test_the_cc_is_that_of_the_films_area(films, judged, reference):
    found = judged(reference, reference)
    by_hand = []
    for index, geometry in enumerate(films.arrays.geometries):
        predicted = geometry.crop(np.exp(reference["log_density"][index].astype(float)))
        by_hand.append(metrics.cc(predicted, geometry.crop(films.arrays.densities[index, 0])))
    text = " ".join(str(cell) for row in found.comparison.rows() for cell in row)
    assert f"{np.mean(by_hand):.4f}" in text


def test_an_engine_is_judged_against_what_the_bundle_stores(bundle, films):
    backend = OnnxRuntime()
    backend.activate(bundle)
    found = gate.judge_engine(bundle, films, backend.infer)
    assert found.level == "engine" and found.verdict == "pass"

    def swapped(image):
        outputs = backend.infer(image)
        return {**outputs, "logits": outputs["logits"][:, ::-1]}

    assert gate.judge_engine(bundle, films, swapped).verdict == "fail"


@pytest.mark.long
def test_an_engine_is_judged_with_the_two_decisions_of_its_bundle(bundle, films):
    """An engine whose logits are halved passes by a decision of its own alone."""
    backend = OnnxRuntime()
    backend.activate(bundle)

    def halved(image):
        outputs = backend.infer(image)
        return {**outputs, "logits": outputs["logits"] / 2}

    def judged(infer, **decisions):
        manifest = bundle.manifest.model_copy(update=decisions)
        return gate.judge_engine(Bundle(bundle.path, manifest, bundle.sha256), films, infer)

    manifest = bundle.manifest
    assert judged(halved).verdict == "fail"
    own = judged(halved, decision=_halved(manifest.decision))
    assert own.verdict == "pass"
    assert own.comparison == judged(backend.infer).comparison
    other = judged(halved, reference_decision=_halved(manifest.reference_decision))
    assert other.verdict == "fail"
    assert judged(backend.infer, decision=_halved(manifest.decision)).verdict == "fail"


def test_an_engine_is_judged_by_the_limits_of_its_graph(bundle, films, judged, reference):
    strict = judged(reference, reference, macro_auc=0.004, flips=0.5)
    assert strict.comparison.limits == Limits(macro_auc=0.004, flips=0.5)
    manifest = bundle.manifest.model_copy(update={"gate": strict})
    backend = OnnxRuntime()
    backend.activate(bundle)
    found = gate.judge_engine(Bundle(bundle.path, manifest, bundle.sha256), films, backend.infer)
    assert found.comparison.limits == Limits(macro_auc=0.004, flips=0.5)
    manifest = bundle.manifest.model_copy(update={"gate": Gate(verdict="not_gated", reason="")})
    found = gate.judge_engine(Bundle(bundle.path, manifest, bundle.sha256), films, backend.infer)
    assert found.comparison.limits == Limits()


def test_films_without_a_reference_are_left_out_and_none_at_all_is_an_error(bundle, films):
    backend = OnnxRuntime()
    backend.activate(bundle)
    others = gate.phantom_set(bundle.manifest.spec, 3, 5_000_000)
    with pytest.raises(DataError, match="none of the 3 films"):
        gate.judge_engine(bundle, others, backend.infer)


def test_a_bundle_without_a_reference_says_what_to_do(bundles, films):
    plain = Bundle.open(bundles / "demo-fp32.cxrgaze")
    with pytest.raises(DataError, match="export again with --gate"):
        gate.read_reference(plain)


def test_a_reference_of_another_network_is_refused(bundle, films, reference, monkeypatch):
    data = gate.stored_reference(films, _with(reference, logits=reference["logits"][:, :2]))
    read = Bundle.read
    monkeypatch.setattr(
        Bundle, "read", lambda self, name: data if name == REFERENCE else read(self, name)
    )
    with pytest.raises(
        IntegrityError, match=r"logits is float32 \(\d+, 2\), expected float32 \(\d+, 3\)"
    ):
        gate.read_reference(bundle)
    data = b"PK garbage"
    with pytest.raises(IntegrityError, match="malformed"):
        gate.read_reference(bundle)


def test_a_large_reference_is_cut_by_seed(films, reference, monkeypatch):
    monkeypatch.setattr(gate, "REFERENCE_LIMIT", reference["log_density"][0].nbytes * 10)
    one, two = (gate.stored_reference(films, reference) for _ in range(2))
    assert one == two
    found = np.load(io.BytesIO(one))
    keys = [key.decode() for key in found["keys"]]
    assert sorted(keys) == sorted(films.keys) and keys[:10] != list(films.keys[:10])
    assert len(found["log_density"]) == 10
    place = [films.keys.index(key) for key in keys]
    assert np.array_equal(found["logits"], reference["logits"][place])
    assert np.array_equal(found["log_density"], reference["log_density"][place[:10]])


def test_an_engine_is_judged_on_all_logits_and_on_the_maps_that_there_are(
    bundle, films, reference, judged, monkeypatch
):
    """The verdict on decisions of every film, that on maps of those whose maps are stored."""
    backend = OnnxRuntime()
    backend.activate(bundle)
    monkeypatch.setattr(gate, "REFERENCE_LIMIT", reference["log_density"][0].nbytes * 40)
    data = gate.stored_reference(films, reference)
    read = Bundle.read
    monkeypatch.setattr(
        Bundle, "read", lambda self, name: data if name == REFERENCE else read(self, name)
    )
    found = gate.judge_engine(bundle, films, backend.infer)
    few = np.sort(np.random.default_rng(0).permutation(len(films.keys))[:40])
    some = gate.some_of(reference, few)
    by = bundle.manifest.reference_served
    all_of = judged(reference, reference, by=by)
    maps = judged(some, some, of=films.chosen(few), by=by)

    def quantities(of, head):
        return {q.name: q.reference for q in of.comparison.quantities if q.head == head}

    assert quantities(found, "logits") == pytest.approx(quantities(all_of, "logits"), abs=1e-4)
    assert quantities(found, "log_density") == pytest.approx(
        quantities(maps, "log_density"), abs=1e-4
    )
    assert found.comparison.patients == len(films.keys)

    def mirrored(image):
        outputs = backend.infer(image)
        return {**outputs, "log_density": outputs["log_density"][..., ::-1]}

    assert gate.judge_engine(bundle, films, mirrored).verdict == "fail"


def test_calibration_and_gate_must_be_apart(films):
    gate.require_apart(films, ["somebody"], ["0" * 64])
    with pytest.raises(DataError, match="1 patients and 0 films") as caught:
        gate.require_apart(films, [films.patients[3], "somebody"], [])
    assert films.patients[3] not in str(caught.value)
    with pytest.raises(DataError, match="0 patients and 1 films"):
        gate.require_apart(films, [], [films.keys[0]])


def test_the_distance_of_an_output_is_that_of_its_films(films, reference, served):
    def off(candidate, head):
        return gate.distance(films, reference, candidate, head, served)

    assert off(reference, "logits") == 0
    assert off(reference, "log_density") == pytest.approx(0, abs=1e-9)
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, reference["logits"].shape).astype("f4")
    other = _with(reference, logits=reference["logits"] + noise)
    odds = [np.exp(p["logits"].astype(float)) for p in (reference, other)]
    before, after = (o / o.sum(axis=1, keepdims=True) for o in odds)
    by_hand = np.abs(after - before).max(axis=1).mean()
    assert off(other, "logits") == pytest.approx(by_hand)
    assert off(other, "log_density") == pytest.approx(0, abs=1e-9)
    assert off(_with(reference, logits=reference["logits"] * np.nan), "logits") == np.inf


# What is served of a network


def test_a_head_that_nothing_taught_is_not_judged(films, judged, reference, served):
    """However far it is off; its figures are None."""
    blind = Served(served.spec, served.decision, untrained=("log_density",))
    moved = np.roll(reference["log_density"], 1, axis=0)
    found = judged(reference, _with(reference, log_density=moved * np.nan), by=blind)
    assert found.verdict == "pass"
    assert [q.name for q in found.comparison.quantities] == OF_DIAGNOSES
    assert found.agreement_cc_min is found.agreement_cc_mean is found.agreement_loss is None
    assert found.worst_film_sha256 is None and found.probability_change is not None
    mute = Served(served.spec, untrained=("logits",))
    swapped = _with(reference, logits=reference["logits"][:, ::-1])
    found = judged(reference, swapped, by=mute)
    assert found.verdict == "pass" and [q.name for q in found.comparison.quantities] == ["CC"]
    assert found.probability_change is None and found.comparison.classes == ()
    assert found.worst_film_sha256 in films.keys and found.agreement_cc_min > 0.999
    nothing = Served(served.spec, untrained=("logits", "log_density"))
    assert judged(reference, reference, by=nothing).verdict == "inconclusive"


def test_a_class_that_nothing_taught_is_not_judged(films, judged, reference, served):
    """Probabilities are shared by the others."""
    two = Served(served.spec, served.decision, untaught=("pneumonia",))
    column = served.spec.class_names.index("pneumonia")
    logits = reference["logits"].copy()
    logits[:, column] = -logits[:, column] + 3
    other = _with(reference, logits=logits)
    found = judged(reference, other, by=two)
    assert judged(reference, other).verdict == "fail"
    assert found.verdict == "pass" and found.comparison.flipped_films == 0
    kept = [name for name in phantom.LABELS if name != "pneumonia"]
    by_class = [f"{kind} of {name}" for kind in ("sensitivity", "specificity") for name in kept]
    names = ["macro AUC", "CC", "flips", *by_class, "Brier"]
    assert [q.name for q in found.comparison.quantities] == names
    assert [q.difference for q in found.comparison.quantities] == [0] * 8
    assert [d.name for d in found.comparison.decisions] == kept
    assert gate.distance(films, reference, other, "logits", two) == 0
    kept = [c for c in range(3) if c != column]
    assert [c.name for c in found.comparison.classes] == [served.spec.class_names[c] for c in kept]
    odds = np.exp(reference["logits"][:, kept].astype(float))
    shares = odds / odds.sum(axis=1, keepdims=True)
    for place, c in enumerate(kept):  # films of the class that is left out count as without
        expected = roc_auc_score(films.arrays.truth[:, c], shares[:, place])
        assert found.comparison.classes[place].reference == pytest.approx(expected)


@pytest.fixture
def findings(served):
    """The same columns as findings, two of which decide."""
    spec = served.spec.model_copy(update={"class_kind": "findings"})
    points = {"normal": 0.4, "pneumonia": 0.7}
    return Served(spec, Decision(temperatures={"normal": 2.0}, operating_points=points))


def test_findings_flip_by_their_temperatures_and_points(films, judged, reference, findings):
    noise = np.random.default_rng(1).normal(0, 0.6, reference["logits"].shape).astype("f4")
    other = _with(reference, logits=reference["logits"] + noise)
    found = judged(reference, other, by=findings)
    shares = [1 / (1 + np.exp(-p["logits"].astype(float) / (2, 1, 1))) for p in (reference, other)]
    before, after = (share[:, [0, 2]] >= (0.4, 0.7) for share in shares)
    flips = (before[:, 0] != after[:, 0]) | (before[:, 1] != after[:, 1])
    assert found.comparison.flipped_films == flips.sum() > 0
    for c, change in enumerate(found.comparison.classes):  # each against its own truth
        expected = roc_auc_score(films.arrays.truth[:, c], other["logits"][:, c])
        assert change.candidate == pytest.approx(expected)
    at_one = [1 / (1 + np.exp(-p["logits"].astype(float))) for p in (reference, other)]
    by_hand = np.abs(at_one[1] - at_one[0]).max(axis=1).mean()
    assert gate.distance(films, reference, other, "logits", findings) == pytest.approx(by_hand)


def test_findings_that_are_not_known_are_judged_by_those_that_are(
    films, judged, reference, findings
):
    same = judged(reference, reference, by=findings)
    missing = {q.name for q in same.comparison.quantities if q.verdict != "pass"}
    assert missing == {"sensitivity of heart_failure", "specificity of heart_failure"}
    assert same.verdict == "inconclusive" and "has no operating point" in same.reason
    decision = findings.decision
    points = {**decision.operating_points, "heart_failure": 0.5}
    decided = replace(findings, decision=decision.model_copy(update={"operating_points": points}))
    assert judged(reference, reference, by=decided).verdict == "pass"
    truth = films.arrays.truth.copy()
    truth[: len(truth) // 2, 0] = UNKNOWN
    part = replace(films, arrays=replace(films.arrays, truth=truth))
    assert part.identity != films.identity
    found = judged(reference, reference, of=part, by=findings).comparison.classes[0]
    known = truth[:, 0] != UNKNOWN
    expected = roc_auc_score(truth[known, 0], reference["logits"][known, 0])
    assert found.reference == pytest.approx(expected) and found.films == truth[known, 0].sum()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_finding_that_is_not_finite_never_passes(judged, reference, findings, value):
    logits = reference["logits"].copy()
    logits[7, 1] = value
    assert judged(reference, _with(reference, logits=logits), by=findings).verdict == "fail"


@pytest.mark.parametrize("head", ["logits", "log_density"])
def test_one_head_alone_is_stored_and_read(bundle, films, reference, monkeypatch, head):
    spec = bundle.manifest.spec
    classes = spec.classes if head == "logits" else ()
    manifest = bundle.manifest.model_copy(
        update={"spec": spec.model_copy(update={"heads": (head,), "classes": classes})}
    )
    data = gate.stored_reference(films, {head: reference[head]})
    monkeypatch.setattr(Bundle, "read", lambda self, name: data)
    keys, found = gate.read_reference(Bundle(bundle.path, manifest, bundle.sha256))
    assert list(found) == [head] and set(keys) <= set(films.keys)
    place = [films.keys.index(key) for key in keys]
    assert np.array_equal(found[head], reference[head][place])


def test_logits_alone_are_stored_of_every_film(films, reference, monkeypatch):
    """Maps take the room, logits do not."""
    monkeypatch.setattr(gate, "REFERENCE_LIMIT", 10)
    data = gate.stored_reference(films, {"logits": reference["logits"]})
    shapes = {"keys": (np.dtype("S64"), (None,)), "logits": (np.dtype(np.float32), (None, 3))}
    assert len(npz.read(data, shapes, "here")["keys"]) == len(films.keys)


def test_phantoms_say_of_a_network_what_its_classes_let_them(bundle):
    spec = bundle.manifest.spec
    findings = spec.model_copy(update={"class_kind": "findings", "classes": spec.classes[:1]})
    whole, one = (gate.phantom_set(each, 6, 3_000_000).arrays for each in (spec, findings))
    assert np.array_equal(one.truth, whole.truth[:, :1])
    blind = spec.model_copy(update={"heads": ("logits",)})
    assert not gate.phantom_set(blind, 6, 3_000_000).arrays.has_gaze.any()
    maps = spec.model_copy(update={"heads": ("log_density",), "classes": ()})
    alone = gate.phantom_set(maps, 6, 3_000_000).arrays
    assert alone.truth.shape == (6, 0) and np.array_equal(alone.densities, whole.densities)


def test_the_centre_prior_leaves_the_film_itself_out(films):
    few = films.chosen(range(12))
    maps = few.arrays.densities[:, 0].astype(float)
    found = []
    for i, geometry in enumerate(few.arrays.geometries):
        prior = np.mean(np.delete(maps, i, axis=0), axis=0)
        crop = geometry.crop
        found.append(np.corrcoef(crop(prior).ravel(), crop(maps[i]).ravel())[0, 1])
    assert few.centre_prior_cc == pytest.approx(np.mean(found), abs=1e-6)
    assert films.chosen([0]).centre_prior_cc is None, "no other film"
    blind = replace(few, arrays=replace(few.arrays, densities=few.arrays.densities * 0))
    assert blind.centre_prior_cc is None


def test_a_bundles_gate_shows_the_centre_prior_beside_the_cc(bundle):
    shown = f"{bundle.manifest.gate.centre_prior_cc:.4f}"
    assert 0.4 < float(shown) < 0.8
    page = bundle.read("report/parity.md").decode()
    assert f"CC of the centre prior on these films: {shown}" in page
