"""DICOM files made for tests, and slow references from the text of PS3.3, pixel by pixel."""

from __future__ import annotations

import io
import math
import struct
import warnings

import jpeg_ls
import numpy as np
import pydicom
from openjpeg.utils import encode_array
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import (
    UID,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from cxrgaze.evidence import phantom
from cxrgaze.films.decode import film_from_bytes

DRAWN = phantom.draw(3, shape=(60, 48)).pixels
STORED = DRAWN.astype(np.uint16) * 12 + 300  # uses 12 bits: 300 to 3360
WINDOW = {"WindowCenter": 1700, "WindowWidth": 2200}
SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian)


def file(
    pixels=STORED, *, syntax=ExplicitVRLittleEndian, bits=12, drop=(), payload=None, **tags
) -> bytes:
    """A DX For Presentation file with `tags`, without the attributes in `drop`.

    Args:
        payload: pixel data as they stand in the file, in place of those of `pixels`.
    """
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "2.25.1"
    meta.ImplementationClassUID = "2.25.2"
    meta.FileMetaInformationVersion = b"\0\1"
    meta.FileMetaInformationGroupLength = 0  # filled in by the writer
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, "2.25.1"
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "DX", "CHEST", "PA"
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.BitsAllocated = 8 * pixels.dtype.itemsize
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, 0
    big = syntax == ExplicitVRBigEndian
    native = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these files are wrong on purpose
        for name, value in tags.items():
            setattr(ds, name, value)
        for name in drop:
            delattr(ds, name)
        ds.PixelData = native.tobytes() + b"\0" * (pixels.nbytes % 2)
        if payload is not None:
            ds.PixelData = payload
            ds["PixelData"].VR = "OB"
            ds["PixelData"].is_undefined_length = True
        else:  # OW of big-endian bytes would have to be swapped
            is_bytes = pixels.dtype.itemsize == 1 and syntax != ImplicitVRLittleEndian
            ds["PixelData"].VR = "OB" if is_bytes else "OW"
        buffer = io.BytesIO()
        if UID(syntax).is_transfer_syntax:
            implicit = syntax == ImplicitVRLittleEndian
            pydicom.dcmwrite(buffer, ds, implicit_vr=implicit, little_endian=not big)
        else:  # one that pydicom does not know
            buffer.write(b"\0" * 128 + b"DICM")
            write_file_meta_info(buffer, meta)
            with_order = DicomIO(buffer)
            with_order.is_little_endian, with_order.is_implicit_VR = True, False
            ds.pop("FileMetaInformationGroupLength", None)
            write_dataset(with_order, ds)
    return buffer.getvalue()


def film(data: bytes, name: str = "f.dcm", window=None):
    return film_from_bytes(data, name, window)


def without_preamble(data: bytes) -> bytes:
    """Without preamble, prefix and file meta information."""
    (length,) = struct.unpack_from("<I", data, 132 + 8)
    return data[132 + 12 + length :]


# --- compressed frames --------------------------------------------------------------------------


def encapsulated(frame: bytes, *, table: bytes = b"", parts: int = 1) -> bytes:
    """Items of PS3.5 A.4: an offset table, and a frame in `parts` fragments of even length."""
    frame += b"\0" * (len(frame) % 2)
    step = max(math.ceil(len(frame) / parts / 2) * 2, 2)
    pieces = [table, *(frame[i : i + step] for i in range(0, len(frame), step))]
    return b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(p)) + p for p in pieces)


def j2k(pixels, bits: int, **options) -> bytes:
    colour = {"photometric_interpretation": 1 if pixels.ndim == 3 else 2}
    return encode_array(np.ascontiguousarray(pixels), bits_stored=bits, **colour, **options)


def jls(pixels) -> bytes:
    return bytes(jpeg_ls.encode_array(np.ascontiguousarray(pixels)))


def rle(pixels) -> bytes:
    """PS3.5 G, literal runs only: a segment for each byte of a sample, high byte first."""
    planes = [pixels] if pixels.ndim == 2 else [pixels[..., i] for i in range(3)]
    segments = []
    for plane in planes:
        raw = np.ascontiguousarray(plane).view(np.uint8).reshape(*plane.shape, -1)
        for byte in range(raw.shape[-1] - 1, -1, -1):
            coded = b""
            for row in raw[..., byte]:
                flat = row.tobytes()
                runs = (flat[i : i + 128] for i in range(0, len(flat), 128))
                coded += b"".join(bytes([len(run) - 1]) + run for run in runs)
            segments.append(coded + b"\0" * (len(coded) % 2))
    offsets = [64 + sum(map(len, segments[:i])) for i in range(len(segments))]
    head = struct.pack("<16I", len(segments), *offsets, *[0] * (15 - len(segments)))
    return head + b"".join(segments)


def compressed(kind: str, pixels, depth: int, *, table=b"", parts=1, **options) -> bytes:
    """The file of `pixels` in a lossless compressed syntax, or `native`.

    Args:
        depth: bits of the codestream.
    """
    if kind == "native":
        return file(pixels, **options)
    syntax, frame = {
        "j2k": lambda: (JPEG2000Lossless, j2k(pixels, depth)),
        "jls": lambda: (JPEGLSLossless, jls(pixels)),
        "rle": lambda: (RLELossless, rle(pixels)),
    }[kind]()
    payload = encapsulated(frame, table=table, parts=parts)
    return file(pixels, syntax=syntax, payload=payload, **options)


# --- slow references ----------------------------------------------------------------------------


def linear(x, c, w):
    """C.11.2.1.2.1 with ymin 0 and ymax 1."""
    if x <= c - 0.5 - (w - 1) / 2:
        return 0.0
    if x > c - 0.5 + (w - 1) / 2:
        return 1.0
    return (x - (c - 0.5)) / (w - 1) + 0.5


def linear_exact(x, c, w):
    """C.11.2.1.3.2."""
    if x <= c - w / 2:
        return 0.0
    if x > c + w / 2:
        return 1.0
    return (x - c) / w + 0.5


def sigmoid(x, c, w):
    """C.11.2.1.3.1."""
    return 1 / (1 + math.exp(-4 * (x - c) / w))


FUNCTIONS = {"LINEAR": linear, "LINEAR_EXACT": linear_exact, "SIGMOID": sigmoid}


def lut(x, first, data):
    """C.11.1.1.1 and C.11.2.1.1: below the first, the first entry; beyond the last, the last."""
    return data[min(max(int(x) - first, 0), len(data) - 1)]


def depth_of(data) -> int:
    """The smallest k with 2^k - 1 at or above the largest entry."""
    k = 1
    while 2**k - 1 < max(data):
        k += 1
    return k


def slow(stored, function):
    flat = [function(int(v)) for v in stored.ravel()]
    return np.array(flat).reshape(stored.shape)


def percentile(values, among=None):
    """Ramp between the 0.5 and 99.5 percentiles of `among`, each a value that occurs."""
    ordered = sorted(float(v) for v in (values if among is None else among).ravel())
    n = len(ordered)
    low, high = (ordered[math.ceil(p * n / 1000) - 1] for p in (5, 995))
    ramp = [min(max((float(v) - low) / (high - low), 0), 1) for v in values.ravel()]
    return np.array(ramp).reshape(values.shape)


def hides(shown) -> bool:
    """Whether display values hide a film: 80 % at one end, or no spread in the middle 90 %."""
    ordered = sorted(min(max(float(v), 0), 1) for v in shown.ravel())
    n = len(ordered)
    if any(5 * sum(v == end for v in ordered) > 4 * n for end in (0, 1)):
        return True
    low, high = (ordered[math.ceil(p * n / 100) - 1] for p in (5, 95))
    return high - low < 0.1


def close(film, expected, tolerance=2e-6):
    assert film.pixels.dtype == np.float32 and film.pixels.shape == expected.shape
    assert np.abs(film.pixels - expected).max() <= tolerance


def lut_item(first, data, bits, kind="US", entries=None):
    """An item of a LUT sequence.

    Args:
        kind: how its data are written: "US", or as bytes "<u2", ">u2", "u1".
        entries: what the descriptor says instead of the length of the data.
    """
    item = Dataset()
    signed = first < 0
    said = (len(data) if entries is None else entries) % 65536
    item.add_new("LUTDescriptor", "SS" if signed else "US", [said, first, bits])
    if kind == "US":
        item.add_new("LUTData", "US", [int(v) for v in data])
    else:
        raw = np.asarray(data).astype(kind).tobytes()
        item.add_new("LUTData", "OW", raw + b"\0" * (len(raw) % 2))
    return item
