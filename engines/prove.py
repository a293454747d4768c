"""Proof at engine level of what is compiled when it is loaded: its precision and its accuracy."""

from __future__ import annotations

from collections.abc import Mapping

from cxrgaze.bundles.bundle import Bundle
from cxrgaze.bundles.manifest import DataType, Manifest, Precision
from cxrgaze.command import say
from cxrgaze.engines import precision
from cxrgaze.environment import now_utc
from cxrgaze.errors import BuildError, GateError
from cxrgaze.evidence import gate
from cxrgaze.runtime import backends, ov, plans, proofs
from cxrgaze.runtime.backend import BackendOptions
from cxrgaze.runtime.reader import Reader


def proven(
    bundle: Bundle, options: BackendOptions, films: gate.GateSet | None
) -> proofs.ProofRecord:
    """Compile a bundle's graph here, prove what was built and measure what it loses; kept.

    Args:
        options: where the proof is kept, threads, OpenVINO's device.
        films: None measures no accuracy; a verdict of an earlier proof is kept.

    Raises:
        GateError: it loses more than a limit allows; the proof is kept and says so, so that nothing
            is served by it here.
        BuildError: another precision was built than the graph has; no proof is kept.
        DataError: the bundle has no reference, or none of these films.
        IncompatibleError: it cannot run here, or fails the self-test.
        IntegrityError: a bundle or a cache that was altered.
    """
    cache = plans.Cache(options.cache)
    inputs, earlier = backends.openvino_proof(bundle, options)
    backend = ov.OpenVINO(inputs, None, options.threads)
    with Reader(bundle, backend):  # verifies the bundle and runs the self-test
        if backend.built is None:
            raise BuildError("OpenVINO says nothing of what it built")
        verdict, why = precision.judge(*promised(bundle.manifest), backend.built)
        if verdict == "contradicted":
            raise BuildError(
                f"OpenVINO {inputs.library_version} built another precision than the graph has: "
                f"{why}. Nothing was kept"
            )
        if films:
            say(f"reading {len(films.keys)} films on {backend.device}")
        measured = gate.judge_engine(bundle, films, backend.infer) if films else None
    record = proofs.ProofRecord(
        bundle_name=bundle.manifest.name,
        inputs=inputs,
        built_precision=verdict,
        built_precision_why=why,
        engine=backend.built,
        gate=measured or (earlier.gate if earlier else None),
        created_utc=now_utc(),
    )
    proofs.store(cache, record)
    if measured and measured.verdict == "fail":
        raise GateError(
            f"gate of {bundle.manifest.name} on {inputs.asked}: {measured.reason}. It will not be "
            "served by it here; export with --fallback, or with a higher --precision"
        )
    return record


def promised(manifest: Manifest) -> tuple[Precision, Mapping[DataType, int]]:
    """The precision that is asked of OpenVINO, and the convolution work by type that goes with it.

    A float16 graph's weights and rounding are in the graph; its arithmetic here is float32.
    """
    if manifest.precision == "int8":
        return "int8", manifest.convolution_macs
    return "fp32", {ov.PRECISION: sum(manifest.convolution_macs.values())}
