"""Checkpoint to bundle, step by step; nothing is written unless every step passed."""

from __future__ import annotations

import datetime
import io
import platform
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from cxrgaze import bundle, phantom, signature
from cxrgaze.command import Steps, say
from cxrgaze.compare import Limits
from cxrgaze.engines import gate
from cxrgaze.errors import DataError, GateError, UsageError
from cxrgaze.export import attempts, audit, forms, graph, int8, parity, rewrites
from cxrgaze.export.ranges import Method
from cxrgaze.export.report import pages
from cxrgaze.export.session import host_session
from cxrgaze.files import new_folder, sha256
from cxrgaze.heatmaps import PRESETS
from cxrgaze.runtime.backends import Outputs
from cxrgaze.runtime.canvas import to_canvas
from cxrgaze.runtime.film import Film, film_from_array, load_film
from cxrgaze.samples import LabelledSet, Split
from cxrgaze.spec import IMAGE, LOG_DENSITY, LOGITS, ModelSpec, complaint
from cxrgaze.train import checkpoint
from cxrgaze.train.model import Network, random_network, spec_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GOLDEN_SEED = 2_403_169
PARITY_SEED = 1_000_000  # apart from every seed that training uses
CALIBRATION_SEED = 2_000_000
LARGE_CANVAS = 256 * 256
"""Pixels above which parity takes 4 phantoms instead of 32, and the audit one film."""
RANKING_FILMS = 200
"""Films of the gate's set that blocks are ranked on; the gate takes all."""
FEW_FILMS = 32
"""Below so many calibration films a warning is written."""


@dataclass(frozen=True)
class Source:
    """A network to export and what is known of it."""

    network: Network
    spec: ModelSpec
    name: str
    origin: str
    """File name of the checkpoint, or how random weights were made."""
    sha256: str
    trained_on: str
    decision: bundle.Decision = bundle.Decision()
    untrained: tuple[bundle.Head, ...] = ()
    training_split_sha256: str = ""
    heatmap: str | None = None
    """Preset of the human maps that it was trained with."""


@dataclass(frozen=True)
class GateOptions:
    """What the gate is to be asked."""

    folder: Path | None = None
    """A labelled set; None takes phantoms where the network was trained on phantoms."""
    split: Split | None = "test"
    skip: bool = False
    """Export without a gate, and say so."""
    heatmap: str | None = None
    """Preset of the human maps; None takes the one that the network was trained with."""
    limits: Limits = Limits()


@dataclass(frozen=True)
class Int8Options:
    """How int8 is calibrated."""

    folder: Path | None = None
    """A labelled set; None takes phantoms where the network was trained on phantoms or nothing."""
    split: Split | None = "train"
    films: int = 64
    """At most so many, chosen by seed."""
    method: Method = "minmax"


@dataclass(frozen=True)
class Options:
    """What `cxrgaze-export` was asked for."""

    precision: bundle.Precision
    target: bundle.Target
    output: Path
    films: Sequence[Path] = ()
    """Films for parity; none: phantoms."""
    sign: Path | None = None
    """Private key to sign the bundle with."""
    gate: GateOptions = GateOptions()
    int8: Int8Options = Int8Options()
    fallback_trials: int = 0
    """Trials of the fallback search; 0: none."""


@dataclass(frozen=True)
class _Calibrated:
    ranges: dict[str, tuple[float, float]]
    record: bundle.Calibration


def source_from_checkpoint(path: Path) -> Source:
    """The network of a checkpoint (`checkpoint.load` says what can be wrong)."""
    network, card = checkpoint.load(path)
    return Source(
        network,
        card.spec,
        card.name,
        path.name,
        card.weights_sha256,
        card.trained_on,
        card.decision,
        card.untrained,
        card.lineage[-1].split_sha256 if card.lineage else "",
        card.config.get("heatmap"),
    )


def source_from_random(variant: str, seed: int) -> Source:
    """An untrained network for latency work."""
    spec = spec_of(
        variant, model_version=f"random-{seed}", pixel_source="image-8bit", domain="none"
    )
    network = random_network(variant, torch.from_numpy(_phantoms(spec, 2, CALIBRATION_SEED)), seed)
    weights = b"".join(v.numpy().tobytes() for v in network.state_dict().values())
    return Source(
        network,
        spec,
        f"{variant}-random",
        f"random weights (seed {seed}, Kaiming, BatchNorm calibrated on two phantoms)",
        sha256(weights),
        "nothing: untrained",
    )


def read_limits(path: Path | None) -> Limits:
    """Limits of the gate from a TOML file, the defaults without one.

    Raises:
        UsageError: no such file, or not limits.
    """
    if path is None:
        return Limits()
    try:
        return Limits.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        raise UsageError(f"{path}: {complaint(error)}") from error


def export(source: Source, options: Options, step: Steps) -> bundle.Bundle:
    """Write the bundle of a network.

    Raises:
        UsageError: the output cannot be written or is something else; no key to sign with; a gate
            or calibration set is needed and none was given.
        ParityError: the graph does not compute what the network computes, or float16 overflows.
        GateError: it loses more than the limits allow; no bundle is left of either.
        DataError: a set that breaks a rule, or shares patients with the other.
    """
    precision, spec = options.precision, source.spec
    key = signature.read_private_key(options.sign) if options.sign else None
    name = _name(source, options)
    target = bundle.bundle_path(options.output, name)
    _require_sets(source, options)
    with new_folder(target, bundle.MANIFEST) as folder:
        with step("read parity films"):
            images, domain = _parity_images(spec, options.films)
        with step(f"export to ONNX, opset {graph.OPSET}"):
            names = rewrites.for_target(options.target)
            model = graph.onnx_from_network(rewrites.rewritten(source.network, names), spec)
        with step("simplify"):
            model = graph.simplified(model)
        with step("read the gate's films and the float32 reference's answers"):
            films, reference = _gate_set(source, options, model)
        calibrated = audited = None
        if precision != "fp32":
            looked_at = images if spec.height * spec.width <= LARGE_CANVAS else images[:1]
            with step(f"audit float16 ranges, films: {len(looked_at)}"):
                audited = audit.audit(model, list(looked_at), domain)
                audit.require_no_overflow(audited)
        if precision == "int8":
            with step("calibrate"):
                calibrated = _calibrated(source, options, model, films)
        with step(f"type the graph as {precision}; parity and gate"):
            say("")
            wanted = parity.answers(source.network, images)
            judge = _Judge(source, options, wanted, domain, films, reference)
            made = _attempts(judge, options, model, calibrated, name)
            chosen = attempts.best(made)
            parity.require_pass(chosen.parity, precision)
            _require_gate(chosen, made)
        with step("write and verify the bundle"):
            manifest = _manifest(source, options, name, chosen, made, names, audited, calibrated)
            drawn: dict[bundle.Precision, bytes] = {precision: chosen.data}
            if precision == "int8":
                (half,) = forms.forms(model, "fp16", options.target)
                drawn = {"fp16": graph.finished(half.model, spec), **drawn}
            files = {
                bundle.GRAPH: chosen.data,
                bundle.GOLDEN: _golden(source.network, spec),
                **pages(manifest, source.network, drawn, _phantoms(spec, 3, GOLDEN_SEED + 1)),
            }
            if films and reference:
                files[bundle.REFERENCE] = gate.stored_reference(films, reference)
            bundle.fill_bundle(folder, manifest, files)
            if key:
                signature.sign(folder, key)
    _log_path(options, name).unlink(missing_ok=True)
    return bundle.Bundle.open(target)


def _name(source: Source, options: Options) -> str:
    """Name of the bundle; int8 graphs of the two targets are two files."""
    other = "-cpu" if options.precision == "int8" and options.target == "cpu" else ""
    return f"{source.name}-{options.precision}{other}"


def _require_sets(source: Source, options: Options) -> None:
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


def _gate_set(
    source: Source, options: Options, model: onnx.ModelProto
) -> tuple[gate.GateSet | None, gate.Predicted | None]:
    """The gate's films and what the float32 graph says of them; None where there is no gate."""
    asked, spec = options.gate, source.spec
    if asked.skip or (asked.folder is None and spec.domain != "phantom"):
        return None, None
    if asked.folder is None:
        if options.precision == "fp32":
            return None, None  # its own reference
        films = gate.phantom_set(spec)
    else:
        films = gate.open_set(asked.folder, spec, asked.heatmap or source.heatmap, asked.split)
    infer = _infer(graph.finished(model, spec))
    return films, gate.predicted(infer, films.arrays.images)


def _infer(data: bytes) -> gate.Infer:
    session = host_session(data)

    def infer(image: NDArray[np.float32]) -> Outputs:
        return Outputs(*session.run([LOGITS, LOG_DENSITY], {IMAGE: image}))

    return infer


def _calibrated(
    source: Source, options: Options, model: onnx.ModelProto, films: gate.GateSet | None
) -> _Calibrated:
    asked, spec = options.int8, source.spec
    if asked.folder is None:
        chosen = gate.phantom_set(spec, asked.films, CALIBRATION_SEED)
    else:
        labelled = LabelledSet.open(asked.folder)
        part = labelled.split(asked.split) if asked.split else labelled
        order = np.random.default_rng(0).permutation(len(part.rows))[: asked.films]
        part = replace(part, rows=tuple(part.rows[i] for i in np.sort(order)), gaze={})
        chosen = gate.labelled_set(part, spec, PRESETS["paper"], None)
    if films:
        gate.require_apart(films, chosen.patients, chosen.keys)
    warnings = []
    if len(chosen.keys) < FEW_FILMS:
        warnings.append(f"{len(chosen.keys)} calibration films are few, {FEW_FILMS} are better")
    if chosen.domain != spec.domain and spec.domain != "none":
        warnings.append(f"calibrated on {chosen.domain} films, the network is {spec.domain}")
    for warning in warnings:
        say(f"  warning: {warning}")
    ranges = int8.calibrate(model, list(chosen.arrays.images), options.target, asked.method)
    record = bundle.Calibration(
        method=asked.method,
        percentile=int8.PERCENTILE,
        set_name=chosen.name,
        domain=chosen.domain,
        films=chosen.keys,
        sha256=sha256("\n".join(chosen.keys).encode()),
        warnings=tuple(warnings),
    )
    return _Calibrated(ranges, record)


@dataclass(frozen=True)
class _Judge:
    """Parity and gate of a form; an `attempts.Try`."""

    source: Source
    options: Options
    wanted: parity.Answers
    domain: str
    films: gate.GateSet | None
    reference: gate.Predicted | None

    def __call__(self, form: forms.Form) -> attempts.Attempt:
        spec, precision = self.source.spec, self.options.precision
        data = graph.finished(form.model, spec)
        found = parity.compare(self.wanted, data, precision, self.domain)
        verdict = self._gate(data)
        trial = bundle.Trial(
            form=form.name,
            kept=form.kept,
            macs=graph.convolution_macs(form.model),
            logits_max=found.logits.max,
            log_density_max=found.log_density.max,
            agreement_cc_min=found.agreement_cc_min,
            parity=found.verdict,
            gate=verdict.verdict,
            gate_reason=verdict.reason,
        )
        return attempts.Attempt(form, data, found, verdict, trial)

    def distance(self, head: bundle.Head, form: forms.Form) -> float:
        """Of a form to the reference at one output, on the first films of the gate's set."""
        if self.films is None or self.reference is None:
            raise ValueError("there is no gate's set to measure a distance on")
        some = range(min(RANKING_FILMS, len(self.films.keys)))
        films, reference = self.films.chosen(some), self.reference.chosen(some)
        data = graph.finished(form.model, self.source.spec)
        found = gate.predicted(_infer(data), films.arrays.images)
        return gate.distance(films, reference, found, head)

    def _gate(self, data: bytes) -> bundle.Gate:
        spec = self.source.spec
        if spec.domain == "none":
            reason = "random weights have no accuracy to lose"
            return bundle.Gate(verdict="not_gated", reason=reason)
        if self.options.precision == "fp32":
            reason = "an fp32 graph is its own reference: parity is its gate"
            return bundle.Gate(verdict="pass", reason=reason)
        if self.films is None or self.reference is None:
            reason = "exported with --no-gate: accuracy against fp32 was not measured"
            return bundle.Gate(verdict="not_gated", reason=reason)
        return gate.judge(
            self.films,
            self.reference,
            gate.predicted(_infer(data), self.films.arrays.images),
            self.options.gate.limits,
            "graph",
            self.source.untrained,
            spec.class_names,
        )


def _attempts(
    judge: _Judge,
    options: Options,
    model: onnx.ModelProto,
    calibrated: _Calibrated | None,
    name: str,
) -> list[attempts.Attempt]:
    ranges = calibrated.ranges if calibrated else None

    def typed(kept: Collection[str]) -> list[forms.Form]:
        return list(forms.forms(model, options.precision, options.target, ranges, kept))

    made = attempts.all_of(typed(()), judge)
    failed = attempts.best(made).gate.verdict in ("fail", "inconclusive")
    if not failed or not options.fallback_trials or judge.films is None:
        return made
    say("  blocks go back to higher precision:")
    head = attempts.weakest_head(attempts.best(made))
    key = attempts.log_key(
        f"cxrgaze {version('cxrgaze')}, each block alone, {head}, {RANKING_FILMS} films",
        sha256(graph.finished(model, judge.source.spec)),
        judge.films.identity,
        options.precision,
        options.target,
        options.gate.limits.model_dump_json(),
        calibrated.record.model_dump_json() if calibrated else "",
    )
    log = attempts.Log(_log_path(options, name), key)
    blocks = forms.blocks_of(model, options.precision)
    distance = partial(judge.distance, head)
    return made + attempts.fallback(typed, blocks, judge, distance, log, options.fallback_trials)


def _log_path(options: Options, name: str) -> Path:
    """Log of a fallback search beside the bundle; it goes when the bundle is complete."""
    target = bundle.bundle_path(options.output, name)
    return target.with_suffix(".fallback.json")


def _require_gate(chosen: attempts.Attempt, made: Sequence[attempts.Attempt]) -> None:
    """Stop an export that loses accuracy.

    Raises:
        GateError: saying what was lost, and what to do.
    """
    if chosen.gate.verdict != "fail":
        return
    tried = ", ".join(dict.fromkeys(a.form.name for a in made))
    raise GateError(
        f"gate: {chosen.gate.reason}. Tried: {tried}. Nothing was written; let blocks go back to "
        "higher precision with --fallback, or export with a higher --precision"
    )


def _manifest(
    source: Source,
    options: Options,
    name: str,
    chosen: attempts.Attempt,
    made: Sequence[attempts.Attempt],
    names: tuple[str, ...],
    audited: bundle.Audit | None,
    calibrated: _Calibrated | None,
) -> bundle.Manifest:
    model = onnx.load_from_string(chosen.data)
    others = [a.trial for a in made if a is not chosen]
    return bundle.Manifest(
        name=name,
        spec=source.spec,
        precision=options.precision,
        target=options.target,
        opset=model.opset_import[0].version,
        ir_version=model.ir_version,
        float32_nodes=chosen.form.float32_nodes,
        convolution_macs=chosen.trial.macs,
        decision=source.decision,
        untrained=source.untrained,
        self_test=parity.self_test_tolerances(options.precision, chosen.parity),
        parity=chosen.parity,
        gate=chosen.gate,
        rewrites=names,
        audit=audited,
        calibration=calibrated.record if calibrated else None,
        trials=(*others, chosen.trial),
        provenance=bundle.Provenance(
            checkpoint=source.origin,
            checkpoint_sha256=source.sha256,
            trained_on=source.trained_on,
            training_split_sha256=source.training_split_sha256,
            created_utc=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            versions={
                "cxrgaze": version("cxrgaze"),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "onnx": onnx.__version__,
                "onnxruntime": onnxruntime.__version__,
                "numpy": np.__version__,
            },
        ),
    )


def _parity_images(spec: ModelSpec, films: Sequence[Path]) -> tuple[NDArray[np.float32], str]:
    if not films:
        count = 32 if spec.height * spec.width <= LARGE_CANVAS else 4
        return _phantoms(spec, count, PARITY_SEED), f"{count} phantoms (synthetic drawings)"
    loaded = [load_film(path) for path in films]
    for film in loaded:
        if film.reasons:
            raise DataError(f"{film.name} is no parity film: {'; '.join(film.reasons)}")
    return _canvases(loaded, spec), f"{len(loaded)} films given by --films"


def _phantoms(spec: ModelSpec, count: int, first_seed: int) -> NDArray[np.float32]:
    shape = (max(spec.height, 96), max(spec.width, 96))
    drawn = [phantom.draw(first_seed + i, shape=shape).pixels for i in range(count)]
    return _canvases([film_from_array(pixels) for pixels in drawn], spec)


def _canvases(films: Sequence[Film], spec: ModelSpec) -> NDArray[np.float32]:
    return np.stack([to_canvas(film.pixels, spec)[0] for film in films])[:, None]


def _golden(network: Network, spec: ModelSpec) -> bytes:
    """The golden input and its float32 outputs, as `cxrgaze.runtime.reader.read_golden` reads."""
    image = _phantoms(spec, 1, GOLDEN_SEED)
    with torch.inference_mode():
        reference = network(torch.from_numpy(image))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        image=image,
        logits=reference.logits.numpy(),
        log_density=reference.log_density.numpy(),
    )
    return buffer.getvalue()
