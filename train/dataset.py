"""A labelled set as arrays on the canvas: images, labels and gaze densities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cxrgaze import heatmaps
from cxrgaze.errors import DataError
from cxrgaze.runtime.canvas import Geometry, to_canvas
from cxrgaze.runtime.film import film_from_bytes
from cxrgaze.samples import Gaze, LabelledSet
from cxrgaze.spec import ModelSpec

UNLABELLED = -1


@dataclass(frozen=True)
class Arrays:
    """Films of one split on the canvas, in the order of the set's rows."""

    films: tuple[str, ...]
    images: NDArray[np.float32]
    """`(N, 1, H, W)`, in [0, 1]."""
    labels: NDArray[np.int64]
    """`(N,)`, index of the class; `UNLABELLED` where films.csv has none."""
    densities: NDArray[np.float32]
    """`(N, 1, H, W)`, sum 1 over the film's area, zero in the pad; all zero without gaze."""
    geometries: tuple[Geometry, ...]
    gaze: tuple[Gaze | None, ...]

    @property
    def has_gaze(self) -> NDArray[np.bool_]:
        """`(N,)`, whether a film has a density."""
        return np.asarray(self.densities.any(axis=(1, 2, 3)))


def load_arrays(labelled: LabelledSet, spec: ModelSpec, preset: heatmaps.HeatmapPreset) -> Arrays:
    """Read, preprocess and place every film of `labelled`.

    Raises:
        DataError: classes other than the network's, a film that is not the recorded one.
        FilmError: a film that cannot be read or is not applicable.
    """
    if labelled.info.classes != spec.class_names:
        raise DataError(
            f"{labelled.folder}: classes {labelled.info.classes}, "
            f"the network has {spec.class_names}"
        )
    if not labelled.rows:
        raise DataError(f"{labelled.folder}: no films in this split")
    images, labels, densities, geometries = [], [], [], []
    for row in labelled.rows:
        film = film_from_bytes(labelled.film_bytes(row), row.film)
        if film.reasons:
            raise DataError(f"{labelled.folder / row.film}: {'; '.join(film.reasons)}")
        canvas, geometry = to_canvas(film.pixels, spec)
        images.append(canvas)
        geometries.append(geometry)
        labels.append(spec.class_names.index(row.label) if row.label else UNLABELLED)
        gaze = labelled.gaze.get(row.film)
        densities.append(canvas_density(gaze, geometry, preset) if gaze else np.zeros_like(canvas))
    return Arrays(
        tuple(row.film for row in labelled.rows),
        np.stack(images)[:, None],
        np.array(labels, dtype=np.int64),
        np.stack(densities)[:, None],
        tuple(geometries),
        tuple(labelled.gaze.get(row.film) for row in labelled.rows),
    )


def canvas_density(
    gaze: Gaze, geometry: Geometry, preset: heatmaps.HeatmapPreset
) -> NDArray[np.float32]:
    """The gaze density on the canvas `(H, W)`: sum 1 over the film's area, zero in the pad.

    Raises:
        DataError: the gaze has no row that the preset counts.
    """
    points, weights, sigmas = gaze.weighted(preset, geometry.film_width)
    on_film = geometry.to_canvas(points) - (geometry.left, geometry.top)
    area = (geometry.height, geometry.width)
    try:
        inside = heatmaps.density(on_film, weights, sigmas * geometry.scale, area)
    except ValueError as error:
        raise DataError(f"no density from this gaze: {error}") from error
    canvas = np.zeros((geometry.canvas_height, geometry.canvas_width), dtype=np.float32)
    geometry.crop(canvas)[:] = inside
    return canvas
