"""The overlay: film, gaze density, and what must be said beside them."""

from __future__ import annotations

from typing import Any

import cv2
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
    picture = cv2.cvtColor((film * 255).astype(np.uint8), cv2.COLOR_GRAY2BGR)
    if reading.log_density is not None:
        picture = _with_gaze(picture, reading.film_density)
        picture = np.hstack([picture, _colour_bar(picture.shape[0])])
    missing = max(_MIN_WIDTH - picture.shape[1], 0)
    picture = cv2.copyMakeBorder(picture, 0, 0, 0, missing, cv2.BORDER_CONSTANT)
    return np.asarray(np.vstack([picture, _caption(reading, picture.shape[1])]), dtype=np.uint8)


def _with_gaze(picture: NDArray[Any], film_density: NDArray[np.float32]) -> NDArray[Any]:
    size = (picture.shape[1], picture.shape[0])
    density = cv2.resize(film_density, size, interpolation=cv2.INTER_LINEAR)
    relative = density / max(float(density.max()), np.finfo(np.float32).tiny)
    grey = picture.astype(np.float32)
    colour = cv2.applyColorMap((relative * 255).astype(np.uint8), _COLOURS).astype(np.float32)
    opacity = 0.65 * np.sqrt(relative)[..., None]
    picture = (grey * (1 - opacity) + colour * opacity).astype(np.uint8)
    region = (density >= top_mass_level(density)).astype(np.uint8)
    contours, _ = cv2.findContours(region, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, (255, 255, 255), 1, cv2.LINE_AA)
    return picture


def png(reading: Reading, pixels: NDArray[np.float32]) -> bytes:
    """The overlay as a PNG file (`render`)."""
    return cv2.imencode(".png", render(reading, pixels))[1].tobytes()


def top_mass_level(density: NDArray[Any], mass: float = TOP_MASS) -> float:
    """The level above which lies the smallest area with the share `mass` of the density."""
    ordered = np.sort(density, axis=None)[::-1].astype(np.float64)
    return float(ordered[np.searchsorted(np.cumsum(ordered), mass * ordered.sum())])


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
    wrapped = [(part, colour) for text, colour in lines for part in _wrap(text, width)]
    band = np.zeros((_BAND * len(wrapped) + 10, width, 3), dtype=np.uint8)
    for row, (text, colour) in enumerate(wrapped):
        _write(band, text, (10, _BAND * row + 22), colour)
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
