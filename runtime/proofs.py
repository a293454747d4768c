"""Proofs: what was found of a bundle on a library that compiles the graph when it loads it.

    CACHE/<key>.proof   JSON: what it depends on, the built precision, the verdict at engine level

There is no plan: the engine is made anew from the bundle's verified bytes each time, so a proof
holds for what it was made with and nothing else: this bundle, version, device and processor. They
lie beside the plans, in the cache that is writable by nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from cxrgaze.bundles.verdicts import Gate
from cxrgaze.errors import IntegrityError
from cxrgaze.files import write_atomic
from cxrgaze.runtime import host
from cxrgaze.runtime.plans import (
    BuiltEngine,
    BuiltPrecision,
    Cache,
    Kept,
    Keyed,
    kept_in,
    read_kept,
)

SUFFIX = ".proof"


class ProofInputs(Keyed):
    """Everything that a proof depends on; its key is their hash."""

    library: Literal["openvino"]
    library_version: str
    device: str = Field(pattern=r"^[A-Z]+$")
    """By the library's own name: CPU, GPU."""
    processor: str
    """Name of the CPU."""
    features: tuple[str, ...]
    """Instructions of it that decide which kernels run (`host.cpu_features`)."""
    platform: str

    @property
    def asked(self) -> str:
        """What `--device` takes for it."""
        return self.library if self.device == "CPU" else f"{self.library}:{self.device}"


class ProofRecord(Kept):
    """What was found."""

    VERSION = 1
    WHAT = "proof"
    REMEDY = "make it again: cxrgaze-build --device openvino --gate SET"

    schema_version: int = VERSION
    inputs: ProofInputs
    built_precision: BuiltPrecision
    built_precision_why: str
    engine: BuiltEngine
    gate: Gate | None = None
    """None where accuracy was not measured."""
    created_utc: str


def inputs_here(
    bundle_sha256: str, library: Literal["openvino"], version: str, device: str
) -> ProofInputs:
    """What a proof on this machine depends on."""
    return ProofInputs(
        bundle_sha256=bundle_sha256,
        library=library,
        library_version=version,
        device=device,
        processor=host.cpu_name(),
        features=host.cpu_features(),
        platform=host.host_platform(),
    )


def find(cache: Cache, inputs: ProofInputs) -> ProofRecord | None:
    """The proof of exactly these inputs, or None.

    Raises:
        IntegrityError: a record is there and malformed, or of something else.
    """
    path = cache.folder / f"{inputs.key}{SUFFIX}"
    return read_kept(ProofRecord, path) if path.exists() or path.is_symlink() else None


def records(cache: Cache, bundle_sha256: str) -> Iterator[ProofRecord | IntegrityError]:
    """Proofs of a bundle, and what is wrong with those that cannot be read."""
    return kept_in(cache.folder, ProofRecord, SUFFIX, bundle_sha256)


def store(cache: Cache, record: ProofRecord) -> None:
    """Write a proof, in place of an older one of the same inputs."""
    cache.make()
    write_atomic(cache.folder / f"{record.inputs.key}{SUFFIX}", record.rendered())
