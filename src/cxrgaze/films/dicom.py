"""DICOM to Film: every container of one radiograph gives the same pixels.

Messages name attributes and transfer syntaxes, never header values that could identify a patient.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import Decoder, get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cxrgaze.errors import FilmError, NotApplicableError
from cxrgaze.files import sha256
from cxrgaze.films.applicability import judge_header
from cxrgaze.films.codestream import look
from cxrgaze.films.display import displayed, spacing_mm, square_reason
from cxrgaze.films.film import PIXEL_LIMIT, Film
from cxrgaze.films.header import attribute, number, text, transfer_syntax
from cxrgaze.films.identity import DicomIdentity
from cxrgaze.films.images import colour_reason
from cxrgaze.films.windows import Window

NO_IMAGE = "a DICOM object without an image (report, presentation state, directory, ...)"
INFLATED_LIMIT = 1 << 29
"""Bytes that a deflated data set may inflate to."""

PLUGINS = {
    JPEG2000: "pylibjpeg",
    JPEG2000Lossless: "pylibjpeg",
    JPEGLSLossless: "pyjpegls",
    JPEGLSNearLossless: "pyjpegls",
    RLELossless: "pylibjpeg",
    JPEGBaseline8Bit: "pillow",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
}
"""Decoder by compressed transfer syntax: the fastest that may ship (docs/dicom.md#decoders)."""


def film_from_dicom(data: bytes, name: str, window: Window | None = None) -> Film:
    """The film in the bytes of a DICOM file.

    Args:
        window: see `film_from_bytes`.

    Raises:
        FilmError: not DICOM, no pixels, too large, or a transfer syntax that no installed decoder
            reads; the message says which.
        BaseException: a damaged file raises anything inside pydicom and the decoders, which
            `film_from_bytes` makes a FilmError.
    """
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")  # pydicom's warnings quote header values
        return _film(_parse(data, name), data, name, window)


def _film(dataset: Dataset, data: bytes, name: str, window: Window | None) -> Film:
    reasons, doubts = judge_header(dataset)
    notes = (*doubts, *_complete(dataset))
    shape = _checked_shape(dataset, name)
    stored = _stored_values(dataset, name)
    if text(dataset, "PhotometricInterpretation") == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        dataset.BitsStored = 8 * stored.dtype.itemsize
    if stored.ndim == 3:
        stored, colour = _grey(dataset, stored)
        reasons += colour
    reasons += square_reason(dataset)
    if stored.shape != shape:
        raise FilmError(f"{name}: decoded to {stored.shape} pixels, its header says {shape}")
    pixels, source, more = displayed(dataset, stored, window)
    return Film(
        pixels,
        name,
        sha256(data),
        source,
        spacing_mm(dataset),
        reasons,
        (*notes, *more),
        DicomIdentity.of(dataset),
    )


def _grey(
    dataset: Dataset, channels: NDArray[np.integer]
) -> tuple[NDArray[np.integer], tuple[str, ...]]:
    """Grey values `(H, W)` of a colour image `(H, W, 3)`, and why it is no radiograph, if so.

    Secondary captures often hold grey content in colour: channels that agree are grey.
    """
    white = 2 ** int(dataset.BitsStored) - 1
    if text(dataset, "PhotometricInterpretation").startswith("YBR"):  # PS3.3 C.7.6.3.1.2
        chroma = channels[..., 1:].astype(np.int64) - (white + 1) // 2
        spread = 2 * float(np.abs(chroma).mean()) / white
        return channels[..., 0], colour_reason(spread)
    spread = float((channels.max(axis=2).astype(np.int64) - channels.min(axis=2)).mean()) / white
    return np.rint(channels.mean(axis=2)).astype(channels.dtype), colour_reason(spread)


def _complete(dataset: Dataset) -> tuple[str, ...]:
    """Fill in what a grey film must have and some lack; notes where that is an assumption."""
    for keyword, value in (("SamplesPerPixel", 1), ("PixelRepresentation", 0)):
        if attribute(dataset, keyword) is None:
            setattr(dataset, keyword, value)
    if "NumberOfFrames" in dataset and number(dataset, "NumberOfFrames") is None:
        del dataset.NumberOfFrames
    if attribute(dataset, "BitsStored") is None:
        dataset.BitsStored = dataset.BitsAllocated
    if attribute(dataset, "PhotometricInterpretation") is None:
        dataset.PhotometricInterpretation = "MONOCHROME2"
        return ("the file does not say whether white is high or low; MONOCHROME2 was assumed",)
    dataset.PhotometricInterpretation = text(dataset, "PhotometricInterpretation")
    return ()


def _parse(data: bytes, name: str) -> Dataset:
    file = io.BytesIO(data)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        _check_inflated_size(data[file.tell() :], name)
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    if "Rows" in dataset and "PixelData" not in dataset:
        raise FilmError(f"{name}: cut short, or without pixel data: its header ends before them")
    if "Rows" not in dataset:
        sop_class = UID(text(dataset, "SOPClassUID"))
        if sop_class and "Image Storage" not in sop_class.name:
            raise NotApplicableError((NO_IMAGE,))
        if not dataset and data[128:132] == b"DICM":
            raise FilmError(f"{name}: cut short or damaged: its data set cannot be read to its end")
        raise FilmError(f"{name}: not a DICOM image: it has no pixel data")
    return dataset


def _check_inflated_size(deflated: bytes, name: str) -> None:
    """Inflate without keeping anything: a deflate bomb is refused before it takes memory."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    total, rest = 0, deflated
    while rest and not inflater.eof:
        total += len(inflater.decompress(rest, 1 << 20))
        rest = inflater.unconsumed_tail
        if total > INFLATED_LIMIT:
            raise FilmError(f"{name}: inflates to more than {INFLATED_LIMIT >> 20} MiB; refused")


def _checked_shape(dataset: Dataset, name: str) -> tuple[int, int]:
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    samples = number(dataset, "SamplesPerPixel") or 1
    if rows < 1 or columns < 1 or rows * columns * samples > PIXEL_LIMIT:
        raise FilmError(f"{name}: {columns} x {rows} pixels, expected 1 to {PIXEL_LIMIT} in all")
    if int(dataset.BitsAllocated) not in (8, 16):
        raise FilmError(f"{name}: {dataset.BitsAllocated} bits allocated, expected 8 or 16")
    return rows, columns


def _stored_values(dataset: Dataset, name: str) -> NDArray[np.integer]:
    """The stored values of the first frame `(rows, columns)`, unused and overlay bits dropped."""
    syntax = transfer_syntax(dataset)
    bits, plugin = int(dataset.BitsStored), PLUGINS.get(syntax, "")
    if syntax == JPEGExtended12Bit:
        plugin = "pillow" if bits == 8 else "pylibjpeg"  # 12 bits: only the GPL decoder reads them
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise FilmError(f"{name}: transfer syntax {syntax.name} ({syntax}) is not read") from None
    if not decoder.is_native and plugin not in decoder.available_plugins:
        if syntax == JPEGExtended12Bit or not decoder.is_available:
            raise FilmError(_missing_decoder(name, syntax))
        plugin = ""  # any that is there
    is_one = (number(dataset, "NumberOfFrames") or 1) <= 1
    if not decoder.is_native and is_one:
        frame = b"".join(fragments(dataset.PixelData))
        _require_codestream(dataset, frame, name)
        dataset.PixelData = encapsulate([frame])  # whatever its offset table said
    elif decoder.is_native and len(dataset.PixelData) < (needed := _native_bytes(dataset)):
        raise FilmError(
            f"{name}: cut short: {len(dataset.PixelData)} of {needed} bytes of pixel data"
        )
    values, decoded = _decoded(decoder, dataset, plugin)
    if values.ndim == 3:  # some decoders change the colour space
        dataset.PhotometricInterpretation = str(decoded["photometric_interpretation"])
    spare = 8 * values.dtype.itemsize - bits
    drop = 0
    if decoder.is_native or syntax == RLELossless:  # these carry the allocated bits as they are
        high = number(dataset, "HighBit")
        drop = min(max(int(bits - 1 if high is None else high) + 1 - bits, 0), spare)
    return np.asarray((values >> drop << spare) >> spare)  # arithmetic shifts keep a sign


def _decoded(
    decoder: Decoder, dataset: Dataset, preferred: str
) -> tuple[NDArray[np.integer], dict[str, Any]]:
    """The first frame by the preferred plugin, by the next ones where it fails."""
    others = [plugin for plugin in decoder.available_plugins if plugin != preferred]
    plugins = [preferred, *others] if preferred else others or [""]
    options: Any = {"correct_unused_bits": False}  # done by the caller, for any HighBit
    for number_left, plugin in zip(reversed(range(len(plugins))), plugins, strict=True):
        try:
            return decoder.as_array(dataset, index=0, raw=True, decoding_plugin=plugin, **options)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # decoders in Rust raise what is no Exception
            if not number_left:
                raise
    raise AssertionError("there is always one plugin")


def fragments(pixel_data: bytes) -> Iterator[bytes]:
    """The fragments of encapsulated pixel data, the Basic Offset Table left out (PS3.5 A.4)."""
    at, first = 0, True
    while at + 8 <= len(pixel_data):
        group, element, length = struct.unpack_from("<HHI", pixel_data, at)
        if (group, element) != (0xFFFE, 0xE000):
            return
        if not first:
            yield pixel_data[at + 8 : at + 8 + length]
        at, first = at + 8 + length, False


def _require_codestream(dataset: Dataset, frame: bytes, name: str) -> None:
    """Refuse a codestream that is cut or is not the film of the header, before it is decoded.

    Raises:
        FilmError: saying what was found and what the header says.
    """
    try:
        stream = look(frame)
    except ValueError as error:
        raise FilmError(f"{name}: damaged: {error}") from None
    if stream is None:
        return
    said = int(dataset.Columns), int(dataset.Rows), int(number(dataset, "SamplesPerPixel") or 1)
    if stream[:3] != said:
        raise FilmError(
            f"{name}: its codestream is of {stream.width} x {stream.height} pixels of "
            f"{stream.components} samples, its header says {said[0]} x {said[1]} of {said[2]}"
        )
    if stream.precision > int(dataset.BitsAllocated):
        raise FilmError(
            f"{name}: its codestream has {stream.precision} bits a sample, its header allocates "
            f"{dataset.BitsAllocated}"
        )
    if not stream.is_complete:
        raise FilmError(f"{name}: cut short: its codestream does not reach its end")


def _native_bytes(dataset: Dataset) -> int:
    """Bytes that uncompressed pixel data of this header take."""
    pixels = int(dataset.Rows) * int(dataset.Columns) * int(number(dataset, "NumberOfFrames") or 1)
    is_halved = text(dataset, "PhotometricInterpretation") == "YBR_FULL_422"
    samples = 2 if is_halved else int(number(dataset, "SamplesPerPixel") or 1)
    return pixels * samples * int(dataset.BitsAllocated) // 8


def _missing_decoder(name: str, syntax: UID) -> str:
    if syntax == JPEGExtended12Bit:
        return (
            f"{name}: {syntax.name} ({syntax}) of 12 bits needs the package pylibjpeg-libjpeg, "
            "which is under the GPL and not part of cxrgaze; run: pip install pylibjpeg-libjpeg"
        )
    return (
        f"{name}: no decoder for {syntax.name} ({syntax}); reinstall cxrgaze with its dependencies"
    )
