"""`cxrgaze-train evaluate`: what a checkpoint or a bundle is worth on one split of a labelled set.

Nothing is chosen here and nothing is changed. A look at a test split is logged in the set's
folder, and the report says the how-manieth it was.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from cxrgaze.command import say
from cxrgaze.environment import now_utc, versions
from cxrgaze.errors import UsageError
from cxrgaze.evidence.heatmaps import PRESETS
from cxrgaze.evidence.labelled_set import LabelledSet, Split, log_look
from cxrgaze.evidence.seen import Seen, read_key
from cxrgaze.files import make_output_folder, write_atomic
from cxrgaze.spec import LOG_DENSITY
from cxrgaze.train.diagnosis_figures import diagnosis_of
from cxrgaze.train.evaluated_films import EvaluatedFilms, evaluate_films
from cxrgaze.train.evaluated_model import EvaluatedModel, open_model
from cxrgaze.train.evaluation_record import FILE, Evaluation, SetIdentity
from cxrgaze.train.evaluation_report import pages
from cxrgaze.train.origin import leakage
from cxrgaze.train.saliency_figures import saliency_of


@dataclass(frozen=True)
class EvaluationOptions:
    """What `cxrgaze-train evaluate` was asked for."""

    model: Path
    """A checkpoint or a bundle."""
    labelled: Path
    """Folder of the labelled set."""
    split: Split
    output: Path
    heatmap: str | None = None
    """Preset that makes densities of the gaze; None for the model's own."""
    resamples: int = 2000
    """Of the bootstrap over patients."""
    seed: int = 0
    threads: int | None = None
    identity_key: Path | None = None
    """A site's key, under which the training run recorded its patients."""


def evaluate_model(options: EvaluationOptions) -> Evaluation:
    """Evaluate; write report.json, report.md, report.html, films.csv and drawings.

    Raises:
        UsageError: no model, a heatmap preset that is unknown or has to be given, an output folder
            that cannot be written.
        DataError: a set that breaks a rule, or a split without films, or without labels and gaze.
        ParityError: an output that is not finite.
        IntegrityError: a model or a set that is malformed or altered.
    """
    labelled = LabelledSet.open(options.labelled)
    model = open_model(options.model, options.threads)
    heatmap = _heatmap(options, model, labelled)
    output = make_output_folder(options.output)
    films = evaluate_films(labelled, options.split, model, heatmap)
    evaluation = _evaluation(films, labelled, model, heatmap, options)
    files = {
        FILE: evaluation.rendered(),
        "films.csv": films.table(),
        **pages(evaluation, films),
    }
    for name, data in files.items():
        write_atomic(output / name, data)
    say(f"report  {output / 'report.html'} (also .md, .json; films.csv has a row a film)")
    return evaluation


def _heatmap(options: EvaluationOptions, model: EvaluatedModel, labelled: LabelledSet) -> str:
    """The preset that makes densities of the set's gaze."""
    heatmap = options.heatmap or model.heatmap
    if heatmap is None and labelled.gaze and LOG_DENSITY in model.served.heads:
        raise UsageError(
            f"{options.model} does not say how its gaze densities were made; give --heatmap "
            f"({', '.join(PRESETS)})"
        )
    if heatmap is not None and heatmap not in PRESETS:
        raise UsageError(f"--heatmap {heatmap}: expected one of {', '.join(PRESETS)}")
    return heatmap or "paper"


def _leakage(
    films: EvaluatedFilms,
    asked: Seen,
    labelled: LabelledSet,
    model: EvaluatedModel,
    options: EvaluationOptions,
) -> str | None:
    """Why the model may have been trained on these films: by their hashes, else by its words."""
    if model.seen and (shared := model.seen.shared(asked)):
        return (
            f"Its training had {shared} of split {options.split} ({len(films.rows)} films), by the "
            "hashes that the model keeps: figures of them flatter."
        )
    # Hashes speak for the run's own split, words for other films that its weights descend from.
    own = {o.split_sha256 for o in model.origins if model.seen and not o.weights_sha256} - {""}
    return leakage(labelled.info, [o for o in model.origins if o.split_sha256 not in own])


def _evaluation(
    films: EvaluatedFilms,
    labelled: LabelledSet,
    model: EvaluatedModel,
    heatmap: str,
    options: EvaluationOptions,
) -> Evaluation:
    """All figures as a record; the last thing done is to log the look."""
    info, resamples, seed = labelled.info, options.resamples, options.seed
    left_out = list(films.left_out)
    asked = Seen.of(films.rows, read_key(options.identity_key))
    diagnosis = saliency = None
    if films.has_label.any():
        diagnosis, reasons = diagnosis_of(films, resamples=resamples, seed=seed)
        left_out += reasons
        if options.split == "val":
            left_out.append(
                "an honest figure for temperature and operating points: they were fitted on these "
                "films"
            )
    if model.seen is None:
        left_out.append("a comparison with the model's training films: they are not recorded")
    elif reason := model.seen.not_compared(asked):
        left_out.append(f"a comparison of patients: {reason}")
    if films.saliency:
        saliency, reasons = saliency_of(films, heatmap, resamples=resamples, seed=seed)
        left_out += reasons
    return Evaluation(
        synthetic=info.domain == "phantom",
        caution=model.spec.caution,
        leakage=_leakage(films, asked, labelled, model, options),
        model=model.identity,
        set=SetIdentity(
            name=info.name,
            origin=info.origin,
            split=options.split,
            split_sha256=info.split_sha256,
            films=len(films.rows),
            patients=len({row.patient for row in films.rows}),
        ),
        intervals=f"95 %; bootstrap: {resamples} resamples of patients, percentile; "
        "DeLong: logit scale, films taken as independent",
        diagnosis=diagnosis,
        saliency=saliency,
        left_out=tuple(left_out),
        created_utc=now_utc(),
        environment={**versions("cxrgaze", "python"), "machine": platform.machine()},
        look=log_look(labelled, model.identity.name, model.identity.sha256, "evaluation")
        if options.split == "test"
        else None,
    )
