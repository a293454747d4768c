"""The table of backends, and the choice of one for a bundle on this machine.

Light to import: help texts and messages come from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from cxrgaze.errors import IncompatibleError, IntegrityError, UsageError

if TYPE_CHECKING:
    from cxrgaze.bundles.bundle import Bundle
    from cxrgaze.runtime.backend import Backend, BackendOptions
    from cxrgaze.runtime.proofs import ProofInputs, ProofRecord


class Entry(NamedTuple):
    """A backend of the table."""

    what: str
    """What it is, for help texts."""
    open: Callable[[Bundle, BackendOptions], Backend]
    """Makes it for a bundle; raises IncompatibleError where it cannot run here."""
    is_here: Callable[[Bundle, BackendOptions], bool] = lambda bundle, options: True
    """Whether `auto` considers it: what it then cannot use is said in every reading."""
    devices: tuple[str, ...] = ()
    """Devices that may be named behind it, as GPU in openvino:GPU; the first is the default."""
    has_proof: Callable[[Bundle, BackendOptions], bool] = lambda bundle, options: False
    """Whether it passed a gate of its own with this bundle on this machine, without a plan."""


class Choice(NamedTuple):
    """A backend, and why it is not the one that `auto` prefers."""

    backend: Backend
    warnings: tuple[str, ...]


def choose(bundle: Bundle, device: str | Backend, options: BackendOptions) -> Choice:
    """The backend that was asked for, or the first of the table that accepts the bundle.

    A TensorRT that is installed, or a plan of this bundle, that cannot be used leaves it to the
    next backend, and the warning for the readings says why. Silence is where neither is there.
    Asked for by name and not to be had is an error. A library that needs no plan is taken for what
    only it serves, and for the rest where its proof here says pass: that a package was installed
    changes no number. A plan that did not pass goes before a proof that did, and the warning names
    it (docs/devices.md#choice).

    Args:
        device: "auto", a name of `BACKENDS`, as "openvino:GPU" with a device of its own, or a
            backend of the caller's.

    Raises:
        UsageError: no backend of that name.
        IncompatibleError: it is not installed, or does not accept the bundle; no plan fits.
        IntegrityError: asked for by name, and the plan cache can be written by others.
    """
    if not isinstance(device, str):
        return Choice(_accepting(device, bundle), ())
    if device != "auto":
        if device not in names():
            raise UsageError(f"no backend {device!r}; choose from {', '.join(names())}")
        name, _, where = device.partition(":")
        opened = BACKENDS[name].open(bundle, replace(options, where=where))
        return Choice(_accepting(opened, bundle), ())
    problems: list[str] = []
    for name, entry in BACKENDS.items():
        if not entry.is_here(bundle, options):
            continue
        try:
            backend = _accepting(entry.open(bundle, options), bundle)
        except (IncompatibleError, IntegrityError, UsageError) as error:
            problems.append(f"{name} is not used: {error}")
        else:
            return Choice(backend, (*problems, *_passed_over(backend, bundle, options)))
    raise IncompatibleError("no backend here runs this bundle: " + "; ".join(problems))


def names(of: str = "") -> tuple[str, ...]:
    """What `--device` and `load` take; with `of` that which is of one backend."""
    if of:
        return (of, *(f"{of}:{device}" for device in BACKENDS[of].devices[1:]))
    return ("auto", *(name for backend in BACKENDS for name in names(backend)))


def described() -> str:
    """The table in a line, for help texts."""
    return "; ".join(f"{name}: {entry.what}" for name, entry in BACKENDS.items())


def _passed_over(backend: Backend, bundle: Bundle, options: BackendOptions) -> tuple[str, ...]:
    """What a reading says of proofs that passed where it is served by what did not."""
    if backend.gate is None or backend.gate.verdict == "pass":
        return ()
    return tuple(
        f"{name} passed its gate with this bundle here, {backend.name} did not "
        f"({backend.gate.verdict}); --device {name} takes it"
        for name, entry in BACKENDS.items()
        if name != backend.name and entry.has_proof(bundle, options)
    )


def _accepting(backend: Backend, bundle: Bundle) -> Backend:
    manifest = bundle.manifest
    if manifest.target not in backend.serves.get(manifest.precision, frozenset()):
        raise IncompatibleError(
            f"{backend.name} does not serve {manifest.precision} graphs for target "
            f"{manifest.target}; export again with another --precision or --target"
        )
    return backend


def _onnxruntime(bundle: Bundle, options: BackendOptions) -> Backend:
    from cxrgaze.runtime.ort import OnnxRuntime

    return OnnxRuntime(options.threads, options.at_once)


def _tensorrt(name: str, bundle: Bundle, options: BackendOptions) -> Backend:
    from cxrgaze.runtime import device, plans, trt_library
    from cxrgaze.runtime.host import host_platform
    from cxrgaze.runtime.trt import TensorRT

    library = trt_library.find(name)
    if isinstance(gpus := device.gpus(), str):
        raise IncompatibleError(f"no GPU to run on: {gpus}")
    gpu = device.chosen(gpus, options.gpu)
    cache = plans.Cache(options.cache)
    site = plans.PlanSite(library.name, library.version, gpu.capability, host_platform())
    record = cache.fitting(bundle, site, allow_host_code=options.allow_host_code, key=options.plan)
    opens = partial(device.open_device, options.gpu)
    allowed = options.allow_host_code
    return TensorRT(library, cache, record, allow_host_code=allowed, opens=opens)


def _is_here(name: str, bundle: Bundle, options: BackendOptions) -> bool:
    """Whether this TensorRT is installed, or the cache has a plan of this bundle for it.

    Never for int8 graphs of other targets, unless a plan or a GPU is asked for.
    """
    from cxrgaze.runtime import plans

    if options.plan or options.gpu:
        return True
    if bundle.manifest.precision == "int8" and bundle.manifest.target != "tensorrt":
        return False
    if find_spec(name):
        return True
    try:
        records = list(plans.Cache(options.cache).records(bundle.sha256))
    except (IntegrityError, UsageError):
        return False
    return any(
        not isinstance(record, IntegrityError) and record.inputs.library == name
        for record in records
    )


_OPENVINO_DEVICES = ("CPU", "GPU")


def _openvino(bundle: Bundle, options: BackendOptions) -> Backend:
    from cxrgaze.runtime.ov import OpenVINO

    inputs, proof = openvino_proof(bundle, options)
    if proof and proof.gate and proof.gate.verdict == "fail":
        raise IncompatibleError(
            f"OpenVINO's gate with this bundle on this processor: fail, {proof.gate.reason}"
        )
    return OpenVINO(inputs, proof, options.threads, options.at_once)


def openvino_proof(
    bundle: Bundle, options: BackendOptions
) -> tuple[ProofInputs, ProofRecord | None]:
    """What OpenVINO's proof of a bundle depends on here, and the proof where it was made.

    Raises:
        IncompatibleError: it is not installed.
        IntegrityError: the proof, or the cache, was altered.
    """
    from cxrgaze.runtime import plans, proofs
    from cxrgaze.runtime.ov import INSTALL

    try:
        here = version("openvino")
    except PackageNotFoundError:
        raise IncompatibleError(f"OpenVINO is not installed; {INSTALL}") from None
    device = options.where or _OPENVINO_DEVICES[0]
    inputs = proofs.inputs_here(bundle.sha256, "openvino", here, device)
    try:
        cache = plans.Cache(options.cache)
    except UsageError:  # this user has no home folder: nothing was proven there
        return inputs, None
    return inputs, proofs.find(cache, inputs)


def _openvino_passed(bundle: Bundle, options: BackendOptions) -> bool:
    try:
        _, proof = openvino_proof(bundle, options)
    except (IncompatibleError, IntegrityError):
        return False
    return bool(proof and proof.gate and proof.gate.verdict == "pass")


def _openvino_is_here(bundle: Bundle, options: BackendOptions) -> bool:
    """Whether only it serves this bundle, or its proof here says pass."""
    manifest = bundle.manifest
    is_its_own = manifest.precision == "int8" and manifest.target == "openvino"
    return is_its_own or _openvino_passed(bundle, options)


BACKENDS: Mapping[str, Entry] = {
    name: Entry(
        "a plan of this bundle for this GPU (cxrgaze-build)",
        partial(_tensorrt, name),
        partial(_is_here, name),
    )
    for name in ("tensorrt", "tensorrt_rtx")
} | {
    "openvino": Entry(
        "the graph itself on the CPU, or on an Intel GPU (openvino:GPU)",
        _openvino,
        _openvino_is_here,
        _OPENVINO_DEVICES,
        _openvino_passed,
    ),
    "onnxruntime": Entry("the graph itself on the CPU", _onnxruntime),
}
"""Backends by name, in the order that `auto` prefers."""
