"""What the network says of one film."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cxrgaze.errors import UsageError
from cxrgaze.films.canvas import Geometry
from cxrgaze.spec import NOTICE, PixelSource


@dataclass(frozen=True)
class Reading:
    """Diagnosis and gaze of one film, with all that is needed to say where they came from."""

    film: str
    film_sha256: str
    pixel_source: PixelSource
    probabilities: dict[str, float]
    """By class name: of exclusive classes the softmax of the logits over the temperature, sum 1; of
    findings a sigmoid each. Empty without a diagnosis; never of a class that nothing taught."""
    label: str | None
    """Name of the most probable of exclusive classes; None of findings, where flags decide."""
    flags: dict[str, bool]
    """Whether a class's probability reaches its operating point; only for classes that have one.
    Not the label: a flag looks at one class, the label at which is the most probable."""
    operating_points: dict[str, float]
    """The thresholds of the flags."""
    log_density: NDArray[np.float32] | None
    """`(H, W)` on the canvas, natural log, sums to 1 over the canvas (pad included); None where the
    network has no map."""
    geometry: Geometry
    timings_ms: dict[str, float]
    """Wall-clock milliseconds per stage; in a batch, `infer` is the batch's share."""
    model: dict[str, str]
    """Bundle hash, name, variant, model version, precision, backend, device, gate verdict."""
    warnings: tuple[str, ...]
    forced: tuple[str, ...] = ()
    """Why the film is not applicable although it was read by force; empty when it is applicable."""
    notice: str = NOTICE

    @cached_property
    def film_density(self) -> NDArray[np.float32]:
        """`(h, w)`: the density over the film's area of the canvas, sum 1; of its window by `crop`.

        Raises:
            UsageError: the network has no map; so do all properties of it.
        """
        inside = np.exp(self.geometry.crop(self._map).astype(np.float64))
        return np.asarray(inside / inside.sum(), dtype=np.float32)

    @property
    def _map(self) -> NDArray[np.float32]:
        if self.log_density is None:
            raise UsageError(f"{self.model['name']} gives no map: it has the diagnosis alone")
        return self.log_density

    @property
    def pad_mass(self) -> float:
        """Mass that the network put outside the film, dropped from every map; in [0, 1]."""
        return mass_in_pad(self._map, self.geometry)

    @property
    def peak(self) -> tuple[float, float]:
        """The most looked-at point, `(x, y)` in pixels of the source film."""
        row, column = np.unravel_index(self.film_density.argmax(), self.film_density.shape)
        on_canvas = np.array([[column + self.geometry.left, row + self.geometry.top]])
        x, y = self.geometry.to_film(on_canvas)[0]
        return float(x), float(y)

    def heatmap(self) -> NDArray[np.float32]:
        """The density in pixels of the source film, `(H, W)`, sum 1; made when asked for.

        Zero where the canvas does not show the film.
        """
        height, width = self.geometry.window
        large = cv2.resize(self.film_density, (width, height), interpolation=cv2.INTER_LINEAR)
        large = self.geometry.on_film(np.asarray(large, dtype=np.float32))
        large = np.asarray(large / large.sum(dtype=np.float64), dtype=np.float32)
        whole = np.zeros((self.geometry.film_height, self.geometry.film_width), np.float32)
        self.geometry.shown(whole)[:] = large
        return whole

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; the map is left out (`heatmap`).

        What the network does not have is not there: nothing of a diagnosis without classes, no peak
        without a map. The label of findings is null.
        """
        diagnosis, gaze = {}, {}
        if self.probabilities:
            diagnosis = {
                "label": self.label,
                "probabilities": {name: round(p, 6) for name, p in self.probabilities.items()},
                "flags": self.flags,
                "operating_points": self.operating_points,
            }
        if self.log_density is not None:
            gaze = {
                "peak_px": {"x": round(self.peak[0], 1), "y": round(self.peak[1], 1)},
                "pad_mass": round(self.pad_mass, 6),
            }
        return {
            "film": self.film,
            "film_sha256": self.film_sha256,
            "status": "read",
            **diagnosis,
            **gaze,
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
