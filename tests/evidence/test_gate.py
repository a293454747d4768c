"""The gate's films, what a bundle stores for a device, and verdicts that must be what they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cxrgaze.bundles.bundle import REFERENCE, Bundle
from cxrgaze.bundles.verdicts import Gate, Limits
from cxrgaze.errors import DataError, IntegrityError
from cxrgaze.evidence import gate, metrics
from cxrgaze.evidence.arrays import load_arrays
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.evidence.phantom import write_phantom_set
from cxrgaze.runtime.ort import OnnxRuntime


@pytest.fixture(scope="module")
def bundle(bundles):
    return Bundle.open(bundles / "demo-fp16.cxrgaze")


@pytest.fixture(scope="module")
def films(bundle):
    return gate.phantom_set(bundle.manifest.spec, 400, 3_000_000)


@pytest.fixture(scope="module")
def reference(bundle, films):
    keys, stored = gate.read_reference(bundle)
    place = {key: index for index, key in enumerate(keys)}
    return stored.chosen([place[key] for key in films.keys])


def _judge(films, reference, candidate, **limits):
    return gate.judge(films, reference, candidate, Limits(**limits), "graph")


def _with(reference, logits=None, log_density=None):
    return gate.Predicted(
        reference.logits if logits is None else logits,
        reference.log_density if log_density is None else log_density,
    )


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
    assert np.array_equal(films.arrays.labels[:3], arrays.labels)
    assert len(set(films.keys)) == len(set(films.patients)) == 400


def test_the_bundle_stores_the_float32_outputs_of_every_film(bundle, bundles, films, reference):
    full = OnnxRuntime()
    full.activate(Bundle.open(bundles / "demo-fp32.cxrgaze"))
    found = gate.predicted(full.infer, films.arrays.images[:8])
    np.testing.assert_allclose(found.logits, reference.logits[:8], atol=1e-3)
    difference = found.log_density.astype(float) - reference.log_density[:8].astype(float)
    assert np.abs(difference).max() < 0.02


def test_identical_outputs_pass(films, reference):
    found = _judge(films, reference, reference)
    assert found.verdict == "pass" and found.agreement_cc_min == pytest.approx(1)
    assert found.level == "graph" and found.domain == "phantom" and "synthetic" in found.set_name


def test_swapped_classes_fail(films, reference):
    found = _judge(films, reference, _with(reference, logits=reference.logits[:, ::-1]))
    assert found.verdict == "fail"


def test_a_map_of_another_film_fails(films, reference):
    moved = np.roll(reference.log_density, 1, axis=0)
    assert _judge(films, reference, _with(reference, log_density=moved)).verdict == "fail"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(films, reference, value):
    logits = reference.logits.copy()
    logits[7, 1] = value
    assert _judge(films, reference, _with(reference, logits=logits)).verdict != "pass"
    maps = reference.log_density.copy()
    maps[7, 3, 3] = value
    found = _judge(films, reference, _with(reference, log_density=maps))
    assert found.agreement_cc_min == -1 and found.worst_film_sha256 == films.keys[7]


def test_a_set_too_small_says_nothing(films, reference):
    few = range(40)
    part, some = films.chosen(few), reference.chosen(few)
    found = _judge(part, some, some)
    assert found.verdict == "inconclusive" and found.reason


def test_the_cc_is_that_of_the_films_area(films, reference):
    found = _judge(films, reference, reference)
    by_hand = []
    for index, geometry in enumerate(films.arrays.geometries):
        predicted = geometry.crop(np.exp(reference.log_density[index].astype(float)))
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
        return outputs._replace(logits=outputs.logits[:, ::-1])

    assert gate.judge_engine(bundle, films, swapped).verdict == "fail"


def test_an_engine_is_judged_by_the_limits_of_its_graph(bundle, films, reference):
    strict = gate.judge(films, reference, reference, Limits(macro_auc=0.004, flips=0.5), "graph")
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
    data = gate.stored_reference(films, _with(reference, logits=reference.logits[:, :2]))
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
    monkeypatch.setattr(gate, "REFERENCE_LIMIT", reference.log_density[0].nbytes * 10)
    one, two = (gate.stored_reference(films, reference) for _ in range(2))
    assert one == two
    import io

    keys = np.load(io.BytesIO(one))["keys"]
    assert len(keys) == 10 and [k.decode() for k in keys] != list(films.keys[:10])


def test_calibration_and_gate_must_be_apart(films):
    gate.require_apart(films, ["somebody"], ["0" * 64])
    with pytest.raises(DataError, match="1 patients and 0 films") as caught:
        gate.require_apart(films, [films.patients[3], "somebody"], [])
    assert films.patients[3] not in str(caught.value)
    with pytest.raises(DataError, match="0 patients and 1 films"):
        gate.require_apart(films, [], [films.keys[0]])


def test_the_distance_of_an_output_is_that_of_its_films(films, reference):
    assert gate.distance(films, reference, reference, "logits") == 0
    assert gate.distance(films, reference, reference, "log_density") == pytest.approx(0, abs=1e-9)
    rng = np.random.default_rng(0)
    off = replace(
        reference, logits=reference.logits + rng.normal(0, 0.1, reference.logits.shape).astype("f4")
    )
    odds = [np.exp(p.logits.astype(float)) for p in (reference, off)]
    before, after = (o / o.sum(axis=1, keepdims=True) for o in odds)
    by_hand = np.abs(after - before).max(axis=1).mean()
    assert gate.distance(films, reference, off, "logits") == pytest.approx(by_hand)
    assert gate.distance(films, reference, off, "log_density") == pytest.approx(0, abs=1e-9)
    broken = replace(reference, logits=reference.logits * np.nan)
    assert gate.distance(films, reference, broken, "logits") == np.inf
