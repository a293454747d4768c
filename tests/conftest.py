from __future__ import annotations

from pathlib import Path

import pytest

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
    """A folder with demo-fp32.cxrgaze and demo-fp16.cxrgaze; copy before you change anything."""
    folder = tmp_path_factory.mktemp("bundles")
    for precision in ("fp32", "fp16"):
        assert export_cli.main(["--precision", precision, "--output", str(folder)]) == 0
    return folder
