"""What a network has seen: the SHA-256 of its films' files, and its patients under a site's key.

One sorted text file beside a checkpoint's card and in its bundles, a line each: `film SHA-256`,
and where a key was given `key IDENTITY` and `patient HMAC-SHA256`. A film's hash has no salt: who
can guess it has the film. A patient's number can be guessed, so it goes through an HMAC with a key
that stays with the site and is written nowhere.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cxrgaze.errors import DataError, IntegrityError, UsageError
from cxrgaze.evidence.labelled_set import FilmRow
from cxrgaze.files import read_regular

_KEY_BYTES = (16, 4096)
_HEX = set("0123456789abcdef")


def read_key(path: Path | None) -> bytes | None:
    """A site's key from a file, None without one.

    Raises:
        UsageError: no such file, or not 16 to 4096 bytes.
    """
    if path is None:
        return None
    try:
        key = read_regular(path, _KEY_BYTES[1])
    except (OSError, IntegrityError) as error:
        raise UsageError(f"--identity-key {path}: {error}") from error
    if len(key) < _KEY_BYTES[0]:
        raise UsageError(
            f"--identity-key {path}: {len(key)} bytes, expected {_KEY_BYTES[0]} or more; make one "
            f"with: head -c 32 /dev/urandom > {path}"
        )
    return key


@dataclass(frozen=True)
class Seen:
    """Films and patients."""

    films: frozenset[str]
    """SHA-256 of their files."""
    patients: frozenset[str] = frozenset()
    """HMAC-SHA256 of their pseudonyms."""
    key: str = ""
    """Identity of the key; "" without one."""

    @classmethod
    def of(cls, rows: Iterable[FilmRow], key: bytes | None) -> Seen:
        """The films and patients of some rows of a set."""
        listed = list(rows)
        films = frozenset(row.sha256 for row in listed)
        if key is None:
            return cls(films)
        patients = frozenset(_under(key, f"patient {row.patient}") for row in listed)
        return cls(films, patients, _under(key, "key")[:16])

    @classmethod
    def parse(cls, data: bytes, where: str) -> Seen:
        """What `rendered` wrote.

        Raises:
            IntegrityError: it did not write that.
        """
        found: dict[str, list[str]] = {"film": [], "patient": [], "key": []}
        for number, line in enumerate(data.decode("ascii", "replace").splitlines(), start=1):
            kind, _, value = line.partition(" ")
            if kind not in found or not value or not set(value) <= _HEX:
                raise IntegrityError(f"{where}, line {number}: expected film, patient or key")
            found[kind].append(value)
        if len(found["key"]) > 1:
            raise IntegrityError(f"{where}: {len(found['key'])} keys, expected one at most")
        return cls(frozenset(found["film"]), frozenset(found["patient"]), "".join(found["key"]))

    def rendered(self) -> bytes:
        """As a file."""
        lines = [f"film {sha}" for sha in self.films] + [f"patient {p}" for p in self.patients]
        lines += [f"key {self.key}"] if self.key else []
        return "".join(f"{line}\n" for line in sorted(lines)).encode()

    def joined(self, other: Seen | None) -> Seen:
        """With what another network has seen; patients of another key cannot be told, and go."""
        if other is None:
            return self
        same = other.key == self.key
        patients = self.patients | other.patients if same else self.patients
        return Seen(self.films | other.films, patients, self.key)

    def shared(self, other: Seen) -> str:
        """How many films and patients two have in common, "" for none that are known."""
        films = len(self.films & other.films)
        patients = len(self.patients & other.patients) if self.key == other.key else 0
        found = [f"{films} films"] * bool(films) + [f"{patients} patients"] * bool(patients)
        return " and ".join(found)

    def not_compared(self, other: Seen) -> str:
        """Why patients could not be compared, "" where they were."""
        if self.key and self.key == other.key:
            return ""
        return "patients were not compared: that takes the --identity-key of the training run"


def require_unseen(seen: Seen | None, asked: Seen, where: str) -> str:
    """Refuse films or patients that a network was trained on.

    Args:
        where: the films are, for the message.

    Returns:
        What was not compared, "" where all was.

    Raises:
        DataError: saying how many it has seen; none is named.
    """
    if seen is None:
        return "the network's training films are not recorded: nothing was compared with them"
    if shared := seen.shared(asked):
        raise DataError(
            f"{where}: {shared} are those that the network was trained on (by the hashes that it "
            "keeps); take others, its verdict would flatter"
        )
    return seen.not_compared(asked)


def _under(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), "sha256").hexdigest()
