"""Films among files, folders and globs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cxrgaze.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")


def find_films(paths: Sequence[Path | str]) -> Iterator[tuple[Path, Path]]:
    """Films among files, folders (searched recursively by suffix) and globs, in sorted order.

    Yields:
        The path, and the path relative to the folder that was given (the name for a file).

    Raises:
        UsageError: a path that does not exist, a folder or glob without films.
    """
    for given in map(Path, paths):
        try:
            yield from _films_of(given)
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{str(given)[:200]!r} cannot be searched: {reason}") from error


def _films_of(given: Path) -> Iterator[tuple[Path, Path]]:
    if given.is_dir():
        films = sorted(path for path in _files_below(given) if _looks_like_film(path))
        if not films:
            raise UsageError(f"{given} holds no films (DICOM, or {', '.join(SUFFIXES)})")
        yield from ((path, path.relative_to(given)) for path in films)
    elif given.exists():
        yield given, Path(given.name)
    elif any(c in str(given) for c in "*?["):
        anchor = Path(given.anchor or ".")
        pattern = str(given.relative_to(given.anchor)) if given.anchor else str(given)
        films = sorted(p for p in anchor.glob(pattern) if p.is_file())
        if not films:
            raise UsageError(f"no file matches {given}")
        yield from ((path, Path(path.name)) for path in films)
    else:
        raise UsageError(f"{given} does not exist")


def _files_below(folder: Path) -> Iterator[Path]:
    """Files below a folder, through links to folders too, each folder once."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root, name) for name in names)


def looks_like_dicom(data: bytes) -> bool:
    """Whether a file begins as DICOM, with its preamble or at once with groups 2 or 8 (PS3.10)."""
    if data[128:132] == b"DICM":
        return True
    has_vr = data[4:6].isalpha() and data[4:6].isupper()
    if data[:2] == b"\x08\0" and not has_vr:  # implicit VR: a length of a few characters
        return int.from_bytes(data[4:8], "little") in range(0, 1 << 12, 2)
    return has_vr and data[:2] in (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08")


def looks_like_image(data: bytes) -> bool:
    """Whether a file begins as PNG, JPEG or TIFF."""
    return data.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*"))


def _looks_like_film(path: Path) -> bool:
    if path.name.startswith(".") or not path.is_file():
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        with path.open("rb") as file:  # archives name DICOM files by their UID, or not at all
            return looks_like_dicom(file.read(132))
    except OSError:
        return False
