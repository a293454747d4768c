"""Typed records as JSON: one base, one reader of versioned ones, one digest.

A record that is a file of its own says its schema version; one that must not be edited unseen
(`Digested`) has canonical bytes and a digest of itself.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cxrgaze.errors import IntegrityError
from cxrgaze.files import parse_json, render_json, sha256


class Frozen(BaseModel):
    """Base of all records: immutable, unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Record(Frozen):
    """A record that is a file of its own; subclasses say the three constants."""

    VERSION: ClassVar[int]
    """Schema version that this cxrgaze writes and reads."""
    WHAT: ClassVar[str]
    """What it is, for messages."""
    REMEDY: ClassVar[str]
    """What to do where it cannot be read."""

    schema_version: int

    def rendered(self) -> bytes:
        """The bytes of its file."""
        return render_json(self.model_dump(mode="json"))


class Digested(Record):
    """A record with the SHA-256 of its own rendering with an empty digest."""

    digest: str = ""

    @property
    def is_intact(self) -> bool:
        """Whether the digest is that of the content, or none was filled in yet."""
        return not self.digest or self.digest == self._own_digest()

    def _own_digest(self) -> str:
        return sha256(render_json({**self.model_dump(mode="json"), "digest": ""}))

    def rendered(self) -> bytes:
        """The canonical bytes, digest filled in."""
        content = self.model_dump(mode="json")
        return render_json({**content, "digest": self._own_digest()})


AnyRecord = TypeVar("AnyRecord", bound=Record)


def parse_record(kind: type[AnyRecord], data: bytes, name: str) -> AnyRecord:
    """The record in the bytes of its file.

    Args:
        name: of the file, for messages.

    Raises:
        IntegrityError: no JSON, of another schema version, malformed, or not as it was written.
    """
    content = parse_json(data, name)
    if content.get("schema_version") != kind.VERSION:
        raise IntegrityError(
            f"{name}: {kind.WHAT} schema version {content.get('schema_version')!r}, this cxrgaze "
            f"reads {kind.VERSION}; {kind.REMEDY}"
        )
    try:
        record = kind.model_validate(content)
    except ValidationError as error:
        raise IntegrityError(f"{name} is no {kind.WHAT}: {complaint(error)}") from error
    if isinstance(record, Digested) and record.rendered() != data:
        raise IntegrityError(f"{name} was altered: it does not match its own digest; {kind.REMEDY}")
    return record


def complaint(error: ValidationError) -> str:
    """The first complaint of a validation error, on one line."""
    detail = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, detail['loc'])) or 'as a whole'}: {detail['msg']}"
