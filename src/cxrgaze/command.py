"""What every command shares: parsing, exit codes, interrupts, progress on standard error.

Results go to standard output, everything else to standard error. Imports nothing heavy: `--help`
must be instant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from cxrgaze.errors import CxrgazeError, ExitCode

T = TypeVar("T")

EXIT_HELP = (
    "exit codes: 0 ok, 1 failure (also when some of many inputs failed), 2 usage, 3 build, "
    "4 parity, 5 gate, 6 incompatible, 7 integrity, 8 objective missed, 9 inconclusive, "
    "10 out of memory, 11 data, 130 interrupted. "
    "Research software, not a medical device."
)


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """An argument parser in the house's form."""
    from importlib.metadata import version

    arguments = argparse.ArgumentParser(
        prog=prog, description=description, epilog=EXIT_HELP, allow_abbrev=False
    )
    arguments.add_argument("--version", action="version", version=f"%(prog)s {version('cxrgaze')}")
    return arguments


def execute(
    arguments: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Parse, run, and turn errors into one line and the right exit code.

    SIGTERM unwinds like Ctrl-C, so that nothing half-written stays behind.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))
    args = arguments.parse_args(argv)
    if gpu := getattr(args, "gpu", None):
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi and NVML number them
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        with _own_matplotlib_folder():
            code = run(args)
        sys.stdout.flush()
        return code
    except CxrgazeError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing half-written was left behind", ExitCode.INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # no noise at exit
        return ExitCode.FAILURE
    except MemoryError:
        return _fail("out of memory", ExitCode.OUT_OF_MEMORY)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("cxrgaze"):
            raise
        extra = "sign" if error.name == "cryptography" else _EXTRA.get(arguments.prog.split()[0])
        return _fail(
            f"the package {error.name!r} is not installed, which this command needs; "
            f"install cxrgaze with its extra {extra or 'export'!r} (README, Installing)",
            ExitCode.INCOMPATIBLE,
        )
    except OSError as error:
        return _fail(f"{error.filename or 'input or output'}: {error.strerror}", ExitCode.FAILURE)


_EXTRA = {"cxrgaze-train": "train", "cxrgaze-export": "export", "cxrgaze-bench": "peers"}


def bounded(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: an integer from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, found {text}")
        return value

    return parse


def add_threads(arguments: argparse.ArgumentParser) -> None:
    """Add `--threads`, None where it is not given."""
    arguments.add_argument(
        "--threads", type=bounded(1, 1024), metavar="N", help="CPU threads (default: all cores)"
    )


def add_cache(arguments: argparse.ArgumentParser) -> None:
    """Add `--cache`, the folder of plans, None where it is not given."""
    arguments.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder of plans (default: CXRGAZE_CACHE, or in ~/.cache)",
    )


def add_gpu(arguments: argparse.ArgumentParser) -> None:
    """Add `--gpu`, which `execute` makes the only one that this process and its children see."""
    arguments.add_argument(
        "--gpu",
        metavar="N|UUID",
        help="the GPU, as nvidia-smi numbers them, or its UUID (default: the first)",
    )


def add_split(arguments: argparse._ActionsContainer, flag: str, default: str) -> None:
    """Add a split of a labelled set, or "all" (`cxrgaze.evidence.labelled_set.split_named`)."""
    choices = ("train", "val", "test", "all")
    arguments.add_argument(flag, choices=choices, default=default, help=f"(default {default})")


def add_identity_key(arguments: argparse._ActionsContainer) -> None:
    """Add the key under which patients are compared (`cxrgaze.evidence.seen`)."""
    arguments.add_argument(
        "--identity-key",
        type=Path,
        metavar="FILE",
        help="a key of your site (head -c 32 /dev/urandom), never written anywhere: patients are "
        "recorded and compared as HMACs under it; without it films are, by their SHA-256",
    )


def say(text: str) -> None:
    """Text on standard error."""
    print(text, file=sys.stderr, flush=True)


def shown(text: object) -> str:
    """Text on one line of a terminal: what steers it, as the name of a file may, is escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(text)
    )


class Deferred:
    """Whether an interrupt was asked for."""

    def __init__(self) -> None:
        self.asked = False


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Deferred]:
    """Ctrl-C and SIGTERM only set a flag inside the block, and interrupt after it.

    For libraries that call back into Python and swallow what is raised there: they must be told by
    a return value. In another thread than the main one, whose signals are the caller's, nothing is
    done.
    """
    deferred = Deferred()

    def note(number: int, frame: FrameType | None) -> None:
        deferred.asked = True

    before: dict[signal.Signals, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # not the main thread
            for asked in (signal.SIGINT, signal.SIGTERM):
                before[asked] = signal.signal(asked, note)
        yield deferred
    finally:
        for asked, handler in before.items():
            signal.signal(asked, handler)
    if deferred.asked:
        raise KeyboardInterrupt


def counted(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """The items, with a progress bar on standard error where that is a terminal."""
    from tqdm import tqdm

    bar: Iterator[T] = iter(tqdm(items, total=total, unit=unit, disable=None, leave=False))
    return bar


def steps(total: int | float, shown: bool = True) -> Any:
    """A bar of steps on standard error where that is a terminal; `update()` it, `close()` it."""
    from tqdm import tqdm

    return tqdm(total=total, unit="step", disable=None if shown else True, leave=False)


class Steps:
    """Named steps of a long command on standard error: number, name, seconds."""

    def __init__(self) -> None:
        self._begun = 0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """The step `name`, around its block."""
        self._begun += 1
        started = time.perf_counter()
        print(f"[{self._begun}] {name} ...", end="", file=sys.stderr, flush=True)
        try:
            yield
        except BaseException:
            say(" failed")
            raise
        say(f" {time.perf_counter() - started:.1f} s")


@contextlib.contextmanager
def _own_matplotlib_folder() -> Iterator[None]:
    """Matplotlib's settings and caches in a folder that ends with the command.

    It would fill the home folder as soon as anybody imports it, as MONAI does; nor are figures of
    ours drawn by somebody's settings. It makes the folder itself, if it is imported at all.
    """
    import secrets
    import shutil
    import tempfile

    if "MPLCONFIGDIR" in os.environ:
        yield
        return
    folder = Path(tempfile.gettempdir(), f"cxrgaze-matplotlib-{secrets.token_hex(8)}")
    os.environ["MPLCONFIGDIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["MPLCONFIGDIR"]
        shutil.rmtree(folder, ignore_errors=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: ExitCode) -> int:
    say("error: " + "\n".join(map(shown, message.splitlines())))
    return code
