"""cxrgaze-build: a plan from a bundle, into the cache of this user."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cxrgaze import command
from cxrgaze.runtime import backends

if TYPE_CHECKING:
    from cxrgaze.bundles.bundle import Bundle
    from cxrgaze.bundles.verdicts import Gate
    from cxrgaze.engines.build import Built
    from cxrgaze.evidence.gate import GateSet
    from cxrgaze.runtime.plans import Cache


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `cxrgaze-build`."""
    parser = command.parser(
        "cxrgaze-build",
        "Build a TensorRT plan from a bundle into your plan cache, with a record of what was built "
        "and for what. A second build with the same inputs is instant. Plans are for the GPU of "
        "this machine; TensorRT-RTX also compiles ahead of time without one (--cpu-only --sm). "
        "What precision the library really built is read from the engine: another one than the "
        "graph's deletes the plan (exit code 3). With --device openvino there is no plan: the "
        "graph is compiled each time it is loaded, and what is kept is the proof of its precision "
        "and, with --gate, of its accuracy on this processor.",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--device",
        choices=("tensorrt", *backends.names("openvino")),
        default="tensorrt",
        help="what runs it (default tensorrt: a plan, by the --library)",
    )
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
        "--workspace",
        type=_size,
        metavar="SIZE",
        help="memory for timing kernels, as 512M or 2G (default: the library's own; on a GPU that "
        "shares the host's memory never more than half of what is left)",
    )
    parser.add_argument(
        "--optimization-level", type=command.bounded(0, 5), metavar="0-5", help="TensorRT's own"
    )
    parser.add_argument(
        "--version-compatible",
        action="store_true",
        help="a plan that later versions of the same major one load; it carries code that runs on "
        "the CPU, so it needs --allow-host-code",
    )
    parser.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="a plan for every discrete GPU of compute capability 8.0 and later",
    )
    parser.add_argument(
        "--allow-host-code",
        action="store_true",
        help="build and load a plan that carries code for the CPU",
    )
    parser.add_argument(
        "--tf32", action="store_true", help="allow TensorFloat-32 in fp32 layers (default: off)"
    )
    command.add_gpu(parser)
    command.add_cache(parser)
    parser.add_argument(
        "--gate",
        metavar="SET",
        help="measure the plan's accuracy on this device against the bundle's float32 reference, "
        "over the labelled set that the bundle was gated with, or 'phantom', by the limits that "
        "it was gated with: a loss deletes the "
        "plan (exit code 5), a set that cannot tell is exit code 9",
    )
    command.add_split(parser, "--gate-split", "test")
    parser.add_argument("--heatmap", metavar="PRESET", help="how the set's human maps are made")
    parser.add_argument("--rebuild", action="store_true", help="build even if the plan is there")
    parser.set_defaults(defaults={name: parser.get_default(name) for name in _OF_PLANS})
    return command.execute(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    from cxrgaze.bundles.bundle import Bundle
    from cxrgaze.engines.build import BuildOptions, build, gated
    from cxrgaze.errors import UsageError
    from cxrgaze.runtime import plans, trt_library

    if args.device != "tensorrt":
        return _proof(args)
    if args.cpu_only != bool(args.sm):
        raise UsageError("--cpu-only and --sm go together, as: --cpu-only --sm 86,89")
    bundle = Bundle.open(args.bundle)
    cache = plans.Cache(args.cache)
    library = trt_library.find("tensorrt_rtx" if args.cpu_only else args.library)
    options = BuildOptions(
        batch=args.batch,
        capabilities=args.sm,
        optimization_level=args.optimization_level,
        workspace_bytes=args.workspace,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        allow_host_code=args.allow_host_code,
        tf32=args.tf32,
    )
    if args.gate and args.sm:
        raise UsageError("--gate runs the plan, which needs its GPU; leave out --cpu-only")
    films = _films(bundle, args) if args.gate else None
    built = build(bundle, library, options, cache, rebuild=args.rebuild)
    print_built(built, cache)
    verdict = None
    if films:
        record = gated(
            bundle,
            library,
            cache,
            built.record,
            films,
            allow_host_code=args.allow_host_code,
        )
        verdict = record.gate
    return _told(verdict, built.record.notice)


def _told(verdict: Gate | None, notice: str) -> int:
    """Say what was measured and what must be said; the exit code."""
    from cxrgaze.errors import ExitCode

    if verdict:
        print(f"gate     {verdict.verdict} at engine level: {verdict.reason}")
    command.say(notice)
    return ExitCode.INCONCLUSIVE if verdict and verdict.verdict == "inconclusive" else ExitCode.OK


_OF_PLANS = (
    "library",
    "cpu_only",
    "sm",
    "batch",
    "workspace",
    "optimization_level",
    "version_compatible",
    "hardware_compatible",
    "allow_host_code",
    "tf32",
    "gpu",
    "rebuild",
)
"""Options that say something of a plan alone."""


def _proof(args: argparse.Namespace) -> int:
    """Prove what needs no plan."""
    from cxrgaze.bundles.bundle import Bundle
    from cxrgaze.engines.prove import proven
    from cxrgaze.errors import UsageError
    from cxrgaze.runtime.backend import BackendOptions

    if asked := [name for name in _OF_PLANS if getattr(args, name) != args.defaults[name]]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise UsageError(f"{options}: {args.device} has no plan; leave it out")
    bundle = Bundle.open(args.bundle)
    films = _films(bundle, args) if args.gate else None
    where = args.device.partition(":")[2]
    record = proven(bundle, BackendOptions(cache=args.cache, where=where), films)
    inputs = record.inputs
    print(f"proof    {inputs.key}: no plan, the graph is compiled when it is loaded")
    print(
        f"for      {inputs.library} {inputs.library_version}, {inputs.device}, {inputs.processor} "
        f"({', '.join(inputs.features) or 'instructions not known'})"
    )
    print(f"built    {record.built_precision}: {record.built_precision_why}")
    if not record.gate:
        print("gate     not measured here: --gate SET")
    return _told(record.gate, record.notice)


def _films(bundle: Bundle, args: argparse.Namespace) -> GateSet:
    """The films to gate a plan with: phantoms, or a split of a labelled set."""
    from cxrgaze.evidence import gate
    from cxrgaze.evidence.labelled_set import LabelledSet, split_named

    spec = bundle.manifest.spec
    if args.gate == "phantom":
        return gate.phantom_set(spec)
    split = split_named(args.gate_split)
    return gate.looked_at(
        LabelledSet.open(args.gate),
        spec,
        args.heatmap,
        split,
        model=bundle.manifest.name,
        model_sha256=bundle.sha256,
        what="engine gate",
    )


def print_built(built: Built, cache: Cache) -> None:
    """What was built, on standard output."""
    record = built.record
    inputs = record.inputs
    how = (
        "cached: the same bundle, library, options and architecture were built before"
        if built.was_cached
        else f"built in {record.build_seconds:.1f} s"
    )
    print(f"plan     {cache.plan_path(inputs)} ({record.plan_bytes / 1e6:.1f} MB, {how})")
    print(
        f"for      {inputs.library} {inputs.library_version}, compute capability "
        f"{', '.join(inputs.architecture)}"
    )
    print(f"built    {record.built_precision}: {record.built_precision_why}")


def _size(text: str) -> int:
    size = re.fullmatch(r"(\d+)([MG])", text)
    if not size or not int(size[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 512M or 2G, found {text}")
    return int(size[1]) << (20 if size[2] == "M" else 30)


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
