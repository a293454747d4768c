"""The content of `manifest.json`: what a bundle is, and the SHA-256 of every other file of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, field_validator, model_validator

from cxrgaze.bundles.served import Decision, Served
from cxrgaze.bundles.verdicts import Audit, Gate, Parity, Tolerance, Verdict
from cxrgaze.files import checked_relative
from cxrgaze.records import Digested, Frozen
from cxrgaze.spec import NOTICE, Domain, Head, ModelSpec

_FILE_LIMIT = 4 << 30

Precision = Literal["fp32", "fp16", "int8"]
DataType = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
Target = Literal["tensorrt", "cpu", "openvino"]
Arithmetic = Literal["float32", "tf32", "float16", "bfloat16", "int8"]
"""What a backend computes a graph in; an int8 one is float where it was not quantized."""


class FileRecord(Frozen):
    """One file of the bundle."""

    path: str
    size: int = Field(ge=0, le=_FILE_LIMIT)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _path_stays_inside(cls, value: str) -> str:
        return str(checked_relative(value))


class FormRecord(Frozen):
    """One form of the graph that was tried, and what came of it."""

    form: str
    """How the graph is typed, such as "int8, float16 scales"."""
    kept: tuple[str, ...] = ()
    """Blocks that went back to higher precision."""
    macs: dict[DataType, int]
    off: dict[Head, float]
    """Largest difference of each head to the network's."""
    agreement_cc_min: float | None
    """None without a map."""
    parity: Literal["pass", "fail", "not_finite"]
    gate: Verdict
    gate_reason: str


class Calibration(Frozen):
    """How the ranges of an int8 graph were found."""

    method: Literal["minmax", "percentile"]
    percentile: float
    equalization: float
    """Strength by which channels were equalized; 0: not at all."""
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
    random_seed: int | None = None
    """Of random weights; None for a checkpoint."""
    created_utc: str
    versions: dict[str, str]


class Manifest(Digested):
    """Content of `manifest.json`."""

    VERSION = 7
    WHAT = "bundle"
    REMEDY = "export again, or use the version that wrote it"

    schema_version: int = VERSION
    notice: str = NOTICE
    name: str
    spec: ModelSpec
    precision: Precision
    target: Target
    opset: int
    ir_version: int = Field(le=10)
    """At most 10: onnxruntime 1.23 of JetPack 6 reads no later one (docs/graphs.md#ir-version)."""
    float32_nodes: int
    """Nodes of a low-precision graph that stay float32 on purpose."""
    convolution_macs: dict[DataType, int] = {}
    """Multiply-accumulates of the graph's convolutions for one film, by the type of their input."""
    decision: Decision = Decision()
    """That readings are served with."""
    reference_decision: Decision = Decision()
    """That the float32 network is served with: what the gate compares with."""
    decision_from: str = ""
    """Where `decision` is from: the float32 network, or validation films of this graph."""
    untrained: tuple[Head, ...] = ()
    """Heads that nothing has taught; they are not served, and every reading says so."""
    untaught: tuple[str, ...] = ()
    """Classes that nothing has taught; likewise."""
    self_test: dict[Arithmetic, Tolerance]
    """Tolerances of the golden input by what a backend computes in (`Backend.arithmetic`)."""
    parity: Parity
    gate: Gate
    not_compared: str = ""
    """What of the gate's films was not compared with those of training; "" where all was."""
    rewrites: tuple[str, ...] = ()
    """Exact rewrites of the network before the export."""
    audit: Audit | None = None
    """None for fp32."""
    calibration: Calibration | None = None
    """None but for int8."""
    forms_tried: tuple[FormRecord, ...] = ()
    """Forms that were tried, in the order of the looks at the gate's films."""
    form_shipped: int = 0
    """Index of the one that ships."""
    provenance: Provenance
    files: tuple[FileRecord, ...] = ()

    @model_validator(mode="after")
    def _all_of_it_is_of_this_network(self) -> Manifest:
        heads = self.spec.heads
        for of in (self.parity.outputs.keys(), *(one.keys() for one in self.self_test.values())):
            if of != set(heads):
                raise ValueError(f"parity or tolerances of {sorted(of)}, the network has {heads}")
        _ = self.served, self.reference_served
        return self

    @property
    def reference_served(self) -> Served:
        """What is served of the float32 network."""
        return replace(self.served, decision=self.reference_decision)

    @property
    def served(self) -> Served:
        """What is served of the network."""
        return Served(self.spec, self.decision, self.untrained, self.untaught)
