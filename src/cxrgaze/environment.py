"""When and with what a record was made."""

from __future__ import annotations

import contextlib
import datetime
import platform
from importlib.metadata import PackageNotFoundError, version


def now_utc() -> str:
    """The time for a record, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions(*names: str) -> dict[str, str]:
    """Versions of `python` and of packages, those that are installed."""
    here = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            here[name] = platform.python_version() if name == "python" else version(name)
    return here
