"""Films among files, folders and globs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cxrgaze.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")


@dataclass(frozen=True)
class Found:
    """What files, folders and globs hold."""

    films: tuple[tuple[Path, Path], ...]
    """The path of each, and the path relative to the folder that was given (a file's name)."""
    skipped: tuple[tuple[Path, str], ...]
    """Other files in the folders that were given, and why each is taken for no film."""


def find_films(paths: Sequence[Path | str]) -> Found:
    """Films among files, folders (searched recursively) and globs, in sorted order.

    In a folder a file is a film by its suffix or by how its content begins; a file that is named
    is one, whatever it holds.

    Raises:
        UsageError: a path that does not exist, a folder or glob without films.
    """
    films: list[tuple[Path, Path]] = []
    skipped: list[tuple[Path, str]] = []
    for given in map(Path, paths):
        try:
            if given.is_dir():
                _search(given, films, skipped)
            else:
                films += _named(given)
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{str(given)[:200]!r} cannot be searched: {reason}") from error
    return Found(tuple(films), tuple(skipped))


def _search(folder: Path, films: list[tuple[Path, Path]], skipped: list[tuple[Path, str]]) -> None:
    found = []
    for path in sorted(_files_below(folder)):
        if reason := _no_film(path):
            skipped.append((path, reason))
        else:
            found.append((path, path.relative_to(folder)))
    if not found:
        raise UsageError(f"{folder} holds no films (DICOM, or {', '.join(SUFFIXES)})")
    films += found


def _named(given: Path) -> Iterator[tuple[Path, Path]]:
    if given.exists():
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


def _no_film(path: Path) -> str:
    """Why a file in a folder is taken for no film; empty where it is taken for one."""
    if path.name.startswith("."):
        return "a hidden file"
    try:
        if not path.is_file():
            return "no regular file"
        if path.suffix.lower() in SUFFIXES:
            return ""
        with path.open("rb") as file:  # archives name DICOM files by their UID, or not at all
            head = file.read(132)
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    is_film = looks_like_dicom(head) or looks_like_image(head)
    return "" if is_film else "neither DICOM nor PNG, JPEG or TIFF by its name or content"
