"""cxrgaze-predict: read films with a bundle."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from cxrgaze import command
from cxrgaze.runtime import backends


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `cxrgaze-predict`."""
    parser = command.parser(
        "cxrgaze-predict",
        "Read chest X-rays with a bundle: diagnosis, gaze map, overlay. Films are PNG, JPEG, TIFF "
        "or DICOM files, folders of them (searched recursively) or globs. A film that the network "
        "must not be applied to is reported as not applicable, with the reason; one that cannot be "
        "read does not stop the others (exit code 1 at the end).",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="made by cxrgaze-export")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="film, folder or glob")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write a JSON and an overlay PNG per film, and readings.csv; without it, nothing is "
        "written",
    )
    parser.add_argument(
        "--heatmap",
        choices=("npy", "png16"),
        help="also write the gaze density in pixels of the film: float32 with sum 1 (npy), or "
        "scaled to its peak (png16); needs --output",
    )
    parser.add_argument(
        "--no-overlay",
        dest="overlay",
        action="store_false",
        help="draw none: a folder is read faster",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line on stdout")
    parser.add_argument(
        "--force",
        action="store_true",
        help="read films that are not applicable (lateral, colour, ...); each reading says so",
    )
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="decode in a child process with a memory and a time limit, so that a hostile file "
        "cannot take the reader down; meant for services",
    )
    parser.add_argument(
        "--isolate-memory",
        type=command.bounded(256, 1 << 20),
        default=2048,
        metavar="MIB",
        help="the most that the child process of --isolate may take (default 2048)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help=f"auto or a backend, {backends.described()} (default auto: the first that runs the "
        "bundle)",
    )
    command.add_gpu(parser)
    parser.add_argument(
        "--plan",
        metavar="KEY",
        help="the plan to take, by its key (cxrgaze-inspect lists them; default: one that passed "
        "its gate before others, then the latest)",
    )
    command.add_cache(parser)
    parser.add_argument(
        "--allow-host-code",
        action="store_true",
        help="load a version-compatible plan, which brings code of its own for the CPU",
    )
    parser.add_argument(
        "--require",
        choices=("pass",),
        help="refuse what did not pass its accuracy gate (exit code 5): the plan's own on this "
        "device, or the graph's with onnxruntime",
    )
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="PEM",
        help="refuse a bundle that the owner of this key did not sign (cxrgaze-export --sign)",
    )
    command.add_threads(parser)
    return command.execute(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    from collections import Counter
    from functools import partial

    from cxrgaze.errors import ExitCode, UsageError
    from cxrgaze.files import make_output_folder, only_run
    from cxrgaze.films.ahead import Decode
    from cxrgaze.films.canvas import load_for
    from cxrgaze.films.find import find_films
    from cxrgaze.films.isolate import IsolatedLoader
    from cxrgaze.processors import cpu_count
    from cxrgaze.runtime.predict import (
        MOST_WORKERS,
        PredictOptions,
        predict,
        require_heatmaps,
    )
    from cxrgaze.runtime.reader import load

    if args.heatmap and not args.output:
        raise UsageError("--heatmap needs --output DIR")
    found = find_films(args.paths)
    workers = max(min(args.threads or cpu_count(), MOST_WORKERS, len(found.films)), 1)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(
            load(
                args.bundle,
                args.device,
                threads=args.threads,
                public_key=args.public_key,
                cache=args.cache,
                allow_host_code=args.allow_host_code,
                plan=args.plan,
                require=args.require,
                at_once=workers,
            )
        )
        spec = reader.bundle.manifest.spec
        decode: Decode = partial(load_for, spec)
        if args.isolate:
            loader = IsolatedLoader(
                memory_limit=args.isolate_memory << 20, keep_stored=spec.needs_stored
            )
            decode = stack.enter_context(loader).load
        require_heatmaps(reader, args.heatmap)  # before a folder is made
        output = make_output_folder(args.output) if args.output else None
        if output:
            stack.enter_context(only_run(output))
        options = PredictOptions(output, args.heatmap, args.overlay, args.json, args.force, workers)
        records = predict(reader, found, decode, options)
    count = Counter(record["status"] for record in records)
    told = (f"{count[s]} {s.replace('_', ' ')}" for s in ("read", "not_applicable", "failed"))
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    command.say(", ".join(told) + skipped + (f"; in {args.output}" if args.output else ""))
    for line in dict.fromkeys((*reader.standing_warnings, reader.bundle.manifest.notice)):
        command.say(line)
    return ExitCode.FAILURE if count["failed"] else ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
