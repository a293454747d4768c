"""The error tree and the exit codes that go with it.

    CxrgazeError                    1  failure
    ├── UsageError(ValueError)      2  a request that cannot be carried out as given
    ├── BuildError                  3  TensorRT could not build the plan, or built something else
    ├── ParityError                 4  converted graph and network disagree, NaN, overflow
    ├── GateError                   5  an accuracy that was lost, or a verdict that is not "pass"
    ├── IncompatibleError           6  device, library, backend or target does not fit
    ├── IntegrityError              7  malformed, altered or foreign file (bundle, checkpoint)
    ├── OutOfMemoryError           10  not enough memory on the device, before or while it was used
    ├── DataError                  11  a labelled set that breaks a rule
    ├── DeviceError                 1  a CUDA call that failed
    └── FilmError                   1  a film that cannot be read
        └── NotApplicableError      0  a film that must not be read: a result, not a failure

Messages say what was found, what was expected and what to do. They never quote header values of a
film: those may identify a patient.
"""

from __future__ import annotations

from enum import IntEnum

INTERRUPTS = (KeyboardInterrupt, SystemExit)
"""What foreign code may raise that is not about what it was given."""


class ExitCode(IntEnum):
    """Exit codes of every command (docs/graphs.md#exit-codes)."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    BUILD = 3
    PARITY = 4
    GATE = 5
    INCOMPATIBLE = 6
    INTEGRITY = 7
    OBJECTIVE_MISSED = 8
    INCONCLUSIVE = 9
    OUT_OF_MEMORY = 10
    DATA = 11
    INTERRUPTED = 130


class CxrgazeError(Exception):
    """Base of every error that cxrgaze raises on purpose."""

    exit_code = ExitCode.FAILURE


class UsageError(CxrgazeError, ValueError):
    """The request cannot be carried out as given; nothing was started."""

    exit_code = ExitCode.USAGE


class BuildError(CxrgazeError):
    """TensorRT could not build the plan, or built another precision than was asked for."""

    exit_code = ExitCode.BUILD


class ParityError(CxrgazeError):
    """The converted graph does not compute what the network computes."""

    exit_code = ExitCode.PARITY


class GateError(CxrgazeError):
    """Accuracy was lost beyond a limit, or a verdict is not the one that was required."""

    exit_code = ExitCode.GATE


class IncompatibleError(CxrgazeError):
    """A device, library, backend or target that does not fit."""

    exit_code = ExitCode.INCOMPATIBLE


class IntegrityError(CxrgazeError):
    """A file that is malformed, altered or of another schema version."""

    exit_code = ExitCode.INTEGRITY


class OutOfMemoryError(CxrgazeError, MemoryError):
    """Not enough memory on the device."""

    exit_code = ExitCode.OUT_OF_MEMORY


class DeviceError(CxrgazeError):
    """A CUDA call that failed: the message has the call, the code and its meaning."""


class DataError(CxrgazeError):
    """A labelled set that breaks one of its rules."""

    exit_code = ExitCode.DATA


class FilmError(CxrgazeError):
    """A film that cannot be read."""


class NotApplicableError(FilmError):
    """A readable film that the network must not be applied to; `reasons` says why."""

    exit_code = ExitCode.OK

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__(reasons)  # what it is made of again, where it is unpickled
        self.reasons = reasons

    def __str__(self) -> str:
        return "not applicable: " + "; ".join(self.reasons)


def unforeseen(film: str, error: Exception) -> FilmError:
    """An error about one film that nobody foresaw: it must not cost the others.

    Only the error's type is told: its message may quote header values.
    """
    kind = type(error).__name__
    return FilmError(f"{film}: not read ({kind}); this is a fault of cxrgaze, please report it")
