"""The pages of an evaluation: what it comes to, tables, ROC, reliability, and a grid of maps."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_curve

from cxrgaze.evidence import metrics
from cxrgaze.evidence.labelled_set import LOOKS
from cxrgaze.evidence.truth import columns, present_classes
from cxrgaze.report import (
    MARKERS,
    TONES,
    Block,
    Bullets,
    Figure,
    Heading,
    Paragraph,
    drawn,
    new_plot,
    page_files,
)
from cxrgaze.spec import LOG_DENSITY
from cxrgaze.train.baseline import SHOWN
from cxrgaze.train.evaluated_films import EvaluatedFilms
from cxrgaze.train.evaluation_record import Diagnosis, Evaluation
from cxrgaze.train.evaluation_tables import (
    auc_table,
    calibration_tables,
    identity,
    operating_table,
    saliency_table,
    subgroup_table,
    text,
)
from cxrgaze.train.evaluation_verdict import differences, first_screen, verdict

# Told apart without colour vision (Okabe & Ito), then by the line.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_LINES = ("-", "--", ":")


def pages(evaluation: Evaluation, films: EvaluatedFilms) -> dict[str, bytes]:
    """report.md, report.html and the drawings, by file name."""
    title = f"Evaluation of {evaluation.model.name}"
    blocks = [*first_screen(evaluation), *_differences(evaluation), *_cautions(evaluation)]
    blocks.append(identity(evaluation))
    if evaluation.diagnosis:
        blocks += _diagnosis_blocks(evaluation.diagnosis, films)
    if evaluation.saliency:
        blocks += [Heading("Saliency"), *saliency_table(evaluation.saliency), _maps(films)]
    if evaluation.left_out:
        blocks += [Heading("Left out"), Bullets(evaluation.left_out)]
    drawings = {b.name: b.data for b in blocks if isinstance(b, Figure)}
    return {**page_files("report", title, blocks), **drawings}


def summary(evaluation: Evaluation) -> list[str]:
    """The evaluation in a few lines."""
    where = evaluation.set
    kind = " (synthetic)" if evaluation.synthetic else ""
    found = verdict(evaluation)
    lines = [f"{found.word}: {found.text}"]
    lines.append(
        f"{evaluation.model.name} on {where.split} of {where.name}{kind}: "
        f"{where.films} films, {where.patients} patients"
    )
    diagnosis, saliency = evaluation.diagnosis, evaluation.saliency
    if diagnosis and diagnosis.auc:
        accuracy = f", accuracy {diagnosis.accuracy}" if diagnosis.accuracy else ""
        lines.append(f"macro AUC {diagnosis.auc['macro'].bootstrap}{accuracy}")
        for name, baseline in diagnosis.baselines.items():
            alone = baseline.auc["macro"].bootstrap
            lines.append(f"{SHOWN[name]} alone: macro AUC {alone}; it adds {baseline.added}")
        calibration = diagnosis.calibration
        lines.append(
            f"Brier {calibration.brier}, ECE {calibration.ece:.3f} (right probabilities would show "
            f"{calibration.ece_null:.3f})"
        )
    if saliency:
        prior = saliency.centre_prior.cc
        beside = f"centre prior {prior}" if prior else "no centre prior"
        lines.append(f"CC {text(saliency.prediction.cc)}, {beside}")
    return lines + [f"left out: {reason}" for reason in evaluation.left_out]


def _differences(evaluation: Evaluation) -> list[Block]:
    """What the network adds to each baseline, as a drawing."""
    found = differences(evaluation)[::-1]
    if not found:
        return []
    plot = new_plot(7, 0.9 + 0.35 * len(found))
    axes = plot.add_subplot(xlabel="network minus baseline (better is to the right)")
    for row, one in enumerate(found):
        value, colour = one.added.value, TONES[one.tone]
        if one.added.low is not None and one.added.high is not None:
            axes.plot([one.added.low, one.added.high], [row, row], color=colour, linewidth=1.5)
        axes.plot([value], [row], MARKERS[one.tone], color=colour)
    axes.axvline(0, color="#888888", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(found)), [one.name for one in found], fontsize=8)
    axes.set_ylim(-0.6, len(found) - 0.4)
    caption = (
        "What the network adds to each baseline, with 95 % intervals. Circle: better; diamond: not "
        "shown; cross: worse."
    )
    return [drawn("differences.svg", plot, caption)]


def _cautions(evaluation: Evaluation) -> list[Block]:
    """What must be read before any figure."""
    texts = [evaluation.notice]
    if evaluation.synthetic:
        texts.append("Synthetic: drawings, not films. Says nothing of clinical use.")
    if evaluation.caution:
        texts.append(evaluation.caution)
    look = evaluation.look
    if look:
        which = f"look number {look.number}" if look.logged else "a look that was not logged"
        texts.append(f"This is {which} at this set's test split ({LOOKS}).")
    return [Paragraph(text) for text in texts]


def _diagnosis_blocks(diagnosis: Diagnosis, films: EvaluatedFilms) -> list[Block]:
    known = diagnosis.known
    counts = ", ".join(
        f"{count} {name}" + (f" (of {known[name]} known)" if known else "")
        for name, count in diagnosis.films.items()
    )
    accuracy = f" Accuracy {diagnosis.accuracy}." if diagnosis.accuracy else ""
    return [
        Heading("Diagnosis"),
        Paragraph(f"Films: {counts}.{accuracy}"),
        *auc_table(diagnosis),
        *([_roc(films)] if diagnosis.auc else []),
        *subgroup_table(diagnosis),
        *operating_table(diagnosis),
        *calibration_tables(diagnosis),
        _reliability(films),
    ]


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
    exclusive = films.served.spec.exclusive
    pairs = metrics.stated(films.probabilities, films.truth, exclusive=exclusive)
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
