"""A look at a compressed frame before any decoder is called: its size, depth and end.

A decoder believes its codestream: where header and codestream disagree it gives a sheared picture,
takes gigabytes for a few bytes, or decodes what is left of a cut file. JPEG: ITU-T T.81 annex B;
JPEG-LS: T.87 annex C; JPEG 2000: T.800 annexes A and I.
"""

from __future__ import annotations

import struct
from typing import NamedTuple


class Codestream(NamedTuple):
    """What a codestream says of itself."""

    width: int
    height: int
    components: int
    precision: int
    """Bits of a sample."""
    is_complete: bool
    """Whether it has its end marker, and all parts that it announces."""


_SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_BOXES = b"\x00\x00\x00\x0cjP  "


def look(frame: bytes) -> Codestream | None:
    """What the codestream of one frame says of itself; None where it is of no kind known here.

    Raises:
        ValueError: it begins as one and its headers are cut or contradict themselves.
    """
    try:
        if frame[:2] == b"\xff\xd8":
            return _jpeg(frame)
        if frame[:8] == _BOXES:
            return _jpeg_2000(frame, _contiguous(frame))
        if frame[:4] == b"\xff\x4f\xff\x51":
            return _jpeg_2000(frame, 0)
    except (struct.error, IndexError) as error:
        raise ValueError("the headers of its codestream are cut") from error
    return None


def _jpeg(frame: bytes) -> Codestream:
    at = 2
    while True:
        if frame[at] != 0xFF:
            raise ValueError("the headers of its codestream are damaged")
        while frame[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker = frame[at + 1]
        if marker in _SOF:
            precision, height, width, components = struct.unpack_from(">BHHB", frame, at + 4)
            return Codestream(width, height, components, precision, _ends(frame))
        if marker == 0xDA:
            raise ValueError("its codestream has no frame header before its data")
        (length,) = (0,) if marker in _ALONE else struct.unpack_from(">H", frame, at + 2)
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


def _contiguous(frame: bytes) -> int:
    """Where the codestream of a JPEG 2000 file begins, by its boxes."""
    at = 0
    while at < len(frame):
        length, kind = struct.unpack_from(">I4s", frame, at)
        header = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", frame, at + 8)
            header = 16
        if kind == b"jp2c":
            return at + header
        if length < header:
            break
        at += length
    raise ValueError("its JPEG 2000 file has no codestream")


def _ends(frame: bytes) -> bool:
    """Whether the end marker stands last, but for padding to an even length."""
    return frame[-64:].rstrip(b"\0").endswith(b"\xff\xd9")
