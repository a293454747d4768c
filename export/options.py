"""What an export is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cxrgaze.bundles.manifest import Precision, Target
from cxrgaze.bundles.verdicts import Limits
from cxrgaze.errors import UsageError
from cxrgaze.evidence.labelled_set import Split
from cxrgaze.export.ranges import Method
from cxrgaze.files import read_toml
from cxrgaze.records import complaint


@dataclass(frozen=True)
class GateOptions:
    """What the gate is to be asked."""

    folder: Path | None = None
    """A labelled set; None takes phantoms where the network was trained on phantoms."""
    split: Split | None = "test"
    skip: bool = False
    """Export without a gate, and say so."""
    heatmap: str | None = None
    """Preset of the human maps; None takes the one that the network was trained with."""
    limits: Limits = Limits()


@dataclass(frozen=True)
class Int8Options:
    """How int8 is calibrated."""

    folder: Path | None = None
    """A labelled set; None takes phantoms where the network was trained on phantoms or nothing."""
    split: Split | None = "train"
    films: int = 64
    """At most so many, chosen by seed."""
    method: Method = "minmax"


@dataclass(frozen=True)
class ExportOptions:
    """What `cxrgaze-export` was asked for."""

    precision: Precision
    target: Target
    output: Path
    films: Sequence[Path] = ()
    """Films for parity; none: phantoms."""
    sign: Path | None = None
    """Private key to sign the bundle with."""
    gate: GateOptions = GateOptions()
    int8: Int8Options = Int8Options()
    fallback_trials: int = 0
    """Trials of the fallback search; 0: none."""


def read_limits(path: Path | None) -> Limits:
    """Limits of the gate from a TOML file, the defaults without one.

    Raises:
        UsageError: no such file, or not limits.
    """
    if path is None:
        return Limits()
    try:
        return Limits.model_validate(read_toml(path))
    except ValidationError as error:
        raise UsageError(f"{path}: {complaint(error)}") from error
