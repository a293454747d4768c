"""Heatmaps of any tool: which file is of which film, and what it says there as a density."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import DataError, FilmError
from cxrgaze.films.canvas import Geometry
from cxrgaze.films.decode import read_file
from cxrgaze.films.film import PIXEL_LIMIT
from cxrgaze.films.images import promised_samples

MapKind = Literal["activation", "probability", "log-density"]
"""Non-negative heat in any unit; a density of sum 1; its natural logarithm."""

SUFFIXES = (".npy", ".png")
_SUM = 0.01
"""How far the sum of a density may be from 1: half precision keeps it so."""
_NAMED = 3


def first_names(names: Iterable[object]) -> str:
    """How many there are and the first of them, for a message."""
    shown = sorted(map(str, names))
    more = ", ..." if len(shown) > _NAMED else ""
    return f"{len(shown)}, first {', '.join(shown[:_NAMED])}{more}"


@dataclass(frozen=True)
class MapFiles:
    """The maps in a folder."""

    of_film: Mapping[str, Path]
    """The map of each film that has one, by the film's path in its set."""
    foreign: Sequence[str]
    """Maps that are of no film of the set."""


def find_maps(folder: Path, films: Sequence[str]) -> MapFiles:
    """The maps in a folder and below it, by the films' names.

    A map is of the film whose path, path without suffix, file name or file name without suffix is
    the map's own without `.npy` or `.png`, and without the `.heatmap` that cxrgaze-predict adds.

    Args:
        films: paths of all films of the set.

    Raises:
        DataError: no folder, no map, a map that may be of several films or several of one film.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected one with a map a film")
    named: dict[str, set[str]] = defaultdict(set)
    for film in films:
        whole = PurePosixPath(film)
        for name in (film, str(whole.with_suffix("")), whole.name, whole.stem):
            named[name].add(film)
    found: dict[str, list[str]] = defaultdict(list)
    foreign, shared = [], []
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    for name, path in paths.items():
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            continue
        own = name[: -len(path.suffix)].removesuffix(".heatmap")
        if len(meant := named.get(own, set())) > 1:
            shared.append(f"{name} ({' or '.join(sorted(meant))})")
        for film in meant:
            found[film].append(name)
        if not meant:
            foreign.append(name)
    if not found:
        raise DataError(
            f"{folder}: no map of a film of the set ({first_names(foreign) if foreign else 'none'} "
            f"of others); expected files named as films, with {' or '.join(SUFFIXES)}"
        )
    if shared:
        raise DataError(
            f"{folder}: maps that may be of several films: {first_names(shared)}; put them into "
            "folders as the films are"
        )
    if twice := [f"{film} ({' and '.join(n)})" for film, n in found.items() if len(n) > 1]:
        raise DataError(f"{folder}: films with several maps: {first_names(twice)}; keep one each")
    return MapFiles({film: paths[names[0]] for film, names in found.items()}, foreign)


def read_map(path: Path, data: bytes, kind: MapKind, geometry: Geometry) -> NDArray[np.float64]:
    """What a map says over the film's area of the canvas, `(H, W)`, sum 1.

    Resized as a density: by area means where it is larger than that, else linearly.

    Args:
        path: stands in messages, and its suffix says what `data` is.
        data: the file's bytes: `.npy` with real numbers `(h, w)`, or a grey PNG of 8 or 16 bit,
            which is of kind activation.

    Raises:
        DataError: unreadable, of another shape than the film's, or not what its kind says.
    """
    values = _values(path, data, kind)
    _require_aspect(path, values.shape, (geometry.film_height, geometry.film_width))
    heat = _heat(path, values, kind)
    is_larger = heat.shape[0] > geometry.height or heat.shape[1] > geometry.width
    how = cv2.INTER_AREA if is_larger else cv2.INTER_LINEAR
    area = np.asarray(cv2.resize(heat, (geometry.width, geometry.height), interpolation=how))
    return np.asarray(area / area.sum(), dtype=np.float64)


def map_bytes(path: Path) -> bytes:
    """The bytes of a map.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read_file(path)
    except FilmError as error:
        raise DataError(str(error)) from error


def _values(path: Path, data: bytes, kind: MapKind) -> NDArray[np.generic]:
    """The numbers of a file, `(h, w)`."""
    if path.suffix.lower() == ".png":
        if kind != "activation":
            raise DataError(f"{path}: a PNG holds grey levels, not --kind {kind}; write it as npy")
        return _png(path, data)
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises what it likes on damaged bytes
        raise DataError(f"{path}: no npy array: {error or type(error).__name__}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu" or values.ndim != 2:
        found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else "an archive"
        raise DataError(f"{path}: found {found}, expected real numbers (H, W)")
    return values


def _png(path: Path, data: bytes) -> NDArray[np.generic]:
    try:
        if promised_samples(data) > PIXEL_LIMIT:
            raise ValueError(f"more than {PIXEL_LIMIT} pixels")
        values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if values is None:
            raise ValueError("damaged or cut short")
    except Exception as error:  # a hostile file can raise anything inside Pillow
        raise DataError(f"{path}: no PNG: {error or type(error).__name__}") from error
    if values.ndim != 2:
        raise DataError(
            f"{path}: a picture in colour {values.shape}, expected grey of 8 or 16 bit: an overlay "
            "or a colour map is no heat"
        )
    return np.asarray(values)


def _require_aspect(path: Path, found: tuple[int, ...], film: tuple[int, int]) -> None:
    """Refuse a map that does not have the film's aspect within a pixel.

    Raises:
        DataError: naming both.
    """
    height, width = found
    if not height or not width:
        raise DataError(f"{path}: an empty array {found}")
    right_width, right_height = height * film[1] / film[0], width * film[0] / film[1]
    if abs(width - right_width) > 1 and abs(height - right_height) > 1:
        raise DataError(
            f"{path}: {height} x {width} (H x W), expected the film's aspect ({film[0]} x "
            f"{film[1]}), as {height} x {max(round(right_width), 1)}"
        )


def _heat(path: Path, values: NDArray[np.generic], kind: MapKind) -> NDArray[np.float64]:
    """Non-negative heat of any unit.

    Raises:
        DataError: values that are not of the kind.
    """
    heat = values.astype(np.float64)
    if kind == "log-density":
        if np.isnan(heat).any() or heat.max() == np.inf or heat.max() == -np.inf:
            raise DataError(f"{path}: NaN or infinity, expected natural logarithms of a density")
        peak = heat.max()
        heat = np.exp(heat - peak)
        with np.errstate(over="ignore"):
            total = float(np.exp(peak) * heat.sum())
    else:
        if not np.isfinite(heat).all():
            raise DataError(f"{path}: NaN or infinity, expected finite heat")
        if heat.min() < 0:
            raise DataError(f"{path}: negative values, down to {heat.min():.3g}; expected heat")
        if not heat.any():
            raise DataError(f"{path}: zero everywhere, which says nothing of where readers look")
        total = float(heat.sum())
    if kind != "activation" and abs(total - 1) > _SUM:
        raise DataError(
            f"{path}: a density of sum {total:.4g}, expected 1; heat of any sum is of --kind "
            "activation"
        )
    return heat
