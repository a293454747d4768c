"""Stored values of a DICOM film to display values: modality, VOI, inversion, judged by the outcome.

Order (PS3.3 C.11.1, C.11.2; PS3.4 N.2): stored value, modality LUT or rescale, VOI LUT or window,
inversion of MONOCHROME1 or an inverse presentation LUT (once), [0, 1]. Stored values have at most
16 bits, so the whole chain is computed once for every possible stored value and applied as one
look-up per pixel. What a film brings is not believed without a look at what it would show
(`unfit`): a VOI LUT, a window or plain 8-bit values that hide the film give way to the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian

from cxrgaze.films.header import (
    attribute,
    has_decimal_comma,
    items,
    number,
    text,
    transfer_syntax,
)
from cxrgaze.films.windows import (
    FRAME,
    PERCENTILES,
    Window,
    level_counts,
    look_up,
    without_frame,
)
from cxrgaze.spec import PixelSource

CLIPPED_SHARE = 0.8
"""Share of the pixels, without a constant frame, that may be all black or all white."""
MIDDLE_SPREAD = 0.1
"""What the middle 90 % of the pixels must span at the least, in display values."""


class Displayed(NamedTuple):
    """Display values of a film and how they came about."""

    pixels: NDArray[np.float32]
    """`(H, W)` in [0, 1], dense tissue white."""
    source: PixelSource
    notes: tuple[str, ...]


def displayed(header: Dataset, stored: NDArray[np.integer], window: Window | None) -> Displayed:
    """The display values of stored values `(H, W)`.

    Args:
        window: centre and width that replace the film's own, on values where larger is whiter.
    """
    low, high = int(stored.min()), int(stored.max())
    levels = np.arange(low, high + 1)
    padding = _padding(header, levels)
    outside = _outside_shutter(header, stored.shape)
    seen = without_frame(stored) if outside is None else stored[~outside]
    counts = np.zeros(len(levels), dtype=np.int64)
    first, some = level_counts(seen)
    counts[first - low : first - low + len(some)] = some
    counts[padding] = 0
    chain = _Chain(header, levels, counts)
    table, source, notes = _forced(chain, window) if window else _chosen(chain)
    table = np.clip(table, 0, 1).astype(np.float32)
    table[padding] = 0
    pixels = look_up(stored, low, table)
    if outside is not None:
        pixels[outside] = 0
        notes = (*notes, "what lies outside the shutter in the header was made black")
    elif source == "dicom-percentile" and seen.size < stored.size:
        notes = (*notes, FRAME)
    return Displayed(pixels, source, (*chain.doubts(), *notes))


def is_inverted(header: Dataset) -> bool:
    """Whether a larger stored value is darker (PS3.3 C.7.6.3.1.2, C.11.6)."""
    return (
        text(header, "PhotometricInterpretation") == "MONOCHROME1"
        or text(header, "PresentationLUTShape") == "INVERSE"
    )


@dataclass(frozen=True)
class _Chain:
    """A header, the stored values that there are, and how many pixels have each."""

    header: Dataset
    levels: NDArray[np.integer]
    counts: NDArray[np.integer]

    def doubts(self) -> tuple[str, ...]:
        """What the header leaves in doubt about its modality LUT and polarity."""
        doubts = []
        for item in items(self.header, "ModalityLUTSequence")[:1]:
            try:
                _lut_data(self.header, item)
            except _UNUSABLE:
                doubts.append("the file's modality LUT is incomplete; it was not used")
        shape = text(self.header, "PresentationLUTShape")
        if text(self.header, "PhotometricInterpretation") == "MONOCHROME1" and shape == "IDENTITY":
            doubts.append("the header says MONOCHROME1 and IDENTITY; it was inverted once")
        return tuple(doubts)

    def modality(self, levels: NDArray[np.integer]) -> NDArray[np.floating]:
        """Modality LUT, else rescale, else the levels themselves (PS3.3 C.11.1)."""
        for item in items(self.header, "ModalityLUTSequence")[:1]:
            with contextlib.suppress(*_UNUSABLE):
                return _looked_up(self.header, item, levels)
        source = _functional(self.header, "PixelValueTransformationSequence")
        slope, intercept = number(source, "RescaleSlope"), number(source, "RescaleIntercept")
        return levels * (slope or 1.0) + (intercept or 0.0)

    def nominal_ends(self) -> NDArray[np.integer]:
        """The smallest and the largest value that the stored bits can hold."""
        bits = int(self.header.BitsStored)
        signed = number(self.header, "PixelRepresentation") == 1
        return np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])


_UNUSABLE = (AttributeError, IndexError, TypeError, ValueError)
"""What a LUT raises that lacks its descriptor or its data."""

_Table = tuple[NDArray[np.floating], PixelSource, tuple[str, ...]]


def _forced(chain: _Chain, window: Window) -> _Table:
    modality = chain.modality(chain.levels)
    if is_inverted(chain.header):  # from the nominal range's two ends
        modality = float(chain.modality(chain.nominal_ends()).sum()) - modality
    return _windowed(modality, *window, "LINEAR"), "dicom-window", ("a window was forced",)


def _chosen(chain: _Chain) -> _Table:
    """The first of what the film brings that shows it, else its percentiles."""
    modality = chain.modality(chain.levels)
    notes: list[str] = []
    for candidate in _candidates(chain, modality, notes):
        why = unfit(candidate.table, chain.counts)
        if not why:
            table = 1 - candidate.table if is_inverted(chain.header) else candidate.table
            return table, candidate.source, (*notes, *candidate.notes)
        notes.append(f"the file's {candidate.what} {why}; it was not used")
    if notes:
        notes.append("a percentile window was used")
    ordered = -modality if is_inverted(chain.header) else modality
    return _percentile_ramp(ordered, chain.counts), "dicom-percentile", tuple(notes)


class _Candidate(NamedTuple):
    what: str
    table: NDArray[np.floating]
    source: PixelSource
    notes: tuple[str, ...] = ()


def _candidates(
    chain: _Chain, modality: NDArray[np.floating], notes: list[str]
) -> Iterator[_Candidate]:
    """VOI LUTs, windows, plain 8-bit values; what cannot be used at all goes into `notes`."""
    header = chain.header
    for item in items(header, "VOILUTSequence"):
        try:
            values = _looked_up(header, item, np.rint(modality))
            largest = float(_lut_data(header, item).max())
            said = int(item.LUTDescriptor[2])
        except _UNUSABLE:
            notes.append("the file's VOI LUT is incomplete; it was not used")
            continue
        bits = max(int(largest).bit_length(), 1)
        odd = f"the VOI LUT says {said} bits and has data of {bits}; its data's were taken"
        yield _Candidate(
            "VOI LUT", values / (2**bits - 1), "dicom-voi-lut", () if bits == said else (odd,)
        )
    source = _functional(header, "FrameVOILUTSequence")
    centre, width = number(source, "WindowCenter"), number(source, "WindowWidth")
    function = text(source, "VOILUTFunction") or "LINEAR"
    if centre is not None and width is not None:
        if has_decimal_comma(source, "WindowCenter", "WindowWidth"):
            notes.append("the window is written with a decimal comma")
        if width >= (1 if function == "LINEAR" else 0):
            yield _Candidate("window", _windowed(modality, centre, width, function), "dicom-window")
        else:
            notes.append("the file's window has no width; it was not used")
    elif int(header.BitsStored) <= 8 and "RescaleSlope" not in header:
        low, high = chain.nominal_ends()
        yield _Candidate("8-bit range", (modality - low) / (high - low), "image-8bit")


def unfit(table: NDArray[np.floating], counts: NDArray[np.integer]) -> str:
    """Why display values would hide a film, "" where they show it.

    Args:
        table: display value of each level, `(n,)`. counts: its pixels, padding and a constant
            frame left out.
    """
    total = counts.sum()
    if not total:
        return ""
    shown = np.clip(table, 0, 1)
    for end, colour in ((0, "black"), (1, "white")):
        share = counts[shown == end].sum() / total
        if share > CLIPPED_SHARE:
            return f"turns {100 * share:.0f} % of its pixels {colour}"
    order = np.argsort(shown, kind="stable")
    cumulated = np.cumsum(counts[order]) / total
    low, high = (shown[order[np.searchsorted(cumulated, q)]] for q in (0.05, 0.95))
    return "shows next to nothing of its pixels" if high - low < MIDDLE_SPREAD else ""


def _functional(header: Dataset, macro: str) -> Dataset:
    """An item of the first frame's functional groups, else the header (PS3.3 C.7.6.16)."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in items(header, groups)[:1]:
            for item in items(group, macro)[:1]:
                return item
    return header


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


def _looked_up(header: Dataset, item: Dataset, values: NDArray[Any]) -> NDArray[np.floating]:
    """A LUT of PS3.3 C.11.1.1 or C.11.2.1.1 applied to integer-valued `values`."""
    first, table = int(item.LUTDescriptor[1]), _lut_data(header, item)
    if first > 32767 and values.min() < 0:  # an unsigned reading of a negative first value
        first -= 65536
    return np.asarray(table[np.clip(values - first, 0, table.size - 1).astype(np.int64)])


def _lut_data(header: Dataset, item: Dataset) -> NDArray[np.floating]:
    """The entries of a LUT.

    Bytes are packed 8-bit entries at exactly their number (padded to even length), else words.

    Raises:
        What `_UNUSABLE` lists: no descriptor, no data.
    """
    entries = int(item.LUTDescriptor[0]) or 65536
    data: Any = item.LUTData
    if data is None or not len(data):
        raise ValueError("a LUT without data")
    if isinstance(data, bytes):
        big = transfer_syntax(header) == ExplicitVRBigEndian
        is_packed = len(data) in (entries, entries + entries % 2)
        kind = np.dtype(np.uint8) if is_packed else np.dtype(">u2" if big else "<u2")
        data = np.frombuffer(data[: len(data) // 2 * 2], kind)
    return np.asarray(data, dtype=np.float64).reshape(-1)[:entries]


def _padding(header: Dataset, levels: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which levels are padding (PS3.3 C.7.5.1.1.2)."""
    value = number(header, "PixelPaddingValue")
    if value is None:
        return np.zeros(levels.shape, dtype=bool)
    limit = number(header, "PixelPaddingRangeLimit")
    ends = sorted((value, value if limit is None else limit))
    if levels[0] < 0 and ends[0] > 32767:  # an unsigned reading of negative values
        ends = [end - 65536 for end in ends]
    return (levels >= ends[0]) & (levels <= ends[1])


def _outside_shutter(header: Dataset, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """Which pixels lie outside the display shutter (PS3.3 C.7.6.11), None where there is none."""
    kinds = attribute(header, "ShutterShape") or ()
    kinds = [kinds] if isinstance(kinds, str) else kinds
    shapes = [_shutter(header, str(kind).upper(), shape) for kind in kinds]
    inside = np.all([one for one in shapes if one is not None], axis=0) if shapes else None
    hides = inside is not None and np.ndim(inside) == 2 and inside.any() and not inside.all()
    return ~np.asarray(inside) if hides else None


def _shutter(header: Dataset, kind: str, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """Which pixels one shape lets through, by numbers from 1; None where it is incomplete."""
    through = np.zeros(shape, dtype=np.uint8)
    if kind == "RECTANGULAR":
        edges = [number(header, f"Shutter{edge}Edge") for edge in _EDGES]
        top, bottom, left, right = (int(edge or 0) for edge in edges)
        if None in edges:
            return None
        through[max(top, 0) : max(bottom - 1, 0), max(left, 0) : max(right - 1, 0)] = 1
    elif kind == "CIRCULAR":
        centre, radius = (
            _numbers(header, "CenterOfCircularShutter"),
            number(header, "RadiusOfCircularShutter"),
        )
        if len(centre) != 2 or not radius or max(*map(abs, centre), radius) > _FAR:
            return None
        cv2.circle(through, (centre[1] - 1, centre[0] - 1), int(radius), 1, -1)
    elif kind == "POLYGONAL":
        vertices = _numbers(header, "VerticesOfThePolygonalShutter")
        points = np.array(vertices[: len(vertices) // 2 * 2]).reshape(-1, 2)
        if len(points) < 3 or np.abs(points).max() > _FAR:
            return None
        cv2.fillPoly(through, [(points[:, ::-1] - 1).astype(np.int32)], 1)
    else:
        return None
    return np.asarray(through > 0)


_EDGES = ("UpperHorizontal", "LowerHorizontal", "LeftVertical", "RightVertical")
_FAR = 1 << 20  # no film reaches so far


def _numbers(header: Dataset, keyword: str) -> list[int]:
    try:
        return [int(value) for value in attribute(header, keyword) or ()]
    except (TypeError, ValueError, OverflowError):
        return []


def square_reason(header: Dataset) -> tuple[str, ...]:
    """Why the network must not be applied to a film whose pixels are not square; empty if so."""
    ratio = _numbers(header, "PixelAspectRatio")
    spacing = spacing_mm(header) or (tuple(ratio) if len(ratio) == 2 and min(ratio) > 0 else None)
    if spacing and not 1 / _SQUARE <= spacing[0] / spacing[1] <= _SQUARE:
        return ("its pixels are not square, by spacing or aspect ratio; resample the film",)
    return ()


_SQUARE = 1.02


def spacing_mm(header: Dataset) -> tuple[float, float] | None:
    """Millimetres per pixel `(row, column)`, the calibrated ones first; None where absurd."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        values = attribute(header, keyword)
        try:
            row, column = (float(value) for value in values)
        except (TypeError, ValueError):
            continue
        if 0.01 <= row <= 5 and 0.01 <= column <= 5:
            return row, column
    return None
