"""A benchmark report as Markdown; the same report, the same text."""

from __future__ import annotations

from cxrgaze.benchmarks.measure import Report


def to_markdown(report: Report) -> str:
    """Markdown of a report: what was measured, where each figure begins and ends, on what."""
    bundle, cold, config = report.bundle, report.cold, report.config
    lines = [
        f"# {bundle['name']} on {report.host['cpu']}",
        "",
        f"{report.notice} {report.caution or ''}".rstrip(),
        "",
        f"{bundle['variant']} at {bundle['canvas']}, {bundle['precision']}, target "
        f"{bundle['target']}, backend {bundle['backend']} on {bundle['device']}, "
        f"{config.threads or report.host['cpu_count']} threads, graph "
        f"{bundle['graph_bytes'] / 1e6:.2f} MB, gate {bundle['gate']}.",
        "",
        f"## Steady state, one film at a time ({report.films} films in turn, "
        f"{config.warmup} readings of warm-up)",
        "",
        "| stage | from, to | n | p50 ms | p90 | p95 | p99 | max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage, found in report.steady.items():
        figures = (found.p50, found.p90, found.p95, found.p99, found.max)
        cells = " | ".join("too few" if f is None else f"{f:.3f}" for f in figures)
        lines.append(f"| {stage} | {report.boundaries[stage]} | {found.count} | {cells} |")
    lines += [
        "",
        "Stages are measured by clocks inside the reader, end to end by one clock around it; "
        "percentiles of stages do not add up to the percentile of the whole.",
        "",
        f"## Per film (n = {report.per_film[0].decode.count} each)",
        "",
        "| film | container, pixel source | size | decode p50 ms | max | preprocess p50 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {f.film} | {f.container} | {f.width} x {f.height} | {f.decode.p50:.1f} | "
            f"{f.decode.max:.1f} | {f.preprocess.p50:.2f} |"
            for f in report.per_film
        ),
        "",
        f"Folder throughput over {report.throughput.films} films, median of "
        f"{report.throughput.turns} turns: {report.throughput.plain_films_per_s:.1f} films/s one "
        f"after another, {report.throughput.ahead_films_per_s:.1f} decoded ahead; ratio "
        f"{report.throughput.ratio:.2f}.",
        "",
        f"## Cold start (median of {cold.count} processes)",
        "",
        "| part | ms |",
        "|---|---|",
        f"| whole process, start to exit | {cold.process_ms:.0f} |",
        f"| of it: imports | {cold.import_ms:.0f} |",
        f"| of it: load, verify, self-test | {cold.load_ms:.0f} |",
        f"| of it: first reading | {cold.first_reading_ms:.0f} |",
        "",
        f"Peak memory of such a process: {cold.peak_memory_bytes / 2**20:.0f} MiB resident.",
        "",
        f"Not measured: {', '.join(report.not_measured)}.",
        "",
        "## Machine",
        "",
        *(f"- {key}: {value}" for key, value in report.host.items()),
        "",
    ]
    return "\n".join(lines)
