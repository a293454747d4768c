"""The bundle: a folder `NAME.cxrgaze/` with a typed graph and a manifest that binds every file.

The manifest is canonical: its bytes are the one rendering of its content, and its `digest` is the
SHA-256 of that rendering with an empty digest. With the SHA-256 of every other file inside it, any
changed byte of a bundle is seen. A bundle is written whole or not at all and never changed after.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
_MANIFEST_LIMIT = 16 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: a checked manifest, and files that are verified as they are read."""

    path: Path
    manifest: Manifest
    sha256: str
    """SHA-256 of the manifest's bytes: the identity of the bundle."""

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Read and check the manifest.

        Raises:
            UsageError: `path` is no bundle.
            IntegrityError: malformed, altered, or of another schema version.
        """
        path = Path(path)
        if not (path / MANIFEST).exists():
            raise UsageError(_no_bundle(path))
        data = read_regular(path / MANIFEST, _MANIFEST_LIMIT)
        manifest = parse_record(Manifest, data, str(path / MANIFEST))
        return cls(path, manifest, sha256(data))

    def read(self, name: str) -> bytes:
        """Bytes of one listed file, verified; load from these, never from the path.

        Raises:
            IntegrityError: missing, of another size, or altered.
        """
        record = next((r for r in self.manifest.files if r.path == name), None)
        if record is None:
            raise IntegrityError(f"{self.path}: {name} is not listed in {MANIFEST}")
        file = self.path / name
        if file.resolve() != self.path.resolve() / name:
            raise IntegrityError(f"{file} is reached through a link; expected a plain folder")
        return read_verified(
            file,
            record.size,
            record.sha256,
            source="the manifest",
            remedy="copy or export the bundle again",
        )

    def read_arrays(
        self, name: str, expected: Mapping[str, tuple[np.dtype[Any], tuple[int | None, ...]]]
    ) -> dict[str, NDArray[Any]]:
        """The arrays of a listed `.npz` file, verified; nothing in it is unpickled.

        Args:
            expected: type and shape by name; None stands for the number of films, alike in all.

        Raises:
            IntegrityError: as `read`, or not these arrays.
        """
        where = self.path / name
        try:
            with np.load(io.BytesIO(self.read(name)), allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in expected}
        except (KeyError, ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise IntegrityError(f"{where} is malformed: {error}") from error
        films = [arrays[k].shape[:1] or (0,) for k, (_, s) in expected.items() if s[0] is None]
        for key, (dtype, shape) in expected.items():
            wanted = (*films[0], *shape[1:]) if shape[0] is None else shape
            if arrays[key].shape != wanted or arrays[key].dtype != dtype:
                raise IntegrityError(
                    f"{where}: {key} is {arrays[key].dtype} {arrays[key].shape}, expected "
                    f"{dtype} {wanted}"
                )
        return arrays

    def verify(self, leave: Collection[str] = ()) -> None:
        """Read every listed file once, but those in `leave`, which the caller reads itself.

        Raises:
            IntegrityError: as `read`, or there is a file that is not listed.
        """
        listed = {MANIFEST, SIGNATURE, *(record.path for record in self.manifest.files)}
        for file in self.path.rglob("*"):
            if not file.is_dir() and file.relative_to(self.path).as_posix() not in listed:
                raise IntegrityError(f"{file} does not belong to the bundle; remove it")
        for record in self.manifest.files:
            if record.path not in leave:
                self.read(record.path)


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
