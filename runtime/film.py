"""Any file to a Film: decoded, windowed, in [0, 1], dense tissue white.

PNG, JPEG and TIFF of 8 and 16 bit here; DICOM in `cxrgaze.runtime.dicom`. Nothing is guessed about
orientation. Why the network must not be applied to a film is data (`Film.reasons`).
"""

from __future__ import annotations

import io
import os
import stat
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cxrgaze.errors import FilmError, UsageError
from cxrgaze.files import sha256
from cxrgaze.spec import PixelSource

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")
BYTE_LIMIT = 1 << 30
PIXEL_LIMIT = 100_000_000
MIN_SIDE = 32
PERCENTILES = (0.5, 99.5)
"""The window of a film that brings none of its own: these percentiles of its pixels."""
Window = tuple[float, float]
_FORMATS = ("PNG", "JPEG", "TIFF")
_COLOUR_SPREAD = 0.02  # mean difference between channels above which an RGB image is in colour
_CONTRAST = 2 / 255  # a film whose central 99 % spans less than this shows nothing


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
    decode_ms: float = 0.0
    """Wall-clock milliseconds from file or bytes to pixels."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(H, W)` in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


def load_film(path: Path | str, window: Window | None = None) -> Film:
    """The film in a file.

    Args:
        window: see `film_from_bytes`.

    Raises:
        FilmError: missing, unreadable, damaged or of no known format.
    """
    path = Path(path)
    start = time.perf_counter()
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FilmError(f"{path}: not a regular file")
            # Asking for the limit would take that much memory first.
            data = file.read(min(status.st_size, BYTE_LIMIT) + 1)
    except OSError as error:
        raise FilmError(f"{path}: cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a NUL byte in the path
        raise FilmError(f"{path}: no path of a file: {error}") from error
    film = film_from_bytes(data, str(path), window)
    return replace(film, decode_ms=(time.perf_counter() - start) * 1e3)


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe without a writer would block for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def film_from_bytes(data: bytes, name: str, window: Window | None = None) -> Film:
    """The film in the bytes of a file.

    Args:
        name: stands in messages and results; its suffix is a hint.
        window: centre and width that replace a DICOM film's own, on values oriented so that larger
            is whiter; no effect on other files.

    Raises:
        FilmError: empty, too large, damaged or of no known format.
    """
    if not data:
        raise FilmError(f"{name}: the file is empty (0 bytes)")
    if len(data) > BYTE_LIMIT:
        raise FilmError(f"{name}: larger than {BYTE_LIMIT >> 20} MiB")
    try:
        return _with_content_checked(_decoded(data, name, window))
    except MemoryError as error:
        raise FilmError(f"{name}: needs more memory than there is; refused") from error


def _decoded(data: bytes, name: str, window: Window | None) -> Film:
    if data[128:132] == b"DICM" or Path(name).suffix.lower() in (".dcm", ".dicom"):
        from cxrgaze.runtime.dicom import film_from_dicom

        return film_from_dicom(data, name, window)
    return _film_from_image(data, name)


def film_from_array(pixels: NDArray[np.generic], name: str = "array") -> Film:
    """The film in an array `(H, W)`: uint8, uint16 (windowed by percentiles) or float in [0, 1].

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
        return _with_content_checked(Film(values, name, digest, "array"))
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UsageError(f"expected uint8, uint16 or float, found {pixels.dtype}")
    values, source = _grey_levels(pixels)
    return _with_content_checked(Film(values, name, digest, source))


def find_films(paths: Sequence[Path | str]) -> Iterator[tuple[Path, Path]]:
    """Films among files, folders (searched recursively by suffix) and globs, in sorted order.

    Yields:
        The path, and the path relative to the folder that was given (the name for a file).

    Raises:
        UsageError: a path that does not exist, a folder or glob without films.
    """
    for given in map(Path, paths):
        try:
            yield from _films_of(given)
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{str(given)[:200]!r} cannot be searched: {reason}") from error


def _films_of(given: Path) -> Iterator[tuple[Path, Path]]:
    if given.is_dir():
        found = sorted(path for path in _files_below(given) if _looks_like_film(path))
        if not found:
            raise UsageError(f"{given} holds no films (DICOM, or {', '.join(SUFFIXES)})")
        yield from ((path, path.relative_to(given)) for path in found)
    elif given.exists():
        yield given, Path(given.name)
    elif any(c in str(given) for c in "*?["):
        anchor = Path(given.anchor or ".")
        pattern = str(given.relative_to(given.anchor)) if given.anchor else str(given)
        found = sorted(p for p in anchor.glob(pattern) if p.is_file())
        if not found:
            raise UsageError(f"no file matches {given}")
        yield from ((path, Path(path.name)) for path in found)
    else:
        raise UsageError(f"{given} does not exist")


def _files_below(folder: Path) -> Iterator[Path]:
    """Files below a folder, through links to folders too, each folder once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root, name) for name in names)


def percentile_window(values: NDArray[np.integer]) -> tuple[float, float]:
    """Lower and upper end of the stated percentile window (`PERCENTILES`) of integer pixels."""
    low = int(values.min())
    counts = np.bincount((values.ravel() - low).astype(np.int64))
    share = np.cumsum(counts) / values.size
    ends = (int(np.searchsorted(share, p / 100)) + low for p in PERCENTILES)
    lower, upper = ends
    return float(lower), float(upper)


def apply_window(values: NDArray[np.generic], lower: float, upper: float) -> NDArray[np.float32]:
    """Linear ramp from 0 at `lower` to 1 at `upper`, clipped; a step where they are equal."""
    out = values.astype(np.float32)
    out -= np.float32(lower)
    out /= np.float32(max(upper - lower, np.finfo(np.float32).tiny))
    return np.clip(out, 0, 1, out=out)


def _grey_levels(values: NDArray[np.generic]) -> tuple[NDArray[np.float32], PixelSource]:
    if values.dtype == np.uint8:
        return values.astype(np.float32) / np.float32(255), "image-8bit"
    return apply_window(values, *percentile_window(values.astype(np.int64))), "image-16bit"


def _film_from_image(data: bytes, name: str) -> Film:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; size is checked below
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > PIXEL_LIMIT:
                    raise FilmError(f"{name}: {width} x {height} pixels, limit {PIXEL_LIMIT}")
                frames = getattr(image, "n_frames", 1)
                image.load()
                deep = image.format == "PNG" and data[24] == 16 and image.mode != "I;16"
                pixels, reasons = _grey(_deep_colour(data) if deep else image)
                notes = _orientation_note(image)
    except UnidentifiedImageError as error:
        raise FilmError(
            f"{name}: not a PNG, JPEG, TIFF or DICOM file, or a kind of one that is not read; "
            f"found {_magic(data)}"
        ) from error
    except (FilmError, MemoryError):
        raise
    except Exception as error:  # a hostile file can raise anything inside Pillow
        raise FilmError(f"{name}: damaged or cut short: {error or type(error).__name__}") from error
    if frames > 1:
        reasons = (*reasons, f"multi-frame: {frames} frames, expected one")
    values, source = _grey_levels(pixels)
    return Film(values, name, sha256(data), source, reasons=reasons, notes=notes)


def _deep_colour(data: bytes) -> NDArray[np.uint16]:
    """RGB `(H, W, 3)` of a PNG of 16 bits in colour or with alpha, which Pillow cuts to 8.

    Pillow has read the file whole before: OpenCV alone would not refuse a damaged one.
    """
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.ndim != 3 or decoded.dtype != np.uint16:
        raise ValueError("a PNG of 16 bits that OpenCV does not read")
    return np.asarray(decoded[..., 2::-1], dtype=np.uint16)


def _grey(
    image: Image.Image | NDArray[np.uint16],
) -> tuple[NDArray[np.generic], tuple[str, ...]]:
    """Pixels as uint8 or uint16 `(H, W)`, and why the film is not applicable, if it is not."""
    if isinstance(image, np.ndarray):
        return np.rint(image.mean(axis=2)).astype(np.uint16), _colour_reason(image, 65535)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if _white_is_zero(image):
            values = -values  # a window follows: only the order counts
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("pixel values are not finite")
        if image.mode == "F" or low < 0 or high > 65535:  # the window undoes gain and offset
            values = np.rint((values - low) * (65535 / (high - low or 1.0)))
        return values.astype(np.uint16), ()
    if image.mode in ("L", "1", "LA"):
        return np.asarray(image.convert("L")), ()
    colour = image.convert("RGB")
    return np.asarray(colour.convert("L")), _colour_reason(np.asarray(colour), 255)


def _colour_reason(channels: NDArray[np.generic], white: int) -> tuple[str, ...]:
    """Why an RGB image `(H, W, 3)` is no radiograph; empty if its channels agree."""
    spread = (channels.max(axis=2).astype(np.float32) - channels.min(axis=2)).mean() / white
    return ("colour image (RGB), expected a grey radiograph",) if spread > _COLOUR_SPREAD else ()


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF of more than 8 bits stores white as 0; Pillow inverts only those of 8."""
    tags = getattr(image, "tag_v2", {})
    return bool(tags.get(262) == 0)  # PhotometricInterpretation of TIFF 6.0


def _orientation_note(image: Image.Image) -> tuple[str, ...]:
    orientation = image.getexif().get(0x0112, 1)
    if orientation in range(2, 9):
        return (f"the file asks to be turned (EXIF orientation {orientation}); it was not",)
    return ()


def _with_content_checked(film: Film) -> Film:
    if not np.isfinite(film.pixels.min()):  # NaN wins every minimum
        raise FilmError(f"{film.name}: its pixels are not finite")
    reasons = list(film.reasons)
    if min(film.shape) < MIN_SIDE:
        reasons.append(f"{film.shape[1]} x {film.shape[0]} pixels, expected {MIN_SIDE} a side")
    rows, columns = (max(side // 256, 1) for side in film.shape)  # a sample is enough
    low, high = np.quantile(film.pixels[::rows, ::columns], (0.005, 0.995))
    if high - low < _CONTRAST:
        reasons.append("no content: all pixels have (nearly) the same value")
    return replace(film, reasons=tuple(reasons))


def _looks_like_film(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_file():
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:  # archives name DICOM files by their UID, or not at all
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _magic(data: bytes) -> str:
    return f"{len(data)} bytes starting with {data[:8].hex(' ')}"
