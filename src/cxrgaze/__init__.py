"""cxrgaze: chest X-ray diagnosis and gaze in a proven edge engine.

Research software, not a medical device. Importing this package reads no file and touches no device.

Example:
    >>> import cxrgaze
    >>> with cxrgaze.load("demo-fp16.cxrgaze") as reader:
    ...     print(reader.read("film.png").label)
    pneumonia
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cxrgaze.errors import CxrgazeError

if TYPE_CHECKING:
    from cxrgaze.films.film import Film
    from cxrgaze.runtime.reader import Reader, load
    from cxrgaze.runtime.reading import Reading

    __version__: str

# Nothing phones out, from here or from a child: ONNX Runtime (1.29 and later, on Linux) asks
# the environment once, as it is imported. OpenVINO and NNCF import a package of their own, which
# has no switch, and do without it where that fails: a module that is None cannot be imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # typed as a module

__all__ = ["CxrgazeError", "Film", "Reader", "Reading", "__version__", "load"]

_HOME = {
    "Film": "cxrgaze.films.film",
    "Reader": "cxrgaze.runtime.reader",
    "Reading": "cxrgaze.runtime.reading",
    "load": "cxrgaze.runtime.reader",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("cxrgaze")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
