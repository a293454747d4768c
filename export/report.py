"""The evidence of a bundle as Markdown, HTML and JSON, with its histograms and maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cxrgaze.bundles.manifest import DataType, FormRecord, Manifest, Precision
from cxrgaze.bundles.verdicts import HEAD_WORDS, REASONS, Histogram, Quantity, losing, shown
from cxrgaze.export.source import Answers
from cxrgaze.files import render_json
from cxrgaze.report import (
    MARKERS,
    TONES,
    Block,
    Bullets,
    Figure,
    Heading,
    Paragraph,
    Table,
    Tone,
    Verdict,
    drawn,
    new_plot,
    page_files,
)
from cxrgaze.runtime.ort import witness
from cxrgaze.spec import LOG_DENSITY, LOGITS, Head

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Plot

FOLDER = "report"


def pages(
    manifest: Manifest,
    reference: Answers,
    graphs: Mapping[Precision, bytes],
) -> dict[str, bytes]:
    """Files of the bundle's report, by path.

    Args:
        reference: what the network says of the phantoms that are drawn, never of a patient's film.
        graphs: what is drawn beside it, the one that ships among them.
    """
    drawings = {
        "maps": _maps(reference, graphs),
        "search": _search(manifest),
        "activations": _activations(manifest),
        "differences": _differences(manifest),
        "gate": _forest(manifest),
    }
    figures = {name: figure for name, figure in drawings.items() if figure}
    title = f"{manifest.name}: parity and gate"
    blocks = _blocks(manifest, figures)
    evidence = manifest.model_dump(
        mode="json", include={"name", "parity", "gate", "audit", "calibration", "forms_tried"}
    )
    return {
        **page_files(f"{FOLDER}/parity", title, blocks),
        f"{FOLDER}/parity.json": render_json(evidence),
        **{f"{FOLDER}/{figure.name}": figure.data for figure in figures.values()},
    }


def _blocks(manifest: Manifest, figures: Mapping[str, Figure]) -> list[Block]:
    def drawing(name: str) -> list[Block]:
        return [figures[name]] if name in figures else []

    return [
        *_verdict(manifest),
        *drawing("gate"),
        Paragraph(f"{manifest.notice} {manifest.spec.caution or ''}".rstrip()),
        Paragraph(
            f"Made {manifest.provenance.created_utc} by cxrgaze "
            f"{manifest.provenance.versions.get('cxrgaze', '')} of "
            f"{manifest.provenance.checkpoint} ({manifest.provenance.checkpoint_sha256[:12]})."
        ),
        Paragraph(
            f"Graph: {manifest.precision}, target {manifest.target}, opset {manifest.opset}, IR "
            f"{manifest.ir_version}, {manifest.float32_nodes} nodes kept float32 on purpose. Exact "
            f"rewrites: {', '.join(manifest.rewrites) or 'none'}. Convolution work: "
            f"{_work(manifest.convolution_macs)}."
        ),
        Heading("Parity with the network"),
        *_parity(manifest),
        *_audit(manifest),
        *drawing("activations"),
        *_calibration(manifest),
        Heading("Gate"),
        *_gate(manifest),
        *drawing("differences"),
        *_trials(manifest.forms_tried),
        *drawing("search"),
        *([Heading("Maps")] if "maps" in figures else []),
        *drawing("maps"),
    ]


_TONES: dict[str, Tone] = {"pass": "good", "fail": "bad"}
_WORDS = {
    "pass": "Passed the gate",
    "fail": "Failed the gate",
    "inconclusive": "Inconclusive",
    "not_gated": "Not gated",
}


def _verdict(manifest: Manifest) -> list[Block]:
    """What the gate came to, on what, what it did not show, and what to do next."""
    gate = manifest.gate
    kind = " (synthetic: drawings)" if gate.domain == "phantom" else ""
    word, tone = _WORDS[gate.verdict], _TONES.get(gate.verdict, "open")
    origin = manifest.decision_from or "those of the network"
    decided = [f"temperature and operating points: {origin}"]
    decided += [manifest.not_compared] if manifest.not_compared else []
    if (comparison := gate.comparison) is None:
        said = f"{gate.reason[:1].upper()}{gate.reason[1:]}."
        return [Verdict(word, said, tone), Bullets(decided)]
    on = f"{comparison.films} films of {comparison.patients} patients{kind}"
    text = f"{manifest.precision} against float32 on {on}, at {gate.level} level: {gate.reason}."
    measured = [q for q in comparison.quantities if q.difference is not None]
    nearest = sorted(measured, key=lambda q: -_share_of_limit(q))[:3]
    lines = []
    for q in nearest:
        within = ""
        if q.low is not None and q.high is not None:
            within = f" [{shown(q.kind, q.low)}, {shown(q.kind, q.high)}]"
        limit = shown(q.kind, losing(q.kind) * q.limit)
        lines.append(f"{q.name}: {shown(q.kind, q.difference or 0)}{within}, limit {limit}")
    missing = [q for q in comparison.quantities if q.verdict == "not_measured"]
    lines += [f"not measured: {q.name}: {q.reason}" for q in missing]
    unsure = [q for q in comparison.quantities if q.verdict == "inconclusive"]
    lines += [f"next, for {q.name}: {q.reason}" for q in unsure]
    looks = len(manifest.forms_tried)
    lines.append(
        f"look {manifest.form_shipped + 1} of {looks} at these films ships; looks go from the most "
        "precise form on and end with the first that does not pass"
    )
    return [Verdict(word, text, tone), Bullets([*lines, *decided])]


def _share_of_limit(quantity: Quantity) -> float:
    bound = quantity.difference if quantity.bound is None else quantity.bound
    return losing(quantity.kind) * (bound or 0.0) / (quantity.limit or 1e-9)


def _forest(manifest: Manifest) -> Figure | None:
    """Every gated quantity with its interval, as a share of its limit."""
    comparison = manifest.gate.comparison
    drawn_ones = [q for q in comparison.quantities if q.low is not None] if comparison else []
    if not drawn_ones:
        return None
    plot = new_plot(7, 0.9 + 0.32 * len(drawn_ones))
    axes = plot.add_subplot(xlabel="loss, in parts of what may be lost (the limit is 1)")
    for row, quantity in enumerate(reversed(drawn_ones)):
        scale = losing(quantity.kind) / (quantity.limit or 1e-9)
        ends = sorted((scale * (quantity.low or 0), scale * (quantity.high or 0)))
        tone = _TONES.get(quantity.verdict, "open")
        axes.plot(ends, [row, row], color=TONES[tone], linewidth=1.5)
        axes.plot([scale * (quantity.difference or 0)], [row], MARKERS[tone], color=TONES[tone])
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.axvline(1, color="#d55e00", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(drawn_ones)), [q.name for q in reversed(drawn_ones)], fontsize=8)
    axes.set_ylim(-0.6, len(drawn_ones) - 0.4)
    caption = (
        "Loss against float32 with its 95 % interval, in parts of its limit; the dashed line is "
        "the limit. Circle: passes; diamond: inconclusive; cross: fails."
    )
    return drawn("gate.svg", plot, caption)


def _parity(manifest: Manifest) -> list[Block]:
    parity = manifest.parity
    rows = [
        (
            _SHOWN[head],
            f"{of.max:.3g}",
            f"{of.p99:.3g}",
            f"{parity.limits[head]:g}",
            f"{of.cosine:.7f}",
        )
        for head, of in parity.outputs.items()
    ]
    said = []
    if parity.agreement_cc_min is not None and parity.worst_film is not None:
        said.append(
            f"Agreement CC of the two maps: smallest {parity.agreement_cc_min:.6f} (film "
            f"{parity.worst_film + 1} of {parity.films}), mean {parity.agreement_cc_mean:.6f}."
        )
    if parity.flips is not None:
        said.append(f"Films with another decision: {parity.flips} of {parity.films}.")
    peak = f"{parity.peak_activation:.4g} (float16 ends at 65504)"
    return [
        Paragraph(
            f"Films: {parity.domain}. Reference: the network in torch float32. Verdict: "
            f"{parity.verdict}. {parity.witness}"
        ),
        Table(("output", "max", "p99", "limit of max", "smallest cosine"), rows),
        Paragraph(" ".join([*said, f"Largest activation in float32: {peak}."])),
    ]


_SHOWN: dict[Head, str] = {
    LOGITS: "logits",
    LOG_DENSITY: "log-density (nats, where density is at least 1 % of its peak)",
}


def _audit(manifest: Manifest) -> list[Block]:
    if (audit := manifest.audit) is None:
        return []
    return [
        Heading("What float16 does to the activations"),
        Bullets(
            [
                f"films: {audit.domain}",
                f"largest activation {audit.largest:.4g}, in {audit.largest_tensor}; tensors that "
                f"overflow: {len(audit.overflowing)}",
                f"values that lose bits for being small: {100 * audit.subnormal_share:.3f} %; "
                f"worst {100 * audit.worst_subnormal_share:.2f} %, in "
                f"{audit.worst_subnormal_tensor}",
                "every operation's output rounded to float16, computed in float32: "
                + ", ".join(
                    f"{HEAD_WORDS[h]} off by {off:.3g}" for h, off in audit.rounding.items()
                ),
            ]
        ),
    ]


def _calibration(manifest: Manifest) -> list[Block]:
    if (calibration := manifest.calibration) is None:
        return []
    method = (
        f"percentile {calibration.percentile}"
        if calibration.method == "percentile"
        else calibration.method
    )
    return [
        Heading("Calibration"),
        Paragraph(
            f"{len(calibration.films)} films of {calibration.set_name} ({calibration.domain}), "
            f"{method}; SHA-256 of their list {calibration.sha256}. "
            f"{' '.join(calibration.warnings)}".rstrip()
        ),
    ]


def _gate(manifest: Manifest) -> list[Block]:
    gate = manifest.gate
    blocks: list[Block] = [Paragraph(f"{gate.level} level: {gate.verdict}. {gate.reason}")]
    if (comparison := gate.comparison) is None:
        return blocks
    synthetic = " Synthetic figures: drawings." if gate.domain == "phantom" else ""
    agreement = ""
    if gate.agreement_cc_min is not None and gate.worst_film_sha256:
        agreement = (
            f" Agreement CC with fp32: smallest {gate.agreement_cc_min:.6f}, mean "
            f"{gate.agreement_cc_mean:.6f}. Worst film: {gate.worst_film_sha256[:12]}."
        )
    prior = ""
    if gate.centre_prior_cc is not None:
        prior = f" CC of the centre prior on these films: {gate.centre_prior_cc:.4f}."
    return [
        *blocks,
        Paragraph(f"Films: {gate.set_name}.{synthetic}{prior}{agreement}"),
        Table(comparison.header(), comparison.rows()),
        Table(
            ("limit", "most that may be lost", "why"),
            [
                (name, f"{getattr(comparison.limits, name):g}", comparison.limits.why(name))
                for name in REASONS
            ],
        ),
        Heading("What this set can show"),
        Bullets(comparison.can_show),
    ]


def _trials(trials: Sequence[FormRecord]) -> list[Block]:
    if len(trials) < 2:
        return []
    rows = [
        (
            trial.form,
            ", ".join(trial.kept) or "none",
            _work(trial.macs),
            ", ".join(f"{HEAD_WORDS[head]} {off:.3g}" for head, off in trial.off.items()),
            "no map" if trial.agreement_cc_min is None else f"{trial.agreement_cc_min:.6f}",
            trial.parity,
            f"{trial.gate}: {trial.gate_reason}",
        )
        for trial in trials
    ]
    header = (
        "form",
        "went back",
        "work",
        "off by",
        "smallest agreement CC",
        "parity",
        "gate",
    )
    return [Heading("Forms that were looked at, in turn"), Table(header, rows)]


def _work(macs: Mapping[DataType, int]) -> str:
    total = sum(macs.values()) or 1
    return ", ".join(f"{100 * part / total:.1f} % {kind}" for kind, part in macs.items())


def _maps(reference: Answers, graphs: Mapping[Precision, bytes]) -> Figure | None:
    """A row a phantom: the film, the network's map, the map of each graph."""
    if LOG_DENSITY not in reference.outputs:
        return None
    phantoms = reference.images
    by_name = {"network, float32": list(reference.outputs[LOG_DENSITY][:, 0])}
    for precision, graph in graphs.items():
        infer = witness(graph)
        maps = [infer(image[None])[LOG_DENSITY][0, 0] for image in phantoms]
        by_name[f"graph, {precision}"] = maps
    plot = new_plot(2.2 * (1 + len(by_name)), 2.3 * len(phantoms))
    axes = plot.subplots(len(phantoms), 1 + len(by_name), squeeze=False)
    for row, image in enumerate(phantoms):
        axes[row, 0].imshow(image[0], cmap="gray", vmin=0, vmax=1)
        peak = float(np.exp(by_name["network, float32"][row]).max())
        for axis, maps in zip(axes[row, 1:], by_name.values(), strict=True):
            axis.imshow(np.exp(maps[row]), cmap="viridis", vmin=0, vmax=peak)
    for axis, name in zip(axes[0], ("phantom", *by_name), strict=True):
        axis.set_title(name, fontsize=8)
    for axis in axes.ravel():
        axis.set_axis_off()
    caption = "Phantoms (synthetic) and their maps; one colour scale a row, that of float32."
    return drawn("maps.png", plot, caption)


def _activations(manifest: Manifest) -> Figure | None:
    """Magnitudes of the activations, with what float16 holds in full between two lines."""
    if manifest.audit is None:
        return None
    half = np.finfo(np.float16)
    plot, axes = _axes("absolute activation", "share of values other than zero (%)")
    _bars(axes, manifest.audit.magnitudes)
    for value, name in ((float(half.tiny), "smallest normal"), (float(half.max), "largest")):
        axes.axvline(value, color="C3", linewidth=1, label=f"float16, {name}: {value:.3g}")
    axes.legend(fontsize=7)
    caption = (
        "Activations of the float32 graph by powers of two: those left of the first line lose bits "
        "in float16, those right of the second overflow."
    )
    return drawn("activations.svg", plot, caption)


def _differences(manifest: Manifest) -> Figure | None:
    """Film by film, how far the graph that ships is from float32, where a gate was run."""
    gate = manifest.gate
    measured = {
        "map: 1 - agreement CC with fp32": gate.agreement_loss,
        "diagnosis: change of a probability": gate.probability_change,
    }
    histograms = {label: found for label, found in measured.items() if found}
    if not histograms:
        return None
    plot, axes = _axes("difference to float32", "films (%)")
    for label, histogram in histograms.items():
        _bars(axes, histogram, label=label, alpha=0.6)
    axes.legend(fontsize=7)
    caption = (
        f"Differences to float32, film by film ({gate.set_name}); what is below the first decade "
        "stands in the first bar."
    )
    return drawn("differences.svg", plot, caption)


def _axes(x: str, y: str) -> tuple[Plot, Axes]:
    plot = new_plot(6, 3.2)
    return plot, plot.add_subplot(xlabel=x, ylabel=y, xscale="log")


def _bars(axes: Axes, histogram: Histogram, **look: Any) -> None:
    """Shares in percent, between the edges; an edge of zero stands a quarter decade further."""
    edges = np.asarray(histogram.edges)
    if edges[0] == 0:
        edges[0] = edges[1] ** 2 / edges[2]
    shares = 100 * np.asarray(histogram.counts) / max(sum(histogram.counts), 1)
    axes.bar(edges[:-1], shares, np.diff(edges), align="edge", **look)


def _search(manifest: Manifest) -> Figure | None:
    """Distance to float32 against the share of work in low precision, where blocks went back."""
    if not any(trial.kept for trial in manifest.forms_tried):
        return None
    has_map = LOG_DENSITY in manifest.spec.heads
    plot = new_plot(6, 3.5)
    axes = plot.add_subplot(
        xlabel=f"convolution work in {manifest.precision} (%)",
        ylabel="smallest agreement CC with fp32" if has_map else "logits off by at most",
    )
    for trial in manifest.forms_tried:
        share = trial.macs.get(manifest.precision, 0) / (sum(trial.macs.values()) or 1)
        marker = "o" if trial.gate == "pass" else "x"
        off = trial.off[LOGITS] if trial.agreement_cc_min is None else trial.agreement_cc_min
        axes.plot(100 * share, off, marker, color="C0")
        axes.annotate(f" {len(trial.kept)}", (100 * share, off))
    caption = "Blocks that went back (their number); a circle passed the gate, a cross did not."
    return drawn("fallback.png", plot, caption)
