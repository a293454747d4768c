from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def package_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where pip reaches no package index; what pip then does not find is a failure."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
    command += ["--ignore-installed", "--retries", "0", "pip"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("pip reaches no package index here")
