"""Decoders: each syntax bit for bit, against other encoders and decoders."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from cxrgaze.errors import FilmError
from cxrgaze.films import decoders, dicom
from cxrgaze.films.codestream import look, rle_segments
from cxrgaze.films.decoders import DECODERS, Decoder

XL = tuple(UID(f"{decoders.JPEG_XL}{end}") for end in "012")
UNCOMPRESSED = UID(decoders.ENCAPSULATED_UNCOMPRESSED)
KINDS = ((8, np.uint8), (8, np.uint16), (10, np.uint16), (12, np.uint16), (15, np.uint16))
KINDS = (*KINDS, (16, np.uint16))


def _pixels(bits, kind, shape=(97, 84)):
    rng = np.random.default_rng(bits)
    drawn = np.add.outer(np.arange(shape[0]) * 31, np.arange(shape[1]) * 17)
    return ((drawn + rng.integers(0, 4, shape)) % 2**bits).astype(kind)


def _lossless_jpeg(pixels, bits):
    narrow = pixels.astype(np.uint8 if bits <= 8 else np.uint16)
    return imagecodecs.jpeg8_encode(narrow, lossless=True, bitspersample=bits)


def _jpeg_ls(made):
    return lambda pixels, bits: made.jls(pixels.astype(np.uint8) if bits <= 8 else pixels)


def _encoders(made):
    """Of each lossless syntax: another library's encoder where there is one."""

    def high_throughput(pixels, bits):
        return imagecodecs.htj2k_encode(pixels, reversible=True)  # by OpenJPH

    def xl(pixels, bits):
        return imagecodecs.jpegxl_encode(pixels, lossless=True)

    return {
        JPEG2000Lossless: made.j2k,
        HTJ2KLossless: high_throughput,
        HTJ2KLosslessRPCL: high_throughput,
        HTJ2K: high_throughput,
        JPEGLSLossless: _jpeg_ls(made),
        JPEGLossless: _lossless_jpeg,
        JPEGLosslessSV1: _lossless_jpeg,
        RLELossless: lambda pixels, bits: made.rle(pixels),
        UNCOMPRESSED: lambda pixels, bits: pixels.astype(pixels.dtype.newbyteorder("<")).tobytes(),
        XL[0]: xl,
        XL[2]: xl,
    }


LOSSLESS = (
    *(JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K, JPEGLSLossless, JPEGLossless),
    *(JPEGLosslessSV1, RLELossless, UNCOMPRESSED, XL[0], XL[2]),
)


def _stored(data: bytes) -> np.ndarray:
    return dicom.stored_values(pydicom.dcmread(io.BytesIO(data)), "x")


@pytest.mark.parametrize(("bits", "kind"), KINDS, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.name)
def test_a_lossless_frame_is_read_bit_for_bit(made, syntax, bits, kind):
    pixels = _pixels(bits, kind)
    frame = _encoders(made)[syntax](pixels, bits)
    data = made.file(pixels, bits=bits, syntax=syntax, payload=made.encapsulated(frame))
    assert np.array_equal(_stored(data), pixels)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless, JPEGLosslessSV1])
def test_signed_values_keep_their_sign(made, syntax):
    values = _pixels(12, np.int16) - 2048
    as_stored = (values & 0xFFF).astype(np.uint16)
    if syntax == RLELossless:
        as_stored = values.view(np.uint16)
    frame = _encoders(made)[syntax](as_stored, 12)
    tags = {"PixelRepresentation": 1, "payload": made.encapsulated(frame)}
    assert np.array_equal(_stored(made.file(as_stored, syntax=syntax, **tags)), values)


def test_signed_samples_inside_the_codestream(made):
    values = _pixels(12, np.int16) - 2048
    frame = made.j2k(values, 12)
    tags = {"PixelRepresentation": 1, "payload": made.encapsulated(frame)}
    data = made.file(values.view(np.uint16), syntax=JPEG2000Lossless, **tags)
    assert np.array_equal(_stored(data), values)


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGExtended12Bit])
def test_a_lossy_frame_is_as_other_decoders_read_it(made, syntax):
    pixels = _pixels(8, np.uint8)
    frame = cv2.imencode(".jpg", pixels)[1].tobytes()
    data = made.file(pixels, bits=8, syntax=syntax, payload=made.encapsulated(frame))
    assert np.array_equal(_stored(data), np.asarray(Image.open(io.BytesIO(frame))))


def test_jpeg_of_12_bits(made):
    pixels = (np.add.outer(np.arange(97), np.arange(84)) * 20).astype(np.uint16)
    frame = imagecodecs.jpeg8_encode(pixels, level=100, bitspersample=12)
    assert look(frame).precision == 12
    data = made.file(pixels, syntax=JPEGExtended12Bit, payload=made.encapsulated(frame))
    assert np.abs(_stored(data).astype(int) - pixels).max() <= 4


def test_jpeg_xl_made_from_a_jpeg(made):
    pixels = _pixels(8, np.uint8)
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    frame = imagecodecs.jpegxl_encode_jpeg(jpeg)
    data = made.file(pixels, bits=8, syntax=XL[1], payload=made.encapsulated(frame))
    assert np.abs(_stored(data).astype(int) - np.asarray(Image.open(io.BytesIO(jpeg)))).max() <= 2


# --- the real films, by other libraries ----------------------------------------------------------


def _compressed(shared):
    for path in sorted((shared / "cxr").glob("*.dcm")):
        header = pydicom.dcmread(path)
        if header.file_meta.TransferSyntaxUID in DECODERS:
            yield path, header


OTHERS = {
    "JPEG 2000": "pylibjpeg",
    "JPEG-LS": "pyjpegls",
    "JPEG Lossless": "gdcm",
    "JPEG Baseline": "pillow",
    "RLE": "pydicom",
}


def test_the_shared_films_are_as_the_earlier_decoders_read_them(shared):
    compared = 0
    for path, header in _compressed(shared):
        syntax = header.file_meta.TransferSyntaxUID
        plugin = next((p for kind, p in OTHERS.items() if syntax.name.startswith(kind)), None)
        if plugin is None:
            continue
        theirs, _ = get_decoder(syntax).as_array(header, raw=True, decoding_plugin=plugin)
        assert np.array_equal(dicom.stored_values(header, "x"), theirs), path.name
        compared += 1
    assert compared >= 7


COMMANDS = {"dcmdjpeg": "dcmtk", "dcmdjpls": "dcmtk", "dcmdrle": "dcmtk", "gdcmconv": "gdcm"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_shared_films_are_as_dcmtk_and_gdcm_decompress_them(shared, tmp_path, command):
    """Independent: no Python library has a part in it. Here the 12-bit JPEG is compared too."""
    if not shutil.which(command):
        pytest.skip(f"needs {command} (apt-get install dcmtk libgdcm-tools)")
    compared = 0
    for path, header in _compressed(shared):
        raw = tmp_path / path.name
        options = ["--raw"] if command == "gdcmconv" else []
        done = subprocess.run([command, *options, path, raw], capture_output=True)
        if done.returncode or not raw.exists():
            continue  # a syntax that it does not read
        plain = pydicom.dcmread(raw)
        if plain.file_meta.TransferSyntaxUID.is_compressed:
            continue
        theirs, ours = dicom.stored_values(plain, "x"), dicom.stored_values(header, "x")
        assert np.abs(theirs.astype(int) - ours).max() <= 1, path.name  # lossy ones may round
        compared += 1
    assert compared


# --- colour --------------------------------------------------------------------------------------


def _colour_jpeg(subsampling, rgb=False):
    grey = _pixels(8, np.uint8)
    channels = np.stack([grey] * 3, axis=-1)
    if rgb:  # the components as they are, with an Adobe marker that says so
        return grey, imagecodecs.jpeg8_encode(
            channels, level=95, colorspace="RGB", outcolorspace="RGB"
        )
    buffer = io.BytesIO()
    Image.fromarray(channels).save(buffer, "JPEG", quality=95, subsampling=subsampling)
    return grey, buffer.getvalue()


@pytest.mark.parametrize("said", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize(("subsampling", "rgb"), [(0, False), (1, False), (2, False), (0, True)])
def test_grey_content_in_a_colour_jpeg_is_grey_whatever_the_header_says(
    made, said, subsampling, rgb
):
    """The codestream says what its components are (JFIF, Adobe); headers are often wrong."""
    grey, frame = _colour_jpeg(subsampling, rgb)
    assert look(frame).is_ycbcr is not rgb
    data = made.file(
        np.stack([grey] * 3, axis=-1),
        bits=8,
        syntax=JPEGBaseline8Bit,
        payload=made.encapsulated(frame),
        PhotometricInterpretation=said,
        PlanarConfiguration=0,
    )
    film = made.film(data)
    assert not film.reasons
    assert np.abs(film.pixels - grey / 255).mean() < 0.02


def test_a_jpeg_that_does_not_say_is_what_the_header_says():
    _, frame = _colour_jpeg(0)
    without = frame[:2] + frame[2 + 2 + int.from_bytes(frame[4:6], "big") :]
    assert look(frame).is_ycbcr and look(without).is_ycbcr is None


# --- one decoder after the other -----------------------------------------------------------------


def _failing(frame, layout):
    raise BaseException("PatientName")


def test_the_next_decoder_is_asked_where_one_fails(made, monkeypatch):
    pixels = _pixels(12, np.uint16)
    for syntax in (JPEG2000Lossless, RLELossless):
        assert len(DECODERS[syntax]) > 1
        monkeypatch.setitem(DECODERS, syntax, (Decoder("failing", _failing), *DECODERS[syntax][1:]))
        frame = _encoders(made)[syntax](pixels, 12)
        data = made.file(pixels, syntax=syntax, payload=made.encapsulated(frame))
        assert np.array_equal(_stored(data), pixels)


def test_the_last_failure_is_told_without_what_it_quotes(made, monkeypatch):
    pixels = _pixels(12, np.uint16)
    data = made.file(pixels, syntax=JPEGLSLossless, payload=made.encapsulated(made.jls(pixels)))
    monkeypatch.setitem(DECODERS, JPEGLSLossless, (Decoder("CharLS", _failing),))
    with pytest.raises(FilmError, match="CharLS does not read its codestream") as caught:
        made.film(data)
    assert "PatientName" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_memory_and_interrupts_are_no_matter_of_the_next_decoder(made, monkeypatch, error):
    def failing(frame, layout):
        raise error

    pixels = _pixels(12, np.uint16)
    data = made.file(pixels, syntax=RLELossless, payload=made.encapsulated(made.rle(pixels)))
    others = DECODERS[RLELossless]
    monkeypatch.setitem(DECODERS, RLELossless, (Decoder("failing", failing), *others))
    with pytest.raises(FilmError if error is MemoryError else KeyboardInterrupt):
        made.film(data)


# --- RLE -----------------------------------------------------------------------------------------


def _rle_header(count, *starts):
    return np.array([count, *starts, *[0] * (15 - len(starts))], "<u4").tobytes()


@pytest.mark.parametrize(
    ("frame", "wrong"),
    [
        (b"\0" * 63, "cut"),
        (_rle_header(3, 64, 70) + b"\0" * 20, "3 segments, expected 2"),
        (_rle_header(2, 60, 70) + b"\0" * 20, "do not follow"),
        (_rle_header(2, 64, 64) + b"\0" * 20, "do not follow"),
        (_rle_header(2, 70, 66) + b"\0" * 20, "do not follow"),
        (_rle_header(2, 64, 84) + b"\0" * 20, "do not follow"),
        (_rle_header(2, 64, 1 << 31) + b"\0" * 20, "do not follow"),
    ],
)
def test_an_rle_header_is_looked_at_before_its_segments(frame, wrong):
    """Decoders that believe it read outside the frame: imagecodecs' own crashes."""
    with pytest.raises(ValueError, match=wrong):
        rle_segments(frame, 2)


def test_segments_are_what_lies_between():
    frame = _rle_header(2, 64, 70) + b"aaaaaabbb"
    assert rle_segments(frame, 2) == [b"aaaaaa", b"bbb"]


@pytest.mark.parametrize("syntax", sorted(DECODERS))
def test_the_table_is_of_syntaxes_that_docs_name(syntax):
    text = Path(__file__).parents[2].joinpath("docs", "dicom.md").read_text()
    assert f"`{syntax}`" in text
