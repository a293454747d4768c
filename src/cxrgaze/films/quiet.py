"""Parsers kept quiet: what they warn of and log may quote header values, which identify patients.

What silences them is of the whole process (`warnings.catch_warnings`, pydicom's settings): threads
that each put back what they found would leave it changed for good. So one lock is held while it is
silenced; frames are decoded outside of it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

import pydicom

_LOCK = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings, and pydicom's validation and log, are off inside the block; a thread at a time."""
    log = logging.getLogger("pydicom")
    with _LOCK, warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        before = log.level
        log.setLevel(logging.CRITICAL + 1)  # of the loggers below it too
        try:
            yield
        finally:
            log.setLevel(before)
