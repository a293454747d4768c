"""Image files as they are stored: no path through 8 bits, and nothing is turned."""

from __future__ import annotations

import gzip
import struct

import cv2
import numpy as np
import pytest

from cxrgaze.errors import FilmError
from cxrgaze.films.decode import film_from_bytes
from cxrgaze.films.windows import apply_window, percentile_window

ORDERS = {"II": "<", "MM": ">"}


def _tiff(pixels, order="II", orientation=1, alpha=False):
    """An uncompressed TIFF 6.0 of one strip: `(H, W)` or `(H, W, C)` of uint8 or uint16."""
    end = ORDERS[order]
    stored = pixels if pixels.ndim == 3 else pixels[..., None]
    height, width, samples = stored.shape
    bits = 8 * pixels.dtype.itemsize
    body = stored.astype(pixels.dtype.newbyteorder(end)).tobytes()
    colour = samples - alpha == 3
    short, long = 3, 4
    tags = [
        (256, long, [width]),
        (257, long, [height]),
        (258, short, [bits] * samples),
        (259, short, [1]),
        (262, short, [2 if colour else 1]),
        (273, long, [8]),
        (274, short, [orientation]),
        (277, short, [samples]),
        (278, long, [height]),
        (279, long, [len(body)]),
    ]
    if alpha:
        tags.append((338, short, [2]))
    extra_at = 8 + len(body)
    extra, entries = b"", b""
    for tag, kind, values in tags:
        packed = struct.pack(f"{end}{len(values)}{'H' if kind == short else 'I'}", *values)
        if len(packed) > 4:
            where = struct.pack(f"{end}I", extra_at + len(extra))
            extra += packed
        else:
            where = packed.ljust(4, b"\0")
        entries += struct.pack(f"{end}HHI", tag, kind, len(values)) + where
    directory = struct.pack(f"{end}H", len(tags)) + entries + bytes(4)
    first = struct.pack(f"{end}HI", 42, extra_at + len(extra))
    return order.encode() + first + body + extra + directory


@pytest.fixture(scope="module")
def grey():
    """A 12-bit picture with few values below 256, so that 8 bits would show nothing."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(300, 4096, (6, 7)).astype(np.float32), (70, 60))
    return np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 4095).astype(np.uint16)


def _expected(values):
    return apply_window(values, *percentile_window(values.astype(np.int64)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_tiff_is_read_in_its_own_grid_and_depth(grey, order, orientation, samples, depth):
    values = grey if depth == 16 else (grey >> 4).astype(np.uint8)
    pixels = values if samples == 1 else np.repeat(values[..., None], 3, axis=2)
    film = film_from_bytes(_tiff(pixels, order, orientation), "x.tif")
    want = _expected(values) if depth == 16 else values.astype(np.float32) / np.float32(255)
    assert film.shape == values.shape and np.abs(film.pixels - want).max() < 2e-3
    assert film.pixel_source == f"image-{depth}bit" and not film.reasons
    said = [note for note in film.notes if f"orientation {orientation})" in note]
    assert bool(said) == (orientation != 1)


@pytest.mark.parametrize("order", ORDERS)
def test_a_deep_tiff_with_alpha_keeps_its_depth(grey, order):
    alpha = np.full_like(grey, 65535)
    pixels = np.stack([grey, grey, grey, alpha], axis=2)
    film = film_from_bytes(_tiff(pixels, order, alpha=True), "x.tif")
    assert np.abs(film.pixels - _expected(grey)).max() < 2e-3
    assert film.pixel_source == "image-16bit"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_deep_png_keeps_its_depth(grey, channels):
    planes = {1: grey, 3: np.repeat(grey[..., None], 3, axis=2)}
    planes[4] = np.dstack([planes[3], np.full_like(grey, 65535)])
    data = cv2.imencode(".png", planes[channels])[1].tobytes()
    film = film_from_bytes(data, "x.png")
    assert np.abs(film.pixels - _expected(grey)).max() < 2e-3


def test_a_deep_tiff_in_colour_is_not_applicable(grey):
    pixels = np.stack([grey, grey // 2, grey // 8], axis=2)
    film = film_from_bytes(_tiff(pixels * 16), "x.tif")
    assert film.reasons == ("colour image (RGB), expected a grey radiograph",)


NOT_READ = {
    "BMP": (cv2.imencode(".bmp", np.zeros((40, 40), np.uint8))[1].tobytes(), "convert it to PNG"),
    "WebP": (cv2.imencode(".webp", np.zeros((40, 40, 3), np.uint8))[1].tobytes(), "convert it"),
    "JPEG 2000": (cv2.imencode(".jp2", np.zeros((40, 40), np.uint8))[1].tobytes(), "into DICOM"),
    "gzip": (gzip.compress(b"a film"), "unpack it"),
    "ZIP": (b"PK\x03\x04" + bytes(40), "unpack it"),
    "PDF": (b"%PDF-1.7", "take the film itself"),
}


@pytest.mark.parametrize("kind", NOT_READ)
@pytest.mark.parametrize("name", ["film.png", "film", "film.bmp"])
def test_what_is_not_read_is_refused_by_its_name_with_what_to_do(kind, name):
    data, remedy = NOT_READ[kind]
    with pytest.raises(FilmError, match=f"{name}: a {kind} file, which is not read; .*{remedy}"):
        film_from_bytes(data, name)
