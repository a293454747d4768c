"""What an export is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from cxrgaze.bundles.manifest import Precision, Target
from cxrgaze.bundles.verdicts import REASONS, Limits
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
    identity_key: bytes | None = None
    """A site's key, under which the training run recorded its patients."""


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
class ValidationOptions:
    """What temperatures and operating points of a low precision are fitted on."""

    folder: Path | None = None
    """A labelled set; None takes the calibration's, or of a network that ships its phantoms."""
    split: Split | None = "val"


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
    validation: ValidationOptions = ValidationOptions()
    fallback_trials: int = 0
    """Trials of the fallback search; 0: none."""


def read_limits(path: Path | None) -> Limits:
    """Limits of the gate from a TOML file, the defaults without one.

    A table for each limit that is not the default: `limit`, and `reason` in words.

    Raises:
        UsageError: no such file, not limits, or one without its reason.
    """
    if path is None:
        return Limits()
    content, reasons = read_toml(path), {}
    for name, table in content.items():
        known = name in REASONS and isinstance(table, dict) and set(table) == {"limit", "reason"}
        if not known or not isinstance(table["reason"], str) or not table["reason"].strip():
            raise UsageError(
                f"{path}: {name}: expected a table of {', '.join(REASONS)}, with limit = ... and "
                'reason = "...": why so much may be lost'
            )
        reasons[name] = table["reason"].strip()
    values = {name: table["limit"] for name, table in content.items()}
    try:
        return Limits.model_validate({**values, "reasons": reasons})
    except ValidationError as error:
        raise UsageError(f"{path}: {complaint(error)}") from error
