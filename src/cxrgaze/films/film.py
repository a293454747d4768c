"""A decoded radiograph: pixels in [0, 1], dense tissue white.

Why the network must not be applied to a film is data (`Film.reasons`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import FilmError, UsageError
from cxrgaze.files import sha256
from cxrgaze.films.identity import DicomIdentity
from cxrgaze.films.windows import grey_levels
from cxrgaze.spec import PixelSource

PIXEL_LIMIT = 100_000_000


MIN_SIDE = 32


_ASPECT = 3  # sides of a chest film differ by less
_CONTRAST = 2 / 255  # a film whose central 99 % spans less than this shows nothing


@dataclass(frozen=True)
class Stored:
    """The values of a film as its file has them, before anything that is done for display."""

    values: NDArray[np.integer]
    """`(H, W)`, grey; overlay bits dropped, signed where the file says so."""
    bits: int
    """How many of a value's bits are used."""
    larger_is_darker: bool
    """As in MONOCHROME1."""


@dataclass(frozen=True)
class Film:
    """A decoded radiograph."""

    pixels: NDArray[np.float32]
    """`(H, W)`, in [0, 1], dense tissue white."""
    name: str
    """What the caller called it: a path, or "array"."""
    sha256: str
    """Of the file's bytes; of shape, type and values for an array."""
    pixel_source: PixelSource
    spacing_mm: tuple[float, float] | None = None
    """Millimetres per pixel `(row, column)` as recorded, None where missing or absurd."""
    reasons: tuple[str, ...] = ()
    """Why the network must not be applied to this film; empty when it may."""
    notes: tuple[str, ...] = ()
    """What a reader of the result should know about the pixels."""
    identity: DicomIdentity | None = field(default=None, repr=False, compare=False)
    """What a DICOM film's results must refer to, sealed; None for other films."""
    decode_ms: float = 0.0
    """Wall-clock milliseconds from file or bytes to pixels."""
    stored: Stored | None = field(default=None, repr=False, compare=False)
    """Where they were asked for (`keep_stored`) and are whole numbers of at most 16 bits."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(H, W)` in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


def film_from_array(
    pixels: NDArray[np.generic], name: str = "array", *, keep_stored: bool = False
) -> Film:
    """The film in an array `(H, W)`: uint8, uint16 (windowed by percentiles) or float in [0, 1].

    Args:
        keep_stored: give the film the integers as they are too (`Film.stored`).

    Raises:
        UsageError: another shape, type or range.
    """
    if pixels.ndim != 2 or not pixels.size:
        raise UsageError(f"expected a film (H, W), found shape {pixels.shape}")
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    digest = sha256(repr((pixels.shape, pixels.dtype.str)).encode() + pixels.tobytes())
    if np.issubdtype(pixels.dtype, np.floating):
        values = pixels.astype(np.float32)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise UsageError("a float film must be finite and in [0, 1]; divide by its white level")
        return content_checked(Film(values, name, digest, "array"))
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UsageError(f"expected uint8, uint16 or float, found {pixels.dtype}")
    values, source, notes = grey_levels(pixels)
    stored = None
    if keep_stored:
        stored = Stored(np.asarray(pixels), 8 * pixels.dtype.itemsize, larger_is_darker=False)
    return content_checked(Film(values, name, digest, source, notes=notes, stored=stored))


def content_checked(film: Film) -> Film:
    """The film with the reasons that its pixels give.

    Raises:
        FilmError: pixels that are not finite.
    """
    if not np.isfinite(film.pixels.min()):  # NaN wins every minimum
        raise FilmError(f"{film.name}: its pixels are not finite")
    reasons = list(film.reasons)
    if min(film.shape) < MIN_SIDE:
        reasons.append(f"{film.shape[1]} x {film.shape[0]} pixels, expected {MIN_SIDE} a side")
    if max(film.shape) > _ASPECT * min(film.shape):
        reasons.append(f"{film.shape[1]} x {film.shape[0]} pixels: no chest has this shape")
    rows, columns = (max(side // 256, 1) for side in film.shape)  # a sample is enough
    low, high = np.quantile(film.pixels[::rows, ::columns], (0.005, 0.995))
    if high - low < _CONTRAST:
        reasons.append("no content: all pixels have (nearly) the same value")
    return replace(film, reasons=tuple(reasons))
