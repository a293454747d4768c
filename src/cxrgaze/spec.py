"""ModelSpec: what a network expects and returns, written once and checked at every border.

Conventions of the whole package: images are `(H, W)`, batches `(N, C, H, W)`, points `(x, y)` in
pixels with the centre of the top-left pixel at (0, 0). Densities sum to 1, log-densities are
natural logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from cxrgaze.records import Frozen

IMAGE: Final = "image"
LOGITS: Final = "logits"
LOG_DENSITY: Final = "log_density"

STRIDE = 32  # the deepest stride of our own networks: sides of their canvases are multiples of it
PREPROCESSING = 1  # raised whenever the same film would give another canvas
SPEC_KEY = "cxrgaze.spec"  # key of the spec in the ONNX metadata

NOTICE = "Research software, not a medical device. Not for diagnostic use."

Head = Literal["logits", "log_density"]
HEADS: tuple[Head, ...] = (LOGITS, LOG_DENSITY)
"""The heads that a network may have, in the order of its graph's outputs."""
ClassKind = Literal["exclusive", "findings"]
"""Classes of which a film has one (softmax), or findings of which it may have any (sigmoids)."""
Domain = Literal["clinical", "phantom", "none"]
CanvasRule = Literal["pad", "stretch", "crop", "cxrgazelearn"]
"""How a film comes on the canvas: whole with its aspect and a pad of zeros, whole and stretched, or
its centre with its aspect; `cxrgazelearn` is all of the authors' preprocessing, from stored values
(docs/method.md#authors-preprocessing)."""
FRAME: Final = (3200, 2560)
"""`(H, W)` that `cxrgazelearn` pads a film to, in pixels of the film; the canvas samples it."""
PixelSource = Literal[
    "image-8bit",
    "image-16bit",
    "dicom-window",
    "dicom-voi-lut",
    "dicom-percentile",
    "array",
    "stored-values",
]


class DiseaseClass(Frozen):
    """One class of the diagnosis head."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    display: str = Field(min_length=1)
    snomed: str | None = Field(default=None, pattern=r"^[0-9]+$")
    """SNOMED CT code (check against SNOMED before clinical use: docs/dicom.md#class-codes); None
    where none is known."""


def require_distinct(classes: tuple[DiseaseClass, ...], kind: ClassKind) -> None:
    """Refuse classes that do not make a diagnosis.

    Raises:
        ValueError: names twice, or one exclusive class alone.
    """
    names = [c.name for c in classes]
    if len(set(names)) != len(names):
        raise ValueError(f"classes must be distinct, found {names}")
    if kind == "exclusive" and len(names) == 1:
        raise ValueError(f"exclusive classes are two or more, found {names[0]} alone")


def sampling_step(canvas: tuple[int, int]) -> int:
    """Of how many pixels of `FRAME` a canvas `(H, W)` takes one, along either side.

    Raises:
        ValueError: it is not the frame, sampled evenly.
    """
    step = FRAME[0] // canvas[0]
    if not step or (step * canvas[0], step * canvas[1]) != FRAME:
        raise ValueError(
            f"a canvas by cxrgazelearn is {FRAME[0]}x{FRAME[1]} over a whole number, as 640x512 "
            f"or 320x256, found {canvas[0]}x{canvas[1]}"
        )
    return step


class ModelSpec(Frozen):
    """Identity and interface of a network; in the ONNX metadata and in the manifest.

    Holds nothing that training or evaluation changes: what was taught, temperature and operating
    points stand beside it (`cxrgaze.bundles.served`).
    """

    variant: str
    model_version: str
    heads: tuple[Head, ...] = HEADS
    """The graph's outputs, in its order; its input is `image`."""
    classes: tuple[DiseaseClass, ...] = ()
    """Of the head `logits`, in the order of its columns; none without that head."""
    class_kind: ClassKind = "exclusive"
    height: int = Field(gt=0)
    """Canvas height in pixels."""
    width: int = Field(gt=0)
    """Canvas width in pixels."""
    canvas: CanvasRule = "pad"
    preprocessing: int = PREPROCESSING
    """Version of the preprocessing function that the network was trained with."""
    pixel_source: PixelSource
    """Where the pixel values of the training films came from."""
    domain: Domain
    """What the network was trained on: clinical films, drawings (`phantom`) or nothing (`none`)."""

    @model_validator(mode="before")
    @classmethod
    def _older_specs_name_the_tensors(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("tensors") == [IMAGE, *HEADS]:
            return {key: value for key, value in content.items() if key != "tensors"}
        return content

    @field_validator("heads")
    @classmethod
    def _heads_are_in_order(cls, value: tuple[Head, ...]) -> tuple[Head, ...]:
        if not value or value != tuple(head for head in HEADS if head in value):
            raise ValueError(f"heads must be one or both of {HEADS}, in this order, found {value}")
        return value

    @model_validator(mode="after")
    def _classes_fit_the_heads(self) -> ModelSpec:
        require_distinct(self.classes, self.class_kind)
        if bool(self.classes) != (LOGITS in self.heads):
            raise ValueError(f"heads {self.heads} with {len(self.classes)} classes do not fit")
        return self

    @model_validator(mode="after")
    def _canvas_fits_its_rule(self) -> ModelSpec:
        if self.needs_stored:
            sampling_step((self.height, self.width))
        return self

    @property
    def needs_stored(self) -> bool:
        """Whether its canvases are made of what the file stores (`Film.stored`)."""
        return self.canvas == "cxrgazelearn"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(c.name for c in self.classes)

    @property
    def exclusive(self) -> bool:
        """Whether a film has one of the classes; they are findings otherwise."""
        return self.class_kind == "exclusive"

    def shapes(self, films: int) -> dict[Head, tuple[int, ...]]:
        """Shape of each head's array for so many films."""
        every: dict[Head, tuple[int, ...]] = {
            LOGITS: (films, len(self.classes)),
            LOG_DENSITY: (films, 1, self.height, self.width),
        }
        return {head: every[head] for head in self.heads}

    @property
    def caution(self) -> str | None:
        """What must be said beside every output of this network, or None."""
        return {
            "clinical": None,
            "phantom": "Trained on drawings (the phantom): "
            "what it says of a real film means nothing.",
            "none": "Untrained: random weights, for latency work only. The output means nothing.",
        }[self.domain]


def same_diagnosis(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether the logits of two networks say the same: classes in the same order, of one kind."""
    return one.class_names == other.class_names and one.class_kind == other.class_kind


Outputs = Mapping[Head, NDArray[np.float32]]
"""Heads of N films by name, as arrays that belong to the caller (`ModelSpec.shapes`).

A head that a network does not have is not there.
"""

Infer = Callable[[NDArray[np.float32]], Outputs]
"""The heads of `image` `(N, 1, H, W)` float32 in [0, 1], whatever computes them."""
