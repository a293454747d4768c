"""cxrgaze-export: from a checkpoint to a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cxrgaze import command

if TYPE_CHECKING:
    from cxrgaze.bundles.bundle import Bundle
    from cxrgaze.export.source import Source


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `cxrgaze-export`."""
    parser = command.parser(
        "cxrgaze-export",
        "Turn a checkpoint into a bundle: ONNX with the precision in the graph, compared with the "
        "network film by film, and a manifest that binds every file. Without a checkpoint, the "
        "network demo, trained on drawings; --list shows which ship. Beside a GPU "
        "with TensorRT, its plan is built at the end.",
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        metavar="CHECKPOINT",
        help="NAME.safetensors with NAME.json beside it, or the name of a network that ships "
        "(default: demo); a file called as one of those is ./NAME",
    )
    _add_own(parser)
    parser.add_argument(
        "--list", action="store_true", help="show the networks that ship, and export nothing"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "int8"), default="fp32", help="default fp32"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder to put NAME.cxrgaze into, or the bundle's own path if it ends in .cxrgaze "
        "(default: here); an older bundle of that name is replaced once the new one is complete",
    )
    parser.add_argument(
        "--target",
        choices=("tensorrt", "cpu", "openvino"),
        default="tensorrt",
        help="what the graph is shaped for: int8 graphs of the three are three files (openvino: "
        "processors, with OpenVINO; cpu: with ONNX Runtime), and cpu gets more of the exact "
        "rewrites (default tensorrt)",
    )
    parser.add_argument(
        "--films",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="films, folders or globs for the parity check (default: phantoms)",
    )
    _add_gate(parser)
    _add_int8(parser)
    _add_validation(parser)
    parser.add_argument(
        "--sign",
        type=Path,
        metavar="KEY",
        help="sign the manifest with an Ed25519 private key in PEM (openssl genpkey -algorithm "
        "ed25519)",
    )
    parser.add_argument(
        "--no-build",
        action="store_true",
        help="leave the plan to cxrgaze-build, also where there is a GPU with TensorRT",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="an untrained network of --variant, for latency work; marked so in every reading",
    )
    parser.add_argument(
        "--variant",
        type=_variant,
        metavar="{" + ",".join(_VARIANTS) + "}",
        help="with --random-weights",
    )
    parser.add_argument(
        "--seed",
        type=command.bounded(0, 2**31 - 1),
        default=0,
        help="of --random-weights (default 0)",
    )
    command.add_threads(parser)
    return command.execute(parser, _run, argv)


_VARIANTS = ("paper", "tiny")  # of random weights


def _variant(text: str) -> str:
    """An argparse type: a variant, or what the reader of its refusal may have meant."""
    if text in _VARIANTS:
        return text
    from cxrgaze.train.shipped import networks

    trained = f"; the trained network is: cxrgaze-export {text}" if text in networks() else ""
    raise argparse.ArgumentTypeError(
        f"expected {' or '.join(_VARIANTS)} (untrained, with --random-weights), found {text!r}"
        f"{trained or '; cxrgaze-export --list shows the trained networks'}"
    )


def _checkpoint(given: str | None) -> Path:
    """The checkpoint that is meant: a name comes before a file of that name.

    Raises:
        UsageError: a bare name that is neither; whether a path exists is for its reader to see.
    """
    from cxrgaze.errors import UsageError
    from cxrgaze.train.shipped import networks

    known = networks()
    given = given or "demo"
    if given in known:
        return known[given]
    path = Path(given)
    if path.name == given and not path.suffix and not path.exists():
        untrained = f" (untrained: --variant {given} --random-weights)" * (given in _VARIANTS)
        raise UsageError(
            f"{given} is no network that ships{untrained}; {' and '.join(known)} are, see --list. "
            "One of your own is a path, NAME.safetensors"
        )
    return path


def _list() -> None:
    """The networks that ship as a table on standard output."""
    from cxrgaze.train.shipped import table

    rows = table()
    rows.insert(0, {heading: heading for heading in rows[0]})
    widths = {heading: max(len(row[heading]) for row in rows) for heading in rows[0]}
    for row in rows:
        print("  ".join(row[h].ljust(width) for h, width in widths.items()).rstrip())
    print("The paper's network, untrained: cxrgaze-export --variant paper --random-weights")


def _add_own(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a network of your own",
        "Any network that reads one film and gives logits, a map or both, with a card that says "
        "what its file does not (docs/own-networks.md).",
    )
    group.add_argument("--onnx", type=Path, metavar="MODEL.onnx", help="its ONNX file")
    group.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="a torch module by the code that makes it, which is run",
    )
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="of --model: safetensors, or a state dict; nothing is unpickled",
    )
    group.add_argument("--card", type=Path, metavar="CARD.toml", help="what it takes and gives")
    group.add_argument(
        "--cam",
        metavar="CLASS|all",
        help="the map is the exact class activation map of a class, or of whichever has the most "
        "at each pixel, for a classifier that ends in global pooling and a linear layer",
    )


def _add_gate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "accuracy gate",
        "What a low precision loses against float32, with patient-clustered intervals. A network "
        "that was trained on phantoms is gated on 1,000 phantoms; any other needs --gate. A loss "
        "beyond a limit is exit code 5 and leaves no bundle, a set that cannot tell is code 9.",
    )
    group.add_argument("--gate", type=Path, metavar="SET", help="a labelled set")
    command.add_split(group, "--gate-split", "test")
    group.add_argument("--heatmap", metavar="PRESET", help="how the set's human maps are made")
    command.add_identity_key(group)
    group.add_argument(
        "--limits",
        type=Path,
        metavar="TOML",
        help="other limits, each a table with limit and reason: [flips], [macro_auc], [cc], "
        "[sensitivity], [specificity], [brier]",
    )
    group.add_argument(
        "--no-gate", action="store_true", help="none; every reading will say not_gated"
    )
    group.add_argument(
        "--fallback",
        action="store_true",
        help="blocks are ranked on validation films; then forms are looked at from the one with "
        "most blocks in higher precision on, as long as they pass, and the last that passed ships",
    )
    group.add_argument(
        "--fallback-trials",
        type=command.bounded(1, 1000),
        default=40,
        metavar="N",
        help="at most so many looks at the gate's films (default 40)",
    )


def _add_validation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "validation of a low precision",
        "Temperature and operating points are fitted anew on what the low-precision graph says of "
        "validation films, as training did at float32; never on the gate's films.",
    )
    group.add_argument(
        "--validation",
        type=Path,
        metavar="SET",
        help="a labelled set, best that of training (default: the calibration's; networks that "
        "ship take the phantoms of their validation; with none, float32's stay, and the manifest "
        "says so)",
    )
    command.add_split(group, "--validation-split", "val")


def _add_int8(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration of int8")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="SET",
        help="a labelled set; its patients must not be in the gate's (a network that was trained "
        "on phantoms takes phantoms)",
    )
    command.add_split(group, "--calibration-split", "train")
    group.add_argument(
        "--calibration-films",
        type=command.bounded(1, 4096),
        default=64,
        metavar="N",
        help="at most so many, chosen by seed (default 64)",
    )
    group.add_argument(
        "--method", choices=("minmax", "percentile"), default="minmax", help="(default minmax)"
    )


def _run(args: argparse.Namespace) -> int:
    from cxrgaze.errors import ExitCode, UsageError

    if args.list:
        _list()
        return ExitCode.OK
    if args.random_weights != (args.variant is not None):
        raise UsageError("--variant and --random-weights go together")
    ways = {
        "CHECKPOINT": args.checkpoint,
        "--random-weights": args.random_weights,
        "--onnx": args.onnx,
        "--model": args.model,
    }
    if len(given := [name for name, value in ways.items() if value]) > 1:
        raise UsageError(f"give {' or '.join(given)}, not both")
    own = bool(args.onnx or args.model)
    if own != (args.card is not None):
        raise UsageError("--onnx MODEL.onnx or --model, and --card CARD.toml, go together")
    if (args.model is None) != (args.weights is None):
        raise UsageError("--model and --weights FILE go together")
    if args.cam and not own:
        raise UsageError("--cam is for --onnx and --model")
    path = None if own else _checkpoint(args.checkpoint)
    from cxrgaze.films.find import find_films

    films = [path for path, _ in find_films(args.films).films]
    if args.gate and args.no_gate:
        raise UsageError("give --gate SET or --no-gate, not both")
    step = command.Steps()
    with step("load torch"):
        import torch

        from cxrgaze.evidence.labelled_set import split_named
        from cxrgaze.evidence.seen import read_key
        from cxrgaze.export import network_source, own_module, own_source, pipeline
        from cxrgaze.export.options import (
            ExportOptions,
            GateOptions,
            Int8Options,
            ValidationOptions,
            read_limits,
        )
        from cxrgaze.processors import cpu_count
    torch.set_num_threads(args.threads or cpu_count())
    source: Source
    if args.onnx:
        with step(f"open {args.onnx.name} in a process of its own, and adapt it by its card"):
            source = own_source.source_from_onnx(args.onnx, args.card, args.cam)
    elif args.model:
        with step(f"make {args.model}, and adapt it by its card"):
            module, digest = own_module.made(args.model, args.weights)
            source = own_source.source_from_module(
                module, args.weights.name, digest, args.card, args.cam
            )
    elif args.random_weights:
        with step("make random weights"):
            source = network_source.source_from_random(args.variant, args.seed)
    elif path:
        with step("load the checkpoint"):
            source = network_source.source_from_checkpoint(path)
    options = ExportOptions(
        args.precision,
        args.target,
        args.output,
        films,
        args.sign,
        GateOptions(
            args.gate,
            split_named(args.gate_split),
            skip=args.no_gate,
            heatmap=args.heatmap,
            limits=read_limits(args.limits),
            identity_key=read_key(args.identity_key),
        ),
        Int8Options(
            args.calibration,
            split_named(args.calibration_split),
            films=args.calibration_films,
            method=args.method,
        ),
        ValidationOptions(args.validation, split_named(args.validation_split)),
        fallback_trials=args.fallback_trials if args.fallback else 0,
    )
    bundle = pipeline.export(source, options, step)
    _summarise(bundle)
    _build(bundle, wanted=not args.no_build)
    for line in filter(None, (bundle.manifest.spec.caution, bundle.manifest.notice)):
        command.say(line)
    return ExitCode.INCONCLUSIVE if bundle.manifest.gate.verdict == "inconclusive" else ExitCode.OK


def _build(bundle: Bundle, *, wanted: bool) -> None:
    """The plan for the GPU here, where a TensorRT is beside one, else the command for a device.

    An int8 graph for a library of processors has no plan.
    """
    from cxrgaze.engines.build import BuildOptions, build
    from cxrgaze.engines.cli import print_built
    from cxrgaze.errors import BuildError, IncompatibleError
    from cxrgaze.runtime import plans, trt_library

    manifest = bundle.manifest
    if manifest.precision == "int8" and manifest.target != "tensorrt":
        if manifest.target == "openvino":
            films = "phantom" if manifest.gate.domain == "phantom" else "SET"
            command_line = f"cxrgaze-build {bundle.path.name} --device openvino --gate {films}"
            print(f"proof    on the device: {command_line}")
        return
    beside = trt_library.beside_a_gpu() if wanted else []
    if not beside:
        print(f"plan     on the device: cxrgaze-build {bundle.path.name}")
        return
    cache = plans.Cache()
    try:
        print_built(build(bundle, trt_library.find(beside[0]), BuildOptions(), cache), cache)
    except (BuildError, IncompatibleError) as error:
        raise type(error)(
            f"the bundle is complete, its plan for this GPU is not (--no-build leaves it out): "
            f"{error}"
        ) from error


def _summarise(bundle: Bundle) -> None:
    from cxrgaze.bundles.bundle import GRAPH

    manifest = bundle.manifest
    size = next(record.size for record in manifest.files if record.path == GRAPH)
    total = sum(record.size for record in manifest.files)
    print(f"bundle   {bundle.path}")
    print(f"size     {size / 1e6:.2f} MB graph ({manifest.precision}), {total / 1e6:.2f} MB in all")
    print(f"parity   {manifest.parity}")
    print(f"gate     {manifest.gate.verdict}: {manifest.gate.reason}")
    for warning in manifest.calibration.warnings if manifest.calibration else ():
        print(f"warning  {warning}")
    print(f"next     cxrgaze-predict {bundle.path} FILM... --output readings")


if __name__ == "__main__":
    sys.exit(main())
