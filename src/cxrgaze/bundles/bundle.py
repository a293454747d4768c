"""The bundle: a folder `NAME.cxrgaze/` with a typed graph and a manifest that binds every file.

The manifest is canonical: its bytes are the one rendering of its content, and its `digest` is the
SHA-256 of that rendering with an empty digest. With the SHA-256 of every other file inside it, any
changed byte of a bundle is seen. A bundle is written whole or not at all and never changed after.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cxrgaze.bundles import npz
from cxrgaze.bundles.manifest import FileRecord, Manifest
from cxrgaze.errors import IntegrityError, UsageError
from cxrgaze.files import (
    checked_relative,
    read_regular,
    read_verified,
    sha256,
)
from cxrgaze.records import parse_record

SUFFIX = ".cxrgaze"
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
"""Optional signature over the manifest (`cxrgaze.bundles.signature`)."""
GRAPH = "model.onnx"
GOLDEN = "reference/golden.npz"
REFERENCE = "reference/gate.npz"
"""fp32 outputs on the gate's films, where there was a gate."""
SEEN = "reference/seen.txt"
"""Films and patients that the network was trained on, where that is known, as hashes."""
CARD = "card.json"
"""The checkpoint's card, where there was one (`cxrgaze.train.card`)."""
PRIOR = "reference/centre_prior.npz"
"""Centre prior of the training films, where they have gaze."""
_MANIFEST_LIMIT = 16 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: a checked manifest, and files that are verified as they are read."""

    path: Path
    manifest: Manifest
    sha256: str
    """SHA-256 of the manifest's bytes: the identity of the bundle."""
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)
    """Files whose bytes were read and found to be those of the manifest."""

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Read and check the manifest.

        Raises:
            UsageError: `path` is no bundle.
            IntegrityError: malformed, altered, or of another schema version.
        """
        path = Path(path)
        try:
            if not (path / MANIFEST).exists():
                raise UsageError(_no_bundle(path))
            data = read_regular(path / MANIFEST, _MANIFEST_LIMIT)
        except OSError as error:
            raise UsageError(f"{path / MANIFEST} cannot be read: {error.strerror}") from error
        manifest = parse_record(Manifest, data, str(path / MANIFEST))
        return cls(path, manifest, sha256(data))

    def read(self, name: str) -> bytes:
        """Bytes of one listed file, verified; load from these, never from the path.

        Raises:
            IntegrityError: missing, of another size, or altered.
        """
        record = self._records.get(name)
        if record is None:
            raise IntegrityError(f"{self.path}: {name} is not listed in {MANIFEST}")
        file = self.path / name
        if file.resolve() != self.path.resolve() / name:
            raise IntegrityError(f"{file} is reached through a link; expected a plain folder")
        data = read_verified(
            file,
            record.size,
            record.sha256,
            source="the manifest",
            remedy="copy or export the bundle again",
        )
        self._verified.add(name)
        return data

    def __contains__(self, name: str) -> bool:
        """Whether a file is listed."""
        return name in self._records

    @cached_property
    def _records(self) -> dict[str, FileRecord]:
        return {record.path: record for record in self.manifest.files}

    def read_arrays(self, name: str, expected: npz.Expected) -> dict[str, NDArray[Any]]:
        """The arrays of a listed `.npz` file, verified; nothing in it is unpickled.

        Args:
            expected: type and shape by name; None stands for the number of films, alike in all.

        Raises:
            IntegrityError: as `read`, or not these arrays.
        """
        return npz.read(self.read(name), expected, str(self.path / name))

    def verify(self, leave: Collection[str] = ()) -> None:
        """Read every listed file that was not read yet, but those in `leave`.

        What is left is the caller's to read (`read` verifies), or to verify by a second call.

        Raises:
            IntegrityError: as `read`, or there is a file or a link that is not listed.
        """
        listed = {MANIFEST, SIGNATURE, *self._records}
        for file in self.path.rglob("*"):
            is_folder = file.is_dir() and not file.is_symlink()
            if not is_folder and file.relative_to(self.path).as_posix() not in listed:
                raise IntegrityError(f"{file} does not belong to the bundle; remove it")
        for name in self._records:
            if name not in leave and name not in self._verified:
                self.read(name)


def fill_bundle(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write manifest and files into the empty `folder` of `new_folder`, and verify them."""
    records = tuple(
        FileRecord(path=name, size=len(data), sha256=sha256(data)) for name, data in files.items()
    )
    manifest = manifest.model_copy(update={"files": records})
    for name, data in files.items():
        (folder / checked_relative(name)).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_bytes(manifest.rendered())
    bundle = Bundle.open(folder)
    bundle.verify()
    return bundle


def bundle_path(output: Path, name: str) -> Path:
    """`output` itself if it is named as a bundle, else the bundle `name` inside it."""
    return output if output.suffix == SUFFIX else output / f"{name}{SUFFIX}"


def _no_bundle(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist; expected a bundle made by cxrgaze-export"
    inside = sorted(p.name for p in path.glob(f"*{SUFFIX}")) if path.is_dir() else []
    hint = f"; did you mean {path / inside[0]}?" if inside else "; make one with cxrgaze-export"
    return f"{path} is not a bundle: it has no {MANIFEST}{hint}"
