"""PNG, JPEG and TIFF of 8 and 16 bit, arrays, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cxrgaze import phantom
from cxrgaze.errors import FilmError, UsageError
from cxrgaze.runtime import film as films_module
from cxrgaze.runtime.film import film_from_array, find_films, load_film

PIXELS = phantom.draw(1, shape=(120, 90)).pixels


def _saved(tmp_path, name, pixels=PIXELS, **options):
    path = tmp_path / name
    Image.fromarray(pixels).save(path, **options)
    return path


def test_lossless_8_bit_formats_agree_exactly(tmp_path):
    expected = PIXELS.astype(np.float32) / 255
    for name in ("a.png", "a.tif"):
        film = load_film(_saved(tmp_path, name))
        assert np.array_equal(film.pixels, expected)
        assert film.pixel_source == "image-8bit" and film.shape == (120, 90) and not film.reasons
    jpeg = load_film(_saved(tmp_path, "a.jpg", quality=95))
    assert np.abs(jpeg.pixels - expected).mean() < 0.02


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_is_windowed_by_its_percentiles(tmp_path, name):
    values = PIXELS.astype(np.uint16) * 13 + 700
    film = load_film(_saved(tmp_path, name, values))
    ordered = np.sort(values, axis=None)
    share = np.arange(1, ordered.size + 1) / ordered.size
    low, high = (ordered[np.searchsorted(share, p)] for p in (0.005, 0.995))
    slow = np.clip((values.astype(float) - low) / (float(high) - low), 0, 1)
    assert film.pixel_source == "image-16bit"
    assert np.abs(film.pixels - slow).max() < 1e-6


def test_the_window_does_not_depend_on_gain_and_offset():
    a = film_from_array(PIXELS.astype(np.uint16) * 4)
    b = film_from_array(PIXELS.astype(np.uint16) * 200 + 5000)
    assert np.abs(a.pixels - b.pixels).max() < 1e-6


def test_grey_stored_as_rgb_is_a_film_and_a_photograph_is_not(tmp_path):
    grey = load_film(_saved(tmp_path, "g.png", np.dstack([PIXELS] * 3)))
    assert not grey.reasons and np.abs(grey.pixels * 255 - PIXELS).max() <= 1
    photo = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    film = load_film(_saved(tmp_path, "p.png", photo))
    assert film.reasons == ("colour image (RGB), expected a grey radiograph",)


def test_alpha_palette_and_one_bit(tmp_path):
    rgba = Image.fromarray(PIXELS).convert("RGBA")
    rgba.save(tmp_path / "a.png")
    assert np.abs(load_film(tmp_path / "a.png").pixels * 255 - PIXELS).max() <= 1
    Image.fromarray(PIXELS).convert("P").save(tmp_path / "p.png")
    assert np.abs(load_film(tmp_path / "p.png").pixels * 255 - PIXELS).max() <= 1
    Image.fromarray(PIXELS).convert("1").save(tmp_path / "b.png")
    assert load_film(tmp_path / "b.png").shape == (120, 90)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_film_that_shows_nothing_is_not_applicable(tmp_path, level):
    film = load_film(_saved(tmp_path, "f.png", np.full((80, 80), level, np.uint8)))
    assert film.reasons == ("no content: all pixels have (nearly) the same value",)


def test_small_and_multi_frame_films_are_not_applicable(tmp_path):
    assert "expected 32 a side" in load_film(_saved(tmp_path, "s.png", PIXELS[:20])).reasons[0]
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())]
    frames[0].save(tmp_path / "m.tif", save_all=True, append_images=frames[1:])
    assert load_film(tmp_path / "m.tif").reasons == ("multi-frame: 2 frames, expected one",)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_file_cut_short_is_refused(tmp_path, name, share):
    path = _saved(tmp_path, name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FilmError, match=rf"{name}: (damaged|not a PNG)"):
        load_film(path)


def test_other_files_are_refused_by_what_they_are(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"hello, world")
    with pytest.raises(FilmError, match=r"empty \(0 bytes\)"):
        load_film(tmp_path / "empty.png")
    with pytest.raises(FilmError, match="not a PNG, JPEG, TIFF or DICOM file; found 12 bytes"):
        load_film(tmp_path / "text.png")
    with pytest.raises(FilmError, match="No such file"):
        load_film(tmp_path / "no.png")
    with pytest.raises(FilmError, match="Is a directory"):
        load_film(tmp_path)


def test_a_huge_image_is_refused_before_its_pixels_are_made(tmp_path, monkeypatch):
    path = _saved(tmp_path, "a.png")
    monkeypatch.setattr(films_module, "PIXEL_LIMIT", 1000)
    with pytest.raises(FilmError, match="90 x 120 pixels, limit 1000"):
        load_film(path)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 40, 40), np.uint8),
        np.full((40, 40), 1.5),
        np.full((40, 40), np.nan),
        np.zeros((40, 40), np.int32),
    ],
)
def test_arrays_that_are_no_film(pixels):
    with pytest.raises(UsageError):
        film_from_array(pixels)


def test_films_are_found_in_folders_files_and_globs(tmp_path, monkeypatch):
    _saved(tmp_path, "b.png")
    (tmp_path / "sub").mkdir()
    _saved(tmp_path / "sub", "a.PNG")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "sub" / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    found = [str(relative) for _, relative in find_films([tmp_path])]
    assert found == ["b.png", "sub/IM0001", "sub/a.PNG"]
    assert [p.name for p, _ in find_films([tmp_path / "*.png"])] == ["b.png"]
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p, _ in find_films(["sub/*.PNG"])] == ["sub/a.PNG"]
    (tmp_path / "none").mkdir()
    for bad, message in (("none", "no films"), ("no.png", "does not exist"), ("*.gif", "no file")):
        with pytest.raises(UsageError, match=message):
            list(find_films([tmp_path / bad]))
