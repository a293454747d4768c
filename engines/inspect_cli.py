"""cxrgaze-inspect: what a bundle is, which plans there are of it, what this machine has."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cxrgaze import command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `cxrgaze-inspect`."""
    parser = command.parser(
        "cxrgaze-inspect",
        "Verify a bundle and print what it is and which plans of it are in your cache, without "
        "loading either; with --device, what this machine has.",
    )
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    parser.add_argument("--device", action="store_true", help="GPUs, driver and libraries here")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="(default: CXRGAZE_CACHE, or in ~/.cache)"
    )
    parser.add_argument(
        "--verify", type=Path, metavar="PUBLIC", help="check the signature with a public key (PEM)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    return command.execute(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    from cxrgaze.bundle import Bundle
    from cxrgaze.errors import UsageError
    from cxrgaze.signature import require_signature

    if not args.bundle and not args.device:
        raise UsageError("give a BUNDLE, --device, or both")
    found: dict[str, Any] = {}
    if args.device:
        found["device"] = device_facts()
    if args.verify and not args.bundle:
        raise UsageError("--verify needs a BUNDLE")
    if args.bundle:
        if args.verify:
            require_signature(Bundle.open(args.bundle), args.verify)
        found["bundle"], found["plans"] = bundle_facts(args.bundle, args.cache, bool(args.verify))
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for title, facts in found.items():
        print(title)
        for line in facts if isinstance(facts, list) else [facts]:
            for key, value in line.items():
                print(f"  {key:20} {value}")
            print()
    return 0


def device_facts() -> dict[str, Any]:
    """CPU, GPUs, L4T and libraries of this machine."""
    from dataclasses import asdict
    from importlib.metadata import PackageNotFoundError, version

    from cxrgaze.runtime import host, trt_library

    libraries = trt_library.versions()
    for package in ("onnxruntime", "cuda-bindings", "pycuda"):
        try:
            libraries[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = host.gpus()
    return {
        "cpu": f"{host.cpu_name()}, {host.cpu_count()} cores for this process",
        "platform": host.host_platform(),
        "gpus": [asdict(gpu) for gpu in gpus] if not isinstance(gpus, str) else f"none ({gpus})",
        "jetson": host.jetson_release() or "no",
        "libraries": libraries,
    }


def bundle_facts(
    path: Path, cache: Path | None, verified: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a bundle is, and its plans with whether this machine could load each.

    Raises:
        UsageError, IntegrityError: as `Bundle.open` and `Bundle.verify`.
    """
    from cxrgaze.bundle import SIGNATURE, Bundle
    from cxrgaze.errors import IncompatibleError, IntegrityError
    from cxrgaze.runtime import host, plans, trt_library

    bundle = Bundle.open(path)
    bundle.verify()
    manifest = bundle.manifest
    facts = {
        "name": manifest.name,
        "sha256": bundle.sha256,
        "network": f"{manifest.spec.variant}, {manifest.spec.height} x {manifest.spec.width}",
        "trained on": manifest.provenance.trained_on,
        "precision": f"{manifest.precision} for target {manifest.target}",
        "parity": manifest.parity.verdict,
        "gate": f"{manifest.gate.verdict} ({manifest.gate.level}): {manifest.gate.reason}",
        "temperature": manifest.decision.temperature,
        "operating points": manifest.decision.operating_points or "none",
        "caution": manifest.spec.caution or "none",
        "signature": (
            ("valid" if verified else "there, not checked (--verify PUBLIC)")
            if (path / SIGNATURE).is_file()
            else "none"
        ),
        "notice": manifest.notice,
    }
    gpus, libraries = host.gpus(), trt_library.versions()
    listed = []
    for record in plans.Cache(cache).records(bundle.sha256):
        if isinstance(record, IntegrityError):
            listed.append({"plan": "refused", "why": str(record)})
            continue
        built = record.inputs
        try:
            if isinstance(gpus, str) or not gpus:
                raise IncompatibleError("no GPU was found here")
            plans.require_fit(
                record,
                library=built.library,
                library_version=libraries.get(built.library, "not installed"),
                capability=gpus[0].capability,
                platform=host.host_platform(),
            )
            verdict = "fits this device"
        except IncompatibleError as error:
            verdict = f"cannot be loaded here: {error}"
        listed.append(
            {
                "plan": built.key,
                "for": f"{built.library} {built.library_version}, compute capability "
                f"{', '.join(built.architecture)}, {built.platform}",
                "batch": ":".join(map(str, built.batch)),
                "bytes": str(record.plan_bytes),
                "precision": record.built_precision,
                "here": verdict,
            }
        )
    return facts, listed


if __name__ == "__main__":
    sys.exit(main())
