"""The canvases that an export looks at, each kind with seeds of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import DataError
from cxrgaze.evidence import phantom
from cxrgaze.films.ahead import usable
from cxrgaze.films.canvas import canvases, drawn_canvases, load_for
from cxrgaze.films.film import film_from_array
from cxrgaze.spec import ModelSpec

GOLDEN_SEED = 2_403_169
PARITY_SEED = 1_000_000  # apart from every seed that training uses
CALIBRATION_SEED = 2_000_000
LARGE_CANVAS = 256 * 256
"""Pixels above which parity takes 4 phantoms instead of 32, and the audit one film."""


def is_large(spec: ModelSpec) -> bool:
    """Whether a canvas is so large that fewer films must do."""
    return spec.height * spec.width > LARGE_CANVAS


def phantom_canvases(spec: ModelSpec, count: int, first_seed: int) -> NDArray[np.float32]:
    """Canvases `(count, 1, H, W)` of phantoms drawn at the canvas's size."""
    shape = (max(spec.height, 96), max(spec.width, 96))
    drawn = (phantom.draw(first_seed + i, shape=shape).pixels for i in range(count))
    return drawn_canvases(map(film_from_array, drawn), spec)[0]


def parity_canvases(spec: ModelSpec, films: Sequence[Path]) -> tuple[NDArray[np.float32], str]:
    """Canvases for parity and what they are: those of `films`, or phantoms where there are none.

    Raises:
        DataError: no film that the network may be applied to.
    """
    if not films:
        count = 4 if is_large(spec) else 32
        images = phantom_canvases(spec, count, PARITY_SEED)
        return images, f"{count} phantoms (synthetic drawings)"
    given = usable(films, partial(load_for, spec))
    if not given.films:
        raise DataError(f"none of the {len(films)} films given by --films can be read")
    images = canvases((film for _, film in given.films), spec)[0]
    what = (f"{len(given.films)} films given by --films", given.share)
    return images, "; ".join(filter(None, what))
