"""The judge of a form of a graph: parity with the network, then the gate against float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from cxrgaze.bundles.manifest import Calibration, FormRecord
from cxrgaze.bundles.served import Decision
from cxrgaze.bundles.verdicts import Gate
from cxrgaze.command import say
from cxrgaze.evidence import gate, phantom
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.evidence.labelled_set import LabelledSet
from cxrgaze.evidence.seen import Seen, require_unseen
from cxrgaze.evidence.truth import any_known
from cxrgaze.export import equalize, graph, int8, parity
from cxrgaze.export.canvases import CALIBRATION_SEED
from cxrgaze.export.forms import Form, Forms
from cxrgaze.export.options import ExportOptions
from cxrgaze.export.ranges import channel_peaks
from cxrgaze.export.search import JudgedForm
from cxrgaze.export.source import Answers, Source, served_of
from cxrgaze.export.targets import TARGETS
from cxrgaze.files import sha256
from cxrgaze.runtime.ort import witness
from cxrgaze.spec import LOGITS
from cxrgaze.train.decision import MIN_FILMS, fit_decision

RANKING_FILMS = 200
"""Films that blocks are ranked on; none of them is the gate's."""
FEW_FILMS = 32
"""Below so many calibration films a warning is written."""


@dataclass(frozen=True)
class Gated:
    """The gate's films and what the float32 graph says of them."""

    films: gate.GateSet
    reference: gate.Predicted
    not_compared: str = ""
    """What was not compared with what the network was trained on."""


def gate_films(source: Source, options: ExportOptions, model: onnx.ModelProto) -> Gated | None:
    """The gate's films and the float32 graph's answers; None where there is no gate."""
    asked, spec = options.gate, source.spec
    if asked.skip or (asked.folder is None and spec.domain != "phantom"):
        return None
    not_compared = ""
    if asked.folder is None:
        if options.precision == "fp32":
            return None  # its own reference
        films = gate.phantom_set(spec)
    else:
        heatmap = asked.heatmap or source.facts.heatmap
        labelled = LabelledSet.open(asked.folder)
        these = Seen.of(labelled.split(asked.split).rows, asked.identity_key)
        not_compared = require_unseen(source.facts.seen, these, str(asked.folder))
        films = gate.looked_at(
            labelled,
            spec,
            heatmap,
            asked.split,
            model=source.facts.name,
            model_sha256=source.facts.sha256,
            what=f"gate of {options.precision}, target {options.target}",
        )
    return Gated(films, _predicted(model, source, films), not_compared)


def validation_films(
    source: Source, options: ExportOptions, gated: Gated | None
) -> gate.GateSet | None:
    """The films that a low precision's temperatures and points are fitted on; None where none are.

    Raises:
        DataError: a set that breaks a rule, or shares patients or films with the gate's.
    """
    asked, spec = options.validation, source.spec
    if options.precision == "fp32" or not served_of(source).classes or spec.domain == "none":
        return None
    folder = asked.folder or options.int8.folder
    if folder is None:
        if not source.facts.validated_on_phantoms:
            return None
        first, count = gate.VALIDATION_PHANTOMS
        films = gate.phantom_set(spec, count, first, phantom.EASY)
    else:
        labelled = LabelledSet.open(folder)
        if asked.folder is None and asked.split and not labelled.split(asked.split).rows:
            return None
        labelled = replace(labelled, gaze={})
        films = gate.labelled_set(labelled, spec, PRESETS["paper"], asked.split)
    if gated:
        gate.require_apart(gated.films, films.patients, films.keys, "validation")
    return films


@dataclass(frozen=True)
class Calibrated:
    """What int8 graphs are made from, and the films that it was found on."""

    model: onnx.ModelProto
    """The float32 graph, its channels equalized."""
    ranges: int8.Ranges
    record: Calibration
    films: gate.GateSet
    reference: gate.Predicted
    """The float32 graph's answers on them."""

    def shift(self, found: gate.Predicted) -> NDArray[np.float64] | None:
        """What to add to a form's logits `found`; None without a diagnosis, or one of numbers."""
        if LOGITS not in self.reference:
            return None
        shift = (self.reference[LOGITS] - found[LOGITS]).mean(axis=0, dtype=np.float64)
        return shift if np.isfinite(shift).all() else None


def calibrated(
    source: Source, options: ExportOptions, model: onnx.ModelProto, gated: Gated | None
) -> Calibrated:
    """Ranges of what the target's int8 quantizes, over calibration films.

    Its channels are equalized by the strength that takes those films' outputs least from float32.

    Raises:
        DataError: a set that breaks a rule, or shares patients or films with the gate's.
    """
    asked, spec = options.int8, source.spec
    if asked.folder is None:
        chosen = gate.phantom_set(spec, asked.films, CALIBRATION_SEED)
    else:
        labelled = LabelledSet.open(asked.folder)
        part = labelled.split(asked.split)
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
    films = list(chosen.arrays.images)
    row, layout = TARGETS[options.target], source.layout
    quantized = {n.name for n in int8.convolutions(model)} - int8.kept_convolutions(model, layout)
    peaks = channel_peaks(model, int8.ranged_inputs(model, layout), films)
    reference = _predicted(model, source, chosen)
    tried: list[tuple[float, Calibrated]] = []
    for strength in equalize.strengths(spec):
        equal = equalize.equalized(model, peaks, quantized, strength)
        ranges = int8.calibrate(equal, films, row.ranged(equal, layout), asked.method)
        record = Calibration(
            method=asked.method,
            percentile=int8.PERCENTILE,
            equalization=strength,
            set_name=chosen.name,
            domain=chosen.domain,
            films=chosen.keys,
            sha256=sha256("\n".join(chosen.keys).encode()),
            warnings=tuple(warnings),
        )
        one = Calibrated(equal, ranges, record, chosen, reference)
        tried.append((_distance(one, source, options), one))
        say(f"  channels equalized by {strength}: outputs {tried[-1][0]:.2g} from fp32")
    return min(tried, key=lambda pair: pair[0])[1]


def _distance(calibration: Calibrated, source: Source, options: ExportOptions) -> float:
    """How far the first int8 form takes the calibration films' outputs, without its shift."""
    model, layout, films = calibration.model, source.layout, calibration.films
    forms = Forms(model, "int8", options.target, layout, calibration.ranges).with_kept()
    found = _predicted(next(forms).model, source, films)
    if (shift := calibration.shift(found)) is not None:
        found = {**found, LOGITS: found[LOGITS] + shift}
    return _farthest(source, films, calibration.reference, found)


def _predicted(model: onnx.ModelProto, source: Source, films: gate.GateSet) -> gate.Predicted:
    """What a graph, as it would ship, says of films."""
    return gate.predicted(witness(graph.finished(model, source.spec)), films.arrays.images)


def _farthest(
    source: Source, films: gate.GateSet, reference: gate.Predicted, found: gate.Predicted
) -> float:
    """The largest over the heads of their distance, in parts of 1: both are of one scale."""
    served = served_of(source)
    return max(gate.distance(films, reference, found, head, served) for head in served.heads)


@dataclass(frozen=True)
class FormJudge:
    """Parity and gate of a form (`cxrgaze.export.search.Judge`)."""

    source: Source
    options: ExportOptions
    answers: Answers
    domain: str
    """What the parity films are."""
    gated: Gated | None
    validation: gate.GateSet | None = None
    """Films that a form's temperatures and points are fitted on."""
    calibration: Calibrated | None = None
    """Of int8."""

    def __call__(self, form: Form) -> JudgedForm:
        """The form with both verdicts; of int8 without the shift of its logits."""
        form = self._without_shift(form)
        data = graph.finished(form.model, self.source.spec)
        served, precision = served_of(self.source), self.options.precision
        agreement = parity.compare(self.answers, data, precision, self.domain, served)
        decision, origin = self._decision(data)
        verdict = self._gate(data, decision)
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
        return JudgedForm(form, data, agreement, verdict, record, decision, origin)

    def _without_shift(self, form: Form) -> Form:
        if self.calibration is None:
            return form
        found = _predicted(form.model, self.source, self.calibration.films)
        if (shift := self.calibration.shift(found)) is None:
            return form
        return replace(form, model=equalize.shifted(form.model, shift))

    def _decision(self, data: bytes) -> tuple[Decision, str]:
        """Temperatures and points of a form, and where they are from."""
        facts, served = self.source.facts, served_of(self.source)
        films = self.validation
        if films is None:
            return facts.decision, "the float32 network's"
        labelled = int(any_known(films.arrays.truth).sum())
        if labelled < MIN_FILMS:
            return facts.decision, f"the float32 network's: {labelled} validation films are too few"
        logits = gate.predicted(witness(data), films.arrays.images)[LOGITS]
        fitted = fit_decision(logits, films.arrays.truth, served, facts.operating_sensitivity)
        points = {**facts.decision.operating_points, **fitted.operating_points}
        fitted = fitted.model_copy(update={"operating_points": points})
        return fitted, f"fitted on {labelled} films of this graph: {films.name}"

    def ranking(self, films: gate.GateSet, model: onnx.ModelProto) -> Callable[[Form], float]:
        """How far a form is from the float32 graph on some films that are none of the gate's."""
        some = films.chosen(range(min(RANKING_FILMS, len(films.keys))))
        reference = _predicted(model, self.source, some)

        def distance(form: Form) -> float:
            return _farthest(
                self.source, some, reference, _predicted(form.model, self.source, some)
            )

        return distance

    def _gate(self, data: bytes, decision: Decision) -> Gate:
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
            decision,
        )
