"""Ranges of activations against plain numpy over the kept activations."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrgaze.bundles.bundle import GRAPH, Bundle
from cxrgaze.export import ranges
from cxrgaze.export.ranges import _BINS, Tally, collect


def _tally(*arrays):
    tally = Tally(np.zeros(_BINS, np.int64))
    for array in arrays:
        tally.add(np.asarray(array, np.float32))
    return tally


@pytest.fixture(scope="module")
def model(bundles):
    return onnx.load_from_string(Bundle.open(bundles / "demo-fp32.cxrgaze").read(GRAPH))


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(1).random((3, 1, 64, 64), dtype=np.float32))


def test_what_is_collected_is_what_numpy_finds(model, images):
    names = ["image", "/dense/conv0/Conv_output_0", "/skips.1/Mul_output_0", "log_density"]
    found = collect(model, names, images)
    watched = onnx.ModelProto.FromString(model.SerializeToString())
    for name in names[1:3]:
        watched.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    session = onnxruntime.InferenceSession(watched.SerializeToString())
    kept = [session.run(names[1:], {"image": image[None]}) for image in images]
    for index, name in enumerate(names):
        values = np.concatenate(
            [
                (image if not index else k[index - 1]).ravel()
                for image, k in zip(images, kept, strict=True)
            ]
        )
        assert found[name].low == values.min() and found[name].high == values.max()
        assert found[name].counts.sum() == values.size


def test_a_small_budget_changes_nothing(model, images, monkeypatch):
    names = [name for name in ranges._sizes(model) if name.startswith("/decoder.4")]
    whole = collect(model, names, images[:1])
    monkeypatch.setattr(ranges, "BUDGET", 100_000)
    assert len(list(ranges._groups(names, ranges._sizes(model)))) > 3
    parts = collect(model, names, images[:1])
    assert all(np.array_equal(whole[n].counts, parts[n].counts) for n in names)


def test_a_name_that_is_no_tensor_is_an_error(model, images):
    with pytest.raises(KeyError, match="no float32 tensors"):
        collect(model, ["nowhere"], images)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.floats(90, 99.99), st.sampled_from(["normal", "relu", "negative"])
)
def test_a_percentile_is_numpys_to_the_width_of_a_bin(seed, percentile, shape):
    values = np.random.default_rng(seed).normal(0, 3, 5000).astype(np.float32)
    values = {"normal": values, "relu": np.maximum(values, 0), "negative": -np.abs(values)}[shape]
    low, high = _tally(values).range("percentile", percentile)
    share = (100 - percentile) / (2 if shape == "normal" else 1)
    if shape != "negative":
        exact = np.quantile(values, 1 - share / 100, method="inverted_cdf")
        assert exact * 0.999 <= high <= min(exact * (1 + 1 / 64) + 1e-6, values.max())
    if shape != "relu":
        exact = np.quantile(values, share / 100, method="inverted_cdf")
        assert max(exact * (1 + 2 / 64), values.min()) - 1e-6 <= low <= exact * 0.97 + 1e-6


def test_minmax_is_the_extremes():
    tally = _tally([[-3.5, 0.25]], [[7.0, 0.0]])
    assert tally.range("minmax", 50) == (-3.5, 7.0) and tally.largest == 7.0


def test_nan_and_infinity_are_seen():
    assert _tally([1.0]).finite
    assert not _tally([1.0], [np.nan]).finite and not _tally([np.inf]).finite


def test_the_share_of_subnormals_is_numpys():
    rng = np.random.default_rng(3)
    values = (10 ** rng.uniform(-8, 2, 20000)).astype(np.float32)
    values[:1000] = 0
    some = values[values > 0]
    exact = (some < np.finfo(np.float16).tiny).mean()
    assert _tally(values).subnormal_share == pytest.approx(exact, abs=0.01)
    assert _tally(values).nonzero == some.size and _tally([0.0, 0.0]).subnormal_share == 0


def test_magnitudes_are_numpys_powers_of_two():
    rng = np.random.default_rng(4)
    values = (rng.normal(size=5000) * 10 ** rng.uniform(-6, 4, 5000)).astype(np.float32)
    values[:100] = 0
    exponents = np.frexp(values[values != 0])[1] - 1  # |value| = 1.x * 2**exponent
    expected = np.bincount(exponents + 127, minlength=256)
    assert np.array_equal(_tally(values[:2000], values[2000:]).magnitudes, expected)


def test_one_session_gives_no_more_than_its_group(model, images, monkeypatch):
    """ONNX Runtime keeps every output of a graph until a run ends: 14 GB for `paper` at once."""
    monkeypatch.setattr(ranges, "BUDGET", 100_000)
    given = []
    real = ranges.open_session

    def watched(graph, **options):
        given.append(len(onnx.load_from_string(graph).graph.output))
        return real(graph, **options)

    monkeypatch.setattr(ranges, "open_session", watched)
    sizes = ranges._sizes(model)
    names = [name for name in sizes if name.startswith("/decoder.4")]
    collect(model, names, images[:1])
    assert given == [len(group) for group in ranges._groups(names, sizes)] and len(given) > 3
