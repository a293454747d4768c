"""A stored report as Markdown, HTML and CSV: the same report, the same bytes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from cxrgaze.benchmarks.energy import Energy
from cxrgaze.benchmarks.paired import Ratio
from cxrgaze.benchmarks.record import STAGES, LoadGen, Overhead, Peer, Report, Sweep
from cxrgaze.benchmarks.report_figures import DRAWS, figures_of
from cxrgaze.benchmarks.timing import NEEDED, Latency
from cxrgaze.evidence.intervals import Interval
from cxrgaze.report import (
    Block,
    Bullets,
    Figure,
    Heading,
    Paragraph,
    Table,
    Tone,
    Verdict,
    page_files,
)

_PERCENTILES = tuple(NEEDED)


def pages(report: Report) -> dict[str, bytes]:
    """Files of the report by name, `report.json` among them."""
    title = f"{report.bundle['name']} on {report.host.machine.cpu}"
    figures = {f.name: f for f in figures_of(report)} if DRAWS else {}
    blocks = _blocks(report, figures)
    return {
        "report.json": report.rendered(),
        **page_files("report", title, blocks),
        "report.csv": _csv(report).encode(),
        **{name: figure.data for name, figure in figures.items()},
    }


def _blocks(report: Report, figures: Mapping[str, Figure]) -> list[Block]:
    bundle, config = report.bundle, report.config
    return [
        *_verdict(report),
        Paragraph(f"{report.notice} {report.caution or ''}".rstrip()),
        Paragraph(
            f"{bundle['variant']} at {bundle['canvas']}, {bundle['gmac']:.3g} GMAC, "
            f"{bundle['precision']} for {bundle['target']}, rewrites "
            f"{', '.join(bundle['rewrites']) or 'none'}; {bundle['backend']} on "
            f"{bundle['device']}, {config.threads} CPU threads; gate {bundle['gate']}. "
            f"{report.films} films."
        ),
        Heading("Latency, one film at a time"),
        *_latency(report),
        *_drawing(figures, "samples.svg"),
        Heading("Cold, first, after idle"),
        *_regimes(report),
        Heading("Films"),
        *_films(report),
        Heading("All films at hand"),
        *_throughput(report),
        Heading("Memory and energy"),
        *_resources(report),
        Heading("What our own runtime adds"),
        *_overhead(report.overhead),
        *_peers(report.peers, figures),
        *_sweeps(report.sweeps, figures),
        Heading("Machine"),
        *_machine(report),
    ]


def _drawing(figures: Mapping[str, Figure], name: str) -> list[Block]:
    if name in figures:
        return [figures[name]]
    return [
        Paragraph(
            "A figure belongs here; matplotlib, which draws it, is not installed. Where it is "
            "(the extra 'bench'), cxrgaze-bench render draws it from report.json."
        )
    ]


def _verdict(report: Report) -> list[Block]:
    """What it comes to: objectives where there were some, and the figures that people ask for."""
    p50 = report.steady["end_to_end"].p50
    host, bundle = report.host.machine, report.bundle
    said = (
        f"A film to its reading in {_ms(p50)} ms (p50, n = {report.steady['end_to_end'].count}) on "
        f"{host.cpu}, {bundle['backend']} on {bundle['device']}."
    )
    words: dict[str, tuple[str, Tone]] = {
        "ok": ("Objective met" if report.objectives else "Measured", "good"),
        "missed": ("Objective missed", "bad"),
        "inconclusive": ("Inconclusive", "open"),
    }
    word, tone = words[report.verdict]
    lines = [
        f"objective {o.percentile} <= {o.limit_ms:g} ms, end to end: {o.verdict}; {o.reason}; "
        f"{100 * o.missed_share:.1f} % of the readings took longer"
        for o in report.objectives
    ]
    lines += [
        f"cold start to first reading {report.cold.process_ms / 1e3:.1f} s; largest resident set "
        f"{_mb(report.memory.host_peak)} MB; whole bundle {_mb(report.memory.bundle)} MB",
        f"{'settled' if report.warm_up.settled else 'never settled'} after "
        f"{report.warm_up.readings} readings of warm-up ({report.warm_up.rule})",
    ]
    missing = [stage for stage in report.boundaries if stage not in report.steady]
    missing += ["energy"] if not isinstance(report.energy, Energy) else []
    missing += ["LoadGen"] if not isinstance(report.loadgen, LoadGen) else []
    lines += [f"not measured: {', '.join(missing)}"] if missing else []
    if not report.warm_up.settled:
        lines.append("next: an idle machine, or more readings of warm-up")
    elif report.verdict == "inconclusive":
        lines.append("next: more readings, so that the interval of the objective narrows")
    return [Verdict(word, said, tone), Bullets(lines)]


def _latency(report: Report) -> list[Block]:
    rows = []
    for stage in report.boundaries:
        latency = report.steady.get(stage)
        cells = _cells(latency) if latency else ["not measured", *[""] * (len(_PERCENTILES) + 1)]
        rows.append((stage, *cells))
    return [
        Table(("stage, ms", "n", *(_name(p) for p in _PERCENTILES), "max"), rows),
        Bullets([f"{stage}: {boundary}" for stage, boundary in report.boundaries.items()]),
        Paragraph(
            "Milliseconds with 95 % intervals (block bootstrap); a dash where there are too few "
            "samples to have the percentile. Nothing is clipped. Stages are measured by clocks "
            "inside the reader, end to end by one clock around it: percentiles of stages do not "
            "add up to the percentile of the whole. h2d, compute and d2h are the device's own "
            "events and exist on a GPU alone."
        ),
    ]


def _cells(found: Latency) -> list[str]:
    return [
        str(found.count),
        *(_ms(getattr(found, p)) for p in _PERCENTILES),
        f"{found.max:.3f}",
    ]


def _name(percentile: str) -> str:
    return percentile.replace("_", ".")


def _ms(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.3f}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _regimes(report: Report) -> list[Block]:
    cold, idle = report.cold, report.after_idle
    return [
        Table(
            ("regime", "ms"),
            [
                (f"cold: whole process (median of {cold.count})", f"{cold.process_ms:.0f}"),
                ("of it: imports", f"{cold.import_ms:.0f}"),
                ("of it: load, verify, self-test", f"{cold.load_ms:.0f}"),
                ("of it: first reading", f"{cold.first_reading_ms:.1f}"),
                (
                    f"end to end after {report.idle_seconds:g} s idle, p50 of {idle.count}",
                    _ms(idle.p50),
                ),
                ("the same, max", f"{idle.max:.3f}"),
                ("end to end, steady, p50", _ms(report.steady["end_to_end"].p50)),
            ],
        )
    ]  # fmt: skip


def _films(report: Report) -> list[Block]:
    rows = [
        (
            f.film,
            f.container,
            f"{f.width} x {f.height}",
            _ms(f.decode.p50),
            f"{f.decode.max:.1f}",
            _ms(f.preprocess.p50),
        )
        for f in report.per_film
    ]
    header = ("film", "container, pixel source", "size", "decode p50 ms", "max", "preprocess p50")
    return [Table(header, rows), Paragraph(f"n = {report.per_film[0].decode.count} each.")]


def _throughput(report: Report) -> list[Block]:
    offline, loadgen = report.offline, report.loadgen
    rows = [
        ("file to reading, one after another", f"{offline.plain_films_per_s:.1f}"),
        ("file to reading, decoded ahead", f"{offline.ahead_films_per_s:.1f}"),
        (
            f"decoded films to readings, in batches of {offline.batch}",
            f"{offline.batched_films_per_s:.1f}",
        ),
    ]
    if isinstance(loadgen, LoadGen):
        rows.append(("canvas to heads, LoadGen offline", f"{loadgen.offline_films_per_s:.1f}"))
        said = (
            f"LoadGen {loadgen.version}: single stream p90 {loadgen.single_stream_p90_ms:.3f} ms, "
            f"{loadgen.queries} queries in both scenarios, "
            f"{'valid' if loadgen.valid else 'invalid'} by its rules for some seconds; a "
            "submission takes ten minutes and an accuracy run."
        )
    else:
        said = f"LoadGen: {loadgen}."
    return [
        Table(("offline", "films/s"), rows),
        Paragraph(
            f"{offline.films} films a turn, medians of {offline.turns} turns; ahead over one after "
            f"another {offline.ahead_ratio:.2f}. {said}"
        ),
    ]


def _resources(report: Report) -> list[Block]:
    memory = report.memory
    rows = [
        ("graph", _mb(memory.graph)),
        ("whole bundle", _mb(memory.bundle)),
        ("plan", _mb(memory.plan)),
        ("largest resident set of a cold process that reads one film", _mb(memory.host_peak)),
        ("device memory that the backend took", _mb(memory.device_used)),
    ]
    if isinstance(report.energy, Energy):
        e = report.energy
        said = (
            f"Energy by {e.sensor}: {e.stated} (film in memory to reading); {e.busy_watts:.1f} W "
            f"against {e.idle_watts:.1f} W idle; {e.films} films in {e.seconds:.1f} s, samples "
            f"cover {100 * e.coverage:.0f} %."
        )
    else:
        said = f"Energy: {report.energy}."
    return [Table(("memory", "MB"), rows), Paragraph(said)]


def _mb(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 1e6:.2f}"


def _overhead(overhead: Overhead | str) -> list[Block]:
    if isinstance(overhead, str):
        return [Paragraph(f"{overhead}.")]
    rows = [
        (stage, f"{ours:.0f}", f"{overhead.plain_us[stage]:.0f}")
        for stage, ours in overhead.ours_us.items()
    ]
    return [
        Table(("stage, median, microseconds", "cxrgaze", "script by hand"), rows),
        Paragraph(
            f"Film in memory to reading, the same graph and threads, in turns: ours over a script "
            f"of numpy, OpenCV and onnxruntime {_ratio(overhead.ratio)} "
            f"({overhead.ratio.rounds} rounds)."
        ),
    ]


def _ratio(found: Ratio) -> str:
    ratio = found.ratio
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}, {found.reason}"
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}], {found.verdict}"


def _peers(peers: Sequence[Peer], figures: Mapping[str, Figure]) -> list[Block]:
    if not peers:
        return []
    speed, accuracy = [], []
    for peer in peers:
        if peer.latency is None or peer.open_ms is None or peer.first_ms is None:
            speed.append((peer.name, f"not measured: {peer.not_measured}", "", "", "", ""))
            continue
        speed.append(
            (
                peer.name,
                _ms(peer.latency.p50),
                f"{peer.latency.max:.1f}",
                f"{peer.latency.count}",
                _ratio(peer.ratio) if peer.ratio else "1, the base",
                f"{peer.open_ms / 1e3:.1f} + {peer.first_ms / 1e3:.2f}",
            )
        )
        if (a := peer.accuracy) is not None:
            accuracy.append(
                (
                    peer.name,
                    "no diagnosis" if a.logits_max is None else f"{a.logits_max:.2g}",
                    "no map" if a.agreement_cc_min is None else f"{a.agreement_cc_min:.6f}",
                    "no map" if a.agreement_cc_mean is None else f"{a.agreement_cc_mean:.6f}",
                    "no diagnosis" if a.flips is None else f"{a.flips} of {a.films}",
                    _signed(a.macro_auc_loss),
                    _signed(a.cc_loss),
                    a.verdict,
                )
            )
    first = next(p.accuracy for p in peers if p.accuracy)
    return [
        Heading("Other ways to run the same weights"),
        Table(
            ("way", "p50 ms", "max", "n", "time over the first row's", "open + first call, s"),
            speed,
        ),
        *_drawing(figures, "peers.svg"),
        Paragraph(
            "Canvas in host memory to both heads in host memory, batch 1, the same films and "
            "threads, one process, turns in an order drawn anew each round; ratios are medians "
            "over rounds with 95 % intervals (bootstrap over rounds)."
        ),
        Table(
            (
                "way",
                "logits off by",
                "smallest agreement CC",
                "mean",
                "other label",
                "macro AUC lost",
                "CC lost",
                "gate",
            ),
            accuracy,
        ),
        Paragraph(
            f"Against the network in torch float32, on {first.set_name}. Figures of drawings are "
            "synthetic: they compare ways, and say nothing of films."
        ),
    ]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 4) + 0.0:+.4f}"


def _sweeps(sweeps: Sequence[Sweep], figures: Mapping[str, Figure]) -> list[Block]:
    blocks: list[Block] = []
    for sweep in sweeps:
        rows = [
            (
                point.at,
                "" if point.cost is None else f"{point.cost:.3g}",
                _ms(point.latency.p50),
                str(point.latency.count),
                f"{point.films_per_s:.2f}",
                "" if point.floor_ms is None else f"{point.floor_ms:.3f}",
            )
            for point in sweep.points
        ]
        header = (sweep.name, "GMAC a call", "p50 ms a call", "n", "films/s", "float32 floor ms")
        blocks += [Heading(f"Sweep: {sweep.name}"), Table(header, rows)]
        blocks += _drawing(figures, f"sweep-{sweep.name}.svg")
    if blocks:
        blocks.append(
            Paragraph(
                "float32 graphs with the CPU's rewrites, in ONNX Runtime, unless the sweep says "
                "otherwise; noise as image. The floor is the time of the convolutions' "
                "multiply-accumulates at the rate of a large float32 matrix product on these "
                "threads; int8 can be below it."
            )
        )
    return blocks


def _machine(report: Report) -> list[Block]:
    facts = report.host.machine.model_dump()
    conditions = report.host.conditions.model_dump()
    lines = [f"measured: {report.host.created_utc}"]
    for name, value in (*facts.items(), *conditions.items()):
        lines.append(f"{name.replace('_', ' ')}: {_fact(value)}")
    return [Bullets(lines)]


def _fact(value: object) -> str:
    if value is None or value == ():
        return "not measured"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, tuple):
        return "; ".join(_fact(v) for v in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _csv(report: Report) -> str:
    """A row a figure: part, name, quantity, value, low, high, n."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("part", "name", "quantity", "value", "low", "high", "n"))

    def put(part: str, name: str, found: Latency) -> None:
        for percentile in _PERCENTILES:
            interval = getattr(found, percentile)
            if interval is not None:
                ends = (interval.low, interval.high)
                row = (interval.value, *ends, found.count)
                writer.writerow((part, name, f"{_name(percentile)} ms", *row))
        writer.writerow((part, name, "max ms", found.max, "", "", found.count))

    for stage in STAGES:
        if stage in report.steady:
            put("steady", stage, report.steady[stage])
    put("after idle", "end_to_end", report.after_idle)
    for name, value in report.cold.model_dump().items():
        if name != "count":
            writer.writerow(
                ("cold", name, name.rpartition("_")[2], value, "", "", report.cold.count)
            )
    for peer in report.peers:
        if peer.latency:
            put("peers", peer.name, peer.latency)
        if peer.ratio:
            r = peer.ratio
            ends = (r.ratio.low, r.ratio.high)
            writer.writerow(("peers", peer.name, "ratio", r.ratio.value, *ends, r.rounds))
        if peer.accuracy:
            a = peer.accuracy
            for quantity in ("logits_max", "agreement_cc_min", "flips"):
                if (value := getattr(a, quantity)) is not None:
                    writer.writerow(("peers", peer.name, quantity, value, "", "", a.films))
    for sweep in report.sweeps:
        for point in sweep.points:
            put(f"sweep {sweep.name}", point.at, point.latency)
    return buffer.getvalue()
