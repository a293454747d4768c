"""The pages of an evaluation: tables, ROC, reliability, and a grid of maps."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_curve

from cxrgaze.evidence import metrics
from cxrgaze.evidence.intervals import Interval
from cxrgaze.evidence.labelled_set import LOOKS
from cxrgaze.evidence.truth import HAS, UNKNOWN, columns, present_classes
from cxrgaze.report import (
    Block,
    Bullets,
    Figure,
    Heading,
    Paragraph,
    Table,
    drawn,
    html_page,
    markdown_page,
    new_plot,
)
from cxrgaze.spec import LOG_DENSITY
from cxrgaze.train.evaluated_films import EvaluatedFilms
from cxrgaze.train.evaluation_record import AucIntervals, Diagnosis, Evaluation, Saliency

# Told apart without colour vision (Okabe & Ito), then by the line.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_LINES = ("-", "--", ":")
_SALIENCY = {"cc": "CC", "sim": "SIM", "kld": "KLD", "nss": "NSS", "auc_judd": "AUC-Judd"}


def pages(evaluation: Evaluation, films: EvaluatedFilms) -> dict[str, bytes]:
    """report.md, report.html and the drawings, by file name."""
    title = f"Evaluation of {evaluation.model.name}"
    blocks = _cautions(evaluation)
    blocks.append(_identity(evaluation))
    if evaluation.diagnosis:
        blocks += _diagnosis_blocks(evaluation.diagnosis, films)
    if evaluation.saliency:
        blocks += _saliency_blocks(evaluation.saliency, films)
    if evaluation.left_out:
        blocks += [Heading("Left out"), Bullets(evaluation.left_out)]
    drawings = {b.name: b.data for b in blocks if isinstance(b, Figure)}
    return {
        "report.md": markdown_page(title, blocks).encode(),
        "report.html": html_page(title, blocks).encode(),
        **drawings,
    }


def summary(evaluation: Evaluation) -> list[str]:
    """The evaluation in a few lines."""
    where = evaluation.set
    kind = " (synthetic)" if evaluation.synthetic else ""
    lines = [f"WARNING: {evaluation.leakage}"] if evaluation.leakage else []
    lines.append(
        f"{evaluation.model.name} on {where.split} of {where.name}{kind}: "
        f"{where.films} films, {where.patients} patients"
    )
    diagnosis, saliency = evaluation.diagnosis, evaluation.saliency
    if diagnosis and diagnosis.auc:
        accuracy = f", accuracy {diagnosis.accuracy}" if diagnosis.accuracy else ""
        lines.append(f"macro AUC {diagnosis.auc['macro'].bootstrap}{accuracy}")
        if diagnosis.view_and_age:
            baseline = diagnosis.view_and_age["macro"].bootstrap
            lines.append(f"view and age alone: macro AUC {baseline}")
        if diagnosis.ece:
            lines.append(
                f"ECE {diagnosis.ece.before.value:.3f} before, "
                f"{diagnosis.ece.after.value:.3f} after scaling"
            )
    if saliency:
        prior = saliency.centre_prior.cc
        beside = f"centre prior {prior}" if prior else "no centre prior"
        lines.append(f"CC {_text(saliency.prediction.cc)}, {beside}")
    return lines + [f"left out: {reason}" for reason in evaluation.left_out]


def _cautions(evaluation: Evaluation) -> list[Block]:
    """What must be read before any figure."""
    texts = [evaluation.notice]
    if evaluation.synthetic:
        texts.append("Synthetic: drawings, not films. Says nothing of clinical use.")
    if evaluation.leakage:
        texts.append(f"WARNING: {evaluation.leakage}")
    if evaluation.caution:
        texts.append(evaluation.caution)
    look = evaluation.look
    if look:
        which = f"look number {look.number}" if look.logged else "a look that was not logged"
        texts.append(f"This is {which} at this set's test split ({LOOKS}).")
    return [Paragraph(text) for text in texts]


def _identity(evaluation: Evaluation) -> Table:
    """What was evaluated on what."""
    where, model = evaluation.set, evaluation.model
    return Table(
        ("", ""),
        (
            ("model", f"{model.kind} {model.name}, {model.sha256[:16]}"),
            ("computed by", f"{model.backend}, {model.precision}"),
            ("trained on", model.trained_on),
            ("set", f"{where.origin}, split {where.split} ({where.split_sha256[:12]})"),
            ("films, patients", f"{where.films}, {where.patients}"),
            ("intervals", evaluation.intervals),
        ),
    )


def _diagnosis_blocks(diagnosis: Diagnosis, films: EvaluatedFilms) -> list[Block]:
    known = diagnosis.known
    counts = ", ".join(
        f"{count} {name}" + (f" (of {known[name]} known)" if known else "")
        for name, count in diagnosis.films.items()
    )
    accuracy = f" Accuracy {diagnosis.accuracy}." if diagnosis.accuracy else ""
    blocks: list[Block] = [Heading("Diagnosis"), Paragraph(f"Films: {counts}.{accuracy}")]
    if diagnosis.auc:
        blocks += [_auc_table(diagnosis.auc, diagnosis.view_and_age), _roc(films)]
    if diagnosis.within_view:
        rows = [
            [view, part.films, part.macro.bootstrap]
            + [part.view_and_age.bootstrap if part.view_and_age else _text(None)]
            for view, part in diagnosis.within_view.items()
        ]
        blocks.append(Table(("within view", "films", "macro AUC", "age alone"), rows))
    if diagnosis.operating_points:
        rows = [
            [name, f"{point.threshold:.3f}", _text(point.sensitivity), _text(point.specificity)]
            for name, point in diagnosis.operating_points.items()
        ]
        blocks.append(Table(("operating point", "threshold", "sensitivity", "specificity"), rows))
    biased = "ECE is biased upwards on few films, and its bootstrap more so."
    if ece := diagnosis.ece:
        blocks.append(
            Paragraph(
                f"ECE (15 bins) {ece.before} before and {ece.after} after scaling with temperature "
                f"{diagnosis.temperature:.3f}, which was fitted on validation films. {biased}"
            )
        )
    if by_finding := diagnosis.ece_by_finding:
        temperatures = diagnosis.temperatures or {}
        rows = [
            [name, f"{temperatures.get(name, 1.0):.3f}", str(ece.before), str(ece.after)]
            for name, ece in by_finding.items()
        ]
        header = ("ECE (15 bins)", "temperature", "before scaling", "after")
        fitted = "Temperatures were fitted on validation films."
        blocks += [Table(header, rows), Paragraph(f"{fitted} {biased}")]
    blocks.append(_reliability(films))
    return blocks


def _auc_table(
    aucs: dict[str, AucIntervals], view_and_age: dict[str, AucIntervals] | None
) -> Table:
    columns = ["AUC, one versus rest", "DeLong", "patient bootstrap"]
    rows = [[name, auc.delong, auc.bootstrap] for name, auc in aucs.items()]
    if view_and_age:
        columns.append("view and age alone (bootstrap)")
        rows = [[*row, view_and_age[name].bootstrap] for row, name in zip(rows, aucs, strict=True)]
    return Table(columns, rows)


def _saliency_blocks(saliency: Saliency, films: EvaluatedFilms) -> list[Block]:
    between = saliency.between_readers.cc
    rows = [
        [
            label,
            _text(getattr(saliency.prediction, key)),
            _text(getattr(saliency.centre_prior, key)),
            _text(between) if key == "cc" else "",
        ]
        for key, label in _SALIENCY.items()
    ]
    return [
        Heading("Saliency"),
        Paragraph(
            f"{saliency.films} films with gaze, heatmap preset {saliency.heatmap}, over the film's "
            f"area. Mass that the network put outside the film: {saliency.pad_mass}. Lower "
            "is better for KLD, higher for the others. CC compares only at the same heatmap blur."
        ),
        Table(("mean over films", "prediction", "centre prior", "between two readers"), rows),
        _maps(films),
    ]


def _text(interval: Interval | None) -> str:
    return str(interval) if interval else "not measured"


def _roc(films: EvaluatedFilms) -> Figure:
    p, parts = films.probabilities, list(columns(films.truth))
    plot = new_plot(4.6, 4.2)
    axes = plot.add_subplot(
        xlabel="1 - specificity", ylabel="sensitivity", aspect="equal", title="ROC"
    )
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle=":")
    present = present_classes(films.truth)
    for c in present:
        known, has = parts[c]
        false_positive, true_positive, _ = roc_curve(has, p[known, c])
        line, colour = divmod(c, len(_COLOURS))
        axes.plot(
            false_positive,
            true_positive,
            color=_COLOURS[colour],
            linestyle=_LINES[line % len(_LINES)],
            label=f"{films.classes[c]} ({metrics.auc(p[known, c], has):.3f})",
        )
    axes.legend(loc="lower right", fontsize=8 if len(present) < 6 else 5)
    return drawn("roc.svg", plot, "ROC of each class against the rest, with its AUC.")


def _reliability(films: EvaluatedFilms) -> Figure:
    p, truth = films.probabilities, films.truth
    exclusive = films.served.spec.class_kind == "exclusive"
    known = truth != UNKNOWN
    pairs = metrics.top_label(p, truth) if exclusive else (p[known], truth[known] == HAS)
    confidence, hits, counts = metrics.reliability(*pairs)
    plot = new_plot(4.6, 4.2)
    axes = plot.add_subplot(
        xlabel="probability", ylabel="share", xlim=(0, 1.02), ylim=(0, 1.02), title="Reliability"
    )
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle=":")
    axes.scatter(confidence, hits, s=8 + 200 * counts / counts.sum(), color=_COLOURS[0])
    for x, y, count in zip(confidence, hits, counts, strict=True):
        axes.annotate(str(count), (x, y), (4, -10), textcoords="offset points", fontsize=7)
    return drawn(
        "reliability.svg",
        plot,
        f"{'Accuracy' if exclusive else 'Share that has the finding, all findings together,'} by "
        "probability after temperature scaling; the numbers are films in each bin.",
    )


def _maps(films: EvaluatedFilms) -> Figure:
    """Film, true and predicted map of five films from the lowest to the highest CC."""
    order = sorted(films.saliency, key=lambda index: films.saliency[index]["cc"])
    chosen = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, 5).round().astype(int))]
    plot = new_plot(7, 2.4 * len(chosen))
    axes = plot.subplots(len(chosen), 3, squeeze=False)
    for line, index in zip(axes, chosen, strict=True):
        crop = films.arrays.geometries[index].crop
        film = crop(films.arrays.images[index, 0])
        truth = crop(films.arrays.densities[index, 0])
        predicted = np.exp(crop(films.outputs[LOG_DENSITY][index, 0]))
        line[0].imshow(film, cmap="gray", vmin=0, vmax=1)
        known = films.known_of(films.rows[index])
        has = [name for name, there in known.items() if there]
        line[0].set_title(
            ", ".join(has) or ("no class" if known else "no label"), fontsize=8, wrap=True
        )
        for axis, density, name in ((line[1], truth, "readers"), (line[2], predicted, "predicted")):
            axis.imshow(film, cmap="gray", vmin=0, vmax=1)
            axis.imshow(density, cmap="viridis", alpha=0.6)
            axis.set_title(name, fontsize=8)
        line[2].set_title(f"predicted, CC {films.saliency[index]['cc']:.2f}", fontsize=8)
    for axis in axes.ravel():
        axis.set_axis_off()
    return drawn(
        "maps.png",
        plot,
        "Film, true and predicted map of films from the lowest CC to the highest. "
        "These are films of the set: keep this page where the set may be.",
    )
