from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage

from cxrgaze.evidence import heatmaps


def test_density_sums_to_one_and_peaks_at_the_fixation():
    d = heatmaps.density(np.array([[12.0, 30.0]]), np.ones(1), np.full((1, 2), 3.0), (48, 40))
    assert d.dtype == np.float32 and d.shape == (48, 40)
    assert d.sum() == pytest.approx(1, abs=1e-5)
    assert np.unravel_index(d.argmax(), d.shape) == (30, 12)


def test_density_equals_a_blurred_count_map():
    """Against scipy: Gaussian blur of the count map with zero border, then normalised."""
    rng = np.random.default_rng(0)
    points = rng.integers((5, 5), (35, 43), (25, 2))
    counts = np.zeros((48, 40))
    for x, y in points:
        counts[y, x] += 1
    blurred = scipy.ndimage.gaussian_filter(counts, 2.5, mode="constant", truncate=12)
    d = heatmaps.density(points, np.ones(25), np.full((25, 2), 2.5), (48, 40))
    assert np.abs(d - blurred / blurred.sum()).max() < 1e-7


def test_duration_and_sigma_of_each_fixation_count():
    points = np.array([[10.0, 10.0], [30.0, 10.0]])
    d = heatmaps.density(points, np.array([1.0, 3.0]), np.array([[2.0, 2.0], [2.0, 2.0]]), (20, 40))
    assert d[:, :20].sum() == pytest.approx(0.25, abs=1e-4)
    wide = heatmaps.density(points[:1], np.ones(1), np.array([[4.0, 1.0]]), (20, 40))
    assert wide[10, 14] > wide[14, 10]  # sigma is (x, y)


def test_points_outside_reach_in_but_do_not_count_alone():
    d = heatmaps.density(np.array([[-2.0, 5.0]]), np.ones(1), np.full((1, 2), 2.0), (10, 10))
    assert d[5, 0] == d.max()
    with pytest.raises(ValueError, match="no fixation has weight"):
        heatmaps.density(np.array([[-9000.0, 5.0]]), np.ones(1), np.full((1, 2), 2.0), (10, 10))


@pytest.mark.parametrize("bad", [np.zeros((0, 2)), np.array([[np.nan, 1.0]])])
def test_missing_or_nan_fixations_are_refused(bad):
    with pytest.raises(ValueError, match="finite fixations"):
        heatmaps.density(bad, np.ones(len(bad)), np.ones((len(bad), 2)), (10, 10))


def test_centre_prior_is_the_mean():
    a, b = np.zeros((2, 2)), np.zeros((2, 2))
    a[0, 0] = b[1, 1] = 1
    assert np.allclose(heatmaps.centre_prior([a, b, b]), [[1 / 3, 0], [0, 2 / 3]])


def test_presets_say_where_they_come_from():
    assert heatmaps.PRESETS["paper"].sigma_px == 75.5
    assert heatmaps.PRESETS["egd-authors"].sigma_px == 150
    assert heatmaps.PRESETS["reflacx"].weight == "duration"
    assert all(preset.source for preset in heatmaps.PRESETS.values())
