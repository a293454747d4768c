from __future__ import annotations

import cv2
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrgaze.errors import FilmError, NotApplicableError
from cxrgaze.evidence import phantom
from cxrgaze.films.canvas import Geometry, drawn_canvases, load_for, not_applied, to_canvas
from cxrgaze.films.decode import film_from_bytes, load_film
from cxrgaze.films.film import Film, Stored, film_from_array
from cxrgaze.runtime.reading import Reading
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


AUTHORS = SPEC.model_copy(update={"height": 640, "width": 512, "canvas": "cxrgazelearn"})
TENTH = AUTHORS.model_copy(update={"height": 320, "width": 256})


def _slow(values, spec):
    """Theirs, pixel by pixel: pad to the frame, every so many pixels, over the largest of those."""
    height, width = values.shape
    top, left, step = (3200 - height) // 2, (2560 - width) // 2, 3200 // spec.height
    canvas = np.zeros((spec.height, spec.width), np.float32)
    for row in range(spec.height):
        y = row * step - top
        if 0 <= y < height:
            for column in range(max(0, left // step), min(spec.width, (left + width) // step + 1)):
                x = column * step - left
                if 0 <= x < width:
                    canvas[row, column] = values[y, x]
    return canvas / canvas.max()


def _with_stored(values, *, source="dicom-window", darker=False):
    bits = 8 * values.dtype.itemsize
    pixels = np.full(values.shape, 0.5, np.float32)
    return Film(pixels, "film", "", source, stored=Stored(values, bits, darker))


@pytest.mark.parametrize("spec", [AUTHORS, TENTH], ids=["fifth", "tenth"])
@pytest.mark.parametrize(("photometric", "bits"), [("MONOCHROME1", 12), ("MONOCHROME2", 16)])
def test_the_authors_canvas_of_a_dicom_equals_a_slow_form(made, spec, photometric, bits):
    rng = np.random.default_rng(bits)
    values = rng.integers(0, 2**bits, (331, 278), dtype=np.uint16)
    data = made.file(values, bits=bits, PhotometricInterpretation=photometric, **made.WINDOW)
    film = film_from_bytes(data, "f.dcm", keep_stored=True)
    assert np.array_equal(to_canvas(film, spec)[0], _slow(values, spec))


def test_the_authors_canvas_takes_dicom_of_8_bits_and_png_of_16(made, tmp_path):
    values = np.random.default_rng(0).integers(0, 200, (333, 300), dtype=np.uint8)
    film = film_from_bytes(made.file(values, bits=8), "f.dcm", keep_stored=True)
    assert np.array_equal(to_canvas(film, AUTHORS)[0], _slow(values, AUTHORS))
    deep = values.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "f.png"), deep)
    assert np.array_equal(
        to_canvas(load_for(AUTHORS, tmp_path / "f.png"), AUTHORS)[0], _slow(deep, AUTHORS)
    )
    array = film_from_array(deep, keep_stored=True)
    assert np.array_equal(to_canvas(array, AUTHORS)[0], _slow(deep, AUTHORS))


REAL = ("dcm_rg1q_15b_mono1_explicit", "dcm_nih_google_dx_8bit", "dcm_rg1q_12b_mono2_implicit")


@pytest.mark.parametrize("name", REAL)
def test_the_authors_canvas_of_a_real_film_equals_a_slow_form(shared, name):
    path = shared / "cxr" / f"{name}.dcm"
    with pydicom.dcmread(path) as header:
        values = header.pixel_array
    for spec in (AUTHORS, TENTH):
        assert np.array_equal(to_canvas(load_for(spec, path), spec)[0], _slow(values, spec))


@given(st.integers(20, 3200), st.integers(20, 2560), st.sampled_from([1, 2, 4, 5, 10, 20]))
@settings(max_examples=200, deadline=None)
def test_the_authors_geometry_is_exact(height, width, step):
    canvas = (3200 // step, 2560 // step)
    g = Geometry.fit((height, width), canvas, "cxrgazelearn")
    corners = [(g.left, g.top), (g.left + g.width - 1, g.top + g.height - 1)]
    margin = np.array([(2560 - width) // 2, (3200 - height) // 2])
    shown = np.array(corners) * step - margin  # what the canvas shows there, by the rule itself
    assert np.array_equal(g.to_film(np.array(corners, float)), shown)
    assert np.array_equal(g.to_canvas(shown.astype(float)), corners)
    assert (shown >= 0).all() and (shown < (width, height)).all()
    outside = [(g.left - 1, g.top - 1), (g.left + g.width, g.top + g.height)]
    (x0, y0), (x1, y1) = np.array(outside) * step - margin
    assert x0 < 0 and y0 < 0 and x1 >= width and y1 >= height
    film = np.zeros((height, width), np.float32)
    window = np.zeros(g.window, np.float32)
    assert g.shown(film).shape == g.on_film(window).shape


def test_a_window_that_is_as_large_as_the_film_but_beside_it_does_not_show_all():
    g = Geometry.fit((100, 100), (640, 512), "cxrgazelearn")
    assert g.window == (100, 100) and (g.film_top, g.film_left) == (-2, -2)
    assert not g.shows_all and Geometry.fit((90, 80), (64, 64)).shows_all


@pytest.mark.parametrize(("canvas", "off"), [((640, 512), 0), ((320, 256), 0.5)])
@pytest.mark.parametrize("shape", [(331, 278), (400, 301), (65, 64)])
def test_a_map_on_the_authors_canvas_comes_back_in_film_pixels(canvas, off, shape):
    geometry = Geometry.fit(shape, canvas, "cxrgazelearn")
    row, column = geometry.top + geometry.height // 2, geometry.left + geometry.width // 2
    log_density = np.full(canvas, -40.0, np.float32)
    log_density[row, column] = 0
    reading = _reading(log_density, geometry)
    heatmap = reading.heatmap()
    assert heatmap.shape == shape and heatmap.sum() == pytest.approx(1, abs=1e-5)
    rows, columns = np.indices(shape)
    centre = np.array([(heatmap * columns).sum(), (heatmap * rows).sum()])
    exact = geometry.to_film(np.array([[column, row]], float))[0]
    assert np.array_equal(reading.peak, exact)
    assert np.abs(centre - exact).max() <= off + 1e-3


def _reading(log_density, geometry):
    nothing = dict(film="", film_sha256="", pixel_source="stored-values", probabilities={})
    nothing |= dict(label=None, flags={}, operating_points={}, timings_ms={}, model={}, warnings=())
    return Reading(log_density=log_density, geometry=geometry, **nothing)


def _values(*shape, kind=np.uint16):
    return np.random.default_rng(1).integers(1, 200, shape).astype(kind)


REFUSED = {
    "8 bits": (_with_stored(_values(64, 64), source="image-8bit"), "image-8bit: .* 16 bits"),
    "floats": (_with_stored(_values(64, 64), source="array"), "array: .* DICOM"),
    "not kept": (film_from_array(_values(64, 64)), "no stored values.* keep_stored=True"),
    "too high": (_with_stored(_values(3201, 64)), "64 x 3201 pixels.* 2560 x 3200.* be cut"),
    "too wide": (_with_stored(_values(64, 2561)), "2561 x 64 pixels.* be cut"),
    "too small": (_with_stored(_values(1, 1)), "1 x 1 pixels.* not be seen"),
    "negative": (_with_stored(_values(64, 64, kind=np.int16) - 300), "stored values from -"),
    "black": (_with_stored(np.zeros((64, 64), np.uint16)), "stored values from 0 to 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_authors_canvas_does_not_take_is_not_applicable(case):
    film, said = REFUSED[case]
    with pytest.raises(NotApplicableError, match=said):
        to_canvas(film, AUTHORS)


def test_the_largest_film_is_taken_whole():
    values = _values(3200, 2560)
    canvas, geometry = to_canvas(_with_stored(values), AUTHORS)
    assert np.array_equal(canvas, (values[::5, ::5] / np.float32(values[::5, ::5].max())))
    assert (geometry.top, geometry.left, geometry.height, geometry.width) == (0, 0, 640, 512)


def test_a_film_is_loaded_with_the_reasons_of_its_network(tmp_path):
    path = tmp_path / "f.png"
    cv2.imwrite(str(path), phantom.draw(1).pixels)
    plain = load_for(SPEC, path)
    assert not plain.reasons and plain.stored is None
    assert np.array_equal(plain.pixels, load_film(path).pixels)
    (reason,) = load_for(AUTHORS, path).reasons
    assert "image-8bit" in reason


def test_what_was_not_applied_is_said():
    assert not_applied(_with_stored(_values(64, 64)), SPEC) == ()
    (plain,) = not_applied(_with_stored(_values(64, 64)), AUTHORS)
    (dark,) = not_applied(_with_stored(_values(64, 64), darker=True), AUTHORS)
    assert all("windows (rescale, VOI LUT) or percentiles" in said for said in (plain, dark))
    assert "nor of polarity" in plain and "were not inverted" in dark


def test_drawings_come_on_the_authors_canvas_whole():
    drawn = film_from_array(phantom.draw(1, shape=(640, 512)).pixels)
    images, (geometry,) = drawn_canvases([drawn], AUTHORS)
    assert geometry.shows_all and np.abs(images[0, 0] - drawn.pixels).max() < 1e-6


@pytest.mark.parametrize("canvas", [(64, 64), (640, 510), (6400, 5120), (960, 768)])
def test_a_canvas_that_does_not_sample_the_frame_is_refused(canvas):
    with pytest.raises(ValueError, match="3200x2560 over a whole number.*found"):
        Geometry.fit((100, 100), canvas, "cxrgazelearn")
