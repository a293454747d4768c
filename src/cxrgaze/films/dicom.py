"""DICOM to Film: every container of one radiograph gives the same pixels.

Messages name attributes and transfer syntaxes, never header values that could identify a patient.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
)

from cxrgaze.errors import INTERRUPTS, FilmError, NotApplicableError
from cxrgaze.files import sha256
from cxrgaze.films.applicability import judge_header
from cxrgaze.films.codestream import Codestream, look
from cxrgaze.films.decoders import DECODERS, ENCAPSULATED_UNCOMPRESSED, JPEG_XL, Layout
from cxrgaze.films.display import displayed, is_inverted, spacing_mm, square_reason
from cxrgaze.films.film import PIXEL_LIMIT, Film, Stored
from cxrgaze.films.header import attribute, number, text, transfer_syntax
from cxrgaze.films.identity import DicomIdentity
from cxrgaze.films.images import colour_reason
from cxrgaze.films.quiet import quiet
from cxrgaze.films.windows import Window

NO_IMAGE = "a DICOM object without an image (report, presentation state, directory, ...)"
INFLATED_LIMIT = 1 << 29
"""Bytes that a deflated data set may inflate to."""


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
    with quiet():
        dataset = _parse(data, name)
        reasons, doubts = judge_header(dataset)
        notes = (*doubts, *_complete(dataset))
        shape = _checked_shape(dataset, name)
        frame = _frame(dataset, name)
    decoded = _decoded(frame, name)  # outside: it takes the longest
    with quiet():
        stored = _used_bits(dataset, frame, decoded)
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
            stored=Stored(stored, int(dataset.BitsStored), is_inverted(dataset)),
        )


def promised_samples(data: bytes) -> int:
    """How many samples a frame has by the header of a DICOM file; 0 where it does not say."""
    keywords = ["Rows", "Columns", "SamplesPerPixel"]
    with quiet():
        _check_inflated_size(data, "the file")
        header = pydicom.dcmread(
            io.BytesIO(data), stop_before_pixels=True, force=True, specific_tags=keywords
        )
    rows, columns, samples = (number(header, keyword) or 0 for keyword in keywords)
    return int(rows * columns * (samples or 1))


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
    _check_inflated_size(data, name)
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


def _check_inflated_size(data: bytes, name: str) -> None:
    """Inflate without keeping anything: a deflate bomb is refused before it takes memory."""
    file = io.BytesIO(data)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    total, rest = 0, data[file.tell() :]
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


class _Frame(NamedTuple):
    """The first frame of a data set, not decoded yet."""

    syntax: UID
    layout: Layout
    data: bytes
    """As it is compressed; empty where it is not."""
    values: NDArray[np.integer] | None
    """Where it is not compressed."""


def stored_values(dataset: Dataset, name: str) -> NDArray[np.integer]:
    """The stored values of the first frame `(rows, columns)`, unused and overlay bits dropped.

    Raises:
        BaseException: as `film_from_dicom`.
    """
    frame = _frame(dataset, name)
    return _used_bits(dataset, frame, _decoded(frame, name))


def _frame(dataset: Dataset, name: str) -> _Frame:
    syntax = transfer_syntax(dataset)
    layout = Layout(
        int(dataset.Rows),
        int(dataset.Columns),
        int(number(dataset, "SamplesPerPixel") or 1),
        int(dataset.BitsAllocated),
        number(dataset, "PixelRepresentation") == 1,
    )
    if syntax not in DECODERS:
        return _Frame(syntax, layout, b"", _native(dataset, syntax, name))
    frames = int(number(dataset, "NumberOfFrames") or 1)
    if frames > 1:
        data = get_frame(dataset.PixelData, 0, number_of_frames=frames)
    else:
        data = b"".join(fragments(dataset.PixelData))  # whatever its offset table says
    stream = _require_codestream(dataset, data, name)
    _set_colour_space(dataset, syntax, stream)
    return _Frame(syntax, layout, data, None)


def _used_bits(dataset: Dataset, frame: _Frame, values: NDArray[np.integer]) -> NDArray[np.integer]:
    """Decoded values in the header's type, without bits above Bits Stored."""
    bits, allocated = int(dataset.BitsStored), frame.layout.allocated
    kind = np.dtype(f"{'i' if frame.layout.is_signed else 'u'}{allocated // 8}")
    values = values.astype(f"u{kind.itemsize}", copy=False).view(kind)
    spare, drop = allocated - bits, 0
    if frame.values is not None or frame.syntax in _AS_ALLOCATED:
        high = number(dataset, "HighBit")
        drop = min(max(int(bits - 1 if high is None else high) + 1 - bits, 0), spare)
    if drop or spare:  # arithmetic shifts keep a sign
        values = (values >> drop << spare) >> spare
    return values


_AS_ALLOCATED = (RLELossless, ENCAPSULATED_UNCOMPRESSED)
"""Compressed syntaxes that carry the allocated bits as they are."""


def _native(dataset: Dataset, syntax: UID, name: str) -> NDArray[np.integer]:
    """The first frame of uncompressed pixel data."""
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        decoder = None
    if decoder is None or not decoder.is_native:
        raise FilmError(f"{name}: transfer syntax {syntax.name} ({syntax}) is not read")
    if len(dataset.PixelData) < (needed := _native_bytes(dataset)):
        raise FilmError(
            f"{name}: cut short: {len(dataset.PixelData)} of {needed} bytes of pixel data"
        )
    options: Any = {"correct_unused_bits": False}  # done by `_used_bits`, for any HighBit
    values, _ = decoder.as_array(dataset, index=0, raw=True, **options)
    return np.asarray(values)


def _decoded(frame: _Frame, name: str) -> NDArray[np.integer]:
    """The values of a frame, by the first decoder that reads it; touches no header."""
    if frame.values is not None:
        return frame.values
    decoders = DECODERS[frame.syntax]
    for decoder in decoders:
        try:
            return decoder.decode(frame.data, frame.layout)
        except (*INTERRUPTS, MemoryError):
            raise
        except BaseException as error:
            if decoder is decoders[-1]:
                kind = type(error).__name__  # its message may quote the file
                what = f"damaged: {decoder.name} does not read its codestream ({kind})"
                raise FilmError(f"{name}: {what}") from None
    raise AssertionError("there is always one decoder")


def _set_colour_space(dataset: Dataset, syntax: UID, stream: Codestream | None) -> None:
    """Note what the decoded components are, where they are others than the header says."""
    said = text(dataset, "PhotometricInterpretation")
    if stream and stream.is_ycbcr is not None:
        dataset.PhotometricInterpretation = "YBR_FULL" if stream.is_ycbcr else "RGB"
    elif said in ("YBR_ICT", "YBR_RCT") or syntax.startswith(JPEG_XL):  # undone by the decoder
        dataset.PhotometricInterpretation = "RGB"


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


def _require_codestream(dataset: Dataset, frame: bytes, name: str) -> Codestream | None:
    """What a codestream says of itself, once it is whole and the film of the header.

    It is refused before it is decoded.

    Raises:
        FilmError: saying what was found and what the header says.
    """
    try:
        stream = look(frame)
    except ValueError as error:
        raise FilmError(f"{name}: damaged: {error}") from None
    if stream is None:
        return None
    said = int(dataset.Columns), int(dataset.Rows), int(number(dataset, "SamplesPerPixel") or 1)
    if (stream.width, stream.height, stream.components or said[2]) != said:
        raise FilmError(
            f"{name}: its codestream is of {stream.width} x {stream.height} pixels of "
            f"{stream.components or 'some'} samples, its header says {said[0]} x {said[1]} of "
            f"{said[2]}"
        )
    if (stream.precision or 0) > int(dataset.BitsAllocated):
        raise FilmError(
            f"{name}: its codestream has {stream.precision} bits a sample, its header allocates "
            f"{dataset.BitsAllocated}"
        )
    if not stream.is_complete:
        raise FilmError(f"{name}: cut short: its codestream does not reach its end")
    return stream


def _native_bytes(dataset: Dataset) -> int:
    """Bytes that uncompressed pixel data of this header take."""
    pixels = int(dataset.Rows) * int(dataset.Columns) * int(number(dataset, "NumberOfFrames") or 1)
    is_halved = text(dataset, "PhotometricInterpretation") == "YBR_FULL_422"
    samples = 2 if is_halved else int(number(dataset, "SamplesPerPixel") or 1)
    return pixels * samples * int(dataset.BitsAllocated) // 8
