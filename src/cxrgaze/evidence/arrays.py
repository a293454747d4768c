"""A labelled set as arrays on the canvas: images, labels and gaze densities."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrgaze.command import counted
from cxrgaze.errors import DataError, FilmError, IntegrityError
from cxrgaze.evidence import heatmaps
from cxrgaze.evidence.gaze import Gaze
from cxrgaze.evidence.labelled_set import FilmRow, LabelledSet
from cxrgaze.evidence.truth import Truth, truth_of
from cxrgaze.files import new_folder, parse_json, render_json, sha256
from cxrgaze.films.canvas import Geometry, to_canvas
from cxrgaze.films.decode import film_from_bytes
from cxrgaze.spec import LOG_DENSITY, ModelSpec


@dataclass(frozen=True)
class Arrays:
    """Films of one split on the canvas, in the order of the set's rows."""

    films: tuple[str, ...]
    images: NDArray[np.float32]
    """`(N, 1, H, W)`, in [0, 1]."""
    truth: Truth
    """`(N, C)`, which classes of the network they have, where that is known."""
    densities: NDArray[np.float32]
    """`(N, 1, H, W)`, sum 1 over the film's area, zero in the pad; all zero without gaze, or where
    the network has no map to compare it with."""
    geometries: tuple[Geometry, ...]
    gaze: tuple[Gaze | None, ...]
    teacher_logits: NDArray[np.float32] | None = None
    """`(N, C)`, of a teacher (`cxrgaze.train.distill`)."""
    teacher_densities: NDArray[np.float32] | None = None
    """`(N, 1, H, W)`, sum 1 over the film's area, of a teacher."""

    @property
    def has_gaze(self) -> NDArray[np.bool_]:
        """`(N,)`, whether a film has a density."""
        return np.asarray(self.densities.any(axis=(1, 2, 3)))


def load_arrays(
    labelled: LabelledSet,
    spec: ModelSpec,
    preset: heatmaps.HeatmapPreset,
    cache: Path | None = None,
) -> Arrays:
    """Read, preprocess and place every film of `labelled`.

    Args:
        cache: folder to keep the canvases in; a second call with the same films, gaze, canvas and
            preset maps them from there instead of reading films again. They are films of the set:
            keep them where the set may be.

    Raises:
        DataError: classes that do not fit the network's (`require_classes`); films that cannot be
            read, are not applicable, are not the recorded ones, or whose gaze gives no density: all
            of them, by name.
    """
    require_classes(labelled, spec)
    if not labelled.rows:
        raise DataError(f"{labelled.folder}: no films in this split")
    gaze = labelled.gaze if LOG_DENSITY in spec.heads else {}
    labelled = replace(labelled, gaze=gaze)
    if cache is None:
        placed = list(_all_placed(labelled, spec, preset))
        images, densities = (np.stack([getattr(p, k) for p in placed])[:, None] for k in _MAPS)
        geometries = [p.geometry for p in placed]
    else:
        images, densities, geometries = _cached(labelled, spec, preset, cache)
    return Arrays(
        tuple(row.film for row in labelled.rows),
        images,
        truth_of([labelled.known(row) for row in labelled.rows], spec),
        densities,
        tuple(geometries),
        tuple(labelled.gaze.get(row.film) for row in labelled.rows),
    )


def require_classes(labelled: LabelledSet, spec: ModelSpec) -> None:
    """Refuse a set whose labels say nothing of a network's classes.

    Exclusive classes of the set must all be classes of the network, which may have more; of
    findings one that both have is enough, and exclusive classes are findings too.

    Raises:
        DataError: naming both.
    """
    info, names = labelled.info, spec.class_names
    if not names or not info.classes:
        return
    shared = set(info.class_names) & set(names)
    kinds = (info.class_kind, spec.class_kind)
    fit = shared == set(info.class_names) if spec.exclusive else bool(shared)
    if kinds == ("findings", "exclusive") or not fit:
        raise DataError(
            f"{labelled.folder}: {info.class_kind} classes {info.class_names}, the network's are "
            f"{spec.class_kind}: {names}"
        )


@dataclass(frozen=True)
class _Placed:
    images: NDArray[np.float32]
    densities: NDArray[np.float32]
    geometry: Geometry


_MAPS = ("images", "densities")
_GEOMETRIES = "geometries.json"
_NAMED = 100  # films that an error names


def _all_placed(
    labelled: LabelledSet, spec: ModelSpec, preset: heatmaps.HeatmapPreset
) -> Iterator[_Placed]:
    """Every film, or at the end an error that names all that cannot be used."""
    problems = []
    for row in counted(labelled.rows, len(labelled.rows), "film"):
        try:
            yield _place(labelled, row, spec, preset)
        except (FilmError, DataError) as error:
            problems.append(str(error))
    if problems:
        named = "; ".join(problems[:_NAMED]) + ("; ..." if len(problems) > _NAMED else "")
        raise DataError(
            f"{labelled.folder}: {len(problems)} of {len(labelled.rows)} films cannot be used, and "
            f"no figure is given of the rest: {named}"
        )


def _place(
    labelled: LabelledSet, row: FilmRow, spec: ModelSpec, preset: heatmaps.HeatmapPreset
) -> _Placed:
    film = film_from_bytes(labelled.film_bytes(row), row.film, keep_stored=spec.needs_stored)
    if film.reasons:
        raise DataError(f"{labelled.folder / row.film}: {'; '.join(film.reasons)}")
    try:
        canvas, geometry = to_canvas(film, spec)
    except FilmError as error:
        raise FilmError(f"{labelled.folder / row.film}: {error}") from error
    gaze = labelled.gaze.get(row.film)
    try:
        density = canvas_density(gaze, geometry, preset) if gaze else np.zeros_like(canvas)
    except DataError as error:
        raise DataError(
            f"{labelled.folder / 'fixations.csv'}, film {row.film}: {error}; drop its rows to "
            "train without its gaze"
        ) from error
    return _Placed(canvas, density, geometry)


def _cached(
    labelled: LabelledSet, spec: ModelSpec, preset: heatmaps.HeatmapPreset, cache: Path
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[Geometry]]:
    """Canvases from the cache, made first where they are not there."""
    folder = cache / _cache_key(labelled, spec, preset)
    if not (folder / _GEOMETRIES).is_file():
        shape = (len(labelled.rows), 1, spec.height, spec.width)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with new_folder(folder, _GEOMETRIES) as new, contextlib.ExitStack() as stack:
            # Ordinary writes: a full disk is an error then, and not a signal as in a mapped file.
            files = {k: stack.enter_context((new / f"{k}.npy").open("wb")) for k in _MAPS}
            for file in files.values():
                np.lib.format.write_array_header_1_0(file, header)
            geometries = []
            for placed in _all_placed(labelled, spec, preset):
                for name, file in files.items():
                    file.write(getattr(placed, name).astype("<f4").tobytes())
                geometries.append(astuple(placed.geometry))
            (new / _GEOMETRIES).write_bytes(render_json({"geometries": geometries}))
    try:
        images, densities = (np.load(folder / f"{k}.npy", mmap_mode="c") for k in _MAPS)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"cache {folder} is damaged ({error}); delete it") from error
    content = parse_json((folder / _GEOMETRIES).read_bytes(), _GEOMETRIES)
    return images, densities, [Geometry(*values) for values in content["geometries"]]


def _cache_key(labelled: LabelledSet, spec: ModelSpec, preset: heatmaps.HeatmapPreset) -> str:
    """Everything that a canvas or a density depends on."""
    gaze = labelled.folder / "fixations.csv"
    parts = [
        *(f"{row.film} {row.sha256}" for row in labelled.rows),
        sha256(gaze.read_bytes()) if labelled.gaze and gaze.is_file() else "no gaze",
        f"{spec.height}x{spec.width}, {spec.canvas}, preprocessing {spec.preprocessing}",
        preset.model_dump_json(),
    ]
    return sha256("\n".join(parts).encode())[:32]


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
