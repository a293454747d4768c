"""cxrgaze-bench: latency and memory of a bundle as it ships."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cxrgaze import command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `cxrgaze-bench`."""
    parser = command.parser("cxrgaze-bench", "Measure a bundle as it ships.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="measure a bundle and write report.json and report.md",
        description="Cold start in processes of their own, then warm-up, then one film at a time: "
        "percentiles per stage and end to end, each with its count and its boundary. Without "
        "--films, phantoms.",
    )
    run.add_argument("bundle", type=Path, metavar="BUNDLE")
    run.add_argument("--films", type=Path, nargs="+", default=[], metavar="PATH")
    run.add_argument("--output", type=Path, default=Path("bench"), metavar="DIR")
    run.add_argument("--samples", type=int, default=200, metavar="N", help="(default 200)")
    run.add_argument("--warmup", type=int, default=20, metavar="N", help="(default 20)")
    run.add_argument(
        "--seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="stop sampling after this time even if samples are missing (default 120)",
    )
    command.add_threads(run)
    run.add_argument("--cold-starts", type=int, default=3, metavar="N", help="(default 3)")
    return command.execute(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    import tempfile

    import cv2

    from cxrgaze import phantom
    from cxrgaze.benchmarks.measure import Config, measure
    from cxrgaze.benchmarks.report import to_markdown
    from cxrgaze.errors import UsageError
    from cxrgaze.files import make_output_folder, render_json, write_atomic
    from cxrgaze.runtime.film import find_films

    if args.samples < 1 or args.warmup < 0 or args.cold_starts < 1 or args.seconds <= 0:
        raise UsageError("--samples and --cold-starts at least 1, --warmup 0, --seconds above 0")
    config = Config(
        samples=args.samples,
        warmup=args.warmup,
        seconds=args.seconds,
        threads=args.threads,
        cold_starts=args.cold_starts,
    )
    step = command.Steps(2)
    with tempfile.TemporaryDirectory(prefix="cxrgaze-bench-") as folder:
        films = [path for path, _ in find_films(args.films)]
        if not films:
            for seed in range(8):
                films.append(Path(folder, f"phantom-{seed}.png"))
                cv2.imwrite(str(films[-1]), phantom.draw(seed, shape=(1024, 1024)).pixels)
        with step("measure"):
            report = measure(args.bundle, films, config)
    with step("write the report"):
        output = make_output_folder(args.output)
        write_atomic(output / "report.json", render_json(report.model_dump(mode="json")))
        write_atomic(output / "report.md", to_markdown(report).encode())
    whole = report.steady["end_to_end"]
    print(f"report   {output / 'report.md'}, {output / 'report.json'}")
    print(
        f"latency  end to end p50 {whole.p50:.2f} ms, max {whole.max:.2f} ms over {whole.count} "
        f"readings; cold start {report.cold.process_ms:.0f} ms"
    )
    command.say(report.notice)
    return 0


if __name__ == "__main__":
    sys.exit(main())
