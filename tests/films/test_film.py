"""PNG, JPEG and TIFF of 8 and 16 bit, arrays, and what is refused."""

from __future__ import annotations

import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cxrgaze.errors import FilmError, UsageError
from cxrgaze.evidence import phantom
from cxrgaze.films import decode, images
from cxrgaze.films.decode import film_from_bytes, load_film
from cxrgaze.films.film import Film, content_checked, film_from_array
from cxrgaze.films.find import find_films

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
    assert load_film(tmp_path / "m.tif").reasons == (
        "multi-frame: more than one image in the file, expected one",
    )


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
    with pytest.raises(FilmError, match="not a PNG, JPEG, TIFF or DICOM file.* found 12 bytes"):
        load_film(tmp_path / "text.png")
    with pytest.raises(FilmError, match="No such file"):
        load_film(tmp_path / "no.png")
    with pytest.raises(FilmError, match="Is a directory"):
        load_film(tmp_path)


def test_a_huge_image_is_refused_before_its_pixels_are_made(tmp_path, monkeypatch):
    path = _saved(tmp_path, "a.png")
    monkeypatch.setattr(images, "PIXEL_LIMIT", 1000)
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
    found = [str(relative) for _, relative in find_films([tmp_path]).films]
    assert found == ["b.png", "sub/IM0001", "sub/a.PNG"]
    assert [p.name for p, _ in find_films([tmp_path / "*.png"]).films] == ["b.png"]
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p, _ in find_films(["sub/*.PNG"]).films] == ["sub/a.PNG"]
    (tmp_path / "none").mkdir()
    for bad, message in (("none", "no films"), ("no.png", "does not exist"), ("*.gif", "no file")):
        with pytest.raises(UsageError, match=message):
            find_films([tmp_path / bad])


def _tiff(values, photometric, kind_of_photometric=4):
    """A plain one-strip TIFF in the byte order of `values`, written from TIFF 6.0."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape
    kind = 3 if values.dtype.kind == "f" else 1
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 1), (262, photometric)]
    tags += [(273, 8 + 2 + 10 * 12 + 4), (277, 1), (278, height), (279, values.nbytes), (339, kind)]
    out = struct.pack(order + "2sHI", b"MM" if order == ">" else b"II", 42, 8)
    out += struct.pack(order + "H", len(tags))
    for tag, value in tags:
        if tag == 262 and kind_of_photometric == 3:
            out += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
        else:
            out += struct.pack(order + "HHII", tag, 4, 1, value)
    return out + struct.pack(order + "I", 0) + values.tobytes()


SIXTEEN = PIXELS.astype(np.uint16) * 100


@pytest.mark.parametrize(
    "values, photometric",
    [
        (SIXTEEN.astype("<u2"), 1),
        (SIXTEEN.astype(">u2"), 1),
        ((65535 - SIXTEEN).astype("<u2"), 0),
        ((65535 - SIXTEEN).astype(">u2"), 0),
        ((SIXTEEN / 25500).astype("<f4"), 1),
        ((SIXTEEN * 3.0 - 9000).astype("<f4"), 1),
    ],
)
@pytest.mark.parametrize("kind", [3, 4])
def test_tiff_byte_orders_white_is_zero_and_floats(tmp_path, values, photometric, kind):
    (tmp_path / "t.tif").write_bytes(_tiff(values, photometric, kind))
    film = load_film(tmp_path / "t.tif", keep_stored=True)
    assert film.pixel_source == "image-16bit" and not film.reasons
    assert np.abs(film.pixels - film_from_array(SIXTEEN).pixels).max() < 1e-4
    if values.dtype.kind == "f":
        assert film.stored is None
    else:
        assert np.array_equal(film.stored.values, values)
        assert film.stored.larger_is_darker == (photometric == 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tiff_of_what_is_no_number_is_refused(value):
    values = SIXTEEN.astype("<f4")
    values[3, 4] = value
    with pytest.raises(FilmError, match="pixel values are not finite"):
        film_from_bytes(_tiff(values, 1), "t.tif")


def test_a_decoder_cannot_give_what_is_no_number():
    pixels = np.full((40, 40), 0.5, np.float32)
    pixels[3, 4] = np.nan
    with pytest.raises(FilmError, match="f.png: its pixels are not finite"):
        content_checked(Film(pixels, "f.png", "0" * 64, "image-8bit"))


def test_a_file_beyond_all_limits_is_refused(monkeypatch, tmp_path):
    data = _saved(tmp_path, "a.png").read_bytes()
    monkeypatch.setattr(decode, "BYTE_LIMIT", len(data))
    assert film_from_bytes(data, "a.png").shape == (120, 90)
    with pytest.raises(FilmError, match="a.png: larger than 0 MiB"):
        film_from_bytes(data + b"x", "a.png")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(decode.images, "film_from_image", full)
    with pytest.raises(FilmError, match="a.png: needs more memory than there is"):
        film_from_bytes(data, "a.png")


def test_what_is_no_path_is_said():
    with pytest.raises(FilmError, match="no path of a file"):
        load_film("a\0b.png")
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UsageError, match="cannot be searched|does not exist"):
            find_films([name])


def test_8_bit_white_is_zero(tmp_path):
    (tmp_path / "t.tif").write_bytes(_tiff(255 - PIXELS, 0))
    assert np.array_equal(load_film(tmp_path / "t.tif").pixels, PIXELS.astype(np.float32) / 255)


def test_orientation_is_noted_and_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    film = load_film(_saved(tmp_path, "e.jpg", exif=exif))
    assert film.shape == (120, 90) and "EXIF orientation 6" in film.notes[0]


def test_mutated_tiffs_and_jpegs_are_films_or_film_errors(tmp_path):
    """In this process: Pillow raises many kinds of errors, all of which become FilmError."""
    rng = random.Random(3)
    for name in ("a.tif", "b.tif", "c.jpg"):
        options = {"compression": "tiff_lzw"} if name == "b.tif" else {}
        original = _saved(tmp_path, name, **options).read_bytes()
        for _ in range(300):
            data = bytearray(original)
            reach = len(data) if rng.random() < 0.5 else min(300, len(data))
            for _ in range(rng.choice((1, 3, 10))):
                data[-1 - rng.randrange(reach) if rng.random() < 0.5 else rng.randrange(reach)] = (
                    rng.randrange(256)
                )
            try:
                film = film_from_bytes(bytes(data), name)
            except FilmError:
                continue
            assert np.isfinite(film.pixels).all()


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(FilmError, match="not a regular file"):
        load_film(tmp_path / "p.png")


def _png16(planes, more=b""):
    """A PNG of 16 bits, written from its specification; `more` is a chunk without a body."""
    raw = np.dstack(planes).astype(">u2").reshape(len(planes[0]), -1)
    lines = b"".join(b"\0" + row.tobytes() for row in raw)
    kind = {3: 2, 4: 6, 2: 4}[len(planes)]
    header = struct.pack(">IIBBBBB", *planes[0].shape[::-1], 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (more, b""), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        if name:
            checksum = struct.pack(">I", zlib.crc32(name + body))
            data += struct.pack(">I", len(body)) + name + body + checksum
    return data


def test_a_png_that_only_one_of_two_decoders_reads_is_refused():
    planes = [SIXTEEN] * 3
    assert not film_from_bytes(_png16(planes), "f.png").reasons
    with pytest.raises(FilmError, match="OpenCV does not read"):
        film_from_bytes(_png16(planes, b"NEWS"), "f.png")  # critical by its capital letter


@pytest.mark.parametrize("channels", [3, 4, 2])
def test_16_bit_png_in_colour_or_with_alpha_keeps_its_bits(tmp_path, channels):
    """12-bit values in 16-bit PNG: grey, and the same as RGB, RGBA and grey with alpha."""
    values = PIXELS.astype(np.uint16) * 13 + 700
    alpha = np.full_like(values, 65535)
    planes = {3: [values] * 3, 4: [values] * 3 + [alpha], 2: [values, alpha]}[channels]
    film = film_from_bytes(_png16(planes), "f.png")
    grey = film_from_array(values)
    assert film.pixel_source == "image-16bit" and not film.reasons
    assert np.abs(film.pixels - grey.pixels).max() < 1e-6


def test_films_named_by_their_uid_and_linked_folders_are_found(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.2.840.113619.2.5.1").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "d").symlink_to(tmp_path / "real")
    (tmp_path / "links" / "loop").symlink_to(tmp_path / "links")
    assert [str(r) for _, r in find_films([tmp_path / "links"]).films] == ["d/1.2.840.113619.2.5.1"]
