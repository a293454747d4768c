"""The content of an evaluation's `report.json`: versioned, canonical, with a digest of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cxrgaze.evidence.intervals import Interval
from cxrgaze.evidence.labelled_set import Look, Split
from cxrgaze.files import read_regular
from cxrgaze.records import Digested, Frozen, parse_record
from cxrgaze.spec import NOTICE
from cxrgaze.train.baseline import Name

FILE = "report.json"
_LIMIT = 16 << 20


class ModelIdentity(Frozen):
    """The network that was evaluated, and what computed it."""

    kind: Literal["checkpoint", "bundle"]
    name: str
    sha256: str
    """Of a checkpoint's weights, or of the bundle."""
    precision: str
    backend: str
    trained_on: str
    """Origin of the training films, in a sentence."""


class SetIdentity(Frozen):
    """The films that it was evaluated on."""

    name: str
    origin: str
    split: Split
    split_sha256: str
    films: int
    """Of the split, as `patients`."""
    patients: int


class AucIntervals(Frozen):
    """One AUC with both of its intervals."""

    delong: Interval
    """On the logit scale; films are taken as independent."""
    bootstrap: Interval
    """Over patients."""


class Calibration(Frozen):
    """How far probabilities are what they say, after and before temperature scaling.

    Of findings over what is known of all of them together.
    """

    brier: Interval
    brier_before: float
    log_loss: Interval | None
    """In nats; None where no film has one of the classes that are served."""
    log_loss_before: float | None
    ece: float
    """Expected calibration error of 15 bins: of exclusive classes of the label's probability."""
    ece_before: float
    ece_null: float
    """What it would be on average, on as many films, were each probability exactly right."""
    ece_null_high: float
    """What it would stay below in 95 % of such cases."""


class ClassCalibration(Frozen):
    """Of one class's probability, as served; None where there is none (`evidence.calibration`)."""

    slope: Interval | None
    """1 is right, below it is overconfident."""
    intercept: Interval | None
    """Calibration in the large: 0 is right, below it the class is said too often."""
    brier: Interval
    """Of the class alone, in [0, 1]."""


class OperatingPoint(Frozen):
    """A class's flag at its threshold; None where no film, or every film, is of the class."""

    threshold: float
    """Of the probability."""
    prevalence: float | None
    """Share of the films that have the class, of those of which it is known."""
    sensitivity: Interval | None
    specificity: Interval | None


class BaselineFigures(Frozen):
    """What a baseline reaches on the same films, and what the network adds to it."""

    auc: dict[str, AucIntervals]
    """As `Diagnosis.auc`."""
    added: Interval
    """Macro AUC of the network minus its own, paired, over patients."""
    fitted_on: str


class Subgroup(Frozen):
    """Macro AUC among some of the films."""

    films: int
    classes: tuple[str, ...]
    """That the mean is over."""
    macro: AucIntervals
    view_and_age: AucIntervals | None = None
    """Of that baseline; None where there is none."""


class Diagnosis(Frozen):
    """Figures of the diagnosis head over the films with a label."""

    patients: int
    """Who have them."""
    films: dict[str, int]
    """That have each class."""
    known: dict[str, int] | None
    """Of which each finding is known; None of exclusive classes, which are known together."""
    auc: dict[str, AucIntervals] | None
    """One versus rest by class, "macro" and "micro", of the classes that some and not all films
    have; None where there is no such class."""
    accuracy: Interval | None
    """None of findings, as the temperature."""
    temperature: float | None
    """Fitted on validation films."""
    temperatures: dict[str, float] | None
    """Of the findings that have one; None of exclusive classes."""
    calibration: Calibration
    calibration_by_class: dict[str, ClassCalibration]
    """Of the classes that some and not all films have."""
    operating_points: dict[str, OperatingPoint]
    """By class."""
    baselines: dict[Name, BaselineFigures]
    """What is said without the network (`cxrgaze.train.baseline`)."""
    subgroups: dict[str, Subgroup]
    """By view, sex and band of age."""


class SaliencyMeans(Frozen):
    """Means over films of a map's agreement with the readers' own; None where not measured."""

    cc: Interval | None = None
    sim: Interval | None = None
    kld: Interval | None = None
    """In nats; lower is better."""
    nss: Interval | None = None
    auc_judd: Interval | None = None


class BetweenReaders(Frozen):
    """Agreement with single readers of the films that have several; None where none has."""

    cc: Interval | None = None
    """Of one reader's own map with another's, over all pairs."""
    network_cc: Interval | None = None
    """Of the network's with one reader's own: the like to `cc`."""


class Saliency(Frozen):
    """Figures of the saliency head over the films with gaze."""

    films: int
    patients: int
    heatmap: str
    """Preset that made densities of the gaze."""
    prediction: SaliencyMeans
    centre_prior: SaliencyMeans
    """Of the training films' mean density; not measured where they have no gaze."""
    added_cc: Interval | None
    """CC of the network minus the centre prior's, paired, over patients."""
    between_readers: BetweenReaders
    pad_mass: Interval
    """Mass that the network put outside the film."""


class Evaluation(Digested):
    """Content of `report.json`."""

    VERSION = 4
    WHAT = "evaluation"
    REMEDY = "evaluate again, or use the version that wrote it"

    schema_version: int = VERSION
    notice: str = NOTICE
    synthetic: bool
    """Whether the films are drawings."""
    caution: str | None
    """What must be said beside every output of the network."""
    leakage: str | None
    """Why its weights may have seen these films."""
    model: ModelIdentity
    set: SetIdentity
    intervals: str
    """How they were made, in a sentence."""
    diagnosis: Diagnosis | None
    """None where no film has a label."""
    saliency: Saliency | None
    """None where no film has gaze."""
    left_out: tuple[str, ...]
    """Figures that are not there, each with its reason."""
    created_utc: str
    environment: dict[str, str]
    look: Look | None
    """None of a split that anyone may look at: training and validation films."""


def read_evaluation(path: Path) -> Evaluation:
    """A stored evaluation.

    Raises:
        IntegrityError: truncated, edited, of another schema version, or something else.
        OSError: it cannot be read.
    """
    return parse_record(Evaluation, read_regular(path, _LIMIT), str(path))
