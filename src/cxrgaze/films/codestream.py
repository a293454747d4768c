"""A look at a compressed frame before any decoder is called: its size, depth and end.

A decoder believes its codestream: where header and codestream disagree it gives a sheared picture,
takes gigabytes for a few bytes, or decodes what is left of a cut file. JPEG: ITU-T T.81 annex B;
JPEG-LS: T.87 annex C; JPEG 2000: T.800 annexes A and I; JPEG XL: ISO/IEC 18181-1 and 18181-2;
RLE: DICOM PS3.5 annex G.
"""

from __future__ import annotations

import struct
from typing import NamedTuple


class Codestream(NamedTuple):
    """What a codestream says of itself."""

    width: int
    height: int
    components: int | None
    precision: int | None
    """Bits of a sample. None as for the components where it is not looked for (JPEG XL)."""
    is_complete: bool
    """Whether it has its end marker, and all parts that it announces, where the kind has them."""
    is_ycbcr: bool | None = None
    """Whether its three components are luminance and chroma; None where it does not say."""


_SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_BOXES = b"\x00\x00\x00\x0cjP  "
_XL_BOXES = b"\x00\x00\x00\x0cJXL "


def look(frame: bytes) -> Codestream | None:
    """What the codestream of one frame says of itself; None where it is of no kind known here.

    Raises:
        ValueError: it begins as one and its headers are cut or contradict themselves.
    """
    try:
        if frame[:2] == b"\xff\xd8":
            return _jpeg(frame)
        if frame[:8] == _BOXES:
            return _jpeg_2000(frame, _box(frame, b"jp2c"))
        if frame[:4] == b"\xff\x4f\xff\x51":
            return _jpeg_2000(frame, 0)
        if frame[:8] == _XL_BOXES:
            return _jpeg_xl(frame, _box(frame, b"jxlc", b"jxlp"))
        if frame[:2] == b"\xff\x0a":
            return _jpeg_xl(frame, 0)
    except (struct.error, IndexError) as error:
        raise ValueError("the headers of its codestream are cut") from error
    return None


def _jpeg(frame: bytes) -> Codestream:
    at, is_ycbcr = 2, None
    while True:
        if frame[at] != 0xFF:
            raise ValueError("the headers of its codestream are damaged")
        while frame[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker = frame[at + 1]
        if marker in _SOF:
            precision, height, width, components = struct.unpack_from(">BHHB", frame, at + 4)
            space = is_ycbcr if components == 3 else None
            return Codestream(width, height, components, precision, _ends(frame), space)
        if marker == 0xDA:
            raise ValueError("its codestream has no frame header before its data")
        (length,) = (0,) if marker in _ALONE else struct.unpack_from(">H", frame, at + 2)
        if marker == 0xE0 and frame[at + 4 : at + 9] == b"JFIF\0":  # T.871
            is_ycbcr = True
        if marker == 0xEE and frame[at + 4 : at + 9] == b"Adobe":  # T.872
            is_ycbcr = frame[at + 15] != 0
        at += 2 + length


def _jpeg_2000(frame: bytes, start: int) -> Codestream:
    if frame[start : start + 4] != b"\xff\x4f\xff\x51":
        raise ValueError("its JPEG 2000 file has no codestream")
    right, bottom, left, top = struct.unpack_from(">IIII", frame, start + 8)
    (components,) = struct.unpack_from(">H", frame, start + 40)
    precision = (frame[start + 42] & 0x7F) + 1
    complete = _ends(frame) and _has_its_tiles(frame, start)
    return Codestream(right - left, bottom - top, components, precision, complete)


def _has_its_tiles(frame: bytes, start: int) -> bool:
    """Whether the tile-parts that follow one another by their lengths end at the end marker."""
    at = start + 2
    while frame[at : at + 2] != b"\xff\x90":  # the main header, to the first SOT
        if frame[at] != 0xFF:
            raise ValueError("the headers of its codestream are damaged")
        (length,) = struct.unpack_from(">H", frame, at + 2)
        at += 2 + length
    while frame[at : at + 2] == b"\xff\x90":
        (length,) = struct.unpack_from(">I", frame, at + 6)
        if length == 0:  # to the end of the codestream
            return True
        at += length
    return frame[at : at + 2] == b"\xff\xd9"


def _jpeg_xl(frame: bytes, start: int) -> Codestream:
    if frame[start : start + 2] != b"\xff\x0a":
        raise ValueError("its JPEG XL file has no codestream")
    bits = int.from_bytes(frame[start + 2 : start + 14], "little")  # of the size header, the first

    def take(count: int) -> int:
        nonlocal bits
        taken, bits = bits & ((1 << count) - 1), bits >> count
        return taken

    def side() -> int:
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    is_small = take(1) == 1
    height = side()
    across, down = _XL_RATIOS[take(3)]
    width = height * across // down if down else side()
    return Codestream(width, height, None, None, True)


_XL_RATIOS = ((0, 0), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


def _box(frame: bytes, *wanted: bytes) -> int:
    """Where the codestream of a JPEG 2000 or JPEG XL file begins, by its boxes."""
    at = 0
    while at < len(frame):
        length, kind = struct.unpack_from(">I4s", frame, at)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", frame, at + 8)
            header = 16
        if kind in wanted:
            return at + header + (4 if kind == b"jxlp" else 0)  # the number of its part
        if length < header:
            break
        at += length
    raise ValueError("its file of boxes has no codestream")


def _ends(frame: bytes) -> bool:
    """Whether the end marker is there, before padding: the NEMA samples are padded with 0xFF.

    No codestream has it among its data: after 0xFF nothing above 0x8F may follow there.
    """
    return b"\xff\xd9" in frame.rstrip(b"\0")[-64:]


def rle_segments(frame: bytes, count: int) -> list[bytes]:
    """The segments of an RLE frame, as its header has them (PS3.5 G.5).

    Args:
        count: how many there must be: one a byte of a pixel.

    Raises:
        ValueError: another number, or they do not follow one another in the frame.
    """
    if len(frame) < 64:
        raise ValueError("its RLE header is cut")
    found, *starts = struct.unpack_from("<16I", frame)
    if found != count:
        raise ValueError(f"its RLE header has {found} segments, expected {count}")
    ends = [*starts[1:count], len(frame)]
    if starts[0] < 64 or any(a >= b for a, b in zip(starts, ends, strict=False)):
        raise ValueError("the segments of its RLE header do not follow one another")
    return [frame[a:b] for a, b in zip(starts, ends, strict=False)]
