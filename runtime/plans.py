"""Plans: what a device built from a bundle, kept in a cache of its owner.

    CACHE/<key>.plan    the serialized engine, as TensorRT wrote it
    CACHE/<key>.json    the record: inputs of the build, what was built, SHA-256 of the plan
    CACHE/timing-*      tactic timings of earlier builds (real TensorRT only)

The key is made of the build's inputs. Whether a plan fits this device is a question to the record,
answered before anything is deserialized. A plan is executable content: the cache must belong to the
user and be writable by nobody else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from pydantic import Field

from cxrgaze.bundles.bundle import Bundle
from cxrgaze.bundles.verdicts import Gate
from cxrgaze.errors import IncompatibleError, IntegrityError, UsageError
from cxrgaze.files import (
    read_regular,
    read_verified,
    render_json,
    sha256,
    write_atomic,
)
from cxrgaze.records import Frozen, Record, parse_record
from cxrgaze.runtime.trt_library import version_number
from cxrgaze.spec import NOTICE

_RECORD_LIMIT = 1 << 20
_PLAN_LIMIT = 4 << 30
_CACHE_VARIABLE = "CXRGAZE_CACHE"

BuiltPrecision = Literal["proven", "contradicted", "opaque"]


class Keyed(Frozen):
    """Everything that a record of the cache depends on; its key is their hash."""

    bundle_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def key(self) -> str:
        """32 hex digits that name the record."""
        return sha256(render_json(self.model_dump(mode="json")))[:32]


class Kept(Record):
    """A record in the cache, in a file of its key's name."""

    notice: str = NOTICE
    bundle_name: str
    inputs: Keyed


AnyKept = TypeVar("AnyKept", bound=Kept)


class PlanInputs(Keyed):
    """Everything that a build depends on; the plan's key is their hash."""

    library: Literal["tensorrt", "tensorrt_rtx"]
    library_version: str = Field(pattern=r"^[0-9][0-9A-Za-z.+-]*$")
    architecture: tuple[str, ...]
    """Compute capabilities that the plan is for, such as "86"; more than one ahead of time only."""
    platform: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Operating system and machine, such as "linux-x86_64"."""
    batch: tuple[int, int, int]
    """Smallest, best and largest batch."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    workspace_bytes: int | None = Field(default=None, gt=0)
    """As asked for; the record has what the build was given."""
    version_compatible: bool = False
    """Loads in later versions of the same major one; such a plan carries host code."""
    hardware_compatible: bool = False
    """Loads on every discrete GPU of compute capability 8.0 and later."""
    tf32: bool = False


class BuiltEngine(Frozen):
    """What the library says of the engine, once it was loaded where it was built."""

    layers: int
    layers_by_type: dict[str, int]
    """Layers by the data type of their first input; "unknown" where the inspector gives none."""
    weight_bytes_by_type: dict[str, int]
    """Of the weights that the inspector shows; fused blocks hide theirs."""
    convolution_macs_by_type: dict[str, int]
    """Multiply-accumulates for one film of the convolutions that the inspector shows."""
    device_memory_bytes: int
    """What an execution context needs beside weights and buffers."""


class PlanRecord(Kept):
    """What was built, beside the plan."""

    VERSION = 3
    WHAT = "plan's record"
    REMEDY = "run: cxrgaze-build --rebuild"

    schema_version: int = VERSION
    inputs: PlanInputs
    plan_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    plan_bytes: int = Field(gt=0, le=_PLAN_LIMIT)
    workspace_bytes: int | None = Field(default=None, gt=0)
    """What the build was given; None is the library's own limit."""
    built_precision: BuiltPrecision
    built_precision_why: str
    engine: BuiltEngine | None = None
    """None where the plan was not loaded: built ahead of time, without its GPU."""
    gate: Gate | None = None
    """Its own verdict, measured on its device; None where that was not done."""
    order: int = Field(default=0, ge=0)
    """Larger for each plan that is stored later, whatever the clock says."""
    build_seconds: float = Field(ge=0)
    created_utc: str
    built_on: dict[str, str]
    """Facts about the machine: GPU or "none", driver, system."""

    @property
    def has_host_code(self) -> bool:
        """Whether loading the plan runs code that it carries on the CPU."""
        return self.inputs.version_compatible


class Cache:
    """An owner-only folder of plans; it is made when the first plan is stored.

    Args:
        folder: None takes `CXRGAZE_CACHE`, else `XDG_CACHE_HOME` or `~/.cache`, `/cxrgaze/plans`.

    Raises:
        IntegrityError: the folder belongs to somebody else, or others can write it.
        UsageError: there is no home folder, and none is given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or _default_folder()
        self._check()

    def make(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            UsageError: it cannot be made.
            IntegrityError: as above.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UsageError(
                f"the plan cache {self.folder} cannot be made: {error.strerror}; choose another "
                f"with --cache or {_CACHE_VARIABLE}"
            ) from error
        self._check()

    def _check(self) -> None:
        try:
            status = self.folder.lstat()
        except OSError:  # not there, or not ours to see: no plans
            return
        if not stat.S_ISDIR(status.st_mode):
            raise IntegrityError(f"the plan cache {self.folder} is not a folder (a link is none)")
        if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
            raise IntegrityError(
                f"the plan cache {self.folder} can be written by others than you: a plan is "
                f"executable content. Run: chmod 700 {self.folder}, or choose another folder"
            )

    def plan_path(self, inputs: PlanInputs) -> Path:
        """Where the plan of these inputs is or would be."""
        return self.folder / f"{inputs.key}.plan"

    def find(self, inputs: PlanInputs) -> PlanRecord | None:
        """The record of exactly these inputs, or None.

        Raises:
            IntegrityError: a record is there and malformed, or another build's.
        """
        path = self.plan_path(inputs).with_suffix(".json")
        if not path.exists() and not path.is_symlink():
            return None
        record = read_record(path)
        if record.inputs != inputs:
            raise IntegrityError(f"{path} is the record of another build; run: cxrgaze-build")
        return record

    def records(self, bundle_sha256: str) -> Iterator[PlanRecord | IntegrityError]:
        """Records of a bundle's plans, and what is wrong with those that cannot be read."""
        return kept_in(self.folder, PlanRecord, ".json", bundle_sha256)

    def fitting(
        self,
        bundle: Bundle,
        site: PlanSite,
        *,
        allow_host_code: bool = False,
        key: str | None = None,
    ) -> PlanRecord:
        """The best plan of a bundle that fits what is here; nothing is deserialized.

        One that passed its own gate goes before others, then one with fewer liberties and more
        optimization, then the latest.

        Args:
            key: no other plan than this.

        Raises:
            IncompatibleError: there is none, with what is wrong with those that there are.
        """
        fit: list[PlanRecord] = []
        wrong: list[str] = []
        for record in self.records(bundle.sha256):
            if isinstance(record, IntegrityError):
                wrong.append(str(record))
                continue
            if key not in (None, record.inputs.key):
                continue
            try:
                require_fit(record, site, allow_host_code=allow_host_code)
                fit.append(record)
            except IncompatibleError as error:
                wrong.append(str(error))
        if fit:
            return max(fit, key=_preference)
        which = f"no plan {key}" if key else "no plan"
        raise IncompatibleError(
            f"{which} of this bundle for this device in {self.folder}; run: cxrgaze-build "
            f"{bundle.path}" + "".join(f" [{problem}]" for problem in wrong)
        )

    def remove(self, inputs: PlanInputs) -> None:
        """Delete the plan of these inputs and its record, if they are there."""
        path = self.plan_path(inputs)
        path.with_suffix(".json").unlink(missing_ok=True)  # first: no record without its plan
        path.unlink(missing_ok=True)

    def timing_path(self, inputs: PlanInputs) -> Path:
        """Where the tactic timings of this library and architecture lie."""
        parts = (inputs.library, inputs.library_version, *inputs.architecture)
        return self.folder / f"timing-{'-'.join(parts)}"

    def store(self, record: PlanRecord, plan: bytes) -> PlanRecord:
        """Write the plan, then its record: a record never lies about a plan that is not there.

        Returns:
            The record with its place in the order of plans.
        """
        self.make()
        stored = self.records(record.inputs.bundle_sha256)
        orders = [r.order for r in stored if not isinstance(r, IntegrityError)]
        record = record.model_copy(update={"order": max(orders, default=0) + 1})
        write_atomic(self.plan_path(record.inputs), plan)
        self.store_record(record)
        return record

    def store_record(self, record: PlanRecord) -> None:
        """Write the record of a plan that is there."""
        path = self.plan_path(record.inputs).with_suffix(".json")
        write_atomic(path, record.rendered())

    def read(self, record: PlanRecord) -> bytes:
        """The plan's bytes, verified; deserialize these and never the path.

        Raises:
            IntegrityError: missing, of another size, altered.
        """
        return read_verified(
            self.plan_path(record.inputs),
            record.plan_bytes,
            record.plan_sha256,
            source="its record",
            remedy="run: cxrgaze-build --rebuild",
        )


def kept_in(
    folder: Path, kind: type[AnyKept], suffix: str, bundle_sha256: str
) -> Iterator[AnyKept | IntegrityError]:
    """Records of a bundle in a cache, and what is wrong with those that cannot be read.

    None where the folder is not there, or not ours to see.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == suffix)
    except OSError:
        return
    for path in paths:
        try:
            record = read_kept(kind, path)
        except IntegrityError as error:
            yield error
            continue
        if record.inputs.bundle_sha256 == bundle_sha256:
            yield record


def read_record(path: Path) -> PlanRecord:
    """The record of a plan (`read_kept`)."""
    return read_kept(PlanRecord, path)


def read_kept(kind: type[AnyKept], path: Path) -> AnyKept:
    """A record of the cache from its file.

    Raises:
        IntegrityError: too large, a link, no record, of another schema version or another name.
    """
    try:
        data = read_regular(path, _RECORD_LIMIT)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}") from error
    record = parse_record(kind, data, str(path))
    if path.stem != record.inputs.key:
        raise IntegrityError(f"{path} is not the {kind.WHAT} of its name; {kind.REMEDY}")
    return record


def _preference(record: PlanRecord) -> tuple[object, ...]:
    built = record.inputs
    return (
        record.gate is not None and record.gate.verdict == "pass",
        not built.tf32,
        _DEFAULT_LEVEL if built.optimization_level is None else built.optimization_level,
        not built.hardware_compatible,
        not built.version_compatible,
        record.order,
    )


_DEFAULT_LEVEL = 3  # TensorRT's own (IBuilderConfig.builder_optimization_level)


class PlanSite(NamedTuple):
    """What a plan must fit."""

    library: str
    library_version: str
    capability: str
    """Compute capability of the GPU, such as "87"."""
    platform: str


def require_fit(record: PlanRecord, site: PlanSite, *, allow_host_code: bool = False) -> None:
    """Refuse a plan that was built for something else; nothing is deserialized.

    Args:
        allow_host_code: take a plan that brings code of its own for the CPU.

    Raises:
        IncompatibleError: saying what it was built for, what is here, and what to run.
    """
    built = record.inputs
    same_library = built.library == site.library and (
        built.library_version == site.library_version
        or (
            built.version_compatible
            and version_number(built.library_version) <= version_number(site.library_version)
            and version_number(built.library_version)[0] == version_number(site.library_version)[0]
        )
    )
    same_device = site.capability in built.architecture or (
        built.hardware_compatible and int(site.capability) >= 80
    )
    if not same_library or not same_device or built.platform != site.platform:
        raise IncompatibleError(
            f"the plan was built for {built.library} {built.library_version}, compute capability "
            f"{'/'.join(built.architecture)}, {built.platform}; here is {site.library} "
            f"{site.library_version}, compute capability {site.capability}, {site.platform}. "
            f"Run: cxrgaze-build {record.bundle_name}.cxrgaze"
        )
    if record.has_host_code and not allow_host_code:
        raise IncompatibleError(
            "the plan is version-compatible: it carries code that runs on the CPU when it is "
            "loaded. Allow that with --allow-host-code if you built it yourself, or build without "
            "--version-compatible"
        )


_MAGIC = {"tensorrt": b"ftrt", "tensorrt_rtx": b"vtrt"}
_VERSION_AT = 24
_HEADER = 64


def check_header(plan: bytes, inputs: PlanInputs) -> None:
    """Refuse bytes that do not begin like a plan of the recorded library and version.

    TensorRT writes a magic number first and its version as four bytes at offset 24, which
    `trtexec --getPlanVersionOnly` reads (TensorRT, samples/common/sampleEngines.cpp); TensorRT-RTX
    1.7.1 does the same with another magic number (seen in its plans).

    Raises:
        IntegrityError: not a plan.
        IncompatibleError: a plan of another version than its record says.
    """
    magic = _MAGIC[inputs.library]
    if len(plan) < _HEADER or plan[:4] != magic:
        raise IntegrityError(
            f"the plan {inputs.key} begins with {plan[:4]!r}, a plan of {inputs.library} with "
            f"{magic!r}: it is none; run: cxrgaze-build --rebuild"
        )
    said = version_number(inputs.library_version)[:3]
    written_by = tuple(plan[_VERSION_AT : _VERSION_AT + 3])
    if written_by != said:
        raise IncompatibleError(
            f"the plan {inputs.key} was written by version {'.'.join(map(str, written_by))}, its "
            f"record says {inputs.library_version}; run: cxrgaze-build --rebuild"
        )


def _default_folder() -> Path:
    if given := os.environ.get(_CACHE_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "cxrgaze" / "plans"
    except RuntimeError as error:  # no HOME, and no entry for this user
        raise UsageError(
            f"this user has no home folder for a plan cache; give one with --cache or "
            f"{_CACHE_VARIABLE}"
        ) from error
