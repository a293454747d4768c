"""The table of backends, and the choice of one for a bundle on this machine.

Light to import: help texts and messages come from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from cxrgaze.errors import IncompatibleError, IntegrityError, UsageError

if TYPE_CHECKING:
    from cxrgaze.bundles.bundle import Bundle
    from cxrgaze.runtime.backend import Backend, BackendOptions


class Entry(NamedTuple):
    """A backend of the table."""

    what: str
    """What it is, for help texts."""
    open: Callable[[Bundle, BackendOptions], Backend]
    """Makes it for a bundle; raises IncompatibleError where it cannot run here."""
    is_here: Callable[[Bundle, BackendOptions], bool] = lambda bundle, options: True
    """Whether `auto` considers it: what it then cannot use is said in every reading."""


class Choice(NamedTuple):
    """A backend, and why it is not the one that `auto` prefers."""

    backend: Backend
    warnings: tuple[str, ...]


def choose(bundle: Bundle, device: str | Backend, options: BackendOptions) -> Choice:
    """The backend that was asked for, or the first of the table that accepts the bundle.

    A TensorRT that is installed, or a plan of this bundle, that cannot be used leaves it to the
    next backend, and the warning for the readings says why. Silence is where neither is there.
    Asked for by name and not to be had is an error.

    Args:
        device: "auto", a name of `BACKENDS`, or a backend of the caller's.

    Raises:
        UsageError: no backend of that name.
        IncompatibleError: it is not installed, or does not accept the bundle; no plan fits.
        IntegrityError: asked for by name, and the plan cache can be written by others.
    """
    if not isinstance(device, str):
        return Choice(_accepting(device, bundle), ())
    if device != "auto":
        if device not in BACKENDS:
            raise UsageError(f"no backend {device!r}; choose from {', '.join(names())}")
        return Choice(_accepting(BACKENDS[device].open(bundle, options), bundle), ())
    problems: list[str] = []
    for name, entry in BACKENDS.items():
        if not entry.is_here(bundle, options):
            continue
        try:
            backend = _accepting(entry.open(bundle, options), bundle)
        except (IncompatibleError, IntegrityError, UsageError) as error:
            problems.append(f"{name} is not used: {error}")
        else:
            return Choice(backend, tuple(problems))
    raise IncompatibleError("no backend here runs this bundle: " + "; ".join(problems))


def names() -> tuple[str, ...]:
    """What `--device` and `load` take."""
    return ("auto", *BACKENDS)


def described() -> str:
    """The table in a line, for help texts."""
    return "; ".join(f"{name}: {entry.what}" for name, entry in BACKENDS.items())


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

    return OnnxRuntime(options.threads)


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
    """Whether this TensorRT is installed, or the cache has a plan of this bundle for it."""
    from cxrgaze.runtime import plans

    if options.plan or options.gpu or find_spec(name):
        return True
    try:
        records = list(plans.Cache(options.cache).records(bundle.sha256))
    except (IntegrityError, UsageError):
        return False
    return any(
        not isinstance(record, IntegrityError) and record.inputs.library == name
        for record in records
    )


BACKENDS: Mapping[str, Entry] = {
    name: Entry(
        "a plan of this bundle for this GPU (cxrgaze-build)",
        partial(_tensorrt, name),
        partial(_is_here, name),
    )
    for name in ("tensorrt", "tensorrt_rtx")
} | {"onnxruntime": Entry("the graph itself on the CPU", _onnxruntime)}
"""Backends by name, in the order that `auto` prefers."""
