"""PNG, JPEG and TIFF of 8 and 16 bit to Film."""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cxrgaze.errors import FilmError
from cxrgaze.files import sha256
from cxrgaze.films.film import PIXEL_LIMIT, Film
from cxrgaze.films.windows import grey_levels

_FORMATS = ("PNG", "JPEG", "TIFF")


_COLOUR_SPREAD = 0.02  # mean difference between channels above which an RGB image is in colour


def film_from_image(data: bytes, name: str) -> Film:
    """The film in the bytes of a PNG, JPEG or TIFF file; `content_checked` is the caller's to do.

    Raises:
        FilmError: damaged, too large, or of no known format.
    """
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
    values, source = grey_levels(pixels)
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


def _magic(data: bytes) -> str:
    return f"{len(data)} bytes starting with {data[:8].hex(' ')}"
