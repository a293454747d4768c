"""What every command shares: signals, closed streams, names that steer a terminal; and errors."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cxrgaze import command, errors

BIN = Path(sys.executable).parent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_the_block(number):
    before = signal.getsignal(number)
    reached = []
    with pytest.raises(KeyboardInterrupt), command.deferred_interrupts() as deferred:
        os.kill(os.getpid(), number)
        reached.append(deferred.asked)
    assert reached == [True] and signal.getsignal(number) == before


def test_a_block_without_an_interrupt_ends_as_it_began():
    with command.deferred_interrupts() as deferred:
        assert not deferred.asked
    with pytest.raises(ValueError, match="its own"), command.deferred_interrupts():
        raise ValueError("its own")


def test_in_another_thread_signals_are_the_callers():
    found = []

    def run():
        with command.deferred_interrupts() as deferred:
            found.append(deferred.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]


def test_names_do_not_steer_a_terminal():
    """D12."""
    hostile = "a\x1b[2Jb\nread\tnormal\r\x07\u202e\udcff.png"
    shown = command.shown(hostile)
    assert shown == r"a\x1b[2Jb\nread\tnormal\r\x07\u202e\udcff.png"
    assert shown.isprintable() and command.shown("\u00e4 b.png") == "\u00e4 b.png"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_traceback(closed, tmp_path):
    """B13: a service manager may start us without them."""
    run = subprocess.run(
        f"{BIN / 'cxrgaze-inspect'} --device {closed} < /dev/null",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "Traceback" not in run.stderr


ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.CxrgazeError)
]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_pickling(kind):
    """B13: a pool of processes hands them over so."""
    argument = ("lateral", "colour") if kind is errors.NotApplicableError else "what was found"
    error = kind(argument)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and str(again) == str(error)
    if kind is errors.NotApplicableError:
        assert again.reasons == argument
        assert str(again) == "not applicable: lateral; colour"


def test_the_gpu_that_is_chosen_is_the_only_one_that_is_seen(monkeypatch):
    """B10: once, for this process and its children, in nvidia-smi's order."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "as it was")
    parser = command.parser("cxrgaze-test", "A test.")
    command.add_gpu(parser)
    seen = []

    def run(args):
        seen.append((os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]))
        return 0

    assert command.execute(parser, run, []) == 0
    assert command.execute(parser, run, ["--gpu", "GPU-1234"]) == 0
    assert seen == [("as it was", "as it was"), ("GPU-1234", "PCI_BUS_ID")]
