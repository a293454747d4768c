"""`cxrgaze-train evaluate`: what a checkpoint or a bundle is worth on one split of a labelled set.

Nothing is chosen here and nothing is changed. A look at a test split is logged in the set's
folder, and the report says the how-manieth it was.
"""

from __future__ import annotations

import csv
import datetime
import io
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from cxrgaze.bundles.bundle import MANIFEST, Bundle
from cxrgaze.bundles.manifest import Decision
from cxrgaze.command import say
from cxrgaze.errors import DataError, ParityError, UsageError
from cxrgaze.evidence import heatmaps, intervals, metrics
from cxrgaze.evidence.arrays import UNLABELLED, Arrays, load_arrays
from cxrgaze.evidence.bounds import clopper_pearson
from cxrgaze.evidence.intervals import Interval, PatientBootstrap
from cxrgaze.evidence.labelled_set import LOOKS, FilmRow, LabelledSet, Split
from cxrgaze.files import make_output_folder, render_json, write_atomic
from cxrgaze.runtime.ort import OnnxRuntime
from cxrgaze.spec import NOTICE, ModelSpec
from cxrgaze.train import checkpoint
from cxrgaze.train.baseline import view_and_age
from cxrgaze.train.figures import predict, saliency_rows
from cxrgaze.train.origin import Origin, leakage

SCHEMA_VERSION = 1
MIN_PER_CLASS = 10
"""Films with and without a class that a subgroup needs before it gets a figure."""


@dataclass(frozen=True)
class Options:
    """What `cxrgaze-train evaluate` was asked for."""

    model: Path
    labelled: Path
    split: Split
    output: Path
    heatmap: str | None = None
    resamples: int = 2000
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class Model:
    """A network behind one function, from a checkpoint or a bundle."""

    spec: ModelSpec
    decision: Decision
    identity: dict[str, str]
    heatmap: str | None
    origins: tuple[Origin, ...]
    """What it was trained on; of a bundle, the last set alone is known."""
    untrained: tuple[str, ...]
    """Outputs that nothing taught."""
    predict: Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
    """Images `(N, 1, H, W)` to logits `(N, C)` and log-densities `(N, 1, H, W)`."""


@dataclass(frozen=True)
class Outcome:
    """Everything that was computed; the report is rendered from it."""

    rows: Sequence[FilmRow]
    arrays: Arrays
    classes: tuple[str, ...]
    probabilities: NDArray[np.float64]
    """`(N, C)`, at the fitted temperature."""
    log_density: NDArray[np.float32]
    """`(N, H, W)`."""
    films: dict[int, dict[str, float]]
    """Saliency metrics by film."""
    report: dict[str, Any]
    left_out: list[str] = field(default_factory=list)

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """`(N,)`, whether a film has a label."""
        return np.asarray(self.arrays.labels != UNLABELLED)


def assess(options: Options) -> int:
    """Evaluate and write report.json, report.md, report.html, films.csv and figures."""
    from cxrgaze.train.evaluation_report import pages

    labelled = LabelledSet.open(options.labelled)
    model = open_model(options.model, options.threads)
    heatmap = options.heatmap or model.heatmap
    if heatmap is None and labelled.gaze:
        raise UsageError(
            f"{options.model} does not say how its gaze densities were made; give --heatmap "
            f"({', '.join(heatmaps.PRESETS)})"
        )
    if heatmap is not None and heatmap not in heatmaps.PRESETS:
        raise UsageError(f"--heatmap {heatmap}: expected one of {', '.join(heatmaps.PRESETS)}")
    output = make_output_folder(options.output)
    outcome = evaluate_split(labelled, model, heatmap or "paper", options)
    outcome.report["look"] = _log_look(options, labelled, model)
    files = {
        "report.json": render_json(outcome.report),
        "films.csv": _film_table(outcome),
        **pages(outcome),
    }
    for name, data in files.items():
        write_atomic(output / name, data)
    say(f"report  {output / 'report.html'} (also .md, .json; films.csv has a row a film)")
    for line in summary(outcome.report):
        print(line)
    return 0


def open_model(path: Path, threads: int | None = None) -> Model:
    """The model of a checkpoint or a bundle.

    Raises:
        UsageError: neither. IntegrityError: malformed or altered.
    """
    if (path / MANIFEST).is_file():
        bundle = Bundle.open(path)
        bundle.verify()
        backend = OnnxRuntime(threads)  # of the graph, whatever its target: nothing is served
        backend.activate(bundle)

        def run(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            parts = [backend.infer(np.ascontiguousarray(i[None])) for i in images]
            return (
                np.concatenate([p.logits for p in parts]),
                np.concatenate([p.log_density for p in parts]),
            )

        manifest = bundle.manifest
        identity = {
            "kind": "bundle",
            "name": manifest.name,
            "sha256": bundle.sha256,
            "precision": manifest.precision,
            "backend": backend.name,
            "trained_on": manifest.provenance.trained_on,
        }
        known = "phantom" if manifest.spec.domain == "phantom" else None
        source = manifest.provenance
        origin = Origin(trained_on=source.trained_on, split_sha256=source.training_split_sha256)
        return Model(
            manifest.spec, manifest.decision, identity, known, (origin,), manifest.untrained, run
        )
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} is neither a checkpoint (.safetensors) nor a bundle (a folder)")
    import torch

    if threads:
        torch.set_num_threads(threads)
    network, card = checkpoint.load(path)
    identity = {
        "kind": "checkpoint",
        "name": card.name,
        "sha256": card.weights_sha256,
        "precision": "fp32",
        "backend": "torch",
        "trained_on": card.trained_on,
    }
    return Model(
        card.spec,
        card.decision,
        identity,
        card.config.get("heatmap"),
        card.lineage,
        card.untrained,
        lambda images: predict(network, images),
    )


def evaluate_split(labelled: LabelledSet, model: Model, heatmap: str, options: Options) -> Outcome:
    """All figures of one split.

    Raises:
        DataError: the split has no films, or none with a label or gaze.
    """
    preset = heatmaps.PRESETS[heatmap]
    part = labelled.split(options.split)
    if not part.rows:
        raise DataError(f"{labelled.folder}: no films in split {options.split}")
    arrays = load_arrays(part, model.spec, preset)
    logits, log_density = model.predict(arrays.images)
    if not (np.isfinite(logits).all() and np.isfinite(log_density).all()):
        raise ParityError(
            f"{options.model} gives NaN or infinity on these films: its weights are damaged"
        )
    left_out = [f"a meaning of {head}: nothing taught this output" for head in model.untrained]
    prior = _prior(labelled, model.spec, preset, left_out) if arrays.has_gaze.any() else None
    films = saliency_rows(arrays, log_density[:, 0], prior, preset)
    known = arrays.labels != UNLABELLED
    if not known.any() and not films:
        raise DataError(f"{labelled.folder}: no film of split {options.split} has a label or gaze")
    for count, what in (((~known).sum(), "label"), (len(known) - len(films), "gaze")):
        if count:
            left_out.append(f"{count} of {len(known)} films have no {what}")
    probabilities = softmax(logits.astype(np.float64) / model.decision.temperature, axis=1)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "notice": NOTICE,
        "synthetic": labelled.info.domain == "phantom",
        "caution": model.spec.caution,
        "leakage": leakage(labelled.info, model.origins),
        "model": model.identity,
        "set": {
            "name": labelled.info.name,
            "origin": labelled.info.origin,
            "split": options.split,
            "split_sha256": labelled.info.split_sha256,
            "films": len(part.rows),
            "patients": len({row.patient for row in part.rows}),
        },
        "intervals": f"95 %; bootstrap: {options.resamples} resamples of patients, percentile; "
        "DeLong: logit scale, films taken as independent",
        "diagnosis": None,
        "saliency": None,
    }
    outcome = Outcome(
        part.rows, arrays, model.spec.class_names, probabilities, log_density[:, 0], films,
        report, left_out,
    )  # fmt: skip
    if known.any():
        raw = softmax(logits.astype(np.float64), axis=1)
        report["diagnosis"] = _diagnosis(outcome, raw, model.decision, labelled, options)
    if films:
        report["saliency"] = _saliency(outcome, heatmap, options)
    report["left_out"] = left_out
    report["environment"] = {
        "cxrgaze": version("cxrgaze"),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    return outcome


def summary(report: dict[str, Any]) -> list[str]:
    """The report in a few lines."""
    lines = []
    where = report["set"]
    kind = " (synthetic)" if report["synthetic"] else ""
    lines.append(
        f"{report['model']['name']} on {where['split']} of {where['name']}{kind}: "
        f"{where['films']} films, {where['patients']} patients"
    )
    if report["leakage"]:
        lines.insert(0, f"WARNING: {report['leakage']}")
    diagnosis, saliency = report["diagnosis"], report["saliency"]
    if diagnosis and diagnosis["auc"]:
        macro = Interval(**diagnosis["auc"]["macro"]["bootstrap"])
        lines.append(f"macro AUC {macro}, accuracy {Interval(**diagnosis['accuracy'])}")
        if diagnosis["view_and_age"]:
            base = Interval(**diagnosis["view_and_age"]["macro"]["bootstrap"])
            lines.append(f"view and age alone: macro AUC {base}")
        lines.append(
            f"ECE {diagnosis['ece']['before']['value']:.3f} before, "
            f"{diagnosis['ece']['after']['value']:.3f} after scaling"
        )
    if saliency:
        prior = saliency["centre_prior"].get("cc")
        beside = f"centre prior {Interval(**prior)}" if prior else "no centre prior"
        lines.append(f"CC {Interval(**saliency['prediction']['cc'])}, {beside}")
    lines += [f"left out: {text}" for text in report["left_out"]]
    return lines


def _prior(
    labelled: LabelledSet,
    spec: ModelSpec,
    preset: heatmaps.HeatmapPreset,
    left_out: list[str],
) -> NDArray[np.float32] | None:
    training = labelled.split("train")
    training = LabelledSet(
        training.folder,
        training.info,
        tuple(row for row in training.rows if row.film in labelled.gaze),
        training.gaze,
    )
    if not training.rows:
        left_out.append("centre prior: the set has no training film with gaze")
        return None
    return heatmaps.centre_prior(load_arrays(training, spec, preset).densities[:, 0])


def _diagnosis(
    outcome: Outcome,
    raw: NDArray[np.float64],
    decision: Decision,
    labelled: LabelledSet,
    options: Options,
) -> dict[str, Any]:
    known = outcome.labelled
    labels = outcome.arrays.labels[known]
    p, raw = outcome.probabilities[known], raw[known]
    rows = [row for row, k in zip(outcome.rows, known, strict=True) if k]
    patients = [row.patient for row in rows]
    names = outcome.classes
    present = metrics.present_classes(labels, len(names))
    for index, name in enumerate(names):
        if index not in present:
            has = (labels == index).sum()
            outcome.left_out.append(f"AUC of {name}: {has} of {len(labels)} films have it")

    boot = PatientBootstrap(patients, options.resamples, options.seed)

    def share(hit: NDArray[np.bool_], among: NDArray[np.bool_]) -> dict[str, Any]:
        value = float(hit[among].mean())
        if value in (0, 1):  # the bootstrap is blind there
            n = len({p for p, a in zip(patients, among, strict=True) if a})
            return exact_share(int(value), n).model_dump()
        samples = boot.draws(lambda w: intervals.weighted_share(hit, among, w))
        return boot.around(value, samples).model_dump()

    everyone = np.ones(len(labels), dtype=bool)
    found: dict[str, Any] = {
        "films": {name: int((labels == i).sum()) for i, name in enumerate(names)},
        "auc": _aucs(p, labels, present, names, boot) if present else None,
        "accuracy": share(p.argmax(axis=1) == labels, everyone),
        "temperature": decision.temperature,
        "ece": {
            key: _bootstrapped_ece(q, labels, boot) for key, q in (("before", raw), ("after", p))
        },
        "operating_points": {},
        "view_and_age": None,
        "within_view": {},
    }
    for name, at in decision.operating_points.items():
        positive = labels == names.index(name)
        flag = p[:, names.index(name)] >= at
        found["operating_points"][name] = {
            "threshold": at,
            "sensitivity": share(flag, positive) if positive.any() else None,
            "specificity": share(~flag, ~positive) if (~positive).any() else None,
        }
    if not decision.operating_points:
        outcome.left_out.append("operating points: the model has none")
    blind: NDArray[np.float64] | None = None
    if options.split != "train" and present:
        training = [row for row in labelled.split("train").rows if row.label]
        scores = view_and_age(training, rows, names)
        if isinstance(scores, str):
            outcome.left_out.append(f"view-and-age baseline: {scores}")
        else:
            blind = scores
            found["view_and_age"] = _aucs(scores, labels, present, names, boot)
    found["within_view"] = _within_views(
        {"macro": p} | ({} if blind is None else {"view_and_age": blind}),
        labels, rows, names, options, outcome.left_out,
    )  # fmt: skip
    if options.split == "val":
        outcome.left_out.append(
            "an honest figure for temperature and operating points: they were fitted on these films"
        )
    return found


def _aucs(
    scores: NDArray[np.float64],
    labels: NDArray[np.integer],
    present: Sequence[int],
    names: Sequence[str],
    boot: PatientBootstrap,
) -> dict[str, Any]:
    """AUC per class, macro and micro, each with DeLong's and the bootstrap's interval."""
    single = {c: intervals.auc_influence(scores[:, c], labels == c) for c in present}
    samples = boot.draws(
        lambda w: np.stack(
            [intervals.weighted_auc(scores[:, c], labels == c, w) for c in present], axis=1
        )
    )
    rows = {names[c]: (single[c][0], single[c][1], samples[:, k]) for k, c in enumerate(present)}
    rows["macro"] = (
        float(np.mean([value for value, _ in single.values()])),
        np.mean([influence for _, influence in single.values()], axis=0),
        samples.mean(axis=1),
    )
    chosen = scores[:, list(present)].ravel()
    indicator = (np.array(present)[None, :] == labels[:, None]).ravel()
    value, influence = intervals.auc_influence(chosen, indicator)
    micro = boot.draws(
        lambda w: intervals.weighted_auc(chosen, indicator, np.repeat(w, len(present), axis=1))
    )
    rows["micro"] = (value, influence.reshape(len(labels), -1).sum(axis=1), micro)
    return {
        name: {
            "delong": intervals.from_influence(value, influence).model_dump(),
            "bootstrap": boot.around(value, drawn).model_dump(),
        }
        for name, (value, influence, drawn) in rows.items()
    }


def exact_share(value: int, patients: int) -> Interval:
    """A share of 0 or 1 over so many patients with its exact interval; one trial a patient."""
    bounds = clopper_pearson(patients * value, patients)
    return Interval(value=value, low=bounds.low, high=bounds.high)


def _bootstrapped_ece(
    p: NDArray[np.float64],
    labels: NDArray[np.integer],
    boot: PatientBootstrap,
) -> dict[str, Any]:
    def resampled(weights: intervals.Array) -> intervals.Array:
        return np.array(
            [
                metrics.ece(np.repeat(p, w, axis=0), np.repeat(labels, w))
                for w in weights.astype(int)
            ]
        )

    return boot.around(metrics.ece(p, labels), boot.draws(resampled)).model_dump()


def _within_views(
    scores: Mapping[str, NDArray[np.float64]],
    labels: NDArray[np.integer],
    rows: Sequence[FilmRow],
    names: Sequence[str],
    options: Options,
    left_out: list[str],
) -> dict[str, Any]:
    """Macro AUC among the films of one view, of the model and of age alone."""
    found: dict[str, Any] = {}
    views = np.array([row.view or "" for row in rows])
    for view in sorted(set(views) - {""}):
        here = views == view
        counts = np.array([(labels[here] == c).sum() for c in range(len(names))])
        enough = [
            c for c in range(len(names)) if min(counts[c], here.sum() - counts[c]) >= MIN_PER_CLASS
        ]
        if not enough:
            left_out.append(
                f"AUC within view {view}: fewer than {MIN_PER_CLASS} films with and without a class"
            )
            continue
        patients = [row.patient for row, h in zip(rows, here, strict=True) if h]

        boot = PatientBootstrap(patients, options.resamples, options.seed)
        found[view] = {"films": int(here.sum())}
        for key, p in scores.items():
            aucs = _aucs(p[here], labels[here], enough, names, boot)
            found[view][key] = aucs["macro"]
    return found


def _saliency(outcome: Outcome, heatmap: str, options: Options) -> dict[str, Any]:
    films = outcome.films
    patients = [outcome.rows[index].patient for index in films]
    boot = PatientBootstrap(patients, options.resamples, options.seed)
    keys = list(next(iter(films.values())))
    table = {key: np.array([row[key] for row in films.values()]) for key in keys}

    def interval(key: str) -> dict[str, Any] | None:
        values = table[key]
        if np.isnan(values).all():
            return None
        samples = boot.draws(lambda w: intervals.weighted_mean(values, w))
        return boot.around(float(np.nanmean(values)), samples).model_dump()

    plain = ("cc", "sim", "kld", "nss", "auc_judd")
    if np.isnan(table["cc_between_readers"]).all():
        outcome.left_out.append("inter-reader CC: no film has two readers")
    return {
        "films": len(films),
        "heatmap": heatmap,
        "prediction": {key: interval(key) for key in plain},
        "centre_prior": {
            key: interval(f"{key}_centre_prior") for key in plain if f"{key}_centre_prior" in table
        },
        "between_readers": {"cc": interval("cc_between_readers")},
        "pad_mass": interval("pad_mass"),
    }


def _film_table(outcome: Outcome) -> bytes:
    text = io.StringIO()
    keys = list(next(iter(outcome.films.values()), {}))
    columns = ["film", "patient", "label", "predicted", *(f"p_{n}" for n in outcome.classes), *keys]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for index, row in enumerate(outcome.rows):
        p = outcome.probabilities[index]
        mine = outcome.films.get(index, {})
        shown = [f"{mine[k]:.6f}" if k in mine and np.isfinite(mine[k]) else "" for k in keys]
        predicted = outcome.classes[int(p.argmax())]
        line = [row.film, row.patient, row.label or "", predicted, *(f"{v:.6f}" for v in p)]
        writer.writerow([*line, *shown])
    return text.getvalue().encode()


def _log_look(options: Options, labelled: LabelledSet, model: Model) -> dict[str, Any] | None:
    """Add this look at a test split to the set's log; how many there were with it."""
    if options.split != "test":
        return None
    line = {
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": model.identity["name"],
        "model_sha256": model.identity["sha256"],
        "split_sha256": labelled.info.split_sha256,
    }
    path = labelled.folder / LOOKS
    try:
        with path.open("ab") as file:
            file.write(render_json(line).replace(b"\n", b" ").strip() + b"\n")
    except OSError as error:
        say(f"this look at the test split is not logged: {path}: {error.strerror}")
        return {"number": None, "logged": False}
    return {"number": len(path.read_bytes().splitlines()), "logged": True}
