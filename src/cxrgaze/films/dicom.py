"""DICOM to Film: every container of one radiograph gives the same pixels.

Order (PS3.3 C.11.1, C.11.2; PS3.4 N.2): stored value, modality LUT or rescale, VOI LUT or window,
inversion of MONOCHROME1 or an inverse presentation LUT (once), [0, 1]. Stored values have at most
16 bits, so the whole chain is computed once for every possible stored value and applied as one
look-up per pixel.

Messages name attributes and transfer syntaxes, never header values that could identify a patient.
"""

from __future__ import annotations

import io
import math
import warnings
import zlib
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from cxrgaze.errors import FilmError
from cxrgaze.files import sha256
from cxrgaze.films.film import PIXEL_LIMIT, Film
from cxrgaze.films.identity import DicomIdentity
from cxrgaze.films.windows import PERCENTILES, Window
from cxrgaze.spec import PixelSource

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

_CHEST = ("CHEST", "THORAX", "TORAX", "LUNG")
_LATERAL = ("LL", "RL", "LLD", "RLD", "LAT")
_MODALITIES = ("CR", "DX", "RG", "OT", "")


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


def not_applicable(dataset: Dataset) -> tuple[str, ...]:
    """Why the network must not be applied to this image, from its header; empty when it may.

    Missing attributes are no reason: many real films lack them.
    """
    reasons = []
    frames = _number(dataset, "NumberOfFrames") or 1
    if frames > 1:
        reasons.append(f"multi-frame: {frames:.0f} frames, expected one")
    photometric = _text(dataset, "PhotometricInterpretation")
    if _number(dataset, "SamplesPerPixel") not in (None, 1) or (
        photometric and not photometric.startswith("MONOCHROME")
    ):
        reasons.append("colour image, expected a grey radiograph (MONOCHROME1 or MONOCHROME2)")
    modality = _text(dataset, "Modality")
    if modality not in _MODALITIES:
        reasons.append("modality is not CR or DX")
    body = _text(dataset, "BodyPartExamined")
    if body and not any(part in body for part in _CHEST):
        reasons.append("body part is not the chest")
    view = (_text(dataset, "ViewPosition"), *_code_meanings(dataset, "ViewCodeSequence"))
    if any(v in _LATERAL or "LATERAL" in v for v in view) or _row_runs_front_to_back(dataset):
        reasons.append("lateral view, expected a frontal one (PA or AP)")
    sop_class = dataset.get("SOPClassUID")
    if sop_class == DigitalXRayImageStorageForProcessing:
        reasons.append("raw detector values (DX For Processing), expected For Presentation")
    burned = _text(dataset, "BurnedInAnnotation") == "YES"
    if sop_class == SecondaryCaptureImageStorage and burned:
        reasons.append("secondary capture with burned-in text")
    return tuple(reasons)


def _film(dataset: Dataset, data: bytes, name: str, window: Window | None) -> Film:
    reasons = not_applicable(dataset)
    notes = _complete(dataset)
    shape = _checked_shape(dataset, name)
    stored = _stored_values(dataset, name)
    if stored.ndim == 3:  # colour: one sample stands for it; `reasons` already says that it is
        stored = stored[..., 0]
    if stored.shape != shape:
        raise FilmError(f"{name}: decoded to {stored.shape} pixels, its header says {shape}")
    pixels, source, more = _displayed(dataset, stored, window)
    return Film(
        pixels,
        name,
        sha256(data),
        source,
        _spacing(dataset),
        reasons,
        (*notes, *more),
        DicomIdentity.of(dataset),
    )


def _complete(dataset: Dataset) -> tuple[str, ...]:
    """Fill in what a grey film must have and some lack; notes where that is an assumption."""
    for keyword, value in (("SamplesPerPixel", 1), ("PixelRepresentation", 0)):
        if _get(dataset, keyword) is None:
            setattr(dataset, keyword, value)
    if "NumberOfFrames" in dataset and _number(dataset, "NumberOfFrames") is None:
        del dataset.NumberOfFrames
    if _get(dataset, "BitsStored") is None:
        dataset.BitsStored = dataset.BitsAllocated
    if _get(dataset, "PhotometricInterpretation") is None:
        dataset.PhotometricInterpretation = "MONOCHROME2"
        return ("the file does not say whether white is high or low; MONOCHROME2 was assumed",)
    dataset.PhotometricInterpretation = _text(dataset, "PhotometricInterpretation")
    return ()


def _parse(data: bytes, name: str) -> Dataset:
    file = io.BytesIO(data)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        _check_inflated_size(data[file.tell() :], name)
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    if "Rows" not in dataset or "PixelData" not in dataset:
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
    samples = _number(dataset, "SamplesPerPixel") or 1
    if rows < 1 or columns < 1 or rows * columns * samples > PIXEL_LIMIT:
        raise FilmError(f"{name}: {columns} x {rows} pixels, expected 1 to {PIXEL_LIMIT} in all")
    if int(dataset.BitsAllocated) not in (8, 16):
        raise FilmError(f"{name}: {dataset.BitsAllocated} bits allocated, expected 8 or 16")
    return rows, columns


def _stored_values(dataset: Dataset, name: str) -> NDArray[np.integer]:
    """The stored values of the first frame `(rows, columns)`, unused and overlay bits dropped."""
    syntax = UID(dataset.file_meta.get("TransferSyntaxUID", ExplicitVRLittleEndian))
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
    options: dict[str, Any] = {"correct_unused_bits": False}  # done below, for any HighBit
    values, _ = decoder.as_array(dataset, index=0, raw=True, decoding_plugin=plugin, **options)
    if decoder.is_native or syntax == RLELossless:  # these carry the allocated bits as they are
        high = _number(dataset, "HighBit")
        spare = 8 * values.dtype.itemsize - bits
        drop = min(max(int(bits - 1 if high is None else high) + 1 - bits, 0), spare)
        values = np.asarray((values >> drop << spare) >> spare)  # arithmetic shifts keep a sign
    return np.asarray(values)


def _missing_decoder(name: str, syntax: UID) -> str:
    if syntax == JPEGExtended12Bit:
        return (
            f"{name}: {syntax.name} ({syntax}) of 12 bits needs the package pylibjpeg-libjpeg, "
            "which is under the GPL and not part of cxrgaze; run: pip install pylibjpeg-libjpeg"
        )
    return (
        f"{name}: no decoder for {syntax.name} ({syntax}); reinstall cxrgaze with its dependencies"
    )


def _displayed(
    dataset: Dataset, stored: NDArray[np.integer], window: Window | None
) -> tuple[NDArray[np.float32], PixelSource, tuple[str, ...]]:
    """Stored values `(H, W)` as display values in [0, 1], where the window came from, and notes."""
    low = int(stored.min())
    counts = np.bincount(stored.ravel().astype(np.int64) - low)
    levels = np.arange(low, low + counts.size)
    padding = _padding(dataset, levels)
    counts[padding] = 0
    inverted = (
        _text(dataset, "PhotometricInterpretation") == "MONOCHROME1"
        or _text(dataset, "PresentationLUTShape") == "INVERSE"
    )
    modality = _modality(dataset, levels)
    if window is not None:
        white = _nominal_white(dataset) - modality if inverted else modality
        table = _windowed(white, *window, "LINEAR")
        source: PixelSource = "dicom-window"
        notes: tuple[str, ...] = ("a window was forced",)
    else:
        table, source, notes = _voi(dataset, modality, counts, inverted)
    table = np.clip(table, 0, 1).astype(np.float32)
    table[padding] = 0
    return table[stored.astype(np.int64) - low], source, notes


def _voi(
    dataset: Dataset, modality: NDArray[np.floating], counts: NDArray[np.integer], inverted: bool
) -> tuple[NDArray[np.floating], PixelSource, tuple[str, ...]]:
    """Display value of every level, white dense: VOI LUT, window, 8 bits or percentiles."""
    if dataset.get("VOILUTSequence"):
        item = dataset.VOILUTSequence[0]
        table = _looked_up(dataset, item, np.rint(modality)) / (2 ** _lut_bits(item) - 1)
        return (1 - table if inverted else table), "dicom-voi-lut", ()
    centre, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    function = _text(dataset, "VOILUTFunction") or "LINEAR"
    notes: tuple[str, ...] = ()
    if centre is not None and width is not None:
        table = _windowed(modality, centre, width, function)
        seen = table[counts > 0]
        if width >= (1 if function == "LINEAR" else 0) and seen.size and np.ptp(seen) > 0.02:
            return (1 - table if inverted else table), "dicom-window", ()
        notes = ("the file's window shows none of its pixels; a percentile window was used",)
    elif int(dataset.BitsStored) <= 8 and "RescaleSlope" not in dataset:
        low, high = _nominal_ends(dataset)
        table = (modality - low) / (high - low)  # already display values
        return (1 - table if inverted else table), "image-8bit", ()
    ordered = -modality if inverted else modality
    return _percentile_ramp(ordered, counts), "dicom-percentile", notes


def _windowed(
    values: NDArray[np.floating], centre: float, width: float, function: str
) -> NDArray[np.floating]:
    """The window functions of PS3.3 C.11.2.1.2 and C.11.2.1.3, output in [0, 1]."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if function == "SIGMOID":
            return np.asarray(1 / (1 + np.exp(-4 * (values - centre) / width)))
        if function == "LINEAR_EXACT":
            ramp = (values - centre) / width + 0.5
        else:
            ramp = (values - (centre - 0.5)) / (width - 1) + 0.5
    return np.asarray(np.clip(np.nan_to_num(ramp), 0, 1))


def _percentile_ramp(
    values: NDArray[np.floating], counts: NDArray[np.integer]
) -> NDArray[np.floating]:
    """Linear between `PERCENTILES` of the pixels that each level has."""
    order = np.argsort(values, kind="stable")
    share = np.cumsum(counts[order]) / max(counts.sum(), 1)
    ends = np.searchsorted(share, np.array(PERCENTILES) / 100).clip(max=len(order) - 1)
    low, high = values[order[ends]]
    return np.asarray((values - low) / max(high - low, np.finfo(np.float64).tiny))


def _modality(dataset: Dataset, levels: NDArray[np.integer]) -> NDArray[np.floating]:
    """Modality LUT sequence, else rescale, else the levels themselves (PS3.3 C.11.1)."""
    if dataset.get("ModalityLUTSequence"):
        return _looked_up(dataset, dataset.ModalityLUTSequence[0], levels)
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    return levels * (slope or 1.0) + (intercept or 0.0)


def _nominal_white(dataset: Dataset) -> float:
    """What an inverted film is subtracted from: the nominal range's two ends summed."""
    return float(_modality(dataset, _nominal_ends(dataset)).sum())


def _nominal_ends(dataset: Dataset) -> NDArray[np.integer]:
    """The smallest and the largest value that the stored bits can hold."""
    bits = int(dataset.BitsStored)
    signed = _number(dataset, "PixelRepresentation") == 1
    return np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])


def _looked_up(dataset: Dataset, item: Dataset, values: NDArray[Any]) -> NDArray[np.floating]:
    """A LUT of PS3.3 C.11.1.1 or C.11.2.1.1 applied to integer-valued `values`."""
    entries, first = int(item.LUTDescriptor[0]) or 65536, int(item.LUTDescriptor[1])
    data: Any = item.LUTData
    if isinstance(data, bytes):
        big = dataset.file_meta.get("TransferSyntaxUID") == ExplicitVRBigEndian
        words = ">u2" if big else "<u2"  # 8-bit entries may be packed, and padded to even length
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * entries else words)
    table = np.asarray(data, dtype=np.float64)[:entries]
    if first > 32767 and values.min() < 0:  # an unsigned reading of a negative first value
        first -= 65536
    return np.asarray(table[np.clip(values - first, 0, table.size - 1).astype(np.int64)])


def _lut_bits(item: Dataset) -> int:
    bits = int(item.LUTDescriptor[2])
    if not 8 <= bits <= 16:
        raise ValueError("a LUT has entries of 8 to 16 bits")
    return bits


def _padding(dataset: Dataset, levels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which levels are padding (PS3.3 C.7.5.1.1.2)."""
    value = _number(dataset, "PixelPaddingValue")
    if value is None:
        return np.zeros(levels.shape, dtype=bool)
    limit = _number(dataset, "PixelPaddingRangeLimit")
    ends = sorted((value, value if limit is None else limit))
    if levels[0] < 0 and ends[0] > 32767:  # an unsigned reading of negative values
        ends = [end - 65536 for end in ends]
    return (levels >= ends[0]) & (levels <= ends[1])


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        values = _get(dataset, keyword)
        if not isinstance(values, MultiValue) or len(values) != 2:
            continue
        try:
            row, column = float(values[0]), float(values[1])
        except (TypeError, ValueError):
            continue
        if 0.01 <= row <= 5 and 0.01 <= column <= 5:
            return row, column
    return None


def _row_runs_front_to_back(dataset: Dataset) -> bool:
    """Whether PatientOrientation says that a row runs between front and back: a lateral view."""
    value = _get(dataset, "PatientOrientation")
    return bool(value) and not isinstance(value, str) and str(value[0]).upper()[:1] in ("A", "P")


def _code_meanings(dataset: Dataset, keyword: str) -> tuple[str, ...]:
    return tuple(_text(item, "CodeMeaning") for item in _get(dataset, keyword) or ())


def _get(dataset: Dataset, keyword: str) -> Any:
    """An attribute, None where missing or malformed: pydicom parses it when it is asked for."""
    try:
        return dataset.get(keyword)
    except Exception:  # whatever pydicom raises on malformed bytes
        return None


def _text(dataset: Dataset, keyword: str) -> str:
    """The first of one or several texts, upper case, empty where missing."""
    value = _get(dataset, keyword)
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    return str(value or "").strip().upper()


def _number(dataset: Dataset, keyword: str) -> float | None:
    """The first of one or several numbers, None where missing or not finite."""
    value = _get(dataset, keyword)
    if isinstance(value, MultiValue):
        value = value[0] if value else None
    try:
        number = float(value) if value is not None else math.nan
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
