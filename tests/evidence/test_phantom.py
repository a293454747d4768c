from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from cxrgaze.evidence import phantom
from cxrgaze.evidence.class_presets import PRESETS


def test_a_seed_gives_the_same_phantom_twice_and_another_seed_another():
    a, b, c = phantom.draw(5), phantom.draw(5), phantom.draw(6)
    assert np.array_equal(a.pixels, b.pixels) and np.array_equal(a.gaze.points, b.gaze.points)
    digests = {hashlib.sha256(p.pixels.tobytes()).hexdigest() for p in (a, c)}
    assert len(digests) == 2


def test_classes_shapes_and_readers():
    drawn = [phantom.draw(seed) for seed in range(150)]
    paper = PRESETS["paper"]
    assert set(Counter(p.label for p in drawn)) == {c.name for c in paper.classes}
    assert paper.kind == "exclusive" and phantom.CLASSES == paper.classes
    assert {p.pixels.shape for p in drawn} == set(phantom.SHAPES)
    for p in drawn[:20]:
        assert p.pixels.dtype == np.uint8 and p.pixels.std() > 20
        for reader in phantom.READERS:
            assert 35 <= len(p.gaze.select(reader=reader).points) <= 60


def test_the_lesion_is_looked_at_and_drawn():
    """Without lesion contrast the same seed gives the same film but for the lesion."""
    for seed in range(40):
        plain, bare = phantom.draw(seed), phantom.draw(seed, difficulty=1.0)
        assert plain.label == bare.label
        if plain.label == "normal":
            assert np.array_equal(plain.pixels, bare.pixels)
            continue
        lesion = np.abs(plain.pixels.astype(int) - bare.pixels.astype(int))
        assert lesion.max() > 10
        x, y = np.rint(plain.gaze.points).astype(int).T
        inside = (x >= 0) & (y >= 0) & (x < lesion.shape[1]) & (y < lesion.shape[0])
        assert lesion[y[inside], x[inside]].mean() > 1.5 * lesion.mean()


def test_size_and_difficulty_are_checked():
    assert phantom.draw(0, shape=(120, 90)).pixels.shape == (120, 90)
    with pytest.raises(ValueError, match="difficulty"):
        phantom.draw(0, difficulty=1.5)
