"""ModelSpec: what a network expects and returns, written once and checked at every border.

Conventions of the whole package: images are `(H, W)`, batches `(N, C, H, W)`, points `(x, y)` in
pixels with the centre of the top-left pixel at (0, 0). Densities sum to 1, log-densities are
natural logarithms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cxrgaze.records import Frozen

IMAGE: Final = "image"
LOGITS: Final = "logits"
LOG_DENSITY: Final = "log_density"

STRIDE = 32  # the deepest stride of the network: canvas sides are multiples of it
PREPROCESSING = 1  # raised whenever the same film would give another canvas
SPEC_KEY = "cxrgaze.spec"  # key of the spec in the ONNX metadata

NOTICE = "Research software, not a medical device. Not for diagnostic use."

Head = Literal["logits", "log_density"]
Domain = Literal["clinical", "phantom", "none"]
PixelSource = Literal[
    "image-8bit", "image-16bit", "dicom-window", "dicom-voi-lut", "dicom-percentile", "array"
]


class DiseaseClass(Frozen):
    """One class of the diagnosis head."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    display: str
    snomed: str
    """SNOMED CT code (check against SNOMED before clinical use: docs/dicom.md#class-codes)."""


class ModelSpec(Frozen):
    """Identity and interface of a network; in the ONNX metadata and in the manifest.

    Holds nothing that evaluation changes: temperature and operating points are decision parameters
    of the manifest.
    """

    variant: str
    model_version: str
    classes: tuple[DiseaseClass, ...]
    height: int = Field(gt=0, multiple_of=STRIDE)
    """Canvas height in pixels."""
    width: int = Field(gt=0, multiple_of=STRIDE)
    """Canvas width in pixels."""
    preprocessing: int = PREPROCESSING
    """Version of the preprocessing function that the network was trained with."""
    tensors: tuple[Literal["image"], Literal["logits"], Literal["log_density"]] = (
        "image",
        "logits",
        "log_density",
    )
    """Names of the graph's input and outputs."""
    pixel_source: PixelSource
    """Where the pixel values of the training films came from."""
    domain: Domain
    """What the network was trained on: clinical films, drawings (`phantom`) or nothing (`none`)."""

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> ModelSpec:
        names = [c.name for c in self.classes]
        if len(names) < 2 or len(set(names)) != len(names):
            raise ValueError(f"classes must be two or more distinct names, found {names}")
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(c.name for c in self.classes)

    @property
    def caution(self) -> str | None:
        """What must be said beside every output of this network, or None."""
        return {
            "clinical": None,
            "phantom": "Trained on drawings (the phantom): "
            "what it says of a real film means nothing.",
            "none": "Untrained: random weights, for latency work only. The output means nothing.",
        }[self.domain]


class Outputs(NamedTuple):
    """Both heads for N films as arrays, which belong to the caller."""

    logits: NDArray[np.float32]
    """`(N, C)`."""
    log_density: NDArray[np.float32]
    """`(N, 1, H, W)`."""


Infer = Callable[[NDArray[np.float32]], Outputs]
"""Both heads of `image` `(N, 1, H, W)` float32 in [0, 1], whatever computes them."""
