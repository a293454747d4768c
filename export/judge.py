"""The judge of a form of a graph: parity with the network, then the gate against float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx

from cxrgaze.bundles.manifest import Calibration, FormRecord
from cxrgaze.bundles.verdicts import Gate
from cxrgaze.command import say
from cxrgaze.evidence import gate
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.export import graph, int8, parity
from cxrgaze.export.canvases import CALIBRATION_SEED
from cxrgaze.export.forms import Form
from cxrgaze.export.options import ExportOptions
from cxrgaze.export.search import JudgedForm
from cxrgaze.export.source import Answers, Source, served_of
from cxrgaze.export.targets import TARGETS
from cxrgaze.files import sha256
from cxrgaze.runtime.ort import witness
from cxrgaze.spec import Head

RANKING_FILMS = 200
"""Films of the gate's set that blocks are ranked on; the gate takes all."""
FEW_FILMS = 32
"""Below so many calibration films a warning is written."""


@dataclass(frozen=True)
class Gated:
    """The gate's films and what the float32 graph says of them."""

    films: gate.GateSet
    reference: gate.Predicted

    def first(self, count: int) -> Gated:
        """The first so many films."""
        some = range(min(count, len(self.films.keys)))
        return Gated(self.films.chosen(some), gate.some_of(self.reference, some))


def gate_films(source: Source, options: ExportOptions, model: onnx.ModelProto) -> Gated | None:
    """The gate's films and the float32 graph's answers; None where there is no gate."""
    asked, spec = options.gate, source.spec
    if asked.skip or (asked.folder is None and spec.domain != "phantom"):
        return None
    if asked.folder is None:
        if options.precision == "fp32":
            return None  # its own reference
        films = gate.phantom_set(spec)
    else:
        heatmap = asked.heatmap or source.facts.heatmap
        films = gate.open_set(asked.folder, spec, heatmap, asked.split)
    infer = witness(graph.finished(model, spec))
    return Gated(films, gate.predicted(infer, films.arrays.images))


@dataclass(frozen=True)
class Calibrated:
    """Ranges of activations, and the record of the films that they were found on."""

    ranges: int8.Ranges
    record: Calibration


def calibrated(
    source: Source, options: ExportOptions, model: onnx.ModelProto, gated: Gated | None
) -> Calibrated:
    """Ranges of what the target's int8 quantizes, over calibration films.

    Raises:
        DataError: a set that breaks a rule, or shares patients or films with the gate's.
    """
    asked, spec = options.int8, source.spec
    if asked.folder is None:
        chosen = gate.phantom_set(spec, asked.films, CALIBRATION_SEED)
    else:
        labelled = LabelledSet.open(asked.folder)
        part = labelled.split(asked.split) if asked.split else labelled
        order = np.random.default_rng(0).permutation(len(part.rows))[: asked.films]
        part = replace(part, rows=tuple(part.rows[i] for i in np.sort(order)), gaze={})
        chosen = gate.labelled_set(part, spec, PRESETS["paper"], None)
    if gated:
        gate.require_apart(gated.films, chosen.patients, chosen.keys)
    warnings = []
    if len(chosen.keys) < FEW_FILMS:
        warnings.append(f"{len(chosen.keys)} calibration films are few, {FEW_FILMS} are better")
    if chosen.domain != spec.domain and spec.domain != "none":
        warnings.append(f"calibrated on {chosen.domain} films, the network is {spec.domain}")
    for warning in warnings:
        say(f"  warning: {warning}")
    names = TARGETS[options.target].ranged(model, source.layout)
    ranges = int8.calibrate(model, list(chosen.arrays.images), names, asked.method)
    record = Calibration(
        method=asked.method,
        percentile=int8.PERCENTILE,
        set_name=chosen.name,
        domain=chosen.domain,
        films=chosen.keys,
        sha256=sha256("\n".join(chosen.keys).encode()),
        warnings=tuple(warnings),
    )
    return Calibrated(ranges, record)


@dataclass(frozen=True)
class FormJudge:
    """Parity and gate of a form (`cxrgaze.export.search.Judge`)."""

    source: Source
    options: ExportOptions
    answers: Answers
    domain: str
    """What the parity films are."""
    gated: Gated | None

    def __call__(self, form: Form) -> JudgedForm:
        """The form with both verdicts."""
        data = graph.finished(form.model, self.source.spec)
        served, precision = served_of(self.source), self.options.precision
        agreement = parity.compare(self.answers, data, precision, self.domain, served)
        verdict = self._gate(data)
        record = FormRecord(
            form=form.name,
            kept=form.kept,
            macs=graph.convolution_macs(form.model),
            off={head: of.max for head, of in agreement.outputs.items()},
            agreement_cc_min=agreement.agreement_cc_min,
            parity=agreement.verdict,
            gate=verdict.verdict,
            gate_reason=verdict.reason,
        )
        return JudgedForm(form, data, agreement, verdict, record)

    def distance_at(self, head: Head) -> Callable[[Form], float]:
        """How far a form is from the reference at one output, on the first films of the gate's set.

        Raises:
            ValueError: there is no gate.
        """
        if self.gated is None:
            raise ValueError("there is no gate's set to measure a distance on")
        some = self.gated.first(RANKING_FILMS)

        def distance(form: Form) -> float:
            infer = witness(graph.finished(form.model, self.source.spec))
            candidate = gate.predicted(infer, some.films.arrays.images)
            served = served_of(self.source)
            return gate.distance(some.films, some.reference, candidate, head, served)

        return distance

    def _gate(self, data: bytes) -> Gate:
        spec = self.source.spec
        if spec.domain == "none":
            reason = "random weights have no accuracy to lose"
            return Gate(verdict="not_gated", reason=reason)
        if self.options.precision == "fp32":
            reason = "an fp32 graph is its own reference: parity is its gate"
            return Gate(verdict="pass", reason=reason)
        if self.gated is None:
            reason = "exported with --no-gate: accuracy against fp32 was not measured"
            return Gate(verdict="not_gated", reason=reason)
        films, reference = self.gated.films, self.gated.reference
        return gate.judge(
            films,
            reference,
            gate.predicted(witness(data), films.arrays.images),
            self.options.gate.limits,
            "graph",
            served_of(self.source),
        )
