"""A look at a codestream before it is decoded: its size, depth and end against the header."""

from __future__ import annotations

import io
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless

from cxrgaze.errors import FilmError
from cxrgaze.films.codestream import look

QUICK = settings(derandomize=True, max_examples=25, deadline=None)
SIDES = st.integers(1, 70)
WIDE = st.integers(33, 90)  # OpenJPEG encodes nothing smaller with its six resolutions


def _jpeg(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _drawn(shape, bits, seed=1):
    kind = np.uint8 if bits <= 8 else np.uint16
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(kind)


# --- what encoders write ------------------------------------------------------------------------


@QUICK
@given(rows=WIDE, columns=WIDE, bits=st.integers(2, 16), boxed=st.booleans(), rgb=st.booleans())
def test_jpeg_2000_of_every_size_and_depth(made, rows, columns, bits, boxed, rgb):
    shape = (rows, columns, 3) if rgb else (rows, columns)
    stream = made.j2k(_drawn(shape, bits), bits, codec_format=int(boxed))
    assert look(stream)[:5] == (columns, rows, 3 if rgb else 1, bits, True)
    assert look(stream + b"\0") == look(stream)


@QUICK
@given(rows=WIDE, columns=WIDE, bits=st.integers(2, 16))
def test_jpeg_ls_of_every_size_and_depth(made, rows, columns, bits):
    pixels = _drawn((rows, columns), bits) // 4  # its encoder has no room for noise
    pixels[0, 0] = 2**bits - 1  # its encoder takes the depth from the largest value
    assert look(made.jls(pixels))[:5] == (columns, rows, 1, bits, True)


@QUICK
@given(rows=SIDES, columns=SIDES, rgb=st.booleans(), progressive=st.booleans())
def test_jpeg_of_every_size(rows, columns, rgb, progressive):
    pixels = _drawn((rows, columns, 3) if rgb else (rows, columns), 8)
    options = {"progressive": progressive, "comment": b"\xff\xd9 no end"}
    stream = _jpeg(pixels, **options)
    assert look(stream)[:5] == (columns, rows, 3 if rgb else 1, 8, True)


# --- streams by hand, from T.81 and T.800 -------------------------------------------------------

SOF = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7)


@pytest.mark.parametrize("marker", SOF)
@pytest.mark.parametrize("fill", [b"", b"\xff", b"\xff" * 7])
def test_every_frame_header_of_jpeg_is_known(marker, fill):
    comment = b"\xff\xfe" + struct.pack(">H", 6) + b"\xff\xc0\0\0"
    head = struct.pack(">HBHHB", 11, 12, 391, 368, 1) + bytes([1, 0x11, 0])
    stream = b"\xff\xd8" + comment + fill + b"\xff" + bytes([marker]) + head
    assert look(stream + b"\xff\xda\0\x08....\xff\xd9")[:5] == (368, 391, 1, 12, True)
    assert look(stream + b"\xff\xda\0\x08....")[:5] == (368, 391, 1, 12, False)


def test_a_table_is_no_frame_header():
    """DHT, JPG and DAC stand among the numbers of the frame headers (T.81 table B.1)."""
    head = struct.pack(">HBHHB", 11, 8, 5, 7, 1) + bytes([1, 0x11, 0])
    others = b"".join(b"\xff" + bytes([m]) + struct.pack(">H", 4) + b"\1\2" for m in b"\xc4\xcc")
    assert look(b"\xff\xd8" + others + b"\xff\xc0" + head + b"\xff\xd9")[:5] == (7, 5, 1, 8, True)


def _by_hand(*parts, size=(368, 391), origin=(0, 0), depth=12, signed=False, end=b"\xff\xd9"):
    """A codestream of tile-parts of given lengths; 0 is one to the end (T.800 A.4.2, A.5.1)."""
    right, bottom = size[0] + origin[0], size[1] + origin[1]
    siz = struct.pack(">HIIIIIIIIH", 0, right, bottom, *origin, right, bottom, *origin, 1)
    siz += bytes([depth - 1 | signed << 7, 1, 1])
    stream = b"\xff\x4f\xff\x51" + struct.pack(">H", len(siz) + 2) + siz
    stream += b"\xff\x5c" + struct.pack(">H", 5) + b"\xff\x90\0"  # QCD whose value looks like SOT
    for index, length in enumerate(parts):
        body = b"\xff\x93" + b"\x11" * ((length or 40) - 14)
        stream += b"\xff\x90" + struct.pack(">HHIBB", 10, index, length, 0, 1) + body
    return stream + end


@pytest.mark.parametrize("parts", [(20,), (20, 33, 14), (0,), (50, 0), (14,) * 40])
@pytest.mark.parametrize("pad", [b"", b"\0"])
def test_tile_parts_are_counted(parts, pad):
    assert look(_by_hand(*parts) + pad)[:5] == (368, 391, 1, 12, True)


@pytest.mark.parametrize("parts", [(20,), (20, 33, 14), (0,), (50, 0)])
def test_a_missing_end_and_a_missing_tile_part_are_seen(parts):
    assert not look(_by_hand(*parts, end=b"")).is_complete
    if parts[-1]:
        whole = _by_hand(*parts)
        hole = whole[: -parts[-1] // 2] + b"\xff\xd9"
        assert not look(hole).is_complete


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("origin", [(0, 0), (5, 9)])
def test_sign_and_origin_of_the_grid_do_not_count(signed, origin):
    stream = _by_hand(20, signed=signed, origin=origin, depth=16)
    assert look(stream)[:5] == (368, 391, 1, 16, True)


@pytest.mark.parametrize("extended", [False, True])
def test_boxes_before_the_codestream_are_stepped_over(extended):
    boxes = struct.pack(">I4sI", 12, b"jP  ", 0x0D0A870A) + struct.pack(">I4s", 20, b"ftyp")
    boxes += b"\xff\x4f\xff\x51" * 3
    stream = _by_hand(20)
    head = struct.pack(">I4s", 8 + len(stream), b"jp2c")
    if extended:
        head = struct.pack(">I4sQ", 1, b"jp2c", 16 + len(stream))
    assert look(boxes + head + stream) == look(stream)
    assert look(boxes + struct.pack(">I4s", 0, b"jp2c") + stream) == look(stream)
    with pytest.raises(ValueError):
        look(boxes)
    with pytest.raises(ValueError):
        look(boxes + struct.pack(">I4s", 3, b"jp2h"))


@pytest.mark.parametrize("data", [b"", b"\0\0", b"BM12", b"\x89PNG\r\n\x1a\n", b"\2\0\0\0" * 16])
def test_what_is_of_no_known_kind_is_nothing(data):
    assert look(data) is None


def test_what_contradicts_itself_is_said():
    stream = _by_hand(20)
    table = stream.index(b"\xff\x5c")
    boxes = struct.pack(">I4sI", 12, b"jP  ", 0x0D0A870A) + struct.pack(">I4s", 0, b"jp2c")
    for data, message in (
        (b"\xff\xd8\0\xc0" + bytes(20), "headers of its codestream are damaged"),
        (stream[:table] + b"\0" + stream[table + 1 :], "headers of its codestream are damaged"),
        (b"\xff\xd8\xff\xda\0\x08....", "no frame header before its data"),
        (boxes + b"\0" + stream[1:], "JPEG 2000 file has no codestream"),
        (b"\xff\xd8\xff\xc0\0", "headers of its codestream are cut"),
    ):
        with pytest.raises(ValueError, match=message):
            look(data)


# --- damage -------------------------------------------------------------------------------------


def _streams(made):
    grey = made.DRAWN
    return {
        "j2k": made.j2k(made.STORED, 12),
        "jp2": made.j2k(made.STORED, 12, codec_format=1),
        "jls": made.jls(made.STORED),
        "jpeg": _jpeg(grey),
        "progressive": _jpeg(grey, progressive=True),
    }


@pytest.mark.parametrize("kind", ["j2k", "jp2", "jls", "jpeg", "progressive"])
def test_a_cut_is_seen_wherever_it_is(made, kind):
    whole = _streams(made)[kind]
    for length in range(12, len(whole), 7):
        for tail in (b"", b"\0" * (len(whole) - length)):
            try:
                stream = look(whole[:length] + tail)
            except ValueError:
                continue
            assert stream is not None and not stream.is_complete, (length, len(tail))


@QUICK
@given(data=st.data())
def test_nothing_but_a_value_error_is_raised(made, data):
    whole = bytearray(_streams(made)[data.draw(st.sampled_from(["j2k", "jp2", "jls", "jpeg"]))])
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, min(len(whole) - 1, 400)))] = data.draw(st.integers(0, 255))
    try:
        look(bytes(whole))
    except ValueError:
        pass


# --- against the header -------------------------------------------------------------------------

SYNTAX = {"j2k": JPEG2000Lossless, "jls": JPEGLSLossless, "jpeg": JPEGBaseline8Bit}


def _dicom(made, kind, stream, **tags):
    pixels = made.DRAWN if kind == "jpeg" else made.STORED
    bits = 8 if kind == "jpeg" else 12
    payload = made.encapsulated(stream)
    return made.file(pixels, syntax=SYNTAX[kind], bits=bits, payload=payload, **tags)


@pytest.mark.parametrize("kind", SYNTAX)
def test_a_whole_stream_is_read(made, kind):
    film = made.film(_dicom(made, kind, _streams(made)[kind], **made.WINDOW))
    assert film.shape == (60, 48) and not film.reasons


@pytest.mark.parametrize("kind", SYNTAX)
@pytest.mark.parametrize(
    "wrong",
    [{"Rows": 48, "Columns": 60}, {"Rows": 59}, {"Columns": 49}, {"SamplesPerPixel": 3}],
    ids=["swapped", "a row less", "a column more", "samples"],
)
def test_another_size_than_the_headers_is_refused(made, kind, wrong):
    stream = _streams(made)[kind]
    with pytest.raises(FilmError, match="its codestream is of 48 x 60 pixels of 1 samples"):
        made.film(_dicom(made, kind, stream, **wrong))


@pytest.mark.parametrize("padding", [b"\xff", b"\0", b"\0" * 5000, b"\xff\0", b"\xff" * 6])
@pytest.mark.parametrize("kind", ["j2k", "jls", "jpeg"])
def test_padding_after_the_end_is_no_cut(made, kind, padding):
    """The samples of NEMA's WG-04, and most of what was made with their encoder, end in 0xFF."""
    stream = _streams(made)[kind]
    assert look(stream + padding).is_complete
    plain = made.film(_dicom(made, kind, stream))
    assert np.array_equal(made.film(_dicom(made, kind, stream + padding)).pixels, plain.pixels)


def test_a_stream_that_is_damaged_or_cut_is_refused_with_what_is_wrong(made):
    stream = _streams(made)["jpeg"]
    with pytest.raises(FilmError, match="damaged: its codestream has no frame header before"):
        made.film(_dicom(made, "jpeg", b"\xff\xd8\xff\xda" + stream[2:]))
    with pytest.raises(FilmError, match="cut short: its codestream does not reach its end"):
        made.film(_dicom(made, "jpeg", stream[:-2]))


@pytest.mark.parametrize("kind", ["j2k", "jls"])
def test_a_stream_deeper_than_its_words_is_refused(made, kind):
    with pytest.raises(FilmError, match="has 12 bits a sample, its header allocates 8"):
        data = _dicom(made, kind, _streams(made)[kind], BitsAllocated=8, BitsStored=8, HighBit=7)
        made.film(data)


@pytest.mark.parametrize("kind", SYNTAX)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_cut_stream_is_refused_at_once_and_called_cut(made, kind, share, zeros):
    whole = _streams(made)[kind]
    kept = int(share * len(whole))
    stream = whole[:kept] + b"\0" * (len(whole) - kept) * zeros
    if kind == "jpeg" and share == 0.3:
        pytest.skip("cut within its tables, which is damaged")
    start = time.perf_counter()
    with pytest.raises(FilmError, match="cut short"):
        made.film(_dicom(made, kind, stream))
    assert time.perf_counter() - start < 0.5


def test_a_large_cut_jpeg_ls_is_refused_at_once(made):
    pixels = _drawn((1200, 1000), 12)
    stream = made.jls(pixels)[:-1000]
    data = made.file(pixels, syntax=JPEGLSLossless, payload=made.encapsulated(stream))
    start = time.perf_counter()
    with pytest.raises(FilmError, match="cut short"):
        made.film(data)
    assert time.perf_counter() - start < 0.8


def test_a_bomb_is_refused_before_it_takes_memory(made):
    """A few bytes that announce 30000 x 30000 pixels under a header of a small film."""
    stream = _by_hand(20, size=(30000, 30000))
    with pytest.raises(FilmError, match="30000 x 30000"):
        made.film(_dicom(made, "j2k", stream))


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7, 0.98])
@pytest.mark.parametrize("kind", SYNTAX)
def test_a_file_cut_in_its_pixel_data_is_called_cut(made, kind, share):
    data = _dicom(made, kind, _streams(made)[kind], **made.WINDOW)
    start = data.index(b"\xe0\x7f\x10\0")
    cut = data[: start + int(share * (len(data) - start))]
    with pytest.raises(FilmError, match="cut short"):
        made.film(cut)
