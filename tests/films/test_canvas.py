from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrgaze.errors import FilmError
from cxrgaze.films.canvas import Geometry, to_canvas
from cxrgaze.films.film import Film, film_from_array
from cxrgaze.train.model import spec_of

SPEC = spec_of("tiny", model_version="t", pixel_source="image-8bit", domain="phantom")
SIDES = st.integers(32, 4000)


def _canvas(pixels, spec):
    return to_canvas(Film(pixels, "film", "", "array"), spec)


@given(SIDES, SIDES, st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_a_point_to_the_canvas_and_back_moves_less_than_half_a_pixel(height, width, u, v):
    geometry = Geometry.fit((height, width), (640, 512))
    point = np.array([[u * (width - 1), v * (height - 1)]])
    on_canvas = geometry.to_canvas(point)
    assert np.abs(geometry.to_film(on_canvas) - point).max() < 0.5
    x, y = on_canvas[0] - (geometry.left, geometry.top)
    assert -0.5 <= x <= geometry.width - 0.5 and -0.5 <= y <= geometry.height - 0.5


@given(SIDES, SIDES)
@settings(max_examples=200, deadline=None)
def test_the_film_is_as_large_as_it_can_be_centred_and_undistorted(height, width):
    g = Geometry.fit((height, width), (640, 512))
    assert g.height == 640 or g.width == 512
    assert abs(g.top - (640 - g.height) / 2) <= 0.5 and abs(g.left - (512 - g.width) / 2) <= 0.5
    exact = min(640 / height, 512 / width)
    assert abs(g.height - max(height * exact, 1)) <= 0.5
    assert abs(g.width - max(width * exact, 1)) <= 0.5


RULES = ("pad", "stretch", "crop")


@pytest.mark.parametrize("rule", RULES)
@given(SIDES, SIDES, st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_by_every_rule_a_point_comes_back(rule, height, width, u, v):
    geometry = Geometry.fit((height, width), (640, 512), rule)
    point = np.array([[u * (width - 1), v * (height - 1)]])
    assert np.abs(geometry.to_film(geometry.to_canvas(point)) - point).max() < 1e-6


@given(SIDES, SIDES)
@settings(max_examples=100, deadline=None)
def test_cropping_fills_the_canvas_with_the_largest_centred_window(height, width):
    g = Geometry.fit((height, width), (640, 512), "crop")
    assert (g.height, g.width) == (640, 512) and (g.top, g.left) == (0, 0)
    shown = g.window
    assert shown[0] == height or shown[1] == width
    assert abs(shown[0] / 640 - shown[1] / 512) <= 1 / 512  # the aspect, but for a pixel
    assert abs(g.film_top - (height - shown[0]) / 2) <= 0.5
    assert abs(g.film_left - (width - shown[1]) / 2) <= 0.5


@pytest.mark.parametrize(
    ("rule", "shape", "slow"),
    [
        ("stretch", (128, 256), lambda p: p.reshape(64, 2, 64, 4).mean(axis=(1, 3))),
        ("crop", (128, 256), lambda p: p[:, 64:192].reshape(64, 2, 64, 2).mean(axis=(1, 3))),
        ("crop", (256, 128), lambda p: p[64:192].reshape(64, 2, 64, 2).mean(axis=(1, 3))),
    ],
)
def test_the_other_rules_equal_a_slow_block_mean(rule, shape, slow):
    pixels = np.random.default_rng(0).random(shape, dtype=np.float32)
    canvas, geometry = _canvas(pixels, SPEC.model_copy(update={"canvas": rule}))
    assert np.abs(canvas - slow(pixels)).max() < 1e-6
    dot = np.zeros(shape, np.float32)
    dot[100:104, 100:104] = 1
    canvas, geometry = _canvas(dot, SPEC.model_copy(update={"canvas": rule}))
    x, y = geometry.to_canvas(np.array([[101.5, 101.5]]))[0]
    row, column = np.unravel_index(canvas.argmax(), canvas.shape)
    assert abs(column - x) <= 1 and abs(row - y) <= 1


@pytest.mark.parametrize("shape", [(256, 256), (256, 128), (128, 256)])
def test_area_resize_equals_a_slow_block_mean_and_the_pad_is_zero(shape):
    pixels = np.random.default_rng(0).random(shape, dtype=np.float32)
    canvas, geometry = _canvas(pixels, SPEC)
    assert canvas.shape == (64, 64) and canvas.dtype == np.float32
    block = 4
    slow = pixels.reshape(shape[0] // block, block, shape[1] // block, block).mean(axis=(1, 3))
    assert np.abs(geometry.crop(canvas) - slow).max() < 1e-6
    outside = canvas.copy()
    geometry.crop(outside)[:] = 0
    assert not outside.any()


def test_a_bright_dot_lands_where_the_geometry_says():
    pixels = np.zeros((300, 500), dtype=np.float32)
    pixels[200:205, 400:405] = 1
    canvas, geometry = _canvas(pixels, SPEC)
    row, column = np.unravel_index(canvas.argmax(), canvas.shape)
    x, y = geometry.to_canvas(np.array([[402.0, 202.0]]))[0]
    assert abs(column - x) <= 0.6 and abs(row - y) <= 0.6


CANVASES = [(64, 64), (128, 128), (320, 256), (640, 512)]


def test_no_film_size_leaves_zero_to_one():
    """OpenCV's area mean of ones is up to 1.0000011 at most real sizes (opencv#24238)."""
    rng = np.random.default_rng(0)
    overflows = 0
    for number in range(300):
        height, width = rng.integers(64, 2400, 2).tolist()
        white = 255 if number % 2 else 65535
        pixels = np.ones((height, width), np.float32)
        pixels[: height // 3] = np.float32(rng.integers(0, white)) / np.float32(white)
        pixels[-height // 4 :, : width // 2] = 0
        canvas_height, canvas_width = CANVASES[number % 4]
        spec = SPEC.model_copy(update={"height": canvas_height, "width": canvas_width})
        canvas, geometry = _canvas(pixels, spec)
        assert canvas.min() >= 0 and canvas.max() <= 1
        size = (geometry.width, geometry.height)
        plain = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        overflows += bool(plain.max() > 1)
        assert np.abs(geometry.crop(canvas) - plain).max() < 1e-5
    assert overflows > 50


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("canvas", CANVASES)
def test_saturated_films_of_a_real_size_stay_in_range_on_every_canvas(depth, canvas):
    pixels = np.full((2828, 2320), np.iinfo(depth).max, depth)
    pixels[:900] = np.arange(2320, dtype=depth) % 200
    spec = SPEC.model_copy(update={"height": canvas[0], "width": canvas[1]})
    image, _ = to_canvas(film_from_array(pixels), spec)
    assert 0 <= image.min() and image.max() == 1


@pytest.mark.parametrize("value", [1.01, -0.01, np.nan, np.inf])
def test_pixels_beyond_rounding_are_refused(value):
    pixels = np.full((100, 90), 0.5, np.float32)
    pixels[:40, :40] = value
    with pytest.raises(FilmError, match=r"must be finite and in \[0, 1\], found"):
        _canvas(pixels, SPEC)
