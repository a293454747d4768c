"""What a training run is told: stages as data, presets as TOML files.

A preset is a file in `train/presets/`; a config of one's own names one as its `base` and changes
what it likes. Tables are merged key by key; a stage set to false is left out. The options of the
machine (processes, devices, threads, folders) are not here: they do not belong to the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files as resource_files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from cxrgaze.errors import UsageError
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.files import parse_toml, read_toml
from cxrgaze.records import Frozen, complaint
from cxrgaze.spec import HEADS, LOG_DENSITY, LOGITS, STRIDE, CanvasRule, Head, sampling_step
from cxrgaze.train.losses import (
    CONTRASTIVE,
    FILM_LOSSES,
    NEED_LABELS,
    NEED_TEACHER,
    NETWORK,
    TEACH_DIAGNOSIS,
    TEACH_SALIENCY,
)
from cxrgaze.train.model import VARIANTS, parts_of

Part = Literal["dense", "skips", "encoder", "decoder", "saliency", "classifier"]
"""Of a network (`cxrgaze.train.model.parts_of`)."""

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

NOT_EVALUATED = {
    "supcon": "loss supcon",
    "saliency_cc": "loss saliency_cc",
    "centre_prior": "the learnable centre prior",
}
"""Options of ours that were not evaluated on gaze data; every run that uses one says so."""


def _one_of(what: str, known: Mapping[str, object]) -> AfterValidator:
    """A validator: a name of something that there is."""

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"no {what} {value!r}; there are {', '.join(known)}")
        return value

    return AfterValidator(check)


class Stage(Frozen):
    """One stage: what is trained, on which loss, for how long."""

    loss: dict[str, float] = Field(min_length=1)
    """Weight by name of the loss (`cxrgaze.train.losses`)."""
    weighting: Literal["sum", "uncertainty"] = "sum"
    """Weighted sum, or the authors' uncertainty weighting of cross_entropy and saliency_kl."""
    train: tuple[Part, ...] = Field(min_length=1)
    """Parts that learn; all others are frozen, BatchNorm statistics too."""
    freeze_batch_norm: bool = False
    """Keep BatchNorm in evaluation mode in the parts that learn, too."""
    epochs: int = Field(gt=0)
    batch: int = Field(default=16, gt=1)
    """Films per process and step."""
    shrink: int = Field(default=1, ge=1)
    """Average the canvas over squares of this side (the authors' stage A runs at half size)."""
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "plateau", "one_cycle"] = "plateau"
    plateau_patience: int = Field(default=5, ge=0)
    """Epochs without a better validation loss before the learning rate falls to a tenth."""
    patience: int = Field(default=12, ge=0)
    """Epochs without a better validation loss before the stage ends; 0: never."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient."""
    balanced: bool = False
    """Draw films so that every class is as frequent as the others."""

    @field_validator("loss")
    @classmethod
    def _losses_exist(cls, value: dict[str, float]) -> dict[str, float]:
        losses = [*CONTRASTIVE, *FILM_LOSSES]
        if foreign := [name for name in value if name not in losses]:
            raise ValueError(f"no loss {foreign[0]!r}; there are {', '.join(losses)}")
        if min(value.values()) <= 0:
            raise ValueError("weights must be positive")
        return value

    @model_validator(mode="after")
    def _parts_fit_the_losses(self) -> Stage:
        names = set(self.loss)
        if names & set(NETWORK) and not names <= set(NETWORK):
            raise ValueError(
                "a stage looks at the dense encoder's embedding or at the network's outputs, "
                f"not at both: {', '.join(self.loss)}"
            )
        if self.on_encoder and self.train != ("dense",):
            raise ValueError(f"{', '.join(self.loss)} teach the part dense alone")
        if names <= TEACH_SALIENCY and "classifier" in self.train:
            raise ValueError(f"{', '.join(self.loss)} teach the classifier nothing")
        if names <= TEACH_DIAGNOSIS and "saliency" in self.train:
            raise ValueError(f"{', '.join(self.loss)} teach the saliency head nothing")
        if self.weighting == "uncertainty" and names != {"cross_entropy", "saliency_kl"}:
            raise ValueError("uncertainty weighting is for cross_entropy with saliency_kl")
        return self

    def of_heads(self, heads: Sequence[Head]) -> Stage | None:
        """The stage of a network with these heads; None where it has nothing to learn there."""
        absent = {
            *(TEACH_DIAGNOSIS if LOGITS not in heads else ()),
            *(TEACH_SALIENCY if LOG_DENSITY not in heads else ()),
        }
        parts = {
            *(("classifier",) if LOGITS not in heads else ()),
            *(("skips", "decoder", "saliency") if LOG_DENSITY not in heads else ()),
        }
        loss = {name: weight for name, weight in self.loss.items() if name not in absent}
        train = tuple(part for part in self.train if part not in parts)
        if LOGITS not in heads and set(loss) <= NEED_LABELS:
            loss = {}  # no class is known without the diagnosis
        if not loss or not train:
            return None
        weighting = self.weighting if loss.keys() == self.loss.keys() else "sum"
        update = {"loss": loss, "train": train, "weighting": weighting}
        return Stage.model_validate({**self.model_dump(), **update})

    @property
    def teaches_diagnosis(self) -> bool:
        """Whether a loss looks at the network's logits."""
        return bool(TEACH_DIAGNOSIS & set(self.loss))

    @property
    def on_encoder(self) -> bool:
        """Whether the losses look at the dense encoder's embedding alone."""
        return not set(self.loss) & set(NETWORK)


class Augment(Frozen):
    """Random changes of a training film; image and map move together. Never flipped."""

    rotate_deg: float = Field(default=0.0, ge=0, le=45)
    """Largest rotation."""
    shift: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift as a share of the canvas."""
    scale: float = Field(default=0.0, ge=0, lt=1)
    """Largest relative change of size."""
    gamma: float = Field(default=0.0, ge=0, le=1)
    """Largest |log| of the exponent that image values are raised to."""

    @property
    def any(self) -> bool:
        """Whether it changes anything."""
        return any(self.model_dump().values())


class TrainConfig(Frozen):
    """One run; saved in the checkpoint's card and as `config.toml` in the run's folder."""

    name: str = Field(pattern=_NAME)
    heads: tuple[Head, ...] = HEADS
    """What the network gives: `logits` (the diagnosis), `log_density` (the map) or both; in text
    with commas between. Losses and parts of a head that it does not have are left out."""
    variant: Annotated[str, _one_of("variant", VARIANTS)]
    canvas: tuple[int, int] | None = None
    """`(H, W)` in pixels, multiples of 32; none: the variant's own."""
    canvas_rule: CanvasRule = "pad"
    """How films come on the canvas; `cxrgazelearn` for weights of the authors' code."""
    heatmap: Annotated[str, _one_of("heatmap preset", PRESETS)]
    """How gaze becomes a density: a name of `cxrgaze.evidence.heatmaps.PRESETS`."""
    seed: int = Field(default=0, ge=0)
    deterministic: bool = False
    """Refuse operations that are not deterministic (on a CPU with one thread all are)."""
    precision: Literal["32", "16-mixed", "bf16-mixed"] = "32"
    """Arithmetic of training; 16-mixed with a scaled loss."""
    store: Literal["float32", "float16"] = "float32"
    """Numbers of the checkpoint; float16 weights are rounded before anything is measured."""
    centre_prior: bool = False
    augment: Augment = Augment()
    operating_sensitivity: float | None = Field(default=None, gt=0, lt=1)
    """Operating points reach this sensitivity on validation; none: Youden's J is largest."""
    stages: dict[Annotated[str, Field(pattern=_NAME)], Stage] = Field(min_length=1)

    @field_validator("heads", mode="before")
    @classmethod
    def _heads_are_known(cls, value: Any) -> Any:
        asked = value.replace(",", " ").split() if isinstance(value, str) else list(value)
        heads = tuple(head for head in HEADS if head in asked)
        if not heads or set(asked) != set(heads):
            raise ValueError(f"expected one or both of {', '.join(HEADS)}, found {value!r}")
        return heads

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, value: str) -> str:
        if value == "run":
            raise ValueError("run.json is the run's own record; choose another name")
        return value

    @field_validator("canvas")
    @classmethod
    def _canvas_fits(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value and (min(value) <= 0 or value[0] % STRIDE or value[1] % STRIDE):
            raise ValueError(f"canvas sides must be multiples of {STRIDE}, found {value}")
        return value

    @model_validator(mode="after")
    def _parts_are_of_the_variant(self) -> TrainConfig:
        there = parts_of(self.variant)
        for name, stage in self.stages.items():
            if foreign := [part for part in stage.train if part not in there]:
                raise ValueError(
                    f"stage {name}: {self.variant} has no part {foreign[0]}; it has "
                    f"{', '.join(there)}"
                )
        return self

    @model_validator(mode="after")
    def _canvas_fits_its_rule(self) -> TrainConfig:
        if self.canvas_rule == "cxrgazelearn":
            sizes = VARIANTS[self.variant]
            sampling_step(self.canvas or (sizes.height, sizes.width))
        return self

    @model_validator(mode="after")
    def _shrunk_canvas_fits(self) -> TrainConfig:
        sizes = VARIANTS[self.variant]
        for name, stage in self.stages.items():
            for side in self.canvas or (sizes.height, sizes.width):
                if side % (stage.shrink * STRIDE):
                    raise ValueError(
                        f"stage {name}: a side of {side} cannot be shrunk by {stage.shrink} to a "
                        f"multiple of {STRIDE}"
                    )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether a stage learns from a teacher."""
        return any(NEED_TEACHER & set(stage.loss) for stage in self.stages.values())

    @property
    def not_evaluated(self) -> tuple[str, ...]:
        """Options in use that were not evaluated on gaze data."""
        used = {name for stage in self.stages.values() for name in stage.loss}
        used |= {"centre_prior"} if self.centre_prior else set()
        return tuple(text for name, text in NOT_EVALUATED.items() if name in used)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(p.name[:-5] for p in _presets().iterdir() if p.name.endswith(".toml"))


def load_config(source: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """A config from a preset's name or a TOML file.

    Args:
        overrides: `KEY=VALUE` with a dotted key and a TOML value, applied last.

    Raises:
        UsageError: no such preset or file, no valid TOML, an unknown key, a value out of range.
    """
    content = _merged(source, ())
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: expected KEY=VALUE")
        whole = key.endswith(".loss")
        try:
            content = _merge(content, parse_toml(f"{key}={value}", text), whole)
        except UsageError:  # a bare word is a string
            content = _merge(content, parse_toml(f'{key}="{value}"', f"--set {text}"))
    stages = content.get("stages")
    if isinstance(stages, dict):
        content["stages"] = {name: stage for name, stage in stages.items() if stage is not False}
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"config {source}: {complaint(error)}") from error


def render_config(config: TrainConfig) -> bytes:
    """The config as TOML; `load_config` of it gives the config back."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)).encode()


def _merged(source: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if source in seen:
        raise UsageError(f"configs are based on each other: {' -> '.join((*seen, source))}")
    path = Path(source)
    if source in preset_names():
        content = parse_toml((_presets() / f"{source}.toml").read_text(), source)
    elif path.is_file():
        content = read_toml(path)
    else:
        raise UsageError(f"{source} is neither a preset ({', '.join(preset_names())}) nor a file")
    base = content.pop("base", None)
    return _merge(_merged(str(base), (*seen, source)), content) if base else content


def _merge(
    below: Mapping[str, Any], above: Mapping[str, Any], whole: bool = True
) -> dict[str, Any]:
    """`above` over `below`, table by table; a `loss` is replaced whole, or likewise merged."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        deep = isinstance(value, dict) and isinstance(old, dict) and (key != "loss" or not whole)
        merged[key] = _merge(old, value, whole) if deep and old else value
    return merged


def _presets() -> Any:
    return resource_files("cxrgaze.train") / "presets"
