"""PNG, JPEG and TIFF of 8 and 16 bit to Film."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cxrgaze.errors import FilmError
from cxrgaze.files import sha256
from cxrgaze.films.film import PIXEL_LIMIT, Film, Stored
from cxrgaze.films.quiet import quiet
from cxrgaze.films.windows import grey_levels

_FORMATS = ("PNG", "JPEG", "TIFF")


_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 274, 258, 262  # of TIFF 6.0, the first of EXIF too
_NOT_TURNED = "the file asks to be turned (EXIF orientation {}); it was not"
_COLOUR_SPREAD = 0.02  # mean difference between channels above which an RGB image is in colour


def film_from_image(data: bytes, name: str) -> Film:
    """The film in the bytes of a PNG, JPEG or TIFF file; `content_checked` is the caller's to do.

    Raises:
        FilmError: damaged, too large, or of no known format.
    """
    try:
        positive, is_negative = _black_is_zero(data)
        with contextlib.ExitStack() as stack:
            with quiet():  # Pillow warns of odd metadata; size is checked below
                opened = Image.open(io.BytesIO(positive), formats=_FORMATS)
                image = stack.enter_context(opened)
                width, height = image.size
                if width * height > PIXEL_LIMIT:
                    raise FilmError(f"{name}: {width} x {height} pixels, limit {PIXEL_LIMIT}")
                is_alone = _is_alone(image)
                orientation = _orientation(image)
            image.load()
            kind = str(image.format)
            is_cut = _is_cut_to_8_bits(image, data)
            pixels, reasons = _grey(_deep_colour(data, kind) if is_cut else image, is_negative)
            is_scaled = not is_cut and _is_scaled(image, pixels, is_negative)
            if kind == "TIFF":  # which Pillow and OpenCV turn, other files not
                pixels = _as_stored(pixels, orientation)
    except UnidentifiedImageError as error:
        raise FilmError(f"{name}: {_not_read(data)}") from error
    except (FilmError, MemoryError):
        raise
    except Exception as error:  # a hostile file can raise anything inside Pillow
        raise FilmError(f"{name}: damaged or cut short: {error or type(error).__name__}") from error
    if not is_alone:
        reasons = (*reasons, "multi-frame: more than one image in the file, expected one")
    pixels = np.ascontiguousarray(pixels)
    values, source, notes = grey_levels(pixels)
    if orientation != 1:
        notes = (*notes, _NOT_TURNED.format(orientation))
    stored = None
    if not is_scaled:
        kept = np.asarray(65535 - pixels if is_negative else pixels)
        stored = Stored(kept, 8 * kept.dtype.itemsize, larger_is_darker=is_negative)
    return Film(values, name, sha256(data), source, reasons=reasons, notes=notes, stored=stored)


def _is_alone(image: Image.Image) -> bool:
    """Whether there is no second image in the file; counting all of a long chain takes its time."""
    try:
        image.seek(1)
    except EOFError:
        return True
    image.seek(0)
    return False


def promised_samples(data: bytes) -> int:
    """How many samples the header of an image says that it has."""
    with quiet():
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return int(image.width * image.height * len(image.getbands()))


def _is_cut_to_8_bits(image: Image.Image, data: bytes) -> bool:
    """Whether a file of more than 8 bits is in colour or has alpha, which Pillow cuts to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        return False
    if image.format == "PNG":
        return data[24] == 16  # bit depth of the header chunk
    return bool(max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))) > 8)


def _deep_colour(data: bytes, kind: str) -> NDArray[np.uint16]:
    """RGB `(H, W, 3)` of a file of 16 bits in colour or with alpha.

    Pillow has read the file whole before: OpenCV alone would not refuse a damaged one.
    """
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.ndim != 3 or decoded.dtype != np.uint16:
        raise ValueError(f"a {kind} of 16 bits that OpenCV does not read")
    return np.asarray(decoded[..., 2::-1], dtype=np.uint16)


def _grey(
    image: Image.Image | NDArray[np.uint16], is_negative: bool
) -> tuple[NDArray[np.generic], tuple[str, ...]]:
    """Pixels as uint8 or uint16 `(H, W)`, and why the film is not applicable, if it is not."""
    if isinstance(image, np.ndarray):
        return np.rint(image.mean(axis=2)).astype(np.uint16), _colour_of(image, 65535)
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16, copy=False)
        return 65535 - values if is_negative else values, ()
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if is_negative:
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
    return np.asarray(colour.convert("L")), _colour_of(np.asarray(colour), 255)


def _is_scaled(image: Image.Image, pixels: NDArray[np.generic], is_negative: bool) -> bool:
    """Whether `_grey` could not keep an image's values: floats, or beyond 16 bits."""
    if image.mode not in ("I", "F", "I;32", "I;32S"):
        return False
    return is_negative or not np.array_equal(np.asarray(image), pixels)


def _colour_of(channels: NDArray[np.generic], white: int) -> tuple[str, ...]:
    """`colour_reason` of an RGB image `(H, W, 3)`."""
    spread = (channels.max(axis=2).astype(np.float32) - channels.min(axis=2)).mean() / white
    return colour_reason(float(spread))


def colour_reason(spread: float) -> tuple[str, ...]:
    """Why an image is no radiograph; empty if its channels agree.

    Args:
        spread: mean difference between the largest and the smallest channel, over white.
    """
    return ("colour image (RGB), expected a grey radiograph",) if spread > _COLOUR_SPREAD else ()


def _black_is_zero(data: bytes) -> tuple[bytes, bool]:
    """A TIFF of more than 8 bits that stores white as 0, said to store black as 0; whether it is.

    Of such a file Pillow inverts those of 8 bits, leaves the others and refuses big-endian ones.
    """
    orders = {b"II*\0": "<", b"MM\0*": ">"}
    order = orders.get(data[:4])
    if order is None:
        return data, False
    found: dict[int, tuple[int, str, int]] = {}
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", data, at)
            if values == 1 and kind in (3, 4):  # one SHORT or LONG, in the entry itself
                number = f"{order}{' HI'[kind - 2]}"
                found[tag] = (at + 8, number, *struct.unpack_from(number, data, at + 8))
    except struct.error:
        return data, False
    place, number, meaning = found.get(_PHOTOMETRIC, (0, "", 1))
    if meaning != 0 or found.get(_BITS_PER_SAMPLE, (0, "", 1))[2] <= 8:
        return data, False
    said = struct.pack(number, 1)
    return data[:place] + said + data[place + len(said) :], True


def _orientation(image: Image.Image) -> int:
    """How the file asks to be turned, 1 to 8; 1 is as it is stored (EXIF 2.3, TIFF 6.0)."""
    asked = image.getexif().get(_ORIENTATION, 1)
    return asked if asked in range(2, 9) else 1


def _as_stored(turned: NDArray[np.generic], orientation: int) -> NDArray[np.generic]:
    """Pixels that were turned as the file asks, in the grid that the file has."""
    return np.asarray(_BACK[orientation](turned)) if orientation in _BACK else turned


_BACK: dict[int, Callable[[NDArray[np.generic]], NDArray[np.generic]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a, -1),
}
"""What undoes each way of turning."""


def _not_read(data: bytes) -> str:
    """What a file is that is not read, and what to do with it."""
    for kind, remedy, is_one in _REFUSED:
        if is_one(data):
            return f"a {kind} file, which is not read; {remedy}"
    return (
        "not a PNG, JPEG, TIFF or DICOM file, or a kind of one that is not read; found "
        f"{len(data)} bytes starting with {data[:8].hex(' ')}"
    )


_CONVERT = "convert it to PNG of the same depth"
_REFUSED: tuple[tuple[str, str, Callable[[bytes], bool]], ...] = (
    ("BMP", _CONVERT, lambda data: data.startswith(b"BM") and data[6:10] == bytes(4)),
    ("WebP", _CONVERT, lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP"),
    ("GIF", _CONVERT, lambda data: data.startswith(b"GIF8")),
    (
        "JPEG 2000",
        "put it into DICOM, or convert it to PNG of the same depth",
        lambda data: data.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    ),
    ("JPEG XL", _CONVERT, lambda data: data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL "))),
    ("gzip", "unpack it", lambda data: data.startswith(b"\x1f\x8b")),
    ("ZIP", "unpack it", lambda data: data.startswith(b"PK\x03\x04")),
    ("PDF", "take the film itself", lambda data: data.startswith(b"%PDF")),
)
"""Kinds that are refused by name: each would be one more parser that a foreign file reaches."""
