"""From film to canvas: one preprocessing function for training, calibration, gate and runtime.

Area resize by the rule of the spec: with the film's aspect and a zero pad, stretched, or of the
film's centre; or the authors' preprocessing, which samples stored values
(docs/method.md#authors-preprocessing). The geometry is invertible.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import FilmError, NotApplicableError
from cxrgaze.films.decode import load_film
from cxrgaze.films.film import Film
from cxrgaze.spec import FRAME, CanvasRule, ModelSpec, sampling_step

_ROUNDING = 1e-3
"""How far an area mean of values in [0, 1] may leave them: OpenCV sums in float32."""


@dataclass(frozen=True)
class Geometry:
    """Where a film lies on its canvas. All in pixels; pixel centres have integer coordinates.

    A window of the film fills an area of the canvas: the whole film, but for the rules `crop` and
    `cxrgazelearn`. That of the latter ends half a step beside the outermost film pixels that the
    canvas shows, and so may stick out of the film.
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
    film_top: float = 0
    """First film row of the window; between two rows where the canvas takes one of an even number
    of pixels."""
    film_left: float = 0
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
        the canvas's aspect. `cxrgazelearn`: the film centred in `FRAME`, which the canvas samples.

        Raises:
            ValueError: `cxrgazelearn` with a canvas that does not sample the frame evenly.
            NotApplicableError: `cxrgazelearn` with a film that the frame does not hold, or of which
                the canvas shows no pixel.
        """
        if rule == "stretch":
            return cls(*film, *canvas, 0, 0, *canvas)
        if rule == "crop":
            shown = _inscribed(canvas, film)
            return cls(*film, *canvas, 0, 0, *canvas, *_margins(film, shown), *shown)
        if rule == "cxrgazelearn":
            return cls._sampling(film, canvas)
        area = _inscribed(film, canvas)
        return cls(*film, *canvas, *_margins(canvas, area), *area)

    @classmethod
    def _sampling(cls, film: tuple[int, int], canvas: tuple[int, int]) -> Geometry:
        """The geometry of `cxrgazelearn`."""
        step = sampling_step(canvas)
        rows, columns = (_sampled(*sides, step) for sides in zip(film, FRAME, strict=True))
        is_shown = rows.shown > 0 and columns.shown > 0
        if not is_shown or film[0] > FRAME[0] or film[1] > FRAME[1]:
            raise NotApplicableError(
                (
                    f"{film[1]} x {film[0]} pixels: the preprocessing cxrgazelearn takes one of "
                    f"{step} pixels of a film of at most {FRAME[1]} x {FRAME[0]}; this one would "
                    + ("be cut" if is_shown else "not be seen"),
                )
            )
        return cls(
            *film,
            *canvas,
            rows.on_canvas,
            columns.on_canvas,
            rows.shown,
            columns.shown,
            rows.on_film - (step - 1) / 2,
            columns.on_film - (step - 1) / 2,
            step * rows.shown,
            step * columns.shown,
        )

    @property
    def window(self) -> tuple[int, int]:
        """`(H, W)` of the film's window."""
        return self.shown_height or self.film_height, self.shown_width or self.film_width

    @property
    def shows_all(self) -> bool:
        """Whether the window is the whole film."""
        whole = (0, 0, self.film_height, self.film_width)
        return (self.film_top, self.film_left, *self.window) == whole

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
        """View of what the window holds of something of the film's size, `(H, W)`."""
        return film[self._overlap[0]]

    def on_film(self, window: NDArray[np.floating]) -> NDArray[np.floating]:
        """View of what is film of something of the window's size; of the shape of `shown`."""
        return window[self._overlap[1]]

    @property
    def _overlap(self) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where window and film meet: rows and columns of the film, and of the window.

        A window that begins between two rows counts from the first of them.
        """
        film, window = [], []
        for first, shown, side in zip(
            (self.film_top, self.film_left),
            self.window,
            (self.film_height, self.film_width),
            strict=True,
        ):
            start = math.floor(first)
            low, high = max(start, 0), min(start + shown, side)
            film.append(slice(low, high))
            window.append(slice(low - start, high - start))
        return (film[0], film[1]), (window[0], window[1])

    def crop(self, canvas: NDArray[np.floating]) -> NDArray[np.floating]:
        """View of the film's area of a map `(..., H, W)` on the canvas."""
        rows = slice(self.top, self.top + self.height)
        return canvas[..., rows, self.left : self.left + self.width]


def to_canvas(film: Film, spec: ModelSpec) -> tuple[NDArray[np.float32], Geometry]:
    """The canvas `(H, W)` in [0, 1] of a film, and its geometry.

    Version `cxrgaze.spec.PREPROCESSING` by the spec's rule; any change of a canvas raises that
    number. `cxrgazelearn` takes `Film.stored` (`keep_stored`), the other rules `Film.pixels`.

    Raises:
        FilmError: pixels that are not finite or not in [0, 1].
        NotApplicableError: by `cxrgazelearn` alone, a film without stored values of DICOM or 16
            bits, with others than it is made for, or larger than `FRAME`.
    """
    if spec.needs_stored:
        return _sampled_canvas(film, spec)
    pixels = film.pixels
    geometry = Geometry.fit(film.shape, (spec.height, spec.width), spec.canvas)
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


def load_for(spec: ModelSpec, path: Path | str) -> Film:
    """`load_film` for a network's canvases: with stored values and reasons, where its rule has any.

    Raises:
        FilmError: as `load_film`.
    """
    film = load_film(path, keep_stored=spec.needs_stored)
    if spec.needs_stored:
        try:
            to_canvas(film, spec)
        except NotApplicableError as error:
            return replace(film, reasons=(*film.reasons, *error.reasons))
    return film


def not_applied(film: Film, spec: ModelSpec) -> tuple[str, ...]:
    """What a reader of a result must know of a canvas that is not made of `Film.pixels`."""
    if not spec.needs_stored:
        return ()
    inverted = film.stored is not None and film.stored.larger_is_darker
    polarity = "larger values are darker and were not inverted" if inverted else "nor of polarity"
    return (
        f"preprocessing {spec.canvas}: stored values over the largest on the canvas, at a fixed "
        f"scale; no rule of windows (rescale, VOI LUT) or percentiles was applied, {polarity}; "
        "notes on them are of the picture alone",
    )


def _sampled_canvas(film: Film, spec: ModelSpec) -> tuple[NDArray[np.float32], Geometry]:
    """The canvas by `cxrgazelearn`: pixels of the frame without smoothing, over their largest."""
    is_dicom = film.identity is not None  # which may have 8 bits too
    if not is_dicom and film.pixel_source in ("image-8bit", "array"):
        raise NotApplicableError(
            (
                f"{film.pixel_source}: the preprocessing {spec.canvas} takes stored values of "
                "DICOM, or of images and arrays of 16 bits",
            )
        )
    if film.stored is None:
        raise NotApplicableError(
            (
                f"no stored values, which the preprocessing {spec.canvas} takes: load it with "
                "keep_stored=True; a file of floats, or of more than 16 bits, has none",
            )
        )
    geometry = Geometry.fit(film.shape, (spec.height, spec.width), spec.canvas)
    step = sampling_step((spec.height, spec.width))
    centre = (step - 1) / 2
    row, column = int(geometry.film_top + centre), int(geometry.film_left + centre)
    seen = film.stored.values[row::step, column::step]
    low, high = int(seen.min()), int(seen.max())
    if low < 0 or high == 0:
        raise NotApplicableError(
            (
                f"stored values from {low} to {high}: the preprocessing {spec.canvas} is for such "
                "from 0 on, and not all 0",
            )
        )
    canvas = np.zeros((spec.height, spec.width), dtype=np.float32)
    geometry.crop(canvas)[:] = seen.astype(np.float32) / np.float32(high)
    return canvas, geometry


class _Samples(NamedTuple):
    """Pixels of one side of a film that a canvas shows."""

    on_canvas: int
    """The first, on the canvas."""
    on_film: int
    """The first, on the film."""
    shown: int
    """How many."""


def _sampled(side: int, frame: int, step: int) -> _Samples:
    """Of a film's side in the frame's middle, what one of `step` pixels of the frame shows."""
    margin = (frame - side) // 2
    first, end = -(-margin // step), -(-(margin + side) // step)
    return _Samples(first, first * step - margin, end - first)


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
    images, geometries = zip(*(to_canvas(film, spec) for film in films), strict=True)
    return np.stack(images)[:, None], geometries


def drawn_canvases(
    drawings: Iterable[Film], spec: ModelSpec
) -> tuple[NDArray[np.float32], tuple[Geometry, ...]]:
    """`canvases` of drawings, which store no film's values: by `pad` where the rule takes those."""
    rule = "pad" if spec.needs_stored else spec.canvas
    return canvases(drawings, spec.model_copy(update={"canvas": rule}))
