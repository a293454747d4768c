"""cxrgaze-inspect: what a bundle is, which plans there are of it, what this machine has."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxrgaze import command
from cxrgaze.errors import IncompatibleError

if TYPE_CHECKING:
    from cxrgaze.bundles.bundle import Bundle


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `cxrgaze-inspect`."""
    parser = command.parser(
        "cxrgaze-inspect",
        "Verify a bundle and print what it is and which plans and proofs of it are in your cache, "
        "without loading any; with --device, what this machine has.",
    )
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    parser.add_argument(
        "--device",
        action="store_true",
        help="GPUs, driver, memory, system and libraries here, whether they go together, and the "
        "support matrix",
    )
    command.add_cache(parser)
    parser.add_argument(
        "--verify", type=Path, metavar="PUBLIC", help="check the signature with a public key (PEM)"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    return command.execute(parser, _run, argv)


def _run(args: argparse.Namespace) -> int:
    from cxrgaze.bundles.bundle import Bundle
    from cxrgaze.bundles.signature import require_signature
    from cxrgaze.errors import UsageError

    if not args.bundle and not args.device:
        raise UsageError("give a BUNDLE, --device, or both")
    sections: dict[str, Any] = {}
    if args.device:
        sections["device"] = device_facts()
        sections["support matrix"] = support_rows()
    if args.verify and not args.bundle:
        raise UsageError("--verify needs a BUNDLE")
    if args.bundle:
        bundle = Bundle.open(args.bundle)
        if args.verify:
            require_signature(bundle, args.verify)
        sections["bundle"], sections["plans"] = bundle_facts(bundle, args.cache, bool(args.verify))
        sections["proofs"] = proofs_of(bundle, args.cache)
    if args.json:
        print(json.dumps(sections, indent=2))
        return 0
    for title, facts in sections.items():
        print(title)
        for line in facts if isinstance(facts, list) else [facts]:
            for key, value in line.items():
                for number, part in enumerate(value if isinstance(value, list) else [value]):
                    print(f"  {'' if number else key:20} {part}")
            print()
    return 0


def device_facts() -> dict[str, Any]:
    """CPU, memory, GPUs, system and libraries here, and whether they go together."""
    from cxrgaze import processors
    from cxrgaze.environment import versions
    from cxrgaze.runtime import device, host, support, trt_library

    libraries = trt_library.versions() | versions(
        "onnxruntime", "openvino", "cuda-bindings", "pycuda"
    )
    gpus, l4t = device.gpus(), host.l4t_release()
    available = host.available_memory_bytes()
    verdicts = []
    for name in filter(libraries.get, trt_library.NAMES):
        try:
            library = trt_library.find(name)
        except IncompatibleError as error:
            verdicts.append(f"no: {error}")
            continue
        for gpu in () if isinstance(gpus, str) else gpus:
            able, why = support.verdict(library, gpu, host.host_platform(), l4t)
            verdicts.append(f"{'yes' if able else 'no'}, {gpu.name}: {why}")
    none = "no GPU" if isinstance(gpus, str) else "no TensorRT"
    return {
        "cpu": f"{host.cpu_name()}, {processors.cpu_count()} cores for this process",
        "instructions": ", ".join(host.cpu_features()) or "not known",
        "memory": f"{available / 1e9:.1f} GB available" if available else "not known",
        "platform": host.host_platform(),
        "gpus": [asdict(gpu) for gpu in gpus] if not isinstance(gpus, str) else f"none ({gpus})",
        "jetson linux": l4t or "no",
        "power mode": host.power_mode() or "not known",
        "libraries": libraries,
        "tensorrt here": verdicts or [f"no: {none} here; films are read with ONNX Runtime"],
    }


def support_rows() -> list[dict[str, str]]:
    """The support matrix, a row a range of versions on one kind of machine."""
    from cxrgaze.runtime import support

    def dotted(number: Sequence[int]) -> str:
        return ".".join(map(str, number))

    return [
        {
            "library": f"{row.library} {dotted(row.first)} to below {dotted(row.before)}",
            "system": f"{row.system} ({row.platform})",
            "compute capability": ", ".join(row.capabilities),
            "driver": f"for CUDA {dotted(row.driver_cuda)} or later",
            "source": row.source,
        }
        for row in support.MATRIX
    ]


def bundle_facts(
    bundle: Bundle, cache: Path | None, verified: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a bundle is, and its plans with whether this machine could load each.

    Raises:
        IntegrityError: as `Bundle.verify`; a cache that others can write.
    """
    from cxrgaze.bundles.bundle import SIGNATURE
    from cxrgaze.errors import IntegrityError
    from cxrgaze.runtime import device, host, plans, trt_library

    bundle.verify()
    manifest = bundle.manifest
    facts: dict[str, Any] = {
        "name": manifest.name,
        "sha256": bundle.sha256,
        "network": f"{manifest.spec.variant}, {manifest.spec.height} x {manifest.spec.width}",
        "heads": ", ".join(manifest.spec.heads),
        "classes": ", ".join(manifest.spec.class_names) or "none",
        "trained on": manifest.provenance.trained_on,
        "precision": f"{manifest.precision} for target {manifest.target}",
        "parity": manifest.parity.verdict,
        "gate": f"{manifest.gate.verdict} ({manifest.gate.level}): {manifest.gate.reason}",
        "temperature": manifest.decision.temperatures or manifest.decision.temperature,
        "operating points": manifest.decision.operating_points or "none",
        "caution": manifest.spec.caution or "none",
        "signature": (
            ("valid" if verified else "there, not checked (--verify PUBLIC)")
            if (bundle.path / SIGNATURE).is_file()
            else "none"
        ),
        "notice": manifest.notice,
    }
    if manifest.spec.classes:
        facts["classes"] = f"{facts['classes']} ({manifest.spec.class_kind})"
    if untaught := (*manifest.untrained, *manifest.untaught):
        facts["nothing taught"] = ", ".join(untaught)
    gpus, libraries = device.gpus(), trt_library.versions()
    listed = []
    kept = plans.Cache(cache)
    for record in kept.records(bundle.sha256):
        if isinstance(record, IntegrityError):
            listed.append({"plan": "refused", "why": str(record)})
            continue
        built = record.inputs
        try:
            kept.read(record)
        except IntegrityError as error:
            listed.append({"plan": built.key, "why": f"refused: {error}"})
            continue
        try:
            if isinstance(gpus, str):
                raise IncompatibleError(f"no GPU to run on: {gpus}")
            installed = libraries.get(built.library, "not installed")
            here = plans.PlanSite(
                built.library, installed, gpus[0].capability, host.host_platform()
            )
            plans.require_fit(record, here, allow_host_code=True)
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
                "built on": ", ".join(f"{k} {v}" for k, v in record.built_on.items()),
                "precision": f"{record.built_precision}: {record.built_precision_why}",
                "gate": f"{record.gate.verdict} (engine): {record.gate.reason}"
                if record.gate
                else "not_gated (engine): run cxrgaze-build --gate SET",
                "host code": "yes, needs --allow-host-code" if record.has_host_code else "no",
                "here": verdict,
            }
        )
    return facts, listed


def proofs_of(bundle: Bundle, cache: Path | None) -> list[dict[str, Any]]:
    """Proofs of a bundle at engine level, and whether each is of this machine.

    Raises:
        IntegrityError: a cache that others can write.
    """
    from cxrgaze.errors import IntegrityError
    from cxrgaze.runtime import plans, proofs

    listed: list[dict[str, Any]] = []
    for record in proofs.records(plans.Cache(cache), bundle.sha256):
        if isinstance(record, IntegrityError):
            listed.append({"proof": "refused", "why": str(record)})
            continue
        inputs, gate = record.inputs, record.gate
        here = proofs.inputs_here(
            bundle.sha256, inputs.library, inputs.library_version, inputs.device
        )
        listed.append(
            {
                "proof": inputs.key,
                "for": f"{inputs.library} {inputs.library_version}, {inputs.device}, "
                f"{inputs.processor} ({', '.join(inputs.features)}), {inputs.platform}",
                "precision": f"{record.built_precision}: {record.built_precision_why}",
                "gate": f"{gate.verdict} (engine): {gate.reason}" if gate else "not measured",
                "here": "of this processor" if here == inputs else "of another machine",
            }
        )
    return listed


if __name__ == "__main__":
    sys.exit(main())
