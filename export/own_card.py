"""The card of somebody's own network: what its file does not say, in TOML.

[statements]            # what only people know, as of a checkpoint's card; all optional
licence_of_weights = "Apache-2.0"

[network]
name = "densenet121"
version = "1"
trained_on = "CheXpert, 223,414 films"
domain = "clinical"              # or "phantom", "none"
pixel_source = "image-8bit"

[input]                          # all optional: what the graph says itself
name = "input"
size = [224, 224]                # for what takes any size
channels = 1                     # of a module; an ONNX file says it itself
canvas = "stretch"               # "pad" (default), "stretch", "crop"
range = [-1024, 1024]            # or mean = [...] and std = [...]; default [0, 1]

[logits]                         # one of [logits] and [map], or both
output = "out"
kind = "findings"                # or "exclusive" (default)
classes = [{ name = "effusion", display = "Pleural effusion" }]
operating_points = { effusion = 0.4 }

[map]
output = "heat"
kind = "activation"              # "log-density", "logits", "probability", "activation"
channel = 0

[quantization]                   # all optional
keep = ["/features/conv0/"]      # convolutions in higher precision, names or beginnings
blocks = "^/features/([^/]+)"    # what goes back together: the group, or what was found
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from cxrgaze.bundles.served import Decision
from cxrgaze.errors import UsageError
from cxrgaze.files import read_toml
from cxrgaze.records import Frozen, complaint
from cxrgaze.spec import CanvasRule, ClassKind, DiseaseClass, Domain, PixelSource, require_distinct
from cxrgaze.train.card import Statements

MapKind = Literal["log-density", "logits", "probability", "activation"]
"""What a map is before it is a log-density: that already; logits or the logarithm of a density but
for a constant; a density or probabilities a pixel; a class activation, of which what is negative
counts for nothing."""

_FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Identity(Frozen):
    """`[network]`."""

    name: str = Field(pattern=_FILE_NAME)
    version: str = Field(min_length=1)
    trained_on: str = Field(min_length=1)
    domain: Domain
    pixel_source: PixelSource


class Input(Frozen):
    """`[input]`."""

    name: str | None = None
    size: tuple[int, int] | None = None
    """`(H, W)`, for a graph that takes any."""
    channels: Literal[1, 3] | None = None
    """Of a module: an ONNX file says it itself; None: 1."""
    canvas: CanvasRule = "pad"
    range: tuple[float, float] | None = None
    """What black and white are to the network."""
    mean: tuple[float, ...] | None = None
    """What is subtracted of each channel of an image in [0, 1]."""
    std: tuple[float, ...] | None = None
    """What it is then divided by."""

    @model_validator(mode="after")
    def _one_scale(self) -> Input:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together")
        if self.range and self.mean:
            raise ValueError("give range, or mean and std")
        if self.range and self.range[0] == self.range[1]:
            raise ValueError("range: black and white are the same")
        if self.std and min(map(abs, self.std)) == 0:
            raise ValueError("std: a channel of 0")
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError("mean and std have a number for each channel")
        return self


class Logits(Frozen):
    """`[logits]`."""

    output: str
    kind: ClassKind = "exclusive"
    classes: tuple[DiseaseClass, ...] = Field(min_length=1)
    operating_points: dict[str, float] = {}
    """Probability from which a class is flagged."""

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> Logits:
        require_distinct(self.classes, self.kind)
        foreign = set(self.operating_points) - {one.name for one in self.classes}
        if foreign:
            raise ValueError(f"an operating point of {sorted(foreign)[0]}, which is no class")
        return self


class Map(Frozen):
    """`[map]`."""

    output: str
    kind: MapKind
    channel: int = Field(default=0, ge=0)


class Quantization(Frozen):
    """`[quantization]`."""

    keep: tuple[str, ...] | None = None
    """Convolutions that stay in higher precision; None: by rule (`own_graph.kept_by_rule`)."""
    blocks: str | None = None
    """Regular expression of a block in the names of nodes; None: by their paths."""

    @field_validator("blocks")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        return value


class OwnCard(Frozen):
    """The file."""

    network: Identity
    input: Input = Input()
    logits: Logits | None = None
    map: Map | None = None
    quantization: Quantization = Quantization()
    statements: Statements = Statements()

    @model_validator(mode="after")
    def _has_a_head(self) -> OwnCard:
        if self.logits is None and self.map is None:
            raise ValueError("expected [logits], [map] or both: what the network gives")
        return self

    @property
    def decision(self) -> Decision:
        """What is known of its decisions."""
        points = self.logits.operating_points if self.logits else {}
        return Decision(operating_points=points)


def read_card(path: Path) -> OwnCard:
    """The card in a TOML file.

    Raises:
        UsageError: no such file, no TOML, or not a card, naming the key.
    """
    try:
        return OwnCard.model_validate(read_toml(path))
    except ValidationError as error:
        raise UsageError(
            f"{path}: {complaint(error)} (docs/own-networks.md#the-card has every key)"
        ) from error
