"""Any file to a Film: decoded, windowed, in [0, 1], dense tissue white."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import replace
from pathlib import Path

from cxrgaze.errors import INTERRUPTS, FilmError
from cxrgaze.films import images
from cxrgaze.films.film import Film, content_checked
from cxrgaze.films.find import looks_like_dicom, looks_like_image
from cxrgaze.films.windows import Window

BYTE_LIMIT = 1 << 30


def load_film(path: Path | str, window: Window | None = None, *, keep_stored: bool = False) -> Film:
    """The film in a file.

    Args:
        window, keep_stored: see `film_from_bytes`.

    Raises:
        FilmError: missing, unreadable, damaged or of no known format.
    """
    start = time.perf_counter()
    film = film_from_bytes(read_file(path), str(path), window, keep_stored=keep_stored)
    return replace(film, decode_ms=(time.perf_counter() - start) * 1e3)


def read_file(path: Path | str) -> bytes:
    """The bytes of a film's file.

    Raises:
        FilmError: no file, one that cannot be read, or larger than `BYTE_LIMIT`.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FilmError(f"{path}: not a regular file")
            if status.st_size > BYTE_LIMIT:
                raise FilmError(f"{path}: larger than {BYTE_LIMIT >> 20} MiB")
            return file.read(status.st_size + 1)
    except OSError as error:
        raise FilmError(f"{path}: cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a NUL byte in the path
        raise FilmError(f"{path}: no path of a file: {error}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe without a writer would block for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def film_from_bytes(
    data: bytes, name: str, window: Window | None = None, *, keep_stored: bool = False
) -> Film:
    """The film in the bytes of a file.

    Args:
        name: stands in messages and results; its suffix is a hint.
        window: centre and width that replace a DICOM film's own, on values oriented so that larger
            is whiter; no effect on other files.
        keep_stored: give the film the values as the file has them too (`Film.stored`).

    Raises:
        FilmError: empty, too large, damaged or of no known format.
    """
    if not data:
        raise FilmError(f"{name}: the file is empty (0 bytes)")
    if len(data) > BYTE_LIMIT:
        raise FilmError(f"{name}: larger than {BYTE_LIMIT >> 20} MiB")
    try:
        film = content_checked(_decoded(data, name, window))
        return film if keep_stored else replace(film, stored=None)
    except (FilmError, *INTERRUPTS):
        raise
    except MemoryError as error:
        raise FilmError(f"{name}: needs more memory than there is; refused") from error
    except BaseException as error:  # decoders in Rust raise what is no Exception
        # Its message may quote header values: only the type is told, and no cause is chained.
        raise FilmError(f"{name}: damaged file ({type(error).__name__})") from None


def promised_samples(data: bytes) -> int:
    """How many samples the header of a film's file says that it has; 0 where it says nothing.

    Raises:
        Exception: whatever a damaged header raises inside pydicom and Pillow.
    """
    if looks_like_image(data):
        return images.promised_samples(data)
    from cxrgaze.films import dicom

    return dicom.promised_samples(data)


def _decoded(data: bytes, name: str, window: Window | None) -> Film:
    is_named = Path(name).suffix.lower() in (".dcm", ".dicom")
    if looks_like_dicom(data) or (is_named and not looks_like_image(data)):
        from cxrgaze.films import dicom

        return dicom.film_from_dicom(data, name, window)
    return images.film_from_image(data, name)
