"""The backend contract: what runs the graph of a bundle, and what it says of itself.

A backend for another library writes `name`, `activate`, `infer` and `deactivate`; the rest has
defaults that fit one that runs the graph itself on the CPU. docs and test:
CONTRIBUTING.md, "A backend".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from cxrgaze.bundles.bundle import Bundle
from cxrgaze.bundles.manifest import Arithmetic, Manifest, Precision, Target
from cxrgaze.bundles.verdicts import Gate
from cxrgaze.spec import Outputs

ANY_TARGET: frozenset[Target] = frozenset(get_args(Target))


class Backend(ABC):
    """Runs the graph of a bundle.

    `activate` may be slow and takes memory, `infer` is the hot path, `deactivate` frees everything
    and may be called twice. One thread at a time, but for `infer`, where `at_once` says more.
    """

    name: str
    device: str = "cpu"
    """Where it runs, for the record: "cpu", a GPU's name."""
    at_once: int = 1
    """Threads that may call `infer` at the same time."""
    serves: Mapping[Precision, frozenset[Target]] = {"fp32": ANY_TARGET, "fp16": ANY_TARGET}
    """Targets by precision: fp32 and fp16 graphs run anywhere, int8 ones on their own target."""
    gate: Gate | None = None
    """Verdict on what this backend runs, where that is not the bundle's graph itself."""
    notes: tuple[str, ...] = ()
    """What every reading must say of it, once it is active."""
    identity: Mapping[str, str] = {}
    """What a reading must name of what ran beside the bundle: a plan, and its library."""
    stages_ms: Mapping[str, float] = {}
    """Parts of the last `infer` by the device's clock: h2d, compute, d2h; empty on a CPU."""
    memory_bytes: Mapping[str, int] = {}
    """The size of the plan, and what it takes on the device; empty on a CPU."""

    def arithmetic(self, manifest: Manifest) -> Arithmetic:
        """What it computes this bundle in, once it is active: the key of the self-test's tolerance.

        By default what the graph says.
        """
        return _ARITHMETIC[manifest.precision]

    @abstractmethod
    def activate(self, bundle: Bundle) -> None:
        """Load the graph from verified bytes (`Bundle.read`), never from a path.

        Raises:
            IntegrityError: the graph is not what the manifest says.
        """

    @abstractmethod
    def infer(self, image: NDArray[np.float32]) -> Outputs:
        """The heads of `image` `(N, 1, H, W)` float32 in [0, 1], any N >= 1, those of the spec."""

    @abstractmethod
    def deactivate(self) -> None:
        """Free the graph."""


_ARITHMETIC: dict[Precision, Arithmetic] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}


@dataclass(frozen=True)
class BackendOptions:
    """What a caller of `load` asks of the backends that cxrgaze opens."""

    threads: int | None = None
    """CPU threads; None leaves the choice to the backend."""
    at_once: int = 1
    """Films that are to be inferred at the same time, where the backend can."""
    cache: Path | None = None
    """Folder of plans (`cxrgaze.runtime.plans.Cache`)."""
    allow_host_code: bool = False
    """Load plans that bring code of their own for the CPU."""
    plan: str | None = None
    """Key of the plan to take; None leaves the choice to the backend."""
    gpu: str | None = None
    """Index or UUID of the GPU; None is the first."""
    where: str = ""
    """Device of the backend's own, as GPU of openvino:GPU; "" is its first."""
