"""What the network says of one film."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cxrgaze.films.canvas import Geometry
from cxrgaze.spec import NOTICE, PixelSource


@dataclass(frozen=True)
class Reading:
    """Diagnosis and gaze of one film, with all that is needed to say where they came from."""

    film: str
    film_sha256: str
    pixel_source: PixelSource
    probabilities: dict[str, float]
    """By class name, sum 1; softmax of the logits over the temperature."""
    flags: dict[str, bool]
    """Probability at or above the class's operating point; only for classes that have one."""
    log_density: NDArray[np.float32]
    """`(H, W)` on the canvas, natural log, sums to 1 over the canvas (pad included)."""
    geometry: Geometry
    timings_ms: dict[str, float]
    """Wall-clock milliseconds per stage; in a batch, `infer` is the batch's share."""
    model: dict[str, str]
    """Bundle hash, name, variant, model version, precision, backend, device, gate verdict."""
    warnings: tuple[str, ...]
    forced: tuple[str, ...] = ()
    """Why the film is not applicable although it was read by force; empty when it is applicable."""
    notice: str = NOTICE

    @property
    def label(self) -> str:
        """Name of the most probable class."""
        return max(self.probabilities, key=lambda name: self.probabilities[name])

    @cached_property
    def film_density(self) -> NDArray[np.float32]:
        """`(h, w)`: the density over the film's area of the canvas, sum 1."""
        inside = np.exp(self.geometry.crop(self.log_density).astype(np.float64))
        return np.asarray(inside / inside.sum(), dtype=np.float32)

    @property
    def pad_mass(self) -> float:
        """Mass that the network put outside the film, dropped from every map; in [0, 1]."""
        return mass_in_pad(self.log_density, self.geometry)

    @property
    def peak(self) -> tuple[float, float]:
        """The most looked-at point, `(x, y)` in pixels of the source film."""
        row, column = np.unravel_index(self.film_density.argmax(), self.film_density.shape)
        on_canvas = np.array([[column + self.geometry.left, row + self.geometry.top]])
        x, y = self.geometry.to_film(on_canvas)[0]
        return float(x), float(y)

    def heatmap(self) -> NDArray[np.float32]:
        """The density in pixels of the source film, `(H, W)`, sum 1; made when asked for."""
        size = (self.geometry.film_width, self.geometry.film_height)
        large = cv2.resize(self.film_density, size, interpolation=cv2.INTER_LINEAR)
        total = large.sum(dtype=np.float64)
        return np.asarray(large / total, dtype=np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; the map is left out (`heatmap`)."""
        return {
            "film": self.film,
            "film_sha256": self.film_sha256,
            "status": "read",
            "label": self.label,
            "probabilities": {name: round(p, 6) for name, p in self.probabilities.items()},
            "flags": self.flags,
            "peak_px": {"x": round(self.peak[0], 1), "y": round(self.peak[1], 1)},
            "pad_mass": round(self.pad_mass, 6),
            "film_px": {"width": self.geometry.film_width, "height": self.geometry.film_height},
            "pixel_source": self.pixel_source,
            "model": self.model,
            "timings_ms": {stage: round(ms, 3) for stage, ms in self.timings_ms.items()},
            "warnings": list(self.warnings),
            "forced": list(self.forced),
            "notice": self.notice,
        }


def mass_in_pad(log_density: NDArray[np.float32], geometry: Geometry) -> float:
    """Mass of a density on the canvas that lies outside the film's area, in [0, 1]."""
    inside = np.exp(geometry.crop(log_density).astype(np.float64)).sum()
    return float(np.clip(1 - inside, 0, 1))
