"""The tables of an evaluation, for its own page and for the network's card."""

from __future__ import annotations

from cxrgaze.evidence.intervals import Interval
from cxrgaze.report import Block, Bullets, Paragraph, Table
from cxrgaze.train.baseline import SHOWN
from cxrgaze.train.evaluation_record import Diagnosis, Evaluation, Saliency

_SALIENCY = {"cc": "CC", "sim": "SIM", "kld": "KLD", "nss": "NSS", "auc_judd": "AUC-Judd"}


def identity(evaluation: Evaluation) -> Table:
    """What was evaluated on what."""
    where, model = evaluation.set, evaluation.model
    made = ", ".join(f"{name} {value}" for name, value in evaluation.environment.items())
    return Table(
        ("", ""),
        (
            ("model", f"{model.kind} {model.name}, {model.sha256[:16]}"),
            ("computed by", f"{model.backend}, {model.precision}"),
            ("trained on", model.trained_on),
            ("set", f"{where.origin}, split {where.split} ({where.split_sha256[:12]})"),
            ("films, patients", f"{where.films}, {where.patients}"),
            ("intervals", evaluation.intervals),
            ("made", f"{evaluation.created_utc}; {made}"),
        ),
    )


def auc_table(diagnosis: Diagnosis) -> list[Block]:
    """AUC of each class beside what the baselines reach, and what the network adds to them."""
    if not diagnosis.auc:
        return []
    columns = ["AUC, one versus rest", "DeLong", "patient bootstrap"]
    columns += [f"{SHOWN[name]} alone (bootstrap)" for name in diagnosis.baselines]
    rows = []
    for name, auc in diagnosis.auc.items():
        beside = [b.auc.get(name) for b in diagnosis.baselines.values()]
        cells = [text(one.bootstrap if one else None) for one in beside]
        rows.append([name, auc.delong, auc.bootstrap, *cells])
    blocks: list[Block] = [Table(columns, rows)]
    if diagnosis.baselines:
        blocks.append(
            Table(
                ("macro AUC, network minus baseline, paired", "difference", "fitted on"),
                [(SHOWN[n], b.added, b.fitted_on) for n, b in diagnosis.baselines.items()],
            )
        )
    return blocks


def operating_table(diagnosis: Diagnosis) -> list[Block]:
    """What the flags find at their operating points."""
    rows = [
        [
            name,
            f"{point.threshold:.3f}",
            "not known" if point.prevalence is None else f"{point.prevalence:.3f}",
            text(point.sensitivity),
            text(point.specificity),
        ]
        for name, point in diagnosis.operating_points.items()
    ]
    header = ("operating point", "threshold", "prevalence here", "sensitivity", "specificity")
    return [Table(header, rows)] if rows else []


def calibration_tables(diagnosis: Diagnosis) -> list[Block]:
    """Whether probabilities are what they say."""
    c = diagnosis.calibration
    rows = [
        ("Brier score", c.brier, f"{c.brier_before:.3f}"),
        ("log-loss, nats", text(c.log_loss), number(c.log_loss_before)),
        ("ECE (15 bins)", f"{c.ece:.3f}", f"{c.ece_before:.3f}"),
    ]
    if diagnosis.temperatures is None:
        fitted = f"temperature {diagnosis.temperature:.3f}"
    else:
        each = ", ".join(f"{n} {t:.3f}" for n, t in diagnosis.temperatures.items())
        fitted = f"temperatures {each or '1'}"
    blocks: list[Block] = [
        Table(("calibration", f"at {fitted}", "before scaling"), rows),
        Paragraph(
            "Lower is better. Temperatures were fitted on validation films. ECE is biased upwards "
            "and has no interval: probabilities that are exactly right would show "
            f"{c.ece_null:.3f} on average on as many films, and below {c.ece_null_high:.3f} in 95 "
            "of 100 cases (films taken as independent)."
        ),
    ]
    if diagnosis.calibration_by_class:
        by_class = [
            (name, text(of.slope), text(of.intercept), of.brier)
            for name, of in diagnosis.calibration_by_class.items()
        ]
        header = ("class", "slope (1 is right)", "intercept (0 is right)", "Brier score")
        blocks.append(Table(header, by_class))
    return blocks


def subgroup_table(diagnosis: Diagnosis) -> list[Block]:
    """Macro AUC among some of the films."""
    rows = [
        [
            name,
            of.films,
            of.macro.bootstrap,
            text(of.view_and_age.bootstrap if of.view_and_age else None),
            ", ".join(of.classes),
        ]
        for name, of in diagnosis.subgroups.items()
    ]
    header = ("films of", "n", "macro AUC", "view and age alone", "mean over")
    return [Table(header, rows)] if rows else []


def saliency_table(saliency: Saliency) -> list[Block]:
    """The map beside the centre prior and a second reader."""
    rows = [
        [label, text(getattr(saliency.prediction, key)), text(getattr(saliency.centre_prior, key))]
        for key, label in _SALIENCY.items()
    ]
    readers = saliency.between_readers
    lines = [f"CC of the network minus the centre prior's, paired: {text(saliency.added_cc)}."]
    if readers.cc:
        lines.append(
            "Against the map of one reader alone, which is noisier than that of all, on films that "
            f"have several: CC of the network {text(readers.network_cc)}, of another reader "
            f"{readers.cc}."
        )
    return [
        Paragraph(
            f"{saliency.films} films with gaze, heatmap preset {saliency.heatmap}, over the film's "
            f"area. Mass that the network put outside the film: {saliency.pad_mass}. Lower "
            "is better for KLD, higher for the others. CC compares only at the same heatmap blur."
        ),
        Table(("mean over films, against all readers", "prediction", "centre prior"), rows),
        Bullets(lines),
    ]


def number(value: float | None) -> str:
    """A number in a cell."""
    return "not measured" if value is None else f"{value:.3f}"


def text(interval: Interval | None) -> str:
    """An interval in a cell."""
    return str(interval) if interval else "not measured"
