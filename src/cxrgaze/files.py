"""Files read once and verified, written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from cxrgaze.errors import IntegrityError, UsageError


def sha256(data: bytes) -> str:
    """SHA-256 of bytes, 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def read_regular(path: Path, limit: int) -> bytes:
    """Bytes of a regular file of at most `limit` bytes; links, pipes and devices are refused.

    Raises:
        IntegrityError: not a regular file, or larger than `limit`.
        OSError: missing or unreadable.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if path.is_symlink():
            raise IntegrityError(f"{path} is a link; expected a regular file") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError(f"{path} is not a regular file")
        if status.st_size > limit:
            raise IntegrityError(f"{path} has {status.st_size} bytes, expected at most {limit}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(status.st_size + 1)
    finally:
        os.close(descriptor)
    if len(data) != status.st_size:
        raise IntegrityError(f"{path} changed its size while it was read")
    return data


def read_verified(path: Path, size: int, digest: str, *, source: str, remedy: str) -> bytes:
    """Bytes of a regular file that must have this size and SHA-256; use these, never the path.

    Args:
        source: what says so, for the message: "the manifest".
        remedy: what to do otherwise.

    Raises:
        IntegrityError: missing, a link, of another size, altered.
    """
    try:
        data = read_regular(path, size)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    if len(data) != size or sha256(data) != digest:
        raise IntegrityError(
            f"{path} was altered: {len(data)} bytes, SHA-256 {sha256(data)[:12]}..., {source} says "
            f"{size} bytes, {digest[:12]}...; {remedy}"
        )
    return data


def checked_relative(name: str) -> PurePosixPath:
    """The relative POSIX path `name`, refused if it could leave its folder.

    Raises:
        ValueError: absolute, empty, with `..`, a backslash or a NUL byte.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not a relative path inside the folder")
    if str(path) != name:
        raise ValueError(f"{name!r} is not in its shortest form {str(path)!r}")
    return path


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `data`; duplicate keys, NaN and lone surrogates are refused.

    Raises:
        IntegrityError: not such an object; `name` is used in the message.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("duplicate keys")
        return value

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is not a JSON number")

    try:
        value = json.loads(data, object_pairs_hook=unique, parse_constant=no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # refuses escapes of lone surrogates
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError among them
        raise IntegrityError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{name} holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        UsageError: not TOML; `name` is used in the message.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not valid TOML: {error}") from error
    return tables


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UsageError: it cannot be read, or is not TOML.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error


def render_json(value: Any) -> bytes:
    """The one rendering of a JSON value: UTF-8, two spaces, keys in their order, final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all: a sibling file, fsync, rename.

    Raises:
        OSError: naming `path`: its folder cannot be written, the disk is full; it is as it was.
    """
    try:
        _write_atomic(path, data)
    except OSError as error:
        error.filename = str(path)  # a full disk names none
        raise


def _write_atomic(path: Path, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _lock(file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def make_output_folder(path: Path) -> Path:
    """Make the folder `path` with its parents and check that it can be written.

    What a run that was killed left half-written in it goes.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        for part in path.rglob(f".*{_PART}"):
            if part.is_file() and not part.is_symlink():
                _remove_stale(part)
        return path
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write to {path}: {reason}; choose another --output") from error


@contextlib.contextmanager
def new_folder(target: Path, marker: str) -> Iterator[Path]:
    """A sibling folder to fill, renamed to `target` when the block ends without an error.

    On an error (an interrupt too) nothing stays behind and an existing `target` is untouched. An
    existing `target` is replaced only if it holds the file `marker`, that is, if it is of our kind.
    What runs that were killed left behind goes; an old `target` that one of them had set aside
    comes back first.

    Raises:
        UsageError: `target` exists and is not of our kind, or its parent cannot be written.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{_PART}"):
        if left.is_dir() and not left.is_symlink():
            _remove_stale(left, target)
    if target.is_symlink() or (target.exists() and not (target / marker).is_file()):
        raise UsageError(f"{target} exists and has no {marker}; remove it or choose another name")
    new_parents = [p for p in (target.parent, *target.parent.parents) if not p.exists()]
    make_output_folder(target.parent)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PART, dir=target.parent))
    lock = os.open(part, os.O_RDONLY)
    _lock(lock)
    try:
        folder = part / "new"
        folder.mkdir()
        yield folder
        _fsync_tree(folder)
        if target.exists():
            target.rename(part / "old")
        try:
            folder.rename(target)
        except BaseException:
            if (part / "old").exists() and not target.exists():
                (part / "old").rename(target)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)
        for folder in new_parents:  # parents that we made and that stayed empty go again
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """A folder of ours among the system's temporary ones, gone after the block.

    Those of the same kind that killed runs of this user left behind go too.

    Args:
        kind: a word for its name.
    """
    prefix = f"cxrgaze-{kind}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if left.is_dir() and not left.is_symlink() and left.lstat().st_uid == os.getuid():
                _remove_stale(left)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        lock = os.open(folder, os.O_RDONLY)
        try:
            _lock(lock)
            yield Path(folder)
        finally:
            os.close(lock)


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold an output folder for this run alone.

    Raises:
        UsageError: another run writes into it.
    """
    path = folder / ".cxrgaze.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if not _lock(descriptor):
            raise UsageError(f"another run writes into {folder}; wait for it or choose another")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


_PART = ".part"
"""Suffix of what is being written; whoever writes it holds a lock on it."""


def _lock(descriptor: int) -> bool:
    """Take the lock of a file or folder until it is closed; False where another has it.

    Where the file system knows no locks nothing is taken for stale.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _remove_stale(path: Path, target: Path | None = None) -> None:
    """Remove what a killed run left, unless its run lives on; bring back what it had set aside."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_file():
                path.unlink()
                return
            if target is not None and (path / "old").is_dir() and not target.exists():
                (path / "old").rename(target)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
