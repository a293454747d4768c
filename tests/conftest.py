from __future__ import annotations

import os
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
