"""From film to canvas: one preprocessing function for training, calibration, gate and runtime.

Aspect-preserving area resize, then zero pad to the centre. The geometry is invertible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import FilmError
from cxrgaze.films.film import Film
from cxrgaze.spec import ModelSpec

_ROUNDING = 1e-3
"""How far an area mean of values in [0, 1] may leave them: OpenCV sums in float32."""


@dataclass(frozen=True)
class Geometry:
    """Where a film lies on its canvas. All in pixels; pixel centres have integer coordinates."""

    film_height: int
    film_width: int
    canvas_height: int
    canvas_width: int
    top: int
    """First canvas row of the film's area."""
    left: int
    """First canvas column of the film's area."""
    height: int
    """Canvas rows of the film's area."""
    width: int
    """Canvas columns of the film's area."""

    @classmethod
    def fit(cls, film: tuple[int, int], canvas: tuple[int, int]) -> Geometry:
        """The largest centred area of the film's aspect on the canvas; both are `(H, W)`."""
        scale = min(canvas[0] / film[0], canvas[1] / film[1])
        height = min(max(round(film[0] * scale), 1), canvas[0])
        width = min(max(round(film[1] * scale), 1), canvas[1])
        top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
        return cls(*film, *canvas, top, left, height, width)

    @property
    def scale(self) -> NDArray[np.float64]:
        """Canvas pixels per film pixel, `(x, y)`."""
        return np.array([self.width / self.film_width, self.height / self.film_height])

    def to_canvas(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Film points `(n, 2)`, `(x, y)`, on the canvas."""
        return (np.asarray(points) + 0.5) * self.scale - 0.5 + (self.left, self.top)

    def to_film(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Canvas points `(n, 2)`, `(x, y)`, on the film."""
        return (np.asarray(points) - (self.left, self.top) + 0.5) / self.scale - 0.5

    def crop(self, canvas: NDArray[np.floating]) -> NDArray[np.floating]:
        """View of the film's area of a map `(..., H, W)` on the canvas."""
        rows = slice(self.top, self.top + self.height)
        return canvas[..., rows, self.left : self.left + self.width]


def to_canvas(pixels: NDArray[np.float32], spec: ModelSpec) -> tuple[NDArray[np.float32], Geometry]:
    """The canvas `(H, W)` in [0, 1] of a film's pixels `(h, w)` in [0, 1], and its geometry.

    Version `cxrgaze.spec.PREPROCESSING`; any change of a canvas raises that number.

    Raises:
        FilmError: pixels that are not finite or not in [0, 1].
    """
    geometry = Geometry.fit((pixels.shape[0], pixels.shape[1]), (spec.height, spec.width))
    canvas = np.zeros((spec.height, spec.width), dtype=np.float32)
    size = (geometry.width, geometry.height)
    area = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    if not (area.min() >= -_ROUNDING and area.max() <= 1 + _ROUNDING):  # NaN fails too
        raise FilmError(
            f"pixels of a film must be finite and in [0, 1], found {area.min():.3g} to "
            f"{area.max():.3g}"
        )
    geometry.crop(canvas)[:] = np.clip(area, 0, 1)
    return canvas, geometry


def canvases(
    films: Iterable[Film], spec: ModelSpec
) -> tuple[NDArray[np.float32], tuple[Geometry, ...]]:
    """The canvases `(N, 1, H, W)` of one film or more, and their geometries (`to_canvas`)."""
    images, geometries = zip(*(to_canvas(film.pixels, spec) for film in films), strict=True)
    return np.stack(images)[:, None], geometries
