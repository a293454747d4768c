"""The overlay: film, gaze density, and what must be said beside them."""

from __future__ import annotations

import struct
from functools import cache, lru_cache
from typing import Any
from zlib import crc32

import cv2
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from cxrgaze.runtime.reading import Reading

MAX_SIDE = 1024
"""Longest side of the film on the overlay, in pixels."""
TOP_MASS = 0.5
"""The contour encloses the smallest area that holds this share of the density."""

_COLOURS = cv2.COLORMAP_VIRIDIS  # perceptually uniform, readable without colour vision
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_BAND = 26  # height of one line of text
_BAR = 86  # width of the colour bar's column
_MIN_WIDTH = 560


def render(reading: Reading, pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The overlay of a reading on its film's `pixels` `(H, W)` in [0, 1]; BGR uint8.

    Colour is the density over its own peak, more opaque where it is higher; the contour encloses
    `TOP_MASS` of the density. Below stand label, probabilities, flags, notice and warnings. Without
    a map it is the film, without classes the map alone.
    """
    scale = min(MAX_SIDE / max(pixels.shape), 1.0)
    size = (max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1))
    film = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    grey = (film * 255).astype(np.uint8)
    has_map = reading.log_density is not None
    width = max(size[0] + (_BAR if has_map else 0), _MIN_WIDTH)
    caption = _caption(reading, width)
    picture = np.zeros((size[1] + len(caption), width, 3), dtype=np.uint8)
    picture[size[1] :] = caption
    if has_map:
        density = reading.film_density if reading.geometry.shows_all else reading.heatmap()
        picture[: size[1], : size[0]] = _with_gaze(grey, density)
        picture[: size[1], size[0] : size[0] + _BAR] = _colour_bar(size[1])
    else:
        picture[: size[1], : size[0]] = grey[..., None]
    return picture


def _with_gaze(grey: NDArray[Any], density: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A film's grey levels under the colours of its density, of whatever size, with the contour."""
    size = (grey.shape[1], grey.shape[0])
    density = np.asarray(cv2.resize(density, size, interpolation=cv2.INTER_LINEAR), np.float32)
    levels = _levels(density)
    blended = _blended().take(levels + _LEVELS * grey.astype(np.int32))
    coloured = blended.view(np.uint8).reshape(*grey.shape, 4)
    picture = np.asarray(cv2.cvtColor(coloured, cv2.COLOR_BGRA2BGR), dtype=np.uint8)
    region = (density >= top_mass_level(density, levels=levels)).astype(np.uint8)
    contours, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, (255, 255, 255), 1, cv2.LINE_AA)
    return picture


_LEVELS = 1024
"""Steps of the root of the density over its peak, in which opacity is linear."""


def _levels(density: NDArray[Any]) -> NDArray[np.uint16]:
    """The step of each value of a density."""
    peak = max(float(density.max()), np.finfo(np.float32).tiny)
    root = np.sqrt(density.astype(np.float32, copy=False) * np.float32(1 / peak))
    return np.asarray((root * np.float32(_LEVELS - 1) + np.float32(0.5)).astype(np.uint16))


@cache
def _blended() -> NDArray[np.uint32]:
    """Blue, green, red and nothing, by grey level and by level of the density."""
    root = np.linspace(0, 1, _LEVELS, dtype=np.float32)
    ramp = (root**2 * 255).astype(np.uint8)[None]
    colour = cv2.applyColorMap(ramp, _COLOURS).astype(np.float32)
    opacity = 0.65 * root[None, :, None]
    grey = np.arange(256, dtype=np.float32)[:, None, None]
    blended = np.zeros((256, len(root), 4), dtype=np.uint8)
    blended[..., :3] = grey * (1 - opacity) + colour * opacity
    return np.asarray(blended.view(np.uint32)[..., 0])


def top_mass_level(
    density: NDArray[Any], mass: float = TOP_MASS, levels: NDArray[np.uint16] | None = None
) -> float:
    """The level above which lies the smallest area with the share `mass` of the density.

    By counting: only the values of one step are sorted.

    Args:
        levels: the step of each value, where it is known.
    """
    steps = _levels(density) if levels is None else levels
    counts = cv2.calcHist([steps], [0], None, [_LEVELS], [0, _LEVELS]).ravel()
    guess = np.cumsum((counts * np.arange(_LEVELS, dtype=np.float64) ** 2)[::-1])
    wanted = mass * float(density.sum(dtype=np.float64))
    if not wanted:
        return 0.0
    step = _LEVELS - 1 - int(np.searchsorted(guess, mass * guess[-1]))
    while (above := _sum(density, steps > step)) >= wanted and step < _LEVELS - 1:
        step += 1
    while step and above + (own := _sum(density, steps == step)) < wanted:
        above, step = above + own, step - 1
    ordered = np.sort(density[steps == step])[::-1].astype(np.float64)
    place = int(np.searchsorted(above + np.cumsum(ordered), wanted))
    return float(ordered[min(place, len(ordered) - 1)])


def _sum(density: NDArray[Any], where: NDArray[np.bool_]) -> float:
    """The mass of a density where it is asked for."""
    return float(np.dot(density.ravel(), where.ravel()))


def png(reading: Reading, pixels: NDArray[np.float32]) -> bytes:
    """The overlay as a PNG file (`render`).

    Each row as differences to the one above, by libdeflate: six tenths of the time that
    `cv2.imencode` takes, and a smaller file. Source: W3C, PNG (Third Edition), 5 and 9.
    """
    picture = cv2.cvtColor(render(reading, pixels), cv2.COLOR_BGR2RGB)
    height, width, _ = picture.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 0] = 2  # filter "Up"
    values = picture.reshape(height, -1)
    rows[0, 1:] = values[0]
    np.subtract(values[1:], values[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bit, RGB
    data = imagecodecs.deflate_encode(rows.tobytes(), level=1)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", crc32(content, crc32(kind)))
        for kind, content in chunks
    )


@lru_cache(maxsize=8)
def _colour_bar(height: int) -> NDArray[np.uint8]:
    bar = np.zeros((height, _BAR, 3), dtype=np.uint8)
    top, bottom = 34, height - 12
    ramp = np.linspace(255, 0, max(bottom - top, 1)).astype(np.uint8)[:, None]
    bar[top:bottom, 10:28] = cv2.applyColorMap(ramp, _COLOURS)
    _write(bar, "gaze", (8, 20))
    for share, text in ((0.0, "peak"), (0.5, "0.5"), (1.0, "0")):
        _write(bar, text, (34, int(top + share * (bottom - top)) + (8 if share == 0 else 4)))
    return bar


def _caption(reading: Reading, width: int) -> NDArray[np.uint8]:
    lines = [(text, (200, 200, 200)) for text in _diagnosis(reading)]
    if lines:
        lines[0] = (lines[0][0], (255, 255, 255))
    if reading.log_density is not None:
        lines.append((f"contour: {TOP_MASS:.0%} of the predicted gaze", (200, 200, 200)))
    lines += [(text, (90, 200, 255)) for text in (reading.notice, *reading.warnings)]
    bands = [_band(text, colour, width) for text, colour in lines]
    return np.vstack([*bands, np.zeros((10, width, 3), dtype=np.uint8)])


@lru_cache(maxsize=64)
def _band(text: str, colour: tuple[int, int, int], width: int) -> NDArray[np.uint8]:
    """A text in as many lines as it takes; most are the same under film after film."""
    lines = _wrap(text, width)
    band = np.zeros((_BAND * len(lines), width, 3), dtype=np.uint8)
    for row, line in enumerate(lines):
        _write(band, line, (10, _BAND * row + 22), colour)
    return band


def _diagnosis(reading: Reading) -> list[str]:
    """Label, probabilities and flags in lines of text."""
    if not reading.probabilities:
        return []
    named = {name: name.replace("_", " ") for name in reading.probabilities}
    shares = ",  ".join(f"{named[name]} {p:.2f}" for name, p in reading.probabilities.items())
    points = reading.operating_points
    raised = [
        f"{named[name]} (from {points[name]:.2f})" for name, on in reading.flags.items() if on
    ]
    flags = f"flags, each by its own operating point: {', '.join(raised) or 'none'}"
    if reading.label is None:
        return [flags, shares]
    label = f"label, the most probable: {named[reading.label]} "
    return [f"{label}{reading.probabilities[reading.label]:.2f}", shares, flags]


def _wrap(text: str, width: int) -> list[str]:
    """Lines of `text` that fit into `width` pixels, broken between words."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if cv2.getTextSize(longer, _FONT, 0.5, 1)[0][0] > width - 20 and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(
    picture: NDArray[np.uint8],
    text: str,
    at: tuple[int, int],
    colour: tuple[int, int, int] = (220, 220, 220),
) -> None:
    cv2.putText(picture, text, at, _FONT, 0.5, colour, 1, cv2.LINE_AA)
