"""One film in every container: colour, fragments, offset tables, unused bits, names and content."""

from __future__ import annotations

import io
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from cxrgaze.errors import FilmError
from cxrgaze.films.decode import film_from_bytes, load_film
from cxrgaze.films.find import find_films, looks_like_dicom, looks_like_image

QUICK = settings(derandomize=True, max_examples=20, deadline=None)
CONTAINERS = ("native", "j2k", "jls", "rle")
SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]


# --- colour containers --------------------------------------------------------------------------


def _colour(made, channels, photometric, planar=0, **options):
    shape = channels.shape[1:] if planar else channels.shape[:2]
    tags = dict(PhotometricInterpretation=photometric, PlanarConfiguration=planar)
    tags |= dict(SamplesPerPixel=3, Rows=shape[0], Columns=shape[1])
    return made.file(channels, bits=8, **tags | options)


def _ybr(rgb):
    """C.7.6.3.1.2, YBR_FULL, pixel by pixel."""
    out = np.zeros(rgb.shape, np.uint8)
    for y in range(rgb.shape[0]):
        for x in range(rgb.shape[1]):
            r, g, b = (float(v) for v in rgb[y, x])
            luma = 0.2990 * r + 0.5870 * g + 0.1140 * b
            blue = -0.1687 * r - 0.3313 * g + 0.5000 * b + 128
            red = 0.5000 * r - 0.4187 * g - 0.0813 * b + 128
            out[y, x] = [min(max(round(v), 0), 255) for v in (luma, blue, red)]
    return out


def _tinted(made, amount):
    rgb = np.dstack([made.DRAWN] * 3).astype(int)
    rgb[..., 0] += amount
    rgb[..., 2] -= amount
    return rgb.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_rgb_with_grey_content_is_the_8_bit_image(made, planar, syntax):
    rgb = np.dstack([made.DRAWN] * 3)
    stored = np.ascontiguousarray(np.moveaxis(rgb, 2, 0)) if planar else rgb
    film = made.film(_colour(made, stored, "RGB", planar, syntax=syntax))
    assert not film.reasons and film.pixel_source == "image-8bit"
    made.close(film, made.DRAWN / 255)


def test_ybr_full_with_grey_content_is_the_8_bit_image(made):
    film = made.film(_colour(made, _ybr(np.dstack([made.DRAWN] * 3)), "YBR_FULL"))
    assert not film.reasons
    made.close(film, made.DRAWN / 255)


def test_ybr_full_422_with_grey_content_is_the_8_bit_image(made):
    """Two lumas, then their blue and their red (C.7.6.3.1.2)."""
    pairs = made.DRAWN.reshape(60, 24, 2)
    stored = np.dstack([pairs[..., 0], pairs[..., 1], np.full((60, 24, 2), 128, np.uint8)])
    data = _colour(made, stored, "YBR_FULL_422", Columns=48)
    film = made.film(data)
    assert not film.reasons
    made.close(film, made.DRAWN / 255)


@pytest.mark.parametrize("kind", ["j2k", "jls", "rle"])
def test_compressed_rgb_with_grey_content(made, kind):
    rgb = np.dstack([made.DRAWN] * 3)
    photometric = "YBR_RCT" if kind == "j2k" else "RGB"
    tags = dict(PhotometricInterpretation=photometric, PlanarConfiguration=0)
    film = made.film(made.compressed(kind, rgb, 8, bits=8, **tags))
    assert not film.reasons
    made.close(film, made.DRAWN / 255)


@pytest.mark.parametrize("photometric", ["YBR_FULL_422", "YBR_FULL", "RGB"])
def test_jpeg_in_colour_with_grey_content(made, photometric):
    rgb = np.dstack([made.DRAWN] * 3)
    buffer = io.BytesIO()
    keep = {"keep_rgb": True} if photometric == "RGB" else {}
    subsampling = 1 if photometric == "YBR_FULL_422" else 0
    Image.fromarray(rgb).save(buffer, "JPEG", quality=100, subsampling=subsampling, **keep)
    payload = made.encapsulated(buffer.getvalue())
    tags = dict(PhotometricInterpretation=photometric, PlanarConfiguration=0)
    data = made.file(rgb, syntax=JPEGBaseline8Bit, bits=8, payload=payload, **tags)
    film = made.film(data)
    assert not film.reasons
    made.close(film, made.DRAWN / 255, 3 / 255)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
@pytest.mark.parametrize(("amount", "is_grey"), [(0, True), (1, True), (20, False), (90, False)])
def test_coloured_content_is_a_reason_and_a_tint_is_not(made, photometric, amount, is_grey):
    rgb = _tinted(made, amount)
    channels = _ybr(rgb) if photometric == "YBR_FULL" else rgb
    film = made.film(_colour(made, channels, photometric))
    assert film.shape == (60, 48)
    assert any("colour" in reason for reason in film.reasons) != is_grey


def test_rgb_of_deep_words_with_grey_content_keeps_its_depth(made):
    rgb = np.dstack([made.STORED] * 3)
    tags = dict(PhotometricInterpretation="RGB", PlanarConfiguration=0)
    film = made.film(made.file(rgb, bits=12, **tags))
    assert not film.reasons
    made.close(film, made.percentile(made.STORED))


# --- palettes -----------------------------------------------------------------------------------


def _palette(made, indices, colours, bits, first=0):
    """Descriptors and data of C.7.9: entries, first value mapped, bits; words of `bits`."""
    tags = dict(PhotometricInterpretation="PALETTE COLOR")
    kind = "<u2" if bits == 16 else "u1"
    for channel, name in enumerate(("Red", "Green", "Blue")):
        stem = f"{name}PaletteColorLookupTable"
        tags[f"{stem}Descriptor"] = [len(colours), first, bits]
        data = np.asarray([c[channel] for c in colours]).astype(kind).tobytes()
        tags[f"{stem}Data"] = data + b"\0" * (len(data) % 2)
    return made.file(indices, bits=8 * indices.dtype.itemsize, **tags)


def _shuffled(made, seed=4):
    """A permutation of the grey levels, and the indices that give the film through it."""
    order = np.random.default_rng(seed).permutation(256)
    return order, np.argsort(order)[made.DRAWN].astype(np.uint8)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_of_greys_is_read_through_its_table(made, seed, bits):
    order, indices = _shuffled(made, seed)
    scale = 257 if bits == 16 else 1
    film = made.film(_palette(made, indices, [(v * scale,) * 3 for v in order], bits))
    assert not film.reasons
    expected = made.DRAWN / 255 if bits == 8 else made.percentile(made.DRAWN)
    made.close(film, expected)


def test_a_palette_whose_first_entry_is_another_index(made):
    indices = (made.DRAWN // 2 + 100).astype(np.uint8)
    film = made.film(_palette(made, indices, [(2 * v,) * 3 for v in range(128)], 8, first=100))
    made.close(film, made.DRAWN // 2 * 2 / 255)


def test_a_palette_of_colours_is_a_reason(made):
    colours = [(v, 255 - v, 40) for v in range(256)]
    film = made.film(_palette(made, made.DRAWN, colours, 8))
    assert "colour" in film.reasons[0] and film.shape == (60, 48)


def test_a_palette_without_its_table_is_refused(made):
    data = made.file(made.DRAWN, bits=8, PhotometricInterpretation="PALETTE COLOR")
    with pytest.raises(FilmError):
        made.film(data)


# --- offset tables and fragments ----------------------------------------------------------------

TABLES = {
    "empty": b"",
    "right": struct.pack("<I", 0),
    "wrong": struct.pack("<I", 1234),
    "far beyond": struct.pack("<I", 0xFFFFFFF0),
    "one too many": struct.pack("<II", 0, 400),
    "of odd length": b"\1\2",
}


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kind", CONTAINERS[1:])
def test_one_frame_is_read_whatever_its_offset_table_says(made, kind, table, parts):
    options = {"bits": 12, **made.WINDOW}
    data = made.compressed(kind, made.STORED, 12, table=TABLES[table], parts=parts, **options)
    film = made.film(data)
    assert not film.reasons
    made.close(film, made.slow(made.STORED, lambda v: made.linear(v, 1700, 2200)))


@pytest.mark.parametrize("kind", CONTAINERS[1:])
@pytest.mark.parametrize("frames", ["1", "0", ""])
def test_a_number_of_frames_is_no_hindrance(made, kind, frames):
    data = made.compressed(kind, made.STORED, 12, parts=3, NumberOfFrames=frames, **made.WINDOW)
    made.close(made.film(data), made.film(made.file(**made.WINDOW)).pixels)


@pytest.mark.parametrize("kind", CONTAINERS[1:])
def test_no_fragment_at_all_is_an_error(made, kind):
    syntax = {"j2k": JPEG2000Lossless, "jls": JPEGLSLossless, "rle": RLELossless}[kind]
    for payload in (made.encapsulated(b""), made.encapsulated(b"")[:8]):
        with pytest.raises(FilmError):
            made.film(made.file(syntax=syntax, payload=payload))


# --- unused bits --------------------------------------------------------------------------------


@QUICK
@given(
    bits=st.integers(8, 15),
    rows=st.integers(33, 60),
    columns=st.integers(33, 48),
    mono=st.sampled_from(["MONOCHROME1", "MONOCHROME2"]),
    seed=st.integers(0, 9),
)
def test_bits_above_those_stored_are_dropped_in_every_container(
    made, bits, rows, columns, mono, seed
):
    clean = made.DRAWN[:rows, :columns].astype(np.uint16) << 8 >> 16 - bits
    rng = np.random.default_rng(seed)
    overlay = np.zeros(clean.shape, np.uint16)
    overlay[4:9, 3:21] = rng.integers(0, 2 ** (16 - bits), (5, 18)) << bits
    overlay[0, 0] = 1 << 15  # so that every encoder takes 16 bits
    tags = {"WindowCenter": 2 ** (bits - 1), "WindowWidth": 2**bits}
    tags["PhotometricInterpretation"] = mono
    expected = made.slow(clean, lambda v: made.linear(v, 2 ** (bits - 1), 2**bits))
    expected = 1 - expected if mono == "MONOCHROME1" else expected
    for kind in CONTAINERS:
        film = made.film(made.compressed(kind, clean | overlay, 16, bits=bits, **tags))
        made.close(film, expected)


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_signed_values_in_every_container(made, kind, bits):
    shift = 2 ** (bits - 1)
    wide = made.DRAWN.astype(np.int32) << 8 >> 16 - bits
    signed = (wide - shift).astype(np.int16 if bits > 8 else np.int8)
    centre, width = shift // 8, 2 * shift
    stored = signed.view(np.uint16 if bits > 8 else np.uint8) if kind == "jls" else signed
    if kind == "jls":
        stored = stored & (2**bits - 1)  # its codestream has no sign
    tags = {"WindowCenter": centre, "WindowWidth": width, "PixelRepresentation": 1}
    film = made.film(made.compressed(kind, stored, bits, bits=bits, **tags))
    made.close(film, made.slow(wide - shift, lambda v: made.linear(v, centre, width)))


@pytest.mark.parametrize("kind", ["native", "rle"])
@pytest.mark.parametrize(("bits", "high"), [(8, 11), (10, 13), (10, 15), (12, 15), (12, 12)])
def test_a_high_bit_above_the_stored_bits(made, kind, bits, high):
    clean = made.DRAWN.astype(np.uint16) << 8 >> 16 - bits
    drop = high + 1 - bits
    stored = (clean << drop | (2**drop - 1)) & 0xFFFF
    tags = {"WindowCenter": 2 ** (bits - 1), "WindowWidth": 2**bits, "HighBit": high}
    film = made.film(made.compressed(kind, stored, 16, bits=bits, **tags))
    made.close(film, made.slow(clean, lambda v: made.linear(v, 2 ** (bits - 1), 2**bits)))


# --- content against name -----------------------------------------------------------------------


def _image(made, kind):
    buffer = io.BytesIO()
    Image.fromarray(made.DRAWN).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("name", ["a.dcm", "a.DICOM", "a", "a.png", "a.jpg", "a.tif", "1.2.3.4"])
def test_an_image_is_read_whatever_its_name(made, kind, name):
    data = _image(made, kind)
    film, right = made.film(data, name), made.film(data, f"a.{kind.lower()}")
    assert np.array_equal(film.pixels, right.pixels) and not film.reasons
    if kind != "JPEG":
        made.close(film, made.DRAWN / 255)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a", "1.2.840.1", "a.dcm"])
@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("with_preamble", [True, False])
def test_dicom_is_read_whatever_its_name(made, name, syntax, with_preamble):
    data = made.file(syntax=syntax, **made.WINDOW)
    film = made.film(data if with_preamble else data[132:], name)
    made.close(film, made.slow(made.STORED, lambda v: made.linear(v, 1700, 2200)))


@pytest.mark.parametrize("name", ["a.png", "a", "a.dcm"])
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_dicom_without_preamble_and_without_group_2_is_read(made, name, syntax):
    data = made.without_preamble(made.file(syntax=syntax, **made.WINDOW))
    film = made.film(data, name)
    made.close(film, made.slow(made.STORED, lambda v: made.linear(v, 1700, 2200)))


def test_films_of_a_folder_by_content_and_by_suffix(made, tmp_path):
    dicom = made.file(**made.WINDOW)
    implicit = made.file(syntax=ImplicitVRLittleEndian, **made.WINDOW)
    films = {
        "png_named.dcm": _image(made, "PNG"),
        "jpeg_named.dcm": _image(made, "JPEG"),
        "dicom_named.png": dicom,
        "plain.dcm": dicom,
        "1.2.840.99.1": dicom,
        "IM0001": implicit[132:],
        "deep/IM0002": made.without_preamble(implicit),
        "deep/IM0003": made.without_preamble(dicom),
        "deep/IM0004": made.without_preamble(made.file(syntax=ExplicitVRBigEndian, **made.WINDOW)),
        "deep/IM0005.bak": dicom,
    }
    others = {
        "notes.txt": b"films of Monday\n" * 20,
        "empty": b"",
        "table.csv": b"a,b\n1,2\n" * 40,
        "weights.bin": bytes(range(256)),
        "zeros": bytes(500),
        ".hidden.dcm": dicom,
        "data.npz": b"PK\3\4" + bytes(300),
        "x.gz": b"\x1f\x8b\x08\0" + bytes(300),
        "counts.i32": np.arange(2, 200, dtype="<i4").tobytes(),
    }
    for name, data in {**films, **others}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    everything = find_films([tmp_path])
    found = {str(relative): path for path, relative in everything.films}
    assert set(found) == set(films)
    skipped = {str(path.relative_to(tmp_path)): reason for path, reason in everything.skipped}
    assert set(skipped) == set(others)
    assert skipped[".hidden.dcm"] == "a hidden file" and "nor PNG" in skipped["notes.txt"]
    for name, path in found.items():
        film = load_film(path)
        assert film.shape == (60, 48) and not film.reasons, name


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_an_image_never_looks_like_dicom(made, kind):
    assert looks_like_image(_image(made, kind)) and not looks_like_dicom(_image(made, kind))


@QUICK
@given(data=st.binary(max_size=200))
def test_what_a_file_looks_like_is_said_of_any_bytes(data):
    assert looks_like_dicom(data) in (True, False)
    assert looks_like_dicom(data[:128].ljust(128, b"\7") + b"DICM")


@pytest.mark.parametrize("inverted", [False, True])
def test_stored_values_are_those_of_the_file(made, inverted):
    kind = "MONOCHROME1" if inverted else "MONOCHROME2"
    data = made.file(PhotometricInterpretation=kind, **made.WINDOW)
    stored = film_from_bytes(data, "f.dcm", keep_stored=True).stored
    assert np.array_equal(stored.values, made.STORED)
    assert (stored.bits, stored.larger_is_darker) == (12, inverted)
    png = cv2.imencode(".png", made.STORED)[1].tobytes()
    stored = film_from_bytes(png, "f.png", keep_stored=True).stored
    assert np.array_equal(stored.values, made.STORED)
    assert (stored.bits, stored.larger_is_darker) == (16, False)
