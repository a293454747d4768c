"""The backend contract, and the choice of a backend for a bundle on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundle import Bundle, Gate, Precision, Target
from cxrgaze.errors import IncompatibleError, UsageError
from cxrgaze.runtime.host import host_platform


class Outputs(NamedTuple):
    """What a backend returns; the arrays belong to the caller."""

    logits: NDArray[np.float32]
    """`(N, C)`."""
    log_density: NDArray[np.float32]
    """`(N, 1, H, W)`."""


class Backend(Protocol):
    """Runs the graph of a bundle.

    `activate` may be slow and takes memory, `infer` is the hot path, `deactivate` frees everything
    and may be called twice. One thread at a time.
    """

    name: str
    device: str
    """Where it runs, for the record: "cpu", a GPU's name."""
    serves: Mapping[Precision, frozenset[Target]]
    """Targets by precision: fp32 and fp16 graphs run anywhere, int8 ones on their own target."""
    tolerance: str
    """Key of its self-test tolerance in the manifest."""

    @property
    def gate(self) -> Gate | None:
        """Verdict on what this backend runs, where that is not the bundle's graph itself."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What every reading must say of it, once it is active."""
        ...

    def activate(self, bundle: Bundle) -> None:
        """Load the graph from verified bytes.

        Raises:
            IntegrityError: the graph is not what the manifest says.
        """
        ...

    @property
    def stages_ms(self) -> Mapping[str, float]:
        """Parts of the last `infer` by the device's clock: h2d, compute, d2h; empty on a CPU."""
        ...

    @property
    def memory_bytes(self) -> Mapping[str, int]:
        """The size of the plan, and what it takes on the device; empty on a CPU."""
        ...

    def infer(self, image: NDArray[np.float32]) -> Outputs:
        """Both heads of `image` `(N, 1, H, W)` float32 in [0, 1], any N >= 1."""
        ...

    def deactivate(self) -> None:
        """Free the graph."""
        ...


NAMES = ("tensorrt", "tensorrt_rtx", "onnxruntime")
"""Backends, in the order that `auto` prefers."""


@dataclass(frozen=True)
class Wish:
    """What a caller of `load` asks of the backend."""

    device: str = "auto"
    """"auto" or one of `NAMES`."""
    threads: int | None = None
    """CPU threads; None leaves the choice to the backend."""
    cache: Path | None = None
    """Folder of plans (`cxrgaze.runtime.plans.Cache`)."""
    allow_host_code: bool = False
    """Load plans that bring code of their own for the CPU."""


class Choice(NamedTuple):
    """A backend, and why it is not the one that `auto` prefers."""

    backend: Backend
    warnings: tuple[str, ...]


def choose(bundle: Bundle, wish: Wish = Wish()) -> Choice:
    """The backend that was asked for, or the preferred one that accepts the bundle.

    A TensorRT beside a GPU that has no plan of this bundle leaves it to ONNX Runtime, and the
    warning for the readings says so. Asked for by name and not to be had is an error.

    Raises:
        UsageError: no backend of that name.
        IncompatibleError: it is not installed, or does not accept the bundle; no plan fits.
        IntegrityError: the plan cache can be written by others.
    """
    if wish.device not in ("auto", *NAMES):
        raise UsageError(f"no backend {wish.device!r}; choose from auto, {', '.join(NAMES)}")
    if wish.device != "auto":
        make = _onnxruntime if wish.device == "onnxruntime" else _tensorrt
        return Choice(_accepting(make(bundle, wish, wish.device), bundle), ())
    warnings: list[str] = []
    for name in tensorrts_beside_a_gpu():
        try:
            return Choice(_accepting(_tensorrt(bundle, wish, name), bundle), tuple(warnings))
        except IncompatibleError as error:
            warnings.append(f"{name} is not used: {error}")
    return Choice(_accepting(_onnxruntime(bundle, wish, "onnxruntime"), bundle), tuple(warnings))


def _accepting(backend: Backend, bundle: Bundle) -> Backend:
    manifest = bundle.manifest
    if manifest.target not in backend.serves.get(manifest.precision, frozenset()):
        raise IncompatibleError(
            f"{backend.name} does not serve {manifest.precision} graphs for target "
            f"{manifest.target}; export again with another --precision or --target"
        )
    return backend


ANY: frozenset[Target] = frozenset({"tensorrt", "cpu"})


def _onnxruntime(bundle: Bundle, wish: Wish, name: str) -> Backend:
    from cxrgaze.runtime.ort import OnnxRuntime

    return OnnxRuntime(wish.threads)


def tensorrts_beside_a_gpu() -> list[str]:
    """TensorRTs that could run here; none without a GPU, whatever is installed."""
    from cxrgaze.runtime import device, trt_library

    if isinstance(device.gpus(), str):  # asked first: importing a TensorRT takes its time
        return []
    return list(trt_library.versions())


def _tensorrt(bundle: Bundle, wish: Wish, name: str) -> Backend:
    from cxrgaze.runtime import device, plans, trt_library
    from cxrgaze.runtime.trt import TensorRT

    library = trt_library.find(name)
    if isinstance(gpus := device.gpus(), str):
        raise IncompatibleError(f"no GPU to run on: {gpus}")
    cache = plans.Cache(wish.cache)
    here = plans.Here(library.name, library.version, gpus[0].capability, host_platform())
    record = cache.fitting(bundle, here, allow_host_code=wish.allow_host_code)
    return TensorRT(library, cache, record, allow_host_code=wish.allow_host_code)
