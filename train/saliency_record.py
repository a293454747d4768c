"""The content of `saliency.json`: heatmaps of any tool against the gaze of a labelled set."""

from __future__ import annotations

from typing import Literal

from cxrgaze.evidence.intervals import Interval
from cxrgaze.evidence.labelled_set import Look
from cxrgaze.records import Frozen, Record
from cxrgaze.spec import NOTICE
from cxrgaze.train.map_files import MapKind

FILE = "saliency.json"

Metric = Literal["cc", "sim", "kld", "nss", "auc_judd", "shuffled_auc", "information_gain"]
METRICS: dict[Metric, str] = {
    "cc": "CC",
    "sim": "SIM",
    "kld": "KLD, nats (lower is better)",
    "nss": "NSS",
    "auc_judd": "AUC-Judd",
    "shuffled_auc": "shuffled AUC",
    "information_gain": "information gain over the centre prior, bits per fixation",
}
"""What each is called."""


class Beside(Frozen):
    """A mean over films beside that of the centre prior; None where not measured."""

    map: Interval | None
    centre_prior: Interval | None
    added: Interval | None
    """The map's minus the centre prior's, paired, over patients."""


class SaliencyReport(Record):
    """Content of `saliency.json`."""

    VERSION = 1
    WHAT = "comparison of heatmaps with gaze"
    REMEDY = "compare again, or use the version that wrote it"

    schema_version: int = VERSION
    notice: str = NOTICE
    synthetic: bool
    """Whether the films are drawings."""
    maps: str
    """Name of the maps' folder."""
    maps_sha256: str
    """Over the films that were compared and the SHA-256 of each one's map, in their order."""
    kind: MapKind
    set: str
    origin: str
    """Where films and gaze came from, in a sentence."""
    split: Literal["train", "val", "test", "all"]
    split_sha256: str
    films: int
    """That were compared, as `patients`: with gaze and a map."""
    patients: int
    asked: int
    """Films of the split with gaze."""
    heatmap: str
    """Preset that made densities of the gaze."""
    canvas: tuple[int, int]
    """`(H, W)` in pixels that film, gaze and map were brought to."""
    prior: str
    """What the centre prior is the mean of."""
    figures: dict[Metric, Beside]
    """Against all readers together."""
    between_readers: Interval | None
    """CC of one reader's own map with another's, over all pairs; None where no film has several."""
    single_reader: Beside
    """CC with one reader's own map: the like to `between_readers`."""
    intervals: str
    """How they were made, in a sentence."""
    left_out: tuple[str, ...]
    """What is not there or not as it looks, each with its reason."""
    created_utc: str
    environment: dict[str, str]
    look: Look | None
    """None where no test film was looked at."""
