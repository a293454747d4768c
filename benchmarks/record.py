"""The content of `report.json`: versioned, canonical, with a digest of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cxrgaze.benchmarks.energy import Energy
from cxrgaze.benchmarks.machine import Conditions, Machine
from cxrgaze.benchmarks.paired import Ratio
from cxrgaze.benchmarks.timing import Latency, WarmUp
from cxrgaze.bundles.verdicts import Verdict
from cxrgaze.files import read_regular
from cxrgaze.records import Digested, Frozen, parse_record
from cxrgaze.spec import NOTICE

FILE = "report.json"
_LIMIT = 1 << 28

STAGES = {
    "decode": "file on disk to display values in [0, 1]",
    "preprocess": "display values to canvas",
    "h2d": "device events: canvas, host to device",
    "compute": "device events: the engine alone",
    "d2h": "device events: both heads, device to host",
    "infer": "canvas to heads, host memory to host memory, h2d to d2h among it",
    "postprocess": "logits to probabilities; the map stays on the canvas",
    "heatmap": "map on the canvas to a density in pixels of the film",
    "write": "overlay PNG and JSON made and written to disk, as cxrgaze-predict does",
    "end_to_end": "file on disk to reading, heatmap and files, by one clock around all of it",
}
"""Where each figure begins and ends."""


class Config(Frozen):
    """What was asked for."""

    samples: int
    warmup_seconds: float
    seconds: float
    """Sampling, and then each other part, stops after this time."""
    threads: int
    cold_starts: int
    after_idle: int
    """Readings after a pause of `IDLE_SECONDS`."""
    device: str = "auto"


class ColdStart(Frozen):
    """Process start to the first reading; medians over `count` processes, in milliseconds."""

    count: int
    process_ms: float
    import_ms: float
    load_ms: float
    first_reading_ms: float
    peak_memory_bytes: int
    """Largest resident set of a process that does nothing else; largest of all."""


class FilmTimes(Frozen):
    """One film's share of the work; names are left out, they may identify a patient."""

    film: str
    """First 12 digits of the file's SHA-256."""
    container: str
    """Suffix of the file and source of its pixel values."""
    width: int
    height: int
    decode: Latency
    preprocess: Latency


class Offline(Frozen):
    """All films at hand at once, as MLPerf's offline scenario; medians over turns."""

    films: int
    turns: int
    plain_films_per_s: float
    """Decode, infer, the next."""
    ahead_films_per_s: float
    """The next films are decoded while one is inferred."""
    ahead_ratio: float
    """Median over turns of ahead over plain of the same turn."""
    batch: int
    batched_films_per_s: float
    """Decoded films, in batches."""


class LoadGen(Frozen):
    """What MLPerf's own load generator said; canvas to both heads, one film a query."""

    version: str
    queries: int
    """Of both scenarios."""
    single_stream_p90_ms: float
    offline_films_per_s: float
    valid: bool
    """By LoadGen's rules for the durations that it was given."""


class Memory(Frozen):
    """Bytes; None where it was not measured."""

    graph: int
    bundle: int
    plan: int | None
    host_peak: int
    """Of the cold process."""
    device_used: int | None
    """Of the card, by this process, after warm-up."""


class Overhead(Frozen):
    """Film in memory to reading, ours against a script by hand, the same graph and threads."""

    ratio: Ratio
    """Ours over the script's."""
    ours_us: dict[str, float]
    """Medians by stage, in microseconds; "rest" is what no stage has."""
    plain_us: dict[str, float]


class Accuracy(Frozen):
    """Differences to the network in torch float32, on the same films."""

    set_name: str
    films: int
    logits_max: float | None
    """None without a diagnosis, as flips."""
    agreement_cc_min: float | None
    """None without a map, as the mean."""
    agreement_cc_mean: float | None
    flips: int | None
    """Films with another decision."""
    macro_auc_loss: float | None
    """None for weights that have no accuracy on these films."""
    cc_loss: float | None
    verdict: Verdict
    """The gate's, on these films."""


class Peer(Frozen):
    """One way to run the network; canvas to heads, host memory to host memory."""

    name: str
    not_measured: str | None = None
    """Why there are no figures."""
    open_ms: float | None = None
    first_ms: float | None = None
    latency: Latency | None = None
    ratio: Ratio | None = None
    """Its time over that of the first row."""
    accuracy: Accuracy | None = None


class Point(Frozen):
    """One point of a sweep."""

    at: str
    cost: float | None
    """What grows along the sweep, in billions of multiply-accumulates a call."""
    latency: Latency
    """Of one call."""
    films_per_s: float
    floor_ms: float | None
    """The same work at the rate of a large matrix product on these threads."""


class Sweep(Frozen):
    """Cost as one thing changes and all else stays."""

    name: Literal["batch", "threads", "canvas", "precision"]
    points: tuple[Point, ...]


class Objective(Frozen):
    """An objective for the end-to-end latency."""

    percentile: str
    limit_ms: float
    found_ms: float | None
    missed_share: float
    """Share of the readings that took longer."""
    verdict: Literal["met", "missed", "inconclusive"]
    reason: str


class Host(Frozen):
    """Machine, conditions and time: what differs when the same is run elsewhere or again."""

    created_utc: str
    machine: Machine
    conditions: Conditions


class Report(Digested):
    """Content of `report.json`."""

    VERSION = 2
    WHAT = "report"
    REMEDY = "measure again, or render with the version that wrote it"

    schema_version: int = VERSION
    """SHA-256 of the canonical rendering with an empty digest."""
    notice: str = NOTICE
    caution: str | None
    bundle: dict[str, Any]
    config: Config
    films: int
    boundaries: dict[str, str] = STAGES
    warm_up: WarmUp
    cold: ColdStart
    steady: dict[str, Latency]
    """Latency by stage, in milliseconds, one film at a time, after warm-up."""
    after_idle: Latency
    """End to end, each after a pause."""
    idle_seconds: float
    per_film: tuple[FilmTimes, ...]
    offline: Offline
    loadgen: LoadGen | str
    memory: Memory
    energy: Energy | str
    overhead: Overhead | str
    peers: tuple[Peer, ...]
    sweeps: tuple[Sweep, ...]
    objectives: tuple[Objective, ...]
    samples: dict[str, tuple[float, ...]]
    """Every sample of `steady`, in milliseconds, in the order that they were taken."""
    host: Host

    @property
    def verdict(self) -> Literal["ok", "missed", "inconclusive"]:
        """Missed where an objective is; inconclusive where one is, or the machine never settled."""
        verdicts = {objective.verdict for objective in self.objectives}
        if "missed" in verdicts:
            return "missed"
        return "ok" if self.warm_up.settled and "inconclusive" not in verdicts else "inconclusive"


def read_report(path: Path) -> Report:
    """A stored report.

    Raises:
        IntegrityError: truncated, edited, or of another schema version.
        OSError: it cannot be read.
    """
    return parse_record(Report, read_regular(path, _LIMIT), str(path))
