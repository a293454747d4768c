"""What was found of a graph or a plan, as records: parity, audit, and the gate with its limits."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cxrgaze.records import Frozen
from cxrgaze.spec import LOG_DENSITY, LOGITS, Domain, Head

Verdict = Literal["pass", "fail", "inconclusive", "not_gated"]
GateLevel = Literal["graph", "engine"]
QuantityKind = Literal["macro AUC", "CC", "flips", "sensitivity", "specificity", "Brier"]
GateOutcome = Literal["pass", "fail", "inconclusive"]


Tolerance = dict[Head, Annotated[float, Field(gt=0)]]
"""Largest absolute difference of each head to the fp32 reference that is still the same network.

That of the log-density in nats, where it is compared (`differences`).
"""


HEAD_WORDS: dict[Head, str] = {LOGITS: "logits", LOG_DENSITY: "log-density"}
"""The heads in sentences."""

COMPARED_SHARE = 0.01
"""Log-densities are compared where the reference density is at least this share of its peak."""


def compared_pixels(reference: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Where a reference log-density is at least `COMPARED_SHARE` of its peak."""
    return np.asarray(reference >= reference.max() + np.log(COMPARED_SHARE))


def differences(
    head: Head, found: NDArray[np.floating], reference: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Absolute differences of one film's head, flat; of a log-density at the `compared_pixels`."""
    off = np.abs(found - reference)
    return off[compared_pixels(reference)] if head == LOG_DENSITY else off.ravel()


class OutputParity(Frozen):
    """Absolute differences of one head over all parity films."""

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
    outputs: dict[Head, OutputParity]
    agreement_cc_min: float | None
    """Smallest CC between the two networks' maps over films; the human map is not involved. None
    without a map, as the next two."""
    agreement_cc_mean: float | None
    worst_film: int | None
    """Index of the film with the smallest agreement CC, in the order that they were given."""
    flips: int | None
    """Films with another decision (`Served.decisions`); None without a diagnosis."""
    peak_activation: float
    """Largest absolute value that any layer takes or gives in float32 (float16 ends at 65504)."""
    witness: str
    """What this comparison can and cannot show."""

    def __str__(self) -> str:
        found = [f"{HEAD_WORDS[head]} off by {of.max:.2g}" for head, of in self.outputs.items()]
        if self.agreement_cc_min is not None:
            found.append(f"agreement CC {self.agreement_cc_min:.6f}")
        if self.flips is not None:
            found.append(f"{self.flips} flips")
        return f"{self.verdict} on {self.domain}: {', '.join(found)}"


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


REASONS = {
    "macro_auc": "about a quarter of the half-width of an AUC of 0.90 itself on 1,000 patients",
    "cc": "a hundredth of the scale: maps that differ less look alike",
    "flips": "one patient in fifty gets another answer; without any, 149 patients show it",
    "sensitivity": "one in twenty who have the class is lost; without any, 59 who have it show it",
    "specificity": "one in twenty without the class is alarmed; without any, 59 of them show it",
    "brier": "what probabilities that are off by 0.07 in every film bring about",
}
"""Why the default limits are what they are: choices, not findings."""


class Limits(Frozen):
    """The most that a candidate may lose, each with its reason (docs/precision.md#limits).

    A limit of 0 can be failed but never passed: no set shows that nothing at all is lost.
    """

    macro_auc: float = Field(default=0.005, ge=0, le=1)
    cc: float = Field(default=0.01, ge=0, le=2)
    """Of the mean CC to the human map."""
    flips: float = Field(default=0.02, ge=0, le=1)
    """Share of patients with another decision, label or flag, in any film."""
    sensitivity: float = Field(default=0.05, ge=0, le=1)
    """Of each class, over the patients who have it."""
    specificity: float = Field(default=0.05, ge=0, le=1)
    """Of each class, over the patients with a film that has it not."""
    brier: float = Field(default=0.01, ge=0, le=2)
    """Rise of the mean Brier score."""
    reasons: dict[str, str] = {}
    """Why a limit is what it is, by its name; those without one are the defaults."""

    def why(self, name: str) -> str:
        """The reason of the limit of this name."""
        return self.reasons.get(name, REASONS[name])

    def of(self, kind: QuantityKind) -> float:
        """The limit of a quantity."""
        value: float = getattr(self, kind.lower().replace(" ", "_"))
        return value


class Quantity(Frozen):
    """One gated quantity; numbers are None where they are not defined."""

    kind: QuantityKind
    of: str = ""
    """The class that it is of, where it is of one."""
    reference: float | None = None
    candidate: float | None = None
    difference: float | None = None
    """Candidate - reference; of flips the share of patients."""
    low: float | None = None
    """Two-sided 95 % interval of the difference."""
    high: float | None = None
    bound: float | None = None
    """One-sided 95 % bound of the difference, on the side of the loss."""
    limit: float
    verdict: Literal["pass", "fail", "inconclusive", "not_measured"]
    reason: str

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.kind} of {self.of}" if self.of else self.kind

    @property
    def head(self) -> Head:
        """The output that it is measured on."""
        return LOG_DENSITY if self.kind == "CC" else LOGITS

    @property
    def loss(self) -> float | None:
        """How much is lost, on the scale of the limit; below 0 where the candidate is better."""
        return None if self.difference is None else losing(self.kind) * self.difference


def losing(kind: QuantityKind) -> int:
    """The sign of a difference that is a loss."""
    return 1 if kind in ("flips", "Brier") else -1


class ClassChange(Frozen):
    """The AUC of one class against the rest; reported, gated as their mean."""

    name: str
    films: int
    reference: float
    candidate: float
    difference: float


class DecisionChange(Frozen):
    """Patients in whom the decision on one class changed, by direction; in some films both ways."""

    name: str
    raised: int
    """A flag (of a class without a point, the label) that the reference had not."""
    dropped: int
    """One that the candidate has no more."""


class Comparison(Frozen):
    """A candidate against its reference."""

    verdict: GateOutcome
    limits: Limits
    reason: str
    """One line: the quantity that decides, what was found, its limit, what to do."""
    films: int
    patients: int
    quantities: tuple[Quantity, ...]
    classes: tuple[ClassChange, ...]
    """Classes that some but not all of the labelled films have."""
    decisions: tuple[DecisionChange, ...] = ()
    """Of every class that is decided on."""
    flipped_films: int | None
    """None without a diagnosis, as the next."""
    flipped_patients: int | None
    worst_film: int | None
    """Index of the film that loses most CC."""
    worst_cc_loss: float | None
    can_show: tuple[str, ...]
    """What a set of this size can show at all (`can_show`)."""
    resamples: int
    seed: int

    @staticmethod
    def header() -> tuple[str, ...]:
        """Titles of the columns of `rows`."""
        return (
            "quantity",
            "reference",
            "candidate",
            "difference",
            "95 % interval",
            "95 % bound",
            "limit",
            "verdict",
        )

    def rows(self) -> list[tuple[str, ...]]:
        """A table of all figures, the gated ones first."""
        rows = [_row(quantity) for quantity in self.quantities]
        for c in self.classes:
            values = (f"{c.reference:.4f}", f"{c.candidate:.4f}", f"{c.difference:+.4f}")
            rows.append((f"AUC of {c.name} ({c.films} films)", *values, "", "", "", "reported"))
        for d in self.decisions:
            changed = f"+{d.raised} -{d.dropped}"
            rows.append((f"patients: {d.name}", "", "", changed, "", "", "", "reported"))
        if self.flipped_films is not None:
            flipped = f"{self.flipped_films} of {self.films}"
            rows.append(("films with a flip", "", flipped, "", "", "", "", "reported"))
        if self.worst_film is not None and self.worst_cc_loss is not None:
            change = f"{-self.worst_cc_loss:+.4f}"
            name = f"CC of the worst film (index {self.worst_film})"
            rows.append((name, "", "", change, "", "", "", "reported"))
        return rows


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
    centre_prior_cc: float | None = None
    """CC to the human maps of the mean of the other films' human maps; None without gaze."""
    agreement_cc_min: float | None = None
    """CC of the candidate's map to the fp32 one, the worst film; -1 for a map that is not finite.
    None without a map, or where it was not run; as the next three."""
    agreement_cc_mean: float | None = None
    worst_film_sha256: str | None = None
    agreement_loss: Histogram | None = None
    """1 - agreement CC, film by film."""
    probability_change: Histogram | None = None
    """Largest change of a class's probability, film by film; None without a diagnosis."""


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
    rounding: dict[Head, float]
    """Largest difference of each head (`differences`) when every operation's output is rounded to
    float16; -1 where that is not finite."""
    magnitudes: Histogram
    """Absolute activations other than zero, by powers of two."""


def _row(quantity: Quantity) -> tuple[str, ...]:
    """One row of `Comparison.rows`."""

    def cell(value: float | None, signed: bool = True) -> str:
        return "" if value is None else shown(quantity.kind, value, signed)

    low, high = cell(quantity.low), cell(quantity.high)
    return (
        "flips, share of patients" if quantity.kind == "flips" else quantity.name,
        cell(quantity.reference, signed=False),
        cell(quantity.candidate, signed=False),
        cell(quantity.difference),
        f"{low} to {high}" if low else "",
        cell(quantity.bound),
        cell(losing(quantity.kind) * quantity.limit),
        quantity.verdict.replace("_", " "),
    )


def shown(kind: QuantityKind, value: float, signed: bool = True) -> str:
    """A figure of this quantity as text: shares in percent, others with four digits."""
    if kind == "flips":
        return percent(value)
    if kind in ("sensitivity", "specificity"):
        return f"{100 * value:+.2f} %" if signed else f"{100 * value:.1f} %"
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def percent(share: float) -> str:
    """A share as text."""
    return f"{100 * share:.4g} %"
