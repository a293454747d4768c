"""The pages of a comparison of heatmaps with gaze: what it comes to, figures, what is left out."""

from __future__ import annotations

from cxrgaze.evidence.labelled_set import LOOKS
from cxrgaze.report import Block, Bullets, Heading, Paragraph, Table, Verdict, page_files
from cxrgaze.train.evaluation_tables import text
from cxrgaze.train.evaluation_verdict import Difference, next_step
from cxrgaze.train.saliency_record import METRICS, Beside, SaliencyReport

_PRIOR = "the centre prior"
_WORDS = {
    "good": f"Better than {_PRIOR}",
    "open": f"Not shown to be better than {_PRIOR}",
    "bad": f"Worse than {_PRIOR}",
}


def verdict(report: SaliencyReport) -> Verdict:
    """Whether the maps say more of where readers look than the centre prior: by CC, paired."""
    kind = " (synthetic: drawings)" if report.synthetic else ""
    some = "" if report.films == report.asked else f" of {report.asked}"
    on = f"on {report.films}{some} films of {report.patients} patients{kind}"
    cc, found = report.figures["cc"], _difference(report)
    if found is None:
        return Verdict(
            "Nothing to compare with", f"No centre prior {on}; CC {text(cc.map)}.", "open"
        )
    said = f"CC {found.network} against {found.baseline}, difference {found.added}, {on}."
    return Verdict(_WORDS[found.tone], said, found.tone)


def pages(report: SaliencyReport) -> dict[str, bytes]:
    """saliency.md and saliency.html, by file name."""
    found = _difference(report)
    steps = [step] if found and (step := next_step(found)) else []
    blocks: list[Block] = [verdict(report), Bullets([*_lines(report), *steps])]
    blocks += [Paragraph(words) for words in _cautions(report)]
    blocks += [_identity(report), Heading("Figures"), _figures(report)]
    blocks.append(
        Paragraph("Over the film's area. CC compares only at the same heatmap blur and canvas.")
    )
    if report.left_out:
        blocks += [Heading("Left out"), Bullets(report.left_out)]
    return page_files("saliency", f"Heatmaps in {report.maps} against gaze", blocks)


def summary(report: SaliencyReport) -> list[str]:
    """The comparison in a few lines."""
    found = verdict(report)
    lines = [f"{found.word}: {found.text}", *_lines(report)]
    return [*lines, *(f"left out: {reason}" for reason in report.left_out), report.notice]


def _difference(report: SaliencyReport) -> Difference | None:
    """What the maps add to the centre prior, None without one."""
    cc = report.figures["cc"]
    if not (cc.map and cc.centre_prior and cc.added):
        return None
    return Difference("CC", _PRIOR, cc.map, cc.centre_prior, cc.added, report.patients)


def _lines(report: SaliencyReport) -> list[str]:
    gain, shuffled = report.figures["information_gain"], report.figures["shuffled_auc"]
    lines = [
        f"information gain over the centre prior {text(gain.map)} bits per fixation",
        f"shuffled AUC {text(shuffled.map)} (centre prior {text(shuffled.centre_prior)})",
    ]
    if report.between_readers:
        single = report.single_reader
        lines.append(
            f"CC with one reader's own map {text(single.map)} (centre prior "
            f"{text(single.centre_prior)}); of another reader {report.between_readers}"
        )
    return lines


def _cautions(report: SaliencyReport) -> list[str]:
    """What must be read before any figure."""
    words = [report.notice]
    if report.synthetic:
        words.append("Synthetic: drawings, not films. Says nothing of clinical use.")
    look = report.look
    if look:
        which = f"look number {look.number}" if look.logged else "a look that was not logged"
        words.append(f"This is {which} at this set's test split ({LOOKS}).")
    return words


def _identity(report: SaliencyReport) -> Table:
    made = ", ".join(f"{name} {value}" for name, value in report.environment.items())
    height, width = report.canvas
    return Table(
        ("", ""),
        (
            ("maps", f"{report.maps}, {report.kind}, {report.maps_sha256[:16]}"),
            ("set", f"{report.origin}, split {report.split} ({report.split_sha256[:12]})"),
            ("films, patients", f"{report.films}, {report.patients}"),
            ("gaze", f"heatmap preset {report.heatmap}, canvas {height}x{width}"),
            ("centre prior", report.prior),
            ("intervals", report.intervals),
            ("made", f"{report.created_utc}; {made}"),
        ),
    )


def _figures(report: SaliencyReport) -> Table:
    def row(name: str, of: Beside) -> tuple[str, ...]:
        return name, text(of.map), text(of.centre_prior), text(of.added)

    rows = [row(name, report.figures[key]) for key, name in METRICS.items()]
    rows.append(row("CC with one reader's own map", report.single_reader))
    rows.append(("CC between readers, the ceiling", text(report.between_readers), "", ""))
    return Table(("mean over films", "map", "centre prior", "map minus prior, paired"), rows)
