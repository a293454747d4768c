"""The phantom: seeded drawings of a chest with a label and two simulated readers' fixations.

It exists so that training, export, gates and tests have data that anyone can make. What a network
trained on it says of a real film means nothing; phantom figures never stand beside clinical ones.

Recipe: docs/method.md#phantom. Coordinates are [-1, 1] across the shorter side, y downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cxrgaze.evidence.class_presets import PRESETS
from cxrgaze.evidence.gaze import Gaze
from cxrgaze.evidence.labelled_set import FilmRow, LabelledSet, SetInfo, Split, write_set
from cxrgaze.files import sha256

_STREAM = 20240316970
SHAPES = ((96, 96), (96, 80), (80, 96))  # (H, W): square, portrait, landscape
CLASSES = PRESETS["paper"].classes
LABELS = tuple(c.name for c in CLASSES)
READERS = ("reader-1", "reader-2")
EASY = 0.0
HARD = 0.57
"""The difficulty at which the demo network's macro AUC is near 0.90 (measured, see the card)."""


@dataclass(frozen=True)
class Phantom:
    """One drawing."""

    pixels: NDArray[np.uint8]
    """`(H, W)`."""
    label: str
    gaze: Gaze
    """Fixations of both readers, in pixels of the drawing."""


def draw(seed: int, *, difficulty: float = EASY, shape: tuple[int, int] | None = None) -> Phantom:
    """The phantom number `seed`.

    Args:
        seed: non-negative; the same seed, difficulty and shape give the same phantom.
        difficulty: 0 (plain lesions) to 1 (no lesion contrast at all).
        shape: `(H, W)`; None picks one of `SHAPES` by the seed.

    Raises:
        ValueError: difficulty outside [0, 1].
    """
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty must be in [0, 1], found {difficulty}")
    rng = np.random.default_rng([_STREAM, seed])
    label = LABELS[rng.integers(len(LABELS))]
    height, width = shape or SHAPES[rng.integers(len(SHAPES))]
    half = min(height, width) / 2
    centre = np.array([rng.uniform(-0.14, 0.14), rng.uniform(-0.12, 0.12)])
    scale = rng.uniform(0.85, 1.08)
    x = ((np.arange(width) - (width - 1) / 2) / half - centre[0])[None, :] / scale
    y = ((np.arange(height) - (height - 1) / 2) / half - centre[1])[:, None] / scale

    picture, lungs = _anatomy(rng, x, y)
    contrast = 1 - difficulty
    growth = contrast if label == "heart_failure" else 0.0
    heart_r = rng.uniform(0.26 + 0.05 * growth, 0.33 + 0.09 * growth)
    picture += 0.22 * _soft((x - 0.12) ** 2 + ((y - 0.28) / 0.95) ** 2 < heart_r**2, half)
    foci = _foci(rng, label)
    for focus_x, focus_y, radius, amplitude in foci:
        blob = np.exp(-(((x - focus_x) ** 2 + (y - focus_y) ** 2) / (2 * (0.75 * radius) ** 2)))
        picture += contrast * amplitude * blob * (0.35 + 0.65 * lungs)
    if rng.random() < 0.35:  # a line or tube, whatever the label
        slope, offset = rng.uniform(-0.5, 0.5), rng.uniform(-0.3, 0.3)
        picture += 0.18 * ((np.abs(x - offset - slope * y) < 0.015) & (y < 0.3))
    picture = picture * rng.uniform(0.85, 1.15) + rng.normal(
        0, rng.uniform(0.02, 0.045), picture.shape
    )
    pixels = np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)

    points, durations, readers = [], [], []
    for reader in READERS:
        seen, how_long = _scanpath(rng, foci)
        points.append(seen)
        durations.append(how_long)
        readers += [reader] * len(seen)
    offset_px = np.array([(width - 1) / 2, (height - 1) / 2])
    xy = (np.concatenate(points) * scale + centre) * half + offset_px
    values = np.full((len(xy), 9), np.nan)
    values[:, :2] = xy
    values[:, 2] = np.concatenate(durations)
    return Phantom(pixels, label, Gaze(tuple(readers), ("fixation",) * len(xy), values))


def write_phantom_set(
    folder: Path,
    sizes: dict[Split, int],
    *,
    difficulty: float = EASY,
    first_seed: int = 0,
) -> LabelledSet:
    """Write a labelled set of phantoms as 8-bit PNG, one patient each, seeds counted upwards."""
    rows, gaze, films = [], {}, {}
    splits: Sequence[Split] = [split for split, size in sizes.items() for _ in range(size)]
    for seed, split in enumerate(splits, start=first_seed):
        phantom = draw(seed, difficulty=difficulty)
        name = f"films/phantom-{seed:06d}.png"
        films[name] = cv2.imencode(".png", phantom.pixels)[1].tobytes()
        gaze[name] = phantom.gaze
        rows.append(
            FilmRow(
                film=name,
                sha256=sha256(films[name]),
                patient=f"phantom-{seed:06d}",
                label=phantom.label,
                view="PA",
                pixel_source="image-8bit",
                redistributable=True,
                split=split,
            )
        )
    info = SetInfo(
        name=f"phantom-{difficulty:.2f}",
        origin=f"cxrgaze phantom (synthetic drawings), difficulty {difficulty}",
        domain="phantom",
        classes=CLASSES,
    )
    return write_set(folder, info, rows, gaze, films.items())


def _anatomy(
    rng: np.random.Generator, x: NDArray[np.floating], y: NDArray[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Body, lungs, mediastinum, ribs and texture; and the lung mask in [0, 1]."""
    half = 48.0  # edges as wide as in a drawing of 96 pixels, whatever the size of this one
    body = _soft((x / 0.95) ** 2 + (y / 1.35) ** 2 < 1, half)
    lungs = np.zeros(np.broadcast_shapes(x.shape, y.shape))
    for side in (-1, 1):
        rx, ry = rng.uniform(0.27, 0.32), rng.uniform(0.60, 0.68)
        lung = ((x - side * 0.42) / rx) ** 2 + ((y + 0.02) / ry) ** 2 < 1
        lungs = np.maximum(lungs, _soft(lung, half))
    picture = 0.05 + 0.47 * body - 0.30 * lungs * body
    picture += 0.16 * np.exp(-((x / 0.13) ** 2)) * body
    for rib in range(9):
        arc = y + 0.75 - 0.165 * rib - 0.22 * (np.abs(x) - 0.42) ** 2
        picture += 0.05 * np.exp(-((arc / 0.022) ** 2)) * body
    coarse = rng.normal(0, 1, (8, 8)).astype(np.float32)
    texture = cv2.resize(coarse, lungs.shape[::-1], interpolation=cv2.INTER_CUBIC)
    return picture + 0.025 * texture, lungs


def _soft(mask: NDArray[np.bool_], half: float) -> NDArray[np.floating]:
    """A mask with an edge about 3 % of the shorter side wide."""
    sigma = max(0.03 * half, 0.5)
    return np.asarray(cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma), dtype=np.float64)


def _foci(rng: np.random.Generator, label: str) -> list[tuple[float, float, float, float]]:
    """Lesions as (x, y, radius, amplitude)."""
    if label == "heart_failure":  # haze at both bases
        return [
            (side * rng.uniform(0.34, 0.46), rng.uniform(0.22, 0.42), 0.24, rng.uniform(0.09, 0.20))
            for side in (-1, 1)
        ]
    if label == "pneumonia":  # one or two blobs in one lung
        side = rng.choice((-1, 1))
        return [
            (
                side * rng.uniform(0.30, 0.54),
                rng.uniform(-0.40, 0.42),
                rng.uniform(0.11, 0.22),
                rng.uniform(0.14, 0.38),
            )
            for _ in range(rng.integers(1, 3))
        ]
    return []


def _scanpath(
    rng: np.random.Generator, foci: Sequence[tuple[float, float, float, float]]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """One reader's fixations `(n, 2)` in phantom coordinates and durations `(n,)` in ms."""
    points, durations = [], []
    for _ in range(rng.integers(35, 61)):
        if foci and rng.random() < 0.68:
            focus_x, focus_y, radius, _ = foci[int(rng.integers(len(foci)))]
            points.append(rng.normal((focus_x, focus_y), 0.5 * radius))
            durations.append(rng.lognormal(np.log(480), 0.35))
            continue
        where = rng.random()
        if where < 0.65:
            side = rng.choice((-1, 1))
            points.append(rng.normal((side * 0.42, 0.0), (0.13, 0.30)))
        elif where < 0.90:
            points.append(rng.normal(0, (0.22, 0.38)))
        else:
            points.append(rng.uniform(-1, 1, 2))
        durations.append(rng.uniform(180, 240))
    return np.array(points), np.array(durations)
