"""The parity evidence of a bundle as Markdown."""

from __future__ import annotations

from cxrgaze.bundle import Manifest


def parity_report(manifest: Manifest) -> str:
    """Markdown of the manifest's parity and gate records; the same manifest, the same text."""
    parity, gate = manifest.parity, manifest.gate
    lines = [
        f"# {manifest.name}: parity",
        "",
        f"{manifest.notice} {manifest.spec.caution or ''}".rstrip(),
        "",
        f"Graph: {manifest.precision}, target {manifest.target}, opset {manifest.opset}, IR "
        f"{manifest.ir_version}, {manifest.float32_nodes} nodes kept float32 on purpose.",
        f"Films: {parity.domain}. Reference: the network in torch float32.",
        f"Verdict: **{parity.verdict}**. {parity.witness}",
        "",
        "| output | max | p99 | limit of max | smallest cosine |",
        "|---|---|---|---|---|",
        f"| logits | {parity.logits.max:.3g} | {parity.logits.p99:.3g} | "
        f"{parity.limits.logits:g} | {parity.logits.cosine:.7f} |",
        f"| log-density (nats, where density is at least 1 % of its peak) | "
        f"{parity.log_density.max:.3g} | {parity.log_density.p99:.3g} | "
        f"{parity.limits.log_density:g} | {parity.log_density.cosine:.7f} |",
        "",
        f"Agreement CC of the two maps: smallest {parity.agreement_cc_min:.6f}, mean "
        f"{parity.agreement_cc_mean:.6f}. Label flips: {parity.label_flips} of {parity.films}. "
        f"Largest activation in float32: {parity.peak_activation:.4g} (float16 ends at 65504).",
        "",
        f"Gate ({gate.level} level): **{gate.verdict}**: {gate.reason}.",
        "",
    ]
    return "\n".join(lines)
