"""The backend contract, and the choice of a backend for a bundle on this machine."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundle import Bundle, Precision, Target
from cxrgaze.errors import IncompatibleError, UsageError


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
    precisions: frozenset[Precision]
    targets: frozenset[Target]

    def activate(self, bundle: Bundle) -> None:
        """Load the graph from verified bytes.

        Raises:
            IntegrityError: the graph is not what the manifest says.
        """
        ...

    def infer(self, image: NDArray[np.float32]) -> Outputs:
        """Both heads of `image` `(N, 1, H, W)` float32 in [0, 1], any N >= 1."""
        ...

    def deactivate(self) -> None:
        """Free the graph."""
        ...


NAMES = ("onnxruntime",)
"""Backends of this version, in the order that `auto` prefers."""


def choose(bundle: Bundle, name: str, threads: int | None) -> Backend:
    """The backend called `name`, or the preferred one that accepts the bundle for "auto".

    Raises:
        UsageError: no backend of that name.
        IncompatibleError: it does not accept the bundle's precision or target.
    """
    if name not in ("auto", *NAMES):
        raise UsageError(
            f"no backend {name!r} in this version; choose from auto, {', '.join(NAMES)}"
        )
    from cxrgaze.runtime.ort import OnnxRuntime

    backend: Backend = OnnxRuntime(threads)
    manifest = bundle.manifest
    if manifest.precision not in backend.precisions or manifest.target not in backend.targets:
        raise IncompatibleError(
            f"{backend.name} does not serve {manifest.precision} graphs for target "
            f"{manifest.target}; export again with another --precision or --target"
        )
    return backend
