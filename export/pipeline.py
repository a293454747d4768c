"""A network to a bundle, step by step; nothing is written unless every step passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx

from cxrgaze.bundles import npz, signature
from cxrgaze.bundles.bundle import (
    GOLDEN,
    GRAPH,
    MANIFEST,
    REFERENCE,
    SEEN,
    Bundle,
    bundle_path,
    fill_bundle,
)
from cxrgaze.bundles.manifest import Manifest, Precision, Provenance
from cxrgaze.bundles.verdicts import Audit
from cxrgaze.command import Steps, say
from cxrgaze.environment import now_utc, versions
from cxrgaze.errors import GateError, UsageError
from cxrgaze.evidence import gate
from cxrgaze.export import audit, graph, int8, parity, search
from cxrgaze.export.canvases import GOLDEN_SEED, is_large, parity_canvases, phantom_canvases
from cxrgaze.export.forms import Forms
from cxrgaze.export.judge import (
    RANKING_FILMS,
    Calibrated,
    FormJudge,
    Gated,
    calibrated,
    gate_films,
    validation_films,
)
from cxrgaze.export.options import ExportOptions
from cxrgaze.export.report import pages
from cxrgaze.export.source import Source
from cxrgaze.export.targets import TARGETS
from cxrgaze.files import new_folder, sha256
from cxrgaze.spec import IMAGE


@dataclass(frozen=True)
class _Made:
    """What an export came to."""

    model: onnx.ModelProto
    """The float32 graph."""
    rewrites: tuple[str, ...]
    gated: Gated | None
    audit: Audit | None
    calibration: Calibrated | None
    judged: Sequence[search.JudgedForm]
    chosen: search.JudgedForm


def export(source: Source, options: ExportOptions, step: Steps) -> Bundle:
    """Write the bundle of a network.

    Raises:
        UsageError: the output cannot be written or is something else; no key to sign with; a gate
            or calibration set is needed and none was given; int8 of what is no convolution.
        ParityError: the graph does not compute what the network computes, or float16 overflows.
        GateError: it loses more than the limits allow; no bundle is left of either.
        DataError: a set that breaks a rule, or shares patients with the other.
        IntegrityError: weights that are no finite numbers.
    """
    key = signature.read_private_key(options.sign) if options.sign else None
    _require_sets(source, options)
    target = _target(source, options)
    with new_folder(target, MANIFEST) as folder:
        made = _made(source, options, step)
        with step("write and verify the bundle"):
            manifest = _manifest(source, options, made)
            fill_bundle(folder, manifest, _files(source, options, manifest, made))
            if key:
                signature.sign(folder, key)
    _log_path(target).unlink(missing_ok=True)
    return Bundle.open(target)


def _made(source: Source, options: ExportOptions, step: Steps) -> _Made:
    """All steps before anything is written."""
    precision, spec = options.precision, source.spec
    with step("read parity films"):
        images, domain = parity_canvases(spec, options.films)
    with step(f"export to ONNX, opset {graph.OPSET}, and simplify"):
        names = tuple(n for n in TARGETS[options.target].rewrites if n in source.rewrites)
        model = source.graph(names)
        graph.require_servable(model)
        if precision == "int8":
            int8.require_convolutions(model)
    with step("read the gate's films and the float32 reference's answers"):
        gated = gate_films(source, options, model)
    audited = calibration = None
    if precision != "fp32":
        looked_at = images[:1] if is_large(spec) else images
        with step(f"audit float16 ranges, films: {len(looked_at)}"):
            audited = audit.audit(model, list(looked_at), domain)
            audit.require_no_overflow(audited)
    if precision == "int8":
        with step("calibrate"):
            say("")
            calibration = calibrated(source, options, model, gated)
    with step(f"type the graph as {precision}; parity and gate"):
        say("")
        validation = validation_films(source, options, gated)
        answers = source.answers(images)
        judge = FormJudge(source, options, answers, domain, gated, validation, calibration)
        ranges = calibration.ranges if calibration else None
        typed_from = calibration.model if calibration else model
        forms = Forms(typed_from, precision, options.target, source.layout, ranges)
        judged = _judged(forms, judge, calibration)
        chosen = search.best(judged)
        parity.require_pass(chosen.parity, precision)
        _require_gate(chosen, judged)
    return _Made(model, names, gated, audited, calibration, judged, chosen)


def _target(source: Source, options: ExportOptions) -> Path:
    """The bundle's folder; int8 graphs of two targets are two files."""
    suffix = TARGETS[options.target].suffix if options.precision == "int8" else ""
    return bundle_path(options.output, f"{source.facts.name}-{options.precision}{suffix}")


def _require_sets(source: Source, options: ExportOptions) -> None:
    """Ask for what is needed before any work begins."""
    domain = source.spec.domain
    wants = options.precision != "fp32" and domain == "clinical" and not options.gate.skip
    if wants and options.gate.folder is None:
        raise UsageError(
            f"{options.precision} of a network that was trained on films needs a gate: give --gate "
            "SET (a labelled set), or --no-gate for a bundle that says not_gated in every reading"
        )
    if options.precision == "int8" and domain == "clinical" and options.int8.folder is None:
        raise UsageError("int8 needs --calibration SET, a labelled set of the network's own domain")


def _judged(
    forms: Forms, judge: FormJudge, calibration: Calibrated | None
) -> list[search.JudgedForm]:
    """The forms that were looked at with their verdicts, the most precise first."""
    options, gated = judge.options, judge.gated
    ranked = judge.validation or (calibration.films if calibration else None)
    if not options.fallback_trials or gated is None or ranked is None:
        return search.in_turn(forms.with_kept(), judge)
    say("  blocks are ranked, then leave higher precision one by one:")
    key = search.log_key(
        f"cxrgaze {version('cxrgaze')}, each block alone, {RANKING_FILMS} films",
        sha256(graph.finished(forms.model, judge.source.spec)),
        ranked.identity,
        options.precision,
        options.target,
        calibration.record.model_dump_json() if calibration else "",
    )
    log = search.Log(_log_path(_target(judge.source, options)), key)
    distance = judge.ranking(ranked, forms.model)
    sequence = search.with_fewer_kept(forms, distance, log, options.fallback_trials)
    return search.in_turn(sequence, judge)


def _log_path(target: Path) -> Path:
    """Log of a fallback search beside the bundle; it goes when the bundle is complete."""
    return target.with_suffix(".fallback.json")


def _require_gate(chosen: search.JudgedForm, judged: Sequence[search.JudgedForm]) -> None:
    """Stop an export that loses accuracy.

    Raises:
        GateError: saying what was lost, and what to do.
    """
    if chosen.gate.verdict != "fail":
        return
    tried = ", ".join(dict.fromkeys(one.form.name for one in judged))
    raise GateError(
        f"gate: {chosen.gate.reason}. Tried: {tried}. Nothing was written; let blocks go back to "
        "higher precision with --fallback, or export with a higher --precision"
    )


def _manifest(source: Source, options: ExportOptions, made: _Made) -> Manifest:
    facts, chosen = source.facts, made.chosen
    model = onnx.load_from_string(chosen.data)
    return Manifest(
        name=_target(source, options).stem,
        spec=source.spec,
        precision=options.precision,
        target=options.target,
        opset=model.opset_import[0].version,
        ir_version=model.ir_version,
        float32_nodes=chosen.form.float32_nodes,
        convolution_macs=chosen.record.macs,
        decision=chosen.decision,
        reference_decision=facts.decision,
        decision_from=chosen.decision_from,
        untrained=facts.untrained,
        untaught=facts.untaught,
        self_test=parity.self_test_tolerances(options.precision, chosen.parity),
        parity=chosen.parity,
        gate=chosen.gate,
        not_compared=made.gated.not_compared if made.gated else "",
        rewrites=made.rewrites,
        audit=made.audit,
        calibration=made.calibration.record if made.calibration else None,
        forms_tried=tuple(one.record for one in made.judged),
        form_shipped=made.judged.index(chosen),
        provenance=Provenance(
            checkpoint=facts.origin,
            checkpoint_sha256=facts.sha256,
            trained_on=facts.trained_on,
            training_split_sha256=facts.training_split_sha256,
            random_seed=facts.random_seed,
            created_utc=now_utc(),
            versions=versions("cxrgaze", "python", "torch", "onnx", "onnxruntime", "numpy"),
        ),
    )


def _files(
    source: Source, options: ExportOptions, manifest: Manifest, made: _Made
) -> dict[str, bytes]:
    """Files of the bundle by path, but for the manifest."""
    spec, data = source.spec, made.chosen.data
    drawn: dict[Precision, bytes] = {options.precision: data}
    if options.precision == "int8":
        (half,) = Forms(made.model, "fp16", options.target, source.layout).with_kept()
        drawn = {"fp16": graph.finished(half.model, spec), **drawn}
    phantoms = source.answers(phantom_canvases(spec, 3, GOLDEN_SEED + 1))
    files = {GRAPH: data, GOLDEN: _golden(source), **pages(manifest, phantoms, drawn)}
    files |= source.facts.beside
    if source.facts.seen:
        files[SEEN] = source.facts.seen.rendered()
    if made.gated:
        files[REFERENCE] = gate.stored_reference(made.gated.films, made.gated.reference)
    return files


def _golden(source: Source) -> bytes:
    """The golden input and its float32 outputs, as `cxrgaze.runtime.reader.read_golden` reads."""
    answers = source.answers(phantom_canvases(source.spec, 1, GOLDEN_SEED))
    return npz.written({IMAGE: answers.images, **answers.outputs})
