"""The pages of an evaluation: tables, ROC, reliability, and a grid of maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Plot
from sklearn.metrics import roc_curve

from cxrgaze.evidence import metrics
from cxrgaze.evidence.intervals import Interval
from cxrgaze.evidence.labelled_set import LOOKS
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
)
from cxrgaze.train.evaluation import Outcome

_COLOURS = ("#0072b2", "#d55e00", "#009e73")  # told apart without colour vision (Okabe & Ito)
_SALIENCY = {"cc": "CC", "sim": "SIM", "kld": "KLD", "nss": "NSS", "auc_judd": "AUC-Judd"}


def pages(outcome: Outcome) -> dict[str, bytes]:
    """report.md, report.html and the figures, by file name."""
    report = outcome.report
    title = f"Evaluation of {report['model']['name']}"
    blocks = _head(report)
    if report["diagnosis"]:
        blocks += _diagnosis(outcome, report["diagnosis"])
    if report["saliency"]:
        blocks += _saliency(outcome, report["saliency"])
    if report["left_out"]:
        blocks += [Heading("Left out"), Bullets(report["left_out"])]
    figures = {b.name: b.data for b in blocks if isinstance(b, Figure)}
    return {
        "report.md": markdown_page(title, blocks).encode(),
        "report.html": html_page(title, blocks).encode(),
        **figures,
    }


def _head(report: Mapping[str, Any]) -> list[Block]:
    where, model = report["set"], report["model"]
    blocks: list[Block] = [Paragraph(report["notice"])]
    if report["synthetic"]:
        blocks.append(Paragraph("Synthetic: drawings, not films. Says nothing of clinical use."))
    if report["leakage"]:
        blocks.append(Paragraph(f"WARNING: {report['leakage']}"))
    if report["caution"]:
        blocks.append(Paragraph(report["caution"]))
    look = report.get("look")
    if look:
        text = f"look number {look['number']}" if look["logged"] else "a look that was not logged"
        blocks.append(Paragraph(f"This is {text} at this set's test split ({LOOKS})."))
    blocks.append(
        Table(
            ("", ""),
            (
                ("model", f"{model['kind']} {model['name']}, {model['sha256'][:16]}"),
                ("computed by", f"{model['backend']}, {model['precision']}"),
                ("trained on", model["trained_on"]),
                (
                    "set",
                    f"{where['origin']}, split {where['split']} ({where['split_sha256'][:12]})",
                ),
                ("films, patients", f"{where['films']}, {where['patients']}"),
                ("intervals", report["intervals"]),
            ),
        )
    )
    return blocks


def _diagnosis(outcome: Outcome, found: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [Heading("Diagnosis")]
    films = ", ".join(f"{count} {name}" for name, count in found["films"].items())
    blocks.append(Paragraph(f"Films: {films}. Accuracy {_text(found['accuracy'])}."))
    if found["auc"]:
        columns = ["AUC, one versus rest", "DeLong", "patient bootstrap"]
        base = found["view_and_age"]
        if base:
            columns.append("view and age alone (bootstrap)")
        rows = [
            [name, _text(row["delong"]), _text(row["bootstrap"])]
            + ([_text(base[name]["bootstrap"])] if base else [])
            for name, row in found["auc"].items()
        ]
        blocks += [Table(columns, rows), _roc(outcome)]
    if found["within_view"]:
        rows = [
            [view, row["films"]]
            + [_text(row.get(key, {}).get("bootstrap")) for key in ("macro", "view_and_age")]
            for view, row in found["within_view"].items()
        ]
        blocks.append(Table(("within view", "films", "macro AUC", "age alone"), rows))
    if found["operating_points"]:
        rows = [
            [name, f"{point['threshold']:.3f}"]
            + [_text(point[key]) for key in ("sensitivity", "specificity")]
            for name, point in found["operating_points"].items()
        ]
        blocks.append(Table(("operating point", "threshold", "sensitivity", "specificity"), rows))
    ece = found["ece"]
    blocks.append(
        Paragraph(
            f"ECE (15 bins) {_text(ece['before'])} before and {_text(ece['after'])} after scaling "
            f"with temperature {found['temperature']:.3f}, which was fitted on validation films. "
            "ECE is biased upwards on few films, and its bootstrap more so."
        )
    )
    blocks.append(_reliability(outcome))
    return blocks


def _saliency(outcome: Outcome, found: Mapping[str, Any]) -> list[Block]:
    prior, between = found["centre_prior"], found["between_readers"]["cc"]
    rows = [
        [
            label,
            _text(found["prediction"][key]),
            _text(prior.get(key)),
            _text(between) if key == "cc" else "",
        ]
        for key, label in _SALIENCY.items()
    ]
    return [
        Heading("Saliency"),
        Paragraph(
            f"{found['films']} films with gaze, heatmap preset {found['heatmap']}, over the film's "
            f"area. Mass that the network put outside the film: {_text(found['pad_mass'])}. Lower "
            "is better for KLD, higher for the others. CC compares only at the same heatmap blur."
        ),
        Table(("mean over films", "prediction", "centre prior", "between two readers"), rows),
        _maps(outcome),
    ]


def _text(interval: Mapping[str, Any] | None) -> str:
    return str(Interval(**interval)) if interval else "not measured"


def _roc(outcome: Outcome) -> Figure:
    labels = outcome.arrays.labels[outcome.labelled]
    p = outcome.probabilities[outcome.labelled]
    plot = Plot(figsize=(4.6, 4.2), layout="constrained")
    axes = plot.add_subplot(
        xlabel="1 - specificity", ylabel="sensitivity", aspect="equal", title="ROC"
    )
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle=":")
    for c in metrics.present_classes(labels, p.shape[1]):
        false_positive, true_positive, _ = roc_curve(labels == c, p[:, c])
        area = metrics.auc(p[:, c], labels == c)
        name = f"{outcome.classes[c]} ({area:.3f})"
        axes.plot(false_positive, true_positive, color=_COLOURS[c % 3], label=name)
    axes.legend(loc="lower right", fontsize=8)
    return drawn("roc.svg", plot, "ROC of each class against the rest, with its AUC.")


def _reliability(outcome: Outcome) -> Figure:
    labels = outcome.arrays.labels[outcome.labelled]
    confidence, hits, counts = metrics.reliability(outcome.probabilities[outcome.labelled], labels)
    plot = Plot(figsize=(4.6, 4.2), layout="constrained")
    axes = plot.add_subplot(
        xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02), title="Reliability"
    )
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8, linestyle=":")
    axes.scatter(confidence, hits, s=8 + 200 * counts / counts.sum(), color=_COLOURS[0])
    for x, y, count in zip(confidence, hits, counts, strict=True):
        axes.annotate(str(count), (x, y), (4, -10), textcoords="offset points", fontsize=7)
    return drawn(
        "reliability.svg",
        plot,
        "Accuracy by confidence after temperature scaling; the numbers are films in each bin.",
    )


def _maps(outcome: Outcome) -> Figure:
    """Film, true and predicted map of five films from the lowest to the highest CC."""
    order = sorted(outcome.films, key=lambda index: outcome.films[index]["cc"])
    chosen = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, 5).round().astype(int))]
    plot = Plot(figsize=(7, 2.4 * len(chosen)), layout="constrained")
    axes = plot.subplots(len(chosen), 3, squeeze=False)
    for line, index in zip(axes, chosen, strict=True):
        crop = outcome.arrays.geometries[index].crop
        film = crop(outcome.arrays.images[index, 0])
        truth = crop(outcome.arrays.densities[index, 0])
        predicted = np.exp(crop(outcome.log_density[index]))
        line[0].imshow(film, cmap="gray", vmin=0, vmax=1)
        line[0].set_title(f"{outcome.rows[index].label or 'no label'}", fontsize=8)
        for axis, density, name in ((line[1], truth, "readers"), (line[2], predicted, "predicted")):
            axis.imshow(film, cmap="gray", vmin=0, vmax=1)
            axis.imshow(density, cmap="viridis", alpha=0.6)
            axis.set_title(name, fontsize=8)
        line[2].set_title(f"predicted, CC {outcome.films[index]['cc']:.2f}", fontsize=8)
    for axis in axes.ravel():
        axis.set_axis_off()
    return drawn(
        "maps.png",
        plot,
        "Film, true and predicted map of films from the lowest CC to the highest. "
        "These are films of the set: keep this page where the set may be.",
    )
