"""When and with what a record was made."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import version


def now_utc() -> str:
    """The time for a record, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions(*packages: str) -> dict[str, str]:
    """Versions of cxrgaze, of Python and of installed packages.

    Raises:
        PackageNotFoundError: one that is not installed.
    """
    return {
        "cxrgaze": version("cxrgaze"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
