"""cxrgaze-build: a plan from a bundle, into the cache of this user."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cxrgaze import command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `cxrgaze-build`."""
    parser = command.parser(
        "cxrgaze-build",
        "Build a TensorRT plan from a bundle into your plan cache, with a record of what was built "
        "and for what. A second build with the same inputs is instant. In this version plans are "
        "built ahead of time by TensorRT-RTX without a GPU (--cpu-only --sm); nothing runs them "
        "yet.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--library",
        choices=("auto", "tensorrt", "tensorrt_rtx"),
        default="auto",
        help="(default: the first that is installed)",
    )
    parser.add_argument(
        "--cpu-only", action="store_true", help="compile ahead of time, for the GPUs of --sm"
    )
    parser.add_argument(
        "--sm", type=_capabilities, default=(), metavar="86,89", help="compute capabilities"
    )
    parser.add_argument(
        "--batch",
        type=_batch,
        default=(1, 1, 1),
        metavar="N|MIN:BEST:MAX",
        help="static batch, or a profile (default 1)",
    )
    parser.add_argument(
        "--optimization-level", type=command.bounded(0, 5), metavar="0-5", help="TensorRT's own"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="allow TensorFloat-32 in fp32 layers (default: off)"
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="(default: CXRGAZE_CACHE, or in ~/.cache)"
    )
    parser.add_argument("--rebuild", action="store_true", help="build even if the plan is there")
    return command.execute(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    from cxrgaze.bundle import Bundle
    from cxrgaze.engines.build import Options, build
    from cxrgaze.errors import UsageError
    from cxrgaze.runtime import plans, trt_library

    if args.cpu_only != bool(args.sm):
        raise UsageError("--cpu-only and --sm go together, as: --cpu-only --sm 86,89")
    bundle = Bundle.open(args.bundle)
    cache = plans.Cache(args.cache)
    library = trt_library.find("tensorrt_rtx" if args.cpu_only else args.library)
    options = Options(
        batch=args.batch,
        capabilities=args.sm,
        optimization_level=args.optimization_level,
        tf32=args.tf32,
    )
    built = build(bundle, library, options, cache, rebuild=args.rebuild)
    record = built.record
    how = (
        "cached: the same bundle, library, options and architecture were built before"
        if built.was_cached
        else f"built in {record.build_seconds:.1f} s"
    )
    print(f"plan       {cache.plan_path(record.inputs)} ({record.plan_bytes / 1e6:.1f} MB, {how})")
    print(f"for        {library.name} {library.version}, compute capability {', '.join(args.sm)}")
    print(f"precision  {record.built_precision}: {record.built_precision_why}")
    print(record.notice)
    return 0


def _capabilities(text: str) -> tuple[str, ...]:
    parts = tuple(sorted(set(text.split(",")), key=lambda p: (len(p), p)))
    if not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers such as 86,89, found {text}")
    return parts


def _batch(text: str) -> tuple[int, int, int]:
    try:
        parts = [int(part) for part in text.split(":")]
    except ValueError:
        parts = []
    parts = parts * 3 if len(parts) == 1 else parts
    if len(parts) != 3 or not 1 <= parts[0] <= parts[1] <= parts[2] <= 1024:
        raise argparse.ArgumentTypeError(f"expected N or MIN:BEST:MAX from 1 to 1024, found {text}")
    return parts[0], parts[1], parts[2]


if __name__ == "__main__":
    sys.exit(main())
