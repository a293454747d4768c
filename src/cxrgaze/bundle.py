"""The bundle: a folder `NAME.cxrgaze/` with a typed graph and a manifest that binds every file.

The manifest is canonical: its bytes are the one rendering of its content, and its `digest` is the
SHA-256 of that rendering with an empty digest. With the SHA-256 of every other file inside it, any
changed byte of a bundle is seen. A bundle is written whole or not at all and never changed after.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator, model_validator

from cxrgaze.compare import Comparison
from cxrgaze.errors import IntegrityError, UsageError
from cxrgaze.files import (
    checked_relative,
    parse_json,
    read_regular,
    read_verified,
    render_digested,
    sha256,
)
from cxrgaze.spec import NOTICE, Domain, Frozen, ModelSpec, complaint

SCHEMA_VERSION = 2
SUFFIX = ".cxrgaze"
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
"""Optional signature over the manifest (`cxrgaze.signature`)."""
GRAPH = "model.onnx"
GOLDEN = "reference/golden.npz"
REFERENCE = "reference/gate.npz"
"""fp32 outputs on the gate's films, where there was a gate."""
_MANIFEST_LIMIT = 16 << 20
_FILE_LIMIT = 4 << 30

Precision = Literal["fp32", "fp16", "int8"]
DataType = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Target = Literal["tensorrt", "cpu"]
Verdict = Literal["pass", "fail", "inconclusive", "not_gated"]
Head = Literal["logits", "log_density"]
GateLevel = Literal["graph", "engine"]


class FileRecord(Frozen):
    """One file of the bundle."""

    path: str
    size: int = Field(ge=0, le=_FILE_LIMIT)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _path_stays_inside(cls, value: str) -> str:
        return str(checked_relative(value))


class Decision(Frozen):
    """Parameters fitted on validation films; outside the engine key."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it before the softmax."""
    operating_points: dict[str, float] = {}
    """Probability threshold of a class's flag, by class name; classes without one get no flag."""


class Tolerance(Frozen):
    """Largest absolute difference to the fp32 reference that is still the same network."""

    logits: float = Field(gt=0)
    log_density: float = Field(gt=0)
    """In nats, over pixels whose reference density is at least 1 % of the map's peak."""


class OutputParity(Frozen):
    """Absolute differences of one output over all parity films."""

    max: float
    p99: float
    cosine: float
    """Smallest cosine similarity over films."""


class Parity(Frozen):
    """The bundle's graph in ONNX Runtime against the network in torch float32."""

    verdict: Literal["pass", "fail", "not_finite"]
    films: int
    domain: str
    """What films they were."""
    limits: Tolerance
    logits: OutputParity
    log_density: OutputParity
    agreement_cc_min: float
    """Smallest CC between the two networks' maps over films; the human map is not involved."""
    agreement_cc_mean: float
    worst_film: int
    """Index of the film with the smallest agreement CC, in the order that they were given."""
    label_flips: int
    peak_activation: float
    """Largest absolute value that any layer takes or gives in float32 (float16 ends at 65504)."""
    witness: str
    """What this comparison can and cannot show."""


class Histogram(Frozen):
    """How many values lie between neighbouring edges, the upper edge excluded."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def by_decade(cls, values: NDArray[np.floating], lowest: int) -> Histogram:
        """Counts of values in [0, 10), four bins a decade from 10**lowest on, all smaller in one.

        Values that are not finite, and those from 10 on, are in the last bin.
        """
        edges = np.concatenate([[0.0], np.logspace(lowest, 1, 4 * (1 - lowest) + 1)])
        inside = np.nan_to_num(values.astype(np.float64), nan=9.0, posinf=9.0).clip(0, 9.0)
        counts = np.histogram(inside, edges)[0]
        return cls(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


class Gate(Frozen):
    """Accuracy against the fp32 reference on a labelled set."""

    level: GateLevel = "graph"
    verdict: Verdict
    reason: str
    set_name: str = ""
    set_sha256: str = ""
    """Identity of films, patients, labels and gaze densities."""
    domain: Domain | None = None
    """What the films are: phantom figures are synthetic."""
    comparison: Comparison | None = None
    """Every difference with its interval and limit; None where it was not run."""
    agreement_cc_min: float = -1.0
    """CC of the candidate's map to the fp32 one, the worst film; -1 where it was not run."""
    agreement_cc_mean: float = -1.0
    worst_film_sha256: str = ""
    agreement_loss: Histogram | None = None
    """1 - agreement CC, film by film."""
    probability_change: Histogram | None = None
    """Largest change of a class's probability, film by film."""


class Audit(Frozen):
    """What float16 does to the activations, from the fp32 graph and from a rounding run."""

    films: int
    domain: str
    largest: float
    """Largest absolute activation (float16 ends at 65504)."""
    largest_tensor: str
    overflowing: tuple[str, ...]
    """Tensors with a value that float16 cannot hold."""
    subnormal_share: float
    """Share of all values other than zero that lose bits in float16 for being small."""
    worst_subnormal_share: float
    worst_subnormal_tensor: str
    rounding_finite: bool
    rounding_logits: float
    """Largest difference of the logits when every operation's output is rounded to float16."""
    rounding_log_density: float
    """Likewise of the log-density, in nats, where the density is at least 1 % of its peak."""
    magnitudes: Histogram
    """Absolute activations other than zero, by powers of two."""


class Trial(Frozen):
    """One form of the graph that was tried, and what came of it."""

    form: str
    """How the graph is typed, such as "int8, float16 scales"."""
    kept: tuple[str, ...] = ()
    """Blocks that went back to higher precision."""
    macs: dict[DataType, int]
    logits_max: float
    log_density_max: float
    agreement_cc_min: float
    parity: Literal["pass", "fail", "not_finite"]
    gate: Verdict
    gate_reason: str


class Calibration(Frozen):
    """How the ranges of an int8 graph were found."""

    method: Literal["minmax", "percentile"]
    percentile: float
    set_name: str
    domain: Domain
    films: tuple[str, ...]
    """SHA-256 of each film."""
    sha256: str
    """Of the list."""
    warnings: tuple[str, ...] = ()


class Provenance(Frozen):
    """Where the bundle came from."""

    checkpoint: str
    checkpoint_sha256: str
    trained_on: str
    training_split_sha256: str = ""
    """Split of the set that it was trained on, where that was a labelled set."""
    created_utc: str
    versions: dict[str, str]


class Manifest(Frozen):
    """Content of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    digest: str = ""
    notice: str = NOTICE
    name: str
    spec: ModelSpec
    precision: Precision
    target: Target
    opset: int
    ir_version: int = Field(le=10)
    """At most 10: onnxruntime 1.23 of JetPack 6 reads no later one (toolchain.md section 9)."""
    float32_nodes: int
    """Nodes of a low-precision graph that stay float32 on purpose."""
    convolution_macs: dict[DataType, int] = {}
    """Multiply-accumulates of the graph's convolutions for one film, by the type of their input."""
    decision: Decision = Decision()
    untrained: tuple[Head, ...] = ()
    """Outputs that nothing has taught; every reading says so."""
    self_test: dict[str, Tolerance]
    """Tolerances of the golden input by backend, "NAME-tf32" where it may use TensorFloat-32."""
    parity: Parity
    gate: Gate
    rewrites: tuple[str, ...] = ()
    """Exact rewrites of the network before the export."""
    audit: Audit | None = None
    """None for fp32."""
    calibration: Calibration | None = None
    """None but for int8."""
    trials: tuple[Trial, ...] = ()
    """Forms that were tried, in order; the last is the one that ships."""
    provenance: Provenance
    files: tuple[FileRecord, ...] = ()

    @model_validator(mode="after")
    def _operating_points_are_of_classes(self) -> Manifest:
        foreign = sorted(set(self.decision.operating_points) - set(self.spec.class_names))
        if foreign:
            raise ValueError(f"operating point of {foreign[0]!r}, which is no class")
        return self

    def rendered(self) -> bytes:
        """The canonical bytes, digest filled in."""
        return render_digested(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: a checked manifest, and files that are verified as they are read."""

    path: Path
    manifest: Manifest
    sha256: str
    """SHA-256 of the manifest's bytes: the identity of the bundle."""

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Read and check the manifest.

        Raises:
            UsageError: `path` is no bundle.
            IntegrityError: malformed, altered, or of another schema version.
        """
        path = Path(path)
        if not (path / MANIFEST).exists():
            raise UsageError(_no_bundle(path))
        data = read_regular(path / MANIFEST, _MANIFEST_LIMIT)
        content = parse_json(data, str(path / MANIFEST))
        if content.get("schema_version") != SCHEMA_VERSION:
            raise IntegrityError(
                f"{path}: bundle schema version {content.get('schema_version')!r}, this cxrgaze "
                f"reads {SCHEMA_VERSION}; export again, or use the version that wrote it"
            )
        try:
            manifest = Manifest.model_validate(content)
        except ValidationError as error:
            raise IntegrityError(f"{path / MANIFEST}: {complaint(error)}") from error
        if manifest.rendered() != data:
            raise IntegrityError(
                f"{path / MANIFEST} was altered: it does not match its own digest; export again"
            )
        return cls(path, manifest, sha256(data))

    def read(self, name: str) -> bytes:
        """Bytes of one listed file, verified; load from these, never from the path.

        Raises:
            IntegrityError: missing, of another size, or altered.
        """
        record = next((r for r in self.manifest.files if r.path == name), None)
        if record is None:
            raise IntegrityError(f"{self.path}: {name} is not listed in {MANIFEST}")
        file = self.path / name
        if file.resolve() != self.path.resolve() / name:
            raise IntegrityError(f"{file} is reached through a link; expected a plain folder")
        return read_verified(
            file,
            record.size,
            record.sha256,
            source="the manifest",
            remedy="copy or export the bundle again",
        )

    def verify(self, leave: Collection[str] = ()) -> None:
        """Read every listed file once, but those in `leave`, which the caller reads itself.

        Raises:
            IntegrityError: as `read`, or there is a file that is not listed.
        """
        listed = {MANIFEST, SIGNATURE, *(record.path for record in self.manifest.files)}
        for file in self.path.rglob("*"):
            if not file.is_dir() and file.relative_to(self.path).as_posix() not in listed:
                raise IntegrityError(f"{file} does not belong to the bundle; remove it")
        for record in self.manifest.files:
            if record.path not in leave:
                self.read(record.path)


def fill_bundle(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write manifest and files into the empty `folder` of `new_folder`, and verify them."""
    records = tuple(
        FileRecord(path=name, size=len(data), sha256=sha256(data)) for name, data in files.items()
    )
    manifest = manifest.model_copy(update={"files": records})
    for name, data in files.items():
        (folder / checked_relative(name)).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_bytes(manifest.rendered())
    bundle = Bundle.open(folder)
    bundle.verify()
    return bundle


def bundle_path(output: Path, name: str) -> Path:
    """`output` itself if it is named as a bundle, else the bundle `name` inside it."""
    return output if output.suffix == SUFFIX else output / f"{name}{SUFFIX}"


def _no_bundle(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist; expected a bundle made by cxrgaze-export"
    inside = sorted(p.name for p in path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    hint = f"; did you mean {path / inside[0]}?" if inside else "; make one with cxrgaze-export"
    return f"{path} is not a bundle: it has no {MANIFEST}{hint}"
