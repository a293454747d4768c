"""Films and a reader: the outcome of each, in which an error about one film is a value."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cxrgaze.errors import CxrgazeError, FilmError, NotApplicableError, unforeseen
from cxrgaze.films.ahead import Decode, decoded, in_order
from cxrgaze.films.film import Film
from cxrgaze.runtime.reader import Reader
from cxrgaze.runtime.reading import Reading
from cxrgaze.spec import NOTICE


@dataclass(frozen=True)
class Outcome:
    """What became of one film."""

    path: Path
    status: Literal["read", "not_applicable", "failed", "skipped"]
    """Skipped: a file in a folder of films that is taken for none."""
    reason: str = ""
    """Why it was not read."""
    film: Film | None = None
    """None where it could not be decoded."""
    reading: Reading | None = None
    """None where it was not read."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        if self.reading:
            return {**self.reading.to_json(), "film": printable(self.path)}
        return {
            "film": printable(self.path),
            "status": self.status,
            "reason": printable(self.reason),
            "notice": NOTICE,
        }


def outcome_of(reader: Reader, path: Path, decode: Decode, *, force: bool = False) -> Outcome:
    """What becomes of one film.

    Args:
        decode: makes a film of a path.
        force: read it even if it is not applicable.

    Raises:
        CxrgazeError, MemoryError: what concerns every film: a device, a backend, a closed reader.
    """
    film = decoded(decode, path)
    if isinstance(film, NotApplicableError):
        return Outcome(path, "not_applicable", "; ".join(film.reasons))
    if isinstance(film, FilmError):
        return Outcome(path, "failed", str(film))
    try:
        return Outcome(path, "read", film=film, reading=reader.read(film, force=force))
    except NotApplicableError as error:
        return Outcome(path, "not_applicable", "; ".join(error.reasons), film)
    except FilmError as error:
        return Outcome(path, "failed", str(error), film)
    except (CxrgazeError, MemoryError):
        raise  # a device, a backend, a closed reader: it concerns every film
    except Exception as error:
        return Outcome(path, "failed", str(unforeseen(str(path), error)), film)


def outcomes(
    reader: Reader,
    paths: Iterable[Path],
    decode: Decode,
    *,
    force: bool = False,
    workers: int = 1,
) -> Generator[Outcome, None, None]:
    """An `outcome_of` each film, in the order of `paths`; close it to stop early.

    Args:
        workers: threads, each with a film; `load(at_once=)` of them infer at the same time.
    """
    work = partial(outcome_of, reader, decode=decode, force=force)
    return in_order(paths, work, workers=workers, waiting=workers)


def printable(text: Path | str) -> str:
    """Text that can be encoded: bytes of a file name that are no UTF-8 become escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()
