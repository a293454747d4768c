"""cxrgaze-bench: what a bundle costs on this machine, and what else could run it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxrgaze import command

if TYPE_CHECKING:
    from cxrgaze.benchmarks.record import Config, Peer, Sweep
    from cxrgaze.bundles.bundle import Bundle
    from cxrgaze.films.film import Film


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `cxrgaze-bench`."""
    parser = command.parser(
        "cxrgaze-bench", "Measure what a bundle costs on this machine, as it ships."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands)
    _add_compare(commands)
    _add_folder(commands)
    render = commands.add_parser(
        "render",
        help="make the pages of a stored report again",
        description="Markdown, HTML, CSV and figures of a stored report.json, the same bytes each "
        "time. A truncated or edited report is refused (exit code 7).",
    )
    render.add_argument("report", type=Path, metavar="REPORT.json")
    render.add_argument("--output", type=Path, metavar="DIR", help="(default: beside the report)")
    run = {"run": _run, "compare": _compare, "folder": _folder, "render": _render}
    return command.execute(parser, lambda args: run[args.command](args), argv)


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="measure a bundle: report.json, report.md, report.html, report.csv",
        description="Cold starts in processes of their own, warm-up until it has settled, then "
        "percentiles with intervals per stage and end to end, after idle, throughput, memory, "
        "energy where there is a sensor, and what our runtime adds to a script by hand. With "
        "--peers, other ways to run the same weights, in turns. Without --films, phantoms.",
    )
    run.add_argument("bundle", type=Path, metavar="BUNDLE")
    _add_common(run)
    run.add_argument("--output", type=Path, default=Path("bench"), metavar="DIR")
    run.add_argument(
        "--samples",
        type=command.bounded(1, 10_000_000),
        default=200,
        metavar="N",
        help="(default 200; p99 needs 100, p99.9 needs 10000)",
    )
    run.add_argument(
        "--warmup",
        type=command.bounded(0, 3600),
        default=30,
        metavar="S",
        help="wait at most so many seconds for it to settle (default 30)",
    )
    run.add_argument("--cold-starts", type=command.bounded(1, 100), default=3, metavar="N")
    run.add_argument(
        "--after-idle",
        type=command.bounded(1, 1000),
        default=10,
        metavar="N",
        help="readings after a second of idleness (default 10)",
    )
    run.add_argument(
        "--slo",
        action="append",
        default=[],
        metavar="P=MS",
        help="objective for the end-to-end latency, such as p99=50ms: exit code 8 where it is "
        "missed, 9 where the samples cannot tell; may be repeated",
    )
    run.add_argument(
        "--peers",
        nargs="*",
        metavar="NAME",
        help="also torch, plain ONNX Runtime and OpenVINO (the extra 'peers'), with "
        "what each changes in accuracy; with names, only those that contain one of them",
    )
    run.add_argument(
        "--beside",
        type=Path,
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="with --peers, more bundles of the same checkpoint",
    )
    run.add_argument(
        "--checkpoint",
        type=Path,
        help="what the bundle was made of, for --peers and --sweep (default: where it ships with "
        "cxrgaze or is random, found or made again)",
    )
    run.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME[=V,V]",
        help="batch, threads, canvas or precision, such as batch=1,4,16; may be repeated",
    )


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="is NEW faster than BASE? both measured now, in turns",
        description="Film in memory to reading, with both bundles in one process, in turns. Exit "
        "code 0: faster or no difference, 8: slower, 9: inconclusive. Reports of two runs are not "
        "compared: what changed between the runs would be taken for a change of the bundle.",
    )
    compare.add_argument("base", type=Path, metavar="BASE")
    compare.add_argument("new", type=Path, metavar="NEW")
    _add_common(compare)
    compare.add_argument(
        "--rounds", type=command.bounded(1, 100_000), metavar="N", help="(default 60)"
    )
    compare.add_argument(
        "--margin",
        type=float,
        metavar="SHARE",
        help="a smaller change is no difference (default 0.03)",
    )
    compare.add_argument("--json", action="store_true", help="the result as JSON")


def _add_folder(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    folder = commands.add_parser(
        "folder",
        help="films a second from files to files, beside the bare network's rate",
        description="What cxrgaze-predict makes of a folder, with overlays and without, and the "
        "network alone on the same films already on their canvas: all of it in one process, in "
        "turns.",
    )
    folder.add_argument("bundle", type=Path, metavar="BUNDLE")
    _add_reading(folder)
    folder.add_argument(
        "--turns", type=command.bounded(1, 1000), default=5, metavar="N", help="(default 5)"
    )
    folder.add_argument("--json", action="store_true", help="the result as JSON")


def _folder(args: argparse.Namespace) -> int:
    from cxrgaze.benchmarks import measure
    from cxrgaze.benchmarks.folder import folder_rates
    from cxrgaze.bundles.bundle import Bundle
    from cxrgaze.processors import cpu_count

    with _films(args) as paths:
        spec = Bundle.open(args.bundle).manifest.spec
        films = measure.usable_films(paths, spec).films
        threads = args.threads or cpu_count()
        found = folder_rates(args.bundle, films, args.device, threads, args.turns)
    if args.json:
        print(found.model_dump_json())
    else:
        print(f"bare     {found.bare:.2f} films/s: canvas to heads, one after another")
        for name, rate, ratio in (
            ("overlays", found.overlays, found.overlays_ratio),
            ("without", found.without_overlays, found.without_overlays_ratio),
        ):
            print(f"{name:8} {rate:.2f} films/s, {ratio:.2f} of the bare network's")
        print(
            f"of       {found.films} films, medians of {found.turns} turns; {found.bundle} on "
            f"{found.backend}, {found.threads} threads"
        )
    command.say(found.notice)
    return 0


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_reading(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="no part goes on for longer, even if samples are missing (default 120)",
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """What is read, and on what."""
    parser.add_argument("--films", type=Path, nargs="+", default=[], metavar="PATH")
    parser.add_argument(
        "--device", default="auto", help="backend, as in cxrgaze-predict (default auto)"
    )
    command.add_gpu(parser)
    command.add_threads(parser)


def _run(args: argparse.Namespace) -> int:
    from cxrgaze.benchmarks import measure
    from cxrgaze.benchmarks.record import Config
    from cxrgaze.benchmarks.report import pages
    from cxrgaze.bundles.bundle import Bundle
    from cxrgaze.errors import ExitCode, UsageError
    from cxrgaze.files import make_output_folder, write_atomic
    from cxrgaze.processors import cpu_count

    slo = dict(map(_objective, args.slo))
    if args.beside and args.peers is None:
        raise UsageError("--beside goes with --peers")
    config = Config(
        samples=args.samples,
        warmup_seconds=args.warmup,
        seconds=_seconds(args),
        threads=args.threads or cpu_count(),
        cold_starts=args.cold_starts,
        after_idle=args.after_idle,
        device=args.device,
    )
    opened = Bundle.open(args.bundle)
    step = command.Steps()
    extras = _extras(args, opened, config, step) if _wants(args) else {}
    with _films(args) as films:
        report = measure.measure(args.bundle, films, config, step, slo=slo, **extras)
    with step("write the report"):
        output = make_output_folder(args.output)
        for name, data in pages(report).items():
            write_atomic(output / name, data)
    whole = report.steady["end_to_end"]
    assert whole.p50 is not None
    print(f"report   {output / 'report.html'}, {output / 'report.md'}, {output / 'report.json'}")
    print(
        f"latency  end to end p50 {whole.p50.value:.2f} ms, max {whole.max:.2f} ms over "
        f"{whole.count} readings; cold start {report.cold.process_ms:.0f} ms"
    )
    for objective in report.objectives:
        print(
            f"slo      {objective.percentile} <= {objective.limit_ms:g} ms: {objective.verdict}, "
            f"{objective.reason}"
        )
    if not report.warm_up.settled:
        print(f"warm-up  never settled: {report.warm_up.rule}; use a quieter machine")
    command.say(report.notice)
    codes = {"ok": ExitCode.OK, "missed": ExitCode.OBJECTIVE_MISSED}
    return codes.get(report.verdict, ExitCode.INCONCLUSIVE)


def _wants(args: argparse.Namespace) -> bool:
    """Whether anything needs the network itself."""
    return args.peers is not None or bool(args.sweep)


def _extras(
    args: argparse.Namespace, opened: Bundle, config: Config, step: command.Steps
) -> dict[str, Any]:
    """What `measure` is to measure beside the bundle itself."""
    with step("load torch, and the network that the bundle was made of"):
        from cxrgaze.benchmarks import peers, sweep
        from cxrgaze.bundles.bundle import Bundle
        from cxrgaze.films.canvas import canvases

        spec = opened.manifest.spec
        wanted = sweep.asked(args.sweep, spec, config.threads)
        bundles = [opened, *map(Bundle.open, args.beside)]
        weights = peers.weights_of(opened, args.checkpoint, config.threads)
        peers.require_same(bundles)
        asked = peers.contenders(weights, bundles, config.device, args.peers or ())

    def measure_peers(films: Sequence[Film]) -> tuple[Peer, ...]:
        images = canvases(films, spec)[0]
        with step("other ways to run the same weights"):
            command.say("")
            return peers.measure(weights, asked, images, config)

    def measure_sweeps(films: Sequence[Film]) -> tuple[Sweep, ...]:
        with step("sweeps"):
            command.say("")
            return sweep.measure(weights, wanted, config.seconds / 10)

    return {
        **({"peers": measure_peers} if args.peers is not None else {}),
        **({"sweeps": measure_sweeps} if args.sweep else {}),
    }


def _compare(args: argparse.Namespace) -> int:
    from statistics import median

    from cxrgaze.benchmarks import measure, paired
    from cxrgaze.errors import ExitCode, UsageError
    from cxrgaze.processors import cpu_count
    from cxrgaze.runtime.reader import load
    from cxrgaze.spec import NOTICE

    margin = paired.MARGIN if args.margin is None else args.margin
    if not 0 < margin < 1:
        raise UsageError(f"--margin {margin:g}: expected more than 0 and less than 1")
    for path in (args.base, args.new):
        if path.suffix == ".json":
            raise UsageError(
                f"{path} is a report: two runs are not compared, what changed between them would "
                "be taken for a change of the bundle; give two bundles"
            )
    threads = args.threads or cpu_count()
    seconds = _seconds(args)
    with (
        _films(args) as paths,
        load(args.base, args.device, threads=threads) as base,
        load(args.new, args.device, threads=threads) as new,
    ):
        specs = [one.bundle.manifest.spec for one in (base, new)]
        films = [film for _, film in measure.usable_films(paths, *specs).films]
        times = paired.interleave(
            {
                "base": lambda number: base.read(films[number % len(films)]),
                "new": lambda number: new.read(films[number % len(films)]),
            },
            rounds=args.rounds or paired.ROUNDS,
            seconds=seconds,
        )
    ratio = paired.compare(times["base"], times["new"], margin)
    if args.json:
        print(ratio.model_dump_json())
    else:
        middles = " and ".join(f"{median(t.ravel()):.3f}" for t in times.values())
        print(f"verdict  {ratio.verdict}: {args.new} {ratio.reason}")
        print(
            f"medians  {middles} ms, film in memory to reading, {times['base'].size} readings each "
            f"in {ratio.rounds} rounds, {threads} threads, {base.backend.name} and "
            f"{new.backend.name}"
        )
    command.say(NOTICE)
    if ratio.verdict == "slower":
        return ExitCode.OBJECTIVE_MISSED
    return ExitCode.INCONCLUSIVE if ratio.verdict == "inconclusive" else ExitCode.OK


def _render(args: argparse.Namespace) -> int:
    from cxrgaze.benchmarks.record import read_report
    from cxrgaze.benchmarks.report import pages
    from cxrgaze.files import make_output_folder, write_atomic

    report = read_report(args.report)
    output = make_output_folder(args.output or args.report.parent)
    for name, data in pages(report).items():
        write_atomic(output / name, data)
    print(f"report   {output / 'report.html'}, {output / 'report.md'}, {output / 'report.csv'}")
    command.say(report.notice)
    return 0


def _seconds(args: argparse.Namespace) -> float:
    from cxrgaze.errors import UsageError

    if not 0 < args.seconds < float("inf"):
        raise UsageError(f"--seconds {args.seconds:g}: expected more than 0")
    return float(args.seconds)


def _objective(text: str) -> tuple[str, float]:
    """`p99=50ms` as the percentile's name and milliseconds."""
    from cxrgaze.benchmarks.timing import NEEDED
    from cxrgaze.errors import UsageError

    parts = re.fullmatch(r"(p[\d.]+)=(\d+(?:\.\d+)?)(ms|s)?", text)
    name = parts[1].replace(".", "_") if parts else ""
    if not parts or name not in NEEDED or float(parts[2]) <= 0:
        names = ", ".join(percentile.replace("_", ".") for percentile in NEEDED)
        raise UsageError(f"--slo {text}: expected one of {names}, and a time, as p99=50ms")
    return name, float(parts[2]) * (1000 if parts[3] == "s" else 1)


@contextmanager
def _films(args: argparse.Namespace) -> Iterator[list[Path]]:
    """The films that were given, else phantoms in a folder of their own."""
    import cv2

    from cxrgaze.evidence import phantom
    from cxrgaze.files import temporary_folder
    from cxrgaze.films.find import find_films

    given = [path for path, _ in find_films(args.films).films]
    with temporary_folder("bench") as folder:
        if not given:
            for seed in range(8):
                given.append(Path(folder, f"phantom-{seed}.png"))
                cv2.imwrite(str(given[-1]), phantom.draw(seed, shape=(1024, 1024)).pixels)
        yield given


if __name__ == "__main__":
    sys.exit(main())
