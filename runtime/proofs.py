"""Proofs: what was found of a bundle on a library that compiles the graph when it loads it.

    CACHE/<key>.proof   JSON: what it depends on, the built precision, the verdict at engine level

There is no plan: the engine is made anew from the bundle's verified bytes each time, so a proof
holds for what it was made with and nothing else: this bundle, version, device and processor. They
lie beside the plans, in the cache that is writable by nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from cxrgaze.bundles.verdicts import Gate
from cxrgaze.errors import IntegrityError
from cxrgaze.files import read_regular, render_json, sha256, write_atomic
from cxrgaze.records import Frozen, Record, parse_record
from cxrgaze.runtime import host
from cxrgaze.runtime.plans import BuiltEngine, BuiltPrecision, Cache
from cxrgaze.spec import NOTICE

_LIMIT = 1 << 20
SUFFIX = ".proof"


class ProofInputs(Frozen):
    """Everything that a proof depends on; its key is their hash."""

    bundle_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
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
    def key(self) -> str:
        """32 hex digits that name the proof."""
        return sha256(render_json(self.model_dump(mode="json")))[:32]

    @property
    def asked(self) -> str:
        """What `--device` takes for it."""
        return self.library if self.device == "CPU" else f"{self.library}:{self.device}"


class ProofRecord(Record):
    """What was found."""

    VERSION = 1
    WHAT = "proof"
    REMEDY = "make it again: cxrgaze-build --device openvino --gate SET"

    schema_version: int = VERSION
    notice: str = NOTICE
    bundle_name: str
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
    return _read(path) if path.exists() or path.is_symlink() else None


def records(cache: Cache, bundle_sha256: str) -> Iterator[ProofRecord | IntegrityError]:
    """Proofs of a bundle, and what is wrong with those that cannot be read."""
    try:
        listed = sorted(p for p in cache.folder.iterdir() if p.suffix == SUFFIX)
    except OSError:  # not there, or not ours to see
        return
    for path in listed:
        try:
            record = _read(path)
        except IntegrityError as error:
            yield error
            continue
        if record.inputs.bundle_sha256 == bundle_sha256:
            yield record


def _read(path: Path) -> ProofRecord:
    try:
        data = read_regular(path, _LIMIT)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
    record = parse_record(ProofRecord, data, str(path))
    if record.inputs.key != path.stem:
        raise IntegrityError(f"{path} is the proof of something else; {ProofRecord.REMEDY}")
    return record


def store(cache: Cache, record: ProofRecord) -> None:
    """Write a proof, in place of an older one of the same inputs."""
    cache.make()
    write_atomic(cache.folder / f"{record.inputs.key}{SUFFIX}", record.rendered())
