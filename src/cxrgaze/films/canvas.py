"""From film to canvas: one preprocessing function for training, calibration, gate and runtime.

Area resize by the rule of the spec: with the film's aspect and a zero pad, stretched, or of the
film's centre. The geometry is invertible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import FilmError
from cxrgaze.films.film import Film
from cxrgaze.spec import CanvasRule, ModelSpec

_ROUNDING = 1e-3
"""How far an area mean of values in [0, 1] may leave them: OpenCV sums in float32."""


@dataclass(frozen=True)
class Geometry:
    """Where a film lies on its canvas. All in pixels; pixel centres have integer coordinates.

    A window of the film fills an area of the canvas: the whole film, but for the rule `crop`.
    """

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
    film_top: int = 0
    """First film row of the window."""
    film_left: int = 0
    """First film column of the window."""
    shown_height: int = 0
    """Film rows of the window; 0: all."""
    shown_width: int = 0
    """Film columns of the window; 0: all."""

    @classmethod
    def fit(
        cls, film: tuple[int, int], canvas: tuple[int, int], rule: CanvasRule = "pad"
    ) -> Geometry:
        """The geometry of a rule; film and canvas are `(H, W)`.

        `pad`: the largest centred area of the film's aspect. `crop`: the largest centred window of
        the canvas's aspect.
        """
        if rule == "stretch":
            return cls(*film, *canvas, 0, 0, *canvas)
        if rule == "crop":
            shown = _inscribed(canvas, film)
            return cls(*film, *canvas, 0, 0, *canvas, *_margins(film, shown), *shown)
        area = _inscribed(film, canvas)
        return cls(*film, *canvas, *_margins(canvas, area), *area)

    @property
    def window(self) -> tuple[int, int]:
        """`(H, W)` of the film's window."""
        return self.shown_height or self.film_height, self.shown_width or self.film_width

    @property
    def shows_all(self) -> bool:
        """Whether the window is the whole film."""
        return self.window == (self.film_height, self.film_width)

    @property
    def scale(self) -> NDArray[np.float64]:
        """Canvas pixels per film pixel, `(x, y)`."""
        shown_height, shown_width = self.window
        return np.array([self.width / shown_width, self.height / shown_height])

    def to_canvas(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Film points `(n, 2)`, `(x, y)`, on the canvas; outside of it where it shows them not."""
        in_window = np.asarray(points) - (self.film_left, self.film_top)
        return (in_window + 0.5) * self.scale - 0.5 + (self.left, self.top)

    def to_film(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Canvas points `(n, 2)`, `(x, y)`, on the film."""
        in_window = (np.asarray(points) - (self.left, self.top) + 0.5) / self.scale - 0.5
        return in_window + (self.film_left, self.film_top)

    def shown(self, film: NDArray[np.floating]) -> NDArray[np.floating]:
        """View of the window of something of the film's size, `(H, W)`."""
        height, width = self.window
        rows = slice(self.film_top, self.film_top + height)
        return film[rows, self.film_left : self.film_left + width]

    def crop(self, canvas: NDArray[np.floating]) -> NDArray[np.floating]:
        """View of the film's area of a map `(..., H, W)` on the canvas."""
        rows = slice(self.top, self.top + self.height)
        return canvas[..., rows, self.left : self.left + self.width]


def to_canvas(pixels: NDArray[np.float32], spec: ModelSpec) -> tuple[NDArray[np.float32], Geometry]:
    """The canvas `(H, W)` in [0, 1] of a film's pixels `(h, w)` in [0, 1], and its geometry.

    Version `cxrgaze.spec.PREPROCESSING` by the spec's rule; any change of a canvas raises that
    number.

    Raises:
        FilmError: pixels that are not finite or not in [0, 1].
    """
    film = (pixels.shape[0], pixels.shape[1])
    geometry = Geometry.fit(film, (spec.height, spec.width), spec.canvas)
    canvas = np.zeros((spec.height, spec.width), dtype=np.float32)
    size = (geometry.width, geometry.height)
    area = cv2.resize(geometry.shown(pixels), size, interpolation=cv2.INTER_AREA)
    if not (area.min() >= -_ROUNDING and area.max() <= 1 + _ROUNDING):  # NaN fails too
        raise FilmError(
            f"pixels of a film must be finite and in [0, 1], found {area.min():.3g} to "
            f"{area.max():.3g}"
        )
    geometry.crop(canvas)[:] = np.clip(area, 0, 1)
    return canvas, geometry


def _inscribed(shape: tuple[int, int], into: tuple[int, int]) -> tuple[int, int]:
    """The largest `(H, W)` of the aspect of `shape` that goes into another."""
    scale = min(into[0] / shape[0], into[1] / shape[1])
    height, width = (
        min(max(round(side * scale), 1), most) for side, most in zip(shape, into, strict=True)
    )
    return height, width


def _margins(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[int, int]:
    """First row and column of what lies centred in `outer`."""
    return (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2


def canvases(
    films: Iterable[Film], spec: ModelSpec
) -> tuple[NDArray[np.float32], tuple[Geometry, ...]]:
    """The canvases `(N, 1, H, W)` of one film or more, and their geometries (`to_canvas`)."""
    images, geometries = zip(*(to_canvas(film.pixels, spec) for film in films), strict=True)
    return np.stack(images)[:, None], geometries
