"""Which decoder reads a compressed frame: one table, by transfer syntax.

Each gives the components as they are stored, without a change of their colour space. Why these:
docs/dicom.md#decoders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from imagecodecs import (
    JPEG8,
    jpeg2k_decode,
    jpeg8_decode,
    jpegls_decode,
    jpegxl_decode,
    packbits_decode,
)
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cxrgaze.films.codestream import rle_segments
from cxrgaze.films.quiet import quiet
from cxrgaze.processors import cpu_count

Values = NDArray[np.integer]


class Layout(NamedTuple):
    """What a header says of a frame."""

    rows: int
    columns: int
    samples: int
    """Components of a pixel."""
    allocated: int
    """Bits of a sample in memory, 8 or 16."""
    is_signed: bool


class Decoder(NamedTuple):
    """A decoder of one compressed frame."""

    name: str
    decode: Callable[[bytes, Layout], Values]
    """Frame and layout to `(rows, columns)` or `(rows, columns, samples)`; raises what it will."""


def _openjpeg(frame: bytes, layout: Layout) -> Values:
    return jpeg2k_decode(frame, numthreads=_THREADS)


def _charls(frame: bytes, layout: Layout) -> Values:
    return jpegls_decode(frame)


def _libjpeg_turbo(frame: bytes, layout: Layout) -> Values:
    as_stored: dict[str, Any] = {}
    if layout.samples == 3:  # from any space to the same
        as_stored = {"colorspace": JPEG8.CS.YCbCr, "outcolorspace": JPEG8.CS.YCbCr}
    return jpeg8_decode(frame, **as_stored)


def _libjxl(frame: bytes, layout: Layout) -> Values:
    return jpegxl_decode(frame, keeporientation=True, numthreads=_THREADS)


def _uncompressed(frame: bytes, layout: Layout) -> Values:
    count = layout.rows * layout.columns * layout.samples
    values = np.frombuffer(frame, f"<u{layout.allocated // 8}", count)
    shape = (layout.rows, layout.columns, layout.samples)
    return values.reshape(shape if layout.samples > 1 else shape[:2])


def _packbits(frame: bytes, layout: Layout) -> Values:
    """RLE (PS3.5 annex G): a segment for each byte of a sample, the highest first."""
    size, depth = layout.rows * layout.columns, layout.allocated // 8
    planes = np.empty((layout.samples, size, depth), dtype=np.uint8)
    for number, segment in enumerate(rle_segments(frame, layout.samples * depth)):
        sample, byte = divmod(number, depth)
        planes[sample, :, depth - 1 - byte] = np.frombuffer(
            packbits_decode(segment, out=size), np.uint8
        )
    values = planes.view(f"<u{depth}").reshape(layout.samples, layout.rows, layout.columns)
    return values[0] if layout.samples == 1 else np.moveaxis(values, 0, -1)


def _of_pydicom(syntax: str, plugin: str) -> Callable[[bytes, Layout], Values]:
    """A decoder that pydicom has or knows how to call."""

    def decode(frame: bytes, layout: Layout) -> Values:
        header = Dataset()
        header.Rows, header.Columns, header.SamplesPerPixel = layout[:3]
        header.BitsAllocated = header.BitsStored = layout.allocated
        header.PixelRepresentation = int(layout.is_signed)
        header.PhotometricInterpretation = "MONOCHROME2" if layout.samples == 1 else "YBR_FULL"
        header.PlanarConfiguration = 0
        header.PixelData = encapsulate([frame])
        options: Any = {"correct_unused_bits": False}  # done by the caller, for any HighBit
        with quiet():
            values, _ = get_decoder(syntax).as_array(
                header, index=0, raw=True, decoding_plugin=plugin, **options
            )
        return np.asarray(values)

    return decode


ENCAPSULATED_UNCOMPRESSED = "1.2.840.10008.1.2.1.98"
JPEG_XL = "1.2.840.10008.1.2.4.11"
"""What begins the UIDs of JPEG XL (DICOM Supplement 232), which pydicom 3.0 does not know."""
_THREADS = min(cpu_count(), 4)

_JPEG_2000 = Decoder("OpenJPEG", _openjpeg)
_JPEG_LS = Decoder("CharLS", _charls)
_JPEG = Decoder("libjpeg-turbo", _libjpeg_turbo)
_LIBJXL = Decoder("libjxl", _libjxl)

DECODERS: dict[str, tuple[Decoder, ...]] = {
    JPEG2000Lossless: (_JPEG_2000, Decoder("pillow", _of_pydicom(JPEG2000Lossless, "pillow"))),
    JPEG2000: (_JPEG_2000, Decoder("pillow", _of_pydicom(JPEG2000, "pillow"))),
    HTJ2KLossless: (_JPEG_2000,),
    HTJ2KLosslessRPCL: (_JPEG_2000,),
    HTJ2K: (_JPEG_2000,),
    JPEGLSLossless: (_JPEG_LS,),
    JPEGLSNearLossless: (_JPEG_LS,),
    RLELossless: (
        Decoder("PackBits", _packbits),
        Decoder("pydicom", _of_pydicom(RLELossless, "pydicom")),
    ),
    JPEGBaseline8Bit: (_JPEG,),
    JPEGExtended12Bit: (_JPEG,),
    JPEGLossless: (_JPEG,),
    JPEGLosslessSV1: (_JPEG,),
    ENCAPSULATED_UNCOMPRESSED: (Decoder("numpy", _uncompressed),),
    f"{JPEG_XL}0": (_LIBJXL,),
    f"{JPEG_XL}1": (_LIBJXL,),
    f"{JPEG_XL}2": (_LIBJXL,),
}
"""Decoders by compressed transfer syntax; the next is asked where one fails."""
