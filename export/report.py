"""The evidence of a bundle as Markdown, HTML and JSON: parity, rounding, gate, trials, maps."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from cxrgaze.bundle import DataType, Manifest, Trial
from cxrgaze.export.session import host_session
from cxrgaze.files import render_json
from cxrgaze.report import (
    Block,
    Bullets,
    Figure,
    Heading,
    Paragraph,
    Table,
    html_page,
    markdown_page,
)
from cxrgaze.runtime import overlay
from cxrgaze.spec import IMAGE, LOG_DENSITY
from cxrgaze.train.model import Network

FOLDER = "report"
_SIDE = 256
"""Pixels of the longer side of a map in the picture."""


def pages(
    manifest: Manifest, network: Network, graph: bytes, phantoms: NDArray[np.float32]
) -> dict[str, bytes]:
    """Files of the bundle's report, by path.

    Args:
        network, graph: what is drawn side by side, in float32 and as it ships.
        phantoms: canvases `(n, 1, H, W)` to draw, never a patient's.
    """
    figures = [_maps(manifest, network, graph, phantoms)]
    if plot := _search(manifest):
        figures.append(plot)
    title = f"{manifest.name}: parity and gate"
    blocks = _blocks(manifest, figures)
    evidence = manifest.model_dump(
        mode="json", include={"name", "parity", "gate", "audit", "calibration", "trials"}
    )
    return {
        f"{FOLDER}/parity.md": markdown_page(title, blocks).encode(),
        f"{FOLDER}/parity.html": html_page(title, blocks).encode(),
        f"{FOLDER}/parity.json": render_json(evidence),
        **{f"{FOLDER}/{figure.name}": figure.data for figure in figures},
    }


def _blocks(manifest: Manifest, figures: Sequence[Figure]) -> list[Block]:
    maps, *others = figures
    return [
        Paragraph(f"{manifest.notice} {manifest.spec.caution or ''}".rstrip()),
        Paragraph(
            f"Graph: {manifest.precision}, target {manifest.target}, opset {manifest.opset}, IR "
            f"{manifest.ir_version}, {manifest.float32_nodes} nodes kept float32 on purpose. Exact "
            f"rewrites: {', '.join(manifest.rewrites) or 'none'}. Convolution work: "
            f"{_work(manifest.convolution_macs)}."
        ),
        Heading("Parity with the network"),
        *_parity(manifest),
        *_audit(manifest),
        *_calibration(manifest),
        Heading("Gate"),
        *_gate(manifest),
        *_trials(manifest.trials, others),
        Heading("Maps"),
        maps,
    ]


def _parity(manifest: Manifest) -> list[Block]:
    parity = manifest.parity
    return [
        Paragraph(
            f"Films: {parity.domain}. Reference: the network in torch float32. Verdict: "
            f"{parity.verdict}. {parity.witness}"
        ),
        Table(
            ("output", "max", "p99", "limit of max", "smallest cosine"),
            [
                (
                    name,
                    f"{found.max:.3g}",
                    f"{found.p99:.3g}",
                    f"{limit:g}",
                    f"{found.cosine:.7f}",
                )
                for name, found, limit in (
                    ("logits", parity.logits, parity.limits.logits),
                    (
                        "log-density (nats, where density is at least 1 % of its peak)",
                        parity.log_density,
                        parity.limits.log_density,
                    ),
                )
            ],
        ),
        Paragraph(
            f"Agreement CC of the two maps: smallest {parity.agreement_cc_min:.6f} (film "
            f"{parity.worst_film + 1} of {parity.films}), mean {parity.agreement_cc_mean:.6f}. "
            f"Label flips: {parity.label_flips} of {parity.films}. Largest activation in float32: "
            f"{parity.peak_activation:.4g} (float16 ends at 65504)."
        ),
    ]


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
                "every operation's output rounded to float16, computed in float32: logits off by "
                f"{audit.rounding_logits:.3g}, log-density by {audit.rounding_log_density:.3g}",
            ]
        ),
    ]


def _calibration(manifest: Manifest) -> list[Block]:
    if (found := manifest.calibration) is None:
        return []
    method = f"percentile {found.percentile}" if found.method == "percentile" else found.method
    return [
        Heading("Calibration"),
        Paragraph(
            f"{len(found.films)} films of {found.set_name} ({found.domain}), {method}; SHA-256 of "
            f"their list {found.sha256}. {' '.join(found.warnings)}".rstrip()
        ),
    ]


def _gate(manifest: Manifest) -> list[Block]:
    gate = manifest.gate
    blocks: list[Block] = [Paragraph(f"{gate.level} level: {gate.verdict}. {gate.reason}")]
    if (found := gate.comparison) is None:
        return blocks
    synthetic = " Synthetic figures: drawings." if gate.domain == "phantom" else ""
    return [
        *blocks,
        Paragraph(
            f"Films: {gate.set_name}.{synthetic} Agreement CC with fp32: smallest "
            f"{gate.agreement_cc_min:.6f}, mean {gate.agreement_cc_mean:.6f}. Worst film: "
            f"{gate.worst_film_sha256[:12]}."
        ),
        Table(found.header(), found.rows()),
    ]


def _trials(trials: Sequence[Trial], plots: Sequence[Figure]) -> list[Block]:
    if len(trials) < 2:
        return []
    rows = [
        (
            trial.form,
            ", ".join(trial.kept) or "none",
            _work(trial.macs),
            f"{trial.logits_max:.3g}",
            f"{trial.agreement_cc_min:.6f}",
            trial.parity,
            f"{trial.gate}: {trial.gate_reason}",
        )
        for trial in trials
    ]
    header = (
        "form",
        "went back",
        "work",
        "logits off by",
        "smallest agreement CC",
        "parity",
        "gate",
    )
    return [Heading("Forms that were tried"), Table(header, rows), *plots]


def _work(macs: Mapping[DataType, int]) -> str:
    total = sum(macs.values()) or 1
    return ", ".join(f"{100 * part / total:.1f} % {kind}" for kind, part in macs.items())


def _maps(
    manifest: Manifest, network: Network, graph: bytes, phantoms: NDArray[np.float32]
) -> Figure:
    """Film, float32 map and the graph's map side by side, a row a phantom."""
    session = host_session(graph)
    rows = []
    with torch.inference_mode():
        for image in phantoms:
            reference = network(torch.from_numpy(image[None])).log_density[0, 0].numpy()
            (found,) = session.run([LOG_DENSITY], {IMAGE: image[None]})
            peak = float(np.exp(reference).max())
            maps = [
                overlay.coloured(np.clip(np.exp(m) / peak, 0, 1)) for m in (reference, found[0, 0])
            ]
            film = cv2.cvtColor((image[0] * 255).astype(np.uint8), cv2.COLOR_GRAY2BGR)
            rows.append(np.hstack([_enlarged(picture) for picture in (film, *maps)]))
    data = cv2.imencode(".png", np.vstack(rows))[1].tobytes()
    caption = f"Phantom, map in float32, map of the {manifest.precision} graph; one colour scale."
    return Figure("maps.png", data, caption)


def _enlarged(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    scale = _SIDE / max(picture.shape[:2])
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST), dtype=np.uint8)


def _search(manifest: Manifest) -> Figure | None:
    """Smallest agreement CC against the share of work in low precision, where blocks went back."""
    if not any(trial.kept for trial in manifest.trials):
        return None
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(6, 3.5), layout="constrained")
    axes = drawing.add_subplot()
    for trial in manifest.trials:
        share = trial.macs.get(manifest.precision, 0) / (sum(trial.macs.values()) or 1)
        marker = "o" if trial.gate == "pass" else "x"
        axes.plot(100 * share, trial.agreement_cc_min, marker, color="C0")
        axes.annotate(f" {len(trial.kept)}", (100 * share, trial.agreement_cc_min))
    axes.set_xlabel(f"convolution work in {manifest.precision} (%)")
    axes.set_ylabel("smallest agreement CC with fp32")
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=150)
    caption = "Blocks that went back (their number); a circle passed the gate, a cross did not."
    return Figure("fallback.png", buffer.getvalue(), caption)
