from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from cxrgaze.export import cli as export_cli

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def films() -> Path:
    """The real films of the repository."""
    return ROOT / "examples" / "films"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("needs ../shared, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def package_index() -> None:
    """Skips where pip reaches no package index; what pip then does not find is a failure."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
    command += ["--ignore-installed", "--retries", "0", "pip"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("pip reaches no package index here")


@pytest.fixture(scope="session")
def interrupted() -> Callable[..., tuple[int, str]]:
    """Runs a module, sends a signal once it says certain words; its exit code and its words."""

    def run(
        module: str, arguments: Sequence[object], words: str, number: int, **environment: str
    ) -> tuple[int, str]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        assert process.stderr is not None
        seen = b""
        while words.encode() not in seen and (byte := process.stderr.read(1)):
            seen += byte
        process.send_signal(number)
        _, rest = process.communicate(timeout=120)
        return process.returncode, (seen + rest).decode()

    return run


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with demo-fp32.cxrgaze and demo-fp16.cxrgaze; copy before you change anything.

    The processes of pytest-xdist share it: whichever comes first makes it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bundles"
    with FileLock(f"{folder}.lock"):
        for precision in ("fp32", "fp16"):
            if not (folder / f"demo-{precision}.cxrgaze").exists():
                assert export_cli.main(["--precision", precision, "--output", str(folder)]) == 0
    return folder
